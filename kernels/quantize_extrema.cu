/* Sums and extrema over the tokens of a chunk, for the mean and the scale of a head.
 *
 * A block has a chunk of a head. Its threads have a dim and every n-th token each, and their
 * results are added in order: bits depend on seqlen and head dim, and on nothing else.
 *
 * Constants:
 *   DTYPE   enum fa_dtype in params.h: of x
 *   HEAD_DIM */
#include "params.h"

#include "quantize.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_extrema(const __grid_constant__ fa_quantize_params params)
{
    __shared__ float sums[THREADS], leasts[THREADS], largests[THREADS];
    const quantize_block block(params, params.chunks);
    const int dim = threadIdx.x % HEAD_DIM, first = threadIdx.x / HEAD_DIM;
    const int step = THREADS / HEAD_DIM; /* tokens that the block reads at a time */
    const int begin = block.index * params.chunk, end = min(begin + params.chunk, params.seqlen);
    const element *x = block.x + dim;
    const float infinity = __int_as_float(0x7f800000);
    chunk_extrema own = {0, infinity, -infinity};
    if (first < step)
        for (int token = begin + first; token < end; token += step) {
            const float value = unpack(x[token * params.x_stride.seqlen]).x;
            own.sum += value;
            own.least = nan_min(own.least, value);
            own.largest = nan_max(own.largest, value);
        }
    sums[threadIdx.x] = own.sum;
    leasts[threadIdx.x] = own.least;
    largests[threadIdx.x] = own.largest;
    __syncthreads();
    if (first)
        return;
    for (int i = 1; i < step; i++) {
        own.sum += sums[i * HEAD_DIM + dim];
        own.least = nan_min(own.least, leasts[i * HEAD_DIM + dim]);
        own.largest = nan_max(own.largest, largests[i * HEAD_DIM + dim]);
    }
    const long long chunk = block.number * params.chunks + block.index;
    params.extrema[chunk * HEAD_DIM + dim] = own;
}
