/* After backward.cu: an accumulator of dQ, dK or dV, see params.h, to the rows of its tensor. A
 * warp takes a fragment of 16 rows.
 *
 * Constants: DTYPE, HEAD_DIM (of the tensor). */
#include "params.h"

#include "backward.cuh"
#include "division.cuh"

constexpr int WARPS_PER_BLOCK = FA_POSTPROCESS_WARPS;
constexpr int FRAGS = HEAD_DIM / 8;

extern "C" __global__ void __launch_bounds__(WARPS_PER_BLOCK * 32)
    backward_postprocess(const __grid_constant__ struct fa_postprocess_params params)
{
    /* In 32 bits: an accumulator for 2^31 warps would have 1 TB or more. */
    const int warp = blockIdx.x * WARPS_PER_BLOCK + threadIdx.x / 32;
    const int pairs = params.batch * params.heads.number;
    const auto [pair, row_frag] = divide(warp, params.row_frags);
    if (pair >= pairs)
        return; /* the whole warp */
    const float4 *accum =
        reinterpret_cast<const float4 *>(params.accum) + fa_int64{warp} * (FRAGS * 32) + lane_id();
    const fa_int64 buffer_stride = fa_int64{pairs} * params.row_frags.number * (FRAGS * 32);
    float C[FRAGS][4] = {};
    for (int i = 0; i < params.buffers; i++)
#pragma unroll
        for (int n = 0; n < FRAGS; n++) {
            const float4 x = accum[i * buffer_stride + n * 32];
            C[n][0] += x.x;
            C[n][1] += x.y;
            C[n][2] += x.z;
            C[n][3] += x.w;
        }

    const auto [batch, head] = divide(pair, params.heads);
    element *tensor = static_cast<element *>(params.tensor) + batch * params.stride.batch +
                      head * params.stride.head;
    const int row0 = row_frag * 16 + quad_row();
    const float scale = params.scale / P_SCALE;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = row0 + 8 * half;
        store_row<FRAGS>(tensor + row * params.stride.seqlen, C, half, scale, row < params.seqlen);
    }
}
