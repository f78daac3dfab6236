/* How many parts the keys of a block of queries are divided into, for the forward to have blocks
 * enough. Pure C. */
#ifndef FA_SPLIT_H
#define FA_SPLIT_H

#include <stdint.h>

/* A call before it is split. */
struct fa_grid {
    int blocks;        /* each goes through the keys of one block of queries */
    int tiles;         /* of keys, of the longest of them */
    int tile_m;        /* queries of a tile, some of which may not exist */
    int tile_n;        /* keys of a tile */
    int key_bytes;     /* of K and V, of one key */
    int64_t kv_heads;  /* of all sequences: so many K and V are read from memory, once */
    int64_t row_bytes; /* of all rows of out, in fp32 */
    int in_flight;     /* bytes of K and V that a block has on their way */
    int sms;           /* multiprocessors */
    int blocks_per_sm; /* that can be resident on one */
    int share;         /* bytes per microsecond that one has of the bandwidth; 0: as measured */
    double mma_time;   /* of mma.sync, in units of an H100's */
};

/* The number of parts that takes the least time: 1, where a split does not pay. */
int fa_split_parts(const struct fa_grid *grid);

#endif
