/* Attention backward: dK and dV of one block of keys of one KV head, and its share of dQ.
 *
 * Keys are stationary: a block holds a tile of K and V, and tiles of queries (Q, dO, their lse and
 * delta) stream through shared memory. With s = scale * q.k, p = e^(s - lse), dp = dO.v and
 * ds = p * (dp - delta), each tile of queries takes five products:
 *
 *   1.  S^T  [TILE_N, TILE_M]       =  K [TILE_N, HEAD_DIM] * Q^T              warp group 0
 *   2.  dP^T [TILE_N, TILE_M]       =  V [TILE_N, HEAD_DIM_V] * dO^T           warp group 1
 *   3.  dV   [TILE_N, HEAD_DIM_V]  +=  P^T [TILE_N, TILE_M] * dO               warp group 0
 *   4.  dK   [TILE_N, HEAD_DIM]    +=  dS^T [TILE_N, TILE_M] * Q               warp group 1
 *   5.  dQ   [TILE_M, HEAD_DIM]    +=  dS [TILE_M, TILE_N] * K                 both
 *
 * Warp group 0 owns K, group 1 owns V, in registers, WARP_N keys per warp. The transposed products
 * 1 and 2 leave P^T and dS^T in the layout of the A operand of 3 and 4. P^T goes from group 0 to
 * group 1 through shared memory, in sub-tiles of SUB_M queries, and dS^T takes its place there.
 * Only dQ sums over the keys of all warps, and of all blocks: every warp computes a part of product
 * 5, group 0 the lower half of the queries and group 1 the upper half, and adds it to dq_accum in
 * global memory. So the groups run out of step, and one's additions overlap the other's products.
 *
 * backward_preprocess.cu computes delta before, backward_postprocess.cu writes dQ after.
 *
 * One source, compiled once per set of constants:
 *   DTYPE                  enum fa_dtype in params.h, of all tensors
 *   HEAD_DIM, HEAD_DIM_V   of Q and K, of V and O: multiples of 8 up to 256
 *   WARPS, WARP_N          warps of both groups; keys per warp, a multiple of 16
 *   TILE_M, SUB_M          queries: TILE_M at a time in shared memory, SUB_M through registers
 *   DQ_DIM_WARPS           warps of a group that share rows of dQ, each with a part of the dims
 *   STAGES                 1 or 2: of Q in shared memory
 *   TMA                    1: the TMA loads Q and dO, 0: cp.async does
 *   MASK_RIGHT, MASK_LEFT  1: keys end (start) at a diagonal: causal, sliding windows
 *   SOFTCAP                1: scores are capped by a tanh
 *   DROPOUT                1: weights are dropped
 *   ALIBI                  1: scores fall with the distance of the key
 *   BIAS, BIAS_FP32        1: a bias is added to them; 1: in fp32, 0: in the type of the others
 *   BIAS_GRADIENT          1: its gradient is wanted
 *   SCORE_MOD, MASK_MOD    not 0: a callable changes scores, hides keys: see mods.cuh
 *   DETERMINISTIC          1: ordered accumulation: blocks add to dQ in the order of their keys
 *   DQ_DIRECT              1: one block has all keys, and stores dQ instead of adding to it
 *   VARLEN                 1: sequences differ in length
 *   BLOCK_SPARSE           1: blocks of queries and keys are listed, and no others are read
 *   TENSOR_REPEAT          how often each mma is issued: 1, see product.cuh
 *   DQ_BUFFERS             accumulators of dQ: block n of keys adds to number n % DQ_BUFFERS. With
 *                          ordered accumulation, alternate buffers let adjacent blocks overlap */
#include "params.h"

#include "backward_bias.cuh"
#include "backward_products.cuh"
#include "backward_queries.cuh"
#include "score.cuh"

/* Masked scores may be set before product 1, which adds to them, where no step of score.cuh comes
 * between it and the mask: then nothing delays the exponentials. A bias is masked instead of its
 * score: what it holds where a query does not see a key, counts for nothing. */
