/* Who touched which byte of shared memory last, and what happened before what: every race is found,
 * whatever the order was in which the warps had their turns.
 *
 * A warp's accesses belong to its epoch, a number that grows with every synchronisation; a clock
 * holds the epoch of each agent up to which everything has been seen, and barriers pass clocks on.
 * An access must have seen the last write of its bytes, a write also all reads since; lanes of one
 * warp see each other's in the same way, only by a synchronisation, and each its own at once. */
#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    EPOCH_BITS = 21,
    EPOCH_SHIFT = 32 - EPOCH_BITS, /* in a tag, below it: the agent and the lane */
    AGENT_SHIFT = 5,
    MANY = 1 << AGENT_SHIFT, /* in the tag of a read, which has no agent: several lanes */
    ON_ITS_WAY = (1 << EPOCH_BITS) - 1, /* the epoch of a copy that has not landed: no clock's */
    CHUNK = 16,
};

#define NEVER 0u          /* the tag of a byte that nobody has written in this block */
#define MIXED 0xffffffffu /* the tag of a chunk whose bytes have each their own */

/* Of the last access to a byte. */
struct mark {
    uint32_t tag; /* epoch, agent and lane */
    uint32_t by;  /* which instruction of the program */
};

/* Of all bytes. Most accesses are of whole chunks, and need to look at one mark only. */
struct marks {
    struct mark *chunk, *byte;
};

struct shadow {
    struct block *block;
    int warp_count;
    uint32_t bytes;
    uint32_t newest; /* no warp has reached a later epoch */
    struct marks written, read[MAX_WARPS];
    uint8_t *storing; /* [byte], bulk stores that read it now */
    uint32_t stores;  /* how many of those there are */
};

/* ---- marks ----------------------------------------------------------------------------------- */

static uint32_t make_tag(uint32_t epoch, int agent, int lane)
{
    return epoch << EPOCH_SHIFT | (uint32_t)agent << AGENT_SHIFT | (uint32_t)lane;
}

static uint32_t epoch_of(uint32_t tag) { return tag >> EPOCH_SHIFT; }
static int agent_of(uint32_t tag) { return tag >> AGENT_SHIFT & 63; }
static uint32_t reader_of(uint32_t tag) { return tag & ((1u << EPOCH_SHIFT) - 1); }

static bool make_marks(struct marks *marks, uint32_t bytes)
{
    marks->chunk = calloc(bytes / CHUNK + 1, sizeof *marks->chunk);
    marks->byte = calloc(bytes + CHUNK, sizeof *marks->byte);
    return marks->chunk && marks->byte;
}

static void clear_marks(struct marks *marks, uint32_t bytes)
{
    memset(marks->chunk, 0, (bytes / CHUNK + 1) * sizeof *marks->chunk);
}

/* The mark of byte `at`, and where the next byte is that may have another one. */
static inline struct mark mark_at(const struct marks *marks, uint32_t at, uint32_t *next)
{
    const struct mark chunk = marks->chunk[at / CHUNK];
    if (chunk.tag == MIXED) {
        *next = at + 1;
        return marks->byte[at];
    }
    *next = (at / CHUNK + 1) * CHUNK;
    return chunk;
}

static inline uint32_t chunk_end(uint32_t at, uint32_t end)
{
    const uint32_t next = (at / CHUNK + 1) * CHUNK;
    return next < end ? next : end;
}

/* Gives each byte of a chunk its own mark. Returns them. */
static struct mark *spread(struct marks *marks, uint32_t chunk)
{
    struct mark *bytes = &marks->byte[chunk * CHUNK];
    if (marks->chunk[chunk].tag == MIXED)
        return bytes;
    for (int i = 0; i < CHUNK; i++)
        bytes[i] = marks->chunk[chunk];
    marks->chunk[chunk].tag = MIXED;
    return bytes;
}

static inline void set_marks(struct marks *marks, uint32_t from, uint32_t end, struct mark mark)
{
    for (uint32_t at = from, next; at < end; at = next) {
        next = chunk_end(at, end);
        if (next - at == CHUNK) {
            marks->chunk[at / CHUNK] = mark;
            continue;
        }
        struct mark *bytes = spread(marks, at / CHUNK);
        for (uint32_t i = at; i < next; i++)
            bytes[i % CHUNK] = mark;
    }
}

/* ---- the shadow of a block ------------------------------------------------------------------- */

struct shadow *make_shadow(int warp_count, uint32_t shared_bytes)
{
    struct shadow *shadow = calloc(1, sizeof *shadow);
    if (shadow == NULL)
        return NULL;
    shadow->warp_count = warp_count;
    shadow->bytes = shared_bytes;
    shadow->storing = calloc(1, shared_bytes + 1);
    bool complete = shadow->storing && make_marks(&shadow->written, shared_bytes);
    for (int warp = 0; warp < warp_count && complete; warp++)
        complete = make_marks(&shadow->read[warp], shared_bytes);
    if (complete)
        return shadow;
    free_shadow(shadow);
    return NULL;
}

