/* fa_plan + tensors -> parameters, grid, launch. */
#ifndef FA_LAUNCH_H
#define FA_LAUNCH_H

#include "plan.h"
#include "plan_backward.h"
#include "problem.h"

struct fa_state;

/* Plans and launches the forward on the caller's current stream; does not wait for it. 0, or -1
 * with the exception set and nothing launched. */
int fa_launch_forward(struct fa_state *state, const struct fa_problem *problem);

/* Launches the backward of a problem that is not empty, likewise. */
int fa_launch_backward(struct fa_state *state, const struct fa_problem *problem,
                       const struct fa_gradients *gradients);

/* The plan of `shape` on CUDA device `ordinal`, or without a device for the architecture `arch`
 * where that is not 0. 0, or -1 with the exception set. */
int fa_launch_plan(struct fa_state *state, const struct fa_shape *shape, int ordinal, int arch,
                   struct fa_plan *plan);

/* And that of the backward. */
int fa_launch_plan_backward(struct fa_state *state, const struct fa_shape *shape,
                            const struct fa_backward_options *options, int ordinal, int arch,
                            struct fa_backward_plan *plan);

#endif
