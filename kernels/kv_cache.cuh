/* Rows of K and V on their way to a cache.
 *
 *   KV_E4M3   1: the cache is e4m3, and what goes to it is divided by a factor */
#ifndef FA_KV_CACHE_CUH
#define FA_KV_CACHE_CUH

#include "descale.cuh"

template <bool IS_E4M3> struct cached {
    using type = element;
};
template <> struct cached<true> {
    using type = unsigned char;
};
using cache_element = cached<KV_E4M3>::type;

/* Eight elements of a row, as they go to a cache. */
__device__ __forceinline__ uint2 narrow_chunk(const float (&x)[CHUNK_ELEMENTS], float descale)
{
    float scaled[2][4];
#pragma unroll
    for (int e = 0; e < CHUNK_ELEMENTS; e++)
        scaled[e / 4][e % 4] = x[e] * (1.0f / descale);
    return make_uint2(pack_e4m3(scaled[0]), pack_e4m3(scaled[1]));
}

#endif
