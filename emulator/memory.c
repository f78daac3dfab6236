/* The memory of a launch: which bytes are its own, and every ld, st, atom and red.
 *
 * Global memory is the host's: an address is a pointer. What the launch may touch is a set of
 * bytes, so that the hole between two rows of a tensor is as forbidden as what is beyond it. */
#include "emulator.h"
#include "floats.h"

#include <stdio.h>
#include <stdlib.h>

/* ---- the set of bytes ----------------------------------------------------------------------- */

enum { PAGE = 4096, LINE = 64 /* bytes that one word of a bitmap covers */ };

enum use { READ, WRITE };

struct page {
    uint64_t number; /* address / PAGE */
    uint64_t allowed[2][PAGE / LINE];
};

/* A hash table with open addressing. */
struct pages {
    struct page **slots;
    uint32_t capacity, count; /* the capacity is a power of two */
};

static struct page **slot_of(const struct pages *pages, uint64_t number)
{
    uint32_t i = (uint32_t)(number * 0x9e3779b97f4a7c15u >> 32) & (pages->capacity - 1);
    while (pages->slots[i] != NULL && pages->slots[i]->number != number)
        i = (i + 1) & (pages->capacity - 1);
    return &pages->slots[i];
}

static bool grow(struct pages *pages)
{
    struct pages larger = {.capacity = pages->capacity * 2, .count = pages->count};
    larger.slots = calloc(larger.capacity, sizeof *larger.slots);
    if (larger.slots == NULL)
        return false;
    for (uint32_t i = 0; i < pages->capacity; i++)
        if (pages->slots[i] != NULL)
            *slot_of(&larger, pages->slots[i]->number) = pages->slots[i];
    free(pages->slots);
    *pages = larger;
    return true;
}

static struct page *page_with(struct pages *pages, uint64_t number)
{
    struct page **slot = slot_of(pages, number);
    if (*slot != NULL)
        return *slot;
    if (pages->count * 2 >= pages->capacity) {
        if (!grow(pages))
            return NULL;
        slot = slot_of(pages, number);
    }
    *slot = calloc(1, sizeof **slot);
    if (*slot == NULL)
        return NULL;
    (*slot)->number = number;
    pages->count++;
    return *slot;
}

/* Bits first, first + 1, ... of a word; at least one. */
static uint64_t bit_range(uint32_t first, uint32_t count)
{
    return ~0ull >> (LINE - count) << first;
}

/* Bytes from an address to the end of its line, `bytes` at most. */
static uint32_t within_line(uint64_t address, uint64_t bytes)
{
    const uint32_t left = LINE - address % LINE;
    return bytes < left ? (uint32_t)bytes : left;
}

static bool allow(struct pages *pages, uint64_t address, uint64_t bytes, bool writable)
{
    while (bytes > 0) {
        struct page *page = page_with(pages, address / PAGE);
        if (page == NULL)
            return false;
        const uint32_t count = within_line(address, bytes);
        const uint64_t bits = bit_range(address % LINE, count);
        page->allowed[READ][address % PAGE / LINE] |= bits;
        if (writable)
            page->allowed[WRITE][address % PAGE / LINE] |= bits;
        address += count, bytes -= count;
    }
    return true;
}

/* Merges dimensions that lie without a hole in `*run` bytes; returns how many are left over. */
static int outer_dimensions(const struct region *region, int outer[MAX_DIMS], int64_t *run)
{
    bool merged[MAX_DIMS] = {false};
    *run = region->itemsize;
    for (int pass = 0; pass < region->ndim; pass++)
        for (int d = 0; d < region->ndim; d++)
            if (!merged[d] && region->stride[d] * region->itemsize == *run) {
                *run *= region->shape[d];
                merged[d] = true;
            }
    int count = 0;
    for (int d = 0; d < region->ndim; d++)
        if (!merged[d] && region->shape[d] > 1 && region->stride[d] != 0)
            outer[count++] = d;
    return count;
}

