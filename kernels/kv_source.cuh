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

/* K or V at strides, for cp.async: a pointer that each thread moves from tile to tile. */
template <class layout> struct strided_source {
    using partition = copy_place<layout, THREADS>;
    const element *gmem; /* this thread's first chunk of the tile that is copied next */
    fa_int64 row_stride;

    __device__ __forceinline__ void start(const void *tensor, const fa_strides &stride,
                                          const tile_walk &walk)
    {
        row_stride = stride.seqlen;
        gmem = partition().first_chunk(tensor, stride, walk.batch, walk.head_kv, walk.key(0));
    }
    /* Starts the copies of this thread's share of the next tile; `keys` of its rows exist. */
    __device__ __forceinline__ void copy_next_tile(unsigned smem, int keys)
    {
        partition().copy(smem, gmem, row_stride, keys);
        gmem -= TILE_N * row_stride;
    }
};

/* K or V by a tensor map, for the TMA. Keys after the last become zeros, and so do the chunks that
 * pad a row. */
template <class layout> struct mapped_source {
    const fa_tensor_map &map; /* [batch, heads_kv, seqlen_k, head_dim] */

    /* Starts the loads of a tile, in boxes of a segment. */
    __device__ __forceinline__ void load(unsigned smem, unsigned mbarrier, const tile_walk &walk,
                                         int key) const
    {
#pragma unroll
        for (int c = 0; c < layout::PADDED; c += layout::COLS)
            tma_load_4d(smem + c / layout::COLS * layout::SEGMENT_BYTES, &map, mbarrier,
                        c * CHUNK_ELEMENTS, key, walk.head_kv, walk.batch);
    }
};

#endif
