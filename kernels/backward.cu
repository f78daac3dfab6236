/* Attention backward: dK and dV of one block of keys of one KV head, and its share of dQ.
 *
 * Keys are stationary: a block holds its K and V, and the queries (Q, dO, their lse and delta)
 * stream through shared memory. With s = scale * q.k, p = e^(s - lse), dp = dO.v and
 * ds = p * (dp - delta):
 *
 *     dV += P^T dO        dK += scale * dS^T Q        dQ += scale * dS K
 *
 * Two groups of warps share the keys, WARP_N to a warp. Those of the one hold K in registers,
 * compute P^T and with it dV; those of the other hold V, compute dP^T, take P^T from the first, and
 * with dS^T compute dK. In this orientation the results of the first product are, as they are, an
 * operand of the second. Only dQ sums over the keys of all warps: dS^T goes through shared memory,
 * in place of P^T; every warp takes a part of the [TILE_M, HEAD_DIM] product, and adds it to the
 * sum in memory that all blocks of keys share, see dq_sum in params.h.
 *
 * One source, compiled once per set of constants:
 *   DTYPE                  enum fa_dtype in params.h, of all tensors
 *   HEAD_DIM, HEAD_DIM_V   of Q and K, of V and O: multiples of 8 up to 256
 *   WARPS, WARP_N          keys: WARP_N (a multiple of 16) per warp; WARPS in both groups
 *   TILE_M, SUB_M          queries: TILE_M at a time in shared memory, SUB_M through registers
 *   DQ_DIM_WARPS           warps of a group that share rows of dQ, each with a part of the dims
 *   STAGES                 1 or 2: of Q in shared memory
 *   TMA                    1: the TMA brings Q and dO, 0: cp.async does
 *   MASK_RIGHT, MASK_LEFT  1: keys end (start) at a diagonal: causal, sliding windows
 *   SOFTCAP                1: scores are capped by a tanh
 *   DETERMINISTIC          1: blocks add to dQ in the order of their keys
 *   DQ_SUMS                of each tile of dQ: block n of keys adds to number n % DQ_SUMS, so that
 *                          where blocks take turns, neighbours do not wait for each other */
#include "params.h"

#include "backward.cuh"
#include "score.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int KEY_WARPS = WARPS / 2;       /* of a group */
constexpr int TILE_N = KEY_WARPS * WARP_N; /* keys per block */
constexpr int N_FRAGS = WARP_N / 16;       /* 16-key fragments per warp */
constexpr int M_FRAGS = SUB_M / 8;         /* 8-query columns of a sub-tile of scores */
constexpr int D_STEPS = (HEAD_DIM + 15) / 16;
constexpr int DV_STEPS = (HEAD_DIM_V + 15) / 16;
constexpr int MAX_STEPS = D_STEPS > DV_STEPS ? D_STEPS : DV_STEPS;

/* dQ [TILE_M, HEAD_DIM] is cut into two halves of rows, one for each group, and these into
 * DQ_ROW_WARPS times DQ_DIM_WARPS parts. */
constexpr int HALF_FRAGS = TILE_M / 32; /* 16-row fragments */
constexpr int DQ_ROW_WARPS = KEY_WARPS / DQ_DIM_WARPS;

/* Whether the group that holds K waits for dO where it first needs it, or, where registers are few,
 * at the start of a tile. */
constexpr bool WAITS_LATE = HEAD_DIM <= 96 && HEAD_DIM_V <= 96;

using K_layout = tile_layout<HEAD_DIM, TILE_N, 16 * DQ_DIM_WARPS>;
using Q_layout = tile_layout<HEAD_DIM, TILE_M>;
using dO_layout = tile_layout<HEAD_DIM_V, TILE_M>;
using S_layout = tile_layout<TILE_M, TILE_N>; /* of P^T and dS^T: keys by queries */
using K_place = copy_place<K_layout, THREADS>;
using Q_place = copy_place<Q_layout, THREADS>;
using dO_place = copy_place<dO_layout, THREADS>;

constexpr int DQ_ROW_FRAGS = HALF_FRAGS / DQ_ROW_WARPS;
constexpr int DQ_DIM_FRAGS = K_layout::PADDED / DQ_DIM_WARPS;
constexpr int STATS_BYTES = 2 * TILE_M * 4;

