/* The forward: tile lookup, packing, grid, splits. Pure C. */
#include <stdint.h>

#include "arithmetic.h"
#include "plan.h"
#include "shape.h"
#include "split.h"

/* Of K and V. */
static int kv_dtype(const struct fa_plan_input *input)
{
    return input->e4m3 ? FA_FLOAT8_E4M3 : input->dtype;
}

static int forward_smem(const struct fa_plan_input *input, const struct fa_tile *tile)
{
    const int stage_bytes =
        fa_forward_stage_bytes(input->head_dim, input->head_dim_v, tile->tile_n, kv_dtype(input));
    return fa_forward_smem(stage_bytes, tile->stages, tile->kernel == FA_KERNEL_FORWARD_TMA);
}

/* Query rows of all heads for each multiprocessor; expanded tensors can have more than 2^63. How
 * many sequences there are a plan for any lengths does not know: it takes tiles as large as what
 * can share a block. So do calls of few queries, in which all the time is that of reading keys:
 * rows of a larger tile would be empty, and several small ones would read the keys again. */
static double rows_per_sm(const struct fa_plan_input *input, const struct fa_device *device)
{
    if (input->varlen || input->seqlen_q <= FA_FEW_QUERIES)
        return (double)input->seqlen_q * fa_plan_heads_per_kv(input);
    return (double)input->batch * input->heads_q * input->seqlen_q / MAX(1, device->sms);
}

static bool serves(const struct fa_tile_row *row, const struct fa_plan_input *input,
                   const struct fa_device *device)
{
#define WITHIN(bound, value)                                                                       \
    ((row->bound == FA_ANY || (value) <= row->bound) &&                                            \
     (row->above.bound == 0 || (value) > row->above.bound))
#define SAME(wanted, value) ((wanted) == FA_ANY || (wanted) == (value))
    return fa_row_is_of(row->arch, row->kind, device) && WITHIN(head_dim, input->head_dim) &&
           WITHIN(head_dim_v, input->head_dim_v) &&
           WITHIN(heads_per_kv, fa_plan_heads_per_kv(input)) && WITHIN(seqlen_q, input->seqlen_q) &&
           WITHIN(rows_per_sm, rows_per_sm(input, device)) &&
           SAME(row->mask_right, input->mask_right) && SAME(row->mask_left, input->mask_left);
#undef WITHIN
#undef SAME
}

/* Whether kernels/forward_tma.cu can do what a row asks of it, and if not why. Any head dims,
 * equal or not, any masks, and any lengths but 0 are fine. */
static bool tma_can_implement(const struct fa_plan_input *input, const struct fa_device *device,
                              const struct fa_tile *tile, int smem_per_block, const char **why)
{
    if (!device->has_tma)
        *why = "the TMA came with compute capability 9.0";
    else if (input->paged && input->box_rows < FA_MIN_BOX_ROWS)
        *why = "a box of the TMA lies within a page and has 8 rows at least: page sizes must be "
               "multiples of 8";
    else if (input->leftpad)
        *why = "a box of the TMA begins where a page does, and keys behind a left pad may not";
    else if (input->seqlen_k == 0)
        *why = "no tensor map describes K and V without keys";
    else if (!input->tma_strides)
        *why = "the TMA needs K and V at strides that are multiples of 16 bytes, from a row up to "
               "2^40: neither expanded nor flipped";
    else if (tile->tile_n % FA_TMA_KEY_STEP != 0)
        *why = "a tile is one box of the TMA: keys in multiples of 32";
    else if (forward_smem(input, tile) > smem_per_block)
        *why = "its stages and mbarriers need more than the shared memory";
    else
        return true;
    return false;
}

/* A ring that holds more than the keys of the longest sequence takes shared memory from another
 * block, and short sequences live by how many blocks load at a time. */
static void shrink_ring(const struct fa_plan_input *input, struct fa_tile *tile)
{
    enum { LEAST_STAGES = 2, LEAST_TILE_N = 32 };
    while (tile->stages > LEAST_STAGES && (tile->stages - 1) * tile->tile_n >= input->seqlen_k)
        tile->stages--;
    while (tile->tile_n > LEAST_TILE_N && tile->stages * tile->tile_n / 2 >= input->seqlen_k)
        tile->tile_n /= 2;
    tile->sub_n = MIN(tile->sub_n, tile->tile_n);
    /* A warp that only loads has nothing to do once all keys are on their way. */
    if (tile->stages * tile->tile_n >= input->seqlen_k && tile->producer == FA_PRODUCER_WARP)
        tile->producer = FA_PRODUCER_THREAD;
}

