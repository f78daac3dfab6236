/* The backward: tile, grid, order of accumulation, workspace. Pure C. */
#include <math.h>
#include <stdint.h>

#include "arithmetic.h"
#include "plan.h"
#include "shape.h"

/* ---- the tile -------------------------------------------------------------------------------- */

/* How many warps of a group share rows of dQ: of the ways to cut half a tile into 16 rows by 16
 * dims and more, the one with the fewest products, padding included, and then with the fewest
 * operands to read. */
static int dq_dim_warps(const struct fa_backward_tile *tile, int head_dim)
{
    const int warps = tile->warps / 2, rows = tile->tile_m / 32, dims = CEIL_DIV(head_dim, 16);
    int best = 0, best_products = 0, best_operands = 0;
    for (int n = MAX(1, warps / rows); n <= warps; n *= 2) {
        const int own_rows = rows * n / warps, own_dims = CEIL_DIV(dims, n);
        const int products = own_rows * own_dims, operands = own_rows + own_dims;
        if (!best || products < best_products ||
            (products == best_products && operands < best_operands)) {
            best = n;
            best_products = products;
            best_operands = operands;
        }
    }
    return best;
}

/* Up to this number of (batch, head) pairs, many blocks wait for each other at each: with two
 * accumulators of dQ neighbours run side by side. With more pairs the second one costs more than
 * the waiting does. It does not depend on the GPU, so neither does the size of the workspace. */
#define FEW_HEADS 16

static int dq_buffers_of(const struct fa_plan_input *input)
{
    const bool are_few = (int64_t)input->batch * input->heads_q <= FEW_HEADS;
    return input->deterministic && are_few && !input->varlen && !input->block_q ? 2 : 1;
}

static int tile_n_of(const struct fa_backward_tile *tile) { return tile->warps / 2 * tile->warp_n; }

static int n_blocks_of(const struct fa_plan_input *input, const struct fa_backward_tile *tile)
{
    return CEIL_DIV(input->seqlen_k, tile_n_of(tile));
}

/* A step of score.cuh that leaves fewer of them to a sub-tile. */
static bool takes_registers(const struct fa_plan_input *input)
{
    return input->softcap || input->dropout || input->bias || input->score_mod || input->mask_mod;
}

/* Queries of a sub-tile. */
static int sub_m_of(const struct fa_plan_input *input, const struct fa_backward_tile *tile)
{
    return takes_registers(input) ? 16 : input->block_q ? MIN(tile->sub_m, 32) : tile->sub_m;
}

/* Whether a call has more in registers than the tiles of FA_BACKWARD_TILES leave. Head dims above
 * 64 leave none, but some 100 bytes of spills take less than smaller tiles do: S14 in
 * benchmarks/NOTES.md. */
static bool is_crowded(const struct fa_plan_input *input)
{
    const bool is_wide = MAX(input->head_dim, input->head_dim_v) > 64;
    const bool has_lists = input->block_q != 0;
    const bool masks_twice = input->mask_mod && (input->mask_right || input->mask_left);
    if (is_wide)
        return input->bias || masks_twice || (input->mask_mod && !has_lists);
    return input->score_mod || input->mask_mod || input->bias || (input->dropout && has_lists);
}

static struct fa_variant variant_of(const struct fa_plan_input *input,
                                    const struct fa_device *device,
                                    const struct fa_backward_tile *tile)
{
    struct fa_variant variant = fa_plan_variant(input);
    variant.kernel = FA_KERNEL_BACKWARD;
    variant.warp_n = tile->warp_n;
    variant.tile_m = tile->tile_m;
    variant.sub_m = sub_m_of(input, tile);
    variant.dq_dim_warps = dq_dim_warps(tile, input->head_dim);
    variant.warps = tile->warps;
    variant.stages = tile->stages;
    variant.tma = device->has_tma && input->tma_strides;
    variant.deterministic = input->deterministic;
    variant.dq_direct =
        n_blocks_of(input, tile) == 1 && !input->block_q && (input->all_see_keys || input->varlen);
    variant.dq_buffers = variant.dq_direct ? 1 : dq_buffers_of(input);
    return variant;
}