/* Shared memory, which backward_smem() in csrc/plan_backward.c sums up. */
constexpr int K_AT = 0;
constexpr int Q_AT = K_AT + K_layout::BYTES;
constexpr int DO_AT = Q_AT + STAGES * Q_layout::BYTES;
constexpr int S_AT = DO_AT + dO_layout::BYTES;
constexpr int STATS_AT = S_AT + S_layout::BYTES;
constexpr int MBARRIERS_AT = STATS_AT + STAGES * STATS_BYTES; /* of the stages of Q, and of dO */

/* Named barriers between the groups of warps; from P_IS_THERE on one for every sub-tile. */
constexpr int DQ_IS_DONE = 1, UPPER_IS_FREE = 2, QUERIES_ARE_FREE = 3, LOWER_IS_THERE = 4,
              P_IS_THERE = 5;
constexpr int GROUP_THREADS = THREADS / 2;
constexpr int HALF_M = TILE_M / 2;

static_assert(HALF_FRAGS % DQ_ROW_WARPS == 0, "whole fragments of dQ");
static_assert(WARP_N % 16 == 0 && SUB_M % 16 == 0, "whole mma steps");
static_assert(HALF_M % SUB_M == 0 && TILE_M / SUB_M <= 11, "a named barrier for every sub-tile");

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

/* C [rows, 8 * FRAGS] += A [rows, 16 * STEPS] * X^T, where rows of X are in shared memory. */
template <class layout, int STEPS, int FRAGS, int FRAGS_M, int MAX_FRAGS, int MAX_STEPS>
__device__ __forceinline__ void multiply_rows(float (&C)[FRAGS_M][MAX_FRAGS][4],
                                              const unsigned (&A)[FRAGS_M][MAX_STEPS][4],
                                              unsigned X)
{
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int n = 0; n < FRAGS; n += 2) {
            unsigned B[4];
            ldmatrix_x4(B, layout::moved(X, 8 * n, 2 * k));
#pragma unroll
            for (int m = 0; m < FRAGS_M; m++) {
                mma_m16n8k16(C[m][n], A[m][k], B[0], B[1]);
                mma_m16n8k16(C[m][n + 1], A[m][k], B[2], B[3]);
            }
        }
}

/* C [rows, 8 * FRAGS] += A [rows, 16 * STEPS] * X, where rows of X are in shared memory; of X the
 * columns from `frag0` on, a multiple of FRAGS. */
