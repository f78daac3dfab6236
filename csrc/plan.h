/* How a call is carried out: struct fa_shape + device -> struct fa_plan. Pure C, no Python, no
 * CUDA, so it answers for any architecture on any machine. */
#ifndef FA_PLAN_H
#define FA_PLAN_H

#include <stdbool.h>

#include "problem.h"
#include "tiles.h"
#include "variant.h"

/* What a plan needs to know of a device. */
struct fa_device {
    int arch;           /* compute capability, major * 10 + minor; FA_SM120_PLAN_AS changes it */
    bool has_tma;       /* which it cannot change */
    int sms;            /* multiprocessors */
    int smem_per_block; /* bytes of shared memory that one block may ask for */
    int smem_per_sm;    /* and that the blocks of one multiprocessor share */
    int l2_bytes;
};

#define FA_MAX_REASONS 8
struct fa_reason {
    const char *choice, *why; /* "kernel", "float16 and bfloat16 run on ..." */
    bool dropped;             /* although the caller asked for it */
};

struct fa_plan {
    struct fa_variant variant;
    int tile_m;
    int m_blocks;      /* tiles of query rows per (batch, head), a KV head where they are packed */
    int group_heads;   /* such pairs that run together, to share K and V in the L2 */
    int blocks;        /* the grid */
    int threads;       /* per block */
    int smem_bytes;    /* that a block uses */
    int smem_request;  /* that the launch asks for: more where FA_SM120_LIMITS pads it */
    int blocks_per_sm; /* by shared memory and warps; registers may allow fewer */
    struct fa_reason reasons[FA_MAX_REASONS];
    int reason_count;
};

/* What could not be planned: an error for the caller to raise. */
struct fa_plan_error {
    bool unsupported; /* valid but not supported, else out of range */
    const char *message;
};

/* The published figures of an architecture, for planning without the card. */
struct fa_device fa_device_of_arch(int arch);

/* Plans `shape` on `device`; limits_arch as in struct fa_settings; the rows `own` come before those
 * of tiles.c. 0, or -1 with `error` filled. */
int fa_plan_forward(const struct fa_shape *shape, const struct fa_device *device, int limits_arch,
                    const struct fa_tile_list *own, struct fa_plan *plan,
                    struct fa_plan_error *error);

#endif