static bool allow_region(struct pages *pages, const struct region *region)
{
    for (int d = 0; d < region->ndim; d++)
        if (region->shape[d] == 0)
            return true;
    int outer[MAX_DIMS];
    int64_t run, index[MAX_DIMS] = {0};
    const int count = outer_dimensions(region, outer, &run);
    for (;;) {
        uint64_t address = region->base;
        for (int i = 0; i < count; i++)
            address += (uint64_t)(index[i] * region->stride[outer[i]] * region->itemsize);
        if (!allow(pages, address, (uint64_t)run, region->writable))
            return false;
        int i = 0;
        while (i < count && ++index[i] == region->shape[outer[i]])
            index[i++] = 0;
        if (i == count)
            return true;
    }
}

struct pages *make_pages(const struct region *regions, int count)
{
    struct pages *pages = malloc(sizeof *pages);
    if (pages == NULL)
        return NULL;
    *pages = (struct pages){.capacity = 64};
    pages->slots = calloc(pages->capacity, sizeof *pages->slots);
    bool complete = pages->slots != NULL;
    for (int i = 0; i < count && complete; i++)
        complete = allow_region(pages, &regions[i]);
    if (complete)
        return pages;
    free_pages(pages);
    return NULL;
}

void free_pages(struct pages *pages)
{
    if (pages == NULL)
        return;
    for (uint32_t i = 0; i < pages->capacity && pages->slots != NULL; i++)
        free(pages->slots[i]);
    free(pages->slots);
    free(pages);
}

static bool is_allowed(const struct pages *pages, enum use use, uint64_t address, uint32_t bytes)
{
    while (bytes > 0) {
        const struct page *page = *slot_of(pages, address / PAGE);
        const uint32_t count = within_line(address, bytes);
        const uint64_t bits = bit_range(address % LINE, count);
        if (page == NULL || bits & ~page->allowed[use][address % PAGE / LINE])
            return false;
        address += count, bytes -= count;
    }
    return true;
}

/* ---- one lane's access ---------------------------------------------------------------------- */

/* Accesses are aligned to their size; to the next power of two where a copy reads only a part, and
 * to 16 bytes where it is more. */
static bool is_aligned(struct warp *warp, const struct instruction *in, int lane, uint64_t address,
                       uint32_t bytes)
{
    static const uint8_t POWERS[17] = {1, 1, 2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 16};
    const uint32_t alignment = POWERS[bytes < 16 ? bytes : 16];
    if (address % alignment == 0)
        return true;
    fault(warp, in, 1u << lane, "accesses %u bytes at %#llx, which is no multiple of %u", bytes,
          (unsigned long long)address, alignment);
    return false;
}

/* Says how far away the nearest byte is that the access might have meant. */
static void describe_nearest(const struct pages *pages, enum use use, uint64_t address, char *text,
                             size_t size)
{
    text[0] = 0;
    for (int distance = 1; distance <= 1 << 20; distance++)
        for (int sign = -1; sign <= 1; sign += 2)
            if (is_allowed(pages, use, address + (uint64_t)(int64_t)(sign * distance), 1)) {
                snprintf(text, size, " (the nearest byte of one: %+d)", sign * distance);
                return;
            }
}

static void *refuse_global(struct warp *warp, const struct instruction *in, int lane,
                           uint64_t address, uint32_t bytes, enum use use)
{
    const struct pages *pages = warp->block->launch->pages;
    uint32_t bad = 0;
    while (is_allowed(pages, use, address + bad, 1))
        bad++;
    char nearest[64];
    describe_nearest(pages, use, address + bad, nearest, sizeof nearest);
    const bool read_only = is_allowed(pages, READ, address + bad, 1);
    fault(warp, in, 1u << lane, "%s %u bytes at %#llx, whose byte %u belongs to %s%s",
          use == READ ? "reads" : "writes", bytes, (unsigned long long)address, bad,
          read_only      ? "a tensor that the launch may only read"
          : use == WRITE ? "no writable tensor of the launch"
                         : "no tensor of the launch",
          nearest);
    return NULL;
}

static inline void *global_at(struct warp *warp, const struct instruction *in, int lane,
                              uint64_t address, uint32_t bytes, enum use use)
{
    if (!is_aligned(warp, in, lane, address, bytes))
        return NULL;
    if (!is_allowed(warp->block->launch->pages, use, address, bytes))
        return refuse_global(warp, in, lane, address, bytes, use);
    return (void *)address;
}

