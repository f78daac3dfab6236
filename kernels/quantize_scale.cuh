/* Quantisers: scales in fp32, of what a block has. */
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

#endif
