/* Attention backward: dK and dV of one block of keys of one KV head, and its share of dQ.
 *
 * Keys are stationary: a block holds its K and V, and the queries (Q, dO, their lse and delta) stream
 * through shared memory. With s = scale * q.k, p = e^(s - lse), dp = dO.v, ds = p * (dp - delta):
 *
 *     dV += P^T dO        dK += scale * dS^T Q        dQ += scale * dS K
 *
 * A warp computes S^T and dP^T for its own WARP_N keys: their fragments are then, as they are, the A
 * operands of the products for dV and dK. Only dQ sums over the keys of all warps: dS^T goes through
 * shared memory, every warp takes a part of the [TILE_M, HEAD_DIM] product, and adds it to the sum
 * in memory that all blocks of keys share, see dq_sum in params.h.
 *
 * One source, compiled once per set of constants:
 *   DTYPE_BF16             1: bf16, 0: fp16
 *   HEAD_DIM, HEAD_DIM_V   of Q and K, of V and O: multiples of 8 up to 256
 *   WARPS, WARP_N          keys: WARP_N (16 or 32) per warp
 *   DIM_WARPS              warps that share their keys, each with a part of the dims of dK and dV: 1
 *                          or 2. With 2, each computes the scores of a part of the queries, and P,
 *                          too, goes through shared memory
 *   TILE_M, SUB_M          queries: TILE_M at a time in shared memory, SUB_M through registers
 *   STAGES                 1 or 2: of Q in shared memory
 *   MASK_RIGHT, MASK_LEFT  1: keys end (start) at a diagonal: causal, sliding windows */
#include "params.h"

#include "layout.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int TILE_N = WARPS / DIM_WARPS * WARP_N; /* keys per block */
constexpr int N_FRAGS = WARP_N / 16;               /* 16-key fragments per warp */
constexpr int M_FRAGS = SUB_M / 8;                 /* 8-query columns of a sub-tile of scores */
constexpr int D_STEPS = (HEAD_DIM + 15) / 16;
constexpr int DV_STEPS = (HEAD_DIM_V + 15) / 16;
constexpr bool SHARES_KEYS = DIM_WARPS > 1;

/* dQ [TILE_M, HEAD_DIM] is cut into DQ_ROW_WARPS times DQ_DIM_WARPS parts: of the cuts into 16 rows
 * by 16 dims and more, the one whose parts read the fewest operands. */
constexpr int dq_dim_warps(int warps, int row_frags, int min_dim_warps)
{
    int best = min_dim_warps;
    for (int n = min_dim_warps; n <= warps; n *= 2)
        if (HEAD_DIM / 16 % n == 0 && row_frags * n / warps + HEAD_DIM / 16 / n <
                                          row_frags * best / warps + HEAD_DIM / 16 / best)
            best = n;
    return best;
}
constexpr int MIN_DQ_DIM_WARPS = WARPS * 16 > TILE_M ? WARPS * 16 / TILE_M : 1;
constexpr int DQ_DIM_WARPS = dq_dim_warps(WARPS, TILE_M / 16, MIN_DQ_DIM_WARPS);
constexpr int DQ_ROW_WARPS = WARPS / DQ_DIM_WARPS;

using K_layout = tile_layout<HEAD_DIM, TILE_N, 16 * DQ_DIM_WARPS>;
using Q_layout = tile_layout<HEAD_DIM, TILE_M, 16 * DIM_WARPS>;
using dO_layout = tile_layout<HEAD_DIM_V, TILE_M, 16 * DIM_WARPS>;
using S_layout = tile_layout<TILE_M, TILE_N>; /* of P^T and dS^T: keys by queries */
using K_place = copy_place<K_layout, THREADS>;
using Q_place = copy_place<Q_layout, THREADS>;
using dO_place = copy_place<dO_layout, THREADS>;

constexpr int DK_FRAGS = Q_layout::PADDED / DIM_WARPS;  /* 8-dim columns of dK, of one warp */
constexpr int DV_FRAGS = dO_layout::PADDED / DIM_WARPS; /* and of dV */
constexpr int DQ_ROW_FRAGS = TILE_M / 16 / DQ_ROW_WARPS;
constexpr int DQ_DIM_FRAGS = K_layout::PADDED / DQ_DIM_WARPS;
constexpr int STATS_BYTES = 2 * TILE_M * 4;

