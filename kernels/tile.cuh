/* Tiles of keys and values: the ring in shared memory, whose size fa_forward_smem() in geometry.h
 * computes, and the two products that read it. */
#ifndef FA_TILE_CUH
#define FA_TILE_CUH

#include "kv_operands.cuh"
#include "product.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int TILE_M = WARPS * WARP_M;  /* queries per block */
constexpr int M_FRAGS = WARP_M / 16;    /* 16-row fragments per warp */
constexpr int S_FRAGS = SUB_N / 8;      /* 8-key columns of a sub-tile of scores */
constexpr int O_FRAGS = HEAD_DIM_V / 8; /* 8-dim columns of the output */
constexpr int D_STEPS = ceil_div(HEAD_DIM, OPERAND_K);
constexpr int P_STEPS = SUB_N / OPERAND_K;

/* Unrolled sub-tiles overlap, which takes registers; wide rows leave none to spare, nor does the
 * tanh of a cap or a mod. */
constexpr bool WIDE = WARP_M == 32 && (HEAD_DIM > 96 || HEAD_DIM_V > 96);
constexpr int SUB_UNROLL = WIDE || SOFTCAP || SCORE_MOD || MASK_MOD ? 1 : TILE_N / SUB_N;

static_assert(HEAD_DIM % fa_chunk_elements(KV_DTYPE) == 0 &&
                  HEAD_DIM_V % fa_chunk_elements(KV_DTYPE) == 0,
              "a row is whole 16-byte chunks");
#define FA_ASSERT(condition, message) static_assert(condition, message);
FA_FORWARD_TILE_RULES(FA_ASSERT, WARPS, WARP_M, TILE_N, SUB_N, STAGES)
FA_ASSERT(SUB_N % OPERAND_K == 0, "a sub-tile is whole steps of P V")
#undef FA_ASSERT

using K_layout = tile_layout<HEAD_DIM, TILE_N, fa_mma_k(KV_DTYPE), kv_element>;
using V_layout = tile_layout<HEAD_DIM_V, TILE_N, fa_mma_k(KV_DTYPE), kv_element>;
using K_place = copy_place<K_layout, THREADS>;
using V_place = copy_place<V_layout, THREADS>;
constexpr int STAGE_BYTES = fa_forward_stage_bytes(HEAD_DIM, HEAD_DIM_V, TILE_N, KV_DTYPE);
constexpr int RING_BYTES = STAGES * STAGE_BYTES;

/* This lane's row for an ldmatrix of 16 keys x 2 chunks of dims, whose matrices 0 and 1, then 2 and
 * 3, are of K two chunks of 8 keys, of V two times 8 keys of one chunk: unless WIDENS the B operand
 * of one mma. Of V where Q_E4M3 it is one of 32 keys x 1 chunk. */
__device__ __forceinline__ unsigned K_lane_offset()
{
    const int lane = threadIdx.x % 32;
    return K_layout::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
__device__ __forceinline__ unsigned V_lane_offset()
{
    const int lane = threadIdx.x % 32;
    return Q_E4M3 ? V_layout::offset(lane, 0) : V_layout::offset(lane % 16, lane / 16);
}

/* The stage of the ring that is computed on, and this lane's rows for ldmatrix in it. */
struct ring_place {
    unsigned smem, stage, K_smem, V_smem; /* addresses; `stage` is an offset */

    __device__ __forceinline__ explicit ring_place(unsigned smem) : smem(smem) {}

    __device__ __forceinline__ void rewind()
    {
        stage = 0;
        K_smem = smem + K_lane_offset();
        V_smem = smem + K_layout::BYTES + V_lane_offset();
    }
    __device__ __forceinline__ void advance()
    {
        const int step = is_last() ? STAGE_BYTES - RING_BYTES : STAGE_BYTES;
        stage += step;
        K_smem += step;
        V_smem += step;
    }
    __device__ __forceinline__ bool is_last() const { return stage == RING_BYTES - STAGE_BYTES; }
    __device__ __forceinline__ unsigned before() const
    {
        return stage == 0 ? RING_BYTES - STAGE_BYTES : stage - STAGE_BYTES;
    }
    __device__ __forceinline__ unsigned V_tile() const { return smem + stage + K_layout::BYTES; }
};

/* S [WARP_M, SUB_N] = Q [WARP_M, HEAD_DIM] * K [SUB_N, HEAD_DIM]^T */
__device__ __forceinline__ void scores(float (&S_rmem)[M_FRAGS][S_FRAGS][4],
                                       const unsigned (&Q_rmem)[M_FRAGS][D_STEPS][4],
                                       unsigned K_smem)
{
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                S_rmem[m][n][e] = 0.0f;

#pragma unroll
    for (int d = 0; d < D_STEPS; d += K_STEPS)
        mma_step<S_FRAGS, PRODUCT_TYPE, K_STEPS>(S_rmem, Q_rmem, d,
                                                 [&](unsigned (&K_rmem)[4 * K_STEPS], int n) {
                                                     load_keys<K_layout>(K_rmem, K_smem, n, d);
                                                 });
}

/* O [WARP_M, HEAD_DIM_V] += P [WARP_M, SUB_N] * V [SUB_N, HEAD_DIM_V] */
__device__ __forceinline__ void add_values(float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                           const unsigned (&P_rmem)[M_FRAGS][P_STEPS][4],
                                           unsigned V_smem)
{
#pragma unroll
    for (int k = 0; k < P_STEPS; k++)
        mma_step<O_FRAGS, PRODUCT_TYPE, 1, V_COLUMNS>(
            O_rmem, P_rmem, k, [&](unsigned (&V_rmem)[2 * V_COLUMNS], int n) {
                load_values<V_layout>(V_rmem, V_smem, k, n);
            });
}

#endif