static int backward_smem(const struct fa_plan_input *input, const struct fa_variant *variant,
                         int tile_n)
{
    return fa_backward_smem_of(input->head_dim, input->head_dim_v, variant->tile_m, tile_n,
                               variant->stages, variant->dq_dim_warps, input->dtype)
        .bytes;
}

/* Whether whole listed blocks have such tiles. */
static bool divides_blocks(const struct fa_plan_input *input, const struct fa_backward_tile *tile)
{
    return input->block_q % tile->tile_m == 0 && input->block_k % tile_n_of(tile) == 0;
}

/* Keys of all KV heads for each multiprocessor. How many sequences there are a plan for any lengths
 * does not know. */
static double keys_per_sm(const struct fa_plan_input *input, const struct fa_device *device)
{
    if (input->varlen)
        return input->seqlen_k;
    return (double)input->batch * input->heads_kv * input->seqlen_k / MAX(1, device->sms);
}

static bool serves(const struct fa_backward_row *row, const struct fa_plan_input *input,
                   int varlen_k, const struct fa_device *device)
{
    const int head_dim = MAX(input->head_dim, input->head_dim_v);
    const double keys = keys_per_sm(input, device);
    return fa_row_is_of(row->arch, row->kind, device) && row->head_dim >= head_dim &&
           row->above.head_dim < head_dim && divides_blocks(input, &row->tile) &&
           (row->varlen_k == FA_ANY || row->varlen_k >= varlen_k) &&
           (row->keys_per_sm == FA_ANY || row->keys_per_sm >= keys) &&
           (row->above.keys_per_sm == 0 || row->above.keys_per_sm < keys) &&
           (row->mask_right == FA_ANY || row->mask_right == input->mask_right) &&
           (row->mask_left == FA_ANY || row->mask_left == input->mask_left);
}

/* The first of `count` rows that serves sequences of up to `varlen_k` keys, and fits the shared
 * memory; else NULL. */
static const struct fa_backward_row *first_that_serves(const struct fa_backward_row *rows,
                                                       size_t count,
                                                       const struct fa_plan_input *input,
                                                       int varlen_k, const struct fa_device *device)
{
    const int most_smem = MIN(device->smem_per_block, fa_device_of_arch(120).smem_per_block);
    for (const struct fa_backward_row *row = rows; row < rows + count; row++) {
        const struct fa_variant variant = variant_of(input, device, &row->tile);
        if (serves(row, input, varlen_k, device) &&
            backward_smem(input, &variant, tile_n_of(&row->tile)) <= most_smem)
            return row;
    }
    return NULL;
}

static void explain_main(const struct fa_plan_input *input, const struct fa_plan_target *target,
                         const struct fa_backward_row *row, const struct fa_variant *variant,
                         struct fa_plan *plan)
{
    fa_plan_because(plan, "kernel",
                    variant->tma ? "backward: mma.sync, Q and dO brought by the TMA"
                                 : "backward: mma.sync, Q and dO brought by cp.async");
    if (!target->device.has_tma)
        fa_plan_because(plan, "not the TMA", "the TMA came with compute capability 9.0");
    else if (!variant->tma)
        fa_plan_because(plan, "not the TMA",
                        input->varlen
                            ? "of sequences of any lengths it needs packed Q and dO, at strides "
                              "that are multiples of 16 bytes, from a row up to 2^20"
                            : "it needs Q and dO at strides that are multiples of 16 bytes, from a "
                              "row up to 2^40: neither expanded nor flipped");
    fa_plan_because(plan, "tile",
                    !row ? "first row of use_backward_tiles() that serves the call and fits"
                    : row->varlen_k != FA_ANY
                        ? "row of csrc/tiles.c for the larger head dim, and for few keys"
                    : row->arch != FA_ANY
                        ? "row of csrc/tiles.c for the larger head dim, of this class of cards"
                        : "row of csrc/tiles.c for the larger head dim");
    if (input->block_q)
        fa_plan_because(plan, "blocks",
                        "a walk over lists: a block of keys goes through listed queries alone");
    if (input->softcap)
        fa_plan_because(plan, "sub_m", "16 queries at a time: the tanh of a cap takes registers");
    else if (input->score_mod || input->mask_mod)
        fa_plan_because(plan, "sub_m", "16 queries at a time: a mod takes registers");
    else if (input->dropout)
        fa_plan_because(plan, "sub_m", "16 queries at a time: random numbers take registers");
    else if (input->bias)
        fa_plan_because(plan, "sub_m", "16 queries at a time: a bias takes registers");
    if (input->bias_gradient)
        fa_plan_because(plan, "attn_bias",
                        input->bias_shared
                            ? "blocks add to its gradient in any order, where scores share it"
                            : "each element of its gradient is one block's");
    if (variant->dq_direct)
        fa_plan_because(plan, "dq_accum",
                        "none: one tile holds all keys, so that a tile of dQ is one block's");
    if (input->deterministic)
        fa_plan_because(plan, "deterministic",
                        variant->dq_direct ? "nothing adds to dQ"
                        : variant->dq_buffers > 1
                            ? "blocks add to dQ in the order of their keys, to two accumulators in "
                              "turn: up to 16 (batch, head) pairs leave many blocks waiting"
                        : input->block_q
                            ? "blocks add to dQ in the order of their keys: a kernel counts by the "
                              "lists how many come before"
                            : "blocks add to dQ in the order of their keys");
}

