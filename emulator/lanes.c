/* What the lanes of a warp tell each other: shuffles, votes, reductions, bar.warp.sync.
 *
 * All take a mask of members, lanes that execute the instruction together. It has to be the lanes
 * that do: on hardware others would be waited for, or their values be anyone's guess. */
#include "emulator.h"

/* Whether all lanes name the active ones as members, in an operand; else a fault. */
static bool are_members(struct warp *warp, const struct instruction *in, lanes active, int operand)
{
    const uint32_t *mask = r32(warp, in, operand);
    lanes wrong = 0;
    for (int lane = 0; lane < LANES; lane++)
        wrong |= (lanes)(mask[lane] != active) << lane;
    wrong &= active;
    if (wrong)
        fault(warp, in, wrong, "the mask has the lanes %08x, but %08x are here: %s",
              mask[__builtin_ctz(wrong)], active,
              living_lanes(warp) == active ? "some have exited" : "the warp has diverged");
    return !wrong;
}

static inline uint32_t blend(lanes active, int lane, uint32_t value, uint32_t old)
{
    return has_lane(active, lane) ? value : old;
}

static void set_everywhere(struct warp *warp, const struct instruction *in, lanes active,
                           uint32_t value)
{
    uint32_t *destination = r32(warp, in, 0);
    for (int lane = 0; lane < LANES; lane++)
        destination[lane] = blend(active, lane, value, destination[lane]);
}

static void set_predicate(struct warp *warp, const struct instruction *in, int operand,
                          lanes active, lanes set)
{
    lanes *destination = predicate(warp, in, operand);
    *destination = (*destination & ~active) | (set & active);
}

/* ---- shuffles ------------------------------------------------------------------------------- */

enum mode { IDX, BFLY, UP, DOWN };

/* The lane that `lane` reads, or -1: that one is not in its segment. The packed operand has the
 * last lane of a segment (up: the first), and from bit 8 those bits of a lane that name its
 * segment. */
static inline int source_lane(enum mode mode, int lane, uint32_t amount, uint32_t packed)
{
    const int by = amount & 31, segment = packed >> 8 & 31, clamp = packed & 31;
    const int first = lane & segment, bound = first | (clamp & ~segment);
    const int source = mode == IDX    ? first | (by & ~segment)
                       : mode == BFLY ? lane ^ by
                       : mode == UP   ? lane - by
                                      : lane + by;
    return (mode == UP ? source >= bound : source <= bound) ? source : -1;
}

/* shfl.sync dest[|p], a, b, c, members */
static inline __attribute__((always_inline)) void
shuffle(struct warp *warp, const struct instruction *in, lanes active, enum mode mode)
{
    const bool has_predicate = in->count == 6;
    const int a = 1 + has_predicate;
    const uint32_t *values = r32(warp, in, a), *amounts = r32(warp, in, a + 1);
    const uint32_t *packed = r32(warp, in, a + 2);
    uint32_t *destination = r32(warp, in, 0), shuffled[LANES];
    lanes in_segment = 0, lost = 0;
    if (!are_members(warp, in, active, a + 3))
        return;
    for (int lane = 0; lane < LANES; lane++) {
        const int source = source_lane(mode, lane, amounts[lane], packed[lane]);
        const int from = source < 0 ? lane : source;
        in_segment |= (lanes)(source >= 0) << lane;
        lost |= (lanes)!has_lane(active, from) << lane;
        shuffled[lane] = values[from];
    }
    if (lost & active)
        return fault(warp, in, lost & active, "the shuffle reads a lane that is not here");
    for (int lane = 0; lane < LANES; lane++)
        destination[lane] = blend(active, lane, shuffled[lane], destination[lane]);
    if (has_predicate)
        set_predicate(warp, in, 1, active, in_segment);
}

static void shuffle_idx(struct warp *warp, const struct instruction *in, lanes active)
{
    shuffle(warp, in, active, IDX);
}

static void shuffle_bfly(struct warp *warp, const struct instruction *in, lanes active)
{
    shuffle(warp, in, active, BFLY);
}

static void shuffle_up(struct warp *warp, const struct instruction *in, lanes active)
{
    shuffle(warp, in, active, UP);
}

static void shuffle_down(struct warp *warp, const struct instruction *in, lanes active)
{
    shuffle(warp, in, active, DOWN);
}

/* ---- votes ---------------------------------------------------------------------------------- */

/* vote.sync.mode.pred dest, p, members; the detail is what it tests. */
static void vote(struct warp *warp, const struct instruction *in, lanes active)
{
    const lanes set = *predicate(warp, in, 1) & active;
    const bool all = set == active, any = set != 0;
    if (!are_members(warp, in, active, 2))
        return;
    const bool result = in->opcode->detail == '&'   ? all
                        : in->opcode->detail == '|' ? any
                                                    : all || !any; /* unanimous */
    set_predicate(warp, in, 0, active, result ? ALL_LANES : 0);
}

