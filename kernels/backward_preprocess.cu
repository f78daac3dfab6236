/* Before backward.cu: lse_log2 and delta = dO.O - dlse of every query, and zeros in accumulators
 * and semaphores. A block takes a tile of queries [TILE_M], and a share of what is zeroed.
 *
 * Where VARLEN, also zeros in rows of gradients that no sequence has, and the list of
 * tiles of keys: a block takes some rows, and one sequence.
 *
 * Constants as in backward.cu: DTYPE, HEAD_DIM_V, TILE_M, VARLEN. */
#include "params.h"

#include "backward.cuh"
#include "query_tiles.cuh"
#include "tile_list.cuh"
#include "unused_rows.cuh"

constexpr int THREADS = FA_PREPROCESS_THREADS;

/* Lanes that share a row, with one chunk each: a power of two, for the shuffles. */
constexpr int row_lanes(int chunks)
{
    int lanes = 1;
    while (lanes < chunks)
        lanes *= 2;
    return lanes;
}
constexpr int CHUNKS = HEAD_DIM_V / 8;
constexpr int LANES = row_lanes(CHUNKS);
constexpr int ROWS = THREADS / LANES; /* of a block, at a time */

__device__ __forceinline__ float dot_2(unsigned a, unsigned b)
{
    const float2 x = unpack(a), y = unpack(b);
    return x.x * y.x + x.y * y.y;
}

__device__ __forceinline__ float dot_8(const uint4 &a, const uint4 &b)
{
    return dot_2(a.x, b.x) + dot_2(a.y, b.y) + (dot_2(a.z, b.z) + dot_2(a.w, b.w));
}

/* Rows of dq, dk and dv that no sequence has become 0. */
__device__ __forceinline__ void clear_unused_rows(const fa_backward_params &params)
{
    const row_side queries = query_side(params.lengths, params.batch, params.seqlen_q);
    const row_side keys = key_side(params.lengths, params.batch, params.seqlen_k);
    const fa_int64 step = fa_int64{gridDim.x} * THREADS;
    for (fa_int64 row0 = fa_int64{blockIdx.x} * THREADS; row0 < queries.rows(); row0 += step)
        each_unused_row(queries, row0, [&](int entry, int row) {
            clear_row(params.dq, params.dq_stride, params.heads_q, params.head_dim, entry, row);
        });
    for (fa_int64 row0 = fa_int64{blockIdx.x} * THREADS; row0 < keys.rows(); row0 += step)
        each_unused_row(keys, row0, [&](int entry, int row) {
            clear_row(params.dk, params.dk_stride, params.heads_kv, params.head_dim, entry, row);
            clear_row(params.dv, params.dv_stride, params.heads_kv, HEAD_DIM_V, entry, row);
        });
}

/* The tiles of keys of a sequence in the list of all. Blocks with many queries take longest. */
__device__ __forceinline__ void list_keys(const fa_backward_params &params, int number)
{
    list_tiles<THREADS>(
        params.list, params.n_blocks, params.batch, number, false, [&](int other) -> sequence_work {
            const int keys = read_keys(params.lengths, params.seqlen_k, other).count;
            return {read_queries(params.lengths, params.seqlen_q, other).count,
                    ceil_div(keys, params.tile_n)};
        });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    backward_preprocess(const __grid_constant__ struct fa_backward_params params)
{
    const int tile = blockIdx.x;
    const auto [pair, batch, head, m_block] =
        query_tiles<fa_backward_params>{params}.place_of(tile);
    sequence<fa_backward_params> seq = {params, 0};
    seq.select(batch);
    const int lane = threadIdx.x % LANES;
    const element *out = static_cast<const element *>(params.out) +
                         batch * params.out_stride.batch + head * params.out_stride.head + lane * 8;
    const element *dout = static_cast<const element *>(params.dout) +
                          batch * params.dout_stride.batch + head * params.dout_stride.head +
                          lane * 8;
    float *lse_log2_tile = params.lse_delta + static_cast<fa_int64>(tile) * (2 * TILE_M);
    float *delta_tile = lse_log2_tile + TILE_M;

    for (int row = threadIdx.x / LANES; row < TILE_M; row += ROWS) {
        const int query = m_block * TILE_M + row;
        const bool exists = query < seq.seqlen_q();
        float delta = 0.0f;
        if (exists && lane < CHUNKS)
            delta = dot_8(*reinterpret_cast<const uint4 *>(out + (seq.q_begin + query) *
                                                                     params.out_stride.seqlen),
                          *reinterpret_cast<const uint4 *>(dout + (seq.q_begin + query) *
                                                                      params.dout_stride.seqlen));
#pragma unroll
        for (int distance = LANES / 2; distance > 0; distance /= 2)
            delta += __shfl_xor_sync(0xffffffff, delta, distance);
        if (lane == 0) {
            const fa_int64 index = seq.lse_offset(pair, head) + query;
            float lse = exists ? params.lse[index] * LOG2_E : INF;
            if (exists && params.dlse)
                delta -= params.dlse[index];
            if (exists && lse == INF)
                lse = INF - INF; /* a score is +inf: no p of the row is defined */
            /* Rows that see no key, and rows after the last, get p = 2^(s - inf) = 0. */
            const bool sees_nothing = lse == -INF || !exists;
            lse_log2_tile[row] = sees_nothing ? INF : lse - P_SHIFT;
            delta_tile[row] = sees_nothing ? 0.0f : delta;
        }
    }

    const fa_int64 begin = tile * params.zero_share;
    const fa_int64 end = min(begin + params.zero_share, params.zero_chunks);
    uint4 *zeros = static_cast<uint4 *>(params.zeros);
    for (fa_int64 i = begin + threadIdx.x; i < end; i += THREADS)
        zeros[i] = make_uint4(0, 0, 0, 0);

    if (VARLEN)
        clear_unused_rows(params);
    if (VARLEN && params.list && tile < params.batch) /* there are as many tiles, or more */
        list_keys(params, tile);
}
