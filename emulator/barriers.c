/* The block's barriers: bar.sync, bar.arrive, bar.red. */
#include "emulator.h"

#include <stdio.h>
#include <string.h>

/* Gives every waiting warp the reduced value, in the destination of its own bar.red. */
static void deliver(struct block *block, struct barrier *barrier)
{
    for (int w = 0; w < block->warp_count; w++) {
        if (!has_lane(barrier->waiting, w))
            continue;
        struct warp *warp = &block->warps[w];
        const struct instruction *in = barrier->at[w];
        if (in->opcode->detail == '+')
            for (int lane = 0; lane < LANES; lane++)
                r32(warp, in, 0)[lane] = (uint32_t)barrier->reduced;
        else if (in->opcode->detail)
            *predicate(warp, in, 0) = barrier->reduced ? ALL_LANES : 0;
        clock_join(&warp->clock, &barrier->clock);
        warp->waiting = false;
    }
}

/* A warp comes to a barrier, where `expected` threads meet, and waits there unless it only
 * arrives. Whoever waits has seen what all did before. */
static void come(struct warp *warp, const struct instruction *in, lanes active, uint32_t id,
                 uint32_t expected, bool waits, int contribution)
{
    struct block *block = warp->block;
    if (id >= BARRIERS)
        return fault(warp, in, active, "there is no barrier %u", id);
    struct barrier *barrier = &block->barriers[id];
    if (warp->path_count > 1 || active != living_lanes(warp))
        return fault(warp, in, active,
                     "a barrier that only the lanes %08x of the warp's %08x come to", active,
                     living_lanes(warp));
    if (expected % LANES || expected == 0)
        return fault(warp, in, active, "barrier %u for %u threads: not whole warps", id, expected);
    if (barrier->arrived && barrier->expected != (int)expected)
        return fault(warp, in, active, "barrier %u for %u threads, and others came to it for %d",
                     id, expected, barrier->expected);
    if (barrier->arrived == 0)
        *barrier = (struct barrier){.expected = (int)expected};
    clock_advance(warp);
    clock_join(&barrier->clock, &warp->clock);
    barrier->arrived += LANES;
    barrier->reduced = in->opcode->detail == '&' && barrier->arrived > LANES
                           ? barrier->reduced && contribution
                           : barrier->reduced + contribution;
    if (waits) {
        barrier->at[warp->index] = in;
        barrier->waiting |= 1u << warp->index;
        warp->waiting = true;
    }
    if (barrier->arrived < barrier->expected)
        return;
    deliver(block, barrier);
    *barrier = (struct barrier){0};
    block->progress++;
}

static uint32_t block_threads(const struct warp *warp)
{
    return (uint32_t)warp->block->warp_count * LANES;
}

/* The operand's value, which all lanes agree on. */
static uint32_t uniform(const struct warp *warp, const struct instruction *in, int operand)
{
    return r32(warp, in, operand)[0];
}

static void sync_block(struct warp *warp, const struct instruction *in, lanes active)
{
    come(warp, in, active, uniform(warp, in, 0), block_threads(warp), true, 0);
}

static void sync_some(struct warp *warp, const struct instruction *in, lanes active)
{
    come(warp, in, active, uniform(warp, in, 0), uniform(warp, in, 1), true, 0);
}

static void arrive(struct warp *warp, const struct instruction *in, lanes active)
{
    come(warp, in, active, uniform(warp, in, 0), uniform(warp, in, 1), false, 0);
}

/* bar.red dest, id[, threads], p */
static void reduce(struct warp *warp, const struct instruction *in, lanes active)
{
    const lanes set = *predicate(warp, in, in->count - 1) & active;
    const uint32_t threads = in->count == 4 ? uniform(warp, in, 2) : block_threads(warp);
    const int contribution = in->opcode->detail == '+'   ? __builtin_popcount(set)
                             : in->opcode->detail == '&' ? set == active
                                                         : set != 0;
    come(warp, in, active, uniform(warp, in, 1), threads, true, contribution);
}

void explain_barriers(const struct block *block, char *text, size_t size)
{
    size_t length = strlen(text);
    for (int id = 0; id < BARRIERS; id++) {
        const struct barrier *barrier = &block->barriers[id];
        if (barrier->arrived && length < size)
            length += (size_t)snprintf(text + length, size - length,
                                       "; barrier %d lacks %d of %d threads", id,
                                       barrier->expected - barrier->arrived, barrier->expected);
    }
}

const struct opcode BARRIER_OPCODES[] = {
    {"bar.sync", "w", sync_block, KIND_BARRIER, 0},
    {"bar.sync", "w w", sync_some, KIND_BARRIER, 0},
    {"barrier.sync.aligned", "w", sync_block, KIND_BARRIER, 0},
    {"barrier.sync.aligned", "w w", sync_some, KIND_BARRIER, 0},
    {"bar.arrive", "w w", arrive, KIND_BARRIER, 0},
    {"barrier.arrive.aligned", "w w", arrive, KIND_BARRIER, 0},
    {"bar.red.or.pred", "P w p", reduce, KIND_BARRIER, '|'},
    {"bar.red.or.pred", "P w w p", reduce, KIND_BARRIER, '|'},
    {"bar.red.and.pred", "P w p", reduce, KIND_BARRIER, '&'},
    {"bar.red.and.pred", "P w w p", reduce, KIND_BARRIER, '&'},
    {"bar.red.popc.u32", "W w p", reduce, KIND_BARRIER, '+'},
    {"bar.red.popc.u32", "W w w p", reduce, KIND_BARRIER, '+'},
    {NULL, NULL, NULL, 0, 0},
};