constexpr bool MASKS_BIAS = BIAS, MASKS_FIRST = !SOFTCAP && !BIAS && !HAS_MODS;

/* The mask of S^T [WARP_N, SUB_M], or of its bias; rows are keys. `key` and `query` are those of
 * S_rmem[0][0][0]. */
__device__ __forceinline__ void mask_sub_tile(float (&S_rmem)[N_FRAGS][M_FRAGS][4],
                                              const sequence<fa_backward_params> &seq, int key,
                                              int query)
{
    const attention_mask mask(seq);
    const float masked_score = MASKS_BIAS ? -INF : unscaled_masked_score(seq.params);
    mask_scores<true, MASK_LEFT>(S_rmem, masked_score, [&](int row) -> range {
        const int row_key = key + row;
        return {row_key < seq.seqlen_k() ? mask.queries_of(row_key).begin - query : SUB_M,
                mask.queries_of(row_key).end - query};
    });
}

/* A hidden score may have any derivative, even NaN. */
__device__ __forceinline__ float p_times_slope(float p, float slope)
{
    return p == 0.0f ? 0.0f : p * slope;
}

/* P^T between the groups: fp16, unless a score_mod's derivative may take it out of its range, or
 * below 0. Else its sign is free to tell group 1 what is dropped; with a score_mod that group draws
 * the numbers once more. */
enum : bool {
    SIGNS_TELL_DROPPED = DROPOUT && !SCORE_MOD,
    DRAWS_TWICE = DROPOUT && SCORE_MOD,
};

__device__ __forceinline__ unsigned pack_P(float low, float high)
{
    return SCORE_MOD ? pack(low, high) : pack<FA_FLOAT16>(low, high);
}
__device__ __forceinline__ float2 unpack_P(unsigned x)
{
    return SCORE_MOD ? unpack(x) : unpack<FA_FLOAT16>(x);
}

/* min(x, limit), but NaN where x is. Where all biases of a query are large numbers, as -1e9, its
 * lse has no bits for the sum: still no weight may be more than 1. */
__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }

/* Products 1 and 3 of warp group 0: P^T to shared memory, and dV. `word_smem` is the address of
 * this lane's first word of P^T, `key` that word's key. MASKED: some query of the tile does not see
 * some key of the block. */
