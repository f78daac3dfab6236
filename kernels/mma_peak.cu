/* The most that mma.sync does on a GPU: chains of independent products, and nothing else. What a
 * kernel reaches is measured as a share of it.
 *
 * Constants:
 *   DTYPE        enum fa_dtype in params.h, of the operands
 *   FP16_SUMS    1: accumulated in fp16, 0: in fp32
 *   WARPS        of a block */
#include "params.h"

#include "ptx.cuh"

constexpr int A_TILES = 2, B_TILES = 4;

/* Two numbers from 0.5 to 1 of either sign: zeros would draw less power than real data. */
__device__ __forceinline__ unsigned operand(unsigned number)
{
    constexpr unsigned ANY = IS_BF16 ? 0x807f807f : 0x83ff83ff;
    constexpr unsigned HALF = IS_BF16 ? 0x3f003f00 : 0x38003800;
    number = (number + 1) * 2654435761u;
    return ((number ^ number >> 15) & ANY) | HALF;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) mma_peak(float *sums, int iterations)
{
    const unsigned thread = blockIdx.x * (WARPS * 32) + threadIdx.x;
    unsigned A[A_TILES][4], B[B_TILES][2], sums_fp16[A_TILES][B_TILES][2] = {};
    float sums_fp32[A_TILES][B_TILES][4] = {};
    for (int i = 0; i < A_TILES * 4; i++)
        A[i / 4][i % 4] = operand(thread * 16 + i);
    for (int i = 0; i < B_TILES * 2; i++)
        B[i / 2][i % 2] = operand(thread * 16 + A_TILES * 4 + i);
#pragma unroll 4
    for (int i = 0; i < iterations; i++)
#pragma unroll
        for (int a = 0; a < A_TILES; a++)
#pragma unroll
            for (int b = 0; b < B_TILES; b++)
                if (FP16_SUMS)
                    mma_m16n8k16_fp16(sums_fp16[a][b], A[a], B[b][0], B[b][1]);
                else
                    mma_m16n8k16(sums_fp32[a][b], A[a], B[b][0], B[b][1]);
    float sum = 0.0f;
    for (int a = 0; a < A_TILES; a++)
        for (int b = 0; b < B_TILES; b++)
            for (int e = 0; e < 4; e++)
                sum +=
                    FP16_SUMS ? unpack<FA_FLOAT16>(sums_fp16[a][b][e / 2]).x : sums_fp32[a][b][e];
    sums[thread] = sum;
}
