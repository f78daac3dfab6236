/* Gradients of the tensors that a score_mod captures: with ds = p * (dp - delta), the gradient of a
 * modified score, each (query, key) adds what its text makes of ds to a few elements. After
 * backward_preprocess.cu, whose lse and delta it reads; it computes s and dp again, as backward.cu
 * never has the score and ds in one warp.
 *
 * A block takes a tile of queries, or, where BLOCK_SPARSE, a tile of keys and the tiles of queries
 * that it lists; a warp 16 queries at a time. Q and dO are in registers, and K and V come from
 * global memory, right into the operands of the mma, 8 keys at a time.
 *
 * Constants as in backward.cu, and
 *
 *   DETERMINISTIC   1: sums in fixed point, see fixed_point_sums.cuh
 *   LARGEST         1: what these have to know first, in place of the gradients */
#include "params.h"

#include "backward.cuh"
#include "block_list.cuh"
#include "fixed_point_sums.cuh"
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

/* ---- what scores add to ---------------------------------------------------------------------- */

/* The gradients, for the text of a score_mod. `tensor`: the number of a captured one. */
struct captured_gradients {
    const fa_captured_params &params;

    /* A lane alone. */
    template <class... index_t>
    __device__ __forceinline__ void add(int tensor, float x, index_t... index) const
    {
        float *gradient = params.backward.mods.gradients[tensor];
        if (!gradient)
            return;
        fa_captured contiguous = params.backward.mods.score[tensor];
        fa_int64 step = 1;
#pragma unroll
        for (int i = int(sizeof...(index)) - 1; i >= 0; i--) {
            contiguous.stride[i] = step;
            step *= contiguous.size[i];
        }
        const fa_int64 at = captured_offset(contiguous, 0, index...);
        if (!DETERMINISTIC)
            atomicAdd(gradient + at, x);
        else if (LARGEST)
            add_to_largest(gradient + at, x);
        else
            add_in_units(params.sums[tensor] + 2 * at, x, gradient[at], params.bits);
    }
    /* All of a warp. */
    template <class... index_t>
    __device__ __forceinline__ void add_sum(int tensor, float x, index_t... index) const
    {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            x += __shfl_xor_sync(0xffffffff, x, distance);
        if (threadIdx.x % 32 == 0)
            add(tensor, x, index...);
    }
};

/* ---- the kernel ------------------------------------------------------------------------------ */

/* The (batch, head) pair of a block, and its tile: of queries, or of keys where BLOCK_SPARSE. */
__device__ __forceinline__ query_tile_place place_of_block(const fa_backward_params &params)
{
    if (!BLOCK_SPARSE)
        return query_tiles<fa_backward_params>{params}.place_of(blockIdx.x);
    const int tile = blockIdx.x % params.n_blocks, pair = blockIdx.x / params.n_blocks;
    return {pair, pair / params.heads_q, pair % params.heads_q, tile};
}

extern "C" __global__ void __launch_bounds__(THREADS)
    backward_captured(const __grid_constant__ fa_captured_params all_params)
{
    const fa_backward_params &params = all_params.backward.dense;
    const auto [pair, batch, head, own_tile] = place_of_block(params);
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
    const float slope = ALIBI ? load_slope(params, batch, head) : 0.0f;
    const dropout_stream stream(params, batch, head);
    const fa_mods &mods = all_params.backward.mods;
    const captured_gradients gradients = {all_params};
    const score_coords of_head = {batch, head, 0, 0};
    float sums[FA_MAX_CAPTURED] = {}; /* of elements that all scores of a head have in common */

    /* The scores of a tile of queries, whose lse and delta are at `lse`, and of the keys from
     * `key_begin` to `key_end`; is_partial: whether a mask_mod may hide some. */
    const auto add_scores = [&, batch = batch, head = head](int m_block, const float *lse,
                                                            int key_begin, int key_end,
                                                            bool is_partial) {
        for (int row0 = threadIdx.x / 32 * 16; row0 < TILE_M; row0 += THREADS / 2) {
            const int query0 = m_block * TILE_M + row0;
            if (query0 >= seq.seqlen_q())
                break;
            unsigned Q_rmem[STEPS][4], dO_rmem[STEPS_V][4];
            const int query = query0 + quad_row();
            load_rows<HEAD_DIM>(Q_rmem, Q, params.q_stride.seqlen, query, seq.seqlen_q());
            load_rows<HEAD_DIM_V>(dO_rmem, dO, params.dout_stride.seqlen, query, seq.seqlen_q());
            const int last = min(query0 + 15, seq.seqlen_q() - 1);
            const int begin = max(mask.keys_of(query0).begin, key_begin) / 8 * 8;
            const int end = min(mask.keys_of(last).end, key_end);
            for (int key0 = begin; key0 < end; key0 += 8) {
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
                        (is_partial && !mask_mod_of(at, mods.mask)))
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
                        add_score_mod_gradients(ds, S[0][0][e], scale, at, mods.score, gradients,
                                                sums);
                }
            }
        }
    };

    if constexpr (!BLOCK_SPARSE) {
        const float *lse = params.lse_delta + static_cast<fa_int64>(blockIdx.x) * (2 * TILE_M);
        add_scores(own_tile, lse, 0, seq.seqlen_k(), true);
    } else {
        const listed_tiles listed(params, batch, head, own_tile);
        const int key_begin = own_tile * params.tile_n;
        for (int i = 0; i < listed.count(); i++) {
            const int m_block = listed.tile(i);
            const fa_int64 tile = static_cast<fa_int64>(pair) * params.m_blocks + m_block;
            add_scores(m_block, params.lse_delta + tile * (2 * TILE_M), key_begin,
                       key_begin + params.tile_n, i < listed.partial_tiles());
        }
    }
    add_score_mod_sums(of_head, gradients, sums);
}
