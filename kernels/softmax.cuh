/* Softmax over the keys, sub-tile by sub-tile, in powers of two: p = 2^(s * scale_log2 - m).
 *
 * It is the online softmax without the online part: m need not be the row max so far, it only has
 * to keep p in range, as any m cancels in O / l. So unmasked tiles keep the m of the masked ones
 * before them: no maximum, no rescaling of O, no branch. out_of_range() finds the rows for which
 * that was not enough. A sum is never too small: m belongs to a key that the row has seen. Where
 * BIAS the keys at the edge may be those that weigh least, or nothing: then every tile updates m.
 *
 * A mod may make scores rise at any key, or hide all keys before it (SCORES_RISE). In bf16 each
 * tile then looks at the sums, and m rises in the rows whose sum is large, before it overflows. A
 * row that has seen no key where that begins takes a guess for its m. In fp16, which has no
 * exponents for that, every tile looks at the scores, and m rises in the rows where the row max has
 * grown by more than rows_that_grew() allows.
 *
 * FlashAttention-4 goes half of this way: it keeps m while the row max has not grown by more than
 * rescale_threshold (2^8), and looks at every tile. */
#ifndef FA_SOFTMAX_CUH
#define FA_SOFTMAX_CUH

#include "forward_block.cuh"

/* m lies so far above the row max that the sum of 2^16 of the largest bf16 values is still in the
 * range of fp32 (FlashAttention-3 has a MAX_OFFSET for its fp8). bf16 has exponents to spare for p;
 * those of fp16 are few, and its values small. e4m3 has so few below 1 that its m lies below: p of
 * the maximum is in (2^7, 2^8], and 448 is the largest number. */
constexpr float MAX_OFFSET = IS_BF16_OPERAND ? 16.0f : Q_E4M3 ? -8.0f : 0.0f;

/* The m of a row that has not seen any key. Finite, so that nothing becomes NaN: a masked score
 * (-inf) has p = 0, and a visible one, where m stays as it is, a p of +inf: out of range. */
constexpr float NO_KEY_YET = LOWEST_FLOAT;

/* A thread's sum of exponentials may reach this: bf16 and fp32 hold the numbers up to 2^128, and
 * down to 2^-126, as 1 / l of four such sums has to be. */
constexpr float SUM_LIMIT = 1.329228e36f; /* 2^120 */

/* m is the max of at least so many keys, if the row sees as many. In bf16 a later p may be 2^136
 * times that of the first key; fp16, with 2^16, is better off with the max of a whole tile. */
constexpr int START_KEYS = IS_BF16_OPERAND || Q_E4M3 ? 1 : TILE_N;

/* What a row without a key yet takes for m, and the sum at which m rises: a tile may then still
 * multiply it by 2^96. A sum that is less than MIN_SUM came of a guess that was too large. */
constexpr float GUESSED_MAX = 0.0f;
constexpr float LARGE_SUM = 1 << 24, MIN_SUM = 8.6736e-19f; /* 2^-60 */

/* Splits, of which many may hide all their keys, would compute these again. */
enum : bool {
    SCORES_RISE = SCORE_MOD_READS_KEY || (MASK_MOD && !BLOCK_SPARSE),
    LOOKS_AT_SUMS = SCORES_RISE && IS_BF16_OPERAND && !SPLIT,
    LOOKS_AT_MAX = SCORES_RISE && !LOOKS_AT_SUMS
};

/* Some of the rows of a lane: row g + 8 * half of fragment m is bit 2 * m + half. */
struct row_set {
    unsigned bits;

    __device__ __forceinline__ bool has(int m, int half) const
    {
        return bits >> (2 * m + half) & 1;
    }
};

/* Some of the rows of a warp: four bits for each quad, whose lanes share their rows. */
struct warp_row_set {
    unsigned bits;

    __device__ __forceinline__ row_set of_lane() const
    {
        return {bits >> read_thread_index() % 32 / 4 * 4};
    }
};

__device__ __forceinline__ void clear(float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                      float (&l_rmem)[M_FRAGS][2], float (&m_rmem)[M_FRAGS][2])
{
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            m_rmem[m][half] = NO_KEY_YET;
            l_rmem[m][half] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < O_FRAGS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                O_rmem[m][n][e] = 0.0f;
    }
}

/* The rows that update m at the tile whose first key is `key`, having seen fewer than START_KEYS
 * keys before their edge: those at it, or where SPLIT at that of their split, before the key
 * `split_end`. All, where BIAS. */
