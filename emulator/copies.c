/* cp.async: copies from global to shared memory that are on their way until a lane waits for them.
 *
 * Every lane has its own sequence of groups. A warp's instruction is one record for all its lanes,
 * which leave it as each of them waits; until then the shadow lets nobody touch the bytes. When the
 * data arrives in between is not said by PTX, and launch.late_copies chooses between both ends. */
#include "emulator.h"

#include <stdlib.h>
#include <string.h>

struct record {
    lanes mask; /* lanes whose copy is on its way */
    uint32_t bytes;
    uint32_t offset[LANES];     /* in shared memory */
    const uint8_t *from[LANES]; /* in global memory, */
    uint32_t from_bytes[LANES]; /* and how many there: the rest becomes zeros */
    uint32_t group[LANES];
};

struct copies {
    struct record *records; /* the oldest first */
    int count, capacity;
    uint32_t groups[LANES]; /* that each lane has committed */
};

struct copies *make_copies(void) { return calloc(1, sizeof(struct copies)); }

void free_copies(struct copies *copies)
{
    if (copies != NULL)
        free(copies->records);
    free(copies);
}

void copies_start_block(struct copies *copies)
{
    copies->count = 0;
    memset(copies->groups, 0, sizeof copies->groups);
}

static struct record *add_record(struct copies *copies)
{
    if (copies->count == copies->capacity) {
        const int larger = copies->capacity ? 2 * copies->capacity : 64;
        void *moved = realloc(copies->records, (size_t)larger * sizeof *copies->records);
        if (moved == NULL)
            return NULL;
        copies->records = moved;
        copies->capacity = larger;
    }
    return &copies->records[copies->count++];
}

/* ---- issue ----------------------------------------------------------------------------------- */

static void move_data(const struct block *block, const struct record *record, int lane)
{
    uint8_t *to = block->shared + record->offset[lane];
    const uint32_t bytes = record->from_bytes[lane];
    if (bytes == 16) {
        memcpy(to, record->from[lane], 16);
        return;
    }
    if (bytes > 0)
        memcpy(to, record->from[lane], bytes);
    memset(to + bytes, 0, record->bytes - bytes);
}

/* One lane's part of a record: false after a fault. */
static bool issue_lane(struct warp *warp, const struct instruction *in, int lane,
                       struct record *record)
{
    const uint32_t bytes = record->bytes, size = in->count == 4 ? r32(warp, in, 3)[lane] : bytes;
    const uint64_t to = address_of(warp, in, 0, lane) - SHARED_BASE;
    const uint64_t from = address_of(warp, in, 1, lane);
    const uint32_t room = warp->block->shared_bytes;
    if (size > bytes)
        fault(warp, in, 1u << lane, "copies %u of %u bytes", size, bytes);
    else if ((to | from) & (bytes - 1))
        fault(warp, in, 1u << lane, "copies %u bytes from %#llx to shared byte %lld: not aligned",
              bytes, (unsigned long long)from, (long long)to);
    else if (to >= room || bytes > room - to)
        fault(warp, in, 1u << lane, "copies %u bytes to shared byte %lld of the block's %u", bytes,
              (long long)to, room);
    else if (shadow_copy_issued(warp, in, lane, (uint32_t)to, bytes)) {
        record->offset[lane] = (uint32_t)to;
        record->from[lane] = size > 0 ? read_global(warp, in, lane, from, size) : NULL;
        record->from_bytes[lane] = size;
        return size == 0 || record->from[lane] != NULL;
    }
    return false;
}

/* The copy engine takes a turn for every row of 128 bytes that an instruction writes to. */
static uint32_t count_rows(const struct record *record, lanes active)
{
    uint32_t rows[LANES], count = 0;
    for (; active; active &= active - 1) {
        const uint32_t row = record->offset[__builtin_ctz(active)] / 128;
        uint32_t i = count;
        while (i > 0 && rows[i - 1] != row)
            i--;
        if (i == 0)
            rows[count++] = row;
    }
    return count;
}

