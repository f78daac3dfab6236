/* What host and device both compute from the constants of a variant: sizes of tiles, of shared
 * memory and of blocks. Plain C, read by NVRTC and by the C compiler of the host, like params.h. */
#ifndef FA_GEOMETRY_H
#define FA_GEOMETRY_H

#include "params.h"

#ifdef __CUDACC_RTC__
#define FA_CONSTEXPR constexpr
#else
#define FA_CONSTEXPR static inline
#endif

/* ---- elements and chunks --------------------------------------------------------------------- */

FA_CONSTEXPR int fa_element_bytes(int dtype)
{
    return dtype >= FA_BYTES_1                        ? 1 << (dtype - FA_BYTES_1)
           : dtype == FA_FLOAT8_E4M3                  ? 1
           : dtype == FA_INT64                        ? 8
           : dtype == FA_FLOAT32 || dtype == FA_INT32 ? 4
                                                      : 2;
}

/* A chunk is what a thread copies with one cp.async, and a row of an ldmatrix matrix. */
enum { FA_CHUNK_BYTES = 16 };
FA_CONSTEXPR int fa_chunk_elements(int dtype) { return FA_CHUNK_BYTES / fa_element_bytes(dtype); }

/* The elements of a row that one mma takes: two chunks, k16 of 16-bit types. Of e4m3, which is
 * widened first, two of them. */
FA_CONSTEXPR int fa_mma_k(int dtype) { return 2 * fa_chunk_elements(dtype); }

/* The head dim as tiles in shared memory have it: whole steps of the mma, or of a multiple. */
FA_CONSTEXPR int fa_padded_dim(int dim, int align) { return (dim + align - 1) / align * align; }

/* Tiles are cut into segments, as wide as the largest swizzle that the chunks of a row fill: of 8,
 * 4 or 2 chunks, CU_TENSOR_MAP_SWIZZLE_128B, _64B or _32B. A segment is also a box of the TMA. */
FA_CONSTEXPR int fa_segment_chunks(int row_chunks)
{
    return row_chunks % 8 == 0 ? 8 : row_chunks % 4 == 0 ? 4 : 2;
}

FA_CONSTEXPR int fa_tile_bytes(int rows, int padded_dim, int dtype)
{
    return rows * padded_dim * fa_element_bytes(dtype);
}

/* An mbarrier has 8 bytes. In the forward a stage of the ring has two, "full" and "empty". */
enum { FA_MBARRIER_BYTES = 8, FA_STAGE_MBARRIER_BYTES = 2 * FA_MBARRIER_BYTES };

/* ---- forward --------------------------------------------------------------------------------- */

/* Who refills the ring of kernels/forward_tma.cu, and how it knows that a stage is free. */
enum fa_producer {
    FA_PRODUCER_BARRIER, /* thread 0, after a barrier of the block */
    FA_PRODUCER_THREAD,  /* thread 0, once all warps have arrived at the stage's mbarrier */
    FA_PRODUCER_WARP,    /* the same, but a warp that does nothing else */
    FA_PRODUCER_COUNT
};

/* The tiles that the forward can be compiled with. X(condition, what it asks for) */
#define FA_FORWARD_TILE_RULES(X, warps, warp_m, tile_n, sub_n, stages)                             \
    X(fa_is_power_of_2(warps) && (warps) <= 16, "warps must be 1, 2, 4, 8 or 16")                  \
    X((warp_m) == 16 || (warp_m) == 32, "warp_m must be 16 or 32")                                 \
    X((sub_n) >= 16 && (sub_n) % 16 == 0, "sub_n must be a multiple of 16")                        \
    X(fa_is_power_of_2(tile_n) && (tile_n) >= 16 && (tile_n) <= 256 && (tile_n) % (sub_n) == 0,    \
      "tile_n must be a power of two from 16 to 256 and a multiple of sub_n")                      \
    X((stages) >= 2 && (stages) <= 16, "stages must be from 2 to 16")

FA_CONSTEXPR int fa_is_power_of_2(int x) { return x > 0 && (x & (x - 1)) == 0; }

/* A stage of the ring: a K tile [tile_n, head_dim], then a V tile [tile_n, head_dim_v]. */
FA_CONSTEXPR int fa_forward_stage_bytes(int head_dim, int head_dim_v, int tile_n, int dtype)
{
    return fa_tile_bytes(tile_n, fa_padded_dim(head_dim, fa_mma_k(dtype)), dtype) +
           fa_tile_bytes(tile_n, fa_padded_dim(head_dim_v, fa_mma_k(dtype)), dtype);
}