template <bool MASKED>
__device__ __forceinline__ void compute_dV(float (&dV_rmem)[N_FRAGS][MAX_FRAGS][4],
                                           const unsigned (&K_rmem)[N_FRAGS][MAX_STEPS][4],
                                           const query_tile &tile, unsigned word_smem, int key,
                                           const sequence<fa_backward_params> &seq)
{
    const fa_backward_params &params = seq.params;
    const dropout_stream stream(params, seq.batch, tile.head);
    const float slope = ALIBI ? load_slope(params, seq.batch, tile.head) : 0.0f;
    tile.wait_Q();
    if (!WAITS_LATE_FOR_DO)
        tile.wait_dO();
#pragma unroll
    for (int m0 = 0; m0 < TILE_M; m0 += SUB_M) {
        const int query = tile.query0 + m0 + 2 * quad_lane(); /* of S_rmem[0][0][0] */
        const auto coords_of = [&](int row, int column) -> score_coords {
            return {seq.batch, tile.head, query + column, key + row};
        };
        const float distance = query + seq.seqlen_k() - seq.seqlen_q() - key; /* for ALiBi */

        /* Product 1: S^T [WARP_N, SUB_M] = K * Q^T, and the steps of score.cuh. */
        float S_rmem[N_FRAGS][M_FRAGS][4];
        unsigned P_rmem[N_FRAGS][M_FRAGS / 2][4];
        set_to_zero(S_rmem);
        if (MASKED && MASKS_FIRST)
            mask_sub_tile(S_rmem, seq, key, query);
        float bias_rmem[N_FRAGS][M_FRAGS][4];
        if (BIAS)
            load_bias(bias_rmem, seq, tile.head, key, query);
        if (MASKED && MASKS_BIAS)
            mask_sub_tile(bias_rmem, seq, key, query);
        mma_ABt<Q_layout, D_STEPS, M_FRAGS>(S_rmem, K_rmem,
                                            not_before(tile.Q_smem + columns_first<Q_layout>()) +
                                                m0 * Q_layout::ROW_BYTES);
        softcap(S_rmem, params.scale_in_cap);
        float P_group_1[N_FRAGS][M_FRAGS][4]; /* first the derivative of a score_mod */
        score_mod_and_slopes(S_rmem, P_group_1, params, coords_of);
        if (MASKED && !MASKS_FIRST && !MASKS_BIAS)
            mask_sub_tile(S_rmem, seq, key, query);
        if (tile.is_partial)
            mask_mod<true>(S_rmem, params, unscaled_masked_score(params), coords_of);

        /* P^T = 2^(S^T * scale_log2 - lse_log2), and for group 1, which computes dS^T from it, P^T
         * times the derivative of the cap and of a score_mod. */
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++) {
            const float2 lse = ld_shared_2(tile.lse_smem + (m0 + 8 * m + 2 * quad_lane()) * 4);
#pragma unroll
            for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float s = S_rmem[n][m][e];
                    const int row = 16 * n + 8 * (e / 2), column = 8 * m + e % 2;
                    float exponent = ALIBI ? with_alibi(s, scale_of_rest(params), slope,
                                                        distance + (column - row))
                                           : s * scale_of_rest(params);
                    if (BIAS)
                        exponent += bias_rmem[n][m][e];
                    exponent -= e % 2 ? lse.y : lse.x;
                    const float p = exp2_approx(BIAS ? at_most(exponent, P_SHIFT) : exponent);
                    S_rmem[n][m][e] = p;
                    P_group_1[n][m][e] = SCORE_MOD ? p_times_slope(p, P_group_1[n][m][e])
                                         : SOFTCAP ? p * (1.0f - fminf(s * s, 1.0f))
                                                   : p;
                }
        }

        /* What is dropped weighs nothing in dV. Where P^T is never negative a minus sign tells
         * group 1 that an element is dropped. */
        unsigned signed_words[N_FRAGS][M_FRAGS][2];
        if (DROPOUT) {
            pack_operand(P_rmem, S_rmem);
            for_each_kept_of_transposed<N_FRAGS, M_FRAGS>(
                stream, query, key, [&](int n, int m, int half, unsigned kept) {
                    const float *p = P_group_1[n][m] + 2 * half;
                    if (SIGNS_TELL_DROPPED)
                        signed_words[n][m][half] =
                            pack<FA_FLOAT16>(p[0], p[1]) | (~kept & 0x80008000u);
                    P_rmem[n][m / 2][m % 2 * 2 + half] &= kept;
                });
        }

        /* P^T to shared memory, once dS^T of the tile before has been read there. */
        if (m0 == 0)
            barrier_sync<GROUP_THREADS>(LOWER_FREE);
        if (m0 == HALF_M)
            barrier_sync<THREADS>(UPPER_FREE);
        for_each_word(
            dS_layout::moved(word_smem, 0, m0 / 8), [&](unsigned smem, int n, int m, int half) {
                const float *p = P_group_1[n][m] + 2 * half;
                st_shared(smem, SIGNS_TELL_DROPPED ? signed_words[n][m][half] : pack_P(p[0], p[1]));
            });
        barrier_arrive<THREADS>(P_FULL + m0 / SUB_M);

        /* Product 3: dV [WARP_N, HEAD_DIM_V] += P^T [WARP_N, SUB_M] * dO. */
        if (!DROPOUT)
            pack_operand(P_rmem, S_rmem);
        if (WAITS_LATE_FOR_DO && m0 == 0)
            tile.wait_dO();
        mma_AB<dO_layout, M_FRAGS / 2, dO_layout::PADDED>(
            dV_rmem, P_rmem,
            not_before(tile.dO_smem + rows_first<dO_layout>()) + m0 * dO_layout::ROW_BYTES);
    }
}