__device__ __forceinline__ row_set rows_to_update(const forward_block &block, int row, int key,
                                                  int split_end)
{
    if (BIAS)
        return {~0u};
    unsigned rows = 0;
#pragma unroll
    for (int r = 0; r < 2 * M_FRAGS; r++)
        rows |= ((SPLIT && split_end < key + TILE_N + START_KEYS) ||
                 block.edge_of(row + 8 * r) < key + TILE_N + START_KEYS)
                << r;
    return {rows};
}

/* P = 2^(S * scale - m) [WARP_M, SUB_N], as the A operand of the next mma, and l += its row sums.
 * Rows in `scaled` are pre-multiplied by scale, and all where IS_PRESCALED. l has the weights
 * before any is dropped. */
template <class F>
__device__ __forceinline__ void
exponentials(unsigned (&P_rmem)[M_FRAGS][P_STEPS][4], float (&l_rmem)[M_FRAGS][2],
             float (&S_rmem)[M_FRAGS][S_FRAGS][4], const float (&m_rmem)[M_FRAGS][2], float scale,
             row_set scaled, const dropout_stream &stream, F coords_of)
{
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) { /* row g, then row g + 8 */
            const float row_scale = IS_PRESCALED || scaled.has(m, half) ? 1.0f : scale;
            float previous0 = 0.0f, previous1 = 0.0f;
#pragma unroll
            for (int n = 0; n < S_FRAGS; n++) {
                const float p0 = exp2_approx(S_rmem[m][n][2 * half] * row_scale - m_rmem[m][half]);
                const float p1 =
                    exp2_approx(S_rmem[m][n][2 * half + 1] * row_scale - m_rmem[m][half]);
                l_rmem[m][half] += p0 + p1;
                if (!Q_E4M3)
                    P_rmem[m][n / 2][n % 2 * 2 + half] = pack<OPERAND>(p0, p1);
                else if (n % 2 == 0) {
                    previous0 = p0;
                    previous1 = p1;
                } else
                    P_rmem[m][n / 4][n / 2 % 2 * 2 + half] =
                        narrow_weights(previous0, previous1, p0, p1);
            }
        }
    if (!DROPOUT)
        return;
    const score_coords first = coords_of(0, 0);
    for_each_kept<M_FRAGS, S_FRAGS>(
        stream, first.query, first.key,
        [&](int m, int n, int half, unsigned kept) { P_rmem[m][n / 2][n % 2 * 2 + half] &= kept; });
}

/* The rows of this lane's quad, or of all of its warp, with a sum or a value that is inf, NaN, or
 * large enough that an intermediate result may have been. */
__device__ __forceinline__ warp_row_set out_of_range(const float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                                     const float (&l_rmem)[M_FRAGS][2])
{
    unsigned rows = 0;
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bool out = !(l_rmem[m][half] < SUM_LIMIT);
            if (LOOKS_AT_SUMS)
                out |= !(quad_sum(l_rmem[m][half]) > MIN_SUM);
#pragma unroll
            for (int n = 0; n < O_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    out |= !(fabsf(O_rmem[m][n][2 * half + e]) < INF);
            rows |= out << 2 * m + half;
        }
    rows <<= read_thread_index() % 32 / 4 * 4;
    if (HEAD_DIM_V > 128) /* what is the same in all of the warp takes a uniform register */
        return {__reduce_or_sync(0xffffffff, rows)};
    return {quad_or(rows)};
}

/* A row takes another m, and its l and O what that makes of them. */
__device__ __forceinline__ void set_row_max(float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                            float (&l_rmem)[M_FRAGS][2],
                                            float (&m_rmem)[M_FRAGS][2], int m, int half,
                                            float row_max)
{
    const float rescale = exp2_approx(m_rmem[m][half] - row_max);
    m_rmem[m][half] = row_max;
    l_rmem[m][half] *= rescale;
#pragma unroll
    for (int n = 0; n < O_FRAGS; n++) {
        O_rmem[m][n][2 * half] *= rescale;
        O_rmem[m][n][2 * half + 1] *= rescale;
    }
}

/* The online softmax: in the given rows m = max(m, row max of S * scale), and O and l are rescaled.
 * These rows of S are multiplied by scale: rounded here, and not within the FMA of exponentials(),
 * so that p of the maximum is a power of two. */
