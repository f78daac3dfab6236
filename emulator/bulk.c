/* Bulk copies, and the table of what the engine that makes them needs.
 *
 * A load lands at once, or with launch->late_copies when somebody tests the mbarrier that it
 * signals; a store reads at once, or when its group is waited for. Who reads too early, or
 * overwrites too early, is reported either way: the shadow memory knows who has waited. */
#include "bulk.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- copies on their way -------------------------------------------------------------------- */

static bool add_transfer(struct transfers *transfers, const struct transfer *transfer)
{
    if (transfers->count == transfers->capacity) {
        const int larger = transfers->capacity ? 2 * transfers->capacity : 64;
        void *moved = realloc(transfers->all, (size_t)larger * sizeof *transfers->all);
        if (!moved) {
            fault(transfer->warp, transfer->in, 1u << transfer->lane, "out of memory");
            return false;
        }
        transfers->all = moved;
        transfers->capacity = larger;
    }
    transfers->all[transfers->count++] = *transfer;
    return true;
}

/* Ends those of the copies that are due, oldest first. False after a fault. */
typedef bool due(const struct transfer *transfer, const struct transfer *asked);
typedef bool end(const struct transfer *transfer);

static bool end_transfers(struct transfers *transfers, due *is_due, const struct transfer *asked,
                          end *finish)
{
    int kept = 0;
    bool ok = true;
    for (int i = 0; i < transfers->count; i++)
        if (ok && is_due(&transfers->all[i], asked))
            ok = finish(&transfers->all[i]);
        else
            transfers->all[kept++] = transfers->all[i];
    transfers->count = kept;
    return ok;
}

static void count_global_bytes(const struct transfer *transfer, uint32_t bytes)
{
    tally_of(transfer->warp, transfer->in)->global_bytes += bytes;
}

static uint8_t *shared_bytes(const struct transfer *transfer, uint32_t offset)
{
    return transfer->warp->block->shared + offset;
}

/* ---- loads ---------------------------------------------------------------------------------- */

static bool load_piece(const struct transfer *load, uint64_t global, uint32_t offset,
                       uint32_t bytes)
{
    const void *from = read_global(load->warp, load->in, load->lane, global, bytes);
    if (!from)
        return false;
    memcpy(shared_bytes(load, offset), from, bytes);
    count_global_bytes(load, bytes);
    return true;
}

/* With zeros, or with NaNs: which NaN the hardware takes is not documented. */
static void fill_box(const struct transfer *load)
{
    const uint32_t bytes = box_bytes(&load->map);
    uint8_t *box = shared_bytes(load, load->shared - SHARED_BASE);
    memset(box, load->map.fills_nan ? 0xff : 0, bytes);
    if (load->map.fills_nan)
        for (uint32_t i = load->map.element - 1u; i < bytes; i += load->map.element)
            box[i] = 0x7f;
}

static bool land_load(const struct transfer *load)
{
    struct block *block = load->warp->block;
    const uint32_t epoch = ++block->bulk->epoch;
    if (epoch > MAX_LOADS) {
        fault(load->warp, load->in, 1u << load->lane, "more than %d bulk loads in one block",
              MAX_LOADS);
        return false;
    }
    fill_box(load);
    if (!each_piece(load, load_piece))
        return false;
    shadow_bulk_landed(block, epoch, load->shared - SHARED_BASE, box_bytes(&load->map));
    complete_bytes(load, epoch);
    block->progress++;
    return !block->launch->failed;
}

static bool signals_same(const struct transfer *load, const struct transfer *asked)
{
    return load->mbarrier == asked->mbarrier;
}

bool land_loads(struct block *block, uint32_t mbarrier)
{
    const struct transfer asked = {.mbarrier = mbarrier};
    return end_transfers(&block->bulk->loads, signals_same, &asked, land_load);
}

