#include "plan.h"

#include <stdint.h>
#include <string.h>

#include "arithmetic.h"
#include "split.h"

/* CUDA reserves 1 KB of a multiprocessor's shared memory for each block that is resident. */
#define SMEM_RESERVED_PER_BLOCK 1024

/* ---- devices --------------------------------------------------------------------------------- */

/* Shared memory per architecture: CUDA C++ programming guide, table "Technical specifications per
 * compute capability". Multiprocessors and L2: of the largest card of the kind that the project
 * knows. */
static const struct fa_device DEVICES[] = {
    {80, false, 108, 163 << 10, 164 << 10, 40 << 20},  /* A100 */
    {86, false, 84, 99 << 10, 100 << 10, 6 << 20},     /* RTX 3090 class */
    {89, false, 128, 99 << 10, 100 << 10, 72 << 20},   /* RTX 4090 */
    {90, true, 132, 227 << 10, 228 << 10, 50 << 20},   /* H100, H200 */
    {100, true, 148, 227 << 10, 228 << 10, 126 << 20}, /* B200 */
    {120, true, 170, 99 << 10, 100 << 10, 96 << 20},   /* RTX 5090 */
    {121, true, 48, 99 << 10, 100 << 10, 24 << 20},    /* DGX Spark */
};

/* Warps that are resident on a multiprocessor at most, from the same table. */
static int warps_per_sm(int arch) { return arch == 80 || arch == 90 || arch == 100 ? 64 : 48; }

struct fa_device fa_device_of_arch(int arch)
{
    struct fa_device device = DEVICES[0];
    for (size_t i = 0; i < sizeof DEVICES / sizeof *DEVICES; i++)
        if (DEVICES[i].arch <= arch)
            device = DEVICES[i];
    device.arch = arch;
    return device;
}

/* ---- the steps of a plan --------------------------------------------------------------------- */

static void because(struct fa_plan *plan, const char *choice, const char *why)
{
    if (plan->reason_count < FA_MAX_REASONS)
        plan->reasons[plan->reason_count++] = (struct fa_reason){choice, why, false};
}

/* What the caller asked for, and cannot have. */
static void drop(struct fa_plan *plan, const char *choice, const char *why)
{
    because(plan, choice, why);
    plan->reasons[plan->reason_count - 1].dropped = true;
}

static int refuse(struct fa_plan_error *error, bool unsupported, const char *message)
{
    *error = (struct fa_plan_error){unsupported, message};
    return -1;
}

int fa_plan_supports(const struct fa_shape *shape, const struct fa_device *device,
                     struct fa_plan_error *error)
{
    if (device->arch < 80)
        return refuse(error, true, "CUDA devices before compute capability 8.0 are not supported");
    if (shape->dtype == FA_FLOAT32)
        return refuse(error, true,
                      "float32 is supported on the CPU alone; on CUDA q, k and v must be float16 "
                      "or bfloat16");
    return 0;
}

/* Bytes of shared memory of the ring of K and V tiles, rows padded to whole mma steps; and of the
 * two mbarriers of each stage, where the TMA fills them. The ring's alignment, of 1024 bytes for
 * the TMA, costs nothing: there is no other shared memory, and what CUDA reserves in front of it is
 * as large. */
static int forward_smem(const struct fa_shape *shape, const struct fa_tile *tile)
{
    const int row = CEIL_DIV(shape->head_dim, 16) * 16 + CEIL_DIV(shape->head_dim_v, 16) * 16;
    const int stage = tile->tile_n * row * 2 + (tile->kernel == FA_KERNEL_FORWARD_TMA ? 2 * 8 : 0);
    return tile->stages * stage;
}

/* Query rows of all heads for each multiprocessor; expanded tensors can have more than 2^63. */
static double rows_per_sm(const struct fa_shape *shape, const struct fa_device *device)
{
    return (double)shape->batch * shape->heads_q * shape->seqlen_q / MAX(1, device->sms);
}

bool fa_shape_has_right_mask(const struct fa_shape *shape)
{
    return shape->window_right < shape->seqlen_q - 1; /* of the first query, which sees the least */
}
bool fa_shape_has_left_mask(const struct fa_shape *shape)
{
    return shape->window_left < shape->seqlen_k - 1; /* of the last query */
}

static bool serves(const struct fa_tile_row *row, const struct fa_shape *shape,
                   const struct fa_device *device)
{
#define WITHIN(bound, value)                                                                       \
    ((row->bound == FA_ANY || (value) <= row->bound) &&                                            \
     (row->above.bound == 0 || (value) > row->above.bound))
#define SAME(wanted, value) ((wanted) == FA_ANY || (wanted) == (value))
    return (row->arch == FA_ANY || row->arch / 10 == device->arch / 10) &&
           WITHIN(head_dim, shape->head_dim) && WITHIN(head_dim_v, shape->head_dim_v) &&
           WITHIN(heads_per_kv, fa_heads_per_kv(shape)) && WITHIN(seqlen_q, shape->seqlen_q) &&
           WITHIN(rows_per_sm, rows_per_sm(shape, device)) &&
           SAME(row->mask_right, fa_shape_has_right_mask(shape)) &&
           SAME(row->mask_left, fa_shape_has_left_mask(shape));
#undef WITHIN
#undef SAME
}

