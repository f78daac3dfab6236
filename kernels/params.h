/* The structs that host and device share, byte for byte.
 *
 * Read by NVRTC without any header, and by the C compiler of the host. Strides count elements, and
 * are 64-bit because one tensor may hold more than 2^31 elements; the innermost stride is always 1.
 */
#ifndef FA_PARAMS_H
#define FA_PARAMS_H

#ifdef __CUDACC_RTC__
typedef long long fa_int64;
#define FA_STATIC_ASSERT  static_assert
#define FA_ALIGNED(bytes) alignas(bytes)
#else
#include <stdint.h>
typedef int64_t fa_int64;
#define FA_STATIC_ASSERT  _Static_assert
#define FA_ALIGNED(bytes) _Alignas(bytes)
#endif

enum fa_dtype {
    FA_FLOAT32,
    FA_FLOAT16,
    FA_BFLOAT16,
    FA_INT32 /* of lengths and pages alone */,
    FA_INT64 /* of seeds */,
    FA_FLOAT8_E4M3 /* of K and V alone */,
    FA_BYTES_1 /* from here on what a mod captured: elements of so many bytes */,
    FA_BYTES_2,
    FA_BYTES_4,
    FA_BYTES_8
};

/* Outer strides of one [batch, seqlen, heads, head_dim] tensor. */
struct fa_strides {
    fa_int64 batch, seqlen, head;
};

/* A number that kernels divide by without dividing: for 0 <= n < 2^31
 *
 *     n / number = floor(n * multiplier / 2^(31 + shift))
 *
 * with the least shift for which number <= 2^shift, and multiplier = ceil(2^(31 + shift) / number)
 * < 2^32: Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994. */
struct fa_divisor {
    int number;
    unsigned multiplier;
    int shift;
};

/* Lengths of the sequences of a batch, on the device; all NULL where all are seqlen_q and seqlen_k.
 * A side with cu_seqlens is packed: its tensors are [total, heads, head_dim], `stride.batch` is 0,
 * and its lse [heads, total]. Then seqlen_q (seqlen_k) is a bound of the lengths. */
struct fa_lengths {
    const int *cu_seqlens_q, *cu_seqlens_k; /* [batch + 1]; NULL: that side is not packed */
    const int *seqused_q, *seqused_k;       /* [batch]; NULL: all of it */
    const int *leftpad_k; /* [batch]: so many of the used rows of k come before key 0; NULL: none */
    int total_q, total_k; /* rows of the packed tensors */
};

/* ALiBi; read only where ALIBI. Query i sees key j at the distance i + seqlen_k - seqlen_q - j. */
struct fa_alibi {
    const float *slopes;                /* [batch, heads_q], or [heads_q] */
    fa_int64 batch_stride, head_stride; /* batch_stride: 0 where all sequences have the same */
};

/* What is added to scores; read only where BIAS. Keys lie one after the other; strides are 0 where
 * the size is 1. */
struct fa_bias {
    const void *data; /* [batch or 1, heads_q or 1, seqlen_q or 1, seqlen_k] */
    struct fa_strides stride;
};

/* One tile of a list, see kernels/tile_list.cuh: of which sequence, and which of its tiles. */
struct fa_listed_tile {
    int sequence, tile;
};

/* Pages of K and V; read only where PAGED. k and v are [count, page_size, heads_kv, head_dim or
 * head_dim_v]: their stride.batch is from page to page. Row r of sequence b is row r % page_size of
 * page table[b, r / page_size]. seqlen_k is at most per_sequence * page_size, and 0 where count is:
 * then every row has a page. */
struct fa_pages {
    const int *table;      /* [batch, per_sequence]; whatever it holds, kernels clamp */
    fa_int64 table_stride; /* from sequence to sequence */
    int per_sequence;      /* pages of a sequence, at most */
    int count;             /* pages that exist */
    struct fa_divisor page_size;
};

/* Which weights are dropped, see philox.h. */
struct fa_dropout {
    const fa_int64 *seed; /* [2]: seed, offset */
    unsigned threshold;   /* 2^32 times the probability */
    float keep, scale;    /* 1 - the probability, and its inverse */
};