void free_shadow(struct shadow *shadow)
{
    if (shadow == NULL)
        return;
    for (int warp = 0; warp < shadow->warp_count; warp++) {
        free(shadow->read[warp].chunk);
        free(shadow->read[warp].byte);
    }
    free(shadow->written.chunk);
    free(shadow->written.byte);
    free(shadow->storing);
    free(shadow);
}

void shadow_start_block(struct shadow *shadow, struct block *block)
{
    shadow->block = block;
    shadow->stores = 0;
    memset(shadow->storing, 0, shadow->bytes);
    clear_marks(&shadow->written, shadow->bytes);
    /* Epochs go on from block to block, so that all earlier reads are long past. */
    if (shadow->newest > ON_ITS_WAY / 2) {
        for (int warp = 0; warp < shadow->warp_count; warp++)
            clear_marks(&shadow->read[warp], shadow->bytes);
        shadow->newest = 0;
    }
    struct clock clock;
    for (int agent = 0; agent < AGENTS; agent++)
        clock.epoch[agent] = agent == BULK_AGENT ? 0 : shadow->newest;
    shadow->newest++;
    for (int w = 0; w < block->warp_count; w++) {
        block->warps[w].clock = clock;
        block->warps[w].epoch = shadow->newest;
    }
}

/* ---- clocks ---------------------------------------------------------------------------------- */

void clock_advance(struct warp *warp)
{
    struct shadow *shadow = warp->block->shadow;
    warp->clock.epoch[warp->index] = warp->epoch++;
    if (warp->epoch > shadow->newest)
        shadow->newest = warp->epoch;
    if (warp->epoch + 1 < ON_ITS_WAY)
        return;
    const int pc = warp->paths[warp->current].pc;
    fault(warp, &warp->block->launch->program->code[pc > 0 ? pc - 1 : 0], ALL_LANES,
          "synchronises more than %d times in one block: no tag can tell such epochs apart",
          ON_ITS_WAY / 2);
}

void clock_join(struct clock *to, const struct clock *from)
{
    for (int agent = 0; agent < AGENTS; agent++)
        to->epoch[agent] =
            to->epoch[agent] > from->epoch[agent] ? to->epoch[agent] : from->epoch[agent];
}

/* ---- reports --------------------------------------------------------------------------------- */

/* An access that is looked at: who, and which bytes. */
struct access {
    struct warp *warp;
    const struct instruction *in;
    int lane;
    uint32_t offset, end;
    const char *verb;
};

/* The last byte of the access, from `at` on, that has the same mark as `at`. */
static uint32_t last_alike(const struct access *access, const struct marks *marks, uint32_t at)
{
    uint32_t next;
    const uint32_t tag = mark_at(marks, at, &next).tag;
    while (next < access->end && mark_at(marks, next, &at).tag == tag)
        next = at;
    return (next < access->end ? next : access->end) - 1;
}

static const char *missing(const struct access *access, int agent)
{
    return agent == BULK_AGENT            ? "and its mbarrier was not waited for"
           : agent == access->warp->index ? "with no bar.warp.sync between"
                                          : "with no barrier between";
}

static bool report_write(const struct access *access, const struct marks *marks, uint32_t at)
{
    uint32_t next;
    const struct mark mark = mark_at(marks, at, &next);
    const int agent = agent_of(mark.tag), lane = (int)(mark.tag % LANES);
    const struct program *program = access->warp->block->launch->program;
    char place[192], what[320];
    describe_place(program, &program->code[mark.by], place, sizeof place);
    if (mark.tag == NEVER)
        snprintf(what, sizeof what, "that nobody has written");
    else if (epoch_of(mark.tag) == ON_ITS_WAY)
        snprintf(what, sizeof what, "while the copy to them of %s is on its way: wait for it first",
                 place);
    else if (agent == BULK_AGENT)
        snprintf(what, sizeof what, "that the bulk copy of %s wrote, %s", place,
                 missing(access, agent));
    else
        snprintf(what, sizeof what, "that warp %d lane %d wrote at %s, %s", agent, lane, place,
                 missing(access, agent));
    fault(access->warp, access->in, 1u << access->lane, "%s shared bytes %u..%u %s", access->verb,
          at, last_alike(access, marks, at), what);
    return false;
}

