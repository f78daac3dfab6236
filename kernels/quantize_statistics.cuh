/* Quantisers: sums and extrema over the tokens of a chunk, for the means and the scales of heads.
 *
 * Each thread adds every n-th token of 16 dims, then these sums are added in a tree: bits depend on
 * seqlen and head dim, and on nothing else, and are those of flash_attn_sm120/quantized/mean.py. */
#ifndef FA_QUANTIZE_STATISTICS_CUH
#define FA_QUANTIZE_STATISTICS_CUH

#include "quantize_vector.cuh"

__device__ __forceinline__ float add(float a, float b) { return a + b; }

constexpr int power_of_two_from(int least)
{
    int x = 1;
    while (x < least)
        x *= 2;
    return x;
}

/* Of all rows of threads, into `out`, [dim]. */
template <class kind, class F>
__device__ __forceinline__ void combine(float *out, const float (&x)[VECTOR], F op)
{
    constexpr int ROWS = THREADS / kind::VECTORS;
    const int thread = threadIdx.x, row = thread / kind::VECTORS;
    __syncthreads();
    for (int i = 0; i < VECTOR; i++)
        shared.of_thread[i][thread] = x[i];
    for (int half = power_of_two_from(ROWS) / 2; half; half /= 2) {
        __syncthreads();
        if (row < half && row + half < ROWS)
            for (int i = 0; i < VECTOR; i++)
                shared.of_thread[i][thread] =
                    op(shared.of_thread[i][thread],
                       shared.of_thread[i][thread + half * kind::VECTORS]);
    }
    if (!row)
        for (int i = 0; i < VECTOR; i++)
            out[thread * VECTOR + i] = shared.of_thread[i][thread];
}

template <class kind>
__device__ __forceinline__ void add_up_chunk(const fa_quantize_operand &x, const block_work &work)
{
    constexpr int ROWS = THREADS / kind::VECTORS;       /* tokens that the block reads at a time */
    constexpr int AT_ONCE = kind::HADAMARD > 1 ? 2 : 4; /* as registers allow */
    const int row = threadIdx.x / kind::VECTORS;
    const int dim = threadIdx.x % kind::VECTORS * VECTOR;
    const int begin = work.index * x.chunk, end = min(begin + x.chunk, x.seqlen);
    const float infinity = __int_as_float(0x7f800000);
    float sum[VECTOR], least[VECTOR], largest[VECTOR];
    for (int i = 0; i < VECTOR; i++) {
        sum[i] = 0;
        least[i] = infinity;
        largest[i] = -infinity;
    }
#pragma unroll AT_ONCE
    for (int first = begin; first < end; first += ROWS) {
        const int token = first + row;
        const bool exists = row < ROWS && token < end;
        float values[VECTOR];
        widen<kind>(values, load_vector(x, work, token, dim, exists));
        if (exists)
            for (int i = 0; i < VECTOR; i++) {
                sum[i] += values[i];
                least[i] = min_or_nan(least[i], values[i]);
                largest[i] = max_or_nan(largest[i], values[i]);
            }
    }
    float *out = x.statistics + (work.first_dim(kind::DIM) * x.chunks + work.index * kind::DIM) * 3;
    combine<kind>(out, sum, add);
    combine<kind>(out + kind::DIM, least, min_or_nan);
    combine<kind>(out + 2 * kind::DIM, largest, max_or_nan);
}

#endif