static inline void *shared_at(struct warp *warp, const struct instruction *in, int lane,
                              uint64_t address, uint32_t bytes, enum use use)
{
    const struct block *block = warp->block;
    const uint64_t offset = address - SHARED_BASE;
    if (!is_aligned(warp, in, lane, address, bytes))
        return NULL;
    if (offset >= block->shared_bytes || bytes > block->shared_bytes - offset) {
        fault(warp, in, 1u << lane, "%s %u bytes at shared byte %lld of the block's %u",
              use == READ ? "reads" : "writes", bytes, (long long)offset, block->shared_bytes);
        return NULL;
    }
    const bool fine = use == READ ? shadow_read(warp, in, lane, (uint32_t)offset, bytes)
                                  : shadow_write(warp, in, lane, (uint32_t)offset, bytes);
    return fine ? block->shared + offset : NULL;
}

/* Through the cache that nobody keeps coherent: not what the launch may write. */
static inline void *constant_at(struct warp *warp, const struct instruction *in, int lane,
                                uint64_t address, uint32_t bytes, enum use use)
{
    void *at = global_at(warp, in, lane, address, bytes, use);
    if (at == NULL || !is_allowed(warp->block->launch->pages, WRITE, address, bytes))
        return at;
    fault(warp, in, 1u << lane, "reads %u bytes at %#llx by .nc, and the launch may write them",
          bytes, (unsigned long long)address);
    return NULL;
}

static inline void *param_at(struct warp *warp, const struct instruction *in, int lane,
                             uint64_t address, uint32_t bytes, enum use use)
{
    const struct launch *launch = warp->block->launch;
    const uint32_t size = launch->program->param_bytes;
    (void)use;
    if (!is_aligned(warp, in, lane, address, bytes))
        return NULL;
    if (address >= size || bytes > size - address) {
        fault(warp, in, 1u << lane, "reads %u bytes at byte %lld of %u bytes of parameters", bytes,
              (long long)address, size);
        return NULL;
    }
    return (void *)(launch->params + address);
}

const void *read_global(struct warp *warp, const struct instruction *in, int lane, uint64_t address,
                        uint32_t bytes)
{
    return global_at(warp, in, lane, address, bytes, READ);
}

void *write_global(struct warp *warp, const struct instruction *in, int lane, uint64_t address,
                   uint32_t bytes)
{
    return global_at(warp, in, lane, address, bytes, WRITE);
}

const void *read_shared(struct warp *warp, const struct instruction *in, int lane, uint64_t address,
                        uint32_t bytes)
{
    return shared_at(warp, in, lane, address, bytes, READ);
}

void *write_shared(struct warp *warp, const struct instruction *in, int lane, uint64_t address,
                   uint32_t bytes)
{
    return shared_at(warp, in, lane, address, bytes, WRITE);
}

/* ---- a warp's access ------------------------------------------------------------------------- */

/* What an instruction moves, in opcode.detail; a vector has as many as there are registers. */
enum {
    U8,
    S8,
    U16,
    S16,
    U32,
    S32,
    U64,
    FORMAT = 15,
    HALF = 16, /* to or from registers of 16 bits, whose upper half stays zero */
};

static uint32_t element_bytes(const struct instruction *in)
{
    static const uint8_t BYTES[] = {
        [U8] = 1, [S8] = 1, [U16] = 2, [S16] = 2, [U32] = 4, [S32] = 4, [U64] = 8};
    return BYTES[in->opcode->detail & FORMAT];
}

struct places {
    uint64_t address[LANES];
    uint8_t *at[LANES];
};

typedef void *finder(struct warp *warp, const struct instruction *in, int lane, uint64_t address,
                     uint32_t bytes, enum use use);