/* Rows of the caller's come first, which *is_own tells. NULL: whole listed blocks have no tiles. */
static const struct fa_backward_row *choose_row(const struct fa_plan_input *input,
                                                const struct fa_plan_target *target, bool *is_own)
{
    const struct fa_tile_list *own = target->tiles;
    const int varlen_k = input->varlen ? input->seqlen_k : INT32_MAX;
    const struct fa_backward_row *row = first_that_serves(own->backward_rows, own->backward_count,
                                                          input, varlen_k, &target->device);
    *is_own = row != NULL;
    if (!row && is_crowded(input))
        row = first_that_serves(FA_CROWDED_BACKWARD_TILES, FA_CROWDED_BACKWARD_TILE_COUNT, input,
                                varlen_k, &target->device);
    if (!row) /* the last one serves all but listed blocks */
        row = first_that_serves(FA_BACKWARD_TILES, FA_BACKWARD_TILE_COUNT, input, varlen_k,
                                &target->device);
    if (!row) /* rows of few keys are of smaller tiles */
        row =
            first_that_serves(FA_BACKWARD_TILES, FA_BACKWARD_TILE_COUNT, input, 0, &target->device);
    return row;
}

static void set_main(const struct fa_plan_input *input, const struct fa_plan_target *target,
                     const struct fa_backward_row *row, bool is_own, struct fa_plan *plan)
{
    enum { REGISTERS_PER_SM = 64 << 10, REGISTERS_PER_THREAD = 256 };
    const struct fa_backward_tile *tile = &row->tile;
    const struct fa_variant variant = variant_of(input, &target->device, tile);
    const int threads = tile->warps * 32;
    plan->tile_m = tile->tile_m;
    plan->tile_n = tile_n_of(tile);
    plan->smem_bytes = backward_smem(input, &variant, plan->tile_n);
    explain_main(input, target, is_own ? NULL : row, &variant, plan);
    int by_smem;
    const int smem_request = fa_device_smem_request(&target->device, target->limits_arch,
                                                    plan->smem_bytes, threads, &by_smem);
    if (target->limits_arch)
        fa_plan_because(plan, "smem_request", "padded to the blocks per SM of FA_SM120_LIMITS");
    const int by_registers = REGISTERS_PER_SM / (REGISTERS_PER_THREAD * threads);
    plan->blocks_per_sm = MAX(1, MIN(by_smem, by_registers));
    plan->main = plan->step_count;
    fa_plan_add(plan, (struct fa_step){.job = FA_JOB_BACKWARD,
                                       .variant = variant,
                                       .threads = threads,
                                       .smem_request = smem_request});
}

/* ---- blocks that share a tile of keys -------------------------------------------------------- */

/* The tiles of queries that a block of keys goes through: at most, and on average. */
static double longest_walk(const struct fa_plan_input *input, const struct fa_plan *plan)
{
    const double window = (double)input->window_left + input->window_right + plan->tile_n;
    const double tiles = window / plan->tile_m + 1;
    return MAX(0, MIN(tiles, plan->m_blocks)) * fa_plan_heads_per_kv(input);
}
static bool is_triangle(const struct fa_plan_input *input)
{
    return input->mask_right != input->mask_left;
}
static double average_walk(const struct fa_plan_input *input, const struct fa_plan *plan)
{
    return longest_walk(input, plan) * (is_triangle(input) ? 0.5 : 1);
}

