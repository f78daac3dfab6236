/* Quantised attention: the argument of kernels/quantized_forward.cu, and which block this is.
 *
 * The struct is mirrored in flash_attn_sm120/quantized/kernel.py; a test compares both. */
#ifndef FA_QUANTIZED_BLOCK_CUH
#define FA_QUANTIZED_BLOCK_CUH

#include "layout.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int WARP_M = 16, TILE_M = WARPS * WARP_M; /* queries */
constexpr int TILE_N = 64;                          /* keys; as many share a scale in int8 */
constexpr int INT8_QUERIES = 32;                    /* that share one */

/* Shapes are those of docs/quantized.md; all but q, k and v are contiguous. What a format has not
 * got is NULL. */
struct fa_quantized_params {
    const void *q, *k, *v;
    const void *q_scale, *k_scale, *v_scale;
    const float *q_head_scale, *k_head_scale, *v_head_scale;
    const float *k_mean; /* [batch, heads_kv, head_dim], rotated as K is; NULL: not needed */
    const float *v_mean; /* [batch, heads_kv, head_dim_v] */
    const void *sink;    /* [heads_q], natural log; read where SINK */
    void *out;           /* [parts, batch, seqlen_q, heads_q, head_dim_v] */
    float *lse;          /* [parts, batch, heads_q, seqlen_q]; NULL: not wanted */
    /* In bytes. Of V in e2m1 `seqlen` is from dim to dim. */
    struct fa_strides q_stride, k_stride, v_stride;
    int batch, heads_q, heads_kv, seqlen_q, seqlen_k;
    int parts;                     /* blocks that share the keys of the same queries */
    int window_left, window_right; /* keys that a query sees before and after its diagonal */
    int sink_dtype;                /* enum fa_dtype */
    float softmax_scale, softcap;
};

/* Queries of one head, and the keys that they see, or a part of these: [begin, end) of a row. */
struct quantized_block {
    const fa_quantized_params &params;
    int part, batch, head, head_kv, first_row;

    __device__ __forceinline__ explicit quantized_block(const fa_quantized_params &params)
        : params(params)
    {
        const unsigned tiles = (params.seqlen_q + TILE_M - 1) / TILE_M;
        /* Blocks of a head follow each other: its K and V stay in L2. */
        unsigned number = read_block_index() / tiles;
        first_row = (tiles - 1 - read_block_index() % tiles) * TILE_M;
        part = number % params.parts;
        number /= params.parts;
        head = number % params.heads_q;
        batch = number / params.heads_q;
        head_kv = head / (params.heads_q / params.heads_kv);
    }

    __device__ __forceinline__ int warp_row() const
    {
        return first_row + read_thread_index() / 32 * WARP_M;
    }
    __device__ __forceinline__ int lane_row() const { return warp_row() + quad_row(); }
    __device__ __forceinline__ int diagonal(int row) const
    {
        return row + params.seqlen_k - params.seqlen_q;
    }
    __device__ __forceinline__ int begin(int row) const
    {
        return max(0, diagonal(row) - params.window_left);
    }
    __device__ __forceinline__ int end(int row) const
    {
        return min(params.seqlen_k, diagonal(row) + params.window_right + 1);
    }
    __device__ __forceinline__ bool sees(int row, int key) const
    {
        return begin(row) <= key && key < end(row);
    }
    /* Whether any row of this warp sees a key of the tile. */
    __device__ __forceinline__ bool warp_sees(int tile) const
    {
        return begin(warp_row()) < (tile + 1) * TILE_N &&
               tile * TILE_N < end(warp_row() + WARP_M - 1);
    }
    /* Where the tiles of a part begin, of those that the rows see. */
    __device__ __forceinline__ int first_tile(int part) const
    {
        const int last_row = min(first_row + TILE_M, params.seqlen_q) - 1;
        const int first = begin(first_row) / TILE_N;
        const int tiles = max(0, (max(end(last_row), 0) + TILE_N - 1) / TILE_N - first);
        return first + tiles * part / params.parts;
    }
    /* Every row sees all keys of the tiles between these. */
    __device__ __forceinline__ int first_whole_tile() const
    {
        return (begin(first_row + TILE_M - 1) + TILE_N - 1) / TILE_N;
    }
    __device__ __forceinline__ int end_whole_tile() const
    {
        return max(end(first_row), 0) / TILE_N;
    }

    /* Of a tensor [batch, heads, ...], or of one number for each head: the number of this one. */
    __device__ __forceinline__ fa_int64 query_head() const
    {
        return static_cast<fa_int64>(batch) * params.heads_q + head;
    }
    __device__ __forceinline__ fa_int64 key_head() const
    {
        return static_cast<fa_int64>(batch) * params.heads_kv + head_kv;
    }
    /* The same of the results, which parts have in front. */
    __device__ __forceinline__ fa_int64 lse_row(int row) const
    {
        const fa_int64 batches = static_cast<fa_int64>(part) * params.batch + batch;
        return (batches * params.heads_q + head) * params.seqlen_q + row;
    }
    __device__ __forceinline__ fa_int64 out_row(int row) const
    {
        const fa_int64 batches = static_cast<fa_int64>(part) * params.batch + batch;
        return (batches * params.seqlen_q + row) * params.heads_q + head;
    }
    /* Of [batch, seqlen, heads]: the number of a row. */
    __device__ __forceinline__ fa_int64 query(int row) const
    {
        return (static_cast<fa_int64>(batch) * params.seqlen_q + row) * params.heads_q + head;
    }
    __device__ __forceinline__ fa_int64 key(int key) const
    {
        return (static_cast<fa_int64>(batch) * params.seqlen_k + key) * params.heads_kv + head_kv;
    }
};

__device__ __forceinline__ float factor_of(const float *factors, fa_int64 number)
{
    return factors ? ld_global(factors + number) : 1.0f;
}

#endif