/* Where every lane's bytes are; false after a fault. */
static inline bool find_places(struct warp *warp, const struct instruction *in, lanes active,
                               int operand, uint32_t bytes, enum use use, finder *find,
                               struct places *places)
{
    for (int lane = 0; lane < LANES; lane++) {
        if (!has_lane(active, lane))
            continue;
        places->address[lane] = address_of(warp, in, operand, lane);
        places->at[lane] = find(warp, in, lane, places->address[lane], bytes, use);
        if (places->at[lane] == NULL)
            return false;
    }
    return true;
}

/* Memory may be another block's to write: each element is read and written as one. */
#define EACH_FORMAT(X)                                                                             \
    X(U8, uint8_t)                                                                                 \
    X(S8, int8_t) X(U16, uint16_t) X(S16, int16_t) X(U32, uint32_t) X(S32, int32_t) X(U64, uint64_t)

/* Element `element` of every lane into a register, extended as its type says. */
static void load_element(struct warp *warp, const struct instruction *in, lanes active, int element,
                         const struct places *places)
{
    const bool wide = in->operand[element].is_wide;
    uint32_t *narrow_to = r32(warp, in, element);
    uint64_t *wide_to = r64(warp, in, element);
    const uint32_t mask = in->opcode->detail & HALF ? 0xffff : 0xffffffff;
    switch (in->opcode->detail & FORMAT) {
#define LOAD(format, type)                                                                         \
    case format:                                                                                   \
        for (int lane = 0; lane < LANES; lane++) {                                                 \
            if (!has_lane(active, lane))                                                           \
                continue;                                                                          \
            const type *from = (const type *)places->at[lane] + element;                           \
            const uint64_t value = (uint64_t)__atomic_load_n(from, __ATOMIC_ACQUIRE);              \
            if (wide)                                                                              \
                wide_to[lane] = value;                                                             \
            else                                                                                   \
                narrow_to[lane] = (uint32_t)value & mask;                                          \
        }                                                                                          \
        break;
        EACH_FORMAT(LOAD)
    }
}

/* A register of every lane to element `element`, without its upper bits. */
static void store_element(struct warp *warp, const struct instruction *in, lanes active,
                          int element, const struct places *places)
{
    const bool wide = in->operand[1 + element].is_wide;
    const uint32_t *narrow_from = r32(warp, in, 1 + element);
    const uint64_t *wide_from = r64(warp, in, 1 + element);
    switch (in->opcode->detail & FORMAT) {
#define STORE(format, type)                                                                        \
    case format:                                                                                   \
        for (int lane = 0; lane < LANES; lane++)                                                   \
            if (has_lane(active, lane))                                                            \
                __atomic_store_n((type *)places->at[lane] + element,                               \
                                 (type)(wide ? wide_from[lane] : narrow_from[lane]),               \
                                 __ATOMIC_RELEASE);                                                \
        break;
        EACH_FORMAT(STORE)
    }
}

/* Loads have their registers first and the address last, stores the address first. */
static inline bool load(struct warp *warp, const struct instruction *in, lanes active, finder *find,
                        struct places *places)
{
    const int count = in->count - 1;
    const uint32_t bytes = element_bytes(in) * (uint32_t)count;
    if (!find_places(warp, in, active, count, bytes, READ, find, places))
        return false;
    for (int element = 0; element < count; element++)
        load_element(warp, in, active, element, places);
    return true;
}

static inline bool store(struct warp *warp, const struct instruction *in, lanes active,
                         finder *find, struct places *places)
{
    const int count = in->count - 1;
    const uint32_t bytes = element_bytes(in) * (uint32_t)count;
    if (!find_places(warp, in, active, 0, bytes, WRITE, find, places))
        return false;
    for (int element = 0; element < count; element++)
        store_element(warp, in, active, element, places);
    return true;
}

static void count_global_bytes(struct warp *warp, const struct instruction *in, lanes active,
                               uint32_t bytes)
{
    tally_of(warp, in)->global_bytes += (uint64_t)__builtin_popcount(active) * bytes;
}

static uint32_t lane_bytes(const struct instruction *in)
{
    return element_bytes(in) * (uint32_t)(in->count - 1);
}

static void load_param(struct warp *warp, const struct instruction *in, lanes active)
{
    struct places places;
    load(warp, in, active, param_at, &places);
}