/* Blocks that a block of the other side meets; counts NULL: none. */
struct fa_block_list {
    const int *counts;  /* [batch, heads_q, rows]: how many */
    const int *indices; /* [batch, heads_q, rows, most]: which, the first `count` of a row */
    struct fa_strides
        count; /* from batch to batch, row to row (seqlen), head to head: 0 where all */
    struct fa_strides index; /* have the same */
    int most;
};

/* The lists of a call, see kernels/block_list.cuh: rows are blocks of queries that list blocks of
 * keys, in the backward blocks of keys that list blocks of queries. Whatever lists hold is clamped.
 * Read only where BLOCK_SPARSE, of which these are the last parameters: others have not
 * got them. */
struct fa_block_lists {
    struct fa_block_list partial, full; /* full: all of their pairs are seen, but for the masks */
    int blocks;                         /* that there are to list */
    struct fa_divisor row_tiles;        /* tiles of the kernel in a block that is a row, */
    struct fa_divisor tiles;            /* and in one that is listed */
};

/* A tensor that a score_mod or mask_mod reads, of any type that its translation knows. */
enum { FA_MAX_CAPTURED = 8, FA_CAPTURED_NDIM = 4 };
struct fa_captured {
    const void *data;
    fa_int64 stride[FA_CAPTURED_NDIM];
    int size[FA_CAPTURED_NDIM]; /* none is 0 */
};

/* Behind the parameters of kernels whose variant has a mod. */
struct fa_mods {
    struct fa_captured score[FA_MAX_CAPTURED], mask[FA_MAX_CAPTURED];
    float *gradients[FA_MAX_CAPTURED]; /* of those of score_mod, contiguous, zero before; NULL: not
                                        * wanted. Of backward_captured.cu alone */
};

/* What K or V of a sequence and KV head are multiplied by, read only where KV_E4M3; and Q. */
struct fa_descale {
    const float *scale; /* [batch, heads_kv]; NULL: 1 */
    fa_int64 batch_stride, head_stride;
};

/* The single argument of kernels/forward.cu. */
struct fa_forward_params {
    const void *q; /* [batch, seqlen_q, heads_q, head_dim] */
    const void *k; /* [batch, seqlen_k, heads_kv, head_dim] */
    const void *v; /* [batch, seqlen_k, heads_kv, head_dim_v] */
    void *out;     /* [batch, seqlen_q, heads_q, head_dim_v]; where SPLIT: out_parts below */
    float *lse;    /* [batch, heads_q, seqlen_q], contiguous, natural log; NULL: not wanted; where
                    * SPLIT: lse_parts below */
    const void *sink; /* [heads_q], contiguous, natural log; NULL: none; not read where SPLIT */
    struct fa_strides q_stride, k_stride, v_stride, out_stride;
    int batch, seqlen_q, seqlen_k;
    int window_left;    /* keys a query sees before its diagonal; read only where MASK_LEFT */
    int window_right;   /* and after it; read only where MASK_RIGHT, 0 for causal */
    float scale_log2;   /* softmax_scale * log2(e), softcap * log2(e) where SOFTCAP; not 0 */
    float masked_score; /* of a key that a query does not see: scaled, it is -inf */
    float scale_in_cap; /* softmax_scale / softcap; read only where SOFTCAP */
    int sink_dtype;     /* enum fa_dtype */
    /* Of these, `heads` is what blocks go over: heads_q, or heads_kv where PACK_GQA; m_blocks
     * ceil(rows / TILE_M), with row_count() in mask.cuh; group_heads, a divisor of batch * heads,
     * how many (batch, head) pairs run together; parts how many blocks share the keys of a block
     * of queries, 1 if not SPLIT. */
    struct fa_divisor heads, heads_per_kv, m_blocks, group_heads, parts;
    struct fa_lengths lengths; /* read only where VARLEN */
    struct fa_pages pages;     /* read only where PAGED */
    /* [m_blocks]: the tiles of rows of all sequences, as varlen_fill.cu writes them; group_heads
     * then divides heads. NULL: m_blocks of each. Read only where VARLEN. */
    const struct fa_listed_tile *list;
    struct fa_dropout dropout; /* read only where DROPOUT */
    struct fa_alibi alibi;
    struct fa_bias bias;
    struct fa_descale k_descale, v_descale;
    struct fa_descale q_descale; /* read only where Q_E4M3 */
};

