/* How the backward of a call is carried out: kernels one after the other, and the workspace that
 * they share. Pure C, like plan.h. */
#ifndef FA_PLAN_BACKWARD_H
#define FA_PLAN_BACKWARD_H

#include "plan.h"

/* One launch; 0 blocks: not needed. */
struct fa_step {
    struct fa_variant variant;
    int blocks, threads;
    int smem_request;
};

struct fa_backward_plan {
    struct fa_step preprocess, main, dq, dk, dv, dsink; /* in this order */
    int tile_n;
    int m_blocks, n_blocks; /* tiles of queries of a head, and of keys */
    int q_splits;           /* thread blocks that share a tile of keys and split its queries */
    int smem_bytes;         /* that a block of `main` uses */
    int blocks_per_sm;      /* of `main`, whatever registers it takes */
    /* Where things start in the workspace, in units of four bytes; from dq_accum on they have to be
     * zero before `main` runs. */
    int64_t dq_accum, dk_accum, dv_accum, dq_semaphores, dkv_semaphores, block_counter;
    int64_t workspace; /* its size */
};

/* The call's properties beside its shape. */
struct fa_backward_options {
    bool deterministic;
    bool tma_strides; /* tensor maps can describe where q and dout lie */
    bool has_sink;
};

/* Plans the backward of a shape that is not empty; other arguments as of fa_plan_forward. */
int fa_plan_backward(const struct fa_shape *shape, const struct fa_backward_options *options,
                     const struct fa_device *device, int limits_arch, struct fa_backward_plan *plan,
                     struct fa_plan_error *error);

#endif