/* What a block takes besides its tiles of queries, in units of one: its keys, and dK and dV; the
 * latter are added to accumulators where it has only a part, which kernels of their own then
 * convert. Fitted to times on an H200: idea 14 of the backward in benchmarks/NOTES.md. */
#define WHOLE_BLOCK 0.7
#define PART_BLOCK  1.7
#define CONVERSION  1.0

/* From this number of rounds on, no multiprocessor is idle for long. */
#define MANY_ROUNDS 4

/* The most that one block has, where `splits` of them share a tile of keys: see choose_splits(). */
static double longest_part(const struct fa_plan_input *input, const struct fa_plan *plan,
                           int splits)
{
    const int heads_per_kv = fa_plan_heads_per_kv(input);
    const double walk = longest_walk(input, plan);
    return input->deterministic ? walk / heads_per_kv * CEIL_DIV(heads_per_kv, splits)
                                : walk / splits;
}

/* The time until the last of the blocks is done. Blocks of one size run in rounds. Of a triangle
 * the long ones start first and short ones fill the gaps: max(longest, total work / slots). */
static double time_of(const struct fa_plan_input *input, const struct fa_plan *plan, double blocks,
                      double slots, int splits)
{
    const double own = splits > 1 ? PART_BLOCK : WHOLE_BLOCK;
    const double longest = longest_part(input, plan, splits) + own;
    const double average = average_walk(input, plan) / splits + own;
    const double rounds = blocks * splits / slots;
    const double time =
        is_triangle(input) ? MAX(longest, rounds * average) : ceil(rounds) * longest;
    return time + (splits > 1 ? CONVERSION : 0);
}

/* Accumulators of dK and dV are twice as large as these: no memory for a gain that may be the error
 * of the rule. */
#define LEAST_GAIN 1.05

/* Thread blocks that share a tile of keys: more than one where few keys, or few heads, leave
 * multiprocessors idle. With ordered accumulation each has whole heads: otherwise what one begins
 * with, an earlier block of keys might end with. */
static int choose_splits(const struct fa_plan_input *input, const struct fa_plan *plan,
                         double blocks, int slots)
{
    enum { MAX_SPLITS = 64 };
    if (blocks >= MANY_ROUNDS * (double)slots)
        return 1;
    int most = (int)MIN(MAX_SPLITS, longest_walk(input, plan));
    if (input->deterministic)
        most = MIN(most, fa_plan_heads_per_kv(input));
    int best = 1;
    double best_time = time_of(input, plan, blocks, slots, 1) / LEAST_GAIN;
    for (int splits = 2; splits <= most; splits++) {
        const double time = time_of(input, plan, blocks, slots, splits);
        if (time < best_time) {
            best = splits;
            best_time = time;
        }
    }
    return best;
}

static void set_splits(const struct fa_plan_input *input, const struct fa_device *device,
                       struct fa_plan *plan)
{
    const double pairs = (double)input->batch * input->heads_kv, blocks = pairs * plan->n_blocks;
    const int slots = MAX(1, device->sms) * plan->blocks_per_sm;
    plan->splits = input->varlen ? 1 : choose_splits(input, plan, blocks, slots);
    fa_plan_because(plan, "splits",
                    input->varlen ? "1: of sequences of any lengths a tile of keys is one block's"
                    : plan->splits > 1
                        ? "tiles of keys leave multiprocessors idle: blocks share each of them, by "
                          "the rule of csrc/plan_backward.c"
                        : "1: a tile of keys is one block's, by the rule of csrc/plan_backward.c");
}

/* ---- the order of the blocks ----------------------------------------------------------------- */

/* Of a group of (batch, KV head) pairs, whose blocks run together, either the L2 holds all that
 * they add to and read again (dQ, Q and dO: half of it is theirs), or it is so small that blocks
 * of at least so many keys of a pair run at a time: these go through its queries side by side, so
 * that one of them misses the L2 and the others do not. Idea 28 of the backward in
 * benchmarks/NOTES.md. Smaller groups would share more, but leave multiprocessors idle at the end,
 * and ordered accumulation would wait longer. */
#define SHARING_KEYS 512

