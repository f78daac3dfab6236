/* Data alone. plan.c takes the first row that covers the head dims and fits the shared memory. */
#include "tiles.h"

/* 16 rows per warp where 32 would spill registers: windows, and K rows that end in half an mma
 * step. */
static const struct fa_tile_row ROWS[] = {
    /* head_dim, head_dim_v, mask_left: {tile_n, sub_n, warps, warp_m, stages, kernel, producer} */
    {64, 64, false, {64, 32, 4, 32, 3, FA_KERNEL_FORWARD, 0}},
    {96, 96, false, {32, 16, 4, 32, 4, FA_KERNEL_FORWARD, 0}},
    {128, 128, true, {64, 32, 8, 16, 3, FA_KERNEL_FORWARD, 0}},
    {96, 128, false, {32, 16, 4, 32, 3, FA_KERNEL_FORWARD, 0}},
    {104, 128, false, {64, 32, 8, 16, 3, FA_KERNEL_FORWARD, 0}},
    {112, 128, false, {32, 16, 4, 32, 3, FA_KERNEL_FORWARD, 0}},
    {120, 128, false, {64, 32, 8, 16, 3, FA_KERNEL_FORWARD, 0}},
    {128, 128, false, {32, 16, 4, 32, 3, FA_KERNEL_FORWARD, 0}},
    {192, 192, false, {32, 32, 4, 16, 2, FA_KERNEL_FORWARD, 0}},
    {256, 256, false, {32, 32, 8, 16, 3, FA_KERNEL_FORWARD, 0}},
};

const struct fa_tile_table FA_TILES = {ROWS, sizeof ROWS / sizeof *ROWS};
