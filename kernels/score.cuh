/* What happens to a score s = q.k, in this order, in both directions:
 *
 *   1. scale      softmax_scale: a factor of scale_log2, which the exponential applies; where
 *                 SOFTCAP, of scale_in_cap
 *   2. softcap    c * tanh(s / c)
 *   3. score_mod  of the scaled score, see mods.cuh; where there is one, in powers of two from here
 *                 on
 *   4. biases     in powers of two from here on: s * scale_log2 - slope * |distance| with ALiBi,
 *                 then + bias * log2(e), see bias.cuh
 *   5. mask       -inf where the query does not see the key, by the window or a mask_mod
 *   6. softmax    p = 2^(s * scale_log2 - m), see softmax.cuh
 *   7. dropout    weights become 0; what is left counts 1 / (1 - p) times as much, see philox.h
 *
 * Rows of fragments are queries in the forward, where S = Q K^T, and keys in the backward, where
 * S^T = K Q^T: so each step takes an element as it is, or asks a function where it is. */
#ifndef FA_SCORE_CUH
#define FA_SCORE_CUH

#include "mask.cuh"
#include "mods.cuh"
#include "philox.h"
#include "sink.cuh"

/* Whether scores are in powers of two when they are masked. */
enum : bool { IS_PRESCALED = ALIBI || BIAS || SCORE_MOD };

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

/* ---- 3. What takes a score to its natural unit; where SOFTCAP the factor c is part of it. */
template <class params_t> __device__ __forceinline__ float natural_scale(const params_t &params)
{
    return params.scale_log2 * LN2;
}

/* `coords_of` gives the score_coords of a row and a column of S. */
template <int ROW_FRAGS, int COLUMN_FRAGS, class params_t, class F>
__device__ __forceinline__ void score_mod(float (&S)[ROW_FRAGS][COLUMN_FRAGS][4],
                                          const params_t &params, F coords_of)
{
    if (SCORE_MOD)
        for_each_score(S, [&](float &s, int row, int column) {
            s = score_mod_of(s, natural_scale(params), coords_of(row, column),
                             mods_of(params).score);
        });
}

/* The same, and its derivative by the score to `slopes`. */
template <int ROW_FRAGS, int COLUMN_FRAGS, class params_t, class F>
__device__ __forceinline__ void score_mod_and_slopes(float (&S)[ROW_FRAGS][COLUMN_FRAGS][4],
                                                     float (&slopes)[ROW_FRAGS][COLUMN_FRAGS][4],
                                                     const params_t &params, F coords_of)
{
    if (SCORE_MOD)
#pragma unroll
        for (int m = 0; m < ROW_FRAGS; m++)
#pragma unroll
            for (int n = 0; n < COLUMN_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float s = S[m][n][e];
                    const float of_cap = SOFTCAP ? 1.0f - fminf(s * s, 1.0f) : 1.0f;
                    slopes[m][n][e] =
                        of_cap * score_mod_slope(s, natural_scale(params),
                                                 coords_of(16 * m + 8 * (e / 2), 8 * n + e % 2),
                                                 mods_of(params).score);
                }
    score_mod(S, params, coords_of);
}

