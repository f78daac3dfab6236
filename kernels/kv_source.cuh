/* Where the tiles of K and V are in memory, behind both rings: these, and all that follows, know
 * stages in shared memory alone. */
#ifndef FA_KV_SOURCE_CUH
#define FA_KV_SOURCE_CUH

#include "sequence.cuh"
#include "tile.cuh"

/* The tiles that a block goes through: of one KV head, from tile_end - 1 downwards. */
struct tile_walk {
    int batch, head_kv, tile_end, tiles;

    /* The first key of the i-th tile. */
    __device__ __forceinline__ int key(int i) const { return (tile_end - 1 - i) * TILE_N; }
};

/* Strided tensors, for cp.async: pointers that each thread moves from tile to tile. */
struct strided_source {
    const fa_forward_params &params;
    const element *K_gmem, *V_gmem; /* this thread's first chunks of the tile that is copied next */
    fa_int64 K_stride, V_stride;    /* from row to row */

    __device__ __forceinline__ void start(const tile_walk &walk,
                                          const sequence<fa_forward_params> &seq)
    {
        const int row = seq.k_begin + walk.key(0);
        K_stride = params.k_stride.seqlen;
        V_stride = params.v_stride.seqlen;
        K_gmem = K_place().first_chunk(params.k, params.k_stride, walk.batch, walk.head_kv, row);
        V_gmem = V_place().first_chunk(params.v, params.v_stride, walk.batch, walk.head_kv, row);
    }
    /* Start the copies of this thread's share of a tile; `keys` of its rows exist. */
    __device__ __forceinline__ void copy_K(unsigned smem, int keys) const
    {
        K_place().copy(smem, K_gmem, K_stride, keys);
    }
    __device__ __forceinline__ void copy_V(unsigned smem, int keys) const
    {
        V_place().copy(smem, V_gmem, V_stride, keys);
    }
    /* On to the tile before. */
    __device__ __forceinline__ void advance()
    {
        K_gmem -= TILE_N * K_stride;
        V_gmem -= TILE_N * V_stride;
    }
};

/* Tensor maps, for the TMA. Keys after the last become zeros, and so do the chunks that pad a row.
 */
struct mapped_source {
    const fa_forward_tma_params &params;

    /* Starts the loads of the tile whose first key is `key`. */
    __device__ __forceinline__ void load(unsigned stage_smem, unsigned mbarrier,
                                         const tile_walk &walk, int key) const
    {
        load_boxes<K_layout>(stage_smem, params.k_map, mbarrier, walk, key);
        load_boxes<V_layout>(stage_smem + K_layout::BYTES, params.v_map, mbarrier, walk, key);
    }

    /* A box is a segment of the layout. */
    template <class layout>
    static __device__ __forceinline__ void load_boxes(unsigned smem, const fa_tensor_map &map,
                                                      unsigned mbarrier, const tile_walk &walk,
                                                      int key)
    {
#pragma unroll
        for (int c = 0; c < layout::PADDED; c += layout::COLS)
            tma_load_4d(smem + c / layout::COLS * layout::SEGMENT_BYTES, &map, mbarrier,
                        c * CHUNK_ELEMENTS, key, walk.head_kv, walk.batch);
    }
};

#endif
