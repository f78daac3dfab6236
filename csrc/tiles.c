/* Data alone: plan.c says how a row is chosen. */
#include "tiles.h"

#define ANY FA_ANY

/* By bracket of head dims; in each first the calls that do not fill the machine with large tiles.
 * Measured on an H200 within sm_120's limits, see "Small grids" and "TMA" in benchmarks/NOTES.md.
 * 16 rows per warp where 32 would spill registers: windows, and K rows that end in half an mma
 * step. */
/* clang-format off */
#define SMALL(head_dim, rows_per_sm, right, ...) \
    {ANY, ANY, head_dim, head_dim, ANY, ANY, rows_per_sm, right, 0, {__VA_ARGS__}, {0}}

/* Few queries, windows or not. Those of up to 64 rows are the tiles of SMALL, of which windows and
 * those of up to 128 rows have not been measured. */
#define FEW(head_dim, rows, ...) \
    {ANY, ANY, head_dim, head_dim, ANY, FA_FEW_QUERIES, rows, ANY, ANY, {__VA_ARGS__}, {0}}

#define LARGE(head_dim, head_dim_v, right, left, ...) \
    {ANY, ANY, head_dim, head_dim_v, ANY, ANY, ANY, right, left, {__VA_ARGS__}, {0}}

/* Full and causal calls on 12.x, of a class of cards or of both. NOTHING HERE HAS BEEN MEASURED ON
 * A 12.x CARD. BALANCE: within 2% of the fastest tile on an H100 that issues each mma 4 times, for
 * GeForce-like cards, or twice, for PRO-like ones ("The balance of sm_120" in benchmarks/NOTES.md).
 * SPLIT and WIDE: what others published of their kernels there, as far as registers and shared
 * memory allow it. SPLIT: 64 rows by 4 warps and a warp that loads, two blocks per SM, after
 * gau-nernst's v6 (RTX 5090). WIDE: 128 rows by 8 warps, a block per SM, after NVIDIA's FROST
 * (RTX PRO 6000). See "Rows of 12.x" there. */
#define SM120(kind, head_dim, rows_per_sm, right, ...) \
    {120, kind, head_dim, head_dim, ANY, ANY, rows_per_sm, right, 0, {__VA_ARGS__}, {0}}

/* Of warps with 32 rows, which spill registers at smaller head dims. */
#define SM120_128(kind, above_rows_per_sm, right, ...) \
    {120, kind, 128, 128, ANY, ANY, ANY, right, 0, {__VA_ARGS__}, \
     {.head_dim = 120, .head_dim_v = 120, .rows_per_sm = above_rows_per_sm}}

#define GEFORCE FA_GEFORCE_LIKE
#define PRO     FA_PRO_LIKE

#define CP_ASYNC    FA_KERNEL_FORWARD, 0
#define TMA_THREAD  FA_KERNEL_FORWARD_TMA, FA_PRODUCER_THREAD
#define TMA_WARP    FA_KERNEL_FORWARD_TMA, FA_PRODUCER_WARP
#define TMA_BARRIER FA_KERNEL_FORWARD_TMA, FA_PRODUCER_BARRIER

