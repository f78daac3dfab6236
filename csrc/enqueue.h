/* What the launches of both directions share. */
#ifndef FA_ENQUEUE_H
#define FA_ENQUEUE_H

#include "driver.h"
#include "plan.h"
#include "tensor.h"

struct fa_state;

/* The device to plan for: CUDA device `ordinal`, or without one that of the architecture `arch`,
 * where that is not 0; and the settings, read. 0, or -1 with the exception set. */
int fa_planning_device(struct fa_state *state, int ordinal, int arch, struct fa_device *device);

/* -1, with the exception that the error is. */
int fa_raise_plan_error(const struct fa_plan_error *error);

/* The numbers that take a score s to the exponent of 2, as kernels/params.h has them. They keep
 * away from the ends of fp32: 0 times the infinite score of a hidden key is NaN, the smallest
 * number times any other score rounds away; and no score is near a cap of 2^100, which then
 * changes none. */
struct fa_scales {
    float scale_log2, hidden_score, scale_in_cap;
};
struct fa_scales fa_scales_of(const struct fa_shape *shape);

struct fa_strides fa_outer_strides(const struct fa_tensor *tensor);

/* `number`, which is not negative, for kernels to divide by; where it is 0 nobody does. */
struct fa_divisor fa_divisor_of(int number);

/* A tensor [batch, seqlen, heads, head_dim] in boxes of `rows` of the sequence and as many dims as
 * tile_layout in kernels/layout.cuh puts in a row of a segment. 0 or -1. */
int fa_encode_tensor_map(struct fa_driver *driver, const struct fa_tensor *tensor, int rows,
                         struct fa_tensor_map *map);

/* Launches a kernel whose single argument is *params, without waiting for it. 0 or -1. */
int fa_enqueue(struct fa_driver *driver, CUkernel kernel, int blocks, int threads, int smem,
               CUstream stream, void *params);

#endif
