/* The bias for the rows that a lane of the forward has. */
#ifndef FA_ROW_BIAS_CUH
#define FA_ROW_BIAS_CUH

#include "bias.cuh"
#include "forward_block.cuh"

/* As it lies in memory, beside S: loaded before the product that computes S, which hides the time
 * that takes. Two keys a lane are adjacent. */
struct bias_fragments {
    bias_pair pair[M_FRAGS][S_FRAGS][2];
};

struct row_bias {
    const bias_element *rows[2 * M_FRAGS]; /* 8 apart, as those of the lane */
    int last_key;

    __device__ __forceinline__ explicit row_bias(const forward_block &block)
    {
        if (!BIAS)
            return;
        last_key = block.seq.seqlen_k() - 1;
#pragma unroll
        for (int i = 0; i < 2 * M_FRAGS; i++) {
            /* Rows after the last one have no bias: any that exists will do. */
            const int row = min(block.lane_row + 8 * i, block.last_row);
            rows[i] = bias_row(block.params, block.seq.batch, block.head + block.head_of(row),
                               block.query_of(row));
        }
    }

    template <class F> static __device__ __forceinline__ void for_each_pair(F f)
    {
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
            for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    f(m, n, half);
    }

    /* `key`: that of S[0][0][0]. TAIL: keys after the last one, which are masked, get a bias of one
     * before them; of pairs there are as many as fill the keys. */
    template <bool TAIL> __device__ __forceinline__ void load(bias_fragments &loaded, int key) const
    {
        if (!BIAS)
            return;
        for_each_pair([&](int m, int n, int half) {
            const bias_element *row = rows[2 * m + half];
            const int k = key + 8 * n;
            loaded.pair[m][n][half] =
                BIAS_PAIRS ? ld_global_pair(row + (TAIL ? min(k, last_key - 1) : k))
                           : bias_pair_of(ld_global(row + (TAIL ? min(k, last_key) : k)),
                                          ld_global(row + (TAIL ? min(k + 1, last_key) : k + 1)));
        });
    }

    __device__ __forceinline__ void add_to(float (&S)[M_FRAGS][S_FRAGS][4],
                                           const bias_fragments &loaded, float scale) const
    {
        if (!BIAS)
            return;
        for_each_pair([&](int m, int n, int half) {
            const float2 bias = bias_to_floats(loaded.pair[m][n][half]);
            float *s = S[m][n] + 2 * half;
            s[0] = fmaf(bias.x, LOG2_E, ALIBI ? s[0] : s[0] * scale);
            s[1] = fmaf(bias.y, LOG2_E, ALIBI ? s[1] : s[1] * scale);
        });
    }
};

#endif