static void load_global(struct warp *warp, const struct instruction *in, lanes active)
{
    struct places places;
    if (load(warp, in, active, global_at, &places))
        count_global_bytes(warp, in, active, lane_bytes(in));
}

static void load_constant(struct warp *warp, const struct instruction *in, lanes active)
{
    struct places places;
    if (load(warp, in, active, constant_at, &places))
        count_global_bytes(warp, in, active, lane_bytes(in));
}

static void store_global(struct warp *warp, const struct instruction *in, lanes active)
{
    struct places places;
    if (store(warp, in, active, global_at, &places)) {
        count_global_bytes(warp, in, active, lane_bytes(in));
        warp->block->progress++; /* another block may wait for it */
    }
}

static void load_shared(struct warp *warp, const struct instruction *in, lanes active)
{
    struct places places;
    if (load(warp, in, active, shared_at, &places))
        count_wavefronts(warp, in, active, places.address, lane_bytes(in));
}

static void store_shared(struct warp *warp, const struct instruction *in, lanes active)
{
    struct places places;
    if (store(warp, in, active, shared_at, &places))
        count_wavefronts(warp, in, active, places.address, lane_bytes(in));
}

/* ---- banks ----------------------------------------------------------------------------------- */

/* Passes that the lanes of a phase take: as many as there are different units (a word, or as much
 * as a lane accesses, if more) in the bank, or group of banks, that has the most. */
static uint32_t count_passes(lanes phase, const uint64_t address[LANES], uint32_t log_unit)
{
    const uint32_t banks = 128 >> log_unit;
    uint64_t seen[LANES][LANES]; /* units per bank */
    uint8_t count[LANES] = {0};
    uint32_t most = 0;
    for (; phase; phase &= phase - 1) {
        const uint64_t number = address[__builtin_ctz(phase)] >> log_unit;
        const uint32_t bank = number % banks;
        uint32_t i = 0;
        while (i < count[bank] && seen[bank][i] != number)
            i++;
        if (i < count[bank])
            continue;
        seen[bank][i] = number;
        count[bank] = (uint8_t)(i + 1);
        most = i + 1 > most ? i + 1 : most;
    }
    return most;
}

void count_wavefronts(struct warp *warp, const struct instruction *in, lanes active,
                      const uint64_t address[LANES], uint32_t bytes)
{
    struct tally *tally = tally_of(warp, in);
    const uint32_t log_unit = bytes <= 4 ? 2 : bytes <= 8 ? 3 : 4, width = 128 >> log_unit;
    uint32_t bank[LANES]; /* as a set of one */
    for (uint32_t lane = 0; lane < LANES; lane++)
        bank[lane] = (active >> lane & 1) << (address[lane] >> log_unit & (width - 1));
    for (uint32_t first = 0; first < LANES; first += width) {
        const lanes phase = active & (lanes)bit_range(first, width);
        uint32_t banks = 0;
        for (uint32_t lane = first; lane < first + width; lane++)
            banks |= bank[lane];
        if (phase == 0)
            continue;
        const bool has_own_banks = __builtin_popcount(banks) == __builtin_popcount(phase);
        tally->wavefronts += has_own_banks ? 1 : count_passes(phase, address, log_unit);
        tally->wavefronts_ideal++;
    }
}

/* ---- atomics --------------------------------------------------------------------------------- */

/* opcode.detail of atom and red. */
enum operation {
    ADD,
    ADD_FLOAT,
    AND,
    OR,
    XOR,
    EXCHANGE,
    COMPARE,
    MIN_SIGNED,
    MAX_SIGNED,
    MIN,
    MAX,
    INCREMENT,
    DECREMENT,
    OPERATION = 15,
    WIDE = 16,    /* 64 bits */
    RETURNS = 32, /* atom: destinations first */
};

/* As the L2 adds: subnormal inputs and results become zeros. */
static uint32_t add_floats(uint32_t a, uint32_t b)
{
    return bits_of(flush(canonical(flush(float_of(a)) + flush(float_of(b)))));
}