static void count_copy(struct warp *warp, const struct instruction *in, const struct record *record)
{
    struct tally *tally = tally_of(warp, in);
    const uint32_t lanes_count = (uint32_t)__builtin_popcount(record->mask);
    tally->wavefronts += count_rows(record, record->mask);
    tally->wavefronts_ideal += (lanes_count * record->bytes + 127) / 128;
    for (lanes left = record->mask; left; left &= left - 1)
        tally->global_bytes += record->from_bytes[__builtin_ctz(left)];
}

/* cp.async [to], [from], bytes[, bytes to read] */
static void issue(struct warp *warp, const struct instruction *in, lanes active)
{
    const int64_t bytes = in->operand[2].offset;
    const bool is_cg = in->opcode->detail;
    if (bytes != 16 && (is_cg || (bytes != 4 && bytes != 8)))
        return fault(warp, in, active, "copies %lld bytes at once", (long long)bytes);
    struct record *record = add_record(warp->copies);
    if (record == NULL)
        return fault(warp, in, active, "out of memory");
    record->mask = active;
    record->bytes = (uint32_t)bytes;
    memcpy(record->group, warp->copies->groups, sizeof record->group);
    for (int lane = 0; lane < LANES; lane++) {
        if (!has_lane(active, lane))
            continue;
        if (!issue_lane(warp, in, lane, record))
            return;
        if (!warp->block->launch->late_copies)
            move_data(warp->block, record, lane);
    }
    count_copy(warp, in, record);
}

/* ---- wait ------------------------------------------------------------------------------------ */

static void commit(struct warp *warp, const struct instruction *in, lanes active)
{
    (void)in;
    for (int lane = 0; lane < LANES; lane++)
        warp->copies->groups[lane] += has_lane(active, lane);
}

/* Lets the lanes' copies of a record land that are not among their `pending` newest groups. */
static void land(struct warp *warp, struct record *record, lanes active, uint32_t pending)
{
    const uint32_t *groups = warp->copies->groups;
    lanes done = 0;
    for (int lane = 0; lane < LANES; lane++)
        done |= (lanes)(record->group[lane] + (uint64_t)pending < groups[lane]) << lane;
    done &= active & record->mask;
    record->mask &= ~done;
    for (; done; done &= done - 1) {
        const int lane = __builtin_ctz(done);
        if (warp->block->launch->late_copies)
            move_data(warp->block, record, lane);
        shadow_copy_landed(warp, lane, record->offset[lane], record->bytes);
    }
}

static void wait_until(struct warp *warp, lanes active, uint32_t pending)
{
    struct copies *copies = warp->copies;
    int left = 0;
    for (int i = 0; i < copies->count; i++) {
        land(warp, &copies->records[i], active, pending);
        if (copies->records[i].mask == 0)
            continue;
        if (left < i)
            copies->records[left] = copies->records[i];
        left++;
    }
    copies->count = left;
}

static void wait_group(struct warp *warp, const struct instruction *in, lanes active)
{
    wait_until(warp, active, (uint32_t)in->operand[0].offset);
}

static void wait_all(struct warp *warp, const struct instruction *in, lanes active)
{
    commit(warp, in, active);
    wait_until(warp, active, 0);
}

#define COPY(name, is_cg)                                                                          \
    {name, "[ [ i", issue, KIND_COPY, is_cg}, { name, "[ [ i w", issue, KIND_COPY, is_cg }

/* With a hint how much of the source the L2 cache may fetch with it. */
#define COPIES(name, is_cg)                                                                        \
    COPY(name, is_cg), COPY(name ".L2::64B", is_cg), COPY(name ".L2::128B", is_cg),                \
        COPY(name ".L2::256B", is_cg)

const struct opcode COPY_OPCODES[] = {
    COPIES("cp.async.ca.shared.global", false),
    COPIES("cp.async.ca.shared::cta.global", false),
    COPIES("cp.async.cg.shared.global", true),
    COPIES("cp.async.cg.shared::cta.global", true),
    {"cp.async.commit_group", "", commit, KIND_COPY, 0},
    {"cp.async.wait_group", "i", wait_group, KIND_COPY, 0},
    {"cp.async.wait_all", "", wait_all, KIND_COPY, 0},
    {NULL, NULL, NULL, 0, 0},
};