/* What takes a score behind score_mod to powers of two. */
template <class params_t> __device__ __forceinline__ float scale_of_rest(const params_t &params)
{
    return SCORE_MOD ? 1.0f : params.scale_log2;
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

/* A masked score, before step 4 and behind it. */
template <class params_t>
__device__ __forceinline__ float unscaled_masked_score(const params_t &params)
{
    return SCORE_MOD ? -INF : params.masked_score;
}
template <class params_t> __device__ __forceinline__ float masked_score(const params_t &params)
{
    return IS_PRESCALED ? -INF : unscaled_masked_score(params);
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

/* APPLIES: false where all keys are known to be seen. */
template <bool APPLIES, int ROW_FRAGS, int COLUMN_FRAGS, class params_t, class F>
__device__ __forceinline__ void mask_mod(float (&S)[ROW_FRAGS][COLUMN_FRAGS][4],
                                         const params_t &params, float masked_score, F coords_of)
{
    if (MASK_MOD && APPLIES)
        for_each_score(S, [&](float &s, int row, int column) {
            s = mask_mod_of(coords_of(row, column), mods_of(params).mask) ? s : masked_score;
        });
}

/* ---- 7. Probabilities as they weigh V; the sum of a row takes them as they were. The factor
 * 1 / (1 - p) is part of the scales of what is stored. */

/* What a block needs to know of the weights of one head of a sequence. */
struct dropout_stream {
    fa_dropout_stream random;
    unsigned threshold;

    template <class params_t>
    __device__ __forceinline__ dropout_stream(const params_t &params, int batch, int head)
    {
        if (!DROPOUT)
            return;
        const int *seed = reinterpret_cast<const int *>(params.dropout.seed);
        unsigned words[4];
        for (int i = 0; i < 4; i++)
            words[i] = ld_global(seed + i);
        random = fa_dropout_stream_of(words, batch, head);
        threshold = params.dropout.threshold;
    }

    /* What one weight is multiplied by. */
    __device__ __forceinline__ float factor(int query, int key, float factor_of_kept) const
    {
        if (!DROPOUT)
            return 1.0f;
        return fa_dropout_keeps_weight(&random, query, key, threshold) ? factor_of_kept : 0.0f;
    }

    /* Calls f(q, k, kept) for the weights of two draws whose keys, or queries, are neighbours: the
     * halves of a word. `kept` has 16 ones for each that is not dropped. Of the keys of a draw
     * there are KEYS, from `key` on, which need not be the first; `query` is. */
    template <int KEYS, class F>
    __device__ __forceinline__ void for_each_pair(int query, int key, int next_query, int next_key,
                                                  F f) const
    {
        constexpr int APART = FA_DRAW_KEY_STEP * KEYS;
        const int skipped = KEYS < FA_DRAW_KEYS ? key & APART : 0;
        const fa_dropout_draw low = fa_dropout_draw_at(&random, query, key - skipped, threshold);
        const fa_dropout_draw high =
            fa_dropout_draw_at(&random, next_query, next_key - skipped, threshold);
#pragma unroll
        for (int q = 0; q < 2; q++)
#pragma unroll
            for (int k = 0; k < KEYS; k++)
                f(q, k, byte_signs(low.word[q] >> skipped, high.word[q] >> skipped, k, k));
    }
};

/* Calls f(m, n, half, kept) for each word of P [queries, keys], in C fragments: columns 2t and
 * 2t + 1 of row g + 8 * half. `query` and `key` are those of P[0][0][0] of this lane. */
template <int M_FRAGS, int N_FRAGS, class F>
__device__ __forceinline__ void for_each_kept(const dropout_stream &stream, int query, int key, F f)
{
    constexpr int KEYS = N_FRAGS < FA_DRAW_KEYS ? N_FRAGS : FA_DRAW_KEYS;
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int n = 0; n < N_FRAGS; n += KEYS)
            stream.for_each_pair<KEYS>(query + 16 * m, key + 8 * n, query + 16 * m, key + 8 * n + 1,
                                       [&](int q, int k, unsigned kept) { f(m, n + k, q, kept); });
}

/* The same of P^T [keys, queries]: f(n, m, half, kept). */
template <int N_FRAGS, int M_FRAGS, class F>
__device__ __forceinline__ void for_each_kept_of_transposed(const dropout_stream &stream, int query,
                                                            int key, F f)
{
    constexpr int KEYS = 2 * N_FRAGS < FA_DRAW_KEYS ? 2 * N_FRAGS : FA_DRAW_KEYS;
#pragma unroll
    for (int n = 0; n < N_FRAGS; n += KEYS / 2)
#pragma unroll
        for (int m = 0; m < M_FRAGS; m += 2)
            stream.for_each_pair<KEYS>(
                query + 8 * m, key + 16 * n, query + 8 * m + 1, key + 16 * n,
                [&](int q, int k, unsigned kept) { f(n + k / 2, m + q, k % 2, kept); });
}

#endif
