/* How a call is carried out, in either direction: what it depends on -> kernels one after the
 * other. Pure C, no Python, no CUDA, so it answers for any architecture on any machine. */
#ifndef FA_PLAN_H
#define FA_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "device.h"
#include "tiles.h"
#include "variant.h"

/* No tile has fewer keys, or other than whole multiples of them. */
#define FA_KEY_STEP 16

/* Of those that the TMA feeds. */
#define FA_TMA_KEY_STEP 32

/* All that a plan depends on beside the device. Ints alone, without padding: inputs compare and
 * hash as bytes. What only reaches a kernel's parameters (the exact number of keys, the scale) is
 * not here, so that a decoding loop whose keys grow finds its plan again. */
struct fa_plan_input {
    int direction; /* enum fa_direction */
    int dtype;     /* enum fa_dtype */
    int batch;     /* where varlen: 1 */
    int seqlen_q;  /* where varlen: the bound, rounded up to a power of two */
    int seqlen_k;  /* rounded up to FA_KEY_STEP; where varlen like seqlen_q */
    int heads_q, heads_kv;
    int head_dim, head_dim_v;
    int window_left, window_right;
    int mask_right, mask_left; /* whether the window hides any key, on either side */
    int all_see_keys;          /* whether every query sees a key */
    int softcap;               /* whether scores are capped */
    int dropout;               /* whether weights are dropped */
    int alibi;                 /* whether they fall with distance */
    int bias;                  /* whether a bias is added to them */
    int bias_fp32;             /* in fp32, not in the type of the others */
    int bias_pairs;            /* forward: kernels may read aligned pairs of it */
    int bias_shared;           /* whether several scores share one of its elements */
    int bias_gradient;         /* backward: whether its gradient is wanted */
    int score_mod, mask_mod;   /* numbers of the texts that change and mask scores; 0: none */
    int captured_gradients;    /* whether what score_mod captured gets any */
    int sink;                  /* whether there is one */
    int num_splits;            /* 0: as the plan chooses; else at most as many parts of the keys */
    int may_split;             /* varlen and num_splits 0: fa_plan_may_split; else 0 */
    int pack_gqa;              /* enum fa_pack_gqa */
    int deterministic;
    int varlen;           /* lengths are on the device, and differ from sequence to sequence */
    int paged;            /* K and V lie in pages */
    int leftpad;          /* the first key of a sequence is not row 0 of its pages */
    int e4m3;             /* K and V are e4m3 */
    int q_e4m3;           /* Q is, too */
    int append;           /* new rows of K and V are appended to them first */
    int box_rows;         /* where paged: of a box of the TMA, of FA_TMA_KEY_STEP at most */
    int block_q, block_k; /* queries and keys of listed blocks; 0: none are listed */
    int own_lists;        /* query heads have lists of their own */
    int tma_strides;      /* tensor maps can describe K and V; in the backward Q and dO */
};

/* What grids and the workspace are as large as. A plan for sequences of any lengths serves calls of
 * other extents, too. */
struct fa_extent {
    int batch;
    int seqlen_q, seqlen_k; /* where varlen: bounds */
    bool is_packed_q, is_packed_k;
    bool has_unused_rows; /* q and out may have rows that no sequence has, or uses */
    int64_t rows_q;       /* of q for each head */
    int64_t rows_k;       /* of k where it is packed */
    /* Where rows are appended: blocks that append one of K or V, and that rotate one of q. */
    int64_t new_blocks, q_blocks;
};

/* What a launch computes. It tells which struct of kernels/params.h the kernel takes. */
enum fa_job {
    FA_JOB_APPEND,
    FA_JOB_FORWARD,
    FA_JOB_COMBINE,
    FA_JOB_FILL,
    FA_JOB_PREPROCESS,
    FA_JOB_ORDER,
    FA_JOB_BACKWARD,
    FA_JOB_DQ,
    FA_JOB_DK,
    FA_JOB_DV,
    FA_JOB_DSINK,
    FA_JOB_CAPTURED,
    FA_JOB_CAPTURED_SUMS,
};

/* One launch. */
struct fa_step {
    enum fa_job job;
    struct fa_variant variant;
    int blocks; /* the grid; 0: nothing to launch */
    int threads;
    int smem_request; /* more than smem_bytes where FA_SM120_LIMITS pads it */
    /* It may start before the step before it has ended, for whose end it waits itself: programmatic
     * dependent launch. That step waits for all before it. */
    bool overlaps_previous;
};

#define FA_MAX_REASONS 14
struct fa_reason {
    const char *choice, *why; /* "kernel", "float16 and bfloat16 run on ..." */
    bool dropped;             /* although the caller asked for it */
};

/* Where things start in the workspace, in units of four bytes. */
struct fa_workspace {
    int64_t out_parts, lse_parts; /* of a split forward */
    int64_t rotated_q, seqused_k; /* of one that appends: what attention reads */
    int64_t dq_accum, dk_accum, dv_accum;
    int64_t dq_semaphores, dkv_semaphores, block_counter;
    int64_t added_before; /* see fa_addition_order */
    int64_t list;         /* of tiles, see kernels/tile_list.cuh */
    int64_t zeros; /* from here on it has to be zero before the backward's main kernel runs */
    int64_t size;
};