const struct fa_tile_row FA_TILES[] = {
    /* head_dim, rows_per_sm, right,           tile_n, sub_n, warps, warp_m, stages
     * head_dim, head_dim_v, right, left,      tile_n, sub_n, warps, warp_m, stages
     * head_dim, rows_per_sm,                  tile_n, sub_n, warps, warp_m, stages, of few queries
     * kind, head_dim, rows_per_sm, right,     tile_n, sub_n, warps, warp_m, stages, of 12.x */
    FEW(   64,  64,            64, 64, 4, 16, 3, TMA_WARP),
    FEW(   64, 128,            64, 64, 8, 16, 2, TMA_WARP),
    SMALL( 64,  64, ANY,       64, 64, 4, 16, 3, TMA_WARP),
    SM120(ANY, 64, 128, ANY,   64, 64, 4, 16, 2, TMA_WARP), /* SPLIT */
    SM120(GEFORCE, 64, 256, 1, 128, 64, 8, 16, 2, TMA_WARP), /* BALANCE: S 1024 */
    SM120(ANY, 64, 256, ANY,   64, 64, 4, 16, 2, TMA_WARP), /* SPLIT */
    SM120(PRO, 64, ANY, 0,     64, 64, 4, 32, 2, TMA_BARRIER), /* BALANCE: S 8192 */
    SMALL( 64, 128,   0,       64, 64, 4, 16, 2, TMA_WARP),
    SMALL( 64, 256,   1,       64, 64, 4, 16, 3, TMA_WARP),
    LARGE( 64,  64,   1,   0,  64, 64, 4, 32, 2, CP_ASYNC),
    LARGE( 64,  64, ANY, ANY,  64, 32, 4, 32, 3, CP_ASYNC),

    FEW(   80,  64,            64, 64, 4, 16, 3, TMA_WARP),
    SMALL( 80,  64, ANY,       64, 64, 4, 16, 3, TMA_WARP),
    SM120(ANY, 80, 256, ANY,   64, 64, 4, 16, 2, TMA_WARP), /* SPLIT */
    SM120(ANY, 80, ANY, ANY,   64, 64, 8, 16, 2, TMA_WARP), /* WIDE */
    SMALL( 80, 128,   0,       64, 64, 8, 16, 3, TMA_WARP),
    SMALL( 80, 128,   1,       64, 64, 4, 16, 4, TMA_WARP),
    SMALL( 80, 256,   1,       64, 64, 8, 16, 3, TMA_WARP),
    LARGE( 80,  80, ANY,   0,  64, 32, 8, 32, 3, TMA_BARRIER),

    FEW(   96,  64,            64, 64, 4, 16, 3, TMA_WARP),
    SMALL( 96,  64, ANY,       64, 64, 4, 16, 3, TMA_WARP),
    SM120(ANY, 96, 256, ANY,   64, 64, 4, 16, 2, TMA_WARP), /* SPLIT */
    SM120(ANY, 96, ANY, ANY,   64, 64, 8, 16, 2, TMA_WARP), /* WIDE */
    SMALL( 96, 128,   0,       64, 32, 4, 16, 2, TMA_WARP),
    SMALL( 96, 128,   1,       64, 64, 4, 16, 3, TMA_WARP),
    SMALL( 96, 256,   1,       64, 64, 4, 16, 2, TMA_WARP),
    LARGE( 96,  96, ANY, ANY,  32, 16, 4, 32, 2, CP_ASYNC),

    FEW(  128,  64,            64, 64, 4, 16, 2, TMA_WARP),
    FEW(  128, 128,            64, 32, 8, 16, 2, TMA_THREAD), /* 9 warps would spill */
    SMALL(128,  64, ANY,       64, 64, 4, 16, 2, TMA_WARP),
    SM120(ANY, 128, 128, ANY,  32, 32, 4, 16, 3, TMA_WARP), /* SPLIT: the 48 KB of v6 */
    SM120_128(ANY, 128, 0,     64, 16, 8, 32, 3, TMA_THREAD), /* BALANCE: S 1024, 4096, 8192 */
    SM120_128(PRO, 256, 1,     32, 16, 4, 32, 3, CP_ASYNC), /* BALANCE: S 4096, 8192 */
    SM120(GEFORCE, 128, ANY, 1, 64, 64, 8, 16, 3, TMA_THREAD), /* BALANCE: S 1024, 4096, 8192 */
    SM120(PRO, 128, ANY, 1,    64, 64, 8, 16, 3, TMA_BARRIER), /* BALANCE: S 1024 */
    SM120(ANY, 128, ANY, ANY,  64, 32, 8, 16, 2, TMA_THREAD), /* WIDE */
    SMALL(128, 128,   0,       64, 64, 8, 16, 3, TMA_THREAD),
    SMALL(128, 128,   1,       64, 32, 4, 16, 3, TMA_WARP),
    SMALL(128, 256,   1,       64, 32, 8, 16, 2, TMA_WARP),
    LARGE(128, 128, ANY,   1,  64, 32, 8, 16, 3, CP_ASYNC),
    LARGE( 96, 128, ANY, ANY,  32, 16, 4, 32, 3, CP_ASYNC),
    LARGE(104, 128, ANY, ANY,  64, 32, 8, 16, 3, CP_ASYNC),
    LARGE(112, 128, ANY, ANY,  32, 16, 4, 32, 3, CP_ASYNC),
    LARGE(120, 128, ANY, ANY,  64, 32, 8, 16, 3, CP_ASYNC),
    LARGE(128, 128, ANY, ANY,  32, 16, 4, 32, 3, CP_ASYNC),

    FEW(  192,  64,            64, 32, 4, 16, 2, TMA_WARP),
    SMALL(192,  64,   0,       64, 64, 4, 16, 2, TMA_WARP),
    SMALL(192, 128,   1,       64, 32, 4, 16, 2, TMA_WARP),
    LARGE(192, 192, ANY,   0,  64, 32, 8, 16, 2, TMA_THREAD),
    LARGE(192, 192, ANY, ANY,  32, 32, 4, 16, 2, CP_ASYNC),

    SMALL(256,  64, ANY,       32, 32, 4, 16, 3, TMA_WARP),
    SMALL(256, 128,   1,       32, 32, 4, 16, 3, TMA_WARP),
    LARGE(256, 256, ANY, ANY,  32, 32, 8, 16, 3, CP_ASYNC),
};
/* clang-format on */