/* Whether kernels/forward_tma.cu can do what a row asks of it, and if not why. Any head dims,
 * equal or not, any masks, and any lengths but 0 are fine. */
static bool tma_can_implement(const struct fa_shape *shape, const struct fa_device *device,
                              const struct fa_tile *tile, int smem_per_block, const char **why)
{
    if (!device->has_tma)
        *why = "the TMA came with compute capability 9.0";
    else if (shape->seqlen_k == 0)
        *why = "no tensor map describes K and V without keys";
    else if (!shape->tma_strides)
        *why = "the TMA needs K and V at strides that are multiples of 16 bytes, from a row up to "
               "2^40: neither expanded nor flipped";
    else if (tile->tile_n % 32 != 0)
        *why = "a tile is one box of the TMA: keys in multiples of 32";
    else if (forward_smem(shape, tile) > smem_per_block)
        *why = "its stages and mbarriers need more than the shared memory";
    else
        return true;
    return false;
}

/* The tile of the first of some rows that serves the call within the shared memory, stages
 * included. Where the TMA cannot bring K and V, which *why_not_tma tells, cp.async does. */
static bool first_that_serves(const struct fa_tile_row *rows, size_t count,
                              const struct fa_shape *shape, const struct fa_device *device,
                              struct fa_tile *tile, const char **why_not_tma)
{
    /* Every kernel keeps within 99 KB wherever it runs, so that what is tested anywhere holds
     * on 12.x. */
    const int smem_per_block = MIN(device->smem_per_block, fa_device_of_arch(120).smem_per_block);
    for (size_t i = 0; i < count; i++) {
        if (!serves(&rows[i], shape, device))
            continue;
        *tile = rows[i].tile;
        if (tile->kernel == FA_KERNEL_FORWARD_TMA &&
            !tma_can_implement(shape, device, tile, smem_per_block, why_not_tma)) {
            tile->kernel = FA_KERNEL_FORWARD;
            tile->producer = 0;
        }
        if (forward_smem(shape, tile) <= smem_per_block)
            return true;
    }
    return false;
}

static bool choose_tile(const struct fa_shape *shape, const struct fa_device *device,
                        const struct fa_tile_list *own, struct fa_plan *plan, struct fa_tile *tile)
{
    const char *why_not_tma = NULL;
    const bool is_own = first_that_serves(own->rows, own->count, shape, device, tile, &why_not_tma);
    if (!is_own && !first_that_serves(FA_TILES, FA_TILE_COUNT, shape, device, tile, &why_not_tma))
        return false;
    const bool is_tma = tile->kernel == FA_KERNEL_FORWARD_TMA;
    because(plan, "kernel",
            is_tma ? "forward_tma: mma.sync fed by the TMA, as the tile's row asks"
                   : "forward: mma.sync fed by cp.async, the path of every device from 8.0");
    if (why_not_tma && !is_tma)
        because(plan, "not forward_tma", why_not_tma);
    because(plan, "tile",
            is_own ? "first row of use_tiles() that serves the call and fits the shared memory"
                   : "first row of csrc/tiles.c that serves the call and fits the shared memory");
    return true;
}

/* Query rows for which blocks go over K and V once: of a head, or of all that share a KV head. */
static int64_t rows(const struct fa_shape *shape, bool packed)
{
    return (int64_t)shape->seqlen_q * (packed ? fa_heads_per_kv(shape) : 1);
}

/* Whether a call that may be packed gains from it: where it takes noticeably fewer blocks, because
 * those of a single head are partly empty. Each goes over all of K and V, so its time hardly
 * depends on how many of its rows there are. The rule and the 0.9 are those of FlashAttention-3
 * (should_pack_gqa() in hopper/heuristics.h): packed rows lie further apart in memory. */
static bool packing_pays(const struct fa_shape *shape, int tile_m)
{
    const int64_t packed = CEIL_DIV(rows(shape, true), tile_m);
    const int64_t unpacked = CEIL_DIV(rows(shape, false), tile_m) * fa_heads_per_kv(shape);
    return 10 * packed < 9 * unpacked;
}