/* Shared memory of the forward: the stages of the ring, and behind them their mbarriers where the
 * TMA fills them. The ring's alignment, of 1024 bytes for the TMA, costs nothing: there is no other
 * shared memory, and what CUDA reserves in front of it is as large. */
FA_CONSTEXPR int fa_forward_smem(int stage_bytes, int stages, int has_mbarriers)
{
    return stages * (stage_bytes + (has_mbarriers ? FA_STAGE_MBARRIER_BYTES : 0));
}

/* Rows of a box of the TMA, which lies in one page and in one tile: the largest power of two that
 * divides the rows of both. Boxes of fewer than 8 would start within the swizzle pattern. */
enum { FA_MIN_BOX_ROWS = 8 };
FA_CONSTEXPR int fa_page_box_rows(int tile_n, int page_size)
{
    const int aligned = page_size & -page_size;
    return aligned < tile_n ? aligned : tile_n;
}

/* ---- combine --------------------------------------------------------------------------------- */

/* Threads of a row of out: each has 16 bytes of every split, which are in fp32. */
FA_CONSTEXPR int fa_combine_lanes(int head_dim_v) { return head_dim_v / 4; }

/* Rows, or slices of the splits of a row, that a block has threads for. */
FA_CONSTEXPR int fa_combine_slots(int threads, int head_dim_v)
{
    return threads / fa_combine_lanes(head_dim_v);
}

/* ---- varlen_fill ----------------------------------------------------------------------------- */

/* Of a block of kernels/varlen_fill.cu; the rows are all heads'. */
enum { FA_FILL_THREADS = 256, FA_FILL_ROWS = 256 };

/* ---- kv_append ------------------------------------------------------------------------------- */

/* Of a block of kernels/kv_append.cu, which has a row of all heads. */
enum { FA_APPEND_THREADS = 128 };

/* ---- backward -------------------------------------------------------------------------------- */

/* log2 of what P is multiplied by, and with it all sums of gradients until they are written: see
 * kernels/backward.cuh. */
FA_CONSTEXPR int fa_p_shift(int dtype) { return dtype == FA_BFLOAT16 ? 14 : 0; }

enum {
    FA_PREPROCESS_THREADS = 256,    /* of a block of kernels/backward_preprocess.cu */
    FA_SINK_THREADS = 256,          /* of kernels/backward_sink.cu */
    FA_ORDER_THREADS = 1024,        /* of kernels/backward_order.cu */
    FA_CAPTURED_THREADS = 128,      /* of kernels/backward_captured.cu */
    FA_CAPTURED_SUMS_THREADS = 256, /* of kernels/backward_captured_sums.cu, */
    FA_CAPTURED_SUMS_BLOCKS = 512,  /* of which there are so many */
    FA_POSTPROCESS_WARPS = 4,       /* of kernels/backward_postprocess.cu */
};

/* Where the parts of shared memory of kernels/backward.cu start, and how large all of it is. */
struct fa_backward_smem {
    int k;    /* [tile_n, head_dim], padded to whole fragments for each warp that shares rows */
    int q;    /* [stages, tile_m, head_dim] */
    int dout; /* [tile_m, head_dim_v] */
    int ds;   /* [tile_n, tile_m]: P^T, then dS^T */
    int lse_delta;   /* [stages, 2, tile_m] in fp32: lse_log2, then delta */
    int q_mbarriers; /* [stages], FA_BACKWARD_MBARRIER_STRIDE bytes apart */
    int dout_mbarrier;
    int bytes;
};

enum { FA_BACKWARD_MBARRIER_STRIDE = 16 };

FA_CONSTEXPR struct fa_backward_smem fa_backward_smem_of(int head_dim, int head_dim_v, int tile_m,
                                                         int tile_n, int stages, int dq_dim_warps,
                                                         int dtype)
{
    const int step = fa_mma_k(dtype);
    struct fa_backward_smem at = {0, 0, 0, 0, 0, 0, 0, 0};
    at.q = at.k + fa_tile_bytes(tile_n, fa_padded_dim(head_dim, step * dq_dim_warps), dtype);
    at.dout = at.q + stages * fa_tile_bytes(tile_m, fa_padded_dim(head_dim, step), dtype);
    at.ds = at.dout + fa_tile_bytes(tile_m, fa_padded_dim(head_dim_v, step), dtype);
    at.lse_delta = at.ds + fa_tile_bytes(tile_n, tile_m, dtype);
    at.q_mbarriers = at.lse_delta + stages * 2 * tile_m * 4;
    at.dout_mbarrier = at.q_mbarriers + stages * FA_BACKWARD_MBARRIER_STRIDE;
    at.bytes = at.dout_mbarrier + FA_BACKWARD_MBARRIER_STRIDE;
    return at;
}

#endif