static int group_limit(const struct fa_plan_input *input, const struct fa_device *device,
                       const struct fa_plan *plan)
{
    const struct fa_variant *main = &plan->steps[plan->main].variant;
    const int64_t query_bytes =
        4 * (int64_t)main->dq_buffers * input->head_dim + 2 * (input->head_dim + input->head_dim_v);
    const int64_t pair_bytes = query_bytes * input->seqlen_q * fa_plan_heads_per_kv(input);
    const int64_t fit = device->l2_bytes / 2 / MAX(1, pair_bytes);
    const int64_t slots = (int64_t)MAX(1, device->sms) * plan->blocks_per_sm;
    return (int)MIN(INT32_MAX, MAX(1, MAX(fit, slots * plan->tile_n / SHARING_KEYS)));
}

static void set_group_limit(const struct fa_plan_input *input, const struct fa_device *device,
                            struct fa_plan *plan)
{
    plan->group_limit = group_limit(input, device, plan);
    fa_plan_because(plan, "group_heads",
                    "as many (batch, KV head) pairs at a time as the L2 holds, or as leave blocks "
                    "of 512 keys of each running side by side, in equal groups");
}

/* Equal groups, as far as that goes. */
static int group_heads(int64_t pairs, int limit)
{
    return (int)CEIL_DIV(pairs, MAX(1, CEIL_DIV(pairs, limit)));
}

/* ---- before and after the main kernel -------------------------------------------------------- */

static struct fa_step preprocess(const struct fa_plan_input *input, const struct fa_plan *plan)
{
    return (struct fa_step){
        .job = FA_JOB_PREPROCESS,
        .variant = {.kernel = FA_KERNEL_BACKWARD_PREPROCESS,
                    .dtype = input->dtype,
                    .head_dim_v = input->head_dim_v,
                    .tile_m = plan->tile_m,
                    .varlen = input->varlen},
        .threads = FA_PREPROCESS_THREADS,
    };
}

/* An accumulator to a tensor: a warp for every 16 rows. */
static void add_postprocess(const struct fa_plan_input *input, enum fa_job job, int head_dim,
                            struct fa_plan *plan)
{
    fa_plan_add(plan, (struct fa_step){.job = job,
                                       .variant = {.kernel = FA_KERNEL_BACKWARD_POSTPROCESS,
                                                   .dtype = input->dtype,
                                                   .head_dim = head_dim,
                                                   .varlen = input->varlen},
                                       .threads = FA_POSTPROCESS_WARPS * 32});
}

/* Heads with lists of their own. */
static int order_heads(const struct fa_plan_input *input)
{
    return input->own_lists ? input->heads_q : 1;
}

static bool has_order(const struct fa_plan_input *input)
{
    return input->deterministic && input->block_q;
}

/* Before the main kernel, and behind the one that clears the workspace. */
static void add_order(const struct fa_plan_input *input, struct fa_plan *plan)
{
    fa_plan_add(plan, (struct fa_step){.job = FA_JOB_ORDER,
                                       .variant = {.kernel = FA_KERNEL_BACKWARD_ORDER,
                                                   .dtype = input->dtype,
                                                   .block_sparse = 1},
                                       .blocks = input->batch * order_heads(input),
                                       .threads = FA_ORDER_THREADS});
}

/* Numbers of fa_addition_order. */
static int64_t order_size(const struct fa_plan_input *input, const struct fa_plan *plan)
{
    if (!has_order(input))
        return 0;
    const int64_t rows = CEIL_DIV(plan->n_blocks, input->block_k / plan->tile_n) + 1;
    const int64_t blocks = plan->m_blocks / (input->block_q / plan->tile_m);
    return (int64_t)input->batch * order_heads(input) * rows * blocks;
}

/* The next `count` units of the workspace, from a multiple of 16 bytes on. */
static int64_t take(struct fa_workspace *workspace, int64_t count)
{
    const int64_t start = workspace->size;
    workspace->size += CEIL_DIV(count, 4) * 4;
    return start;
}

/* Tiles of queries and of keys, of all heads; and of keys whose own queries backward_captured.cu
 * goes through, of all query heads. */
struct tiles {
    int64_t queries, keys, listing;
};