static bool choose_packing(const struct fa_shape *shape, int tile_m, struct fa_plan *plan)
{
    const int ratio = fa_heads_per_kv(shape);
    const char *why_not = NULL;
    bool packed = false;
    if (ratio == 1)
        why_not = "not packed: each KV head has one query head";
    else if (rows(shape, true) > FA_MAX_SIZE)
        why_not = "not packed: of 2^28 rows or more, which are counted in 32 bits";
    if (shape->pack_gqa == FA_PACK_ALWAYS && why_not)
        drop(plan, "pack_gqa", why_not);
    else if (shape->pack_gqa == FA_PACK_ALWAYS)
        packed = true, because(plan, "pack_gqa", "packed, as the call asks");
    else if (shape->pack_gqa == FA_PACK_NEVER)
        because(plan, "pack_gqa", "not packed, as the call asks");
    else if (why_not)
        because(plan, "pack_gqa", why_not);
    else if ((packed = packing_pays(shape, tile_m)))
        because(plan, "pack_gqa", "packed: blocks of one query head would be partly empty");
    else
        because(plan, "pack_gqa", "not packed: blocks of one query head are full enough");
    return packed;
}

static void set_variant(const struct fa_shape *shape, const struct fa_tile *tile,
                        struct fa_plan *plan)
{
    plan->tile_m = tile->warps * tile->warp_m;
    plan->threads = (tile->warps + (tile->producer == FA_PRODUCER_WARP)) * 32;
    plan->variant = (struct fa_variant){
        .kernel = tile->kernel,
        .dtype_bf16 = shape->dtype == FA_BFLOAT16,
        .head_dim = shape->head_dim,
        .head_dim_v = shape->head_dim_v,
        .tile_n = tile->tile_n,
        .sub_n = tile->sub_n,
        .warps = tile->warps,
        .warp_m = tile->warp_m,
        .stages = tile->stages,
        .producer = tile->producer,
        .mask_right = fa_shape_has_right_mask(shape),
        .mask_left = fa_shape_has_left_mask(shape),
        .softcap = shape->softcap != 0,
        .pack_gqa = choose_packing(shape, plan->tile_m, plan),
    };
}

/* Blocks run group by group, so that the K and V that a group reads fill at most half of the L2.
 * All groups are equal: a smaller last one would leave multiprocessors idle at the end. */
static int group_heads(const struct fa_shape *shape, const struct fa_device *device, bool packed)
{
    const int64_t kv_heads = (int64_t)shape->batch * shape->heads_kv;
    const int64_t kv_bytes = (int64_t)shape->seqlen_k * (shape->head_dim + shape->head_dim_v) * 2;
    const int64_t fit = MAX(1, device->l2_bytes / 2 / MAX(1, kv_bytes));
    int64_t in_group = MIN(kv_heads, fit);
    while (in_group > 1 && kv_heads % in_group != 0)
        in_group--;
    return (int)(in_group * (packed ? 1 : fa_heads_per_kv(shape)));
}

static int set_grid(const struct fa_shape *shape, const struct fa_device *device,
                    struct fa_plan *plan, struct fa_plan_error *error)
{
    const bool packed = plan->variant.pack_gqa;
    const int64_t heads = (int64_t)shape->batch * (packed ? shape->heads_kv : shape->heads_q);
    plan->m_blocks = (int)CEIL_DIV(rows(shape, packed), plan->tile_m);
    if (heads > INT32_MAX || heads * plan->m_blocks > INT32_MAX)
        return refuse(error, false,
                      "batch * heads * seqlen needs more than 2^31 - 1 thread blocks");
    plan->blocks = (int)(heads * plan->m_blocks);
    plan->group_heads = group_heads(shape, device, packed);
    because(plan, "group_heads",
            plan->group_heads == heads
                ? "K and V of all heads fit in half of the L2"
                : "as many heads at a time as keep K and V in half of the L2, in equal groups");
    return 0;
}

static int blocks_that_fit(const struct fa_device *device, int smem_bytes, int threads)
{
    const int by_smem = device->smem_per_sm / (smem_bytes + SMEM_RESERVED_PER_BLOCK);
    return MAX(1, MIN(by_smem, warps_per_sm(device->arch) * 32 / threads));
}

int fa_plan_smem(const struct fa_device *device, int limits_arch, int smem_bytes, int threads,
                 int *blocks_per_sm)
{
    *blocks_per_sm = blocks_that_fit(device, smem_bytes, threads);
    if (!limits_arch)
        return smem_bytes;
    const struct fa_device limits = fa_device_of_arch(limits_arch);
    *blocks_per_sm = MIN(*blocks_per_sm, blocks_that_fit(&limits, smem_bytes, threads));
    const int one_too_many = device->smem_per_sm / (*blocks_per_sm + 1) - SMEM_RESERVED_PER_BLOCK;
    const int padded =
        (one_too_many / 128 + 1) * 128; /* shared memory is given out in 128-byte steps */
    return MIN(MAX(smem_bytes, padded), device->smem_per_block);
}