/* What takes registers where the TMA feeds warps of 32 rows, which at these head dims have none
 * left; on 12.x, where nothing may spill up to head_dim 128, also where other warps of 32 rows have
 * none, or a ninth warp leaves none. */
static bool lacks_registers(const struct fa_plan_input *input, const struct fa_device *device,
                            const struct fa_tile *tile)
{
    const bool is_crowded = input->bias || input->score_mod || input->mask_mod;
    const bool has_steps = is_crowded || input->alibi;
    if (device->arch / 10 == 12 && (is_crowded || input->block_q))
        return tile->warp_m == 32 || (tile->producer == FA_PRODUCER_WARP && tile->warps == 8);
    return has_steps && tile->kernel == FA_KERNEL_FORWARD_TMA && tile->warp_m == 32 &&
           input->head_dim > 96;
}

/* Tiles that whole listed blocks have. */
static void divide_blocks(const struct fa_plan_input *input, struct fa_tile *tile)
{
    while (tile->warps > 1 && input->block_q % (tile->warps * tile->warp_m) != 0)
        tile->warps /= 2;
    if (input->block_q % tile->warp_m != 0)
        tile->warp_m = 16;
    while (tile->tile_n > 16 && input->block_k % tile->tile_n != 0)
        tile->tile_n /= 2;
    tile->sub_n = MIN(tile->sub_n, tile->tile_n);
}

/* Every kernel keeps within 99 KB wherever it runs, so that what is tested anywhere holds on
 * 12.x. */
static int smem_limit(const struct fa_device *device)
{
    return MIN(device->smem_per_block, fa_device_of_arch(120).smem_per_block);
}

/* Whether sub-tiles are steps of the mma of P V, which of e4m3 takes 32 keys. */
static bool has_whole_steps(const struct fa_tile *tile, const struct fa_plan_input *input)
{
    return !input->q_e4m3 || tile->sub_n % fa_mma_k(FA_FLOAT8_E4M3) == 0;
}

/* The tile of the first of some rows that serves the call within the shared memory, stages
 * included. Where the TMA cannot bring K and V, which *why_not_tma tells, cp.async does. */
static bool first_that_serves(const struct fa_tile_row *rows, size_t count,
                              const struct fa_plan_input *input, const struct fa_device *device,
                              struct fa_tile *tile, const char **why_not_tma)
{
    const int smem_per_block = smem_limit(device);
    for (size_t i = 0; i < count; i++) {
        if (!serves(&rows[i], input, device) || !has_whole_steps(&rows[i].tile, input))
            continue;
        *tile = rows[i].tile;
        if (input->block_q)
            divide_blocks(input, tile);
        if (tile->kernel == FA_KERNEL_FORWARD_TMA &&
            !tma_can_implement(input, device, tile, smem_per_block, why_not_tma)) {
            tile->kernel = FA_KERNEL_FORWARD;
            tile->producer = 0;
        }
        if (forward_smem(input, tile) <= smem_per_block)
            return true;
    }
    return false;
}

/* Pages by the TMA, where a row of tiles.c asks for cp.async: that would need an address for every
 * row of a tile, from every thread; a box needs one for several rows, from a single thread. Boxes
 * of fewer rows take longer than cp.async. */
static void prefer_tma(const struct fa_plan_input *input, const struct fa_device *device,
                       struct fa_tile *tile, const char **why_not_tma)
{
    struct fa_tile by_tma = *tile;
    if (tile->kernel == FA_KERNEL_FORWARD_TMA || input->box_rows < FA_TMA_KEY_STEP)
        return;
    first_that_serves(FA_PAGED_TILES, FA_PAGED_TILE_COUNT, input, device, &by_tma, why_not_tma);
    by_tma.kernel = FA_KERNEL_FORWARD_TMA;
    by_tma.producer = FA_PRODUCER_THREAD;
    if (tma_can_implement(input, device, &by_tma, smem_limit(device), why_not_tma))
        *tile = by_tma;
}

