/* Quantised attention: infinities and NaN of V in tiles of which not every query sees every key, as
 * the product would multiply them by a weight of 0. V in e2m1 has none. */
#ifndef FA_QUANTIZED_NONFINITE_CUH
#define FA_QUANTIZED_NONFINITE_CUH

#include "quantized_ring.cuh"

constexpr int V_ELEMENT_BYTES = IS_V_E4M3 ? 1 : 2;
constexpr unsigned V_ELEMENT_MASK = IS_V_E4M3 ? 0xff : 0xffff;
constexpr unsigned V_NONFINITE = IS_V_E4M3             ? 0x7f
                                 : DTYPE == FA_FLOAT16 ? 0x7c00
                                                       : 0x7f80; /* bits that all are set then */

/* Those of a word that are finite; zeros for the others. */
__device__ __forceinline__ unsigned finite(unsigned word)
{
    unsigned x = word;
#pragma unroll
    for (int bit = 0; bit < 32; bit += 8 * V_ELEMENT_BYTES)
        if ((word >> bit & V_NONFINITE) == V_NONFINITE)
            x &= ~(V_ELEMENT_MASK << bit);
    return x;
}

/* Calls f(address of a word, word) for this thread's share of the tile. */
template <class F> __device__ __forceinline__ void each_word(unsigned V_tile, F f)
{
    V_place().each([&](int, int, unsigned offset) {
#pragma unroll 1
        for (int byte = 0; byte < FA_CHUNK_BYTES; byte += 4)
            f(V_tile + offset + byte, ld_shared(V_tile + offset + byte));
    });
}

/* The element of V at a key of the tile and a dim. */
__device__ __forceinline__ float value(unsigned V_tile, int key, int dim)
{
    const int byte = dim * V_ELEMENT_BYTES;
    const int chunk = byte / FA_CHUNK_BYTES;
    const unsigned chunk_smem = V_tile + V_layout::offset(key, chunk % V_layout::COLS) +
                                chunk / V_layout::COLS * V_layout::SEGMENT_BYTES;
    const unsigned word = ld_shared(chunk_smem + byte % FA_CHUNK_BYTES / 4 * 4) >> byte % 4 * 8;
    return IS_V_E4M3 ? from_e4m3(word & 0xff) : unpack(word).x;
}

/* O of the queries that see such an element takes it, and zeros replace it in the tile. All threads
 * of the block come here. */
__device__ __forceinline__ void take_nonfinite(float (&O_rmem)[O_FRAGS][2][4], unsigned V_tile,
                                               const quantized_block &block, int first_key)
{
    if (IS_V_NVFP4)
        return;
    bool found = false;
    each_word(V_tile, [&](unsigned, unsigned word) { found |= finite(word) != word; });
    if (!__syncthreads_or(found))
        return;
    const int first_row = block.warp_row() + 2 * quad_lane();
#pragma unroll 1
    for (int key = 0; key < TILE_N; key++) {
        bool sees[2][2];
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                sees[half][e] = block.sees(first_row + 8 * half + e, first_key + key);
#pragma unroll
        for (int n = 0; n < O_FRAGS; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float x = value(V_tile, key, dim_of(n, i));
                const float nonfinite = x - x == 0.0f ? 0.0f : x;
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        O_rmem[n][half][2 * i + e] += sees[half][e] ? nonfinite : 0.0f;
            }
    }
    __syncthreads();
    each_word(V_tile, [&](unsigned smem, unsigned word) { st_shared(smem, finite(word)); });
    __syncthreads();
}

#endif