/* Shared memory, which backward_smem() in csrc/plan.c sums up. */
constexpr int K_AT = 0;
constexpr int Q_AT = K_AT + K_layout::BYTES;
constexpr int DO_AT = Q_AT + STAGES * Q_layout::BYTES;
constexpr int DS_AT = DO_AT + dO_layout::BYTES;
constexpr int P_AT = DS_AT + S_layout::BYTES;
constexpr int STATS_AT = P_AT + (SHARES_KEYS ? S_layout::BYTES : 0);

static_assert(WARP_N == 16 || WARP_N == 32, "one or two fragments of keys per warp");
static_assert(SHARES_KEYS ? SUB_M * DIM_WARPS == TILE_M : TILE_M % SUB_M == 0, "whole sub-tiles");
static_assert(SUB_M % 16 == 0, "sub-tiles are whole mma steps");

/* This lane's row for an ldmatrix of four 8x8 matrices, in rows first, or in columns first. */
template <class layout> __device__ __forceinline__ unsigned rows_first()
{
    const int lane = threadIdx.x % 32;
    return layout::offset(lane % 16, lane / 16);
}
template <class layout> __device__ __forceinline__ unsigned columns_first()
{
    const int lane = threadIdx.x % 32;
    return layout::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

/* C [rows, 8 * FRAGS_N] += A [rows, 16 * STEPS] * X^T, where rows of X are in shared memory. */
template <class layout, int FRAGS_M, int FRAGS_N, int STEPS>
__device__ __forceinline__ void multiply_rows(float (&C)[FRAGS_M][FRAGS_N][4],
                                              const unsigned (&A)[FRAGS_M][STEPS][4], unsigned X)
{
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int n = 0; n < FRAGS_N; n += 2) {
            unsigned B[4];
            ldmatrix_x4(B, layout::moved(X, 8 * n, 2 * k));
#pragma unroll
            for (int m = 0; m < FRAGS_M; m++) {
                mma_m16n8k16(C[m][n], A[m][k], B[0], B[1]);
                mma_m16n8k16(C[m][n + 1], A[m][k], B[2], B[3]);
            }
        }
}

/* C [rows, 8 * FRAGS_N] += A [rows, 16 * STEPS] * X, where rows of X are in shared memory; of X the
 * columns from `frag0` on, a multiple of FRAGS_N. */
template <class layout, int FRAGS_M, int FRAGS_N, int STEPS>
__device__ __forceinline__ void multiply_columns(float (&C)[FRAGS_M][FRAGS_N][4],
                                                 const unsigned (&A)[FRAGS_M][STEPS][4], unsigned X,
                                                 int frag0)
{
    /* Parts that end where segments do have one address for all. */
    constexpr bool IS_WHOLE = FRAGS_N % layout::COLS == 0 || layout::COLS % FRAGS_N == 0;
    const unsigned part = layout::moved(X, 0, frag0);
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int n = 0; n < FRAGS_N; n += 2) {
            unsigned B[4];
            ldmatrix_x4_trans(B, IS_WHOLE ? layout::moved(part, 16 * k, n)
                                          : layout::moved(X, 16 * k, frag0 + n));
#pragma unroll
            for (int m = 0; m < FRAGS_M; m++) {
                mma_m16n8k16(C[m][n], A[m][k], B[0], B[1]);
                mma_m16n8k16(C[m][n + 1], A[m][k], B[2], B[3]);
            }
        }
}

template <int FRAGS_M, int FRAGS_N>
__device__ __forceinline__ void fill(float (&C)[FRAGS_M][FRAGS_N][4], float value)
{
#pragma unroll
    for (int m = 0; m < FRAGS_M; m++)
#pragma unroll
        for (int n = 0; n < FRAGS_N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                C[m][n][e] = value;
}

/* Which queries see a key: those of [begin(key), end(key)), diagonals aligned to the bottom right. */
struct query_mask {
    int left, right, queries;

    __device__ __forceinline__ explicit query_mask(const fa_backward_params &params)
    {
        /* Cut as in key_mask. */
        const int diagonal = params.seqlen_k - params.seqlen_q;
        left = MASK_LEFT ? diagonal - min(params.window_left, params.seqlen_k) : 0;
        right = MASK_RIGHT ? diagonal + min(params.window_right, params.seqlen_q) : 0;
        queries = params.seqlen_q;
    }
    __device__ __forceinline__ int begin(int key) const
    {
        return MASK_RIGHT ? max(key - right, 0) : 0;
    }
    __device__ __forceinline__ int end(int key) const
    {
        return MASK_LEFT ? min(key - left + 1, queries) : queries;
    }
    /* The first block of keys whose last key these queries see: the first to add to their dQ. */
    __device__ __forceinline__ int first_n_block(int query) const
    {
        return MASK_LEFT ? max(query + left, 0) / TILE_N : 0;
    }
};

/* X = 0 where a query does not see a key. `key` and `query` are those of X[0][0][0]. */
__device__ __forceinline__ void hide(float (&X)[N_FRAGS][M_FRAGS][4], const query_mask &mask,
                                     int key, int query, int keys)
{
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = key + 16 * n + 8 * half;
            const int begin = row < keys ? mask.begin(row) - query : SUB_M;
            const int end = mask.end(row) - query;
#pragma unroll
            for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (8 * m + e < begin || (MASK_LEFT && 8 * m + e >= end))
                        X[n][m][2 * half + e] = 0.0f;
        }
}

