/* New rows of K and V to their slots in caches of pages: slot s is row s % page_size of page
 * s / page_size.
 *
 * A block has a token: its row of K and its row of V, of all heads. A token whose slot the caches
 * have not, as one of padding, is dropped.
 *
 * Constants: DTYPE; KV_E4M3: the caches are e4m3, and rows are divided by a factor. */
#include "params.h"

#include "division.cuh"
#include "kv_cache.cuh"

constexpr int THREADS = FA_APPEND_THREADS;

/* Eight elements of a row. */
__device__ __forceinline__ void copy_chunk(const element *from, element *to, const fa_descale &)
{
    *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
}
__device__ __forceinline__ void copy_chunk(const element *from, unsigned char *to,
                                           const fa_descale &descale)
{
    const uint4 words = *reinterpret_cast<const uint4 *>(from);
    const float2 x[] = {unpack(words.x), unpack(words.y), unpack(words.z), unpack(words.w)};
    *reinterpret_cast<uint2 *>(to) =
        narrow_chunk({x[0].x, x[0].y, x[1].x, x[1].y, x[2].x, x[2].y, x[3].x, x[3].y},
                     load_descale(descale, 0, 0));
}

__device__ __forceinline__ void copy_row(const void *rows, const fa_strides &stride, int token,
                                         void *cache, const fa_strides &cache_stride, divided slot,
                                         int heads, const fa_divisor &chunks,
                                         const fa_descale &descale)
{
    const element *from = static_cast<const element *>(rows) + token * stride.seqlen;
    cache_element *to = static_cast<cache_element *>(cache) + slot.quotient * cache_stride.batch +
                        slot.rest * cache_stride.seqlen;
    for (int i = threadIdx.x; i < heads * chunks.number; i += THREADS) {
        const auto [head, chunk] = divide(i, chunks);
        const int first = chunk * CHUNK_ELEMENTS;
        copy_chunk(from + head * stride.head + first, to + head * cache_stride.head + first,
                   descale);
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
             params.heads, params.chunks, params.k_descale);
    copy_row(params.v, params.v_stride, token, params.v_cache, params.v_cache_stride, slot,
             params.heads, params.chunks_v, params.v_descale);
}
