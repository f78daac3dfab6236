/* The cap of scores: c * tanh(s / c). */
#ifndef FA_SOFTCAP_CUH
#define FA_SOFTCAP_CUH

/* S = tanh(S * scale): what is left of a capped score is a factor, which scale_log2 holds. tanhf()
 * takes two steps of the special functions, where tanh.approx takes one: but that is off by 2^-11,
 * and a cap of 50 makes 2% of p of it. */
template <int ROW_FRAGS, int COLUMN_FRAGS>
__device__ __forceinline__ void cap(float (&S)[ROW_FRAGS][COLUMN_FRAGS][4], float scale)
{
#pragma unroll
    for (int m = 0; m < ROW_FRAGS; m++)
#pragma unroll
        for (int n = 0; n < COLUMN_FRAGS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                S[m][n][e] = tanhf(S[m][n][e] * scale);
}

#endif