/* Issues a load whose box, and the lane that issues it, are known. */
static bool issue_load(struct transfer *load, int mbarrier_operand)
{
    struct warp *warp = load->warp;
    struct block *block = warp->block;
    const struct mbarrier *mbarrier = find_mbarrier(warp, load->in, load->lane, mbarrier_operand);
    if (!mbarrier || !check_box(load))
        return false;
    if (!mbarrier->is_fenced) {
        fault(warp, load->in, 1u << load->lane,
              "whoever initialised mbarrier %u has not executed fence.mbarrier_init or "
              "fence.proxy.async since",
              mbarrier->address);
        return false;
    }
    load->mbarrier = mbarrier->address;
    if (!shadow_copy_issued(warp, load->in, load->lane, load->shared - SHARED_BASE,
                            box_bytes(&load->map)))
        return false;
    return block->launch->late_copies ? add_transfer(&block->bulk->loads, load) : land_load(load);
}

/* ---- stores --------------------------------------------------------------------------------- */

static bool issue_piece(const struct transfer *store, uint64_t global, uint32_t offset,
                        uint32_t bytes)
{
    (void)global;
    return shadow_store_issued(store->warp, store->in, store->lane, offset, bytes);
}

static bool finish_piece(const struct transfer *store, uint64_t global, uint32_t offset,
                         uint32_t bytes)
{
    (void)global;
    shadow_store_done(store->warp, store->lane, offset, bytes);
    return true;
}

/* Blocks on other threads may add to the same element. Whether the engine flushes subnormals is not
 * documented. */
