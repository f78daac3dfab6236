/* New rows of K and V to their slots in caches of pages: slot s is row s % page_size of page
 * s / page_size.
 *
 * A block has a token: its row of K and its row of V, of all heads. A token whose slot the caches
 * have not, as one of padding, is dropped.
 *
 * Constants: DTYPE. */
#include "params.h"

#include "division.cuh"
#include "element.cuh"
#include "ptx.cuh"

constexpr int THREADS = FA_APPEND_THREADS;

__device__ __forceinline__ void copy_row(const void *rows, const fa_strides &stride, int token,
                                         void *cache, const fa_strides &cache_stride, divided slot,
                                         int heads, const fa_divisor &chunks)
{
    const element *from = static_cast<const element *>(rows) + token * stride.seqlen;
    element *to = static_cast<element *>(cache) + slot.quotient * cache_stride.batch +
                  slot.rest * cache_stride.seqlen;
    for (int i = threadIdx.x; i < heads * chunks.number; i += THREADS) {
        const auto [head, chunk] = divide(i, chunks);
        const int first = chunk * CHUNK_ELEMENTS;
        *reinterpret_cast<uint4 *>(to + head * cache_stride.head + first) =
            *reinterpret_cast<const uint4 *>(from + head * stride.head + first);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    kv_scatter(const __grid_constant__ struct fa_scatter_params params)
{
    const int token = blockIdx.x;
    const int number = ld_global(params.slots + token * params.slot_stride);
    if (number < 0 || number >= params.slot_count)
        return;
    const divided slot = divide(number, params.page_size);
    copy_row(params.k, params.k_stride, token, params.k_cache, params.k_cache_stride, slot,
             params.heads, params.chunks);
    copy_row(params.v, params.v_stride, token, params.v_cache, params.v_cache_stride, slot,
             params.heads, params.chunks_v);
}
