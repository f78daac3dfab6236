/* Rows of out and lse that no sequence has become 0 and -inf.
 *
 * Constants: DTYPE. */
#include "params.h"

#define VARLEN 1

#include "sink.cuh"
#include "unused_rows.cuh"

constexpr int THREADS = FA_FILL_THREADS;
static_assert(FA_FILL_ROWS == THREADS, "each looks at one row");

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
}
