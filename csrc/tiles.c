/* Data alone: plan.c says how a row is chosen. */
#include "tiles.h"

#define ANY FA_ANY

/* By bracket of head dims; in each first the calls that do not fill the machine with large tiles.
 * SMALL is measured on an H200 within sm_120's limits, see "Small grids" in benchmarks/NOTES.md. */
/* clang-format off */
#define SMALL(head_dim, rows_per_sm, right, ...) \
    {ANY, head_dim, head_dim, ANY, ANY, rows_per_sm, right, 0, {__VA_ARGS__}}

/* 16 rows per warp where 32 would spill registers: windows, and K rows that end in half an mma
 * step. */
#define LARGE(head_dim, head_dim_v, left, ...) \
    {ANY, head_dim, head_dim_v, ANY, ANY, ANY, ANY, left, {__VA_ARGS__}}

const struct fa_tile_row FA_TILES[] = {
    /* head_dim, rows_per_sm, mask_right, tile_n, sub_n, warps, warp_m, stages
     * head_dim, head_dim_v, mask_left,   tile_n, sub_n, warps, warp_m, stages */
    SMALL( 64,  64,   0,  64, 32, 4, 16, 3),
    SMALL( 64, 256,   1,  64, 64, 4, 16, 3),
    LARGE( 64,  64, ANY,  64, 32, 4, 32, 3),

    SMALL( 96,  64,   0,  64, 32, 4, 16, 2),
    SMALL( 96, 256,   1,  64, 32, 4, 16, 2),
    LARGE( 96,  96, ANY,  32, 16, 4, 32, 4),

    SMALL(128,  64, ANY,  64, 64, 4, 16, 2),
    SMALL(128, 128,   0,  64, 64, 8, 16, 2),
    SMALL(128, 256,   1,  32, 32, 4, 16, 3),
    LARGE(128, 128,   1,  64, 32, 8, 16, 3),
    LARGE( 96, 128, ANY,  32, 16, 4, 32, 3),
    LARGE(104, 128, ANY,  64, 32, 8, 16, 3),
    LARGE(112, 128, ANY,  32, 16, 4, 32, 3),
    LARGE(120, 128, ANY,  64, 32, 8, 16, 3),
    LARGE(128, 128, ANY,  32, 16, 4, 32, 3),

    LARGE(192, 192, ANY,  32, 32, 4, 16, 2),

    SMALL(256,  64,   0,  32, 32, 4, 16, 2),
    SMALL(256, 128,   1,  32, 32, 4, 16, 2),
    LARGE(256, 256, ANY,  32, 32, 8, 16, 3),
};
/* clang-format on */

const size_t FA_TILE_COUNT = sizeof FA_TILES / sizeof *FA_TILES;