static bool add_element(const struct transfer *store, float *to, float more)
{
    uint32_t old = __atomic_load_n((uint32_t *)to, __ATOMIC_RELAXED), new;
    float was, sum;
    do {
        memcpy(&was, &old, sizeof was);
        sum = was + more;
        if (fpclassify(was) == FP_SUBNORMAL || fpclassify(more) == FP_SUBNORMAL ||
            fpclassify(sum) == FP_SUBNORMAL) {
            fault(store->warp, store->in, 1u << store->lane, "%g + %g: subnormal numbers", was,
                  more);
            return false;
        }
        memcpy(&new, &sum, sizeof new);
    } while (!__atomic_compare_exchange_n((uint32_t *)to, &old, new, false, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    return true;
}

static bool store_piece(const struct transfer *store, uint64_t global, uint32_t offset,
                        uint32_t bytes)
{
    float *to = write_global(store->warp, store->in, store->lane, global, bytes);
    if (!to)
        return false;
    count_global_bytes(store, bytes);
    const uint8_t *from = shared_bytes(store, offset);
    if (!store->adds)
        memcpy(to, from, bytes);
    for (uint32_t i = 0; store->adds && i < bytes / sizeof *to; i++)
        if (!add_element(store, to + i, ((const float *)from)[i]))
            return false;
    return true;
}

static bool issue_store(struct transfer *store)
{
    struct block *block = store->warp->block;
    if (!check_box(store) || !each_piece(store, issue_piece))
        return false;
    if (!block->launch->late_copies && !each_piece(store, store_piece))
        return false;
    store->group = block->bulk->groups[store->warp->index][store->lane];
    return add_transfer(&block->bulk->stores, store);
}

static bool finish_store(const struct transfer *store)
{
    if (store->warp->block->launch->late_copies && !each_piece(store, store_piece))
        return false;
    return each_piece(store, finish_piece);
}

static bool is_older_group(const struct transfer *store, const struct transfer *asked)
{
    return store->warp == asked->warp && store->lane == asked->lane && store->group < asked->group;
}

static void commit_group(struct warp *warp, const struct instruction *in, lanes active)
{
    (void)in;
    for (int lane = 0; lane < LANES; lane++)
        warp->block->bulk->groups[warp->index][lane] += has_lane(active, lane);
}

/* Until all groups but the last N are done. Done reading is as good as done: what the store wrote
 * nobody reads in the same launch, as far as is known here. */
static void wait_group(struct warp *warp, const struct instruction *in, lanes active)
{
    struct bulk *bulk = warp->block->bulk;
    for (int lane = 0; lane < LANES; lane++) {
        const int64_t groups = (int64_t)bulk->groups[warp->index][lane] - in->operand[0].offset;
        if (!has_lane(active, lane) || groups <= 0)
            continue;
        const struct transfer asked = {.warp = warp, .lane = lane, .group = (uint32_t)groups};
        if (!end_transfers(&bulk->stores, is_older_group, &asked, finish_store))
            return;
    }
}

/* ---- instructions --------------------------------------------------------------------------- */

/* The box of a plain copy between `global` and `shared`, both of them address operands. */
static bool take_bytes(struct transfer *transfer, int global, int shared)
{
    struct warp *warp = transfer->warp;
    const uint64_t address = address_of(warp, transfer->in, global, transfer->lane);
    const uint32_t bytes = r32(warp, transfer->in, 2)[transfer->lane];
    if (address % CHUNK || bytes % CHUNK || bytes == 0) {
        fault(warp, transfer->in, 1u << transfer->lane,
              "a bulk copy of %u bytes at %#llx: both must be multiples of %d", bytes,
              (unsigned long long)address, CHUNK);
        return false;
    }
    transfer->map = map_bytes(address, bytes);
    transfer->shared = (uint32_t)address_of(warp, transfer->in, shared, transfer->lane);
    return true;
}

/* The box of a tensor copy: `map` is the address operand before the coordinates. */
static bool take_box(struct transfer *transfer, int map, int shared)
{
    struct warp *warp = transfer->warp;
    const int rank = transfer->in->opcode->detail;
    if (!fetch_tensor_map(warp, transfer->in, transfer->lane, map, &transfer->map))
        return false;
    if (transfer->map.rank != rank) {
        fault(warp, transfer->in, 1u << transfer->lane, "the tensor map has %d dimensions, not %d",
              transfer->map.rank, rank);
        return false;
    }
    for (int d = 0; d < rank; d++)
        transfer->corner[d] = (int32_t)r32(warp, transfer->in, map + 1 + d)[transfer->lane];
    transfer->shared = (uint32_t)address_of(warp, transfer->in, shared, transfer->lane);
    return true;
}

static struct transfer transfer_of(struct warp *warp, const struct instruction *in, int lane)
{
    return (struct transfer){.warp = warp, .in = in, .lane = lane};
}

/* [shared], [global], bytes, [mbarrier] */
static void load_bytes(struct warp *warp, const struct instruction *in, lanes active)
{
    for (int lane = 0; lane < LANES; lane++) {
        struct transfer load = transfer_of(warp, in, lane);
        if (has_lane(active, lane) && !(take_bytes(&load, 1, 0) && issue_load(&load, 3)))
            return;
    }
}

/* [shared], [map, {coordinates}], [mbarrier] */
static void load_tensor(struct warp *warp, const struct instruction *in, lanes active)
{
    const int rank = in->opcode->detail;
    for (int lane = 0; lane < LANES; lane++) {
        struct transfer load = transfer_of(warp, in, lane);
        if (has_lane(active, lane) && !(take_box(&load, 1, 0) && issue_load(&load, 2 + rank)))
            return;
    }
}

/* [global], [shared], bytes; opcode.detail: is it a reduction? */
static void store_bytes(struct warp *warp, const struct instruction *in, lanes active)
{
    for (int lane = 0; lane < LANES; lane++) {
        struct transfer store = transfer_of(warp, in, lane);
        store.adds = in->opcode->detail;
        if (has_lane(active, lane) && !(take_bytes(&store, 0, 1) && issue_store(&store)))
            return;
    }
}

/* [map, {coordinates}], [shared] */
static void store_tensor(struct warp *warp, const struct instruction *in, lanes active)
{
    const int rank = in->opcode->detail;
    for (int lane = 0; lane < LANES; lane++) {
        struct transfer store = transfer_of(warp, in, lane);
        if (has_lane(active, lane) && !(take_box(&store, 0, 1 + rank) && issue_store(&store)))
            return;
    }
}

static void prefetch_map(struct warp *warp, const struct instruction *in, lanes active)
{
    struct tensor_map map;
    for (int lane = 0; lane < LANES; lane++)
        if (has_lane(active, lane) && !fetch_tensor_map(warp, in, lane, 0, &map))
            return;
}

/* ---- what has no effect here ---------------------------------------------------------------- */

static void do_nothing(struct warp *warp, const struct instruction *in, lanes active)
{
    (void)warp, (void)in, (void)active;
}

/* A kernel's own parameters have the lowest generic addresses, from 0 on. */
static void take_address(struct warp *warp, const struct instruction *in, lanes active)
{
    for (int lane = 0; lane < LANES; lane++)
        if (has_lane(active, lane))
            r64(warp, in, 0)[lane] = r64(warp, in, 1)[lane];
}

static void sleep_a_while(struct warp *warp, const struct instruction *in, lanes active)
{
    (void)in, (void)active;
    yield_path(warp);
}

/* Registers are given up and taken in eights. */
static void set_registers(struct warp *warp, const struct instruction *in, lanes active)
{
    const int64_t count = in->operand[0].offset;
    if (count < 24 || count > 256 || count % 8)
        fault(warp, in, active, "a warp cannot have %lld registers", (long long)count);
}

/* ---- blocks --------------------------------------------------------------------------------- */

struct bulk *make_bulk(void) { return calloc(1, sizeof(struct bulk)); }

void free_bulk(struct bulk *bulk)
{
    if (!bulk)
        return;
    free(bulk->loads.all);
    free(bulk->stores.all);
    free(bulk);
}

void bulk_start_block(struct bulk *bulk)
{
    bulk->mbarrier_count = bulk->loads.count = bulk->stores.count = 0;
    bulk->epoch = 0; /* as the warps' clocks begin, see shadow_start_block */
    memset(bulk->groups, 0, sizeof bulk->groups);
}

static void refuse_unfinished(const struct transfers *transfers, const char *what)
{
    if (transfers->count == 0)
        return;
    const struct transfer *transfer = &transfers->all[0];
    fault(transfer->warp, transfer->in, 1u << transfer->lane, "the block has ended, and %s", what);
}

void bulk_end_block(struct block *block)
{
    refuse_unfinished(&block->bulk->loads, "nobody has waited for this load");
    refuse_unfinished(&block->bulk->stores, "this store has not been waited for");
}

/* ---- opcodes -------------------------------------------------------------------------------- */

#define ON_SHARED(name, operands, execute, detail)                                                 \
    {name ".shared.b64", operands, execute, KIND_BARRIER, detail},                                 \
    {                                                                                              \
        name ".shared::cta.b64", operands, execute, KIND_BARRIER, detail                           \
    }

/* With and without the words that say what is the default. */
#define IN_SCOPE(name, scope, operands, execute, detail)                                           \
    ON_SHARED(name, operands, execute, detail), ON_SHARED(name scope, operands, execute, detail)

#define TESTS(name, operands, detail)                                                              \
    IN_SCOPE(name, ".acquire.cta", "P [ " operands, test_mbarriers, detail)

#define COPY(name, operands, execute, detail)                                                      \
    {name, operands, execute, KIND_COPY, detail},                                                  \
    {                                                                                              \
        name ".L2::cache_hint", operands " d", execute, KIND_COPY, detail                          \
    }

#define BYTES_LOAD(space)                                                                          \
    COPY("cp.async.bulk." space ".global.mbarrier::complete_tx::bytes", "[ [ w [", load_bytes, 0)

#define TENSOR_LOAD(rank, path)                                                                    \
    COPY("cp.async.bulk.tensor." #rank "d." path ".mbarrier::complete_tx::bytes",                  \
         "[ [w" #rank " [", load_tensor, rank)

#define TENSOR_STORE(rank, path)                                                                   \
    COPY("cp.async.bulk.tensor." #rank "d." path ".bulk_group", "[w" #rank " [", store_tensor, rank)

#define TENSOR_COPIES(rank)                                                                        \
    TENSOR_LOAD(rank, "shared::cta.global"), TENSOR_LOAD(rank, "shared::cta.global.tile"),         \
        TENSOR_LOAD(rank, "shared::cluster.global"),                                               \
        TENSOR_LOAD(rank, "shared::cluster.global.tile"),                                          \
        TENSOR_STORE(rank, "global.shared::cta"), TENSOR_STORE(rank, "global.shared::cta.tile")

#define FENCE(name, execute) {name, "", execute, KIND_BARRIER, 0}

const struct opcode BULK_OPCODES[] = {
    ON_SHARED("mbarrier.init", "[ w", init_mbarriers, 0),
    ON_SHARED("mbarrier.inval", "[", drop_mbarriers, 0),
    IN_SCOPE("mbarrier.expect_tx", ".relaxed.cta", "[ w", expect_bytes, 0),
    IN_SCOPE("mbarrier.arrive", ".release.cta", "D [", arrive_at_mbarriers, ARRIVE_ONCE),
    IN_SCOPE("mbarrier.arrive", ".release.cta", "D [ w", arrive_at_mbarriers, ARRIVE_COUNT),
    IN_SCOPE("mbarrier.arrive.expect_tx", ".release.cta", "D [ w", arrive_at_mbarriers,
             ARRIVE_EXPECT_BYTES),
    TESTS("mbarrier.test_wait", "d", TEST_STATE),
    TESTS("mbarrier.test_wait.parity", "w", TEST_PARITY),
    TESTS("mbarrier.try_wait", "d", TEST_STATE),
    TESTS("mbarrier.try_wait", "d w", TEST_STATE),
    TESTS("mbarrier.try_wait.parity", "w", TEST_PARITY),
    TESTS("mbarrier.try_wait.parity", "w w", TEST_PARITY),

    BYTES_LOAD("shared::cta"),
    BYTES_LOAD("shared::cluster"),
    COPY("cp.async.bulk.global.shared::cta.bulk_group", "[ [ w", store_bytes, false),
    {"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32", "[ [ w", store_bytes, KIND_COPY,
     true},
    TENSOR_COPIES(2),
    TENSOR_COPIES(3),
    TENSOR_COPIES(4),
    TENSOR_COPIES(5),
    {"cp.async.bulk.commit_group", "", commit_group, KIND_COPY, 0},
    {"cp.async.bulk.wait_group", "i", wait_group, KIND_COPY, 0},
    {"cp.async.bulk.wait_group.read", "i", wait_group, KIND_COPY, 0},
    {"prefetch.tensormap", "[", prefetch_map, KIND_COPY, 0},
    {"cvta.param.u64", "D d", take_address, KIND_MOVE, 0},

    FENCE("fence.mbarrier_init.release.cluster", fence_mbarriers),
    FENCE("fence.proxy.async", fence_mbarriers),
    FENCE("fence.proxy.async.shared::cta", fence_mbarriers),
    FENCE("fence.proxy.async.global", do_nothing),
    FENCE("fence.acq_rel.cta", do_nothing),
    FENCE("fence.acq_rel.gpu", do_nothing),
    FENCE("membar.cta", do_nothing),
    FENCE("membar.gl", do_nothing),
    FENCE("griddepcontrol.wait", do_nothing),
    FENCE("griddepcontrol.launch_dependents", do_nothing),
    {"nanosleep.u32", "w", sleep_a_while, KIND_BARRIER, 0},
    {"setmaxnreg.inc.sync.aligned.u32", "i", set_registers, KIND_BARRIER, 0},
    {"setmaxnreg.dec.sync.aligned.u32", "i", set_registers, KIND_BARRIER, 0},
    {NULL, NULL, NULL, 0, 0},
};
