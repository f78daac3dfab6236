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

/* The second kernel of a split call, which puts the parts together. */
struct fa_combine_plan {
    struct fa_variant variant;
    int slices;         /* of the parts of a row, each for threads of its own */
    int blocks;         /* the grid */
    int threads;        /* per block */
    int64_t out_floats; /* that the parts of out take in the workspace */
    int64_t lse_floats; /* and those of lse, behind them */
};

struct fa_plan {
    struct fa_variant variant;
    int tile_m;
    int m_blocks;      /* tiles of query rows per (batch, head), a KV head where they are packed */
    int group_heads;   /* such pairs that run together, to share K and V in the L2 */
    int parts;         /* that the keys of a block are divided into, a thread block for each */
    int blocks;        /* the grid */
    int threads;       /* per block */
    int smem_bytes;    /* that a block uses */
    int smem_request;  /* that the launch asks for: more where FA_SM120_LIMITS pads it */
    int blocks_per_sm; /* by shared memory and warps; registers may allow fewer */
    struct fa_combine_plan combine; /* only where parts > 1 */
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

/* What kernels of both directions cannot do: 0, or -1 with `error` filled. */
int fa_plan_supports(const struct fa_shape *shape, const struct fa_device *device,
                     struct fa_plan_error *error);

/* Whether a mask hides any key. Causal decoding of one query does not, nor does a window as long as
 * the sequence: then the kernel without the mask computes the same. */
bool fa_shape_has_right_mask(const struct fa_shape *shape);
bool fa_shape_has_left_mask(const struct fa_shape *shape);

/* The shared memory that blocks ask for: more than they use where limits_arch allows fewer of them
 * on a multiprocessor than the device. *blocks_per_sm: so many are resident, by shared memory and
 * warps. */
int fa_plan_smem(const struct fa_device *device, int limits_arch, int smem_bytes, int threads,
                 int *blocks_per_sm);

/* Plans `shape` on `device`; limits_arch as in struct fa_settings; the rows `own` come before those
 * of tiles.c. 0, or -1 with `error` filled. */
int fa_plan_forward(const struct fa_shape *shape, const struct fa_device *device, int limits_arch,
                    const struct fa_tile_list *own, struct fa_plan *plan,
                    struct fa_plan_error *error);

#endif
