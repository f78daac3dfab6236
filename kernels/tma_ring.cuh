/* The ring of forward_tma.cu: one thread asks the TMA for whole tiles. Each stage has two
 * mbarriers: `full` ends a phase when all bytes of a tile have landed, `empty` when all warps are
 * done with it. All stages are on their way at the start. A second pass goes on with the stage and
 * the phase where the first one ended. */
#ifndef FA_TMA_RING_CUH
#define FA_TMA_RING_CUH

#include "kv_source.cuh"

/* The tensor maps permute the chunks of a box by their address, as tile_layout does by their offset
 * in the tile. */
static_assert(K_layout::BYTES % 1024 == 0 && V_layout::BYTES % 1024 == 0,
              "every tile starts where the pattern of the swizzle does");

struct tma_ring : ring_place {
    static constexpr bool HAS_PRODUCER_WARP = PRODUCER == FA_PRODUCER_WARP;
    static constexpr bool HAS_EMPTY_MBARRIERS = PRODUCER != FA_PRODUCER_BARRIER;
    static constexpr int BLOCK_THREADS = THREADS + (HAS_PRODUCER_WARP ? 32 : 0);
    static constexpr int COMPUTING_THREADS = 1; /* the named barrier that the producer is not in */

    mapped_source<> source;
    tile_walk walk;
    unsigned parity = 0; /* of the phase of `full` that ends when the tile in use has landed */

    __device__ __forceinline__ tma_ring(const fa_forward_tma_params &params, const char *smem_begin)
        : ring_place(smem_address(smem_begin)), source{params}
    {
        rewind();
        if (threadIdx.x == 0) {
            prefetch_tensor_map(&params.k_map);
            prefetch_tensor_map(&params.v_map);
            for (int i = 0; i < STAGES; i++) {
                mbarrier_init(full(i * STAGE_BYTES), 1);
                mbarrier_init(empty(i * STAGE_BYTES), WARPS);
            }
            fence_mbarrier_init();
        }
        __syncthreads(); /* barrier: the mbarriers are initialised before their first use */
    }

    /* The mbarriers of a stage lie behind the ring. */
    __device__ __forceinline__ unsigned full(unsigned stage) const
    {
        return smem + RING_BYTES + stage / STAGE_BYTES * FA_STAGE_MBARRIER_BYTES;
    }
    __device__ __forceinline__ unsigned empty(unsigned stage) const
    {
        return full(stage) + FA_MBARRIER_BYTES;
    }

    /* Starts the loads of the i-th tile. */
    __device__ __forceinline__ void load(unsigned stage, int i)
    {
        const int key = walk.key(i);
        mbarrier_expect(full(stage), STAGE_BYTES);
        source.load(smem + stage, full(stage), walk, key);
    }

    __device__ __forceinline__ bool is_producer() const
    {
        return HAS_PRODUCER_WARP && threadIdx.x >= THREADS;
    }
    /* The one thread that issues loads. Elected by elect.sync, in which all lanes of its warp take
     * part: then the compiler knows that it is one, and writes no loop over lanes around each
     * instruction. */
    __device__ __forceinline__ bool is_loader() const
    {
        return threadIdx.x / 32 == (HAS_PRODUCER_WARP ? WARPS : 0) && elect_one();
    }

    /* All stages are free: nothing has been in them before the first pass, and a barrier of the
     * block is between two passes. */
    __device__ __forceinline__ void start(const tile_walk &next,
                                          const sequence<fa_forward_params> &seq)
    {
        walk = next;
        if (is_loader()) {
            source.start(walk, seq);
            unsigned to = stage;
#pragma unroll 1
            for (int i = 0; i < min(STAGES, walk.tiles); i++) {
                load(to, i);
                to = to == RING_BYTES - STAGE_BYTES ? 0 : to + STAGE_BYTES;
            }
        }
    }

    /* A box of the TMA ends with the tensor or a page, and a sequence before that: what follows may
     * be inf or NaN. Scores of such keys are masked, whatever they are, but 0 * V is to be 0. */
    __device__ __forceinline__ void clear_tail(int seqlen_k) const
    {
        const int keys = seqlen_k - walk.key(0);
        if (walk.tiles == 0 || keys >= TILE_N)
            return;
        wait_own();
        const V_place place;
        place.each([&](int r, int, unsigned offset) {
            if (place.row + r >= keys)
                st_shared_16(V_tile() + offset, make_uint4(0, 0, 0, 0));
        });
        fence_before_tma();    /* which refills the stage */
        if (HAS_PRODUCER_WARP) /* barrier: all of it is written */
            barrier_sync<THREADS>(COMPUTING_THREADS);
        else
            __syncthreads();
    }

    /* What this thread has waited for is the whole tile. */
    __device__ __forceinline__ void wait_own() const { mbarrier_wait(full(stage), parity); }

    /* Barrier: all warps are done with the tile before, whose stage is free for the refill. With
     * `empty` mbarriers the loader alone waits for that. */
    __device__ __forceinline__ void wait_all() const
    {
        if (!HAS_EMPTY_MBARRIERS)
            __syncthreads();
    }
    __device__ __forceinline__ bool any(bool x) const
    {
        return HAS_PRODUCER_WARP ? barrier_or<COMPUTING_THREADS, THREADS>(x) : __syncthreads_or(x);
    }

    __device__ __forceinline__ void refill(int i)
    {
        if (!HAS_PRODUCER_WARP && is_loader())
            load_after(i);
    }

    /* Loads to the stage of tile i - 1 the tile that comes STAGES later. */
    __device__ __forceinline__ void load_after(int i)
    {
        if (i == 0 || i + STAGES - 1 >= walk.tiles)
            return;
        if (HAS_EMPTY_MBARRIERS)
            mbarrier_wait(empty(before()), stage == 0 ? parity ^ 1 : parity);
        load(before(), i + STAGES - 1);
    }

    /* What the producer warp does: one iteration for each of the warps that compute. */
    __device__ __forceinline__ void feed()
    {
        const bool loads = is_loader();
#pragma unroll 1
        for (int i = 0; i < walk.tiles; i++, next_stage())
            if (loads)
                load_after(i);
        __syncwarp(); /* the barrier after the pass takes the whole warp */
    }

    __device__ __forceinline__ void next_stage()
    {
        parity ^= is_last();
        ring_place::advance();
    }
    __device__ __forceinline__ void advance()
    {
        if (HAS_EMPTY_MBARRIERS) {
            __syncwarp(); /* all lanes have read the tile */
            if (elect_one())
                mbarrier_arrive(empty(stage));
        }
        next_stage();
    }
};

#endif