/* Random numbers, mods and lists take registers, of which a ninth warp would leave 168 to each.
 * Tiles of 64 rows have some left. A bias, or random numbers beside another of these, leave none to
 * warps of 32 rows. Returns whether the tile is of another row. */
static bool make_room(const struct fa_plan_input *input, const struct fa_device *device,
                      struct fa_tile *tile, const char **why_not_tma)
{
    enum { SMALL_ROWS = 64 };
    const bool is_listed_or_modified = input->block_q || input->score_mod || input->mask_mod;
    if (tile->producer == FA_PRODUCER_WARP && tile->warps == 8)
        tile->producer = FA_PRODUCER_THREAD;
    struct fa_tile roomy;
    if (tile->warps * tile->warp_m <= SMALL_ROWS ||
        !first_that_serves(FA_ROOMY_TILES, FA_ROOMY_TILE_COUNT, input, device, &roomy, why_not_tma))
        return false;
    *tile = roomy;
    if (tile->warp_m == 32 && (input->bias || (input->dropout && is_listed_or_modified))) {
        tile->warps *= 2;
        tile->warp_m = 16;
    }
    return true;
}

/* The query rows that pass through the multiprocessor that computes the most, if each computes one
 * block at a time. */
static int64_t rows_of_waves(const struct fa_plan_input *input, const struct fa_device *device,
                             int tile_m)
{
    const int64_t blocks =
        (int64_t)input->batch * input->heads_q * CEIL_DIV(input->seqlen_q, tile_m);
    return CEIL_DIV(blocks, MAX(1, device->sms)) * tile_m;
}

/* Blocks that take all of a multiprocessor come in waves, and a last wave of two blocks takes as
 * long as a full one: of 256 rows, 512 blocks are four waves on the 170 multiprocessors of an
 * RTX 5090, where blocks of 128 rows need three and a half of such. Those are slower by SLOWER
 * percent where waves are full: S13 in benchmarks/NOTES.md. */
static bool fill_waves(const struct fa_plan_input *input, const struct fa_device *device,
                       struct fa_tile *tile)
{
    enum { GEFORCE_SLOWER = 1, PRO_SLOWER = 4 };
    const int slower = device->kind == FA_PRO_LIKE ? PRO_SLOWER : GEFORCE_SLOWER;
    const int tile_m = tile->warps * tile->warp_m;
    struct fa_tile half;
    const char *why_not_tma = NULL;
    if (input->varlen ||
        !first_that_serves(FA_WAVE_TILES, FA_WAVE_TILE_COUNT, input, device, &half, &why_not_tma))
        return false;
    const int half_m = half.warps * half.warp_m;
    if (tile_m != 2 * half_m || half.kernel != tile->kernel ||
        rows_of_waves(input, device, half_m) * (100 + slower) >=
            rows_of_waves(input, device, tile_m) * 100)
        return false;
    *tile = half;
    return true;
}

/* Whether products of e4m3 are those with block scales, which then are 1: GeForce cards take half
 * as long for them, others do not. */
static bool takes_block_scales(const struct fa_device *device)
{
    return device->has_block_scales && device->kind == FA_GEFORCE_LIKE;
}

