#include "split.h"

#include <stdint.h>

#define MIN(a, b)      ((a) < (b) ? (a) : (b))
#define MAX(a, b)      ((a) > (b) ? (a) : (b))
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))

/* What the choice rests on. The unit of time is that of one key, in a block that has a
 * multiprocessor for itself. */

/* The start and the end of a block: its queries, the first tile on its way, its part of out. */
#define BLOCK_KEYS 64.0

/* The second kernel: its launch, and what it reads of each part. */
#define COMBINE_KEYS      256.0
#define COMBINE_PART_KEYS 4.0

/* Blocks hide each other's waits: n of them on a multiprocessor take n times this, but no less than
 * one alone. */
#define CROWDED 0.75

/* Shorter parts never pay, and more parts than these are more than any machine has use for. */
#define MIN_PART_KEYS 128
#define MAX_PARTS     256

/* The multiprocessor that has the most blocks, each of them with the most tiles, ends last. */
static double time_of(const struct fa_grid *grid, int parts)
{
    const double keys = (double)CEIL_DIV(grid->tiles, parts) * grid->tile_n;
    const double crowd = (double)CEIL_DIV((int64_t)grid->blocks * parts, grid->sms);
    const double combine = parts > 1 ? COMBINE_KEYS + parts * COMBINE_PART_KEYS : 0;
    return (keys + BLOCK_KEYS) * MAX(1, crowd * CROWDED) + combine;
}

/* Where the multiprocessors hold all the blocks that they can, parts would only wait for each
 * other. Else only such numbers are worth a look as give every multiprocessor one block, or two, up
 * to all that it can hold; of those with equally long parts the least. */
int fa_split_parts(const struct fa_grid *grid)
{
    const int64_t most = MIN((int64_t)grid->tiles * grid->tile_n / MIN_PART_KEYS, MAX_PARTS);
    int best = 1;
    if (grid->blocks >= (int64_t)grid->sms * grid->blocks_per_sm)
        return best;
    for (int resident = 1; resident <= grid->blocks_per_sm; resident++) {
        const int64_t full = MIN((int64_t)grid->sms * resident / MAX(1, grid->blocks), most);
        if (full <= 1)
            continue;
        const int parts = CEIL_DIV(grid->tiles, CEIL_DIV(grid->tiles, (int)full));
        if (time_of(grid, parts) < time_of(grid, best))
            best = parts;
    }
    return best;
}
