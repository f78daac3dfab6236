/* Q, K and V to int8 or e4m3, K without its mean: rounding by rounding what
 * flash_attn_sm120/quantized/quantize.py does on the CPU.
 *
 * A block has `rows` tokens of a head. The chunks of quantize_extrema.cu are added in
 * order by every block of a head; the first one writes the mean and the scale of the head.
 *
 * Constants:
 *   DTYPE   enum fa_dtype in params.h: of x
 *   HEAD_DIM
 *   INT8    1: to int8, a scale for the rows of a block. 0: to e4m3, one per head */
#include "params.h"

#include "quantize.cuh"

__shared__ float means[THREADS];
__shared__ float largests[THREADS];

/* The largest of all threads. */
__device__ __forceinline__ float block_max(float x)
{
    largests[threadIdx.x] = x;
    for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            largests[threadIdx.x] = nan_max(largests[threadIdx.x], largests[threadIdx.x + half]);
    }
    __syncthreads();
    return largests[0];
}

/* 1 where all elements are 0. */
__device__ __forceinline__ float scale_of(float largest, float code)
{
    const float scale = largest / code;
    return scale == 0 ? 1 : scale;
}

/* The mean of this thread's dim into `means`; the largest |x - mean| of it. */
__device__ __forceinline__ float summarise(const fa_quantize_params &params,
                                           const quantize_block &block)
{
    const int dim = threadIdx.x;
    means[dim] = 0;
    if (!params.extrema || dim >= HEAD_DIM)
        return 0;
    const long long first = block.number * params.chunks;
    const chunk_extrema *chunk = params.extrema + first * HEAD_DIM + dim;
    chunk_extrema all = *chunk;
    for (int i = 1; i < params.chunks; i++) {
        chunk += HEAD_DIM;
        all.sum += chunk->sum;
        all.least = nan_min(all.least, chunk->least);
        all.largest = nan_max(all.largest, chunk->largest);
    }
    if (params.mean) {
        means[dim] = all.sum / static_cast<float>(params.seqlen);
        if (!block.index)
            params.mean[block.number * HEAD_DIM + dim] = means[dim];
    }
    /* x - mean rounds monotonically: its largest size is that of an extreme. */
    return nan_max(fabsf(all.least - means[dim]), fabsf(all.largest - means[dim]));
}

/* The element i of the block's rows, dims first. */
__device__ __forceinline__ float value_of(const fa_quantize_params &params, const element *x, int i)
{
    const int row = i / HEAD_DIM, dim = i % HEAD_DIM;
    return unpack(x[row * params.x_stride.seqlen + dim]).x - means[dim];
}

__device__ __forceinline__ int int8_code(float x)
{
    const float code = fminf(fmaxf(rintf(x), -127), 127);
    return x == x ? static_cast<int>(code) & 0xff : 0;
}

__device__ __forceinline__ unsigned codes_of(const float (&x)[4])
{
    if (!INT8)
        return pack_e4m3(x);
    unsigned codes = 0;
    for (int i = 0; i < 4; i++)
        codes |= static_cast<unsigned>(int8_code(x[i])) << 8 * i;
    return codes;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize(const __grid_constant__ fa_quantize_params params)
{
    const unsigned blocks = (params.seqlen + params.rows - 1) / params.rows;
    const quantize_block block(params, blocks);
    const int begin = block.index * params.rows;
    const int elements = min(params.rows, params.seqlen - begin) * HEAD_DIM;
    const element *x = block.x + begin * params.x_stride.seqlen;
    float largest = summarise(params, block);
    __syncthreads();
    if (INT8) {
        largest = 0;
        for (int i = threadIdx.x; i < elements; i += THREADS)
            largest = nan_max(largest, fabsf(value_of(params, x, i)));
    }
    const float scale = scale_of(block_max(largest), INT8 ? 127.f : 448.f);
    if (!threadIdx.x && INT8)
        params.scale[block.number * blocks + block.index] = scale;
    if (!threadIdx.x && !INT8 && !block.index)
        params.scale[block.number] = scale;
    const long long first_row = static_cast<long long>(block.batch) * params.seqlen + begin;
    unsigned *words = static_cast<unsigned *>(params.data);
    for (int i = 4 * threadIdx.x; i < elements; i += 4 * THREADS) {
        float codes[4];
        for (int j = 0; j < 4; j++)
            codes[j] = value_of(params, x, i + j) / scale;
        const int row = i / HEAD_DIM, dim = i % HEAD_DIM;
        const long long row_of_heads = (first_row + row) * params.heads + block.head;
        words[(row_of_heads * HEAD_DIM + dim) / 4] = codes_of(codes);
    }
}
