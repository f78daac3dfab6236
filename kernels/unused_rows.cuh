/* Rows that no sequence has, of one side of sequences whose lengths are on the device: those behind
 * the last sequence of a packed side, and those behind the used ones of any sequence. */
#ifndef FA_UNUSED_ROWS_CUH
#define FA_UNUSED_ROWS_CUH

#include "layout.cuh"
#include "sequence.cuh"

/* A side: [total, heads, head_dim], or where it is not packed [sequences, bound, heads, head_dim].
 */
struct row_side {
    const int *cu_seqlens, *seqused;
    int sequences, bound, total;

    __device__ __forceinline__ fa_int64 rows() const
    {
        return cu_seqlens ? total : fa_int64{sequences} * bound;
    }
    __device__ __forceinline__ int rows_of_entry() const { return cu_seqlens ? total : bound; }
};

__device__ __forceinline__ row_side query_side(const fa_lengths &lengths, int sequences, int bound)
{
    return {lengths.cu_seqlens_q, lengths.seqused_q, sequences, bound, lengths.total_q};
}
__device__ __forceinline__ row_side key_side(const fa_lengths &lengths, int sequences, int bound)
{
    return {lengths.cu_seqlens_k, lengths.seqused_k, sequences, bound, lengths.total_k};
}

/* A row as an entry of the batch and a row of it: of a packed side there is one entry. */
struct row_place {
    int entry, row;
    bool is_used; /* a sequence has it */
};

__device__ __forceinline__ row_place place_of_row(const row_side &side, int row)
{
    if (side.sequences == 0)
        return {0, row, false};
    const auto has_begun = [&](int number) {
        return first_row(side.cu_seqlens, side.total, number) <= row;
    };
    const int number =
        side.cu_seqlens ? last_sequence(side.sequences, has_begun) : row / side.bound;
    const sequence_rows used =
        read_rows(side.cu_seqlens, side.seqused, side.total, side.bound, number);
    const int entry = side.cu_seqlens ? 0 : number, entry_row = row - entry * side.bound;
    return {entry, entry_row, entry_row >= used.begin && entry_row < used.begin + used.count};
}

/* Calls write(entry, row) for those of a side, with all lanes of a warp for each. Every thread of
 * the block looks at one row, the first of them at `row0`. */
template <class F>
__device__ __forceinline__ void each_unused_row(const row_side &side, fa_int64 row0, F write)
{
    const fa_int64 row = row0 + threadIdx.x;
    const row_place own = row < side.rows() ? place_of_row(side, row) : row_place{0, 0, true};
    for (unsigned left = __ballot_sync(0xffffffff, !own.is_used); left; left &= left - 1) {
        const int from = __ffs(left) - 1;
        write(__shfl_sync(0xffffffff, own.entry, from), __shfl_sync(0xffffffff, own.row, from));
    }
}

/* Zeros in a row of a tensor, all its heads, by a warp. */
__device__ __forceinline__ void clear_row(void *tensor, const fa_strides &stride, int heads,
                                          int head_dim, int entry, int row)
{
    const int chunks = head_dim / CHUNK_ELEMENTS; /* of a head */
    element *first = static_cast<element *>(tensor) + entry * stride.batch + row * stride.seqlen;
    for (int i = lane_id(); i < heads * chunks; i += 32)
        *reinterpret_cast<uint4 *>(first + i / chunks * stride.head + i % chunks * CHUNK_ELEMENTS) =
            make_uint4(0, 0, 0, 0);
}

#endif
