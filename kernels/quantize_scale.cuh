/* Quantisers: the means and the scales in fp32. */
#ifndef FA_QUANTIZE_SCALE_CUH
#define FA_QUANTIZE_SCALE_CUH

#include "quantize.cuh"

__shared__ float largest_of_thread[THREADS];

/* The largest of all threads; NaN where one is. */
__device__ __forceinline__ float block_max(float x)
{
    largest_of_thread[threadIdx.x] = x;
    for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            largest_of_thread[threadIdx.x] =
                max_or_nan(largest_of_thread[threadIdx.x], largest_of_thread[threadIdx.x + half]);
    }
    __syncthreads();
    return largest_of_thread[0];
}

/* What takes `largest` to `code`; 1 where all elements are 0. */
__device__ __forceinline__ float scale_of(float largest, float code)
{
    const float scale = largest / code;
    return scale == 0 ? 1 : scale;
}

/* The mean and the scale of a head, from the statistics of its chunks, added in order. A thread has
 * a dim. */
template <class kind>
__device__ __forceinline__ void finish_head(const fa_quantize_operand &x, const block_work &work)
{
    const int dim = threadIdx.x;
    float size = 0;
    if (dim < kind::DIM) {
        const float *chunk = x.statistics + work.first_dim(kind::DIM) * x.chunks * 3 + dim;
        float sum = 0, least = chunk[kind::DIM], largest = chunk[2 * kind::DIM], mean = 0;
#pragma unroll 8 /* whose loads wait together */
        for (int i = 0; i < x.chunks; i++, chunk += 3 * kind::DIM) {
            sum += chunk[0];
            least = min_or_nan(least, chunk[kind::DIM]);
            largest = max_or_nan(largest, chunk[2 * kind::DIM]);
        }
        if (x.mean) {
            mean = sum / static_cast<float>(x.seqlen);
            x.mean[work.first_dim(kind::DIM) + dim] = mean;
        }
        /* x - mean rounds monotonically: its largest size is that of an extreme. */
        size = max_or_nan(fabsf(least - mean), fabsf(largest - mean));
    }
    const float scale = scale_of(block_max(size), x.head_largest);
    if (!dim && x.head_scale)
        x.head_scale[work.head_number] = scale;
}

#endif