const size_t FA_TILE_COUNT = sizeof FA_TILES / sizeof *FA_TILES;

/* Few queries: every warp of a block widens all of K and V, whether it has rows or not. So there
 * are no more warps than rows ask for, and several blocks share a multiprocessor. MASKED, of head
 * dims and rows above the first of two numbers: where the row of FA_TILES would spill registers, as
 * what is widened takes some (at 256 on 9.x this one spills more). Not measured. */
/* clang-format off */
#define MASKED(arch, above_dim, dim, above_rows, right, left, ...) \
    {arch, ANY, dim, dim, ANY, ANY, ANY, right, left, {__VA_ARGS__}, \
     {.head_dim = above_dim, .rows_per_sm = above_rows}}
const struct fa_tile_row FA_E4M3_TILES[] = {
    /* head_dim, rows_per_sm,     tile_n, sub_n, warps, warp_m, stages */
    FEW( 64,  16,                 64, 64, 1, 16, 3, TMA_BARRIER),
    FEW( 64,  32,                 64, 64, 2, 16, 3, TMA_THREAD),
    FEW(128,  16,                 64, 64, 1, 16, 2, TMA_BARRIER),
    FEW(128,  32,                 64, 64, 2, 16, 2, TMA_THREAD),
    FEW(256,  16,                 32, 32, 1, 16, 2, TMA_BARRIER),
    FEW(256,  32,                 32, 32, 2, 16, 3, TMA_THREAD),

    /* arch, dims, rows_per_sm, right, left */
    MASKED( 90,  80,  96, 256,   1,   0, 32, 16, 4, 32, 3, TMA_THREAD),
    MASKED( 90,  80,  96,   0, ANY,   1, 32, 16, 4, 32, 3, TMA_THREAD),
    MASKED( 90,  96, 128, 256,   1,   0, 32, 16, 4, 32, 3, TMA_THREAD),
    MASKED(120, 192, 256, 128,   1,   0, 32, 32, 8, 16, 3, TMA_THREAD),
    MASKED(120, 192, 256,   0, ANY,   1, 32, 32, 8, 16, 3, TMA_THREAD),
};
/* clang-format on */

const size_t FA_E4M3_TILE_COUNT = sizeof FA_E4M3_TILES / sizeof *FA_E4M3_TILES;

/* Of 64 keys a sub-tile is two steps of P V. 64 rows for small grids, 128 for large ones, without
 * spills where there is an mma of e4m3. Hopper has none: each is two of fp16 and what makes their
 * operands, for which a ninth warp leaves no registers. NOT MEASURED. */
/* clang-format off */
#define HOPPER(head_dim, ...) \
    {90, ANY, head_dim, head_dim, ANY, ANY, ANY, ANY, ANY, {__VA_ARGS__}, {0}}
const struct fa_tile_row FA_Q_E4M3_TILES[] = {
    /* head_dim, rows_per_sm,     tile_n, sub_n, warps, warp_m, stages */
    FEW( 128, 16,                 64, 64, 1, 16, 3, TMA_BARRIER),
    FEW( 256, 16,                 32, 32, 1, 16, 2, TMA_BARRIER),
    HOPPER(128,                   64, 64, 8, 16, 3, TMA_THREAD),
    HOPPER(256,                   32, 32, 4, 16, 3, TMA_THREAD),
    SMALL(128, 128, ANY,          64, 64, 4, 16, 3, TMA_WARP),
    LARGE( 64,  64, ANY, ANY,     128, 64, 8, 16, 3, TMA_WARP),
    LARGE(128, 128, ANY, ANY,     64, 64, 8, 16, 3, TMA_WARP),
    LARGE(256, 256, ANY, ANY,     64, 32, 8, 16, 3, TMA_THREAD),
};
/* clang-format on */