/* delta of this lane's two of the eight queries from number `query` of the tile on, in the unit of
 * product 2, which knows nothing of dropout's factor 1 / (1 - p). */
__device__ __forceinline__ float2 load_delta(const query_tile &tile, int query,
                                             const fa_backward_params &params)
{
    const float2 delta = ld_shared_2(tile.lse_smem + (TILE_M + query + 2 * quad_lane()) * 4);
    const float unit = (DROPOUT ? params.dropout.keep : 1.0f) * TENSOR_REPEAT;
    return make_float2(delta.x * unit, delta.y * unit);
}

/* Products 2 and 4 of warp group 1: dS^T in the place of P^T, and dK. `word_smem` is the address of
 * this lane's first word of them, `key` that word's key, `operand_smem` the address of its row for
 * ldmatrix. */
__device__ __forceinline__ void compute_dK(float (&dK_rmem)[N_FRAGS][MAX_FRAGS][4],
                                           const unsigned (&V_rmem)[N_FRAGS][MAX_STEPS][4],
                                           const query_tile &tile, unsigned word_smem,
                                           unsigned operand_smem, int key,
                                           const sequence<fa_backward_params> &seq)
{
    const fa_backward_params &params = seq.params;
    const dropout_stream stream(params, seq.batch, tile.head);
    tile.wait_Q(); /* delta comes with it */
    tile.wait_dO();
#pragma unroll
    for (int m0 = 0; m0 < TILE_M; m0 += SUB_M) {
        /* Product 2: dP^T - delta [WARP_N, SUB_M] = V * dO^T - delta. */
        float dS_rmem[N_FRAGS][M_FRAGS][4];
        unsigned P_rmem[N_FRAGS][M_FRAGS / 2][4];
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++) {
            const float2 delta = load_delta(tile, m0 + 8 * m, params);
#pragma unroll
            for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    dS_rmem[n][m][e] = -(e % 2 ? delta.y : delta.x);
        }
        mma_ABt<dO_layout, DV_STEPS, M_FRAGS>(
            dS_rmem, V_rmem,
            not_before(tile.dO_smem + columns_first<dO_layout>()) + m0 * dO_layout::ROW_BYTES);

        if (DRAWS_TWICE)
            for_each_kept_of_transposed<N_FRAGS, M_FRAGS>(
                stream, tile.query0 + m0 + 2 * quad_lane(), key,
                [&](int n, int m, int half, unsigned kept) {
                    const float2 delta = load_delta(tile, m0 + 8 * m, params);
                    float *dS = dS_rmem[n][m] + 2 * half;
                    dS[0] = kept & 0xffffu ? dS[0] : -delta.x;
                    dS[1] = kept >> 16 ? dS[1] : -delta.y;
                });

        /* dS^T = P^T * (dP^T - delta), with P^T from group 0; of a dropped weight dP^T is 0. The
         * factor 1 / (1 - p) is part of the scales of dK and dQ. */
        barrier_sync<THREADS>(P_FULL + m0 / SUB_M);
#pragma unroll
        for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
            for (int m = 0; m < M_FRAGS / 2; m++) {
                ldmatrix_x4(P_rmem[n][m], dS_layout::moved(operand_smem, 16 * n, m0 / 8 + 2 * m));
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const float2 p = unpack_P(P_rmem[n][m][r]);
                    float *dS = dS_rmem[n][2 * m + r / 2] + r % 2 * 2;
                    if (SIGNS_TELL_DROPPED) {
                        const float2 delta = load_delta(tile, m0 + 8 * (2 * m + r / 2), params);
                        dS[0] = p.x < 0.0f ? delta.x : dS[0];
                        dS[1] = p.y < 0.0f ? delta.y : dS[1];
                    }
                    dS[0] *= p.x;
                    dS[1] *= p.y;
                }
            }

        if (BIAS_GRADIENT)
            add_to_dbias(dS_rmem, seq, tile.head, key, tile.query0 + m0 + 2 * quad_lane());

        /* dS^T to shared memory: the warp's own part, so the warp alone has to have read P^T. */
        pack_operand(P_rmem, dS_rmem);
        __syncwarp();
        for_each_word(dS_layout::moved(word_smem, 0, m0 / 8),
                      [&](unsigned smem, int n, int m, int half) {
                          st_shared(smem, P_rmem[n][m / 2][m % 2 * 2 + half]);
                      });
        if (m0 + SUB_M == HALF_M)
            barrier_arrive<THREADS>(LOWER_FULL);

        /* Product 4: dK [WARP_N, HEAD_DIM] += dS^T [WARP_N, SUB_M] * Q. */
        mma_AB<Q_layout, M_FRAGS / 2, Q_layout::PADDED>(
            dK_rmem, P_rmem,
            not_before(tile.Q_smem + rows_first<Q_layout>()) + m0 * Q_layout::ROW_BYTES);
    }
}

