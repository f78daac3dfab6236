/* Before backward.cu: lse_log2 and delta = dO.O - dlse of every query, zeros in the accumulators
 * and semaphores, and the order of the sequences. A block takes a tile of queries [TILE_M], a share
 * of what is zeroed, and the place in the order of one sequence.
 *
 * Constants as in backward.cu: DTYPE, HEAD_DIM_V, TILE_M, VARLEN. */
#include "params.h"

#include "backward.cuh"
#include "query_tiles.cuh"

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

    if (VARLEN && params.order && tile < params.batch) { /* there are as many tiles, or more */
        const int rank = rank_by_length<THREADS>(params.batch, tile, [&](int number) {
            return read_queries(params.lengths, params.seqlen_q, number).count;
        });
        if (threadIdx.x == 0)
            params.order[rank] = tile;
    }
}
