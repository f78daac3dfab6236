/* Problem -> plan -> kernels on the caller's stream. */
#ifndef FA_LAUNCH_H
#define FA_LAUNCH_H

#include "parts.h"
#include "problem.h"
#include "scatter.h"
#include "state.h"

/* Plans and launches a CUDA call on the caller's current stream; does not wait for it. In the
 * forward `gradients` is NULL; the backward's problem has queries and keys. 0, or -1 with the
 * exception set and, as far as can be known before, nothing launched. */
int fa_launch(struct fa_state *state, const struct fa_problem *problem,
              const struct fa_gradients *gradients);

/* The same for parts that another call has made. */
int fa_launch_combine(struct fa_state *state, const struct fa_parts *parts);

/* And for rows that go to their slots. */
int fa_launch_scatter(struct fa_state *state, const struct fa_scatter *scatter);

#endif
