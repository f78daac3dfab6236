/* The sequence that a block works on: its lengths, and where its rows begin. Kernels read lengths
 * here and nowhere else.
 *
 *   VARLEN   1: sequences differ in length, see fa_lengths in params.h */
#ifndef FA_SEQUENCE_CUH
#define FA_SEQUENCE_CUH

#include "ptx.cuh"

/* ---- lengths on the device ------------------------------------------------------------------- */

/* One side of a sequence: the rows [begin, begin + count) of a packed tensor, or of its batch entry
 * of another. */
struct sequence_rows {
    int begin, count;
};

__device__ __forceinline__ int clamp(int x, int low, int high) { return min(max(x, low), high); }

/* Where a packed sequence begins, and the one before it ends: within the tensor, whatever memory
 * holds. */
__device__ __forceinline__ int first_row(const int *cu_seqlens, int total, int number)
{
    return clamp(ld_global(cu_seqlens + number), 0, total);
}

/* The rows of a sequence on one side. No more than `bound` of them: grids and workspaces have room
 * for so many. */
__device__ __forceinline__ sequence_rows read_rows(const int *cu_seqlens, const int *seqused,
                                                   int total, int bound, int number)
{
    sequence_rows rows = {0, bound};
    if (cu_seqlens) {
        rows.begin = first_row(cu_seqlens, total, number);
        rows.count = clamp(first_row(cu_seqlens, total, number + 1) - rows.begin, 0, bound);
    }
    if (seqused)
        rows.count = clamp(ld_global(seqused + number), 0, rows.count);
    return rows;
}
__device__ __forceinline__ sequence_rows read_queries(const fa_lengths &lengths, int bound,
                                                      int number)
{
    return read_rows(lengths.cu_seqlens_q, lengths.seqused_q, lengths.total_q, bound, number);
}
__device__ __forceinline__ sequence_rows read_keys(const fa_lengths &lengths, int bound, int number)
{
    sequence_rows rows =
        read_rows(lengths.cu_seqlens_k, lengths.seqused_k, lengths.total_k, bound, number);
    if (lengths.leftpad_k) {
        const int pad = clamp(ld_global(lengths.leftpad_k + number), 0, rows.count);
        rows.begin += pad;
        rows.count -= pad;
    }
    return rows;
}

/* The last of some sequences for which `has_begun` holds, as it does for all before it; the first
 * one if it holds for none. */
template <class F> __device__ __forceinline__ int last_sequence(int sequences, F has_begun)
{
    int first = 0, end = sequences;
    while (end - first > 1) {
        const int middle = (first + end) / 2;
        if (has_begun(middle))
            first = middle;
        else
            end = middle;
    }
    return first;
}

/* Tiles of `tile_m` queries of all sequences, in a workspace that has as many as they may need:
 * either m_blocks for each, or, of a packed side and where these are fewer, one for each sequence
 * more than the rows fill. Then a sequence starts with the tile that has its first row, and one
 * further on for each sequence before it. The host takes what is less. */
struct sequence_tiles {
    const fa_lengths &lengths;
    int sequences;
    int m_blocks; /* tiles of the longest sequence */
    int tile_m;
    int count;

    struct place {
        int sequence, m_block;
    };

    __device__ __forceinline__ bool is_by_bound() const
    {
        return count == fa_int64{sequences} * m_blocks;
    }
    /* The first tile of a sequence, whose first row is `row`. */
    __device__ __forceinline__ int first(int row, int sequence) const
    {
        return is_by_bound() ? sequence * m_blocks : row / tile_m + sequence;
    }
    /* The sequence that has a tile, and which of its tiles that is: if none has it, one behind the
     * last. */
    __device__ __forceinline__ place place_of(int tile) const
    {
        if (is_by_bound())
            return {tile / m_blocks, tile % m_blocks};
        const auto first_of = [&](int number) {
            return first(first_row(lengths.cu_seqlens_q, lengths.total_q, number), number);
        };
        const int number =
            last_sequence(sequences, [&](int other) { return first_of(other) <= tile; });
        const int m_block = tile - first_of(number);
        return {number, m_block < 0 ? m_blocks : m_block};
    }
};

