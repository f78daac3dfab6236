/* Quantised attention: tiles of K and V in a ring of two stages, brought by cp.async. What lies
 * behind the last key, and what pads a row, becomes zeros: no memory is read there. */
#ifndef FA_QUANTIZED_RING_CUH
#define FA_QUANTIZED_RING_CUH

#include "quantized_values.cuh"

constexpr int STAGES = 2;
constexpr int STAGE_BYTES = K_layout::BYTES + V_layout::BYTES;

using K_place = copy_place<K_layout, THREADS>;
using V_place = copy_place<V_layout, THREADS>;

/* Copies this thread's share of rows of ROW_BYTES bytes, which chunk 0 of row 0 begins; has(row)
 * says which exist. Rows of e2m1 may begin between chunks. */
template <int ROW_BYTES, class layout, class F>
__device__ __forceinline__ void copy_rows(unsigned smem, const char *gmem, fa_int64 stride,
                                          const copy_place<layout, THREADS> &place, F has)
{
    constexpr int COPY = ROW_BYTES % FA_CHUNK_BYTES == 0 ? 16 : 8;
    gmem += place.row * stride;
    place.each([&](int r, int c, unsigned offset) {
#pragma unroll
        for (int part = 0; part < FA_CHUNK_BYTES; part += COPY) {
            const int byte = (place.col + c) * FA_CHUNK_BYTES + part;
            const bool exists = has(place.row + r, byte) && byte < ROW_BYTES;
            const char *from = exists ? gmem + r * stride + byte : gmem;
            if (COPY == 16)
                cp_async_16(smem + offset + part, from, exists ? 16 : 0);
            else
                cp_async_8(smem + offset + part, from, exists ? 8 : 0);
        }
    });
}

struct quantized_ring {
    const quantized_block &block;
    const char *K_gmem, *V_gmem; /* of this head */
    unsigned smem;

    __device__ __forceinline__ quantized_ring(const quantized_block &block, const void *begin)
        : block(block), smem(smem_address(begin))
    {
        const fa_quantized_params &params = block.params;
        K_gmem = static_cast<const char *>(params.k) + block.batch * params.k_stride.batch +
                 block.head_kv * params.k_stride.head;
        V_gmem = static_cast<const char *>(params.v) + block.batch * params.v_stride.batch +
                 block.head_kv * params.v_stride.head;
    }

    __device__ __forceinline__ unsigned K_tile(int tile) const
    {
        return smem + tile % STAGES * STAGE_BYTES;
    }
    __device__ __forceinline__ unsigned V_tile(int tile) const
    {
        return K_tile(tile) + K_layout::BYTES;
    }

    /* Starts the copies of this thread's share of a tile. */
    __device__ __forceinline__ void copy(int tile) const
    {
        const fa_quantized_params &params = block.params;
        const fa_int64 first = static_cast<fa_int64>(tile) * TILE_N;
        const int keys = params.seqlen_k - tile * TILE_N;
        const auto is_key = [&](int row, int) { return row < keys; };
        copy_rows<QK_BYTES>(K_tile(tile), K_gmem + first * params.k_stride.seqlen,
                            params.k_stride.seqlen, K_place(), is_key);
        if (IS_V_NVFP4) /* rows are dims, and tokens come in 32s */
            copy_rows<V_BYTES>(
                V_tile(tile), V_gmem + first / 2, params.v_stride.seqlen, V_place(),
                [&](int row, int byte) { return row < HEAD_DIM_V && 2 * byte < keys; });
        else
            copy_rows<V_BYTES>(V_tile(tile), V_gmem + first * params.v_stride.seqlen,
                               params.v_stride.seqlen, V_place(), is_key);
        cp_async_commit();
    }
};

#endif