static void ballot(struct warp *warp, const struct instruction *in, lanes active)
{
    if (are_members(warp, in, active, 2))
        set_everywhere(warp, in, active, *predicate(warp, in, 1) & active);
}

static void active_mask(struct warp *warp, const struct instruction *in, lanes active)
{
    set_everywhere(warp, in, active, active);
}

/* elect.sync dest|p, members: the first one. */
static void elect(struct warp *warp, const struct instruction *in, lanes active)
{
    if (!are_members(warp, in, active, 2))
        return;
    set_everywhere(warp, in, active, (uint32_t)__builtin_ctz(active));
    set_predicate(warp, in, 1, active, active & -active);
}

/* ---- reductions ----------------------------------------------------------------------------- */

enum operation { ADD, MIN_S32, MAX_S32, MIN_U32, MAX_U32, AND, OR, XOR };

static inline uint32_t combine(enum operation operation, uint32_t a, uint32_t b)
{
    switch (operation) {
    case ADD: return a + b;
    case MIN_S32: return (int32_t)a < (int32_t)b ? a : b;
    case MAX_S32: return (int32_t)a > (int32_t)b ? a : b;
    case MIN_U32: return a < b ? a : b;
    case MAX_U32: return a > b ? a : b;
    case AND: return a & b;
    case OR: return a | b;
    case XOR: return a ^ b;
    }
    return 0;
}

/* redux.sync.op dest, a, members; the detail is the operation. */
static void reduce(struct warp *warp, const struct instruction *in, lanes active)
{
    const uint32_t *values = r32(warp, in, 1);
    const int first = __builtin_ctz(active);
    uint32_t result = values[first];
    if (!are_members(warp, in, active, 2))
        return;
    for (int lane = first + 1; lane < LANES; lane++)
        if (has_lane(active, lane))
            result = combine((enum operation)in->opcode->detail, result, values[lane]);
    set_everywhere(warp, in, active, result);
}

/* ---- the barrier of a warp ------------------------------------------------------------------ */

static void synchronise(struct warp *warp, const struct instruction *in, lanes active)
{
    if (!are_members(warp, in, active, 0))
        return;
    if (active != living_lanes(warp))
        return fault(warp, in, active, "a barrier of some lanes of a warp is not supported");
    clock_advance(warp);
}

const struct opcode LANE_OPCODES[] = {
    {"shfl.sync.idx.b32", "W w w w w", shuffle_idx, KIND_SHUFFLE, 0},
    {"shfl.sync.idx.b32", "W|P w w w w", shuffle_idx, KIND_SHUFFLE, 0},
    {"shfl.sync.bfly.b32", "W w w w w", shuffle_bfly, KIND_SHUFFLE, 0},
    {"shfl.sync.bfly.b32", "W|P w w w w", shuffle_bfly, KIND_SHUFFLE, 0},
    {"shfl.sync.up.b32", "W w w w w", shuffle_up, KIND_SHUFFLE, 0},
    {"shfl.sync.up.b32", "W|P w w w w", shuffle_up, KIND_SHUFFLE, 0},
    {"shfl.sync.down.b32", "W w w w w", shuffle_down, KIND_SHUFFLE, 0},
    {"shfl.sync.down.b32", "W|P w w w w", shuffle_down, KIND_SHUFFLE, 0},
    {"vote.sync.all.pred", "P p w", vote, KIND_SHUFFLE, '&'},
    {"vote.sync.any.pred", "P p w", vote, KIND_SHUFFLE, '|'},
    {"vote.sync.uni.pred", "P p w", vote, KIND_SHUFFLE, '='},
    {"vote.sync.ballot.b32", "W p w", ballot, KIND_SHUFFLE, 0},
    {"activemask.b32", "W", active_mask, KIND_SHUFFLE, 0},
    {"elect.sync", "W|P w", elect, KIND_SHUFFLE, 0},
    {"redux.sync.add.s32", "W w w", reduce, KIND_SHUFFLE, ADD},
    {"redux.sync.add.u32", "W w w", reduce, KIND_SHUFFLE, ADD},
    {"redux.sync.min.s32", "W w w", reduce, KIND_SHUFFLE, MIN_S32},
    {"redux.sync.max.s32", "W w w", reduce, KIND_SHUFFLE, MAX_S32},
    {"redux.sync.min.u32", "W w w", reduce, KIND_SHUFFLE, MIN_U32},
    {"redux.sync.max.u32", "W w w", reduce, KIND_SHUFFLE, MAX_U32},
    {"redux.sync.and.b32", "W w w", reduce, KIND_SHUFFLE, AND},
    {"redux.sync.or.b32", "W w w", reduce, KIND_SHUFFLE, OR},
    {"redux.sync.xor.b32", "W w w", reduce, KIND_SHUFFLE, XOR},
    {"bar.warp.sync", "w", synchronise, KIND_BARRIER, 0},
    {NULL, NULL, NULL, 0, 0},
};