FA_STATIC_ASSERT(sizeof(struct fa_forward_params) == 488, "host and device disagree on the layout");

/* A tensor as the TMA reads it, in the driver's own encoding. */
struct fa_tensor_map {
    FA_ALIGNED(64) unsigned char encoding[128];
};

/* The single argument of kernels/forward_tma.cu, which reads K and V through the maps. */
struct fa_forward_tma_params {
    struct fa_forward_params forward;
    struct fa_tensor_map k_map, v_map; /* [batch, heads_kv, seqlen_k, head_dim or head_dim_v] */
};

FA_STATIC_ASSERT(sizeof(struct fa_forward_tma_params) == 768, "488, padding, then maps");

/* The single argument of both where BLOCK_SPARSE; forward.cu has no maps. */
struct fa_extended_forward_params {
    struct fa_forward_tma_params dense;
    struct fa_block_lists lists;
    struct fa_mods mods;
};

/* The single argument of kernels/combine.cu. A row is a query of a head: rows = batch * heads_q *
 * seqlen_q of them, in the order of lse; of a packed side heads_q * total_q, with seqlen_q =
 * total_q below. */
struct fa_combine_params {
    const void *out_parts;  /* [parts, batch, seqlen_q, heads_q, head_dim_v], contiguous in the last
                             * dimension: each of its own keys alone */
    const float *lse_parts; /* [parts, batch, seqlen_q, heads_q]; -inf: no keys */
    void *out;              /* [batch, seqlen_q, heads_q, head_dim_v] */
    float *lse;             /* [rows], natural log; NULL: not wanted */
    const void *sink;       /* [heads_q], contiguous, natural log; NULL: none */
    struct fa_strides out_stride, out_parts_stride, lse_parts_stride;
    fa_int64 out_parts_step, lse_parts_step; /* from part to part */
    unsigned rows;
    int parts;
    int sink_dtype;       /* enum fa_dtype */
    float lse_parts_log2; /* what takes lse_parts to a binary logarithm: 1, or log2(e) */
    struct fa_divisor heads_q, seqlen_q;
    struct fa_divisor slices; /* of the parts of a row: each is summed up by threads of its own */
    /* All NULL, or of cu_seqlens_q and seqused_q: rows that no sequence has, or uses, have no
     * parts. */
    struct fa_lengths lengths;
    int sequences; /* of cu_seqlens_q */
};

FA_STATIC_ASSERT(sizeof(struct fa_combine_params) == 240, "host and device disagree on the layout");

/* The single argument of kernels/varlen_fill.cu. */
struct fa_fill_params {
    void *out;  /* [batch, seqlen_q, heads_q, head_dim_v], or packed */
    float *lse; /* [batch, heads_q, seqlen_q], or packed; NULL: not wanted */
    struct fa_strides out_stride;
    int batch, seqlen_q, seqlen_k, heads_q, head_dim_v;
    struct fa_lengths lengths;
    struct fa_listed_tile *list; /* [places]: see fa_forward_params; NULL: not wanted */
    int places, tile_m;
    int rows_per_query; /* rows of a head of the main kernel: heads_per_kv where PACK_GQA, else 1 */
    int is_reversed;    /* whether the last rows come first */
};

FA_STATIC_ASSERT(sizeof(struct fa_fill_params) == 136, "host and device disagree on the layout");

/* The single argument of kernels/kv_append.cu: new rows of K and V go to the caches behind those
 * that they hold, K rotated, and q goes to rotated_q. */
