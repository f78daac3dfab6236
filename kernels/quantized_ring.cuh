/* Quantised attention: tiles of K and V in a ring of two stages of STAGE_TILES each, brought by
 * cp.async. What lies behind the last key, and what pads a row, becomes zeros: no memory is read
 * there. */
#ifndef FA_QUANTIZED_RING_CUH
#define FA_QUANTIZED_RING_CUH

#include "quantized_values.cuh"

constexpr int STAGES = 2;
constexpr int TILE_BYTES = K_layout::BYTES + V_layout::BYTES;

using K_place = copy_place<K_layout, THREADS>;
using V_place = copy_place<V_layout, THREADS>;

/* Copies this thread's share of rows of ROW_BYTES bytes, from its first chunk on; has(r, byte) says
 * which exist, r rows from its first one. Rows of e2m1 may begin between chunks. */
template <int ROW_BYTES, class layout, class F>
__device__ __forceinline__ void copy_rows(unsigned smem, const char *gmem, fa_int64 stride,
                                          const copy_place<layout, THREADS> &place, F has)
{
    constexpr int COPY = ROW_BYTES % FA_CHUNK_BYTES == 0 ? 16 : 8;
    place.each([&](int r, int c, unsigned offset) {
#pragma unroll
        for (int part = 0; part < FA_CHUNK_BYTES; part += COPY) {
            const int byte = c * FA_CHUNK_BYTES + part; /* from the first chunk on */
            const int in_row = place.col * FA_CHUNK_BYTES + byte;
            const bool pads = ROW_BYTES % STEP_BYTES != 0 && in_row >= ROW_BYTES;
            const int bytes = has(r, in_row) && !pads ? COPY : 0;
            if (COPY == 16)
                cp_async_16(smem + offset, gmem + r * stride + byte, bytes);
            else
                cp_async_8(smem + offset + part, gmem + r * stride + byte, bytes);
        }
    });
}

/* Has the compiler compute a place once, which it would do again for each tile. */
template <class place> __device__ __forceinline__ void keep(place &x)
{
    x.row = not_before(x.row);
    x.col = not_before(x.col);
}

struct quantized_ring {
    const quantized_block &block;
    const char *K_gmem, *V_gmem; /* this thread's first chunks of the tile that is copied next */
    unsigned smem;
    K_place K; /* this thread's share */
    V_place V;

    __device__ __forceinline__ quantized_ring(const quantized_block &block, const void *begin,
                                              int tile)
        : block(block), smem(not_before(smem_address(begin)))
    {
        const fa_quantized_params &params = block.params;
        keep(K);
        keep(V);
        const fa_int64 key = static_cast<fa_int64>(tile) * TILE_N;
        K_gmem = static_cast<const char *>(params.k) + block.batch * params.k_stride.batch +
                 block.head_kv * params.k_stride.head + (key + K.row) * params.k_stride.seqlen +
                 K.col * FA_CHUNK_BYTES;
        V_gmem = static_cast<const char *>(params.v) + block.batch * params.v_stride.batch +
                 block.head_kv * params.v_stride.head + V.row * params.v_stride.seqlen +
                 key / TILE_N * V_step() + V.col * FA_CHUNK_BYTES;
    }

    /* From tile to tile of V: in e2m1 rows are dims. */
    __device__ __forceinline__ fa_int64 V_step() const
    {
        return IS_V_NVFP4 ? V_BYTES : TILE_N * block.params.v_stride.seqlen;
    }
    /* Where a tile lies, from `smem` on: K, then V. */
    __device__ __forceinline__ unsigned slot(int tile) const
    {
        return static_cast<unsigned>(tile) % (STAGES * STAGE_TILES) * TILE_BYTES;
    }
    __device__ __forceinline__ unsigned K_tile(int tile) const { return smem + slot(tile); }
    __device__ __forceinline__ unsigned V_tile(int tile) const
    {
        return K_tile(tile) + K_layout::BYTES;
    }

    /* Starts the copies of this thread's share of a stage, whose first tile is this one. */
    __device__ __forceinline__ void copy_stage(int tile, int end)
    {
#pragma unroll
        for (int i = 0; i < STAGE_TILES; i++)
            if (i == 0 || tile + i < end)
                copy(tile + i);
        cp_async_commit();
    }

    /* Of the next tile, which is this one. */
    __device__ __forceinline__ void copy(int tile)
    {
        const fa_quantized_params &params = block.params;
        const int keys = params.seqlen_k - tile * TILE_N;
        copy_rows<QK_BYTES>(K_tile(tile), K_gmem, params.k_stride.seqlen, K,
                            [&](int r, int) { return r < keys - K.row; });
        copy_rows<V_BYTES>(V_tile(tile), V_gmem, params.v_stride.seqlen, V, [&](int r, int byte) {
            if (IS_V_NVFP4) /* tokens come in 32s */
                return (HEAD_DIM_V % 64 == 0 || V.row + r < HEAD_DIM_V) && 2 * byte < keys;
            return r < keys - V.row;
        });
        K_gmem += TILE_N * params.k_stride.seqlen;
        V_gmem += V_step();
    }
};

#endif