static bool report_read(const struct access *access, int agent, const struct marks *marks,
                        uint32_t at)
{
    uint32_t next;
    const struct mark mark = mark_at(marks, at, &next);
    const uint32_t lane = reader_of(mark.tag);
    const struct program *program = access->warp->block->launch->program;
    char place[192], who[32];
    describe_place(program, &program->code[mark.by], place, sizeof place);
    if (lane == MANY)
        snprintf(who, sizeof who, "lanes of warp %d", agent);
    else
        snprintf(who, sizeof who, "warp %d lane %u", agent, lane);
    fault(access->warp, access->in, 1u << access->lane,
          "%s shared bytes %u..%u that %s read, %s; that was at %s", access->verb, at,
          last_alike(access, marks, at), who, missing(access, agent), place);
    return false;
}

/* ---- checks ---------------------------------------------------------------------------------- */

static inline bool has_seen(const struct access *access, uint32_t tag)
{
    const uint32_t epoch = epoch_of(tag);
    return epoch <= access->warp->clock.epoch[agent_of(tag)] ||
           (tag == make_tag(epoch, access->warp->index, access->lane) && epoch != ON_ITS_WAY);
}

/* Whether the last write of each byte has been seen; and there has been one, if `must_exist`. */
static inline bool check_written(const struct shadow *shadow, const struct access *access,
                                 bool must_exist)
{
    for (uint32_t at = access->offset, next; at < access->end; at = next) {
        const uint32_t tag = mark_at(&shadow->written, at, &next).tag;
        if (!has_seen(access, tag) || (must_exist && tag == NEVER))
            return report_write(access, &shadow->written, at);
    }
    return true;
}

/* Whether the reads of each byte by one warp have been seen. */
static inline bool check_read_by(const struct shadow *shadow, const struct access *access, int warp)
{
    const struct marks *marks = &shadow->read[warp];
    const uint32_t seen = access->warp->clock.epoch[warp];
    const uint32_t myself = warp == access->warp->index ? (uint32_t)access->lane : UINT32_MAX;
    for (uint32_t at = access->offset, next; at < access->end; at = next) {
        const uint32_t tag = mark_at(marks, at, &next).tag;
        if (epoch_of(tag) > seen && reader_of(tag) != myself)
            return report_read(access, warp, marks, at);
    }
    return true;
}

static bool check_stores(const struct shadow *shadow, const struct access *access)
{
    for (uint32_t at = access->offset; at < access->end; at++)
        if (shadow->storing[at] > 0) {
            fault(access->warp, access->in, 1u << access->lane,
                  "%s shared byte %u while a bulk store still reads it: wait for that first",
                  access->verb, at);
            return false;
        }
    return true;
}

static inline struct mark make_mark(const struct warp *warp, const struct instruction *in,
                                    uint32_t tag)
{
    return (struct mark){tag, (uint32_t)(in - warp->block->launch->program->code)};
}

/* A read joins the others of its epoch; those of earlier ones need not be known any more. */
static inline struct mark join_read(struct mark old, struct mark mine)
{
    if (epoch_of(old.tag) == epoch_of(mine.tag) && old.tag != mine.tag)
        mine.tag = make_tag(epoch_of(mine.tag), 0, 0) | MANY;
    return mine;
}

/* Whether no byte of the chunk has been read in this epoch. */
static bool is_past(const struct marks *marks, uint32_t chunk, uint32_t epoch)
{
    for (uint32_t at = chunk * CHUNK, next; at < (chunk + 1) * CHUNK; at = next)
        if (epoch_of(mark_at(marks, at, &next).tag) == epoch)
            return false;
    return true;
}

static inline void mark_read(struct shadow *shadow, const struct access *access)
{
    struct marks *marks = &shadow->read[access->warp->index];
    const uint32_t epoch = access->warp->epoch;
    const struct mark mine = make_mark(access->warp, access->in, make_tag(epoch, 0, access->lane));
    for (uint32_t at = access->offset, next; at < access->end; at = next) {
        next = chunk_end(at, access->end);
        struct mark *chunk = &marks->chunk[at / CHUNK];
        if (next - at == CHUNK && (chunk->tag != MIXED || is_past(marks, at / CHUNK, epoch))) {
            *chunk = chunk->tag == MIXED ? mine : join_read(*chunk, mine);
            continue;
        }
        struct mark *bytes = spread(marks, at / CHUNK);
        for (uint32_t i = at; i < next; i++)
            bytes[i % CHUNK] = join_read(bytes[i % CHUNK], mine);
    }
}

/* ---- accesses -------------------------------------------------------------------------------- */

/* Whether an access is to one whole chunk whose last write has been seen: nearly all are. */
static inline bool is_plain(const struct shadow *shadow, const struct warp *warp, uint32_t offset,
                            uint32_t bytes)
{
    if (bytes != CHUNK || offset % CHUNK != 0)
        return false;
    const uint32_t tag = shadow->written.chunk[offset / CHUNK].tag;
    return tag != MIXED && epoch_of(tag) <= warp->clock.epoch[agent_of(tag)];
}