struct fa_append_params {
    const void *k, *v;        /* [batch, new_rows, heads_kv, head_dim or head_dim_v] */
    void *k_cache, *v_cache;  /* [batch, seqlen_k, heads_kv, head_dim or head_dim_v], or pages */
    const void *q;            /* [batch, seqlen_q, heads_q, head_dim], or packed */
    void *rotated_q;          /* like q, contiguous; NULL: q is not rotated */
    const void *cos, *sin;    /* [positions, rotary_dim / 2], rows contiguous */
    const int *cache_seqlens; /* [batch]: rows that the caches hold; NULL: cache_seqlen each */
    int *seqused_k;           /* [batch]: rows that they hold afterwards */
    struct fa_strides k_stride, v_stride, k_cache_stride, v_cache_stride, q_stride;
    struct fa_strides rotated_q_stride;
    fa_int64 cos_stride, sin_stride;
    int batch, seqlen_q, seqlen_k; /* seqlen_k: rows for which the caches have room */
    int heads_q, heads_kv;
    int cache_seqlen, new_rows;
    int positions, rotary_dim; /* rotary_dim: 0 where nothing is rotated */
    int interleaved;           /* dims 2i and 2i + 1 are rotated, else i and i + rotary_dim / 2 */
    int q_advances; /* query i has the position i behind that of query 0, else the same */
    struct fa_divisor new_blocks, q_blocks; /* of a sequence, each has a row of K, of V, or of q */
    struct fa_divisor chunks, chunks_v;     /* of 16 bytes, of a row of one head */
    struct fa_lengths lengths;              /* of q alone */
    struct fa_pages pages;                  /* table NULL: the caches are not in pages */
    struct fa_descale k_descale, v_descale; /* of the caches; read only where KV_E4M3 */
};

FA_STATIC_ASSERT(sizeof(struct fa_append_params) == 472, "host and device disagree on the layout");

/* The single argument of kernels/kv_scatter.cu: each token's rows of K and V go to its slot. */
struct fa_scatter_params {
    const void *k, *v;       /* [tokens, heads, head_dim or head_dim_v] */
    void *k_cache, *v_cache; /* [pages, page_size, heads, head_dim or head_dim_v] */
    const int *slots;        /* [tokens]; those that are no row of the caches are dropped */
    fa_int64 slot_stride;
    struct fa_strides k_stride, v_stride, k_cache_stride, v_cache_stride;
    int heads;
    int slot_count;                                /* pages * page_size */
    struct fa_divisor page_size, chunks, chunks_v; /* chunks: as in fa_append_params */
    struct fa_descale k_descale, v_descale;        /* one number each; read only where KV_E4M3 */
};

FA_STATIC_ASSERT(sizeof(struct fa_scatter_params) == 240, "host and device disagree on the layout");

/* The single argument of kernels/backward.cu, backward_preprocess.cu and backward_sink.cu.
 *
 * Blocks add to an accumulator in fp32, in the layout of the C fragments of ptx.cuh: [batch, heads,
 * rows / 16, head_dim / 8, 32 lanes, 4], with rows up to the end of the last tile.
 *
 * Where VARLEN, [heads, query_tiles] takes the place of [batch, heads, m_blocks], here and in
 * lse_delta and dq_semaphores. There are batch * m_blocks of them, and those of sequence b begin
 * with tile b * m_blocks; or, of a packed side and where these are fewer, ceil(total_q / TILE_M) +
 * batch, and they begin with tile cu_seqlens_q[b] / TILE_M + b. */
