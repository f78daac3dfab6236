/* Data alone: plan.c says how a row is chosen. */
#include "tiles.h"

#define ANY FA_ANY

/* Head dims up to a bracket, for every call. 16 rows per warp where 32 would spill registers:
 * windows, and K rows that end in half an mma step. */
#define BRACKET(head_dim, head_dim_v, left, ...)                                                   \
    {                                                                                              \
        ANY, head_dim, head_dim_v, ANY, ANY, ANY, left, { __VA_ARGS__ }                            \
    }

const struct fa_tile_row FA_TILES[] = {
    /* head_dim, head_dim_v, mask_left, tile_n, sub_n, warps, warp_m, stages */
    BRACKET(64, 64, ANY, 64, 32, 4, 32, 3),   BRACKET(96, 96, ANY, 32, 16, 4, 32, 4),
    BRACKET(128, 128, 1, 64, 32, 8, 16, 3),   BRACKET(96, 128, ANY, 32, 16, 4, 32, 3),
    BRACKET(104, 128, ANY, 64, 32, 8, 16, 3), BRACKET(112, 128, ANY, 32, 16, 4, 32, 3),
    BRACKET(120, 128, ANY, 64, 32, 8, 16, 3), BRACKET(128, 128, ANY, 32, 16, 4, 32, 3),
    BRACKET(192, 192, ANY, 32, 32, 4, 16, 2), BRACKET(256, 256, ANY, 32, 32, 8, 16, 3),
};

const size_t FA_TILE_COUNT = sizeof FA_TILES / sizeof *FA_TILES;