/* What memory holds after an operation, of 32 bits where only those are in the table. */
static uint64_t combine(enum operation operation, uint64_t old, uint64_t b, uint64_t c)
{
    switch (operation) {
    case ADD: return old + b;
    case ADD_FLOAT: return add_floats((uint32_t)old, (uint32_t)b);
    case AND: return old & b;
    case OR: return old | b;
    case XOR: return old ^ b;
    case EXCHANGE: return b;
    case COMPARE: return old == b ? c : old;
    case MIN_SIGNED: return (int32_t)old < (int32_t)b ? old : b;
    case MAX_SIGNED: return (int32_t)old > (int32_t)b ? old : b;
    case MIN: return old < b ? old : b;
    case MAX: return old > b ? old : b;
    case INCREMENT: return old >= b ? 0 : old + 1;
    case DECREMENT: return old == 0 || old > b ? b : old - 1;
    default: __builtin_unreachable();
    }
}

/* Returns the old value. Blocks run on several threads: what is between may be another's. */
#define UPDATE(name, type)                                                                         \
    static type name(type *at, enum operation operation, type b, type c)                           \
    {                                                                                              \
        type old = __atomic_load_n(at, __ATOMIC_SEQ_CST);                                          \
        while (!__atomic_compare_exchange_n(at, &old, (type)combine(operation, old, b, c), false,  \
                                            __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))                   \
            ;                                                                                      \
        return old;                                                                                \
    }
UPDATE(update_32, uint32_t)
UPDATE(update_64, uint64_t)

/* One lane's atom, or red, of `count` elements each for itself. */
static void update_lane(struct warp *warp, const struct instruction *in, int lane, int address,
                        int count, void *at)
{
    const int detail = in->opcode->detail, last = in->count - 1;
    const enum operation operation = detail & OPERATION;
    for (int i = 0; i < count; i++) {
        const int b = address + 1 + i, c = operation == COMPARE ? last : b;
        if (detail & WIDE) {
            const uint64_t old = update_64((uint64_t *)at + i, operation, r64(warp, in, b)[lane],
                                           r64(warp, in, c)[lane]);
            if (detail & RETURNS)
                r64(warp, in, i)[lane] = old;
        } else {
            const uint32_t old = update_32((uint32_t *)at + i, operation, r32(warp, in, b)[lane],
                                           r32(warp, in, c)[lane]);
            if (detail & RETURNS)
                r32(warp, in, i)[lane] = old;
        }
    }
}

static void update(struct warp *warp, const struct instruction *in, lanes active)
{
    const int detail = in->opcode->detail;
    const int sources = (detail & OPERATION) == COMPARE ? 2 : 1;
    const int count = detail & RETURNS ? (in->count - 1) / (1 + sources) : in->count - 1;
    const int address = detail & RETURNS ? count : 0;
    const uint32_t bytes = (uint32_t)count * (detail & WIDE ? 8 : 4);
    for (int lane = 0; lane < LANES; lane++) {
        if (!has_lane(active, lane))
            continue;
        void *at = global_at(warp, in, lane, address_of(warp, in, address, lane), bytes, WRITE);
        if (at == NULL)
            return;
        update_lane(warp, in, lane, address, count, at);
    }
    count_global_bytes(warp, in, active, bytes);
    warp->block->progress++;
}

/* ---- the table ------------------------------------------------------------------------------- */

/* Every type, to or from the registers that PTX lets it have: of its own size or larger, a float
 * of its own. ROWS(type, R, r, detail, ...): the register's letter as destination and as source. */
#define TYPES_OF_8(ROWS, R, r, half, ...)                                                          \
    ROWS("b8", R, r, U8 | half, __VA_ARGS__), ROWS("u8", R, r, U8 | half, __VA_ARGS__),            \
        ROWS("s8", R, r, S8 | half, __VA_ARGS__)
#define TYPES_OF_16(ROWS, R, r, half, ...)                                                         \
    ROWS("b16", R, r, U16 | half, __VA_ARGS__), ROWS("u16", R, r, U16 | half, __VA_ARGS__),        \
        ROWS("s16", R, r, S16 | half, __VA_ARGS__)
