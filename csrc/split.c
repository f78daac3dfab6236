#include "split.h"

#include <stdint.h>

#include "arithmetic.h"

/* What the choice rests on. The unit of time is that of one key, in a block that has a
 * multiprocessor for itself. */

/* The start and the end of a block: its queries, the first tile on its way, its part of out. */
#define BLOCK_KEYS 64.0

/* The second kernel: its launch, and what it reads of each part. */
#define COMBINE_KEYS      256.0
#define COMBINE_PART_KEYS 4.0

/* Blocks hide each other's waits: n of them on a multiprocessor take n times this, but no less than
 * one alone. */
#define CROWDED 0.85

/* Shorter parts never pay, and more parts than these are more than any machine has use for. */
#define MIN_PART_KEYS 128
#define MAX_PARTS     256

/* So many times a multiprocessor may be filled with parts, one after the other. */
#define MAX_ROUNDS 3

/* What n blocks on a multiprocessor take, of the time of one alone. */
static double crowd(int64_t n) { return n == 0 ? 0 : MAX(1, n * CROWDED); }

/* The multiprocessor that has the most blocks, each of them with the most tiles, ends last. */
static double time_of(const struct fa_grid *grid, int parts)
{
    const int64_t busiest = CEIL_DIV((int64_t)grid->blocks * parts, grid->sms);
    const int64_t rounds = busiest / grid->blocks_per_sm, rest = busiest % grid->blocks_per_sm;
    const double keys = (double)CEIL_DIV(grid->tiles, parts) * grid->tile_n;
    const double combine = parts > 1 ? COMBINE_KEYS + parts * COMBINE_PART_KEYS : 0;
    return (keys + BLOCK_KEYS) * (rounds * crowd(grid->blocks_per_sm) + crowd(rest)) + combine;
}

/* Where the multiprocessors hold all the blocks that they can, nothing is idle that parts could
 * use. Else only such numbers are worth a look as give every multiprocessor one block, or two, and
 * so on; of those with equally long parts the least. */
int fa_split_parts(const struct fa_grid *grid)
{
    const int64_t most = MIN((int64_t)grid->tiles * grid->tile_n / MIN_PART_KEYS, MAX_PARTS);
    int best = 1;
    if (grid->blocks >= (int64_t)grid->sms * grid->blocks_per_sm)
        return best;
    for (int each = 1; each <= grid->blocks_per_sm * MAX_ROUNDS; each++) {
        const int64_t full = MIN((int64_t)grid->sms * each / MAX(1, grid->blocks), most);
        if (full <= 1)
            continue;
        const int parts = CEIL_DIV(grid->tiles, CEIL_DIV(grid->tiles, (int)full));
        if (time_of(grid, parts) < time_of(grid, best))
            best = parts;
    }
    return best;
}