/* dK or dV of this warp's keys: to the tensor, or to the accumulator of all blocks that share the
 * keys. */
template <int DIM>
__device__ __forceinline__ void store_gradient(const float (&C_rmem)[N_FRAGS][MAX_FRAGS][4],
                                               void *tensor, const fa_strides &stride, float *accum,
                                               const backward_block &block, int key0, float scale,
                                               const fa_backward_params &params)
{
    const fa_int64 pair = static_cast<fa_int64>(block.seq.batch) * params.heads_kv + block.head_kv;
    element *gmem = static_cast<element *>(tensor) + block.seq.k_offset(stride, block.head_kv);
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++) {
        const int key = key0 + 16 * n + quad_row();
        if (params.q_splits > 1) {
            const fa_int64 accum_row = pair * params.n_blocks * TILE_N + key0 + 16 * n;
            add_to_accum<DIM / 8>(accum + accum_row * DIM, C_rmem[n], 0, DIM / 8);
        } else {
#pragma unroll
            for (int half = 0; half < 2; half++)
                store_row<DIM / 8>(gmem + (key + 8 * half) * stride.seqlen, C_rmem[n], half, scale,
                                   key + 8 * half < block.seq.seqlen_k());
        }
    }
}

/* A warp's part of dQ to the tensor: rows from `query` on, dims from fragment `dim_frag` on. */
__device__ __forceinline__ void store_dQ(const float (&dQ_rmem)[DQ_DIM_FRAGS][4],
                                         const sequence<fa_backward_params> &seq, int head,
                                         int query, int dim_frag)
{
    const fa_backward_params &params = seq.params;
    element *gmem =
        static_cast<element *>(params.dq) + seq.q_offset(params.dq_stride, head) + dim_frag * 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = query + quad_row() + 8 * half;
        store_row<DQ_DIM_FRAGS>(gmem + row * params.dq_stride.seqlen, dQ_rmem, half,
                                params.softmax_scale / P_SCALE, row < seq.seqlen_q(),
                                HEAD_DIM / 8 - dim_frag);
    }
}

/* Zeros in dq, where the block has all keys of a sequence: in the rows that see none of them, those
 * outside the tiles [m_begin, m_end), which it does not go through. */