#define TYPES_OF_32(ROWS, R, r, ...)                                                               \
    ROWS("b32", R, r, U32, __VA_ARGS__), ROWS("u32", R, r, U32, __VA_ARGS__),                      \
        ROWS("s32", R, r, S32, __VA_ARGS__)
#define TYPES_UP_TO_32(ROWS, ...)                                                                  \
    TYPES_OF_8(ROWS, "H", "h", HALF, __VA_ARGS__), TYPES_OF_8(ROWS, "W", "w", 0, __VA_ARGS__),     \
        TYPES_OF_8(ROWS, "D", "d", 0, __VA_ARGS__),                                                \
        TYPES_OF_16(ROWS, "H", "h", HALF, __VA_ARGS__),                                            \
        TYPES_OF_16(ROWS, "W", "w", 0, __VA_ARGS__), TYPES_OF_16(ROWS, "D", "d", 0, __VA_ARGS__),  \
        TYPES_OF_32(ROWS, "W", "w", __VA_ARGS__), TYPES_OF_32(ROWS, "D", "d", __VA_ARGS__),        \
        ROWS("f32", "W", "w", U32, __VA_ARGS__)
#define TYPES_OF_64(ROWS, ...)                                                                     \
    ROWS("b64", "D", "d", U64, __VA_ARGS__), ROWS("u64", "D", "d", U64, __VA_ARGS__),              \
        ROWS("s64", "D", "d", U64, __VA_ARGS__), ROWS("f64", "D", "d", U64, __VA_ARGS__)

/* A vector is of 16 bytes at most. */
#define LOAD_1(type, R, r, detail, name, execute, kind)                                            \
    {name "." type, R " [", execute, kind, detail}
#define LOAD_2(type, R, r, detail, name, execute, kind)                                            \
    {name ".v2." type, R "2 [", execute, kind, detail}
#define LOAD_4(type, R, r, detail, name, execute, kind)                                            \
    {name ".v4." type, R "4 [", execute, kind, detail}
#define LOADS(...)                                                                                 \
    TYPES_UP_TO_32(LOAD_1, __VA_ARGS__), TYPES_UP_TO_32(LOAD_2, __VA_ARGS__),                      \
        TYPES_UP_TO_32(LOAD_4, __VA_ARGS__), TYPES_OF_64(LOAD_1, __VA_ARGS__),                     \
        TYPES_OF_64(LOAD_2, __VA_ARGS__)

#define STORE_1(type, R, r, detail, name, execute, kind)                                           \
    {name "." type, "[ " r, execute, kind, detail}
#define STORE_2(type, R, r, detail, name, execute, kind)                                           \
    {name ".v2." type, "[ " r "2", execute, kind, detail}
#define STORE_4(type, R, r, detail, name, execute, kind)                                           \
    {name ".v4." type, "[ " r "4", execute, kind, detail}
#define STORES(...)                                                                                \
    TYPES_UP_TO_32(STORE_1, __VA_ARGS__), TYPES_UP_TO_32(STORE_2, __VA_ARGS__),                    \
        TYPES_UP_TO_32(STORE_4, __VA_ARGS__), TYPES_OF_64(STORE_1, __VA_ARGS__),                   \
        TYPES_OF_64(STORE_2, __VA_ARGS__)

/* What atom and red both do. ROW(name, type, R, r, operation). */
#define UPDATES(ROW, name)                                                                         \
    ROW(name, "add.u32", "W", "w", ADD), ROW(name, "add.s32", "W", "w", ADD),                      \
        ROW(name, "add.u64", "D", "d", ADD | WIDE), ROW(name, "add.f32", "W", "w", ADD_FLOAT),     \
        ROW(name, "add.v2.f32", "W2", "w2", ADD_FLOAT),                                            \
        ROW(name, "add.v4.f32", "W4", "w4", ADD_FLOAT), ROW(name, "and.b32", "W", "w", AND),       \
        ROW(name, "or.b32", "W", "w", OR), ROW(name, "xor.b32", "W", "w", XOR),                    \
        ROW(name, "min.s32", "W", "w", MIN_SIGNED), ROW(name, "max.s32", "W", "w", MAX_SIGNED),    \
        ROW(name, "min.u32", "W", "w", MIN), ROW(name, "max.u32", "W", "w", MAX),                  \
        ROW(name, "inc.u32", "W", "w", INCREMENT), ROW(name, "dec.u32", "W", "w", DECREMENT)