/* C fragments as the A operand of the next product. */
__device__ __forceinline__ void pack_operand(unsigned (&A)[N_FRAGS][M_FRAGS / 2][4],
                                             const float (&C)[N_FRAGS][M_FRAGS][4])
{
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                A[n][m / 2][m % 2 * 2 + half] = pack(C[n][m][2 * half], C[n][m][2 * half + 1]);
}

/* Writes the operand to P^T or dS^T in shared memory; `smem` is the place of its first word. */
__device__ __forceinline__ void store_operand(unsigned smem,
                                              const unsigned (&A)[N_FRAGS][M_FRAGS / 2][4])
{
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                st_shared(S_layout::moved(smem, 16 * n + 8 * half, m),
                          A[n][m / 2][m % 2 * 2 + half]);
}

/* The block's keys, and the walk over the (query head, tile of queries) pairs that see them. */
struct block_place {
    int n_block, batch, head_kv, part;

    __device__ __forceinline__ block_place(const fa_backward_params &params, int block)
    {
        part = block % params.parts;
        block /= params.parts;
        head_kv = block % params.heads_kv;
        block /= params.heads_kv;
        batch = block % params.batch;
        n_block = block / params.batch;
    }
};

/* Adds the fragments of this warp to sums in memory, [16 rows][8 dims][lane][4]; `sums` is where
 * those of its first fragment are. */
template <int FRAGS_N>
__device__ __forceinline__ void add_to_sums(float *sums, const float (&C)[FRAGS_N][4], int frag0,
                                            int frags)
{
#pragma unroll
    for (int n = 0; n < FRAGS_N; n++)
        if (frag0 + n < frags)
            red_add_4(sums + ((frag0 + n) * 32 + threadIdx.x % 32) * 4, C[n]);
}

/* Writes two rows of dK or dV, as forward.cuh writes O. */
template <int FRAGS_N>
__device__ __forceinline__ void store_rows(element *row0, fa_int64 row_stride, int rows,
                                           const float (&C)[FRAGS_N][4], float scale, int frag0,
                                           int frags)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        element *row = row0 + 8 * half * row_stride;
#pragma unroll
        for (int n = 0; n < FRAGS_N; n += 4) {
            unsigned word[4];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const float *x = C[min(n + c, FRAGS_N - 1)] + 2 * half;
                word[c] = pack(x[0] * scale, x[1] * scale);
            }
            const uint4 chunk = quad_transpose(word[0], word[1], word[2], word[3]);
            const int frag = n + quad_lane();
            if (8 * half < rows && frag < FRAGS_N && frag0 + frag < frags)
                *reinterpret_cast<uint4 *>(row + (frag0 + frag) * 8) = chunk;
        }
    }
}