static bool choose_tile(const struct fa_plan_input *input, const struct fa_plan_target *target,
                        struct fa_plan *plan, struct fa_tile *tile)
{
    const struct fa_device *device = &target->device;
    const struct fa_tile_list *own = target->tiles;
    const char *why_not_tma = NULL;
    const bool is_own = first_that_serves(own->rows, own->count, input, device, tile, &why_not_tma);
    const bool is_of_e4m3 =
        !is_own && input->e4m3 &&
        first_that_serves(input->q_e4m3 ? FA_Q_E4M3_TILES : FA_E4M3_TILES,
                          input->q_e4m3 ? FA_Q_E4M3_TILE_COUNT : FA_E4M3_TILE_COUNT, input, device,
                          tile, &why_not_tma);
    if (!is_own && !is_of_e4m3 &&
        !first_that_serves(FA_TILES, FA_TILE_COUNT, input, device, tile, &why_not_tma))
        return false;
    const bool is_roomy = !is_own && (input->dropout || lacks_registers(input, device, tile)) &&
                          make_room(input, device, tile, &why_not_tma);
    const bool is_asked = tile->kernel == FA_KERNEL_FORWARD_TMA;
    if (!is_own && input->paged)
        prefer_tma(input, device, tile, &why_not_tma);
    const bool is_halved = !is_own && !is_of_e4m3 && fill_waves(input, device, tile);
    if (input->varlen && !is_own)
        shrink_ring(input, tile);
    if (input->block_q)
        fa_plan_because(plan, "blocks",
                        "a walk over lists: the tiles of listed blocks are read, and no others");
    const bool is_tma = tile->kernel == FA_KERNEL_FORWARD_TMA;
    fa_plan_because(plan, "kernel",
                    is_asked ? "forward_tma: mma.sync fed by the TMA, as the tile's row asks"
                    : is_tma
                        ? "forward_tma: mma.sync fed by the TMA, which takes whole boxes of pages"
                        : "forward: mma.sync fed by cp.async, the path of every device from 8.0");
    if (input->q_e4m3)
        fa_plan_because(plan, "products",
                        takes_block_scales(device)
                            ? "of e4m3, with block scales of 1: GeForce cards take half as long"
                            : "of e4m3: mma.m16n8k32, the full rate of every other device");
    if (why_not_tma && !is_tma)
        fa_plan_because(plan, "not forward_tma", why_not_tma);
    fa_plan_because(
        plan, "tile",
        is_own     ? "first row of use_tiles() that serves the call and fits the shared memory"
        : is_roomy ? "a row of csrc/tiles.c that leaves registers to dropout, mods and lists"
        : is_halved
            ? "half the rows of the first row of csrc/tiles.c: its last wave would be nearly empty"
            : "first row of csrc/tiles.c that serves the call and fits the shared memory");
    return true;
}

/* ---- packing --------------------------------------------------------------------------------- */

/* Query rows for which blocks go over K and V once: of a head, or of all that share a KV head. */
static int64_t rows(const struct fa_plan_input *input, int seqlen_q, bool packed)
{
    return (int64_t)seqlen_q * (packed ? fa_plan_heads_per_kv(input) : 1);
}

/* Whether a call that may be packed gains from it: where it takes noticeably fewer blocks, because
 * those of a single head are partly empty. Each goes over all of K and V, so its time hardly
 * depends on how many of its rows there are. The rule and the 0.9 are those of FlashAttention-3
 * (should_pack_gqa() in hopper/heuristics.h): packed rows lie further apart in memory. */
static bool packing_pays(const struct fa_plan_input *input, int tile_m)
{
    const int64_t packed = CEIL_DIV(rows(input, input->seqlen_q, true), tile_m);
    const int64_t unpacked =
        CEIL_DIV(rows(input, input->seqlen_q, false), tile_m) * fa_plan_heads_per_kv(input);
    return 10 * packed < 9 * unpacked;
}

/* Why the call cannot be packed; NULL: it can. */
static const char *why_not_packed(const struct fa_plan_input *input)
{
    if (fa_plan_heads_per_kv(input) == 1)
        return "not packed: each KV head has one query head";
    if (input->own_lists)
        return "not packed: query heads have lists of blocks of their own";
    if (input->dropout)
        return "not packed: a random number is drawn for weights of rows that are queries";
    if (rows(input, input->seqlen_q, true) > FA_MAX_SIZE)
        return "not packed: of 2^28 rows or more, which are counted in 32 bits";
    return NULL;
}

static bool choose_packing(const struct fa_plan_input *input, int tile_m, struct fa_plan *plan)
{
    const char *why_not = why_not_packed(input);
    if (input->pack_gqa == FA_PACK_ALWAYS && why_not) {
        fa_plan_drop(plan, "pack_gqa", why_not);
        return false;
    }
    if (input->pack_gqa != FA_PACK_AUTO) {
        const bool packed = input->pack_gqa == FA_PACK_ALWAYS;
        fa_plan_because(plan, "pack_gqa",
                        packed ? "packed, as the call asks" : "not packed, as the call asks");
        return packed;
    }
    const bool packed = !why_not && packing_pays(input, tile_m);
    fa_plan_because(plan, "pack_gqa",
                    why_not  ? why_not
                    : packed ? "packed: blocks of one query head would be partly empty"
                             : "not packed: blocks of one query head are full enough");
    return packed;
}

/* ---- the main kernel ------------------------------------------------------------------------- */

