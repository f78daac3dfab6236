/* Data alone. plan.c takes the first row that covers the head dims and fits the shared memory. */
#include "tiles.h"

const struct fa_tile_row FA_TILES[] = {
    /* head_dim, head_dim_v: {tile_n, sub_n, warps, warp_m, stages} */
    {64, 64, {64, 32, 4, 32, 3}},
    {128, 128, {32, 16, 4, 32, 3}},
    {256, 256, {32, 16, 8, 16, 3}},
};

const size_t FA_TILE_COUNT = sizeof FA_TILES / sizeof *FA_TILES;