/* V [WARP_N, HEAD_DIM_V] from global memory into the layout of the A operand. */
__device__ __forceinline__ void load_values(unsigned (&V_rmem)[N_FRAGS][DV_STEPS][4],
                                            const element *V_gmem, fa_int64 stride, int keys)
{
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = 16 * n + 8 * half + g;
#pragma unroll
            for (int chunk = 0; chunk < 2 * DV_STEPS; chunk++) {
                const bool exists = chunk < HEAD_DIM_V / 8 && row < keys;
                V_rmem[n][chunk / 2][chunk % 2 * 2 + half] =
                    exists ? *reinterpret_cast<const unsigned *>(V_gmem + row * stride + chunk * 8 +
                                                                 quad_lane() * 2)
                           : 0;
            }
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward(const __grid_constant__ struct fa_backward_params params)
{
    extern __shared__ __align__(128) char smem_begin[];
    const unsigned smem = smem_address(smem_begin);
    const int thread = read_thread_index();
    const int warp = __shfl_sync(0xffffffff, thread / 32, 0);
    const int key_warp = warp / DIM_WARPS, dim_warp = warp % DIM_WARPS;
    const int g = thread % 32 / 4;

    /* ---- 1. Which keys, and which queries see them: head by head of those that share the KV head,
     * of each the tiles [m_begin, m_end), all of that divided among `parts` blocks. */
    int block = read_block_index();
    if (DETERMINISTIC) {
        /* Blocks wait for those with a lower number: take it when starting to run. */
        if (thread == 0)
            st_shared(smem, atomic_add(params.tickets, 1));
        __syncthreads();
        block = ld_shared(smem);
        __syncthreads();
    }
    const block_place at(params, block);
    const query_mask mask(params);
    const int key0 = at.n_block * TILE_N, key1 = key0 + TILE_N;
    const int m_begin = mask.begin(key0) / TILE_M;
    const int m_end = max(ceil_div(mask.end(key1 - 1), TILE_M), m_begin);
    const int tiles = (m_end - m_begin) * params.heads_per_kv;
    const int tile_begin = static_cast<fa_int64>(tiles) * at.part / params.parts;
    const int tile_end = static_cast<fa_int64>(tiles) * (at.part + 1) / params.parts;
    int head = at.head_kv * params.heads_per_kv, m_block = m_begin;
    if (tile_begin < tile_end) {
        head += tile_begin / (m_end - m_begin);
        m_block += tile_begin % (m_end - m_begin);
    }

    /* ---- 2. K to shared memory, V to registers, the first queries to shared memory. */
    const auto load_Q = [&](int stage, int head, int m_block) {
        const Q_place place;
        place.copy(smem + Q_AT + stage * Q_layout::BYTES,
                   place.first_chunk(params.q, params.q_stride, at.batch, head, m_block * TILE_M),
                   params.q_stride.seqlen, params.seqlen_q - m_block * TILE_M);
        if (thread < STATS_BYTES / 16) {
            const fa_int64 tile =
                (static_cast<fa_int64>(at.batch) * params.heads_q + head) * params.m_blocks +
                m_block;
            cp_async_16(smem + STATS_AT + stage * STATS_BYTES + thread * 16,
                        params.stats + tile * 2 * TILE_M + thread * 4, 16);
        }
    };
    const auto load_dO = [&](int head, int m_block) {
        const dO_place place;
        place.copy(
            smem + DO_AT,
            place.first_chunk(params.dout, params.dout_stride, at.batch, head, m_block * TILE_M),
            params.dout_stride.seqlen, params.seqlen_q - m_block * TILE_M);
    };
    const K_place K_at;
    K_at.copy(smem + K_AT, K_at.first_chunk(params.k, params.k_stride, at.batch, at.head_kv, key0),
              params.k_stride.seqlen, params.seqlen_k - key0);
    if (tile_begin < tile_end) {
        load_Q(0, head, m_block);
        load_dO(head, m_block);
    }
    cp_async_commit();

    const int warp_key0 = key0 + key_warp * WARP_N;
    unsigned V_rmem[N_FRAGS][DV_STEPS][4];
    load_values(V_rmem,
                static_cast<const element *>(params.v) + at.batch * params.v_stride.batch +
                    at.head_kv * params.v_stride.head + warp_key0 * params.v_stride.seqlen,
                params.v_stride.seqlen, params.seqlen_k - warp_key0);

    float dK_rmem[N_FRAGS][DK_FRAGS][4], dV_rmem[N_FRAGS][DV_FRAGS][4];
    fill(dK_rmem, 0.0f);
    fill(dV_rmem, 0.0f);

    const unsigned K_rows = smem + K_AT + rows_first<K_layout>();
    const unsigned K_own = K_rows + key_warp * WARP_N * K_layout::ROW_BYTES;
    const unsigned dO_rows = smem + DO_AT + rows_first<dO_layout>();
    const unsigned dO_columns = smem + DO_AT + columns_first<dO_layout>();
    /* Of this lane's first word of P^T and dS^T, as it stores them. */
    const unsigned S_own =
        S_layout::moved(S_layout::offset(g, 0), key_warp * WARP_N, 0) + quad_lane() * 4;

    cp_async_wait<0>();
    __syncthreads(); /* everyone's copies are there */

    int stage = 0;
    for (int i = tile_begin; i < tile_end; i++) {
        const unsigned Q_smem = smem + Q_AT + stage * Q_layout::BYTES;
        const unsigned stats = smem + STATS_AT + stage * STATS_BYTES;
        const bool last = i + 1 == tile_end;
        const int query0 = m_block * TILE_M;
        const bool wraps = m_block + 1 == m_end;
        const int next_head = head + wraps, next_m_block = wraps ? m_begin : m_block + 1;
        const bool masked = key1 > params.seqlen_k ||
                            (MASK_RIGHT && mask.begin(key1 - 1) > query0) ||
                            (MASK_LEFT && mask.end(key0) < min(query0 + TILE_M, params.seqlen_q));

        if (STAGES == 2 && !last)
            load_Q(stage ^ 1, next_head, next_m_block);
        cp_async_commit();

        /* ---- 3. P^T and dS^T, and from registers dV and dK. */
#pragma unroll
        for (int sub = 0; sub < (SHARES_KEYS ? 1 : TILE_M / SUB_M); sub++) {
            const int m0 = (SHARES_KEYS ? dim_warp : sub) * SUB_M; /* the first query */
            float S_rmem[N_FRAGS][M_FRAGS][4], dP_rmem[N_FRAGS][M_FRAGS][4];
            unsigned P_rmem[N_FRAGS][M_FRAGS / 2][4];
            fill(S_rmem, 0.0f);
            const unsigned Q_columns =
                Q_smem + columns_first<Q_layout>() + m0 * Q_layout::ROW_BYTES;
#pragma unroll
            for (int k = 0; k < D_STEPS; k++) {
                unsigned K_rmem[N_FRAGS][1][4];
#pragma unroll
                for (int n = 0; n < N_FRAGS; n++)
                    ldmatrix_x4(K_rmem[n][0], K_layout::moved(K_own, 16 * n, 2 * k));
                multiply_rows<Q_layout>(S_rmem, K_rmem, Q_layout::moved(Q_columns, 0, 2 * k));
            }
#pragma unroll
            for (int m = 0; m < M_FRAGS; m++) {
                const float2 lse = ld_shared_2(stats + (m0 + 8 * m + 2 * quad_lane()) * 4);
                const float2 delta =
                    ld_shared_2(stats + (TILE_M + m0 + 8 * m + 2 * quad_lane()) * 4);
#pragma unroll
                for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        S_rmem[n][m][e] = exp2_approx(S_rmem[n][m][e] * params.scale_log2 -
                                                      (e % 2 ? lse.y : lse.x));
                        dP_rmem[n][m][e] = -(e % 2 ? delta.y : delta.x);
                    }
            }
            if (masked)
                hide(S_rmem, mask, warp_key0 + g, query0 + m0 + 2 * quad_lane(), params.seqlen_k);
            pack_operand(P_rmem, S_rmem);
            if (SHARES_KEYS)
                store_operand(S_layout::moved(smem + P_AT + S_own, 0, m0 / 8), P_rmem);
            else
                multiply_columns<dO_layout>(dV_rmem, P_rmem, dO_rows + m0 * dO_layout::ROW_BYTES,
                                            0);

            multiply_rows<dO_layout>(dP_rmem, V_rmem, dO_columns + m0 * dO_layout::ROW_BYTES);
#pragma unroll
            for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
                for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        dP_rmem[n][m][e] *= S_rmem[n][m][e];
            if (masked) /* 0 * NaN */
                hide(dP_rmem, mask, warp_key0 + g, query0 + m0 + 2 * quad_lane(), params.seqlen_k);
            pack_operand(P_rmem, dP_rmem);
            store_operand(S_layout::moved(smem + DS_AT + S_own, 0, m0 / 8), P_rmem);
            if (!SHARES_KEYS)
                multiply_columns<Q_layout>(
                    dK_rmem, P_rmem, Q_smem + rows_first<Q_layout>() + m0 * Q_layout::ROW_BYTES, 0);
        }
        /* Barrier: dS^T is there, and P^T; nobody needs dO any more, where P^T is in registers. */
        __syncthreads();

        if (SHARES_KEYS) {
            /* ---- 4. dV and dK, this warp's dims of them. */
            const unsigned own = rows_first<S_layout>() + key_warp * WARP_N * S_layout::ROW_BYTES;
            const unsigned Q_rows = Q_smem + rows_first<Q_layout>();
#pragma unroll
            for (int k = 0; k < TILE_M / 16; k++) {
                unsigned A_rmem[N_FRAGS][1][4];
#pragma unroll
                for (int n = 0; n < N_FRAGS; n++)
                    ldmatrix_x4(A_rmem[n][0], S_layout::moved(smem + P_AT + own, 16 * n, 2 * k));
                multiply_columns<dO_layout>(dV_rmem, A_rmem, dO_layout::moved(dO_rows, 16 * k, 0),
                                            dim_warp * DV_FRAGS);
#pragma unroll
                for (int n = 0; n < N_FRAGS; n++)
                    ldmatrix_x4(A_rmem[n][0], S_layout::moved(smem + DS_AT + own, 16 * n, 2 * k));
                multiply_columns<Q_layout>(dK_rmem, A_rmem, Q_layout::moved(Q_rows, 16 * k, 0),
                                           dim_warp * DK_FRAGS);
            }
            /* Barrier: nobody needs Q and dO any more. */
            __syncthreads();
        }
        if (!last) {
            if (STAGES == 1)
                load_Q(0, next_head, next_m_block);
            load_dO(next_head, next_m_block);
        }
        cp_async_commit();

        /* ---- 5. This warp's part of dQ. */
        {
            const int row_frag = warp / DQ_DIM_WARPS * DQ_ROW_FRAGS;
            const int dim_frag = warp % DQ_DIM_WARPS * DQ_DIM_FRAGS;
            float dQ_rmem[DQ_ROW_FRAGS][DQ_DIM_FRAGS][4];
            fill(dQ_rmem, 0.0f);
            const unsigned dS_columns = smem + DS_AT + columns_first<S_layout>();
#pragma unroll
            for (int k = 0; k < TILE_N / 16; k++) {
                unsigned dS_rmem[DQ_ROW_FRAGS][1][4];
#pragma unroll
                for (int m = 0; m < DQ_ROW_FRAGS; m++)
                    ldmatrix_x4_trans(dS_rmem[m][0],
                                      S_layout::moved(dS_columns, 16 * k, 2 * (row_frag + m)));
                multiply_columns<K_layout>(dQ_rmem, dS_rmem, K_layout::moved(K_rows, 16 * k, 0),
                                           dim_frag);
            }
            const fa_int64 tile =
                (static_cast<fa_int64>(at.batch) * params.heads_q + head) * params.m_blocks +
                m_block;
            if (DETERMINISTIC)
                wait_turn(params.turns + tile, at.n_block - mask.first_n_block(query0));
            float *sums = params.dq_sum + tile * (TILE_M * HEAD_DIM);
#pragma unroll
            for (int m = 0; m < DQ_ROW_FRAGS; m++)
                add_to_sums(sums + (row_frag + m) * (16 * HEAD_DIM), dQ_rmem[m], dim_frag,
                            HEAD_DIM / 8);
            /* Barrier: nobody needs dS^T any more, and the next queries are there. */
            cp_async_wait<0>();
            __syncthreads();
            if (DETERMINISTIC && thread == 0)
                end_turn(params.turns + tile);
        }
        head = next_head;
        m_block = next_m_block;
        if (STAGES == 2)
            stage ^= 1;
    }

    /* ---- 6. dK and dV out. */
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++) {
        const int key = warp_key0 + 16 * n;
        const int keys = params.seqlen_k - key;
        if (params.parts > 1) {
            const fa_int64 frag =
                ((static_cast<fa_int64>(at.batch) * params.heads_kv + at.head_kv) *
                     params.n_blocks * TILE_N +
                 key) /
                16;
            add_to_sums(params.dk_sum + frag * (16 * HEAD_DIM), dK_rmem[n], dim_warp * DK_FRAGS,
                        HEAD_DIM / 8);
            add_to_sums(params.dv_sum + frag * (16 * HEAD_DIM_V), dV_rmem[n], dim_warp * DV_FRAGS,
                        HEAD_DIM_V / 8);
            continue;
        }
        store_rows(static_cast<element *>(params.dk) + at.batch * params.dk_stride.batch +
                       at.head_kv * params.dk_stride.head + (key + g) * params.dk_stride.seqlen,
                   params.dk_stride.seqlen, keys - g, dK_rmem[n], params.softmax_scale,
                   dim_warp * DK_FRAGS, HEAD_DIM / 8);
        store_rows(static_cast<element *>(params.dv) + at.batch * params.dv_stride.batch +
                       at.head_kv * params.dv_stride.head + (key + g) * params.dv_stride.seqlen,
                   params.dv_stride.seqlen, keys - g, dV_rmem[n], 1.0f, dim_warp * DV_FRAGS,
                   HEAD_DIM_V / 8);
    }
}
