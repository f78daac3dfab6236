/* A launch: blocks over host threads, the warps of a block in turns, a warp's lanes together.
 *
 * Lanes of a warp that have diverged are paths, and the path that is furthest behind goes first: so
 * they meet again where the code joins. Which warp goes next, and for how long, is drawn from the
 * launch's seed. A path that polls in vain yields to other paths and warps. */
#include "emulator.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Instructions that a warp executes before another one's turn, at most. */
#define LONGEST_TURN 128

/* A warp that polls in vain has turns of fewer instructions; others have only now and then. */
#define SHORTEST_TURN 16

/* Such turns of each warp, one after the other and while nothing happens that anybody waits for,
 * before the block is said to be stuck. */
#define PATIENCE 64

/* ---- faults --------------------------------------------------------------------------------- */

static pthread_mutex_t fault_lock = PTHREAD_MUTEX_INITIALIZER;

void fault(struct warp *warp, const struct instruction *in, lanes where, const char *format, ...)
{
    struct block *block = warp->block;
    struct launch *launch = block->launch;
    char what[1024], place[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    describe_place(launch->program, in, place, sizeof place);
    const int lane = where ? __builtin_ctz(where) : 0;
    pthread_mutex_lock(&fault_lock);
    if (!launch->failed)
        snprintf(launch->message, sizeof launch->message,
                 "%s: %s; at %s: %s; block (%u, %u, %u), warp %d, lane %d", launch->program->name,
                 what, place, in->text, block->index[0], block->index[1], block->index[2],
                 warp->index, lane);
    launch->failed = true;
    pthread_mutex_unlock(&fault_lock);
}

bool is_whole(struct warp *warp, const struct instruction *in, lanes active)
{
    if (active == ALL_LANES)
        return true;
    fault(warp, in, ~active, "%s needs all 32 lanes at once, but the warp has diverged",
          in->opcode->name);
    return false;
}

/* ---- paths ---------------------------------------------------------------------------------- */

static void remove_path(struct warp *warp, int i)
{
    warp->path_count--;
    memmove(&warp->paths[i], &warp->paths[i + 1],
            (size_t)(warp->path_count - i) * sizeof *warp->paths);
}

/* Sorts the paths by pc again, and joins those that have met. */
static void settle(struct warp *warp)
{
    for (int i = 1; i < warp->path_count; i++)
        for (int k = i; k > 0 && warp->paths[k].pc < warp->paths[k - 1].pc; k--) {
            const struct path path = warp->paths[k];
            warp->paths[k] = warp->paths[k - 1];
            warp->paths[k - 1] = path;
        }
    for (int i = warp->path_count - 1; i > 0; i--)
        if (warp->paths[i].pc == warp->paths[i - 1].pc) {
            warp->paths[i - 1].mask |= warp->paths[i].mask;
            warp->paths[i - 1].yielded = false;
            remove_path(warp, i);
        }
}

void yield_path(struct warp *warp) { warp->paths[warp->current].yielded = true; }

static void branch(struct warp *warp, const struct instruction *in, lanes active)
{
    struct path *path = &warp->paths[warp->current];
    const lanes staying = path->mask & ~active;
    if (staying == 0) {
        path->pc = in->target;
        return;
    }
    path->mask = staying;
    warp->paths[warp->path_count++] = (struct path){in->target, active, false};
}

static void leave(struct warp *warp, const struct instruction *in, lanes active)
{
    (void)in;
    struct path *path = &warp->paths[warp->current];
    path->mask &= ~active;
    if (path->mask == 0)
        remove_path(warp, warp->current);
}

static void trap(struct warp *warp, const struct instruction *in, lanes active)
{
    fault(warp, in, active, "the kernel gave up (trap)");
}

const struct opcode CONTROL_OPCODES[] = {
    {"bra", "l", branch, KIND_CONTROL, 0}, {"bra.uni", "l", branch, KIND_CONTROL, 0},
    {"ret", "", leave, KIND_CONTROL, 0},   {"exit", "", leave, KIND_CONTROL, 0},
    {"trap", "", trap, KIND_CONTROL, 0},   {NULL, NULL, NULL, 0, 0},
};

/* The path whose turn it is: the one furthest behind that does not wait for others. -1: none. A
 * path that comes to a converging instruction while others still poll waits there for them. */
static int choose_path(struct warp *warp)
{
    const struct instruction *code = warp->block->launch->program->code;
    bool is_polled_for = false;
    for (int i = 0; i < warp->path_count; i++) {
        struct path *path = &warp->paths[i];
        path->yielded |= is_polled_for && code[path->pc].converges;
        if (!path->yielded)
            return i;
        is_polled_for = true;
    }
    return -1;
}

/* ---- instructions --------------------------------------------------------------------------- */

/* Lanes of `mask` that execute the instruction. */
static lanes guarded(struct warp *warp, const struct instruction *in, lanes mask)
{
    if (in->guard < 0)
        return mask;
    const lanes unwritten = mask & ~warp->defined[in->guard];
    if (unwritten)
        fault(warp, in, unwritten, "the predicate has never been written");
    const lanes set = warp->values[in->guard][0];
    return mask & (in->guard_negated ? ~set : set);
}

static void check_sources(struct warp *warp, const struct instruction *in, lanes active)
{
    for (int i = 0; i < in->count; i++) {
        const struct operand *operand = &in->operand[i];
        const lanes unwritten = active & ~warp->defined[operand->slot];
        if (operand->is_source && unwritten)
            return fault(warp, in, unwritten, "operand %d, a register, has never been written",
                         i + 1);
    }
}

static void execute(struct warp *warp, const struct instruction *in, lanes mask)
{
    struct launch *launch = warp->block->launch;
    const lanes active = guarded(warp, in, mask);
    if (active == 0 || launch->failed)
        return;
    check_sources(warp, in, active);
    if (launch->failed)
        return;
    tally_of(warp, in)->executed++;
    in->opcode->execute(warp, in, active);
    for (int i = 0; i < in->count; i++)
        if (in->operand[i].is_dest)
            warp->defined[in->operand[i].slot] |= active;
}

/* Runs a warp for at most `turn` instructions, until it can go no further for now: how many. */
static uint32_t run_warp(struct warp *warp, uint32_t turn)
{
    struct launch *launch = warp->block->launch;
    uint32_t executed = 0;
    for (int i = 0; i < warp->path_count; i++)
        warp->paths[i].yielded = false;
    while (executed < turn && warp->path_count > 0) {
        warp->current = warp->path_count == 1 && !warp->paths[0].yielded ? 0 : choose_path(warp);
        if (warp->current < 0)
            break;
        struct path *path = &warp->paths[warp->current];
        const struct instruction *in = &launch->program->code[path->pc++];
        execute(warp, in, path->mask);
        executed++;
        if (warp->waiting || launch->failed)
            break;
        if (warp->path_count > 1)
            settle(warp);
    }
    return executed;
}

/* ---- blocks --------------------------------------------------------------------------------- */

uint32_t draw(struct block *block, uint32_t bound)
{
    /* splitmix64 (Steele, Lea, Flood 2014) */
    uint64_t x = block->random += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((x ^ x >> 31) >> 32) % bound;
}

static void report_stuck(struct block *block, const char *why)
{
    char text[512] = "";
    struct warp *stuck = NULL;
    for (int w = block->warp_count - 1; w >= 0; w--)
        if (block->warps[w].path_count > 0)
            stuck = &block->warps[w];
    explain_barriers(block, text, sizeof text);
    explain_bulk(block, text + strlen(text), sizeof text - strlen(text));
    const int pc = stuck->paths[0].pc - (stuck->waiting ? 1 : 0);
    fault(stuck, &block->launch->program->code[pc], stuck->paths[0].mask, "deadlock: %s%s", why,
          text);
}

/* A warp that can run, drawn from the seed. NULL: all have ended, or wait at barriers. */
static struct warp *choose_warp(struct block *block)
{
    struct warp *runnable[MAX_WARPS];
    uint32_t count = 0;
    for (int w = 0; w < block->warp_count; w++)
        if (block->warps[w].path_count > 0 && !block->warps[w].waiting)
            runnable[count++] = &block->warps[w];
    return count ? runnable[draw(block, count)] : NULL;
}

/* Whether every warp that can run has polled in vain for long. */
static bool is_stuck(const struct block *block)
{
    for (int w = 0; w < block->warp_count; w++) {
        const struct warp *warp = &block->warps[w];
        const bool is_idle = warp->idle_since == block->progress && warp->idle_turns > PATIENCE;
        if (warp->path_count > 0 && !warp->waiting && !is_idle)
            return false;
    }
    return true;
}

static void run_block(struct block *block)
{
    for (struct warp *warp; (warp = choose_warp(block)) && !block->launch->failed;) {
        const uint32_t executed = run_warp(warp, 1 + draw(block, LONGEST_TURN));
        if (executed >= SHORTEST_TURN || warp->idle_since != block->progress)
            warp->idle_turns = 0;
        warp->idle_since = block->progress;
        if (++warp->idle_turns > PATIENCE && is_stuck(block))
            return report_stuck(block, "all warps that can go on poll in vain");
    }
    for (int w = 0; w < block->warp_count && !block->launch->failed; w++)
        if (block->warps[w].waiting)
            report_stuck(block, "warps wait at a barrier that the others do not come to");
    if (!block->launch->failed)
        bulk_end_block(block);
}

static uint32_t special_value(const struct warp *warp, enum special special, int lane)
{
    const struct launch *launch = warp->block->launch;
    const uint32_t *threads = launch->threads;
    const uint32_t thread = (uint32_t)(warp->index * LANES + lane);
    switch (special) {
    case TID_X: return thread % threads[0];
    case TID_Y: return thread / threads[0] % threads[1];
    case TID_Z: return thread / threads[0] / threads[1];
    case NTID_X:
    case NTID_Y:
    case NTID_Z: return threads[special - NTID_X];
    case CTAID_X:
    case CTAID_Y:
    case CTAID_Z: return warp->block->index[special - CTAID_X];
    case NCTAID_X:
    case NCTAID_Y:
    case NCTAID_Z: return launch->grid[special - NCTAID_X];
    case LANEID: return (uint32_t)lane;
    case WARPID: return (uint32_t)warp->index;
    case LANEMASK_LT: return (1u << lane) - 1;
    case CONSTANT: break;
    }
    return 0;
}

static void fill_presets(struct warp *warp)
{
    const struct program *program = warp->block->launch->program;
    for (int i = 0; i < program->preset_count; i++) {
        const struct preset *preset = &program->presets[i];
        uint32_t *narrow = warp->values[preset->slot];
        uint64_t *wide = (uint64_t *)narrow;
        for (int lane = 0; lane < LANES; lane++)
            if (preset->is_wide)
                wide[lane] = preset->value;
            else
                narrow[lane] = preset->special == CONSTANT
                                   ? (uint32_t)preset->value
                                   : special_value(warp, preset->special, lane);
        warp->defined[preset->slot] = ALL_LANES;
    }
}

static void start_warp(struct warp *warp)
{
    warp->paths[0] = (struct path){0, ALL_LANES, false};
    warp->path_count = 1;
    warp->waiting = false;
    warp->idle_turns = 0;
    memset(warp->defined, 0, warp->block->launch->program->slots * sizeof *warp->defined);
    fill_presets(warp);
    copies_start_block(warp->copies);
}

static void start_block(struct block *block, uint64_t index)
{
    const struct launch *launch = block->launch;
    const uint32_t *grid = launch->grid;
    block->index[0] = (uint32_t)(index % grid[0]);
    block->index[1] = (uint32_t)(index / grid[0] % grid[1]);
    block->index[2] = (uint32_t)(index / grid[0] / grid[1]);
    block->random = launch->seed * 0x2545f4914f6cdd1du + index;
    memset(block->barriers, 0, sizeof block->barriers);
    shadow_start_block(block->shadow, block);
    bulk_start_block(block->bulk);
    for (int w = 0; w < block->warp_count; w++)
        start_warp(&block->warps[w]);
}

/* ---- workers -------------------------------------------------------------------------------- */

static bool make_warp(struct block *block, int index)
{
    const uint32_t slots = block->launch->program->slots;
    struct warp *warp = &block->warps[index];
    warp->block = block;
    warp->index = index;
    warp->values = aligned_alloc(128, (slots + 1) * sizeof *warp->values);
    warp->defined = calloc(slots + 1, sizeof *warp->defined);
    warp->copies = make_copies();
    return warp->values && warp->defined && warp->copies;
}

static void free_block(struct block *block)
{
    for (int w = 0; block->warps && w < block->warp_count; w++) {
        free(block->warps[w].values);
        free(block->warps[w].defined);
        free_copies(block->warps[w].copies);
    }
    free(block->warps);
    free(block->shared);
    free(block->tally);
    free_shadow(block->shadow);
    free_bulk(block->bulk);
}

static bool make_block(struct block *block, struct launch *launch)
{
    const uint32_t *threads = launch->threads;
    *block = (struct block){.launch = launch};
    block->warp_count = (int)(threads[0] * threads[1] * threads[2] / LANES);
    block->shared_bytes = launch->program->shared_bytes + launch->dynamic_shared;
    block->shared = aligned_alloc(1024, (block->shared_bytes / 1024 + 1) * 1024);
    block->shadow = make_shadow(block->warp_count, block->shared_bytes);
    block->bulk = make_bulk();
    block->warps = calloc((size_t)block->warp_count, sizeof *block->warps);
    block->tally = calloc((size_t)launch->program->length, sizeof *block->tally);
    bool ok = block->shared && block->shadow && block->bulk && block->warps && block->tally;
    for (int w = 0; ok && w < block->warp_count; w++)
        ok = make_warp(block, w);
    return ok;
}

struct work {
    struct launch *launch;
    uint64_t blocks, stride, next; /* block i is number i * stride of the grid, modulo its size */
    pthread_mutex_t lock;
};

static void add_tally(struct tally *to, const struct tally *from, int length)
{
    for (int i = 0; i < length; i++) {
        to[i].executed += from[i].executed;
        to[i].wavefronts += from[i].wavefronts;
        to[i].wavefronts_ideal += from[i].wavefronts_ideal;
        to[i].global_bytes += from[i].global_bytes;
    }
}

static void *run_worker(void *argument)
{
    struct work *work = argument;
    struct launch *launch = work->launch;
    struct block block;
    const bool ok = make_block(&block, launch);
    while (ok && !launch->failed) {
        const uint64_t i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (i >= work->blocks)
            break;
        start_block(&block, i * work->stride % work->blocks);
        run_block(&block);
    }
    pthread_mutex_lock(&work->lock);
    if (ok)
        add_tally(launch->tally, block.tally, launch->program->length);
    else
        snprintf(launch->message, sizeof launch->message, "out of memory"), launch->failed = true;
    pthread_mutex_unlock(&work->lock);
    free_block(&block);
    return NULL;
}

static uint64_t common_divisor(uint64_t a, uint64_t b) { return b ? common_divisor(b, a % b) : a; }

void run_launch(struct launch *launch, int threads)
{
    struct work work = {.launch = launch, .lock = PTHREAD_MUTEX_INITIALIZER};
    work.blocks = (uint64_t)launch->grid[0] * launch->grid[1] * launch->grid[2];
    /* Another order of the blocks for every seed: a stride that meets each of them once. */
    work.stride = 1 + launch->seed * 7919 % (work.blocks ? work.blocks : 1);
    while (common_divisor(work.stride, work.blocks) != 1)
        work.stride++;
    pthread_t workers[64];
    int started = 0;
    while (started < threads - 1 && started < 64 && (uint64_t)started + 1 < work.blocks &&
           pthread_create(&workers[started], NULL, run_worker, &work) == 0)
        started++;
    run_worker(&work);
    for (int i = 0; i < started; i++)
        pthread_join(workers[i], NULL);
}
