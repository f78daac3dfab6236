/* Rows of out and lse that no sequence has become 0 and -inf. Before a main kernel that takes its
 * tiles from a list, also that list: a block for each sequence.
 *
 * Constants: DTYPE. */
#include "params.h"

#define VARLEN 1

#include "sink.cuh"
#include "tile_list.cuh"
#include "unused_rows.cuh"

constexpr int THREADS = FA_FILL_THREADS;
static_assert(FA_FILL_ROWS == THREADS, "each looks at one row");

/* The tiles of rows of a sequence in the list of all. Blocks with many keys take longest. */
__device__ __forceinline__ void list_rows(const fa_fill_params &params, int number)
{
    list_tiles<THREADS>(
        params.list, params.places, params.batch, number, params.is_reversed,
        [&](int other) -> sequence_work {
            const int queries = read_queries(params.lengths, params.seqlen_q, other).count;
            return {read_keys(params.lengths, params.seqlen_k, other).count,
                    (queries * params.rows_per_query + params.tile_m - 1) / params.tile_m};
        });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    varlen_fill(const __grid_constant__ struct fa_fill_params params)
{
    const row_side side = query_side(params.lengths, params.batch, params.seqlen_q);
    const fa_int64 row0 = fa_int64{blockIdx.x} * FA_FILL_ROWS;
    each_unused_row(side, row0, [&](int entry, int row) {
        clear_row(params.out, params.out_stride, params.heads_q, params.head_dim_v, entry, row);
        if (params.lse)
            for (int head = lane_id(); head < params.heads_q; head += 32)
                params.lse[(fa_int64{entry} * params.heads_q + head) * side.rows_of_entry() + row] =
                    -INF;
    });
    if (params.list && blockIdx.x < params.batch)
        list_rows(params, blockIdx.x);
}