static void fit_workspace(const struct fa_plan_input *input, struct tiles tiles,
                          struct fa_plan *plan)
{
    const struct fa_variant *main = &plan->steps[plan->main].variant;
    const int buffers = main->dq_direct ? 0 : main->dq_buffers;
    const int64_t query_tiles = tiles.queries, key_tiles = tiles.keys;
    const int64_t queries = query_tiles * plan->tile_m;
    const int64_t keys = plan->splits > 1 ? key_tiles * plan->tile_n : 0; /* to accumulate */
    const bool is_ordered = input->deterministic;
    struct fa_workspace *workspace = &plan->workspace;
    workspace->size = 2 * queries; /* the lse and delta of each */
    workspace->list = take(workspace, 2 * (int64_t)plan->list_places);
    workspace->zeros = workspace->size;
    workspace->dq_accum = take(workspace, buffers * queries * input->head_dim);
    workspace->dk_accum = take(workspace, keys * input->head_dim);
    workspace->dv_accum = take(workspace, keys * input->head_dim_v);
    workspace->dq_semaphores = take(workspace, is_ordered ? buffers * query_tiles : 0);
    workspace->dkv_semaphores = take(workspace, is_ordered && keys > 0 ? key_tiles : 0);
    workspace->block_counter = take(workspace, is_ordered ? 1 : 0);
    workspace->added_before = take(workspace, order_size(input, plan));
}

/* What score_mod captured: scores once more, by a kernel with one warp for all of an element; twice
 * where sums are in fixed point, see kernels/fixed_point_sums.cuh. */
static void add_captured(const struct fa_plan_input *input, struct fa_plan *plan)
{
    struct fa_step step = {
        .job = FA_JOB_CAPTURED, .variant = fa_plan_variant(input), .threads = FA_CAPTURED_THREADS};
    step.variant.kernel = FA_KERNEL_BACKWARD_CAPTURED;
    step.variant.tile_m = plan->tile_m;
    step.variant.paged = 0;
    step.variant.deterministic = input->deterministic;
    step.variant.largest = input->deterministic;
    fa_plan_add(plan, step);
    if (!input->deterministic)
        return;
    step.variant.largest = 0;
    fa_plan_add(plan, step);
    fa_plan_add(plan, (struct fa_step){.job = FA_JOB_CAPTURED_SUMS,
                                       .variant = {.kernel = FA_KERNEL_BACKWARD_CAPTURED_SUMS,
                                                   .dtype = input->dtype},
                                       .blocks = FA_CAPTURED_SUMS_BLOCKS,
                                       .threads = FA_CAPTURED_SUMS_THREADS});
}

static void add_steps_after(const struct fa_plan_input *input, struct fa_plan *plan)
{
    if (input->captured_gradients)
        add_captured(input, plan);
    if (!plan->steps[plan->main].variant.dq_direct)
        add_postprocess(input, FA_JOB_DQ, input->head_dim, plan);
    if (plan->splits > 1) {
        add_postprocess(input, FA_JOB_DK, input->head_dim, plan);
        add_postprocess(input, FA_JOB_DV, input->head_dim_v, plan);
    }
    if (input->sink)
        fa_plan_add(plan, (struct fa_step){.job = FA_JOB_DSINK,
                                           .variant = {.kernel = FA_KERNEL_BACKWARD_SINK,
                                                       .dtype = input->dtype,
                                                       .tile_m = plan->tile_m,
                                                       .varlen = input->varlen},
                                           .blocks = input->heads_q,
                                           .threads = FA_SINK_THREADS});
}

/* ---- sizes ----------------------------------------------------------------------------------- */

/* As many as the bound asks for, or, of packed queries, as their rows fill and one more for each
 * sequence, see fa_backward_params. */
static int64_t query_tiles_of_head(const struct fa_extent *extent, const struct fa_plan *plan)
{
    const int64_t by_bound = (int64_t)extent->batch * plan->m_blocks;
    const int64_t by_rows = CEIL_DIV(extent->rows_q, plan->tile_m) + extent->batch;
    return extent->is_packed_q ? MIN(by_bound, by_rows) : by_bound;
}

