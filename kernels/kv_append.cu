/* Before the attention of a call that appends: new rows of K and V to their caches, and what the
 * attention reads: lengths with the new rows, and q rotated.
 *
 * A pair of dims (x, y) of a row at position p is rotated by the angle of the tables:
 *
 *     (x cos[p, pair] - y sin[p, pair], y cos[p, pair] + x sin[p, pair])
 *
 * A block has a row of all heads: first come those of K, then of V, then of q. Rows for which a
 * cache has no room are dropped.
 *
 * Constants: DTYPE; KV_E4M3: the caches are e4m3, and rows are divided by their factors. */
#include "params.h"

#define VARLEN 1

#include "division.cuh"
#include "kv_cache.cuh"
#include "sequence.cuh"

constexpr int THREADS = FA_APPEND_THREADS;

__device__ __forceinline__ float load(const element *x) { return unpack(ld_global(x)).x; }

/* ---- rows ------------------------------------------------------------------------------------ */

/* The angles of a position, for the first `dim` dims of a row. */
struct rotation {
    const element *cos, *sin;
    int dim, interleaved;

    /* A dim of a row, rotated. */
    __device__ __forceinline__ float rotated(const element *row, int d) const
    {
        const float x = load(row + d);
        if (d >= dim)
            return x;
        const int pairs = dim / 2;
        const bool is_y = interleaved ? d % 2 : d >= pairs;
        const int pair = interleaved ? d / 2 : is_y ? d - pairs : d;
        const float other = load(row + (interleaved ? d ^ 1 : is_y ? pair : d + pairs));
        return x * load(cos + pair) + (is_y ? other : -other) * load(sin + pair);
    }
};

__device__ __forceinline__ rotation rotation_of(const fa_append_params &params, int position)
{
    const int row = min(position, params.positions - 1);
    return {static_cast<const element *>(params.cos) + row * params.cos_stride,
            static_cast<const element *>(params.sin) + row * params.sin_stride, params.rotary_dim,
            params.interleaved};
}

/* A row of all heads in a tensor. */
template <class T> struct row_place {
    T *row;
    fa_int64 head_stride;

    __device__ __forceinline__ row_place(T *tensor, const fa_strides &stride, int batch, int row)
        : row(tensor + batch * stride.batch + row * stride.seqlen), head_stride(stride.head)
    {
    }
};

/* Eight elements of a row, from `first` on. */
__device__ __forceinline__ void move_chunk(const element *row, int first, element *to,
                                           const rotation &rotation, float)
{
    uint4 moved = *reinterpret_cast<const uint4 *>(row + first);
    if (first < rotation.dim) {
        float x[CHUNK_ELEMENTS];
#pragma unroll
        for (int e = 0; e < CHUNK_ELEMENTS; e++)
            x[e] = rotation.rotated(row, first + e);
        moved = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
    }
    *reinterpret_cast<uint4 *>(to + first) = moved;
}
__device__ __forceinline__ void move_chunk(const element *row, int first, unsigned char *to,
                                           const rotation &rotation, float descale)
{
    float x[CHUNK_ELEMENTS];
#pragma unroll
    for (int e = 0; e < CHUNK_ELEMENTS; e++)
        x[e] = rotation.rotated(row, first + e);
    *reinterpret_cast<uint2 *>(to + first) = narrow_chunk(x, descale);
}

template <class T>
__device__ __forceinline__ void
move_row(const row_place<const element> &from, const row_place<T> &to, int heads,
         const fa_divisor &chunks, const rotation &rotation, const fa_descale &descale, int number)
{
    for (int i = threadIdx.x; i < heads * chunks.number; i += THREADS) {
        const auto [head, chunk] = divide(i, chunks);
        move_chunk(from.row + head * from.head_stride, chunk * CHUNK_ELEMENTS,
                   to.row + head * to.head_stride, rotation,
                   sizeof(T) == 1 ? load_descale(descale, number, head) : 1.0f);
    }
}

/* Row `row` of a sequence in the caches, or in their pages. */
struct cache_row {
    int batch, row;
};
__device__ __forceinline__ cache_row find_row(const fa_pages &pages, int number, int row)
{
    if (!pages.table)
        return {number, row};
    const auto [page, page_row] = divide(row, pages.page_size);
    const int entry = ld_global(pages.table + number * pages.table_stride + page);
    return {clamp(entry, 0, pages.count - 1), page_row};
}

/* ---- a block --------------------------------------------------------------------------------- */

/* Rows that the cache of a sequence holds. */
__device__ __forceinline__ int held_rows(const fa_append_params &params, int number)
{
    const int held =
        params.cache_seqlens ? ld_global(params.cache_seqlens + number) : params.cache_seqlen;
    return clamp(held, 0, params.seqlen_k);
}

/* A row of K, or of V. */
template <bool IS_K>
__device__ __forceinline__ void append_row(const fa_append_params &params, int block)
{
    const auto [number, i] = divide(block, params.new_blocks);
    const int held = held_rows(params, number), position = held + i;
    if (IS_K && i == 0 && threadIdx.x == 0)
        params.seqused_k[number] = min(held + params.new_rows, params.seqlen_k);
    if (i >= params.new_rows || position >= params.seqlen_k)
        return;
    const cache_row place = find_row(params.pages, number, position);
    if (IS_K)
        move_row<cache_element>(
            {static_cast<const element *>(params.k), params.k_stride, number, i},
            {static_cast<cache_element *>(params.k_cache), params.k_cache_stride, place.batch,
             place.row},
            params.heads_kv, params.chunks, rotation_of(params, position), params.k_descale,
            number);
    else
        move_row<cache_element>(
            {static_cast<const element *>(params.v), params.v_stride, number, i},
            {static_cast<cache_element *>(params.v_cache), params.v_cache_stride, place.batch,
             place.row},
            params.heads_kv, params.chunks_v, {}, params.v_descale, number);
}

__device__ __forceinline__ void rotate_query(const fa_append_params &params, int block)
{
    const auto [number, i] = divide(block, params.q_blocks);
    const sequence_rows rows = read_queries(params.lengths, params.seqlen_q, number);
    if (i >= rows.count)
        return;
    const int batch = params.lengths.cu_seqlens_q ? 0 : number, row = rows.begin + i;
    move_row<element>(
        {static_cast<const element *>(params.q), params.q_stride, batch, row},
        {static_cast<element *>(params.rotated_q), params.rotated_q_stride, batch, row},
        params.heads_q, params.chunks,
        rotation_of(params, held_rows(params, number) + (params.q_advances ? i : 0)), {}, number);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    kv_append(const __grid_constant__ struct fa_append_params params)
{
    const int block = blockIdx.x, rows = params.batch * params.new_blocks.number;
    if (block < rows)
        append_row<true>(params, block);
    else if (block < 2 * rows)
        append_row<false>(params, block - rows);
    else
        rotate_query(params, block - 2 * rows);
}
