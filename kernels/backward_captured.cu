/* Gradients of the tensors that a score_mod captures: with ds = p * (dp - delta), the gradient of a
 * modified score, each (query, key) adds what its text makes of ds to a few elements. After
 * backward_preprocess.cu, whose lse and delta it reads; it computes s and dp again, as backward.cu
 * never has the score and ds in one warp.
 *
 * A block takes a tile of queries, a warp 16 of them at a time. Q and dO are in registers, and K
 * and V come from global memory, right into the operands of the mma, 8 keys at a time.
 *
 * Constants as in backward.cu. */
#include "params.h"

#include "backward.cuh"
#include "query_tiles.cuh"
#include "score.cuh"

constexpr int THREADS = FA_CAPTURED_THREADS;
constexpr int STEPS = (HEAD_DIM + 15) / 16, STEPS_V = (HEAD_DIM_V + 15) / 16;

/* Two elements of a row, from `dim` on; zeros where the row or the dim is not there. */
__device__ __forceinline__ unsigned load_pair(const element *row, bool exists, int dim, int dims)
{
    return exists && dim < dims ? *reinterpret_cast<const unsigned *>(row + dim) : 0;
}

/* 16 rows as the A operand: row g is `row`, row g + 8 is 8 further. */
template <int DIMS, int COUNT>
__device__ __forceinline__ void load_rows(unsigned (&A)[COUNT][4], const element *first,
                                          fa_int64 stride, int row, int rows)
{
#pragma unroll
    for (int i = 0; i < 4 * COUNT; i++) {
        const int half = i % 2, dim = i / 4 * 16 + i % 4 / 2 * 8 + 2 * quad_lane();
        const int at = row + 8 * half;
        A[i / 4][i % 4] = load_pair(first + at * stride, at < rows, dim, DIMS);
    }
}

/* C [16, 8] = A [16, DIMS] * B^T, with column g of B^T in this lane's row. */
template <int DIMS, int COUNT>
__device__ __forceinline__ void multiply(float (&C)[4], const unsigned (&A)[COUNT][4],
                                         const element *row, bool exists)
{
    for (int e = 0; e < 4; e++)
        C[e] = 0.0f;
#pragma unroll
    for (int d = 0; d < COUNT; d++) {
        const int dim = 16 * d + 2 * quad_lane();
        mma_m16n8k16(C, A[d], load_pair(row, exists, dim, DIMS),
                     load_pair(row, exists, dim + 8, DIMS));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    backward_captured(const __grid_constant__ argument_of<fa_backward_params> all_params)
{
    const fa_backward_params &params = params_of<fa_backward_params>(all_params);
    const auto [pair, batch, head, m_block] =
        query_tiles<fa_backward_params>{params}.place_of(blockIdx.x);
    sequence<fa_backward_params> seq = {params, 0};
    seq.select(batch);
    const attention_mask mask(seq);
    const int head_kv = head / params.heads_per_kv;
    const element *Q = static_cast<const element *>(params.q) + seq.q_offset(params.q_stride, head);
    const element *dO =
        static_cast<const element *>(params.dout) + seq.q_offset(params.dout_stride, head);
    const element *K =
        static_cast<const element *>(params.k) + seq.k_offset(params.k_stride, head_kv);
    const element *V =
        static_cast<const element *>(params.v) + seq.k_offset(params.v_stride, head_kv);
    const float *lse = params.lse_delta + static_cast<fa_int64>(blockIdx.x) * (2 * TILE_M);
    const float slope = ALIBI ? load_slope(params, batch, head) : 0.0f;
    const dropout_stream stream(params, batch, head);
    const fa_mods &mods = mods_of(params);
    const score_coords of_head = {batch, head, 0, 0};
    float sums[FA_MAX_CAPTURED] = {}; /* of elements that all scores of a head have in common */

    for (int row0 = threadIdx.x / 32 * 16; row0 < TILE_M; row0 += THREADS / 2) {
        const int query0 = m_block * TILE_M + row0;
        if (query0 >= seq.seqlen_q())
            break;
        unsigned Q_rmem[STEPS][4], dO_rmem[STEPS_V][4];
        const int query = query0 + quad_row();
        load_rows<HEAD_DIM>(Q_rmem, Q, params.q_stride.seqlen, query, seq.seqlen_q());
        load_rows<HEAD_DIM_V>(dO_rmem, dO, params.dout_stride.seqlen, query, seq.seqlen_q());
        const int last = min(query0 + 15, seq.seqlen_q() - 1);
        const int begin = max(mask.keys_of(query0).begin, 0) / 8 * 8;
        for (int key0 = begin; key0 < mask.keys_of(last).end; key0 += 8) {
            const int own = key0 + quad_row();
            const bool exists = own < seq.seqlen_k();
            float S[1][1][4], dP[4];
            multiply<HEAD_DIM>(S[0][0], Q_rmem, K + own * params.k_stride.seqlen, exists);
            multiply<HEAD_DIM_V>(dP, dO_rmem, V + own * params.v_stride.seqlen, exists);
            softcap(S, params.scale_in_cap);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = row0 + quad_row() + 8 * (e / 2);
                const score_coords at = {batch, head, m_block * TILE_M + row,
                                         key0 + 2 * quad_lane() + e % 2};
                const range keys = mask.keys_of(at.query);
                if (at.query >= seq.seqlen_q() || at.key < keys.begin || at.key >= keys.end ||
                    !mask_mod_of(at, mods.mask))
                    continue;
                const float scale = natural_scale(params);
                float s = score_mod_of(S[0][0][e], scale, at, mods.score);
                if (ALIBI)
                    s = with_alibi(s, 1.0f, slope,
                                   at.query + seq.seqlen_k() - seq.seqlen_q() - at.key);
                const float p = exp2_approx(s - lse[row]) * (1.0f / P_SCALE);
                const float dp = dP[e] * stream.factor(at.query, at.key, params.dropout.scale);
                const float ds = p * (dp - lse[TILE_M + row]);
                if (ds != 0.0f)
                    add_score_mod_gradients(ds, S[0][0][e], scale, at, mods, sums);
            }
        }
    }
    add_score_mod_sums(of_head, mods, sums);
}
