/* Quantised attention: infinities and NaN of V in tiles of which not every query sees every key, as
 * the product would multiply them by a weight of 0. V in e2m1 has none, but its scales may be
 * NaN. */
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

/* The same where V is in e2m1: of scales, which every warp has in registers. A word has those of
 * groups: 32 keys have two, of the keys 0 to 3 and 4 to 7 of each 8. */
__device__ __forceinline__ void take_nan_scales(float (&O_rmem)[O_FRAGS][2][4],
                                                value_scales &scales, const quantized_block &block,
                                                int first_key)
{
    constexpr unsigned NAN_CODE = 0x7f;
    unsigned nan[ceil_div(O_FRAGS, 2)], found = 0;
#pragma unroll
    for (int i = 0; i < ceil_div(O_FRAGS, 2); i++) {
        nan[i] = 0;
#pragma unroll
        for (int bit = 0; bit < 32; bit += 8)
            if ((scales.words[i] >> bit & NAN_CODE) == NAN_CODE)
                nan[i] |= 0xff << bit;
        found |= nan[i];
    }
    if (!__any_sync(0xffffffff, found))
        return;
    const int first_row = block.warp_row() + 2 * quad_lane();
#pragma unroll 1
    for (int group = 0; group < 4; group++) {
        bool sees[2][2] = {};
#pragma unroll 1
        for (int i = 0; i < 16; i++) {
            const int key = first_key + 32 * (group / 2) + 4 * (group % 2) + 8 * (i / 4) + i % 4;
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    sees[half][e] |= block.sees(first_row + 8 * half + e, key);
        }
#pragma unroll
        for (int n = 0; n < O_FRAGS; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int lane = 4 * quad_row() + n % 2 * 2 + i;
                const unsigned word = __shfl_sync(0xffffffff, nan[n / 2], lane);
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (sees[half][e] && word >> 8 * group & 1)
                            O_rmem[n][half][2 * i + e] = __int_as_float(0x7fffffff);
            }
    }
#pragma unroll
    for (int i = 0; i < ceil_div(O_FRAGS, 2); i++)
        scales.words[i] &= ~nan[i];
}

#endif
