/* Sums and extrema over the tokens of a chunk, for the means and the scales of heads.
 *
 * A block has a chunk of a head. Each of its threads adds every n-th token of 16 dims, then these
 * sums are added in a tree: bits depend on seqlen and head dim, and on nothing else, and are those
 * of flash_attn_sm120/quantized/mean.py. Constants: see quantize.cuh. */
#include "params.h"

#include "quantize_vector.cuh"

__shared__ float shared[VECTOR][THREADS];

__device__ __forceinline__ float add(float a, float b) { return a + b; }

constexpr int power_of_two_from(int least)
{
    int x = 1;
    while (x < least)
        x *= 2;
    return x;
}

template <class kind> struct chunk_statistics {
    enum : int { ROWS = THREADS / kind::VECTORS }; /* tokens that the block reads at a time */

    static __device__ __forceinline__ unsigned blocks(const fa_quantize_operand &x)
    {
        return head_count(x) * x.chunks;
    }

    /* Of all rows into `out`, [dim]. */
    template <class F>
    static __device__ __forceinline__ void combine(float *out, const float (&x)[VECTOR], F op)
    {
        const int row = threadIdx.x / kind::VECTORS;
        __syncthreads();
        for (int i = 0; i < VECTOR; i++)
            shared[i][threadIdx.x] = x[i];
        for (int half = power_of_two_from(ROWS) / 2; half; half /= 2) {
            __syncthreads();
            if (row < half && row + half < ROWS)
                for (int i = 0; i < VECTOR; i++)
                    shared[i][threadIdx.x] =
                        op(shared[i][threadIdx.x], shared[i][threadIdx.x + half * kind::VECTORS]);
        }
        if (!row)
            for (int i = 0; i < VECTOR; i++)
                out[threadIdx.x * VECTOR + i] = shared[i][threadIdx.x];
    }

    static __device__ __forceinline__ void run(const fa_quantize_operand &x, unsigned block)
    {
        const head_part part(x, block, x.chunks);
        const int row = threadIdx.x / kind::VECTORS;
        const int dim = threadIdx.x % kind::VECTORS * VECTOR;
        const int begin = part.index * x.chunk, end = min(begin + x.chunk, x.seqlen);
        const float infinity = __int_as_float(0x7f800000);
        float sum[VECTOR], least[VECTOR], largest[VECTOR];
        for (int i = 0; i < VECTOR; i++) {
            sum[i] = 0;
            least[i] = infinity;
            largest[i] = -infinity;
        }
        for (int first = begin; first < end; first += ROWS) {
            const int token = first + row;
            const bool exists = row < ROWS && token < end;
            float values[VECTOR];
            widen<kind>(values, load_vector(x, part, token, dim, exists));
            if (exists)
                for (int i = 0; i < VECTOR; i++) {
                    sum[i] += values[i];
                    least[i] = min_or_nan(least[i], values[i]);
                    largest[i] = max_or_nan(largest[i], values[i]);
                }
        }
        float *out = x.statistics + static_cast<fa_int64>(block) * 3 * kind::DIM;
        combine(out, sum, add);
        combine(out + kind::DIM, least, min_or_nan);
        combine(out + 2 * kind::DIM, largest, max_or_nan);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_statistics(const __grid_constant__ fa_quantize_params params)
{
    using of_q = chunk_statistics<operand_kind<FORMAT_16BIT, HEAD_DIM, ROTATION, false>>;
    using of_v = chunk_statistics<operand_kind<FORMAT_16BIT, HEAD_DIM_V, 1, true>>;
    run_block<of_q, of_q, of_v>(params, blockIdx.x);
}
