/* The matrix product that all others are made of: what follows one or two ldmatrix.
 *
 * TENSOR_REPEAT is 1 in every kernel that is used. 2 or 4 make the tensor cores of an H100 as slow
 * beside the rest of a multiprocessor as those of sm_120 are, to measure what a kernel is worth
 * there (FA_SM120_TENSOR_REPEAT in docs/environment.md): each mma is issued so many times, into the
 * same accumulators. Not one by one, as two mma on one accumulator wait for each other, but a group
 * of independent ones as a whole. Products are then TENSOR_REPEAT times too large: scores have a
 * scale that undoes it, and so have outputs. */
#ifndef FA_PRODUCT_CUH
#define FA_PRODUCT_CUH

#include "ptx.cuh"

/* In place of a type: e4m3 with block scales, which are 1. */
constexpr int UNIT_SCALED_E4M3 = -1;

/* C [16, 8] += A [16, k] * B [k, 8], with as many k as an mma of the type takes. */
template <int TYPE>
__device__ __forceinline__ void mma(float (&C)[4], const unsigned (&A)[4], unsigned B0, unsigned B1)
{
    if constexpr (TYPE == UNIT_SCALED_E4M3)
        mma_m16n8k32_mxfp8(C, A, B0, B1);
    else if constexpr (TYPE == FA_FLOAT8_E4M3)
        mma_m16n8k32_e4m3(C, A, B0, B1);
    else
        mma_m16n8k16<TYPE>(C, A, B0, B1);
}

/* C [16 * FRAGS_M, 8 * FRAGS] += A [16 * FRAGS_M, K steps] * B [K steps, 8 * FRAGS], where A is the
 * steps of A_rmem from `k` on, as many as it has. load(B, n) brings COLUMNS columns of fragments
 * from n on: [K][COLUMNS][2 halves of the step]. */
template <int FRAGS, int TYPE = DTYPE, int K = 1, int COLUMNS = 2, int FRAGS_M, int MAX_FRAGS,
          int STEPS, class F>
__device__ __forceinline__ void mma_step(float (&C_rmem)[FRAGS_M][MAX_FRAGS][4],
                                         const unsigned (&A_rmem)[FRAGS_M][STEPS][4], int k, F load)
{
    constexpr int PRODUCTS = FRAGS_M * K * COLUMNS;                                /* of a load */
    constexpr int LOADS = TENSOR_REPEAT > 1 && PRODUCTS == 2 && FRAGS > 2 ? 2 : 1; /* of a group */
#pragma unroll
    for (int n0 = 0; n0 < FRAGS; n0 += COLUMNS * LOADS) {
        unsigned B_rmem[LOADS][2 * K * COLUMNS];
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            if (n0 + COLUMNS * i < FRAGS)
                load(B_rmem[i], n0 + COLUMNS * i);
#pragma unroll
        for (int repeat = 0; repeat < TENSOR_REPEAT; repeat++)
#pragma unroll
            for (int i = 0; i < LOADS; i++)
#pragma unroll
                for (int step = 0; step < K; step++)
#pragma unroll
                    for (int m = 0; m < FRAGS_M; m++)
#pragma unroll
                        for (int column = 0; column < COLUMNS; column++) {
                            const int n = n0 + COLUMNS * i + column;
                            const unsigned *B = B_rmem[i] + 2 * (step * COLUMNS + column);
                            if (n < FRAGS && k + step < STEPS)
                                mma<TYPE>(C_rmem[m][n], A_rmem[m][k + step], B[0], B[1]);
                        }
    }
}

#endif