#define FA_MAX_STEPS 10
struct fa_plan {
    int step_count;
    int main;               /* the step that multiplies matrices */
    int tile_m, tile_n;     /* queries and keys of a tile of the main kernel */
    int m_blocks, n_blocks; /* tiles of query rows per head (a KV head where packed), and of keys */
    int query_tiles;        /* backward: of a head, over the whole batch */
    int list_places;    /* of a list of tiles, in place of m_blocks, in the backward n_blocks; */
                        /* 0: there is none */
    int group_heads;    /* (batch, head) pairs that run together, sharing the L2; backward: */
                        /* (batch, KV head) */
    int group_limit;    /* no more of them, whatever the batch; forward: of KV heads */
    int splits;         /* forward: parts of the keys of a block of queries, a thread block each; */
                        /* backward: thread blocks that share a tile of keys */
    int combine_slices; /* of the parts of a row, each summed up by threads of its own */
    int smem_bytes;     /* that a block of the main kernel uses */
    int blocks_per_sm;  /* of the main kernel; in the forward registers may allow fewer */
    int sms;            /* forward: multiprocessors of the device; its figures for split.h */
    int share;
    double mma_time;
    struct fa_workspace workspace;
    int reason_count;
    struct fa_step steps[FA_MAX_STEPS]; /* in the order of their launches */
    struct fa_reason reasons[FA_MAX_REASONS];
};

/* What could not be planned: an error for the caller to raise. */
struct fa_plan_error {
    bool unsupported; /* valid but not supported, else out of range */
    const char *message;
};

/* What a plan is made for. */
struct fa_plan_target {
    struct fa_device device;
    int limits_arch;                  /* as in struct fa_settings */
    int tensor_repeat;                /* the same; 0 like 1 */
    const struct fa_tile_list *tiles; /* rows that come before those of tiles.c */
};

/* Plans either direction; the backward of a call that has queries and keys. 0, or -1 with `error`
 * filled. */
int fa_plan_make(const struct fa_plan_input *input, const struct fa_plan_target *target,
                 struct fa_plan *plan, struct fa_plan_error *error);

/* Whether a forward of sequences of any lengths, in a batch of this extent, gains from parts of the
 * keys. A plan has kernels for parts or for whole sequences, whatever the extent: this bit of it
 * the plan knows. How many parts, fa_plan_fit says. */
bool fa_plan_may_split(const struct fa_plan_input *input, const struct fa_extent *extent,
                       const struct fa_device *device);

/* Sizes grids and workspace of a plan that fa_plan_make made for `input`, which is of such an
 * extent when rounded. 0, or -1 with `error` filled. */
int fa_plan_fit(const struct fa_plan_input *input, const struct fa_extent *extent,
                struct fa_plan *plan, struct fa_plan_error *error);

/* The kernel that puts parts together, of these types; and its grid for so many rows and parts,
 * which returns how many slices the parts of a row have. */
struct fa_step fa_plan_combine(int dtype, int parts_dtype, int head_dim_v);
int fa_plan_fit_combine(int64_t rows, int parts, struct fa_step *step);

/* ---- shared by plan_forward.c and plan_backward.c -------------------------------------------- */

int fa_plan_forward(const struct fa_plan_input *input, const struct fa_plan_target *target,
                    struct fa_plan *plan, struct fa_plan_error *error);
int fa_plan_backward(const struct fa_plan_input *input, const struct fa_plan_target *target,
                     struct fa_plan *plan, struct fa_plan_error *error);

int fa_plan_fit_forward(const struct fa_plan_input *input, const struct fa_extent *extent,
                        struct fa_plan *plan, struct fa_plan_error *error);
int fa_plan_fit_backward(const struct fa_plan_input *input, const struct fa_extent *extent,
                         struct fa_plan *plan, struct fa_plan_error *error);

/* The extent of an input as it stands. */
struct fa_extent fa_plan_extent(const struct fa_plan_input *input);

/* Adds a reason for a choice. */
void fa_plan_because(struct fa_plan *plan, const char *choice, const char *why);

/* And one for what the caller asked for, and cannot have. */
void fa_plan_drop(struct fa_plan *plan, const char *choice, const char *why);

/* Adds a launch. */
struct fa_step *fa_plan_add(struct fa_plan *plan, struct fa_step step);

/* The main kernel's constants that follow from what is computed, the same in both directions; those
 * of the tile are left 0. */
struct fa_variant fa_plan_variant(const struct fa_plan_input *input);

/* The places of a list of the tiles of packed sequences, see kernels/tile_list.cuh, each of `tile`
 * of the `rows` in all: one for each sequence more than the rows fill. 0: none is made, as grids
 * from the bound, `blocks` for each sequence, are as small, or as finding the order takes the
 * square of the sequences. */
int fa_plan_list_places(int sequences, int64_t rows, int tile, int64_t blocks);

/* Fills `error`; -1. */
int fa_plan_refuse(struct fa_plan_error *error, bool unsupported, const char *message);

static inline int fa_plan_heads_per_kv(const struct fa_plan_input *input)
{
    return input->heads_q / input->heads_kv;
}

#endif