static struct fa_variant variant_of(const struct fa_plan_input *input,
                                    const struct fa_device *device, const struct fa_tile *tile,
                                    bool packed)
{
    struct fa_variant variant = fa_plan_variant(input);
    variant.mx_e4m3 = input->q_e4m3 && takes_block_scales(device);
    variant.kernel = tile->kernel;
    variant.tile_n = tile->tile_n;
    variant.sub_n = tile->sub_n;
    variant.warps = tile->warps;
    variant.warp_m = tile->warp_m;
    variant.stages = tile->stages;
    variant.producer = tile->producer;
    variant.pack_gqa = packed;
    return variant;
}

/* The first kernel: it makes lengths, and q if that is rotated, for all that follow. */
static void add_append(const struct fa_plan_input *input, struct fa_plan *plan)
{
    if (input->append)
        fa_plan_add(plan, (struct fa_step){.job = FA_JOB_APPEND,
                                           .variant = {.kernel = FA_KERNEL_KV_APPEND,
                                                       .dtype = input->dtype,
                                                       .kv_e4m3 = input->e4m3},
                                           .threads = FA_APPEND_THREADS});
}

static void set_main(const struct fa_plan_input *input, const struct fa_plan_target *target,
                     const struct fa_tile *tile, struct fa_plan *plan)
{
    plan->main = plan->step_count;
    plan->tile_m = tile->warps * tile->warp_m;
    plan->tile_n = tile->tile_n;
    plan->smem_bytes = forward_smem(input, tile);
    const int threads = (tile->warps + (tile->producer == FA_PRODUCER_WARP)) * 32;
    const int smem_request = fa_device_smem_request(
        &target->device, target->limits_arch, plan->smem_bytes, threads, &plan->blocks_per_sm);
    const bool packed = choose_packing(input, plan->tile_m, plan);
    if (target->limits_arch)
        fa_plan_because(plan, "smem_request", "padded to the blocks per SM of FA_SM120_LIMITS");
    fa_plan_add(plan, (struct fa_step){.job = FA_JOB_FORWARD,
                                       .variant = variant_of(input, &target->device, tile, packed),
                                       .threads = threads,
                                       .smem_request = smem_request});
}

/* Blocks run group by group, so that the K and V that a group reads fill at most half of the L2: of
 * so many KV heads. */
static void set_group_limit(const struct fa_plan_input *input, const struct fa_device *device,
                            struct fa_plan *plan)
{
    const int64_t kv_bytes = (int64_t)input->seqlen_k * (input->head_dim + input->head_dim_v) *
                             fa_element_bytes(kv_dtype(input));
    plan->group_limit = (int)MAX(1, device->l2_bytes / 2 / MAX(1, kv_bytes));
}

/* All groups are equal: a smaller last one would leave multiprocessors idle at the end. */
static int group_heads(const struct fa_plan_input *input, int64_t kv_heads,
                       const struct fa_plan *plan)
{
    const bool packed = plan->steps[plan->main].variant.pack_gqa;
    int64_t in_group = MIN(kv_heads, plan->group_limit);
    while (in_group > 1 && kv_heads % in_group != 0)
        in_group--;
    return (int)(MAX(1, in_group) * (packed ? 1 : fa_plan_heads_per_kv(input)));
}

static void explain_groups(const struct fa_plan_input *input, struct fa_plan *plan)
{
    const int64_t kv_heads = (int64_t)input->batch * input->heads_kv;
    fa_plan_because(plan, "group_heads",
                    input->varlen ? "as many heads at a time as keep K and V in half of the L2, "
                                    "were lengths their bounds, in equal groups"
                    : kv_heads <= plan->group_limit ? "K and V of all heads fit in half of the L2"
                                                    : "as many heads at a time as keep K and V in "
                                                      "half of the L2, in equal groups");
}

/* ---- splits of the keys ---------------------------------------------------------------------- */

/* The tiles of keys that the longest block of queries goes through, or one more. */
static int longest_walk(const struct fa_plan_input *input, int seqlen_k, int tile_m, int tile_n)
{
    /* The windows of all rows of a block together, which may start and end within a tile. */
    const int64_t keys =
        (int64_t)input->window_left + input->window_right + MIN(tile_m, input->seqlen_q);
    if (keys <= 0)
        return 0;
    return (int)MIN(CEIL_DIV(seqlen_k, tile_n), (keys - 1 + tile_n - 1) / tile_n + 1);
}

