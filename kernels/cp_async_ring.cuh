/* The ring of forward.cu: every thread copies its share of each tile with cp.async. A group of
 * copies is a tile, and STAGES - 1 of them are on their way. */
#ifndef FA_CP_ASYNC_RING_CUH
#define FA_CP_ASYNC_RING_CUH

#include "tile.cuh"

struct cp_async_ring : ring_place {
    const fa_forward_params &params;
    const element *K_gmem, *V_gmem; /* of the tile that is copied next */
    fa_int64 K_stride, V_stride;
    int tiles;

    __device__ __forceinline__ cp_async_ring(const fa_forward_params &params, const char *smem)
        : ring_place(smem_address(smem)), params(params)
    {
    }

    __device__ __forceinline__ void copy_next_tile(unsigned stage, int keys)
    {
        K_place().copy(smem + stage, K_gmem, K_stride, keys);
        V_place().copy(smem + stage + K_layout::BYTES, V_gmem, V_stride, keys);
        K_gmem -= TILE_N * K_stride;
        V_gmem -= TILE_N * V_stride;
    }

    __device__ __forceinline__ void start(const tile_walk &walk)
    {
        const int last_key0 = (walk.tile_end - 1) * TILE_N;
        tiles = walk.tiles;
        K_stride = params.k_stride.seqlen;
        V_stride = params.v_stride.seqlen;
        K_gmem =
            K_place().first_chunk(params.k, params.k_stride, walk.batch, walk.head_kv, last_key0);
        V_gmem =
            V_place().first_chunk(params.v, params.v_stride, walk.batch, walk.head_kv, last_key0);
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) {
            if (i < tiles)
                copy_next_tile(i * STAGE_BYTES, i == 0 ? params.seqlen_k - last_key0 : TILE_N);
            cp_async_commit(); /* even if empty: the i-th group is the i-th tile */
        }
        rewind();
    }

    __device__ __forceinline__ bool is_producer() const { return false; }
    __device__ __forceinline__ void feed() {}

    /* Barrier: every thread's copies of this tile have landed, and all warps are done with the
     * stage that is refilled. */
    __device__ __forceinline__ void wait_own() { cp_async_wait<STAGES - 2>(); }
    __device__ __forceinline__ void wait_all() { __syncthreads(); }
    __device__ __forceinline__ bool any(bool x) { return __syncthreads_or(x); }

    __device__ __forceinline__ void refill(int i)
    {
        if (i + STAGES - 1 < tiles)
            copy_next_tile(before(), TILE_N);
        cp_async_commit();
    }
};

#endif
