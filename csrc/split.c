#include "split.h"

#include "arithmetic.h"

/* The choice rests on a count of bytes: K and V are read from memory once, cold, and what else
 * takes time counts as the bytes that a multiprocessor could have read meanwhile, its share of the
 * bandwidth being 24 KB per microsecond. Measured on an H100, see S07 in benchmarks/NOTES.md. On a
 * 12.x card it is 6 to 10 KB: there the same times count as fewer bytes, which has not been
 * measured. */
#define MEASURED_SHARE (24 * 1024.0)

/* From a request to its bytes. A block has in_flight bytes on their way and gets no more than those
 * in this time: with 64 KB, a block on every other multiprocessor is enough. */
#define LATENCY_BYTES (37 * 1024.0)

/* A block: its launch, its queries, the first tile on its way, the last one through the softmax,
 * its part of out. Blocks that share a multiprocessor hide little of that from each other where
 * memory is what they all wait for. */
#define BLOCK_BYTES (110 * 1024.0)

/* The second kernel, without what it reads. */
#define COMBINE_BYTES (50 * 1024.0)

/* What a tile of so many queries takes on the tensor cores, of the bytes of its keys. */
#define COMPUTE(tile_m) ((tile_m) * 0.008)

/* Shorter parts never pay, nor do those of fewer keys in all, and more parts than these are more
 * than any machine has use for. */
#define MIN_PART_KEYS 64
#define MIN_KEYS      512
#define MAX_PARTS     256

/* So many times a multiprocessor may be filled with parts, one after the other. */
#define MAX_ROUNDS 3

/* Memory is read no faster than its bandwidth, and no faster than the multiprocessor that has the
 * most blocks, each of them with the most tiles, asks for it and computes. Parts are written and
 * read again. */
static double time_of(const struct fa_grid *grid, int parts)
{
    const double busiest = (double)CEIL_DIV((int64_t)grid->blocks * parts, grid->sms);
    const double key_bytes = (double)grid->tile_n * grid->key_bytes; /* of a tile */
    const double cold = (double)grid->kv_heads * grid->tiles * key_bytes / grid->sms;
    const double unit = grid->share ? grid->share / MEASURED_SHARE : 1;
    const double compute = unit * COMPUTE(grid->tile_m) * grid->mma_time;
    const double asked =
        unit * LATENCY_BYTES / (MIN(busiest, grid->blocks_per_sm) * grid->in_flight);
    const double block = CEIL_DIV(grid->tiles, parts) * key_bytes;
    const double read = MAX(cold, busiest * block * MAX(asked, compute));
    const double parted = 2.0 * parts * (double)grid->row_bytes / grid->sms;
    return read + unit * busiest * BLOCK_BYTES + (parts > 1 ? unit * COMBINE_BYTES + parted : 0);
}

/* Where the multiprocessors hold all the blocks that they can, nothing is idle that parts could
 * use. Else only such numbers are worth a look as give every other multiprocessor one block, or
 * every one, and so on; of those with equally long parts the least. */
int fa_split_parts(const struct fa_grid *grid)
{
    const int64_t most = MIN((int64_t)grid->tiles * grid->tile_n / MIN_PART_KEYS, MAX_PARTS);
    int best = 1;
    if (grid->blocks >= (int64_t)grid->sms * grid->blocks_per_sm ||
        (int64_t)grid->tiles * grid->tile_n < MIN_KEYS)
        return best;
    for (int halves = 1; halves <= 2 * grid->blocks_per_sm * MAX_ROUNDS; halves++) {
        const int64_t full = MIN((int64_t)grid->sms * halves / 2 / MAX(1, grid->blocks), most);
        if (full <= 1)
            continue;
        const int parts = CEIL_DIV(grid->tiles, CEIL_DIV(grid->tiles, (int)full));
        if (time_of(grid, parts) < time_of(grid, best))
            best = parts;
    }
    return best;
}