#define RED(name, type, R, r, operation) {name "." type, "[ " r, update, KIND_ATOMIC, operation}
#define REDS(name)                       UPDATES(RED, name)

#define ATOM(name, type, R, r, operation)                                                          \
    {name "." type, R " [ " r, update, KIND_ATOMIC, (operation) | RETURNS}
#define ATOMS(name)                                                                                \
    UPDATES(ATOM, name), ATOM(name, "exch.b32", "W", "w", EXCHANGE),                               \
        ATOM(name, "exch.b64", "D", "d", EXCHANGE | WIDE),                                         \
        ATOM(name, "cas.b32", "W", "w w", COMPARE),                                                \
        ATOM(name, "cas.b64", "D", "d d", COMPARE | WIDE)

/* Ordered ones are the plain ones: an element is always accessed as one, and in order. */
const struct opcode MEMORY_OPCODES[] = {
    LOADS("ld.param", load_param, KIND_MOVE),

    LOADS("ld.global", load_global, KIND_LOAD_GLOBAL),
    LOADS("ld.global.cg", load_global, KIND_LOAD_GLOBAL),
    LOADS("ld.global.cs", load_global, KIND_LOAD_GLOBAL),
    LOADS("ld.global.L1::no_allocate", load_global, KIND_LOAD_GLOBAL),
    LOADS("ld.volatile.global", load_global, KIND_LOAD_GLOBAL),
    LOADS("ld.relaxed.gpu.global", load_global, KIND_LOAD_GLOBAL),
    LOADS("ld.acquire.gpu.global", load_global, KIND_LOAD_GLOBAL),
    LOADS("ld.global.nc", load_constant, KIND_LOAD_GLOBAL),
    LOADS("ld.global.nc.L1::no_allocate", load_constant, KIND_LOAD_GLOBAL),

    STORES("st.global", store_global, KIND_STORE_GLOBAL),
    STORES("st.global.cg", store_global, KIND_STORE_GLOBAL),
    STORES("st.global.cs", store_global, KIND_STORE_GLOBAL),
    STORES("st.global.L1::no_allocate", store_global, KIND_STORE_GLOBAL),
    STORES("st.volatile.global", store_global, KIND_STORE_GLOBAL),
    STORES("st.relaxed.gpu.global", store_global, KIND_STORE_GLOBAL),
    STORES("st.release.gpu.global", store_global, KIND_STORE_GLOBAL),

    LOADS("ld.shared", load_shared, KIND_LOAD_SHARED),
    LOADS("ld.shared::cta", load_shared, KIND_LOAD_SHARED),
    LOADS("ld.volatile.shared", load_shared, KIND_LOAD_SHARED),
    LOADS("ld.volatile.shared::cta", load_shared, KIND_LOAD_SHARED),

    STORES("st.shared", store_shared, KIND_STORE_SHARED),
    STORES("st.shared::cta", store_shared, KIND_STORE_SHARED),
    STORES("st.volatile.shared", store_shared, KIND_STORE_SHARED),
    STORES("st.volatile.shared::cta", store_shared, KIND_STORE_SHARED),

    ATOMS("atom.global"),
    ATOMS("atom.relaxed.global"),
    ATOMS("atom.relaxed.gpu.global"),
    ATOMS("atom.acquire.gpu.global"),
    ATOMS("atom.release.gpu.global"),
    ATOMS("atom.acq_rel.gpu.global"),

    REDS("red.global"),
    REDS("red.relaxed.gpu.global"),
    REDS("red.release.gpu.global"),

    /* The other place where the vector may stand. */
    {"red.global.v2.f32.add", "[ w2", update, KIND_ATOMIC, ADD_FLOAT},
    {"red.global.v4.f32.add", "[ w4", update, KIND_ATOMIC, ADD_FLOAT},

    {NULL, NULL, NULL, 0, 0},
};