/* The call in one part, by plan->tile_m, tile_n and what else does not depend on the extent. */
static struct fa_grid grid_of(const struct fa_plan_input *input, const struct fa_extent *extent,
                              const struct fa_plan *plan, bool packed)
{
    const int64_t heads = (int64_t)extent->batch * (packed ? input->heads_kv : input->heads_q);
    const int64_t blocks = heads * CEIL_DIV(rows(input, extent->seqlen_q, packed), plan->tile_m);
    return (struct fa_grid){
        .blocks = (int)MIN(blocks, INT32_MAX),
        .tiles = longest_walk(input, extent->seqlen_k, plan->tile_m, plan->tile_n),
        .tile_m = plan->tile_m,
        .tile_n = plan->tile_n,
        .key_bytes = (input->head_dim + input->head_dim_v) * fa_element_bytes(kv_dtype(input)),
        .kv_heads = (int64_t)extent->batch * input->heads_kv,
        .row_bytes = extent->rows_q * input->heads_q * (input->head_dim_v + 1) * 4,
        .in_flight = plan->smem_bytes,
        .sms = plan->sms,
        .blocks_per_sm = plan->blocks_per_sm,
        .share = plan->share,
        .mma_time = plan->mma_time,
    };
}

/* So many parts as take the least time. */
static int choose_splits(const struct fa_plan_input *input, struct fa_plan *plan)
{
    const struct fa_extent extent = fa_plan_extent(input);
    const struct fa_grid grid =
        grid_of(input, &extent, plan, plan->steps[plan->main].variant.pack_gqa);
    const int splits = fa_split_parts(&grid);
    fa_plan_because(plan, "num_splits",
                    splits > 1 ? "blocks of queries leave multiprocessors idle: parts of their "
                                 "keys, a block each, take less time by the rule of csrc/split.c"
                               : "1: parts would not pay for the second kernel, by the rule of "
                                 "csrc/split.c");
    return splits;
}

/* The number is fa_plan_fit's. */
static int may_split(const struct fa_plan_input *input, struct fa_plan *plan)
{
    fa_plan_because(plan, "num_splits",
                    input->may_split
                        ? "as many parts as pay where the lengths are their bounds, by the rule of "
                          "csrc/split.c"
                        : "1: were the lengths their bounds, parts would not pay for the second "
                          "kernel, by the rule of csrc/split.c");
    return input->may_split ? 2 : 1;
}

/* As many as asked, as far as there are tiles and blocks for them. */
static int bounded_splits(int asked, int tiles, struct fa_plan *plan)
{
    const int splits = (int)MIN(MIN(asked, tiles), INT32_MAX / plan->steps[plan->main].blocks);
    fa_plan_because(plan, "num_splits",
                    splits == asked   ? "as asked"
                    : splits == tiles ? "fewer than asked: a tile of keys for each"
                                      : "fewer than asked: a grid has 2^31 - 1 blocks at most");
    return splits;
}

static int splits_of(const struct fa_plan_input *input, struct fa_plan *plan)
{
    const int64_t rows = (int64_t)input->batch * input->heads_q * input->seqlen_q;
    const int tiles = longest_walk(input, input->seqlen_k, plan->tile_m, plan->tile_n);
    const int asked = input->num_splits;
    const char *why_one = asked == 1   ? "1: the keys are not split, as asked"
                          : tiles <= 1 ? "1: no block of queries goes through more than a tile of "
                                         "keys"
                          : rows == 0 || rows > INT32_MAX
                              ? "1: from 1 to 2^31 - 1 rows of queries can be split"
                              : NULL;
    if (why_one) {
        fa_plan_because(plan, "num_splits", why_one);
        return 1;
    }
    if (asked > 0)
        return bounded_splits(asked, tiles, plan);
    return input->varlen ? may_split(input, plan) : choose_splits(input, plan);
}

/* A tile that calls of few queries have on every device: what tile a plan has does not depend on
 * the extent, nor is it known before there is a plan. */
