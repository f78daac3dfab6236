/* The tile table: which shape of block serves which head dimensions. */
#ifndef FA_TILES_H
#define FA_TILES_H

#include <stdbool.h>
#include <stddef.h>

#include "variant.h"

struct fa_tile {
    int tile_n; /* keys per stage of the ring in shared memory */
    int sub_n;  /* keys whose scores are in registers at a time */
    int warps;
    int warp_m;   /* query rows per warp; tile_m is warps * warp_m */
    int stages;   /* of the ring; each holds a K and a V tile */
    int kernel;   /* enum fa_kernel_id */
    int producer; /* enum fa_producer; of FA_KERNEL_FORWARD 0 */
};

struct fa_tile_row {
    int head_dim, head_dim_v; /* the row serves head dims up to these */
    bool mask_left;           /* and only calls whose window ends on the left; else all */
    struct fa_tile tile;
};

struct fa_tile_table {
    const struct fa_tile_row *rows; /* the first that serves a call is taken */
    size_t count;
};

extern const struct fa_tile_table FA_TILES;

#endif
