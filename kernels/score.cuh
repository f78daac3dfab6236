/* What happens to a score s = q.k, in this order, in both directions:
 *
 *   1. scale      softmax_scale: a factor of scale_log2, which the exponential applies; where
 *                 SOFTCAP, of scale_in_cap
 *   2. softcap    c * tanh(s / c)
 *   3. score_mod  no variant has one yet
 *   4. ALiBi      s * scale_log2 - slope * |distance|: in powers of two from here on
 *   5. mask       -inf where the query does not see the key
 *   6. softmax    p = 2^(s * scale_log2 - m), see softmax.cuh
 *   7. dropout    no variant has it yet
 *
 * Rows of fragments are queries in the forward, where S = Q K^T, and keys in the backward, where
 * S^T = K Q^T: so each step takes an element as it is, or asks a function where it is. */
#ifndef FA_SCORE_CUH
#define FA_SCORE_CUH

#include "mask.cuh"
#include "sink.cuh"

/* Whose score it is: query head, and query and key of the sequence. */
struct score_coords {
    int head, query, key;
};

/* Calls f(s, row, column) for each score of C fragments; row and column count from those of
 * S[0][0][0] of this lane. */
template <int ROW_FRAGS, int COLUMN_FRAGS, class F>
__device__ __forceinline__ void for_each_score(float (&S)[ROW_FRAGS][COLUMN_FRAGS][4], F f)
{
#pragma unroll
    for (int m = 0; m < ROW_FRAGS; m++)
#pragma unroll
        for (int n = 0; n < COLUMN_FRAGS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                f(S[m][n][e], 16 * m + 8 * (e / 2), 8 * n + e % 2);
}

/* ---- 2. S = tanh(S * scale_in_cap). The factor c is part of scale_log2. tanhf() takes two MUFU
 * instructions, where tanh.approx takes one: but that is off by 2^-11, which is 2% of p at a cap
 * of 50. */
template <int ROW_FRAGS, int COLUMN_FRAGS>
__device__ __forceinline__ void softcap(float (&S)[ROW_FRAGS][COLUMN_FRAGS][4], float scale_in_cap)
{
    if (SOFTCAP)
        for_each_score(S, [&](float &s, int, int) { s = tanhf(s * scale_in_cap); });
}

/* ---- 3. `coords_of` gives the score_coords of a row and a column of S. */
template <int ROW_FRAGS, int COLUMN_FRAGS, class F>
__device__ __forceinline__ void score_mod(float (&)[ROW_FRAGS][COLUMN_FRAGS][4], F /*coords_of*/)
{
}

/* ---- 4. ALiBi. The slope of a head, for powers of two. */
template <class params_t>
__device__ __forceinline__ float load_slope(const params_t &params, int batch, int head)
{
    const fa_alibi &alibi = params.alibi;
    return ld_global(alibi.slopes + batch * alibi.batch_stride + head * alibi.head_stride) * LOG2_E;
}

/* `distance`: from the key to the query's diagonal. */
__device__ __forceinline__ float with_alibi(float s, float scale, float slope, float distance)
{
    return fmaf(s, scale, -slope * fabsf(distance));
}

/* A masked score as the steps from here on have it. */
template <class params_t> __device__ __forceinline__ float masked_score(const params_t &params)
{
    return ALIBI ? -INF : params.masked_score;
}

/* ---- 5. `visible` gives the range of columns that a row of S sees; BEGIN and END: whether it may
 * begin after the first column, and end before the last. */
template <bool BEGIN, bool END, int ROW_FRAGS, int COLUMN_FRAGS, class F>
__device__ __forceinline__ void mask_scores(float (&S)[ROW_FRAGS][COLUMN_FRAGS][4],
                                            float masked_score, F visible)
{
#pragma unroll
    for (int m = 0; m < ROW_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const range columns = visible(16 * m + 8 * half);
#pragma unroll
            for (int n = 0; n < COLUMN_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = 8 * n + e;
                    const bool seen =
                        (!END || column < columns.end) && (!BEGIN || column >= columns.begin);
                    if (!seen)
                        S[m][n][2 * half + e] = masked_score;
                }
        }
}

/* ---- 7. A probability as it weighs V; the sum of a row takes it as it was. */
__device__ __forceinline__ float dropout(float p, const score_coords &) { return p; }

#endif
