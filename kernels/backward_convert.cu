/* A sum of fragments, see params.h, to rows of a tensor. A warp takes 16 rows.
 *
 * Constants: DTYPE_BF16, HEAD_DIM (of the tensor). */
#include "params.h"

#include "backward.cuh"

constexpr int WARPS_PER_BLOCK = 4;
constexpr int FRAGS = HEAD_DIM / 8;

extern "C" __global__ void __launch_bounds__(WARPS_PER_BLOCK * 32)
    backward_convert(const __grid_constant__ struct fa_convert_params params)
{
    const fa_int64 warp = static_cast<fa_int64>(blockIdx.x) * WARPS_PER_BLOCK + threadIdx.x / 32;
    const fa_int64 pair = warp / params.row_frags;
    const int row0 = warp % params.row_frags * 16 + threadIdx.x % 32 / 4;
    if (pair >= static_cast<fa_int64>(params.batch) * params.heads)
        return; /* all of the warp */
    const float4 *sum =
        reinterpret_cast<const float4 *>(params.sum) + warp * (FRAGS * 32) + threadIdx.x % 32;
    const float scale = params.scale / P_SCALE;
    element *tensor = static_cast<element *>(params.tensor) +
                      pair / params.heads * params.stride.batch +
                      pair % params.heads * params.stride.head;
#pragma unroll
    for (int n = 0; n < FRAGS; n += 4) {
        float4 x[4];
#pragma unroll
        for (int c = 0; c < 4; c++)
            x[c] = sum[min(n + c, FRAGS - 1) * 32];
        const uint4 upper = quad_transpose(
            pack(x[0].x * scale, x[0].y * scale), pack(x[1].x * scale, x[1].y * scale),
            pack(x[2].x * scale, x[2].y * scale), pack(x[3].x * scale, x[3].y * scale));
        const uint4 lower = quad_transpose(
            pack(x[0].z * scale, x[0].w * scale), pack(x[1].z * scale, x[1].w * scale),
            pack(x[2].z * scale, x[2].w * scale), pack(x[3].z * scale, x[3].w * scale));
        const int chunk = n + quad_lane();
        if (chunk < FRAGS && row0 < params.seqlen)
            *reinterpret_cast<uint4 *>(tensor + row0 * params.stride.seqlen + chunk * 8) = upper;
        if (chunk < FRAGS && row0 + 8 < params.seqlen)
            *reinterpret_cast<uint4 *>(tensor + (row0 + 8) * params.stride.seqlen + chunk * 8) =
                lower;
    }
}