template <class layout, int STEPS, int FRAGS, int FRAGS_M, int MAX_FRAGS, int MAX_STEPS>
__device__ __forceinline__ void multiply_columns(float (&C)[FRAGS_M][MAX_FRAGS][4],
                                                 const unsigned (&A)[FRAGS_M][MAX_STEPS][4],
                                                 unsigned X, int frag0 = 0)
{
    /* Parts that end where segments do have one address for all. */
    constexpr bool IS_WHOLE = FRAGS % layout::COLS == 0 || layout::COLS % FRAGS == 0;
    const unsigned part = layout::moved(X, 0, frag0);
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int n = 0; n < FRAGS; n += 2) {
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
__device__ __forceinline__ void clear(float (&C)[FRAGS_M][FRAGS_N][4])
{
#pragma unroll
    for (int m = 0; m < FRAGS_M; m++)
#pragma unroll
        for (int n = 0; n < FRAGS_N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                C[m][n][e] = 0.0f;
}

/* Which queries see a key: those of [begin(key), end(key)), diagonals aligned to the bottom
 * right. */
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

/* Puts hidden_score of params.h where a query does not see a key. `key` and `query` are those of
 * S[0][0][0]. */
__device__ __forceinline__ void hide(float (&S)[N_FRAGS][M_FRAGS][4],
                                     const fa_backward_params &params, int key, int query)
{
    const query_mask mask(params);
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = key + 16 * n + 8 * half;
            const int begin = row < params.seqlen_k ? mask.begin(row) - query : SUB_M;
            const int end = mask.end(row) - query;
#pragma unroll
            for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = 8 * m + e;
                    if (column < begin || (MASK_LEFT && column >= end))
                        S[n][m][2 * half + e] = params.hidden_score;
                }
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

/* Calls f(address, n, m, half) for each word of this lane's part of P^T or dS^T in shared memory:
 * columns 2t and 2t + 1 of row g + 8 * half of fragment [n][m]. `smem` is the place of the
 * first. */
template <class F> __device__ __forceinline__ void each_word(unsigned smem, F f)
{
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                f(S_layout::moved(smem, 16 * n + 8 * half, m), n, m, half);
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

/* Rows of K or V [WARP_N, DIM] from global memory into the layout of the A operand. */
template <int DIM>
__device__ __forceinline__ void load_operand(unsigned (&A)[N_FRAGS][MAX_STEPS][4],
                                             const void *tensor, const fa_strides &stride,
                                             const block_place &at, int key0, int keys)
{
    const element *gmem = static_cast<const element *>(tensor) + at.batch * stride.batch +
                          at.head_kv * stride.head + quad_lane() * 2;
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int key = key0 + 16 * n + 8 * half + threadIdx.x % 32 / 4;
#pragma unroll
            for (int chunk = 0; chunk < ceil_div(DIM, 16) * 2; chunk++) {
                const bool exists = chunk < DIM / 8 && key < keys;
                const unsigned *word =
                    reinterpret_cast<const unsigned *>(gmem + key * stride.seqlen + chunk * 8);
                A[n][chunk / 2][chunk % 2 * 2 + half] = exists ? *word : 0;
            }
        }
}

/* A tile in boxes of the TMA, each a segment of the layout. */
template <class layout>
__device__ __forceinline__ void load_boxes(unsigned smem, const fa_tensor_map &map,
                                           unsigned mbarrier, int row, int head, int batch)
{
#pragma unroll
    for (int c = 0; c < layout::PADDED; c += layout::COLS)
        tma_load_4d(smem + c / layout::COLS * layout::SEGMENT_BYTES, &map, mbarrier, c * 8, row,
                    head, batch);
}

/* What a warp keeps in registers: its rows of K (or V), and its sums of dV (or dK). */
constexpr int MAX_FRAGS =
    Q_layout::PADDED > dO_layout::PADDED ? Q_layout::PADDED : dO_layout::PADDED;
struct key_rows {
    unsigned operand[N_FRAGS][MAX_STEPS][4];
    float sum[N_FRAGS][MAX_FRAGS][4];
};

/* Adds COUNT fragments to a row of them in memory, see params.h, from the number frag0 on. What
 * pads the head dim is left out. */
template <int COUNT, int MAX_COUNT>
__device__ __forceinline__ void add_to_sums(float *sums, const float (&C)[MAX_COUNT][4], int frag0,
                                            int frags)
{
#pragma unroll
    for (int n = 0; n < COUNT; n++)
        if (frag0 + n < frags)
            red_add_4(sums + ((frag0 + n) * 32 + threadIdx.x % 32) * 4, C[n]);
}

/* dK or dV of this warp's keys: to the tensor, or to the sum of all blocks that share the keys. */
template <int DIM>
__device__ __forceinline__ void
store_sums(const key_rows &own, void *tensor, const fa_strides &stride, float *sums,
           const block_place &at, int key0, float scale, const fa_backward_params &params)
{
    const fa_int64 pair = static_cast<fa_int64>(at.batch) * params.heads_kv + at.head_kv;
    element *gmem =
        static_cast<element *>(tensor) + at.batch * stride.batch + at.head_kv * stride.head;
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++) {
        const int row = key0 + 16 * n + threadIdx.x % 32 / 4;
        if (params.parts > 1) {
            const fa_int64 first_row = pair * params.n_blocks * TILE_N + key0 + 16 * n;
            add_to_sums<DIM / 8>(sums + first_row * DIM, own.sum[n], 0, DIM / 8);
        } else {
#pragma unroll
            for (int half = 0; half < 2; half++)
                store_row<DIM / 8>(gmem + (row + 8 * half) * stride.seqlen, own.sum[n], half, scale,
                                   row + 8 * half < params.seqlen_k);
        }
    }
}

/* A tile of queries, as a warp sees it. */
struct query_tile {
    unsigned Q_smem, dO_smem, stats; /* addresses */
    unsigned Q_mbarrier, Q_parity, dO_mbarrier, dO_parity;
    int query0;

    __device__ __forceinline__ void wait_Q() const
    {
        if (TMA)
            mbarrier_wait(Q_mbarrier, Q_parity);
    }
    __device__ __forceinline__ void wait_dO() const
    {
        if (TMA)
            mbarrier_wait(dO_mbarrier, dO_parity);
    }
};

/* The group that holds K: P^T to shared memory, and dV. `S_own` is where this lane's first word of
 * P^T is, `key` that word's key; MASKED where some query of the tile does not see some key. */
template <bool MASKED>
__device__ __forceinline__ void add_values(key_rows &own, const query_tile &tile, unsigned S_own,
                                           int key, const fa_backward_params &params)
{
    tile.wait_Q();
    if (!WAITS_LATE)
        tile.wait_dO();
#pragma unroll
    for (int m0 = 0; m0 < TILE_M; m0 += SUB_M) {
        float S[N_FRAGS][M_FRAGS][4];
        unsigned P[N_FRAGS][M_FRAGS / 2][4];
        clear(S);
        if (MASKED && !SOFTCAP)
            hide(S, params, key, tile.query0 + m0 + 2 * quad_lane());
        multiply_rows<Q_layout, D_STEPS, M_FRAGS>(
            S, own.operand,
            not_before(tile.Q_smem + columns_first<Q_layout>()) + m0 * Q_layout::ROW_BYTES);
        softcap(S, params.scale_in_cap);
        if (MASKED && SOFTCAP)
            hide(S, params, key, tile.query0 + m0 + 2 * quad_lane());
        float handed_over[N_FRAGS][M_FRAGS][4]; /* P^T, times the slope of the cap */
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++) {
            const float2 lse = ld_shared_2(tile.stats + (m0 + 8 * m + 2 * quad_lane()) * 4);
#pragma unroll
            for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float t = S[n][m][e];
                    const float p = exp2_approx(t * params.scale_log2 - (e % 2 ? lse.y : lse.x));
                    S[n][m][e] = p;
                    handed_over[n][m][e] = SOFTCAP ? p * (1.0f - fminf(t * t, 1.0f)) : p;
                }
        }
        /* Until nobody reads dS^T of the tile before any more: of its lower queries this group
         * does, of the upper ones the other. */
        if (m0 == 0)
            barrier_sync<GROUP_THREADS>(DQ_IS_DONE);
        if (m0 == HALF_M)
            barrier_sync<THREADS>(UPPER_IS_FREE);
        each_word(S_layout::moved(S_own, 0, m0 / 8), [&](unsigned smem, int n, int m, int half) {
            const float *p = handed_over[n][m] + 2 * half;
            st_shared(smem, pack_fp16(p[0], p[1]));
        });
        barrier_arrive<THREADS>(P_IS_THERE + m0 / SUB_M); /* this part of P^T is there */
        pack_operand(P, S);
        if (WAITS_LATE && m0 == 0)
            tile.wait_dO();
        multiply_columns<dO_layout, M_FRAGS / 2, dO_layout::PADDED>(
            own.sum, P,
            not_before(tile.dO_smem + rows_first<dO_layout>()) + m0 * dO_layout::ROW_BYTES);
    }
}