struct fa_backward_params {
    const void *q;              /* [batch, seqlen_q, heads_q, head_dim] */
    const void *k;              /* [batch, seqlen_k, heads_kv, head_dim] */
    const void *v;              /* [batch, seqlen_k, heads_kv, head_dim_v] */
    const void *out;            /* [batch, seqlen_q, heads_q, head_dim_v] */
    const void *dout;           /* the same */
    const float *lse, *dlse;    /* [batch, heads_q, seqlen_q], contiguous; dlse NULL: zeros */
    const void *sink;           /* as in fa_forward_params, of backward_sink.cu alone */
    void *dk, *dv;              /* like k and v */
    float *dsink;               /* [heads_q] */
    float *lse_delta;           /* [batch, heads_q, m_blocks, 2, TILE_M]: first lse_log2 = lse *
                                 * log2(e) - P_SHIFT, then delta = dO.O - dlse */
    float *dq_accum;            /* DQ_BUFFERS accumulators, one after the other */
    float *dk_accum, *dv_accum; /* accumulators, where q_splits > 1 */
    /* Where DETERMINISTIC: how many blocks have added to a tile of dQ, [DQ_BUFFERS, batch, heads_q,
     * m_blocks], and, where q_splits > 1, to one of dK and dV, [batch, heads_kv, n_blocks]. */
    int *dq_semaphores, *dkv_semaphores;
    int *block_counter; /* where DETERMINISTIC: how many blocks have started */
    void *zeros;        /* what backward_preprocess.cu zeroes: zero_chunks units of 16 bytes */
    fa_int64 zero_chunks;
    struct fa_strides q_stride, k_stride, v_stride, out_stride, dout_stride, dk_stride, dv_stride;
    int batch, heads_q, heads_kv, heads_per_kv;
    int seqlen_q, seqlen_k;
    int m_blocks, n_blocks; /* tiles of queries, and of keys; n_blocks: places of a list */
    int q_splits;           /* blocks that share a tile of keys and split its queries */
    int window_left;        /* as in fa_forward_params */
    int window_right;
    int sink_dtype;                               /* enum fa_dtype */
    float scale_log2, masked_score, scale_in_cap; /* as in fa_forward_params */
    float softmax_scale; /* of dk and dq: where DROPOUT times dropout.scale */
    fa_int64 zero_share; /* of zero_chunks, for one block of backward_preprocess.cu */
    void *dq;            /* like q; where DQ_DIRECT */
    struct fa_strides dq_stride;
    /* [batch, heads_q, seqlen_q, head_dim or head_dim_v]; where VARLEN [total_q + 1, heads_q,
     * TILE_M, the same]: entry e has the TILE_M rows before row e. */
    struct fa_tensor_map q_map, dout_map;
    struct fa_lengths lengths;   /* read only where VARLEN */
    struct fa_listed_tile *list; /* [n_blocks]: the tiles of keys of all sequences, as
                                  * backward_preprocess.cu writes them; NULL: n_blocks of each */
    int group_heads; /* (batch, KV head) pairs that run together, with a list KV heads; the last
                      * group may have fewer */
    int query_tiles; /* where VARLEN: of a head, of all sequences */
    int head_dim, tile_n;      /* of q and k, and keys of a tile: for backward_preprocess.cu */
    struct fa_dropout dropout; /* read only where DROPOUT */
    struct fa_alibi alibi;
    struct fa_bias bias;
    float *dbias; /* like bias, contiguous; zero before; where BIAS_GRADIENT */
    struct fa_strides dbias_stride;
};

FA_STATIC_ASSERT(sizeof(struct fa_backward_params) == 896, "432, padding, maps, then the rest");

/* How often a block of queries is listed by rows of lower keys, as backward_order.cu writes it. */
struct fa_addition_order {
    int *before; /* [batch, heads, rows + 1, blocks of queries]; zero before */
    int heads;   /* with lists of their own: heads_q, or 1 */
    int rows;    /* of lists: blocks of keys */
};

/* The single argument of kernels/backward.cu where BLOCK_SPARSE, and of backward_order.cu. m_blocks
 * is then that of whole blocks of queries. */
struct fa_extended_backward_params {
    struct fa_backward_params dense;
    struct fa_block_lists lists;
    struct fa_mods mods;
    struct fa_addition_order order; /* read only where BLOCK_SPARSE and DETERMINISTIC */
};

/* What one score adds to gradients of captured tensors: so often at most. */
enum { FA_MAX_ADDITIONS = 64 };

/* The single argument of kernels/backward_captured.cu and backward_captured_sums.cu. */
struct fa_captured_params {
    struct fa_extended_backward_params backward;
    /* Where DETERMINISTIC: */
    fa_int64 elements[FA_MAX_CAPTURED]; /* of each gradient; 0: not wanted */
    fa_int64 *sums[FA_MAX_CAPTURED];    /* [elements, 2], see kernels/fixed_point_sums.cuh; zero
                                         * before */
    int bits;                           /* of what is added to them */
};

/* The single argument of kernels/backward_postprocess.cu. */
struct fa_postprocess_params {
    const float *accum; /* `buffers` accumulators, one after the other, whose sum is stored */
    void *tensor;       /* [batch, seqlen, heads, head_dim] */
    struct fa_strides stride;
    int batch, seqlen, buffers;
    float scale; /* of the sum */
    struct fa_divisor heads;
    struct fa_divisor row_frags; /* 16-row fragments of a head of an accumulator */
    int tile_m;                  /* where VARLEN: rows of its tiles; the tensor is dq */
    struct fa_lengths lengths;   /* read only where VARLEN */
};

FA_STATIC_ASSERT(sizeof(struct fa_postprocess_params) == 136,
                 "host and device disagree on the layout");

#endif
