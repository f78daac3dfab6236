/* Rows of out and lse that no sequence has become 0 and -inf: those behind the last sequence of a
 * packed side, and those behind the used ones of any sequence.
 *
 * A thread looks at each row, and a warp writes those that its lanes have found, all their heads.
 *
 * Constants: DTYPE. */
#include "params.h"

#define VARLEN 1

#include "sequence.cuh"
#include "sink.cuh"

constexpr int THREADS = FA_FILL_THREADS;
static_assert(FA_FILL_ROWS == THREADS, "each looks at one row");

/* A row of out and lse, of all heads, as an entry of the batch and a row of it: of a packed side
 * there is one entry. */
struct fill_row {
    int entry, row;
    bool is_used; /* a sequence has it */
};

__device__ __forceinline__ fill_row find_row(const fa_fill_params &params, int row)
{
    const bool is_packed = params.lengths.cu_seqlens_q;
    if (params.batch == 0)
        return {0, row, false};
    const int number =
        is_packed ? sequence_of_query(params.lengths, params.batch, row) : row / params.seqlen_q;
    const sequence_rows used = read_queries(params.lengths, params.seqlen_q, number);
    const int entry = is_packed ? 0 : number, entry_row = row - entry * params.seqlen_q;
    return {entry, entry_row, entry_row >= used.begin && entry_row < used.begin + used.count};
}

extern "C" __global__ void __launch_bounds__(THREADS)
    varlen_fill(const __grid_constant__ struct fa_fill_params params)
{
    const int lane = threadIdx.x % 32, row = blockIdx.x * FA_FILL_ROWS + threadIdx.x;
    const fill_row own = row < params.rows ? find_row(params, row) : fill_row{0, 0, true};
    const int chunks = params.head_dim_v / CHUNK_ELEMENTS; /* of a row of one head */
    const int lse_rows = params.lengths.cu_seqlens_q ? params.rows : params.seqlen_q;
    for (unsigned left = __ballot_sync(0xffffffff, !own.is_used); left; left &= left - 1) {
        const int from = __ffs(left) - 1;
        const int entry = __shfl_sync(0xffffffff, own.entry, from);
        const int entry_row = __shfl_sync(0xffffffff, own.row, from);
        element *out = static_cast<element *>(params.out) + entry * params.out_stride.batch +
                       entry_row * params.out_stride.seqlen;
        for (int i = lane; i < params.heads_q * chunks; i += 32)
            *reinterpret_cast<uint4 *>(out + i / chunks * params.out_stride.head +
                                       i % chunks * CHUNK_ELEMENTS) = make_uint4(0, 0, 0, 0);
        if (params.lse)
            for (int head = lane; head < params.heads_q; head += 32)
                params.lse[(fa_int64{entry} * params.heads_q + head) * lse_rows + entry_row] = -INF;
    }
}