static int blocks_of(const struct fa_plan *plan, const struct fa_step *step, struct tiles tiles)
{
    switch (step->job) {
    case FA_JOB_PREPROCESS: return (int)tiles.queries;
    case FA_JOB_CAPTURED: return (int)(step->variant.block_sparse ? tiles.listing : tiles.queries);
    case FA_JOB_BACKWARD: return (int)tiles.keys * plan->splits;
    case FA_JOB_DQ: return (int)CEIL_DIV(tiles.queries * plan->tile_m / 16, FA_POSTPROCESS_WARPS);
    case FA_JOB_DK:
    case FA_JOB_DV: return (int)CEIL_DIV(tiles.keys * plan->tile_n / 16, FA_POSTPROCESS_WARPS);
    default: return step->blocks;
    }
}

int fa_plan_fit_backward(const struct fa_plan_input *input, const struct fa_extent *extent,
                         struct fa_plan *plan, struct fa_plan_error *error)
{
    /* Listed blocks are whole: the last one has tiles behind the last query. */
    const int rows = input->block_q ? CEIL_DIV(extent->seqlen_q, input->block_q) * input->block_q
                                    : extent->seqlen_q;
    plan->m_blocks = CEIL_DIV(rows, plan->tile_m);
    plan->n_blocks = CEIL_DIV(extent->seqlen_k, plan->tile_n);
    plan->list_places = extent->is_packed_k ? fa_plan_list_places(extent->batch, extent->rows_k,
                                                                  plan->tile_n, plan->n_blocks)
                                            : 0;
    const bool is_listed = plan->list_places > 0;
    if (is_listed)
        plan->n_blocks = plan->list_places;
    const int64_t query_tiles = query_tiles_of_head(extent, plan);
    const int64_t pairs = is_listed ? input->heads_kv : (int64_t)extent->batch * input->heads_kv;
    struct tiles tiles = {
        .queries = fa_saturating_multiply(query_tiles, input->heads_q),
        .keys = fa_saturating_multiply(pairs, plan->n_blocks),
    };
    if (input->block_q && input->captured_gradients)
        tiles.listing =
            fa_saturating_multiply((int64_t)extent->batch * input->heads_q, plan->n_blocks);
    if (tiles.queries > INT32_MAX || tiles.keys > INT32_MAX / plan->splits ||
        tiles.listing > INT32_MAX)
        return fa_plan_refuse(error, false,
                              "batch * heads * seqlen needs more than 2^31 - 1 thread blocks");
    plan->query_tiles = (int)query_tiles;
    for (int i = 0; i < plan->step_count; i++)
        plan->steps[i].blocks = blocks_of(plan, &plan->steps[i], tiles);
    plan->group_heads = group_heads(pairs, plan->group_limit);
    fit_workspace(input, tiles, plan);
    return 0;
}

/* ---- the interface --------------------------------------------------------------------------- */

static const char *why_no_bias_gradient(const struct fa_plan_input *input)
{
    if (input->bias_gradient && input->deterministic && input->bias_shared)
        return "the gradient of an attn_bias that several scores share (of size 1 in a dimension) "
               "is not supported with deterministic=True on CUDA: expand() it";
    if (input->bias_gradient && input->softcap)
        return "the gradient of attn_bias is not supported with softcap on CUDA";
    return NULL;
}

int fa_plan_backward(const struct fa_plan_input *input, const struct fa_plan_target *target,
                     struct fa_plan *plan, struct fa_plan_error *error)
{
    const char *why_not = why_no_bias_gradient(input);
    if (why_not)
        return fa_plan_refuse(error, true, why_not);
    bool is_own;
    const struct fa_backward_row *row = choose_row(input, target, &is_own);
    if (!row)
        return fa_plan_refuse(error, true,
                              "on CUDA the backward takes listed blocks of a multiple of 64 keys, "
                              "and of a multiple of 32 to 128 queries, more at small head dims");
    struct fa_step *first = fa_plan_add(plan, (struct fa_step){0});
    if (has_order(input))
        add_order(input, plan);
    set_main(input, target, row, is_own, plan);
    set_group_limit(input, &target->device, plan);
    const struct fa_extent extent = fa_plan_extent(input);
    plan->splits = 1;
    if (fa_plan_fit_backward(input, &extent, plan, error) < 0)
        return -1;
    set_splits(input, &target->device, plan);
    *first = preprocess(input, plan);
    add_steps_after(input, plan);
    return fa_plan_fit_backward(input, &extent, plan, error);
}
