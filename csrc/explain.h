/* Plans as Python reads them: what explain() and devices() return. */
#ifndef FA_EXPLAIN_H
#define FA_EXPLAIN_H

#include "plan.h"
#include "problem.h"
#include "state.h"

/* A dict of the plan of `problem` in a direction, on its own device or, where the options name one,
 * on an architecture without a card. In the backward dO is taken to lie like a new tensor. */
PyObject *fa_explain(struct fa_state *state, const struct fa_problem *problem,
                     enum fa_direction direction);

/* {"plans": n, "kernels": n}: what calls have planned and loaded so far. */
PyObject *fa_explain_counts(const struct fa_state *state);

/* {name, arch, sms, smem_per_block, smem_per_sm, l2_bytes}. */
PyObject *fa_explain_device(const char *name, const struct fa_device *device);

/* (driver version, [such a dict, ...]). */
PyObject *fa_explain_devices(struct fa_state *state);

#endif