/* The group that holds V: dS^T in place of P^T, and dK. */
__device__ __forceinline__ void add_keys(key_rows &own, const query_tile &tile, unsigned S_own,
                                         unsigned S_rows)
{
    tile.wait_Q(); /* delta comes with it */
    tile.wait_dO();
#pragma unroll
    for (int m0 = 0; m0 < TILE_M; m0 += SUB_M) {
        float dS[N_FRAGS][M_FRAGS][4];
        unsigned P[N_FRAGS][M_FRAGS / 2][4];
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++) {
            const float2 delta =
                ld_shared_2(tile.stats + (TILE_M + m0 + 8 * m + 2 * quad_lane()) * 4);
#pragma unroll
            for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    dS[n][m][e] = -(e % 2 ? delta.y : delta.x);
        }
        multiply_rows<dO_layout, DV_STEPS, M_FRAGS>(
            dS, own.operand,
            not_before(tile.dO_smem + columns_first<dO_layout>()) + m0 * dO_layout::ROW_BYTES);
        barrier_sync<THREADS>(P_IS_THERE + m0 / SUB_M); /* until this part of P^T is there */
#pragma unroll
        for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
            for (int m = 0; m < M_FRAGS / 2; m++) {
                ldmatrix_x4(P[n][m], S_layout::moved(S_rows, 16 * n, m0 / 8 + 2 * m));
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const float2 p = unpack_fp16(P[n][m][r]);
                    dS[n][2 * m + r / 2][r % 2 * 2] *= p.x;
                    dS[n][2 * m + r / 2][r % 2 * 2 + 1] *= p.y;
                }
            }
        pack_operand(P, dS);
        __syncwarp(); /* all lanes have their P^T */
        each_word(S_layout::moved(S_own, 0, m0 / 8), [&](unsigned smem, int n, int m, int half) {
            st_shared(smem, P[n][m / 2][m % 2 * 2 + half]);
        });
        if (m0 + SUB_M == HALF_M)
            barrier_arrive<THREADS>(LOWER_IS_THERE); /* of dS^T */
        multiply_columns<Q_layout, M_FRAGS / 2, Q_layout::PADDED>(
            own.sum, P,
            not_before(tile.Q_smem + rows_first<Q_layout>()) + m0 * Q_layout::ROW_BYTES);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward(const __grid_constant__ struct fa_backward_params params)
{
    extern __shared__ __align__(1024) char smem_begin[];
    const unsigned smem = smem_address(smem_begin);
    const int thread = read_thread_index();
    const int warp = __shfl_sync(0xffffffff, thread / 32, 0);
    const bool holds_K = warp < KEY_WARPS;

    /* ---- 1. Which keys, and which queries see them: of each head that shares the KV head the
     * tiles [m_begin, m_end), all of that divided among `parts` blocks. Heads come one after the
     * other. Where blocks take turns, a block has whole heads, and these alternate tile by tile,
     * from the last to the first: so all that run together start with the same tile and go on at
     * the same pace, and none has to wait for long. */
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
    int head_begin = at.head_kv * params.heads_per_kv, head_end = head_begin + params.heads_per_kv;
    if (DETERMINISTIC) {
        head_end = head_begin + params.heads_per_kv * (at.part + 1) / params.parts;
        head_begin += params.heads_per_kv * at.part / params.parts;
    }
    const int head_tiles = m_end - m_begin, tiles = head_tiles * (head_end - head_begin);
    int tile_begin = 0, tile_end = tiles, head = head_begin, m_block = m_end - 1;
    if (!DETERMINISTIC) {
        tile_begin = static_cast<fa_int64>(tiles) * at.part / params.parts;
        tile_end = static_cast<fa_int64>(tiles) * (at.part + 1) / params.parts;
        head += tile_begin / max(head_tiles, 1);
        m_block = m_begin + tile_begin % max(head_tiles, 1);
    }
    const auto go_on = [&](int &head, int &m_block) {
        if (DETERMINISTIC) {
            head = head + 1 == head_end ? head_begin : head + 1;
            m_block -= head == head_begin;
        } else {
            m_block = m_block + 1 == m_end ? m_begin : m_block + 1;
            head += m_block == m_begin;
        }
    };

    /* ---- 2. K to shared memory, K or V to registers, the first queries to shared memory. */
    const auto tile_of = [&](int batch, int head, int m_block) {
        return (static_cast<fa_int64>(batch) * params.heads_q + head) * params.m_blocks + m_block;
    };
    const auto load_Q = [&](int stage, int head, int m_block) {
        const unsigned Q_smem = smem + Q_AT + stage * Q_layout::BYTES;
        const unsigned stats_smem = smem + STATS_AT + stage * STATS_BYTES;
        const float *stats = params.stats + tile_of(at.batch, head, m_block) * 2 * TILE_M;
        if (TMA) {
            if (thread == THREADS - 1) {
                const unsigned mbarrier = smem + MBARRIERS_AT + stage * 16;
                mbarrier_expect(mbarrier, Q_layout::BYTES + STATS_BYTES);
                load_boxes<Q_layout>(Q_smem, params.q_map, mbarrier, m_block * TILE_M, head,
                                     at.batch);
                bulk_load(stats_smem, stats, STATS_BYTES, mbarrier);
            }
            return;
        }
        const Q_place place;
        place.copy(Q_smem,
                   place.first_chunk(params.q, params.q_stride, at.batch, head, m_block * TILE_M),
                   params.q_stride.seqlen, params.seqlen_q - m_block * TILE_M);
        if (thread < STATS_BYTES / 16)
            cp_async_16(stats_smem + thread * 16, stats + thread * 4, 16);
    };
    const auto load_dO = [&](int head, int m_block) {
        if (TMA) {
            if (thread == THREADS - 1) {
                const unsigned mbarrier = smem + MBARRIERS_AT + STAGES * 16;
                mbarrier_expect(mbarrier, dO_layout::BYTES);
                load_boxes<dO_layout>(smem + DO_AT, params.dout_map, mbarrier, m_block * TILE_M,
                                      head, at.batch);
            }
            return;
        }
        const dO_place place;
        place.copy(
            smem + DO_AT,
            place.first_chunk(params.dout, params.dout_stride, at.batch, head, m_block * TILE_M),
            params.dout_stride.seqlen, params.seqlen_q - m_block * TILE_M);
    };
    if (TMA) {
        if (thread == 0) {
            for (int i = 0; i < STAGES + 1; i++)
                mbarrier_init(smem + MBARRIERS_AT + i * 16, 1);
            fence_mbarrier_init();
        }
        __syncthreads(); /* nobody comes to an mbarrier before it is there */
    }
    if (!holds_K)
        barrier_arrive<THREADS>(UPPER_IS_FREE);
    const K_place K_at;
    K_at.copy(smem + K_AT, K_at.first_chunk(params.k, params.k_stride, at.batch, at.head_kv, key0),
              params.k_stride.seqlen, params.seqlen_k - key0);
    if (tile_begin < tile_end) {
        load_Q(0, head, m_block);
        load_dO(head, m_block);
    }

    const int own_row = warp % KEY_WARPS * WARP_N, own_key = key0 + own_row;
    key_rows own;
    clear(own.sum);
    if (holds_K)
        load_operand<HEAD_DIM>(own.operand, params.k, params.k_stride, at, own_key,
                               params.seqlen_k);
    else
        load_operand<HEAD_DIM_V>(own.operand, params.v, params.v_stride, at, own_key,
                                 params.seqlen_k);

    /* P^T and dS^T as ldmatrix reads this warp's part of them, and as this lane stores it. */
    const unsigned S_rows = smem + S_AT + rows_first<S_layout>() + own_row * S_layout::ROW_BYTES;
    const int lane_row = own_row + thread % 32 / 4;
    const unsigned S_own = smem + S_AT + S_layout::offset(lane_row, 0) + quad_lane() * 4;

    cp_async_wait_all();
    __syncthreads(); /* everyone's copies are there */

    int *turn = nullptr; /* the last one, which has not ended */
    for (int i = tile_begin; i < tile_end; i++) {
        const unsigned count = i - tile_begin, stage = count % STAGES;
        const bool last = i + 1 == tile_end;
        int next_head = head, next_m_block = m_block;
        go_on(next_head, next_m_block);
        const int query0 = m_block * TILE_M;
        const query_tile tile = {smem + Q_AT + stage * Q_layout::BYTES,
                                 smem + DO_AT,
                                 smem + STATS_AT + stage * STATS_BYTES,
                                 smem + MBARRIERS_AT + stage * 16,
                                 count / STAGES % 2,
                                 smem + MBARRIERS_AT + STAGES * 16,
                                 count % 2,
                                 query0};
        const bool masked = key1 > params.seqlen_k ||
                            (MASK_RIGHT && mask.begin(key1 - 1) > query0) ||
                            (MASK_LEFT && mask.end(key0) < min(query0 + TILE_M, params.seqlen_q));

        if (STAGES == 2 && !last)
            load_Q(stage ^ 1, next_head, next_m_block);

        /* ---- 3. P^T and dV, dS^T and dK. */
        if (!holds_K)
            add_keys(own, tile, S_own, S_rows);
        else if (masked)
            add_values<true>(own, tile, S_own, key0 + lane_row, params);
        else
            add_values<false>(own, tile, S_own, key0 + lane_row, params);

        /* Barriers: the group that holds V has written all of dS^T, and nobody needs Q and dO any
         * more. The other group goes on as soon as the lower queries of dS^T are there. */
        if (!TMA)
            __syncthreads();
        else if (holds_K)
            barrier_arrive<THREADS>(QUERIES_ARE_FREE);
        else
            barrier_sync<THREADS>(QUERIES_ARE_FREE);
        if (!last) {
            if (STAGES == 1)
                load_Q(0, next_head, next_m_block);
            load_dO(next_head, next_m_block);
        }
        if (holds_K)
            barrier_sync<THREADS>(LOWER_IS_THERE);

        /* ---- 4. This warp's part of dQ. Where the order matters, blocks take turns, in that of
         * their keys. Neither end of a turn is waited for: the turn before has mostly ended when it
         * is looked at, here; and that this one has ended is told a tile later, by a thread that by
         * its last barriers knows that all have added, when nothing is on its way any more. */
        const int dq_batch = at.n_block % DQ_SUMS * params.batch + at.batch;
        const fa_int64 dq_tile = tile_of(dq_batch, head, m_block);
        int ended = 0;
        if (DETERMINISTIC) {
            if (turn && thread == 0)
                end_turn(turn);
            turn = params.turns + dq_tile;
            ended = turns_ended(turn);
        }
        const int group_warp = warp % KEY_WARPS;
        const int row_frag = (holds_K ? 0 : HALF_FRAGS) + group_warp / DQ_DIM_WARPS * DQ_ROW_FRAGS;
        const int dim_frag = group_warp % DQ_DIM_WARPS * DQ_DIM_FRAGS;
        float dQ[DQ_ROW_FRAGS][DQ_DIM_FRAGS][4];
        clear(dQ);
        const unsigned dS_columns = not_before(smem + S_AT + columns_first<S_layout>());
        const unsigned K_rows = not_before(smem + K_AT + rows_first<K_layout>());
#pragma unroll
        for (int k = 0; k < TILE_N / 16; k++) {
            unsigned dS[DQ_ROW_FRAGS][1][4];
#pragma unroll
            for (int m = 0; m < DQ_ROW_FRAGS; m++)
                ldmatrix_x4_trans(dS[m][0],
                                  S_layout::moved(dS_columns, 16 * k, 2 * (row_frag + m)));
            multiply_columns<K_layout, 1, DQ_DIM_FRAGS>(dQ, dS, K_layout::moved(K_rows, 16 * k, 0),
                                                        dim_frag);
        }
        if (!holds_K && !last)
            barrier_arrive<THREADS>(UPPER_IS_FREE);

        if (DETERMINISTIC)
            while (ended != (at.n_block - mask.first_n_block(query0)) / DQ_SUMS)
                ended = turns_ended(turn);
        float *sums = params.dq_sum + dq_tile * (TILE_M * HEAD_DIM) + row_frag * (16 * HEAD_DIM);
#pragma unroll
        for (int m = 0; m < DQ_ROW_FRAGS; m++)
            add_to_sums<DQ_DIM_FRAGS>(sums + m * (16 * HEAD_DIM), dQ[m], dim_frag, HEAD_DIM / 8);
        if (!TMA) {
            /* Barrier: the next queries are there. */
            cp_async_wait_all();
            __syncthreads();
        }
        head = next_head;
        m_block = next_m_block;
    }

    if (DETERMINISTIC) {
        __syncthreads(); /* all have added */
        if (turn && thread == 0)
            end_turn(turn);
    }

    /* ---- 5. dV, dK out; by turns where parts add to sums, and the order matters. */
    if (DETERMINISTIC && params.parts > 1) {
        const fa_int64 pair = static_cast<fa_int64>(at.batch) * params.heads_kv + at.head_kv;
        turn = params.dk_turns + pair * params.n_blocks + at.n_block;
        while (turns_ended(turn) != at.part)
            ;
    }
    if (holds_K)
        store_sums<HEAD_DIM_V>(own, params.dv, params.dv_stride, params.dv_sum, at, own_key,
                               1.0f / P_SCALE, params);
    else
        store_sums<HEAD_DIM>(own, params.dk, params.dk_stride, params.dk_sum, at, own_key,
                             params.softmax_scale / P_SCALE, params);
    if (DETERMINISTIC && params.parts > 1) {
        __syncthreads(); /* all have added */
        if (thread == 0)
            end_turn(turn);
    }
}
