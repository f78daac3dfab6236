/* After backward.cu: an accumulator of dQ, dK or dV, see params.h, to the rows of its tensor. A
 * warp takes a fragment of 16 rows.
 *
 * Constants: DTYPE, HEAD_DIM (of the tensor); VARLEN as in backward.cu, of dQ alone. */
#include "params.h"

#include "backward.cuh"
#include "division.cuh"
#include "sequence.cuh"

constexpr int WARPS_PER_BLOCK = FA_POSTPROCESS_WARPS;
constexpr int FRAGS = HEAD_DIM / 8;

/* The rows of the tensor that a fragment has. */
template <bool HAS_LENGTHS = VARLEN> struct fragment_place;

template <> struct fragment_place<false> {
    const fa_postprocess_params &params;
    int pair, row_frag;

    /* Row 0 of the sequence and head, how many rows that has, and the first of the fragment. */
    __device__ __forceinline__ element *tensor() const
    {
        const auto [batch, head] = divide(pair, params.heads);
        return static_cast<element *>(params.tensor) + batch * params.stride.batch +
               head * params.stride.head;
    }
    __device__ __forceinline__ int rows() const { return params.seqlen; }
    __device__ __forceinline__ int row0() const { return row_frag * 16; }
    __device__ __forceinline__ bool has_rows() const { return true; }
};

/* A head has the fragments of all sequences one after the other. */
template <> struct fragment_place<true> {
    const fa_postprocess_params &params;
    int head, number;
    sequence_rows seq;
    int first; /* row of the fragment */

    __device__ __forceinline__ fragment_place(const fa_postprocess_params &params, int head,
                                              int row_frag)
        : params(params), head(head)
    {
        const int tile_frags = params.tile_m / 16;
        const int m_blocks = ceil_div(params.seqlen, params.tile_m);
        const auto [sequence, m_block] =
            sequence_tiles{params.lengths, params.batch, m_blocks, params.tile_m,
                           params.row_frags.number / tile_frags}
                .place_of(row_frag / tile_frags);
        number = sequence;
        seq = read_queries(params.lengths, params.seqlen, number);
        first = m_block * params.tile_m + row_frag % tile_frags * 16;
    }

    __device__ __forceinline__ element *tensor() const
    {
        return static_cast<element *>(params.tensor) + number * params.stride.batch +
               seq.begin * params.stride.seqlen + head * params.stride.head;
    }
    __device__ __forceinline__ int rows() const { return seq.count; }
    __device__ __forceinline__ int row0() const { return first; }
    __device__ __forceinline__ bool has_rows() const { return first < seq.count; }
};

extern "C" __global__ void __launch_bounds__(WARPS_PER_BLOCK * 32)
    backward_postprocess(const __grid_constant__ struct fa_postprocess_params params)
{
    /* In 32 bits: an accumulator for 2^31 warps would have 1 TB or more. */
    const int warp = blockIdx.x * WARPS_PER_BLOCK + threadIdx.x / 32;
    const int pairs = VARLEN ? params.heads.number : params.batch * params.heads.number;
    const auto [pair, row_frag] = divide(warp, params.row_frags);
    if (pair >= pairs)
        return; /* the whole warp */
    const fragment_place<> place = {params, pair, row_frag};
    if (!place.has_rows())
        return; /* the same */
    const float4 *accum =
        reinterpret_cast<const float4 *>(params.accum) + fa_int64{warp} * (FRAGS * 32) + lane_id();
    const fa_int64 buffer_stride = fa_int64{pairs} * params.row_frags.number * (FRAGS * 32);
    float C[FRAGS][4] = {};
    for (int i = 0; i < params.buffers; i++)
#pragma unroll
        for (int n = 0; n < FRAGS; n++) {
            const float4 x = accum[i * buffer_stride + n * 32];
            C[n][0] += x.x;
            C[n][1] += x.y;
            C[n][2] += x.z;
            C[n][3] += x.w;
        }

    element *tensor = place.tensor();
    const int row0 = place.row0() + quad_row();
    const float scale = params.scale / P_SCALE;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = row0 + 8 * half;
        store_row<FRAGS>(tensor + row * params.stride.seqlen, C, half, scale, row < place.rows());
    }
}