/* A number that all lanes of the warp have, in a uniform register. */
__device__ __forceinline__ int same_in_warp(int x)
{
    return static_cast<int>(__reduce_or_sync(0xffffffff, x));
}

/* ---- the sequence of a block ----------------------------------------------------------------- */

template <class params_t, bool HAS_LENGTHS = VARLEN> struct sequence;

/* One entry of the batch, by the parameters of any kernel. All entries have the same lengths, which
 * are read from constant memory where they are needed: that takes no register. */
template <class params_t> struct sequence<params_t, false> {
    enum { q_begin = 0, k_begin = 0 }; /* rows of q and k before row 0 */
    const params_t &params;
    int batch;

    __device__ __forceinline__ void select(int number) { batch = number; }
    __device__ __forceinline__ void make_uniform() {}

    __device__ __forceinline__ int seqlen_q() const { return params.seqlen_q; }
    __device__ __forceinline__ int seqlen_k() const { return params.seqlen_k; }

    /* From the beginning of a tensor [batch, seqlen, heads, head_dim] to row 0 of a head. */
    __device__ __forceinline__ fa_int64 q_offset(const fa_strides &stride, int head) const
    {
        return batch * stride.batch + head * stride.head;
    }
    __device__ __forceinline__ fa_int64 k_offset(const fa_strides &stride, int head) const
    {
        return batch * stride.batch + head * stride.head;
    }
    /* The entry of the batch of k and v, of those that tensor maps describe. */
    __device__ __forceinline__ int k_entry() const { return batch; }
    /* From the beginning of lse, [batch, heads, seqlen_q], to query 0 of a head: `pair` is the
     * number of this batch entry and head. */
    __device__ __forceinline__ fa_int64 lse_offset(fa_int64 pair, int) const
    {
        return pair * lse_rows();
    }
    /* The rows of a head in lse, and how many times it has all heads. */
    __device__ __forceinline__ int lse_rows() const { return params.seqlen_q; }
    __device__ __forceinline__ int lse_batch() const { return params.batch; }
};

/* A sequence whose lengths are on the device: select() reads them, once. A side is packed, [total,
 * heads, head_dim], with an lse [heads, total], or has entries of a batch. */
template <class params_t> struct sequence<params_t, true> {
    const params_t &params;
    int batch;
    int q_begin, q_count, k_begin, k_count;

    __device__ __forceinline__ void select(int number)
    {
        batch = number;
        const sequence_rows q = read_queries(params.lengths, params.seqlen_q, number);
        const sequence_rows k = read_keys(params.lengths, params.seqlen_k, number);
        q_begin = q.begin;
        q_count = q.count;
        k_begin = k.begin;
        k_count = k.count;
    }
    /* Moves the lengths to uniform registers, for a kernel that has no others to spare. */
    __device__ __forceinline__ void make_uniform()
    {
        q_begin = same_in_warp(q_begin);
        q_count = same_in_warp(q_count);
        k_begin = same_in_warp(k_begin);
        k_count = same_in_warp(k_count);
    }

    __device__ __forceinline__ int seqlen_q() const { return q_count; }
    __device__ __forceinline__ int seqlen_k() const { return k_count; }

    __device__ __forceinline__ fa_int64 q_offset(const fa_strides &stride, int head) const
    {
        return batch * stride.batch + q_begin * stride.seqlen + head * stride.head;
    }
    __device__ __forceinline__ fa_int64 k_offset(const fa_strides &stride, int head) const
    {
        return batch * stride.batch + k_begin * stride.seqlen + head * stride.head;
    }
    __device__ __forceinline__ int k_entry() const
    {
        return params.lengths.cu_seqlens_k ? 0 : batch; /* a packed side is one entry */
    }
    __device__ __forceinline__ bool is_packed() const { return params.lengths.cu_seqlens_q; }
    __device__ __forceinline__ fa_int64 lse_offset(fa_int64 pair, int head) const
    {
        return (is_packed() ? head : pair) * lse_rows() + q_begin;
    }
    __device__ __forceinline__ int lse_rows() const
    {
        return is_packed() ? params.lengths.total_q : params.seqlen_q;
    }
    __device__ __forceinline__ int lse_batch() const { return is_packed() ? 1 : params.batch; }
};

#endif