bool fa_plan_may_split(const struct fa_plan_input *input, const struct fa_extent *extent,
                       const struct fa_device *device)
{
    const struct fa_plan nominal = {
        .tile_m = 64,
        .tile_n = 64,
        .smem_bytes = 64 << 10,
        .blocks_per_sm = 1,
        .sms = device->sms,
        .share = fa_device_share(device),
        .mma_time = fa_device_mma_time(device),
    };
    const int64_t out_rows = extent->rows_q * input->heads_q;
    if (!input->varlen || input->num_splits != 0 || extent->batch == 0 || out_rows == 0 ||
        out_rows > INT32_MAX)
        return false;
    const struct fa_grid grid = grid_of(input, extent, &nominal, input->pack_gqa != FA_PACK_NEVER);
    return fa_split_parts(&grid) > 1;
}

/* ---- the second kernel ----------------------------------------------------------------------- */

/* A row of out takes a thread for every four dims, so a block has room for some rows. Of many parts
 * these are slices instead: few rows are enough for the whole machine then. */
enum { COMBINE_WARPS = 8, PARTS_PER_SLICE = 4 };

struct fa_step fa_plan_combine(int dtype, int parts_dtype, int head_dim_v)
{
    return (struct fa_step){.job = FA_JOB_COMBINE,
                            .variant = {.kernel = FA_KERNEL_COMBINE,
                                        .dtype = dtype,
                                        .parts_dtype = parts_dtype,
                                        .head_dim_v = head_dim_v,
                                        .warps = COMBINE_WARPS},
                            .threads = COMBINE_WARPS * 32};
}

int fa_plan_fit_combine(int64_t rows, int parts, struct fa_step *step)
{
    const int slots = fa_combine_slots(step->threads, step->variant.head_dim_v);
    const int slices = MAX(1, MIN(CEIL_DIV(parts, PARTS_PER_SLICE), slots));
    step->blocks = (int)CEIL_DIV(rows, slots / slices);
    return slices;
}

static void add_combine(const struct fa_plan_input *input, const struct fa_device *device,
                        struct fa_plan *plan)
{
    struct fa_step step = fa_plan_combine(input->dtype, FA_FLOAT32, input->head_dim_v);
    step.overlaps_previous = device->has_tma;
    fa_plan_add(plan, step);
}

static void set_splits(const struct fa_plan_input *input, const struct fa_device *device,
                       struct fa_plan *plan)
{
    struct fa_step *main = &plan->steps[plan->main];
    plan->splits = splits_of(input, plan);
    if (plan->splits == 1)
        return;
    main->variant.split = 1;
    add_combine(input, device, plan);
}

/* Rows that no sequence has are the first kernel's, which also lists the tiles of the main one; of
 * a split call they are the last one's, as combine writes all rows. */
static void add_fill(const struct fa_plan_input *input, struct fa_plan *plan)
{
    const struct fa_step fill = {
        .job = FA_JOB_FILL,
        .variant = {.kernel = FA_KERNEL_VARLEN_FILL, .dtype = input->dtype},
        .threads = FA_FILL_THREADS};
    if (!input->varlen)
        return;
    struct fa_step *last = fa_plan_add(plan, fill);
    if (plan->splits > 1)
        return;
    *last = plan->steps[plan->main];
    plan->steps[plan->main++] = fill;
}

/* ---- sizes ----------------------------------------------------------------------------------- */

static void fit_combine(const struct fa_plan_input *input, int64_t rows, struct fa_plan *plan,
                        struct fa_step *step)
{
    struct fa_workspace *workspace = &plan->workspace;
    workspace->lse_parts = plan->splits * rows * input->head_dim_v;
    workspace->size = workspace->lse_parts + plan->splits * rows;
    plan->combine_slices = fa_plan_fit_combine(rows, plan->splits, step);
}

/* What attention reads lies behind the parts, q at a multiple of 16 bytes. */
static int fit_append(const struct fa_plan_input *input, const struct fa_extent *extent,
                      struct fa_plan *plan, struct fa_step *step, struct fa_plan_error *error)
{
    struct fa_workspace *workspace = &plan->workspace;
    const int64_t blocks = extent->new_blocks + extent->q_blocks;
    const int64_t elements =
        extent->q_blocks ? extent->rows_q * input->heads_q * input->head_dim : 0;
    if (blocks > INT32_MAX)
        return fa_plan_refuse(error, false,
                              "batch * seqlen needs more than 2^31 - 1 thread blocks");
    step->blocks = (int)blocks;
    workspace->rotated_q = CEIL_DIV(workspace->size, 4) * 4;
    workspace->seqused_k = workspace->rotated_q + elements / 2;
    workspace->size = workspace->seqused_k + extent->batch;
    return 0;
}

