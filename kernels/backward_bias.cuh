/* The bias of S^T, and its gradient, which is dS before the scale. */
#ifndef FA_BACKWARD_BIAS_CUH
#define FA_BACKWARD_BIAS_CUH

#include "backward_tile.cuh"
#include "bias.cuh"

/* Of S^T [WARP_N, SUB_M], in powers of two: of pairs that do not exist 0. `key` and `query` are
 * those of B[0][0][0]. */
__device__ __forceinline__ void load_bias(float (&B)[N_FRAGS][M_FRAGS][4],
                                          const sequence<fa_backward_params> &seq, int head,
                                          int key, int query)
{
    const bias_element *bias = bias_row(seq.params, seq.batch, head, query) + key;
    for_each_score(B, [&](float &b, int row, int column) {
        const bool exists = key + row < seq.seqlen_k() && query + column < seq.seqlen_q();
        const fa_int64 at = column * seq.params.bias.stride.seqlen + row;
        b = exists ? bias_to_float(ld_global(bias + at)) * LOG2_E : 0.0f;
    });
}

/* Adds dS^T of a sub-tile to the gradient, which is zero where nothing is added. Queries that share
 * a bias are first summed up in the warp. */
__device__ __forceinline__ void add_to_dbias(const float (&dS)[N_FRAGS][M_FRAGS][4],
                                             const sequence<fa_backward_params> &seq, int head,
                                             int key, int query)
{
    const fa_backward_params &params = seq.params;
    const fa_strides &stride = params.dbias_stride;
    const float scale = (DROPOUT ? params.dropout.scale : 1.0f) / (P_SCALE * TENSOR_REPEAT);
    float *dbias =
        params.dbias + seq.batch * stride.batch + head * stride.head + query * stride.seqlen + key;
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = 16 * n + 8 * half;
            const bool exists = key + row < seq.seqlen_k();
            float sum = 0.0f;
#pragma unroll
            for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = 8 * m + e;
                    const float ds = dS[n][m][2 * half + e] * scale;
                    if (!stride.seqlen)
                        sum += ds;
                    else if (ds != 0.0f && exists && query + column < seq.seqlen_q())
                        red_add(dbias + column * stride.seqlen + row, ds);
                }
            if (!stride.seqlen) {
                sum = quad_sum(sum);
                if (exists && quad_lane() == 0)
                    red_add(dbias + row, sum);
            }
        }
}

#endif