const size_t FA_Q_E4M3_TILE_COUNT = sizeof FA_Q_E4M3_TILES / sizeof *FA_Q_E4M3_TILES;

/* Measured on an H100, see F31 in benchmarks/NOTES.md. */
const struct fa_tile_row FA_PAGED_TILES[] = {
    LARGE(128, 128, ANY, 0, 64, 16, 8, 32, 3, TMA_THREAD),
};

const size_t FA_PAGED_TILE_COUNT = sizeof FA_PAGED_TILES / sizeof *FA_PAGED_TILES;

/* Measured on an H100 at three balances, see S16 in benchmarks/NOTES.md. */
const struct fa_tile_row FA_ROOMY_TILES[] = {
    LARGE(64, 64, ANY, ANY, 64, 32, 4, 32, 3, TMA_THREAD),
    LARGE(128, 128, ANY, ANY, 64, 64, 8, 16, 3, TMA_BARRIER),
};

const size_t FA_ROOMY_TILE_COUNT = sizeof FA_ROOMY_TILES / sizeof *FA_ROOMY_TILES;

/* Half the rows of the tile of FA_TILES, for calls that would leave the last wave of its blocks
 * nearly empty. */
const struct fa_tile_row FA_WAVE_TILES[] = {
    SM120_128(ANY, 128, 0, 64, 64, 8, 16, 3, TMA_THREAD),
};

const size_t FA_WAVE_TILE_COUNT = sizeof FA_WAVE_TILES / sizeof *FA_WAVE_TILES;

/* Measured on an H200, see "Backward" in benchmarks/NOTES.md. Short sequences: of blocks of one
 * tile two share a multiprocessor, so that one's loads and stores hide behind the other's products.
 * That of 12.x: on an H100, like BALANCE above, at S 8192; all others are within 2% of the best
 * there, but for 3% of D 128, causal, S 1024. */
/* clang-format off */
#define BACKWARD(head_dim, varlen_k, ...) \
    {ANY, ANY, head_dim, varlen_k, ANY, ANY, ANY, {__VA_ARGS__}, {0}}
#define BACKWARD_SM120(kind, dim, above_keys, right, ...) \
    {120, kind, dim, ANY, ANY, right, 0, {__VA_ARGS__}, {.keys_per_sm = above_keys}}
const struct fa_backward_row FA_BACKWARD_TILES[] = {
    /* head_dim, varlen_k,                     warps, warp_n, tile_m, sub_m, stages
     * kind, head_dim, above_keys, right,      warps, warp_n, tile_m, sub_m, stages, of 12.x */
    BACKWARD( 64,  64,                         4, 32,  64, 32, 1),
    BACKWARD_SM120(PRO, 64, 0, ANY,            8, 32, 128, 64, 1), /* 1 to 3% */
    BACKWARD( 64, ANY,                         8, 32, 128, 32, 1),
    BACKWARD(128,  64,                         4, 32,  32, 16, 1),
    BACKWARD(128, ANY,                         8, 32,  64, 32, 1),
    BACKWARD(192, ANY,                         8, 16,  64, 32, 1),
    BACKWARD(256, ANY,                         8, 16,  32, 16, 2),
};
/* clang-format on */

const size_t FA_BACKWARD_TILE_COUNT = sizeof FA_BACKWARD_TILES / sizeof *FA_BACKWARD_TILES;

/* Smaller tiles, in which nothing spills up to head_dim 128. At 64 level with the larger ones at
 * the balance of 12.x, above slower than those with 100 bytes of spills: S14 in
 * benchmarks/NOTES.md. */
/* clang-format off */
#define CROWDED(head_dim, varlen_k, left, ...) \
    {120, ANY, head_dim, varlen_k, ANY, ANY, left, {__VA_ARGS__}, {0}}
const struct fa_backward_row FA_CROWDED_BACKWARD_TILES[] = {
    /* head_dim, varlen_k, left,               warps, warp_n, tile_m, sub_m, stages */
    CROWDED( 64,  64,   0,                     4, 32,  64, 32, 1),
    CROWDED( 64, ANY,   0,                     8, 32,  64, 32, 1),
    CROWDED(128, ANY, ANY,                     8, 16,  64, 32, 1),
};
/* clang-format on */

const size_t FA_CROWDED_BACKWARD_TILE_COUNT =
    sizeof FA_CROWDED_BACKWARD_TILES / sizeof *FA_CROWDED_BACKWARD_TILES;
