/* Matrix products of backward.cu, one warp's part of each, and how their operands are loaded. */
#ifndef FA_BACKWARD_PRODUCTS_CUH
#define FA_BACKWARD_PRODUCTS_CUH

#include "backward_tile.cuh"
#include "product.cuh"

/* This lane's row for an ldmatrix of four 8x8 matrices, in the order [rows 0-7, rows 8-15] of chunk
 * 0, then of chunk 1: an A operand, or, transposed, a B operand whose k are rows. */
template <class layout> __device__ __forceinline__ unsigned rows_first()
{
    const int lane = lane_id();
    return layout::offset(lane % 16, lane / 16);
}
/* The same in the order [chunk 0, chunk 1] of rows 0-7, then of rows 8-15: a B operand whose
 * columns are rows in memory, or, transposed, an A operand. */
template <class layout> __device__ __forceinline__ unsigned columns_first()
{
    const int lane = lane_id();
    return layout::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

/* C [16 * FRAGS_M, 8 * FRAGS] += A [16 * FRAGS_M, 16 * STEPS] * B^T, B [8 * FRAGS, 16 * STEPS] in
 * shared memory. */
template <class layout, int STEPS, int FRAGS, int FRAGS_M, int MAX_FRAGS, int MAX_STEPS>
__device__ __forceinline__ void mma_ABt(float (&C_rmem)[FRAGS_M][MAX_FRAGS][4],
                                        const unsigned (&A_rmem)[FRAGS_M][MAX_STEPS][4],
                                        unsigned B_smem)
{
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        mma_step<FRAGS>(C_rmem, A_rmem, k, [&](unsigned (&B_rmem)[4], int n) {
            ldmatrix_x4(B_rmem, layout::moved(B_smem, 8 * n, 2 * k));
        });
}

/* C [16 * FRAGS_M, 8 * FRAGS] += A [16 * FRAGS_M, 16 * STEPS] * B [16 * STEPS, 8 * FRAGS], where B
 * is in shared memory and starts at the fragment `frag0` of its rows, a multiple of FRAGS. */
template <class layout, int STEPS, int FRAGS, int FRAGS_M, int MAX_FRAGS, int MAX_STEPS>
__device__ __forceinline__ void mma_AB(float (&C_rmem)[FRAGS_M][MAX_FRAGS][4],
                                       const unsigned (&A_rmem)[FRAGS_M][MAX_STEPS][4],
                                       unsigned B_smem, int frag0 = 0)
{
    /* Parts that end where segments do share one swizzled base address. */
    constexpr bool IS_ALIGNED = FRAGS % layout::COLS == 0 || layout::COLS % FRAGS == 0;
    const unsigned part_smem = layout::moved(B_smem, 0, frag0);
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        mma_step<FRAGS>(C_rmem, A_rmem, k, [&](unsigned (&B_rmem)[4], int n) {
            ldmatrix_x4_trans(B_rmem, IS_ALIGNED ? layout::moved(part_smem, 16 * k, n)
                                                 : layout::moved(B_smem, 16 * k, frag0 + n));
        });
}

template <int FRAGS_M, int FRAGS_N>
__device__ __forceinline__ void set_to_zero(float (&C_rmem)[FRAGS_M][FRAGS_N][4])
{
#pragma unroll
    for (int m = 0; m < FRAGS_M; m++)
#pragma unroll
        for (int n = 0; n < FRAGS_N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                C_rmem[m][n][e] = 0.0f;
}

/* The accumulators of S^T or dP^T [WARP_N, SUB_M] as the A operand of the next product: the layout
 * is the same, only the type changes. */
__device__ __forceinline__ void pack_operand(unsigned (&A_rmem)[N_FRAGS][M_FRAGS / 2][4],
                                             const float (&C_rmem)[N_FRAGS][M_FRAGS][4])
{
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                A_rmem[n][m / 2][m % 2 * 2 + half] =
                    pack(C_rmem[n][m][2 * half], C_rmem[n][m][2 * half + 1]);
}

/* Calls f(address, n, m, half) for each word of this lane's part of P^T or dS^T [WARP_N, SUB_M] in
 * shared memory: row g + 8 * half, columns 2t and 2t + 1 of fragment [n][m]. `word_smem` is the
 * address of the first. */
template <class F> __device__ __forceinline__ void for_each_word(unsigned word_smem, F f)
{
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                f(dS_layout::moved(word_smem, 16 * n + 8 * half, m), n, m, half);
}

/* K or V [WARP_N, DIM] of one KV head, from key `key0` on, from global memory into the layout of
 * the A operand. Keys after the last, and what pads the head dim, are zeros. */
template <int DIM>
__device__ __forceinline__ void load_operand(unsigned (&A_rmem)[N_FRAGS][MAX_STEPS][4],
                                             const void *tensor, const fa_strides &stride,
                                             int batch, int head, int key0, int keys)
{
    const element *gmem = static_cast<const element *>(tensor) + batch * stride.batch +
                          head * stride.head + quad_lane() * 2;
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int key = key0 + 16 * n + 8 * half + quad_row();
#pragma unroll
            for (int chunk = 0; chunk < ceil_div(DIM, 16) * 2; chunk++) {
                const bool exists = chunk < DIM / 8 && key < keys;
                const unsigned *word =
                    reinterpret_cast<const unsigned *>(gmem + key * stride.seqlen + chunk * 8);
                A_rmem[n][chunk / 2][chunk % 2 * 2 + half] = exists ? *word : 0;
            }
        }
}

/* Adds FRAGS fragments to a row of `row_frags` of them in an accumulator, see params.h, from number
 * frag0 on. Fragments beyond the head dim are skipped. */
template <int FRAGS, int MAX_FRAGS>
__device__ __forceinline__ void add_to_accum(float *accum, const float (&C_rmem)[MAX_FRAGS][4],
                                             int frag0, int row_frags)
{
#pragma unroll
    for (int n = 0; n < FRAGS; n++)
        if (frag0 + n < row_frags)
            red_add_4(accum + ((frag0 + n) * 32 + lane_id()) * 4, C_rmem[n]);
}

#endif