__device__ __forceinline__ void update_row_max(float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                               float (&l_rmem)[M_FRAGS][2],
                                               float (&m_rmem)[M_FRAGS][2],
                                               float (&S_rmem)[M_FRAGS][S_FRAGS][4], float scale,
                                               row_set rows)
{
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bool updates = rows.has(m, half);
            float row_max = m_rmem[m][half];
#pragma unroll
            for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &s = S_rmem[m][n][2 * half + e];
                    s *= updates && !IS_PRESCALED ? scale : 1.0f;
                    row_max = fmaxf(row_max, s + MAX_OFFSET);
                }
            row_max = quad_max(row_max);
            if (!updates)
                row_max = m_rmem[m][half];

            set_row_max(O_rmem, l_rmem, m_rmem, m, half, row_max);
        }
}

/* With weights in e4m3, which saturate: m is the row max so far, rounded up to an integer. So O and
 * l are rescaled by powers of two, and a weight has the same bits whatever the tiles, their order
 * and the splits, unless it is subnormal. Where no row of the warp has a new m, which is where most
 * tiles are, nothing crosses lanes. scale is above 0. */
__device__ __forceinline__ void
follow_row_max(float (&O_rmem)[M_FRAGS][O_FRAGS][4], float (&l_rmem)[M_FRAGS][2],
               float (&m_rmem)[M_FRAGS][2], const float (&S_rmem)[M_FRAGS][S_FRAGS][4], float scale)
{
    float row_max[M_FRAGS][2];
    bool grew = false;
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float s_max = -INF;
#pragma unroll
            for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    s_max = fmaxf(s_max, S_rmem[m][n][2 * half + e]);
            row_max[m][half] = fmaf(s_max, scale, MAX_OFFSET);
            grew |= row_max[m][half] > m_rmem[m][half];
        }
    if (!__any_sync(0xffffffff, grew))
        return;
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float raised = quad_max(fmaxf(m_rmem[m][half], ceilf(row_max[m][half])));
            set_row_max(O_rmem, l_rmem, m_rmem, m, half, raised);
        }
}

/* Where SCORES_RISE: the rows whose m is to rise for these scores. Until then it stays below their
 * max, MAX_OFFSET included, by no more than what 16 bits hold. */
__device__ __forceinline__ row_set rows_that_grew(const float (&S_rmem)[M_FRAGS][S_FRAGS][4],
                                                  const float (&m_rmem)[M_FRAGS][2], float scale)
{
    const float row_scale = IS_PRESCALED ? 1.0f : scale;
    constexpr float MAX_GROWTH = IS_BF16 ? 64.0f : 8.0f;
    unsigned rows = 0;
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float row_max = -INF;
#pragma unroll
            for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    row_max = fmaxf(row_max, S_rmem[m][n][2 * half + e] * row_scale);
            const bool grew = row_max + (MAX_OFFSET - MAX_GROWTH) > m_rmem[m][half];
            rows |= grew << (2 * m + half);
        }
    return {quad_or(rows)};
}

/* The online softmax in the rows that grew, which are returned. */
__device__ __forceinline__ row_set raise_row_max(float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                                 float (&l_rmem)[M_FRAGS][2],
                                                 float (&m_rmem)[M_FRAGS][2],
                                                 float (&S_rmem)[M_FRAGS][S_FRAGS][4], float scale)
{
    const row_set rows = rows_that_grew(S_rmem, m_rmem, scale);
    if (__any_sync(0xffffffff, rows.bits))
        update_row_max(O_rmem, l_rmem, m_rmem, S_rmem, scale, rows);
    return rows;
}

__device__ __forceinline__ void guess_missing_row_max(float (&m_rmem)[M_FRAGS][2])
{
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (m_rmem[m][half] == NO_KEY_YET)
                m_rmem[m][half] = GUESSED_MAX;
}

/* m rises in the rows with a large sum, by the largest of its lanes. A sum of inf becomes NaN. */
__device__ __forceinline__ void raise_row_max_by_sums(float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                                      float (&l_rmem)[M_FRAGS][2],
                                                      float (&m_rmem)[M_FRAGS][2])
{
    float largest = 0.0f;
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
        largest = fmaxf(largest, fmaxf(l_rmem[m][0], l_rmem[m][1]));
    if (!__any_sync(0xffffffff, largest > LARGE_SUM))
        return;
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = quad_max(l_rmem[m][half]);
            const float raised = m_rmem[m][half] + (sum > LARGE_SUM ? log2_approx(sum) : 0.0f);
            set_row_max(O_rmem, l_rmem, m_rmem, m, half, raised);
        }
}

#endif
