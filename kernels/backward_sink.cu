/* dsink of one head = -sum of p * delta over batch and queries, where p = e^(sink - lse) is the
 * probability of the sink, which has no value. One block per head adds in a fixed order: the result
 * is reproducible, and does not depend on the grids of the other kernels.
 *
 * Constants as in backward.cu: DTYPE, TILE_M, VARLEN. */
#include "params.h"

#include "backward.cuh"
#include "query_tiles.cuh"

constexpr int THREADS = FA_SINK_THREADS;

extern "C" __global__ void __launch_bounds__(THREADS)
    backward_sink(const __grid_constant__ struct fa_backward_params params)
{
    __shared__ float sums[THREADS];
    const int head = blockIdx.x;
    const float sink = load_sink(params.sink, params.sink_dtype, head) * LOG2_E - P_SHIFT;
    const query_tiles<fa_backward_params> tiles = {params};
    float sum = 0.0f;
    for (int batch = 0; batch < tiles.rows(); batch++) {
        const fa_int64 pair = static_cast<fa_int64>(batch) * params.heads_q + head;
        const float *lse_delta = params.lse_delta + pair * tiles.in_a_row() * (2 * TILE_M);
        /* Where VARLEN, some are no sequence's: with p = 0, they add nothing. */
        for (int query = threadIdx.x; query < tiles.queries_in_a_row(); query += THREADS) {
            const float *tile = lse_delta + static_cast<fa_int64>(query / TILE_M) * (2 * TILE_M);
            sum -= exp2_approx(sink - tile[query % TILE_M]) * tile[TILE_M + query % TILE_M];
        }
    }
    sums[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads(); /* the first 2 * half sums are written */
        if (threadIdx.x < half)
            sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0)
        params.dsink[head] = sums[0];
}
