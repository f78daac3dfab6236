/* Softmax over the keys, sub-tile by sub-tile, in powers of two: p = 2^(s * scale_log2 - m).
 *
 * m need not be the maximum so far, it only has to keep p in range: any m cancels in the end. So
 * the fast tiles take m from the careful ones, and nobody looks for a maximum, rescales or
 * branches. At the end, out_of_range() tells whether that was enough. A sum is never too small: m
 * belongs to a key that the row has seen. */
#ifndef FA_SOFTMAX_CUH
#define FA_SOFTMAX_CUH

#include "forward_block.cuh"
#include "sink.cuh"

/* m lies so far above the maximum that the sum of 2^16 of the largest bf16 values is still in the
 * range of fp32. bf16 has exponents to spare for p; those of fp16 are few, and its values small. */
constexpr float ABOVE_MAXIMUM = IS_BF16 ? 16.0f : 0.0f;

/* The m of a row that has not seen any key. Finite, so that nothing becomes NaN: a hidden key
 * (-inf) has p = 0, and a visible one, where m stays as it is, a p of +inf: out of range. */
constexpr float NO_KEY_YET = -3.4028234e38f;

/* A thread's sum of exponentials may reach this: bf16 and fp32 hold the numbers up to 2^128, and
 * down to 2^-126, as 1 / l of four such sums has to be. */
constexpr float SUM_LIMIT = 1.329228e36f; /* 2^120 */

/* A row's m is the maximum of at least so many keys, if it sees as many. In bf16 a later p may be
 * 2^136 times that of the first key; fp16, with 2^16, is better off with the maximum of a tile. */
constexpr int START_KEYS = IS_BF16 ? 1 : TILE_N;

/* Sets of rows: of a lane, whose row of fragment m and half h is bit 2 * m + h, and of a warp, four
 * bits for each quad, whose lanes share their rows. */
__device__ __forceinline__ unsigned rows_of_lane(unsigned rows_of_warp)
{
    return rows_of_warp >> read_thread_index() % 32 / 4 * 4;
}

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

/* The rows of this lane that raise m at the tile whose first key is `key`, having seen fewer than
 * START_KEYS keys before: those at their right edge, or where SPLIT at that of their part, before
 * the key `part_end`. */
__device__ __forceinline__ unsigned rows_at_edge(const forward_block &block, int row, int key,
                                                 int part_end)
{
    unsigned rows = 0;
#pragma unroll
    for (int r = 0; r < 2 * M_FRAGS; r++)
        rows |= ((SPLIT && part_end < key + TILE_N + START_KEYS) ||
                 block.keys_of(row + 8 * r).end < key + TILE_N + START_KEYS)
                << r;
    return rows;
}

/* P = 2^(S * scale - m), in the layout of the A operand of the next mma, and l += its row sums. The
 * rows of the set `scaled` are that already. */
template <class F>
__device__ __forceinline__ void
exponentials(unsigned (&P_rmem)[M_FRAGS][S_FRAGS / 2][4], float (&l_rmem)[M_FRAGS][2],
             const float (&S_rmem)[M_FRAGS][S_FRAGS][4], const float (&m_rmem)[M_FRAGS][2],
             float scale, unsigned scaled, F coords_of)
{
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) { /* row g, then row g + 8 */
            const float row_scale = scaled >> 2 * m + half & 1 ? 1.0f : scale;
#pragma unroll
            for (int n = 0; n < S_FRAGS; n++) {
                const float p0 = exp2_approx(S_rmem[m][n][2 * half] * row_scale - m_rmem[m][half]);
                const float p1 =
                    exp2_approx(S_rmem[m][n][2 * half + 1] * row_scale - m_rmem[m][half]);
                l_rmem[m][half] += p0 + p1;
                const int row = 16 * m + 8 * half, key = 8 * n;
                const float weight0 = dropout(p0, coords_of(row, key));
                const float weight1 = dropout(p1, coords_of(row, key + 1));
                P_rmem[m][n / 2][n % 2 * 2 + half] = pack(weight0, weight1);
            }
        }
}

/* The rows of this lane, or of all of its warp, with a sum or a value that is inf, NaN, or large
 * enough to have been. */
__device__ __forceinline__ unsigned out_of_range(const float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                                 const float (&l_rmem)[M_FRAGS][2])
{
    unsigned rows = 0;
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bool out = !(l_rmem[m][half] < SUM_LIMIT);
#pragma unroll
            for (int n = 0; n < O_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    out |= !(fabsf(O_rmem[m][n][2 * half + e]) < INF);
            rows |= out << 2 * m + half;
        }
    rows <<= read_thread_index() % 32 / 4 * 4;
    if (HEAD_DIM_V > 128) /* as in query_place: what all of the warp have takes no register */
        return __reduce_or_sync(0xffffffff, rows);
    rows |= __shfl_xor_sync(0xffffffff, rows, 1);
    return rows | __shfl_xor_sync(0xffffffff, rows, 2);
}

/* l += the sink's p. A sink far above m would be out of range: m rises to it, and what was computed
 * with the m before has to be multiplied by the factor that is returned. A row without keys stays
 * without a sum. A sink of -inf changes nothing, to the bit: no branch asks whether there is one,
 * because the compiler would then write all that follows twice. */
__device__ __forceinline__ float add_sink(float &l, float &m, float sink)
{
    const float raised = fmaxf(m, sink * LOG2_E);
    const float rescale = exp2_approx(m - raised);
    l = l == 0.0f ? 0.0f : l * rescale + exp2_approx(sink * LOG2_E - raised);
    m = raised;
    return rescale;
}

/* In the rows of the set, S = S * scale, and m = the maximum of what it was and S; O and l follow.
 * S is rounded here, and not within an FMA, so that p of the maximum is a power of two. */
__device__ __forceinline__ void raise_max(float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                          float (&l_rmem)[M_FRAGS][2], float (&m_rmem)[M_FRAGS][2],
                                          float (&S_rmem)[M_FRAGS][S_FRAGS][4], float scale,
                                          unsigned rows)
{
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bool raises = rows >> 2 * m + half & 1;
            float row_max = m_rmem[m][half];
#pragma unroll
            for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &s = S_rmem[m][n][2 * half + e];
                    s *= raises ? scale : 1.0f;
                    row_max = fmaxf(row_max, s + ABOVE_MAXIMUM);
                }
            /* The four lanes of a quad share the row. */
            row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffff, row_max, 1));
            row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffff, row_max, 2));
            if (!raises)
                row_max = m_rmem[m][half];

            const float rescale = exp2_approx(m_rmem[m][half] - row_max);
            m_rmem[m][half] = row_max;
            l_rmem[m][half] *= rescale;
#pragma unroll
            for (int n = 0; n < O_FRAGS; n++) {
                O_rmem[m][n][2 * half] *= rescale;
                O_rmem[m][n][2 * half + 1] *= rescale;
            }
        }
}

#endif
