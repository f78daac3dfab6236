/* mbarriers: objects in shared memory that count arrivals, and bytes that bulk loads bring.
 *
 * A phase is complete when all arrivals have come, and all bytes that were expected. The counts
 * are kept outside of shared memory: the eight bytes there only say that there is an mbarrier, and
 * nobody may overwrite them. */
#include "bulk.h"

#include <stdio.h>
#include <string.h>

#define MBARRIER_MAGIC 0x72656972726162Lu /* what the eight bytes hold */

enum {
    MBARRIER_BYTES = 8,
    MAX_COUNT = (1 << 20) - 1, /* of arrivals, and of bytes in either direction */
};

/* ---- which mbarrier ------------------------------------------------------------------------- */

static struct mbarrier *mbarrier_at(struct block *block, uint64_t address)
{
    struct bulk *bulk = block->bulk;
    for (int i = 0; i < bulk->mbarrier_count; i++)
        if (bulk->mbarriers[i].address == address)
            return &bulk->mbarriers[i];
    return NULL;
}

struct mbarrier *find_mbarrier(struct warp *warp, const struct instruction *in, int lane,
                               int operand)
{
    const uint64_t address = address_of(warp, in, operand, lane);
    struct mbarrier *mbarrier = mbarrier_at(warp->block, address);
    if (!mbarrier) {
        fault(warp, in, 1u << lane, "no mbarrier has been initialised at shared address %llu",
              (unsigned long long)address);
        return NULL;
    }
    const uint64_t *bytes = read_shared(warp, in, lane, address, MBARRIER_BYTES);
    if (!bytes)
        return NULL;
    if (*bytes == MBARRIER_MAGIC)
        return mbarrier;
    fault(warp, in, 1u << lane, "the mbarrier at shared address %llu has been overwritten",
          (unsigned long long)address);
    return NULL;
}

static void init_mbarrier(struct warp *warp, const struct instruction *in, int lane)
{
    struct bulk *bulk = warp->block->bulk;
    const uint64_t address = address_of(warp, in, 0, lane);
    const uint32_t expected = r32(warp, in, 1)[lane];
    uint64_t *bytes = write_shared(warp, in, lane, address, MBARRIER_BYTES);
    if (!bytes)
        return;
    if (mbarrier_at(warp->block, address))
        return fault(warp, in, 1u << lane, "an mbarrier is at shared address %llu already",
                     (unsigned long long)address);
    if (expected == 0 || expected > MAX_COUNT)
        return fault(warp, in, 1u << lane, "an mbarrier for %u arrivals", expected);
    if (bulk->mbarrier_count == MAX_MBARRIERS)
        return fault(warp, in, 1u << lane, "more than %d mbarriers", MAX_MBARRIERS);
    *bytes = MBARRIER_MAGIC;
    bulk->mbarriers[bulk->mbarrier_count++] = (struct mbarrier){.address = (uint32_t)address,
                                                                .expected = expected,
                                                                .pending = expected,
                                                                .warp = warp->index,
                                                                .lane = lane};
}

void init_mbarriers(struct warp *warp, const struct instruction *in, lanes active)
{
    for (int lane = 0; lane < LANES; lane++)
        if (has_lane(active, lane))
            init_mbarrier(warp, in, lane);
}

static bool is_signalled_by_loads(const struct bulk *bulk, const struct mbarrier *mbarrier)
{
    for (int i = 0; i < bulk->loads.count; i++)
        if (bulk->loads.all[i].mbarrier == mbarrier->address)
            return true;
    return mbarrier->bytes != 0;
}

void drop_mbarriers(struct warp *warp, const struct instruction *in, lanes active)
{
    struct bulk *bulk = warp->block->bulk;
    for (int lane = 0; lane < LANES; lane++) {
        if (!has_lane(active, lane))
            continue;
        struct mbarrier *mbarrier = find_mbarrier(warp, in, lane, 0);
        if (!mbarrier || !write_shared(warp, in, lane, mbarrier->address, MBARRIER_BYTES))
            return;
        if (is_signalled_by_loads(bulk, mbarrier))
            return fault(warp, in, 1u << lane, "bulk copies to this mbarrier are on their way");
        *mbarrier = bulk->mbarriers[--bulk->mbarrier_count];
    }
}

/* fence.mbarrier_init and fence.proxy.async: from here on the engine of the bulk copies sees what
 * these lanes have initialised. */
void fence_mbarriers(struct warp *warp, const struct instruction *in, lanes active)
{
    struct bulk *bulk = warp->block->bulk;
    (void)in;
    for (int i = 0; i < bulk->mbarrier_count; i++) {
        struct mbarrier *mbarrier = &bulk->mbarriers[i];
        if (mbarrier->warp == warp->index && has_lane(active, mbarrier->lane))
            mbarrier->is_fenced = true;
    }
}

/* ---- phases --------------------------------------------------------------------------------- */

/* Goes on to the next phase if nothing is lacking in this one. */
static void end_phase(struct block *block, struct mbarrier *mbarrier)
{
    if (mbarrier->pending > 0 || mbarrier->bytes != 0)
        return;
    mbarrier->phase++;
    mbarrier->pending = mbarrier->expected;
    mbarrier->completed = mbarrier->arriving;
    memset(&mbarrier->arriving, 0, sizeof mbarrier->arriving);
    block->progress++;
}

/* Counts bytes as expected, or as copied where they are negative. */
static bool add_bytes(struct warp *warp, const struct instruction *in, int lane,
                      struct mbarrier *mbarrier, int64_t bytes)
{
    const int64_t sum = mbarrier->bytes + bytes;
    if (sum < -MAX_COUNT || sum > MAX_COUNT) {
        fault(warp, in, 1u << lane, "mbarrier %u would wait for %lld bytes, and cannot count those",
              mbarrier->address, (long long)sum);
        return false;
    }
    mbarrier->bytes = (int32_t)sum;
    return true;
}

