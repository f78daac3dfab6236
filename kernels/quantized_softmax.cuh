/* Quantised attention: from scores to the weights of the second product.
 *
 * In powers of two. m is the row max so far, rounded up to an integer: O and l are rescaled by
 * powers of two, so that P has the same bits whatever the tiles, unless it is subnormal. e4m3 and
 * e2m1 saturate, so m is never too low; where no row of the warp has a new m, nothing crosses
 * lanes. */
#ifndef FA_QUANTIZED_SOFTMAX_CUH
#define FA_QUANTIZED_SOFTMAX_CUH

#include "quantized_values.cuh"

/* Rows g and g + 8. */
struct softmax_rows {
    float m[2], l[2]; /* l: of this lane's keys, times 2^P_SHIFT */
    float shift[2];   /* where SOFTCAP: what K's mean adds to the argument of the tanh */
};

/* What takes sums of a tile to scores: to the argument of the tanh where SOFTCAP, else to powers of
 * two. */
struct score_factor {
    float of_query; /* and of the head of K */
    float softcap_log2;

    __device__ __forceinline__ float of(const key_scales &scales) const
    {
        if (QK_FORMAT == FORMAT_INT8)
            return shortened(positive(of_query * scales.factor));
        return positive(of_query);
    }
};

/* x in the lane that has row g + 8 half, of the queries 2t and 2t + 1 of O^T. */
__device__ __forceinline__ void of_columns(float (&x)[2], float of_row)
{
#pragma unroll
    for (int e = 0; e < 2; e++)
        x[e] = __shfl_sync(0xffffffff, of_row, 8 * quad_lane() + 4 * e);
}

__device__ __forceinline__ void rescale(float (&O_rmem)[O_FRAGS][2][4], softmax_rows &rows,
                                        const float (&row_max)[2])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float raised = quad_max(fmaxf(rows.m[half], ceilf(row_max[half])));
        const float factor = exp2_approx(rows.m[half] - raised);
        rows.m[half] = raised;
        rows.l[half] *= factor;
        float factors[2];
        of_columns(factors, factor);
#pragma unroll
        for (int n = 0; n < O_FRAGS; n++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                O_rmem[n][half][r] *= factors[r % 2];
    }
}

/* Scores behind the cap, which are then multiplied by softcap_log2; -inf where a query does not see
 * the key. */
template <bool IS_MASKED>
__device__ __forceinline__ void cap_and_mask(float (&S_rmem)[S_FRAGS][4], const softmax_rows &rows,
                                             float factor, const quantized_block &block,
                                             int first_key)
{
    int begin[2], end[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        begin[half] = block.begin(block.lane_row() + 8 * half) - first_key;
        end[half] = block.end(block.lane_row() + 8 * half) - first_key;
    }
#pragma unroll
    for (int j = 0; j < S_FRAGS; j++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float &s = S_rmem[j][r];
            if (SOFTCAP)
                s = tanhf(fmaf(s, factor, -SUM_OFFSET * factor) + rows.shift[r / 2]);
            const int key = column(j, r % 2);
            if (IS_MASKED && !(begin[r / 2] <= key && key < end[r / 2]))
                s = -INF;
        }
}

/* (sum - offset) * factor. */
__device__ __forceinline__ float without_offset(float sum, float factor, float offset)
{
    return offset == 0.0f ? sum * factor : fmaf(sum, factor, -offset * factor);
}

/* m follows the scores of a tile: `largest` of a lane's, in halves of the tile. */
__device__ __forceinline__ void follow_row_max(float (&O_rmem)[O_FRAGS][2][4], softmax_rows &rows,
                                               const float (&largest)[2][2], float factor,
                                               float offset)
{
    float row_max[2];
#pragma unroll
    for (int half = 0; half < 2; half++)
        row_max[half] = without_offset(fmaxf(largest[half][0], largest[half][1]), factor, offset);
    if (__any_sync(0xffffffff, row_max[0] > rows.m[0] || row_max[1] > rows.m[1]))
        rescale(O_rmem, rows, row_max);
}