/* ---- parts of the keys ----------------------------------------------------------------------- */

/* The tiles of keys that the longest block of queries goes through, or one more. */
static int longest_walk(const struct fa_shape *shape, const struct fa_plan *plan)
{
    const int tile_n = plan->variant.tile_n;
    const int all = CEIL_DIV(shape->seqlen_k, tile_n);
    /* The windows of all rows of a block together, which may start and end within a tile. */
    const int64_t keys =
        (int64_t)shape->window_left + shape->window_right + MIN(plan->tile_m, shape->seqlen_q);
    return keys <= 0 ? 0 : (int)MIN(all, (keys - 1 + tile_n - 1) / tile_n + 1);
}

static int choose_parts(const struct fa_shape *shape, const struct fa_device *device,
                        struct fa_plan *plan)
{
    const int64_t rows = (int64_t)shape->batch * shape->heads_q * shape->seqlen_q;
    const int tiles = longest_walk(shape, plan), asked = shape->num_splits;
    int parts = 1;
    if (asked == 1)
        because(plan, "num_splits", "1: the keys are not split, as asked");
    else if (tiles <= 1)
        because(plan, "num_splits", "1: no block of queries goes through more than a tile of keys");
    else if (rows == 0 || rows > INT32_MAX)
        because(plan, "num_splits", "1: from 1 to 2^31 - 1 rows of queries can be split");
    else if (asked == 0) {
        const struct fa_grid grid = {plan->blocks, tiles, plan->variant.tile_n, device->sms,
                                     plan->blocks_per_sm};
        parts = fa_split_parts(&grid);
        because(plan, "num_splits",
                parts > 1 ? "blocks of queries leave multiprocessors idle: parts of their keys, a "
                            "block each, take less time by the rule of csrc/split.c"
                          : "1: parts would not pay for the second kernel, by the rule of "
                            "csrc/split.c");
    } else {
        parts = (int)MIN(MIN(asked, tiles), INT32_MAX / plan->blocks);
        because(plan, "num_splits",
                parts == asked   ? "as asked"
                : parts == tiles ? "fewer than asked: a tile of keys for each"
                                 : "fewer than asked: a grid has 2^31 - 1 blocks at most");
    }
    return parts;
}

/* A row of out takes a thread for every four dims, so a block has room for some rows. Of many parts
 * these are slices instead: few rows are enough for the whole machine then. */
static void set_combine(const struct fa_shape *shape, struct fa_plan *plan)
{
    enum { WARPS = 8, PARTS_PER_SLICE = 4 };
    struct fa_combine_plan *combine = &plan->combine;
    const int64_t rows = (int64_t)shape->batch * shape->heads_q * shape->seqlen_q;
    const int slots = WARPS * 32 / (shape->head_dim_v / 4);
    combine->variant = (struct fa_variant){
        .kernel = FA_KERNEL_COMBINE,
        .dtype_bf16 = plan->variant.dtype_bf16,
        .head_dim_v = shape->head_dim_v,
        .warps = WARPS,
    };
    combine->threads = WARPS * 32;
    combine->slices = MIN(CEIL_DIV(plan->parts, PARTS_PER_SLICE), slots);
    combine->blocks = (int)CEIL_DIV(rows, slots / combine->slices);
    combine->lse_floats = plan->parts * rows;
    combine->out_floats = combine->lse_floats * shape->head_dim_v;
}

static void set_parts(const struct fa_shape *shape, const struct fa_device *device,
                      struct fa_plan *plan)
{
    plan->parts = choose_parts(shape, device, plan);
    if (plan->parts == 1)
        return;
    plan->variant.split = 1;
    plan->blocks *= plan->parts;
    set_combine(shape, plan);
}

/* ---- the interface --------------------------------------------------------------------------- */

int fa_plan_forward(const struct fa_shape *shape, const struct fa_device *device, int limits_arch,
                    const struct fa_tile_list *own, struct fa_plan *plan,
                    struct fa_plan_error *error)
{
    plan->reason_count = 0;
    if (fa_plan_supports(shape, device, error) < 0)
        return -1;

    struct fa_tile tile;
    if (!choose_tile(shape, device, own, plan, &tile))
        return refuse(error, true,
                      "no tile fits the shared memory of this device at these head dims");
    set_variant(shape, &tile, plan);
    plan->smem_bytes = forward_smem(shape, &tile);
    plan->smem_request =
        fa_plan_smem(device, limits_arch, plan->smem_bytes, plan->threads, &plan->blocks_per_sm);
    if (limits_arch)
        because(plan, "smem_request", "padded to the blocks per SM of FA_SM120_LIMITS");
    if (set_grid(shape, device, plan, error) < 0)
        return -1;
    set_parts(shape, device, plan);
    return 0;
}