void complete_bytes(const struct transfer *load, uint32_t epoch)
{
    struct block *block = load->warp->block;
    struct mbarrier *mbarrier = mbarrier_at(block, load->mbarrier);
    if (!add_bytes(load->warp, load->in, load->lane, mbarrier, -(int64_t)box_bytes(&load->map)))
        return;
    mbarrier->arriving.epoch[BULK_AGENT] = epoch;
    end_phase(block, mbarrier);
}

void expect_bytes(struct warp *warp, const struct instruction *in, lanes active)
{
    for (int lane = 0; lane < LANES; lane++) {
        if (!has_lane(active, lane))
            continue;
        struct mbarrier *mbarrier = find_mbarrier(warp, in, lane, 0);
        if (!mbarrier || !add_bytes(warp, in, lane, mbarrier, r32(warp, in, 1)[lane]))
            return;
        end_phase(warp->block, mbarrier);
    }
}

/* ---- arrivals ------------------------------------------------------------------------------- */

/* What an arrival returns, and test_wait wants back. */
static uint64_t state_of(const struct mbarrier *mbarrier)
{
    return (uint64_t)mbarrier->address << 32 | mbarrier->phase;
}

static bool arrive_at(struct warp *warp, const struct instruction *in, int lane,
                      struct mbarrier *mbarrier, uint32_t count)
{
    if (count == 0 || count > mbarrier->pending) {
        fault(warp, in, 1u << lane, "%u arrivals at mbarrier %u, which lacks %u of %u", count,
              mbarrier->address, mbarrier->pending, mbarrier->expected);
        return false;
    }
    mbarrier->pending -= count;
    clock_join(&mbarrier->arriving, &warp->clock);
    end_phase(warp->block, mbarrier);
    return true;
}

/* mbarrier.arrive state, [mbarrier], count or bytes. The other lanes of a warp may still touch what
 * this one's arrival would release: only where all come together is it the whole warp that says
 * that it is done. */
void arrive_at_mbarriers(struct warp *warp, const struct instruction *in, lanes active)
{
    const int detail = in->opcode->detail;
    if (active == living_lanes(warp))
        clock_advance(warp);
    for (int lane = 0; lane < LANES; lane++) {
        if (!has_lane(active, lane))
            continue;
        struct mbarrier *mbarrier = find_mbarrier(warp, in, lane, 1);
        if (!mbarrier)
            return;
        const uint32_t count = detail == ARRIVE_COUNT ? r32(warp, in, 2)[lane] : 1;
        if (detail == ARRIVE_EXPECT_BYTES &&
            !add_bytes(warp, in, lane, mbarrier, r32(warp, in, 2)[lane]))
            return;
        r64(warp, in, 0)[lane] = state_of(mbarrier);
        if (!arrive_at(warp, in, lane, mbarrier, count))
            return;
    }
}

/* ---- tests ---------------------------------------------------------------------------------- */

/* Is the phase complete that the lane asks for? */
static bool is_complete(struct warp *warp, const struct instruction *in, int lane,
                        const struct mbarrier *mbarrier)
{
    if (in->opcode->detail == TEST_PARITY) {
        const uint32_t parity = r32(warp, in, 2)[lane];
        if (parity > 1)
            fault(warp, in, 1u << lane, "a phase's parity is 0 or 1, not %u", parity);
        return (mbarrier->phase & 1) != parity;
    }
    const uint64_t age = state_of(mbarrier) - r64(warp, in, 2)[lane];
    if (age > 1)
        fault(warp, in, 1u << lane,
              "the state is not of this mbarrier's phase %u or the one before", mbarrier->phase);
    return age == 1;
}

/* A lane that finds its phase complete has seen what those had seen that arrived, and so have the
 * lanes beside it: of a warp, one lane often waits for all. */
void test_mbarriers(struct warp *warp, const struct instruction *in, lanes active)
{
    lanes complete = 0;
    for (int lane = 0; lane < LANES; lane++) {
        if (!has_lane(active, lane))
            continue;
        struct mbarrier *mbarrier = find_mbarrier(warp, in, lane, 1);
        if (!mbarrier || !land_loads(warp->block, mbarrier->address))
            return;
        if (!is_complete(warp, in, lane, mbarrier))
            continue;
        complete |= 1u << lane;
        clock_join(&warp->clock, &mbarrier->completed);
    }
    lanes *result = predicate(warp, in, 0);
    *result = (*result & ~active) | complete;
    if (complete != active)
        yield_path(warp);
}

/* ---- deadlocks ------------------------------------------------------------------------------ */

void explain_bulk(const struct block *block, char *text, size_t size)
{
    size_t length = 0;
    text[0] = 0;
    for (int i = 0; i < block->bulk->mbarrier_count && length < size; i++) {
        const struct mbarrier *mbarrier = &block->bulk->mbarriers[i];
        const int64_t bytes = mbarrier->bytes;
        length += (size_t)snprintf(
            text + length, size - length, "; mbarrier %u lacks in phase %u: %u of %u arrivals",
            mbarrier->address, mbarrier->phase, mbarrier->pending, mbarrier->expected);
        if (bytes && length < size)
            length += (size_t)snprintf(text + length, size - length, ", %lld bytes%s",
                                       (long long)(bytes < 0 ? -bytes : bytes),
                                       bytes < 0 ? " too many" : "");
    }
}