__device__ __forceinline__ void clear_dQ(const backward_block &block, int m_begin, int m_end)
{
    const sequence<fa_backward_params> &seq = block.seq;
    const fa_backward_params &params = seq.params;
    const int begin = min(m_begin * TILE_M, seq.seqlen_q());
    const int end = clamp(m_end * TILE_M, begin, seq.seqlen_q());
    for (int head = 0; head < params.heads_per_kv; head++) {
        element *gmem = static_cast<element *>(params.dq) +
                        seq.q_offset(params.dq_stride, block.head_kv * params.heads_per_kv + head);
        for (int i = threadIdx.x / 32; i < begin + seq.seqlen_q() - end; i += WARPS) {
            const int row = i < begin ? i : i - begin + end;
            if (lane_id() < HEAD_DIM / CHUNK_ELEMENTS)
                *reinterpret_cast<uint4 *>(gmem + row * params.dq_stride.seqlen +
                                           lane_id() * CHUNK_ELEMENTS) = make_uint4(0, 0, 0, 0);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward(const __grid_constant__ argument_of<fa_backward_params> all_params)
{
    const fa_backward_params &params = params_of<fa_backward_params>(all_params);
    extern __shared__ __align__(1024) char smem_begin[];
    const unsigned smem = smem_address(smem_begin);
    const int thread = read_thread_index();
    const int warp = __shfl_sync(0xffffffff, thread / 32, 0); /* uniform, as the compiler sees */
    const bool is_group_0 = warp < GROUP_WARPS;

    /* ---- 1. Tile coordinates: which keys, and which queries see them. */
    int number = read_block_index();
    if (DETERMINISTIC) {
        /* Blocks wait for blocks with lower numbers. They are numbered in the order of their start,
         * so that a block never waits for one that cannot start before it has ended. */
        if (thread == 0)
            st_shared(smem, atomic_add(params.block_counter, 1));
        __syncthreads();
        number = ld_shared(smem);
        __syncthreads();
    }
    const backward_block block(params, number);
    const sequence<fa_backward_params> &seq = block.seq;
    const attention_mask mask(seq);
    const int key0 = block.n_block * TILE_N, key1 = key0 + TILE_N;
    if (VARLEN && key0 >= seq.seqlen_k()) {
        if (DQ_DIRECT)
            clear_dQ(block, 0, 0);
        return; /* the grid has as many blocks as there may be tiles */
    }
    const int m_begin = mask.queries_of(key0).begin / TILE_M;
    const int m_end = max(ceil_div(mask.queries_of(key1 - 1).end, TILE_M), m_begin);
    query_walk<DETERMINISTIC> walk(params, block, m_begin, m_end);
    if (VARLEN && DQ_DIRECT)
        clear_dQ(block, m_begin, m_end);

    /* ---- 2. Prologue: K to shared memory, for product 5; the first queries to shared memory; K or
     * V to registers, for products 1 and 2. */
    const query_loader queries{seq, smem, thread};
    if (TMA) {
        queries.init_mbarriers();
        __syncthreads(); /* make the mbarrier inits visible before first use */
    }
    if (!is_group_0)
        barrier_arrive<THREADS>(UPPER_FREE);
    const copy_place<K_layout, THREADS> share;
    share.copy(
        smem + SMEM.k,
        share.first_chunk(params.k, params.k_stride, seq.batch, block.head_kv, seq.k_begin + key0),
        params.k_stride.seqlen, seq.seqlen_k() - key0);
    if (walk.begin < walk.end) {
        queries.load_Q(0, walk.head, walk.m_block);
        queries.load_dO(walk.head, walk.m_block);
    }

    const int warp_row = warp % GROUP_WARPS * WARP_N, warp_key = key0 + warp_row;
    unsigned KV_rmem[N_FRAGS][MAX_STEPS][4]; /* K (group 0) or V (group 1) */
    float dKV_rmem[N_FRAGS][MAX_FRAGS][4];   /* dV (group 0) or dK (group 1) */
    set_to_zero(dKV_rmem);
    if (is_group_0)
        load_operand<HEAD_DIM>(KV_rmem, params.k, params.k_stride, seq.batch, block.head_kv,
                               seq.k_begin + warp_key, seq.k_begin + seq.seqlen_k());
    else
        load_operand<HEAD_DIM_V>(KV_rmem, params.v, params.v_stride, seq.batch, block.head_kv,
                                 seq.k_begin + warp_key, seq.k_begin + seq.seqlen_k());

    /* P^T and dS^T of this warp's keys: this lane's row for ldmatrix, and its first word. */
    const unsigned operand_smem =
        smem + SMEM.ds + rows_first<dS_layout>() + warp_row * dS_layout::ROW_BYTES;
    const int lane_row = warp_row + thread % 32 / 4;
    const unsigned word_smem = smem + SMEM.ds + dS_layout::offset(lane_row, 0) + quad_lane() * 4;

    cp_async_wait_all();
    __syncthreads(); /* K, and without the TMA the first queries, have landed */

    int *semaphore = nullptr; /* of the previous tile of dQ: not yet incremented */
    for (int i = walk.begin; i < walk.end; i++) {
        const unsigned count = i - walk.begin, stage = count % STAGES;
        const bool last = i + 1 == walk.end;
        query_walk<DETERMINISTIC> next = walk;
        next.advance();
        const int query0 = walk.m_block * TILE_M;
        const query_tile tile(smem, count, walk.head, query0, walk.is_partial());
        const bool masked =
            key1 > seq.seqlen_k() || (MASK_RIGHT && mask.queries_of(key1 - 1).begin > query0) ||
            (MASK_LEFT && mask.queries_of(key0).end < min(query0 + TILE_M, seq.seqlen_q()));

        if (STAGES == 2 && !last)
            queries.load_Q(stage ^ 1, next.head, next.m_block);

        /* ---- 3. Products 1 and 3 in group 0: P^T and dV. 2 and 4 in group 1: dS^T and dK. */
        if (!is_group_0)
            compute_dK(dKV_rmem, KV_rmem, tile, word_smem, operand_smem, key0 + lane_row, seq);
        else if (masked)
            compute_dV<true>(dKV_rmem, KV_rmem, tile, word_smem, key0 + lane_row, seq);
        else
            compute_dV<false>(dKV_rmem, KV_rmem, tile, word_smem, key0 + lane_row, seq);

        /* ---- 4. Load the next tile of queries, once both groups have read this one. */
        if (!TMA)
            __syncthreads();
        else if (is_group_0)
            barrier_arrive<THREADS>(QUERIES_FREE);
        else
            barrier_sync<THREADS>(QUERIES_FREE);
        if (!last) {
            if (STAGES == 1)
                queries.load_Q(0, next.head, next.m_block);
            queries.load_dO(next.head, next.m_block);
        }
        if (is_group_0)
            barrier_sync<THREADS>(LOWER_FULL);

        /* ---- 5. Product 5: dQ [16 * DQ_ROW_FRAGS, 8 * DQ_DIM_FRAGS], this warp's part, = dS * K.
         * It stands here because in a function it compiles to other code at HEAD_DIM 256.
         *
         * With ordered accumulation a semaphore counts the blocks of keys that have added to a tile
         * of dQ, and a block waits until all before it have. The count is read before the product,
         * which hides the latency of the L2; mostly it is right by then. A block adds itself to the
         * count one tile late, while it computes the next. By then thread 0 has passed LOWER_FREE
         * and LOWER_FULL of that tile, at which the warps of group 0 and of group 1 arrive after
         * their additions to this one: no other barrier is needed. And the additions have landed
         * by then, so that the release has nothing to wait for. */
        const fa_int64 dq_tile = query_tiles<fa_backward_params>{params}.index(
            seq, walk.head, walk.m_block, block.n_block % DQ_BUFFERS);
        int added = 0;
        if (DQ_IS_ORDERED) {
            if (semaphore && thread == 0)
                semaphore_release(semaphore);
            semaphore = params.dq_semaphores + dq_tile;
            added = semaphore_load(semaphore);
        }
        const int group_warp = warp % GROUP_WARPS;
        const int row_frag =
            (is_group_0 ? 0 : HALF_FRAGS) + group_warp / DQ_DIM_WARPS * DQ_ROW_FRAGS;
        const int dim_frag = group_warp % DQ_DIM_WARPS * DQ_DIM_FRAGS;
        float dQ_rmem[DQ_ROW_FRAGS][DQ_DIM_FRAGS][4];
        set_to_zero(dQ_rmem);
        const unsigned dS_smem = not_before(smem + SMEM.ds + columns_first<dS_layout>());
        const unsigned K_smem = not_before(smem + SMEM.k + rows_first<K_layout>());
#pragma unroll
        for (int k = 0; k < TILE_N / 16; k++) {
            unsigned dS_rmem[DQ_ROW_FRAGS][1][4];
#pragma unroll
            for (int m = 0; m < DQ_ROW_FRAGS; m++)
                ldmatrix_x4_trans(dS_rmem[m][0],
                                  dS_layout::moved(dS_smem, 16 * k, 2 * (row_frag + m)));
            mma_AB<K_layout, 1, DQ_DIM_FRAGS>(dQ_rmem, dS_rmem, K_layout::moved(K_smem, 16 * k, 0),
                                              dim_frag);
        }
        if (!is_group_0 && !last)
            barrier_arrive<THREADS>(UPPER_FREE);

        /* ---- 6. Add dQ to its accumulator, after the blocks before this one; or store it. */
        if (DQ_IS_ORDERED) {
            /* Metadata out of order may give a tile to two sequences, whose blocks both count, and
             * a row may list a block twice. */
            const int before = added_before(walk, block, mask, query0);
            while (VARLEN || BLOCK_SPARSE ? added < before : added != before)
                added = semaphore_load(semaphore);
        }
        float *accum = params.dq_accum + dq_tile * (TILE_M * HEAD_DIM) + row_frag * (16 * HEAD_DIM);
#pragma unroll
        for (int m = 0; m < DQ_ROW_FRAGS; m++)
            if (DQ_DIRECT)
                store_dQ(dQ_rmem[m], seq, walk.head, query0 + 16 * (row_frag + m), dim_frag);
            else
                add_to_accum<DQ_DIM_FRAGS>(accum + m * (16 * HEAD_DIM), dQ_rmem[m], dim_frag,
                                           HEAD_DIM / 8);
        if (!TMA) {
            cp_async_wait_all();
            __syncthreads(); /* the next queries have landed */
        }
        walk = next;
    }

    if (DQ_IS_ORDERED) {
        __syncthreads(); /* all warps have added to the last tile */
        if (semaphore && thread == 0)
            semaphore_release(semaphore);
    }

    /* ---- 7. Epilogue: dV and dK out. The blocks that share the keys add in the order of their
     * splits. */
    if (DETERMINISTIC && params.q_splits > 1) {
        const fa_int64 pair = static_cast<fa_int64>(seq.batch) * params.heads_kv + block.head_kv;
        semaphore = params.dkv_semaphores + pair * params.n_blocks + block.n_block;
        while (semaphore_load(semaphore) != block.q_split)
            ;
    }
    if (is_group_0)
        store_gradient<HEAD_DIM_V>(
            dKV_rmem, params.dv, params.dv_stride, params.dv_accum, block, warp_key,
            (DROPOUT ? params.dropout.scale : 1.0f) / (P_SCALE * TENSOR_REPEAT), params);
    else
        store_gradient<HEAD_DIM>(dKV_rmem, params.dk, params.dk_stride, params.dk_accum, block,
                                 warp_key, params.softmax_scale / P_SCALE, params);
    if (DETERMINISTIC && params.q_splits > 1) {
        __syncthreads(); /* all warps have added */
        if (thread == 0)
            semaphore_release(semaphore);
    }
}
