/* Q on its way from global memory to the mma, and the factors of scores and values where K and V
 * are e4m3. */
#ifndef FA_QUERIES_CUH
#define FA_QUERIES_CUH

#include "descale.cuh"
#include "forward_block.cuh"

/* What the rows of Q K^T are multiplied by to be scores. */
struct row_factors {
    float of[M_FRAGS][2]; /* where WIDENS, else not there */
    float scale; /* where Q_E4M3 the descales' and softmax_scale: of the cap, or of powers of two */

    __device__ __forceinline__ void apply(float (&S_rmem)[M_FRAGS][S_FRAGS][4]) const
    {
        if (WIDENS)
            for_each_score(S_rmem, [&](float &s, int row, int) { s *= of[row / 16][row / 8 % 2]; });
    }
    __device__ __forceinline__ float scale_in_cap(const fa_forward_params &params) const
    {
        return Q_E4M3 ? scale : params.scale_in_cap;
    }
    __device__ __forceinline__ float scale_log2(const fa_forward_params &params) const
    {
        return Q_E4M3 && !SOFTCAP ? scale : scale_of_rest(params);
    }
};

/* A row of Q [.., HEAD_DIM] from bf16 to fp16, times a power of two, whose inverse is returned: the
 * largest element then is in [2^14, 2^15). Elements below 2^-31 of that lose bits, all others are
 * exact, and sums in fp32 have no more. */
__device__ __forceinline__ float narrow_row(unsigned (&Q_rmem)[D_STEPS][4], int half)
{
    constexpr unsigned EXPONENT = 0x7f800000, ONE_EXPONENT = 0x00800000;
    unsigned largest = 0;
#pragma unroll
    for (int d = 0; d < D_STEPS; d++)
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const unsigned x = Q_rmem[d][2 * part + half];
            largest = max(largest, max(x << 16 & EXPONENT, x & EXPONENT));
        }
    const unsigned inverse = max(quad_max(largest), 15 * ONE_EXPONENT) - 14 * ONE_EXPONENT;
    const float scale = __uint_as_float(254 * ONE_EXPONENT - inverse);
#pragma unroll
    for (int d = 0; d < D_STEPS; d++)
#pragma unroll
        for (int part = 0; part < 2; part++) {
            unsigned &x = Q_rmem[d][2 * part + half];
            const float2 pair = unpack<FA_BFLOAT16>(x);
            x = pack<FA_FLOAT16>(pair.x * scale, pair.y * scale);
        }
    return __uint_as_float(inverse);
}

/* With weights in e4m3 scales are positive: of a negative one Q takes the sign. Nor are they 0. */
constexpr float LEAST_SCALE = 1.17549435e-38f;
__device__ __forceinline__ void fold_scale(unsigned (&Q_rmem)[M_FRAGS][D_STEPS][4],
                                           row_factors &factors, const fa_forward_params &params,
                                           float descale)
{
    if (SOFTCAP) {
        factors.scale = params.scale_in_cap * descale;
        return;
    }
    const unsigned signs = params.scale_log2 < 0.0f ? 0x80808080 : 0;
    factors.scale = fmaxf(fabsf(params.scale_log2) * descale, LEAST_SCALE);
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int d = 0; d < D_STEPS; d++)
#pragma unroll
            for (int part = 0; part < 4; part++)
                Q_rmem[m][d][part] ^= signs;
}

/* Q [WARP_M, HEAD_DIM] from global memory into the layout of the mma's A operand. Missing rows
 * are zeros, and so is the second half of the last step if HEAD_DIM is not whole steps. The
 * dims of a step are in the order that K has, see load_keys(). */
__device__ __forceinline__ void load_queries(unsigned (&Q_rmem)[M_FRAGS][D_STEPS][4],
                                             row_factors &factors, const fa_forward_params &params)
{
    constexpr int CHUNK_DIMS = OPERAND_K / 2, LANE_DIMS = KV_E4M3 ? 4 : 2;
    const forward_block block(params);
    const q_element *Q_gmem =
        static_cast<const q_element *>(params.q) + block.seq.q_offset(params.q_stride, block.head);
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = block.lane_row + 16 * m + 8 * half;
            const q_element *Q_row =
                Q_gmem + block.row_offset(params.q_stride, row) + quad_lane() * LANE_DIMS;
#pragma unroll
            for (int chunk = 0; chunk < 2 * D_STEPS; chunk++) {
                const bool exists = chunk < HEAD_DIM / CHUNK_DIMS && row < block.row_count();
                const int dim = WIDENS ? chunk / 2 * 16 + chunk % 2 * 2 : chunk * CHUNK_DIMS;
                Q_rmem[m][chunk / 2][chunk % 2 * 2 + half] =
                    exists ? *reinterpret_cast<const unsigned *>(Q_row + dim) : 0;
            }
        }
    if (!KV_E4M3)
        return;
    float descale = load_descale(params.k_descale, block.seq.batch, block.head_kv);
    if (Q_E4M3) {
        descale *= load_descale(params.q_descale, block.seq.batch, block.head_kv);
        fold_scale(Q_rmem, factors, params, descale);
        return;
    }
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            factors.of[m][half] = descale * (IS_BF16 ? narrow_row(Q_rmem[m], half) : 1.0f);
}

#endif
