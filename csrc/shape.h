/* What an attention call computes, apart from its tensors. Pure C, no Python, no CUDA. */
#ifndef FA_SHAPE_H
#define FA_SHAPE_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "../kernels/params.h" /* enum fa_dtype */
#include "arithmetic.h"

#define FA_UNBOUNDED INT32_MAX /* a window side without an end */

/* Batch, lengths and heads, and packed rows: kernels can then add a few of them, and a window, in
 * 32 bits. */
#define FA_MAX_SIZE      (INT32_MAX / 8)
#define FA_MAX_HEAD_DIM  256
#define FA_MAX_PAGE_SIZE 1024

/* Whether the query heads of one KV head share the rows of a block: as the plan chooses, always,
 * never. */
enum fa_pack_gqa { FA_PACK_AUTO, FA_PACK_ALWAYS, FA_PACK_NEVER };

struct fa_shape {
    enum fa_dtype dtype; /* of q, and of what is not said to have another */
    bool is_e4m3;        /* k and v are FA_FLOAT8_E4M3 */
    bool is_q_e4m3;      /* q is, too: dtype is that of out */
    int batch;
    int seqlen_q, seqlen_k; /* where is_varlen bounds of the lengths, which the device has */
    bool is_varlen;
    bool is_packed_q, is_packed_k; /* tensors are [total, heads, head_dim], lse is [heads, total] */
    int total_q, total_k;          /* rows of the packed tensors; 0 of others */
    int page_size;                 /* rows of a page; 0: K and V do not lie in pages */
    int heads_q, heads_kv;
    int head_dim, head_dim_v;
    /* Query i sees the keys i + seqlen_k - seqlen_q + [-window_left, window_right]. */
    int window_left, window_right;
    float softmax_scale;
    float softcap; /* 0: none */
    int dropout;   /* of 2^16 weights so many are dropped */
};

/* The probability that a weight is not dropped, exactly. */
static inline float fa_keep_probability(const struct fa_shape *shape)
{
    return 1.0f - (float)shape->dropout / 65536.0f;
}

/* Query heads that share a KV head, of a shape that is not empty. */
static inline int fa_heads_per_kv(const struct fa_shape *shape)
{
    return shape->heads_q / shape->heads_kv;
}

/* Whether no query meets any key, because there are none. Where lengths are on the device,
 * sequences of the batch without keys may have queries, whose rows it has to find. */
static inline bool fa_shape_is_empty(const struct fa_shape *shape)
{
    return shape->batch == 0 || shape->seqlen_q == 0 || (shape->seqlen_k == 0 && !shape->is_varlen);
}

/* The `bits` of kernels/fixed_point_sums.cuh: a sum to which all scores add as often as they may is
 * below 2^62. Fewer than FA_LEAST_SUM_BITS would keep less than sums in fp32 do. */
#define FA_LEAST_SUM_BITS 13
static inline int fa_shape_sum_bits(const struct fa_shape *shape)
{
    const double rows = (double)shape->batch * shape->heads_q * shape->seqlen_q;
    const double additions = MAX(1, rows * shape->seqlen_k) * FA_MAX_ADDITIONS;
    const int bits = 62 - (ilogb(additions) + 1);
    return MIN(bits, 30);
}

/* Rows of q, out and lse for each head. */
static inline int64_t fa_shape_rows_q(const struct fa_shape *shape)
{
    return shape->is_packed_q ? shape->total_q : (int64_t)shape->batch * shape->seqlen_q;
}

/* Whether a mask hides any key. Causal decoding of one query does not, nor does a window as long as
 * the sequence: then the kernel without the mask computes the same. A variant for sequences of any
 * lengths has whatever mask there is. */
static inline bool fa_shape_has_right_mask(const struct fa_shape *shape)
{
    const int last = shape->is_varlen ? FA_UNBOUNDED : shape->seqlen_q - 1;
    return shape->window_right < last; /* of the first query, which sees the least */
}
static inline bool fa_shape_has_left_mask(const struct fa_shape *shape)
{
    const int last = shape->is_varlen ? FA_UNBOUNDED : shape->seqlen_k - 1;
    return shape->window_left < last; /* of the last query */
}

/* Whether every query sees a key: the first one has its right bound, the last one its left bound,
 * within the sequence; and no window is empty, see options.c. */
static inline bool fa_shape_all_see_keys(const struct fa_shape *shape)
{
    const int64_t diagonal = (int64_t)shape->seqlen_k - shape->seqlen_q;
    return !shape->is_varlen && diagonal + shape->window_right >= 0 &&
           shape->seqlen_q - 1 + diagonal - shape->window_left < shape->seqlen_k;
}

#endif