/* P = 2^(S * factor - m), and l += its sums. A masked score has p = 0 whatever the factor is. */
template <bool IS_MASKED>
__device__ __forceinline__ void exponentials(weights &P, float (&S_rmem)[S_FRAGS][4],
                                             softmax_rows &rows, float factor, float offset)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float shift = P_SHIFT - rows.m[half];
        const float addend = offset == 0.0f ? shift : fmaf(-offset, factor, shift);
#pragma unroll
        for (int j = 0; j < S_FRAGS; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &s = S_rmem[j][2 * half + e];
                const float p = exp2_approx(fmaf(s, factor, addend));
                s = IS_MASKED && s == -INF ? 0.0f : p;
                rows.l[half] += s;
            }
    }
    round_weights(P, S_rmem);
}

/* The same in e2m1. Two lanes have the 16 weights of a group. They are divided by a sixth of their
 * largest before the exponential, which makes them: x = 2^(S * factor + c), P = x * scale. The
 * scale is made of the c that is rounded, so that x * scale is exact.
 *
 * The scales of a query's four groups have to be in its first lane, where the mma looks for
 * them. */
template <bool IS_MASKED>
__device__ __forceinline__ void group_exponentials(weights &P, const float (&S_rmem)[S_FRAGS][4],
                                                   softmax_rows &rows, const float (&largest)[2][2],
                                                   float factor, float offset)
{
    constexpr float LOG2_OF_6 = 2.5849625007f;
    float scales[4]; /* [half][word] */
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int word = 0; word < 2; word++) {
            float s_max =
                fmaxf(largest[half][word], __shfl_xor_sync(0xffffffff, largest[half][word], 1));
            if (IS_MASKED)
                s_max = fmaxf(s_max, LOWEST_FLOAT);
            const float c = fmaf(-s_max, factor, LOG2_OF_6);
            const float c_of_scores = offset == 0.0f ? c : fmaf(offset, factor, c);
            float scale = exp2_approx(P_SHIFT - rows.m[half] - c_of_scores);
            if (IS_MASKED && s_max == LOWEST_FLOAT)
                scale = 0.0f;
            float x[8], sum;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float s = S_rmem[4 * word + i / 2][2 * half + i % 2];
                x[i] = exp2_approx(fmaf(s, factor, c));
                if (IS_MASKED && s == -INF)
                    x[i] = 0.0f;
                sum = i ? sum + x[i] : x[i];
            }
            rows.l[half] += sum * scale;
            P.words[0][half][word] = pack_e2m1(x);
            scales[2 * half + word] = scale * P_REST;
        }
    const unsigned own = pack_e4m3(scales), other = __shfl_xor_sync(0xffffffff, own, 2);
    P.scales[0] = __byte_perm(own, other, 0x5140);
    P.scales[1] = __byte_perm(own, other, 0x7362);
}

/* From the sums of a tile to P. */
template <bool IS_MASKED>
__device__ __forceinline__ void weigh(weights &P, float (&S_rmem)[S_FRAGS][4],
                                      float (&O_rmem)[O_FRAGS][2][4], softmax_rows &rows,
                                      const score_factor &factors, const key_scales &scales,
                                      const quantized_block &block, int first_key)
{
    const float of_sum = factors.of(scales);
    cap_and_mask<IS_MASKED>(S_rmem, rows, of_sum, block, first_key);
    const float factor = SOFTCAP ? factors.softcap_log2 : of_sum;
    const float offset = SOFTCAP ? 0.0f : SUM_OFFSET;
    float largest[2][2];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int word = 0; word < 2; word++) {
            float s_max = S_rmem[4 * word][2 * half];
#pragma unroll
            for (int i = 1; i < 8; i++)
                s_max = fmaxf(s_max, S_rmem[4 * word + i / 2][2 * half + i % 2]);
            largest[half][word] = s_max;
        }
    follow_row_max(O_rmem, rows, largest, factor, offset);
    if constexpr (IS_V_NVFP4)
        group_exponentials<IS_MASKED>(P, S_rmem, rows, largest, factor, offset);
    else
        exponentials<IS_MASKED>(P, S_rmem, rows, factor, offset);
}

#endif
