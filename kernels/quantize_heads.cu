/* The means and the scales of heads, from the statistics of their chunks, added in order.
 *
 * A block has a head, a thread a dim of it. Constants: see quantize.cuh. */
#include "params.h"

#include "quantize_scale.cuh"

template <int DIM> struct head_summary {
    static __device__ __forceinline__ unsigned blocks(const fa_quantize_operand &x)
    {
        return x.chunks ? head_count(x) : 0;
    }

    static __device__ __forceinline__ void run(const fa_quantize_operand &x, unsigned head)
    {
        const int dim = threadIdx.x;
        const fa_int64 first = static_cast<fa_int64>(head) * x.chunks * 3 * DIM + dim;
        float size = 0;
        if (dim < DIM) {
            const float *chunk = x.statistics + first;
            float sum = 0, least = chunk[DIM], largest = chunk[2 * DIM], mean = 0;
            for (int i = 0; i < x.chunks; i++, chunk += 3 * DIM) {
                sum += chunk[0];
                least = min_or_nan(least, chunk[DIM]);
                largest = max_or_nan(largest, chunk[2 * DIM]);
            }
            if (x.mean) {
                mean = sum / static_cast<float>(x.seqlen);
                x.mean[static_cast<fa_int64>(head) * DIM + dim] = mean;
            }
            /* x - mean rounds monotonically: its largest size is that of an extreme. */
            size = max_or_nan(fabsf(least - mean), fabsf(largest - mean));
        }
        const float scale = scale_of(block_max(size), x.head_largest);
        if (!dim && x.head_scale)
            x.head_scale[head] = scale;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_heads(const __grid_constant__ fa_quantize_params params)
{
    using of_q = head_summary<HEAD_DIM>;
    run_block<of_q, of_q, head_summary<HEAD_DIM_V>>(params, blockIdx.x);
}