/* The first launch can list the tiles of a packed side. */
static int list_places(const struct fa_plan_input *input, const struct fa_extent *extent,
                       const struct fa_plan *plan)
{
    const struct fa_variant *main = &plan->steps[plan->main].variant;
    const int64_t rows_of_head =
        extent->rows_q * (main->pack_gqa ? fa_plan_heads_per_kv(input) : 1);
    return extent->is_packed_q && !main->split
               ? fa_plan_list_places(extent->batch, rows_of_head, plan->tile_m, plan->m_blocks)
               : 0;
}

int fa_plan_fit_forward(const struct fa_plan_input *input, const struct fa_extent *extent,
                        struct fa_plan *plan, struct fa_plan_error *error)
{
    struct fa_step *main = &plan->steps[plan->main];
    const bool packed = main->variant.pack_gqa;
    const int heads_of_one = packed ? input->heads_kv : input->heads_q;
    const int64_t rows_of_all = extent->rows_q * input->heads_q;
    plan->m_blocks = (int)CEIL_DIV(rows(input, extent->seqlen_q, packed), plan->tile_m);
    plan->list_places = list_places(input, extent, plan);
    const bool is_listed = plan->list_places > 0;
    if (is_listed)
        plan->m_blocks = plan->list_places;
    const int64_t heads = (int64_t)heads_of_one * (is_listed ? 1 : extent->batch);
    plan->n_blocks = CEIL_DIV(extent->seqlen_k, plan->tile_n);
    if (main->variant.split && input->may_split) {
        const struct fa_grid grid = grid_of(input, extent, plan, packed);
        plan->splits = MAX(2, fa_split_parts(&grid));
    }
    if (heads > INT32_MAX || heads * plan->m_blocks > INT32_MAX / plan->splits ||
        (plan->splits > 1 && rows_of_all > INT32_MAX))
        return fa_plan_refuse(error, false,
                              "batch * heads * seqlen needs more than 2^31 - 1 thread blocks");
    main->blocks = (int)(heads * plan->m_blocks * plan->splits);
    plan->group_heads =
        group_heads(input, (int64_t)input->heads_kv * (is_listed ? 1 : extent->batch), plan);
    plan->workspace = (struct fa_workspace){.size = 2 * (int64_t)plan->list_places};
    for (int i = 0; i < plan->step_count; i++) {
        struct fa_step *step = &plan->steps[i];
        if (step->job == FA_JOB_COMBINE)
            fit_combine(input, rows_of_all, plan, step);
        else if (step->job == FA_JOB_FILL)
            step->blocks = extent->has_unused_rows
                               ? (int)MAX(CEIL_DIV(extent->rows_q, FA_FILL_ROWS),
                                          plan->list_places ? extent->batch : 0)
                               : 0;
    }
    return input->append ? fit_append(input, extent, plan, &plan->steps[0], error) : 0;
}

/* ---- the interface --------------------------------------------------------------------------- */

int fa_plan_forward(const struct fa_plan_input *input, const struct fa_plan_target *target,
                    struct fa_plan *plan, struct fa_plan_error *error)
{
    struct fa_tile tile;
    if (input->block_q % 16 != 0 || input->block_k % 16 != 0)
        return fa_plan_refuse(
            error, true, "on CUDA block sizes must be multiples of 16, of queries and of keys");
    if (!choose_tile(input, target, plan, &tile))
        return fa_plan_refuse(error, true,
                              "no tile fits the shared memory of this device at these head dims");
    plan->sms = target->device.sms;
    plan->share = fa_device_share(&target->device);
    plan->mma_time = fa_device_mma_time(&target->device);
    add_append(input, plan);
    set_main(input, target, &tile, plan);
    const struct fa_extent extent = fa_plan_extent(input);
    plan->splits = 1;
    set_group_limit(input, &target->device, plan);
    if (fa_plan_fit_forward(input, &extent, plan, error) < 0)
        return -1;
    explain_groups(input, plan);
    set_splits(input, &target->device, plan);
    add_fill(input, plan);
    return fa_plan_fit_forward(input, &extent, plan, error);
}
