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

/* The factor of the scores, for powers of two: not 0, whose product with the infinite score of a
 * hidden key is NaN, but then the smallest number there is, whose product with any other score
 * rounds away. And that score: its product with the factor is -inf. */
float fa_scale_log2(const struct fa_shape *shape);
float fa_hidden_score(const struct fa_shape *shape);

struct fa_strides fa_outer_strides(const struct fa_tensor *tensor);

/* A tensor [batch, seqlen, heads, head_dim] in boxes of `rows` of the sequence and as many dims as
 * tile_layout in kernels/layout.cuh puts in a row of a segment. 0 or -1. */
int fa_encode_tensor_map(struct fa_driver *driver, const struct fa_tensor *tensor, int rows,
                         struct fa_tensor_map *map);

/* Launches a kernel whose single argument is *params, without waiting for it. 0 or -1. */
int fa_enqueue(struct fa_driver *driver, CUkernel kernel, int blocks, int threads, int smem,
               CUstream stream, void *params);

#endif