static __attribute__((noinline)) bool read_with_care(const struct access *access)
{
    struct shadow *shadow = access->warp->block->shadow;
    if (!check_written(shadow, access, true))
        return false;
    mark_read(shadow, access);
    return true;
}

bool shadow_read(struct warp *warp, const struct instruction *in, int lane, uint32_t offset,
                 uint32_t bytes)
{
    struct shadow *shadow = warp->block->shadow;
    struct mark *last = &shadow->read[warp->index].chunk[offset / CHUNK];
    if (!is_plain(shadow, warp, offset, bytes) || epoch_of(last->tag) >= warp->epoch ||
        shadow->written.chunk[offset / CHUNK].tag == NEVER)
        return read_with_care(&(struct access){warp, in, lane, offset, offset + bytes, "reads"});
    *last = make_mark(warp, in, make_tag(warp->epoch, 0, lane));
    return true;
}

static __attribute__((noinline)) bool write_with_care(const struct access *access, uint32_t tag)
{
    struct shadow *shadow = access->warp->block->shadow;
    if (!check_written(shadow, access, false))
        return false;
    if (shadow->stores > 0 && !check_stores(shadow, access))
        return false;
    for (int warp = 0; warp < shadow->warp_count; warp++)
        if (!check_read_by(shadow, access, warp))
            return false;
    set_marks(&shadow->written, access->offset, access->end,
              make_mark(access->warp, access->in, tag));
    return true;
}

/* A write now; or a copy, in the epoch ON_ITS_WAY, that will write. */
static inline bool begin_write(const struct access *access, uint32_t epoch)
{
    const struct warp *warp = access->warp;
    struct shadow *shadow = warp->block->shadow;
    const uint32_t tag = make_tag(epoch, warp->index, access->lane), offset = access->offset;
    if (!is_plain(shadow, warp, offset, access->end - offset) || shadow->stores > 0)
        return write_with_care(access, tag);
    bool is_read = false; /* by somebody, and it has not been seen */
    for (int w = 0; w < shadow->warp_count; w++)
        is_read |= epoch_of(shadow->read[w].chunk[offset / CHUNK].tag) > warp->clock.epoch[w];
    if (is_read)
        return write_with_care(access, tag);
    shadow->written.chunk[offset / CHUNK] = make_mark(warp, access->in, tag);
    return true;
}

bool shadow_write(struct warp *warp, const struct instruction *in, int lane, uint32_t offset,
                  uint32_t bytes)
{
    const struct access access = {warp, in, lane, offset, offset + bytes, "writes"};
    return begin_write(&access, warp->epoch);
}

bool shadow_copy_issued(struct warp *warp, const struct instruction *in, int lane, uint32_t offset,
                        uint32_t bytes)
{
    const struct access access = {warp, in, lane, offset, offset + bytes, "copies to"};
    return begin_write(&access, ON_ITS_WAY);
}

/* The bytes still have the mark of the copy, which had them for itself. */
static void land(struct shadow *shadow, uint32_t tag, uint32_t offset, uint32_t bytes)
{
    uint32_t next;
    const uint32_t by = mark_at(&shadow->written, offset, &next).by;
    set_marks(&shadow->written, offset, offset + bytes, (struct mark){tag, by});
}

void shadow_copy_landed(struct warp *warp, int lane, uint32_t offset, uint32_t bytes)
{
    land(warp->block->shadow, make_tag(warp->epoch, warp->index, lane), offset, bytes);
}

void shadow_bulk_landed(struct block *block, uint32_t epoch, uint32_t offset, uint32_t bytes)
{
    land(block->shadow, make_tag(epoch, BULK_AGENT, 0), offset, bytes);
}

bool shadow_store_issued(struct warp *warp, const struct instruction *in, int lane, uint32_t offset,
                         uint32_t bytes)
{
    struct shadow *shadow = warp->block->shadow;
    const struct access access = {warp, in, lane, offset, offset + bytes, "stores"};
    if (!check_written(shadow, &access, true))
        return false;
    for (uint32_t at = access.offset; at < access.end; at++)
        shadow->storing[at]++;
    shadow->stores++;
    mark_read(shadow, &access);
    return true;
}

/* It becomes a read of the epoch in which it was waited for. */
void shadow_store_done(struct warp *warp, int lane, uint32_t offset, uint32_t bytes)
{
    struct shadow *shadow = warp->block->shadow;
    for (uint32_t at = offset; at < offset + bytes; at++)
        shadow->storing[at]--;
    shadow->stores--;
    uint32_t next;
    const uint32_t by = mark_at(&shadow->read[warp->index], offset, &next).by;
    const struct instruction *in = &warp->block->launch->program->code[by];
    mark_read(shadow, &(struct access){warp, in, lane, offset, offset + bytes, NULL});
}
