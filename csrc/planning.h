/* Problem -> plan: what a plan depends on is taken from the problem, the module's state and the
 * device; errors become exceptions, and what is dropped a warning. */
#ifndef FA_PLANNING_H
#define FA_PLANNING_H

#include "plan.h"
#include "problem.h"
#include "state.h"

/* What the plan of a problem depends on. In the backward dO is `dout`, or NULL where it is taken to
 * lie like a new tensor. */
struct fa_plan_input fa_planning_input(const struct fa_problem *problem,
                                       enum fa_direction direction, const struct fa_tensor *dout);

/* Sets input->may_split, which depends on the size of the device: see fa_planning_make. 0 or -1. */
int fa_planning_set_may_split(struct fa_state *state, const struct fa_problem *problem, int ordinal,
                              int arch, struct fa_plan_input *input);

/* The plan on CUDA device `ordinal`, or without a device for the architecture `arch` where that is
 * not 0. 0, or -1 with the exception set. */
int fa_planning_make(struct fa_state *state, const struct fa_plan_input *input, int ordinal,
                     int arch, struct fa_plan *plan);

/* Sizes the plan of an input for the problem, where the input does not hold all that grids depend
 * on: lengths on the device have bounds, which may differ from call to call. 0 or -1. */
int fa_planning_fit(const struct fa_problem *problem, const struct fa_plan_input *input,
                    struct fa_plan *plan);

/* The class of cards of a name that says nothing of it, as it was measured. 0, or -1 with
 * ValueError set. */
int fa_planning_use_card(struct fa_state *state, const char *name, int kind);

/* Nothing that was asked for is dropped silently: one warning per process and reason. 0 or -1. */
int fa_planning_warn(struct fa_state *state, const struct fa_plan *plan);

#endif
