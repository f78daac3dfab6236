/* Problem + plan + workspace -> the arguments of the plan's kernels, kernels/params.h. */
#ifndef FA_ARGUMENTS_H
#define FA_ARGUMENTS_H

#include "driver.h"
#include "plan.h"
#include "parts.h"
#include "problem.h"
#include "scatter.h"

/* The arguments of all kernels of a call. */
struct fa_forward_arguments {
    struct fa_extended_forward_params main; /* kernels take what that begins with */
    struct fa_combine_params combine;
    struct fa_fill_params fill;
    struct fa_append_params append;
};
struct fa_backward_arguments {
    struct fa_captured_params main; /* kernels take what it begins with, or all of it */
    struct fa_postprocess_params dq, dk, dv;
};
union fa_arguments {
    struct fa_forward_arguments forward;
    struct fa_backward_arguments backward;
};

/* Fills what the steps of `plan` take; gradients NULL in the forward. 0, or -1 with the exception
 * set. */
int fa_arguments_make(struct fa_driver *driver, const struct fa_problem *problem,
                      const struct fa_gradients *gradients, const struct fa_plan *plan,
                      float *workspace, union fa_arguments *arguments);

/* The one that a job's kernel takes. */
void *fa_arguments_of(union fa_arguments *arguments, enum fa_job job);

/* The parameters of combine.cu for fa_launch_combine(); the parts of a row are in `slices`. */
struct fa_combine_params fa_arguments_of_parts(const struct fa_parts *parts, int slices);

/* Of kernels/kv_scatter.cu. */
struct fa_scatter_params fa_arguments_of_scatter(const struct fa_scatter *scatter);

#endif
