/* The ring of forward.cu: every thread copies its share of each tile with cp.async. A group of
 * copies is a tile, and STAGES - 1 of them are on their way. */
#ifndef FA_CP_ASYNC_RING_CUH
#define FA_CP_ASYNC_RING_CUH

#include "kv_source.cuh"

struct cp_async_ring : ring_place {
    copied_source<> source;
    int tiles;

    __device__ __forceinline__ cp_async_ring(const fa_forward_params &params, const char *smem)
        : ring_place(smem_address(smem)), source{params}
    {
    }

    __device__ __forceinline__ void copy_next_tile(unsigned stage, int keys)
    {
        source.copy_K(smem + stage, keys);
        source.copy_V(smem + stage + K_layout::BYTES, keys);
        source.advance();
    }

    __device__ __forceinline__ void start(const tile_walk &walk,
                                          const sequence<fa_forward_params> &seq)
    {
        tiles = walk.tiles;
        source.start(walk, seq);
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) {
            /* The length cuts short the last tile alone, which comes first. */
            if (i < tiles)
                copy_next_tile(i * STAGE_BYTES, i == 0 ? seq.seqlen_k() - walk.key(0) : TILE_N);
            cp_async_commit(); /* even if empty: the i-th group is the i-th tile */
        }
        rewind();
    }

    __device__ __forceinline__ void clear_tail(int) const {} /* the copies have filled it */

    __device__ __forceinline__ bool is_producer() const { return false; }
    __device__ __forceinline__ void feed() {}

    /* Barrier: every thread's copies of the tile in use have landed, and all warps are done with
     * the tile before, whose stage is free for the refill. */
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
