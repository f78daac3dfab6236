#include "plan_backward.h"

#include <math.h>
#include <stdint.h>

#include "arithmetic.h"

/* ---- the tile -------------------------------------------------------------------------------- */

static const struct fa_backward_tile *choose_tile(const struct fa_shape *shape)
{
    const int head_dim = MAX(shape->head_dim, shape->head_dim_v);
    const struct fa_backward_tile *tile = FA_BACKWARD_TILES;
    while (tile->head_dim < head_dim)
        tile++; /* the last one serves all */
    return tile;
}

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
            (products == best_products && operands < best_operands))
            best = n, best_products = products, best_operands = operands;
    }
    return best;
}

/* With ordered accumulation and up to so many (batch, head) pairs, many blocks wait for the
 * semaphores of each: alternate dQ buffers let adjacent blocks of keys overlap. With more pairs the
 * second buffer costs more than the waiting. Independent of the GPU, as is the workspace's size. */
#define FEW_HEADS 16

static int dq_buffers(const struct fa_shape *shape, bool deterministic)
{
    return deterministic && (int64_t)shape->batch * shape->heads_q <= FEW_HEADS ? 2 : 1;
}

static void set_main(const struct fa_shape *shape, const struct fa_backward_options *options,
                     const struct fa_device *device, struct fa_backward_plan *plan)
{
    const struct fa_backward_tile *tile = choose_tile(shape);
    plan->main.variant = (struct fa_variant){
        .kernel = FA_KERNEL_BACKWARD,
        .dtype_bf16 = shape->dtype == FA_BFLOAT16,
        .head_dim = shape->head_dim,
        .head_dim_v = shape->head_dim_v,
        .warp_n = tile->warp_n,
        .tile_m = tile->tile_m,
        .sub_m = shape->softcap != 0 ? 16 : tile->sub_m, /* a cap takes registers */
        .dq_dim_warps = dq_dim_warps(tile, shape->head_dim),
        .warps = tile->warps,
        .stages = tile->stages,
        .tma = device->has_tma && options->tma_strides,
        .mask_right = fa_shape_has_right_mask(shape),
        .mask_left = fa_shape_has_left_mask(shape),
        .softcap = shape->softcap != 0,
        .deterministic = options->deterministic,
        .dq_buffers = dq_buffers(shape, options->deterministic),
    };
    plan->main.threads = tile->warps * 32;
    plan->tile_n = tile->warps / 2 * tile->warp_n;
    plan->m_blocks = CEIL_DIV(shape->seqlen_q, tile->tile_m);
    plan->n_blocks = CEIL_DIV(shape->seqlen_k, plan->tile_n);
}

/* Shared memory of kernels/backward.cu: K, the stages of Q, dO, dS^T, of each stage the lse and
 * delta of its queries, and mbarriers. */
static int backward_smem(const struct fa_shape *shape, const struct fa_backward_plan *plan)
{
    const struct fa_variant *main = &plan->main.variant;
    const int k_align = 16 * main->dq_dim_warps;
    const int k_row = CEIL_DIV(shape->head_dim, k_align) * k_align;
    const int q_row = CEIL_DIV(shape->head_dim, 16) * 16;
    const int dout_row = CEIL_DIV(shape->head_dim_v, 16) * 16;
    const int queries = main->tile_m * (main->stages * (q_row * 2 + 8) + dout_row * 2);
    return plan->tile_n * (k_row + main->tile_m) * 2 + queries + 16 * (main->stages + 1);
}

/* ---- the grid -------------------------------------------------------------------------------- */

/* The tiles of queries that a block of keys goes through: at most, and on average. */
static double longest_walk(const struct fa_shape *shape, const struct fa_backward_plan *plan)
{
    const double window = (double)shape->window_left + shape->window_right + plan->tile_n;
    const double tiles = window / plan->main.variant.tile_m + 1;
    return MAX(0, MIN(tiles, plan->m_blocks)) * fa_heads_per_kv(shape);
}
static bool is_triangle(const struct fa_backward_plan *plan)
{
    return plan->main.variant.mask_right != plan->main.variant.mask_left;
}
static double average_walk(const struct fa_shape *shape, const struct fa_backward_plan *plan)
{
    return longest_walk(shape, plan) * (is_triangle(plan) ? 0.5 : 1);
}

/* What a block takes besides its tiles of queries, in units of one tile: its keys, and dK and dV.
 * Blocks that share keys add dK and dV to accumulators, which backward_postprocess.cu turns into
 * tensors. */
#define WHOLE_BLOCK 0.7
#define SPLIT_BLOCK 1.7
#define POSTPROCESS 1.0

/* From so many rounds on, no multiprocessor is idle for long. */
#define MANY_ROUNDS 4

/* The longest walk of the `q_splits` blocks that share a tile of keys: see choose_q_splits(). */
static double longest_split(const struct fa_shape *shape, const struct fa_backward_plan *plan,
                            int q_splits)
{
    const int heads_per_kv = fa_heads_per_kv(shape);
    const double walk = longest_walk(shape, plan);
    return plan->main.variant.deterministic ? walk / heads_per_kv * CEIL_DIV(heads_per_kv, q_splits)
                                            : walk / q_splits;
}

/* The time until the last of the blocks is done. Blocks of one size run in rounds; of a triangle
 * the long ones start first and short ones fill the gaps: max(critical path, total work / slots).
 */
static double time_of(const struct fa_shape *shape, const struct fa_backward_plan *plan,
                      double blocks, double places, int q_splits)
{
    const double own = q_splits > 1 ? SPLIT_BLOCK : WHOLE_BLOCK;
    const double longest = longest_split(shape, plan, q_splits) + own;
    const double average = average_walk(shape, plan) / q_splits + own;
    const double rounds = blocks * q_splits / places;
    const double time = is_triangle(plan) ? MAX(longest, rounds * average) : ceil(rounds) * longest;
    return time + (q_splits > 1 ? POSTPROCESS : 0);
}

/* Thread blocks that share a tile of keys and split its queries: more than one where few keys, or
 * few heads, leave multiprocessors idle. With ordered accumulation each gets whole query heads:
 * otherwise a block could start with a tile of dQ that the block it waits for reaches last. */
static int choose_q_splits(const struct fa_shape *shape, const struct fa_backward_plan *plan,
                           double blocks, int places)
{
    enum { MAX_Q_SPLITS = 64 };
    if (blocks >= MANY_ROUNDS * (double)places)
        return 1;
    int most = (int)MIN(MAX_Q_SPLITS, longest_walk(shape, plan));
    if (plan->main.variant.deterministic)
        most = MIN(most, fa_heads_per_kv(shape));
    int best = 1;
    double best_time = time_of(shape, plan, blocks, places, 1);
    for (int q_splits = 2; q_splits <= most; q_splits++) {
        const double time = time_of(shape, plan, blocks, places, q_splits);
        if (time < best_time)
            best = q_splits, best_time = time;
    }
    return best;
}

static int set_grid(const struct fa_shape *shape, const struct fa_device *device, int limits_arch,
                    struct fa_backward_plan *plan, struct fa_plan_error *error)
{
    enum { REGISTERS_PER_SM = 64 << 10, REGISTERS_PER_THREAD = 256 };
    struct fa_step *main = &plan->main;
    const double pairs = (double)shape->batch * shape->heads_kv, blocks = pairs * plan->n_blocks;
    const int by_registers = REGISTERS_PER_SM / (REGISTERS_PER_THREAD * main->threads);
    int by_smem;
    plan->smem_bytes = backward_smem(shape, plan);
    main->smem_request =
        fa_plan_smem(device, limits_arch, plan->smem_bytes, main->threads, &by_smem);
    plan->blocks_per_sm = MAX(1, MIN(by_smem, by_registers));
    plan->q_splits =
        choose_q_splits(shape, plan, blocks, MAX(1, device->sms) * plan->blocks_per_sm);
    const double query_tiles = (double)shape->batch * shape->heads_q * plan->m_blocks;
    if (blocks * plan->q_splits > INT32_MAX || query_tiles > INT32_MAX) {
        *error = (struct fa_plan_error){
            false, "batch * heads * seqlen needs more than 2^31 - 1 thread blocks"};
        return -1;
    }
    main->blocks = (int)blocks * plan->q_splits;
    return 0;
}

/* ---- before and after ------------------------------------------------------------------------ */

static void set_preprocess(const struct fa_shape *shape, struct fa_backward_plan *plan)
{
    const struct fa_variant *main = &plan->main.variant;
    plan->preprocess = (struct fa_step){
        .variant = {.kernel = FA_KERNEL_BACKWARD_PREPROCESS,
                    .dtype_bf16 = main->dtype_bf16,
                    .head_dim_v = main->head_dim_v,
                    .tile_m = main->tile_m},
        .blocks = shape->batch * shape->heads_q * plan->m_blocks,
        .threads = 256,
    };
}

/* Turns an accumulator of `row_frags` fragments of 16 rows into a tensor. */
static struct fa_step postprocess(const struct fa_backward_plan *plan, int64_t row_frags,
                                  int head_dim)
{
    enum { WARPS = 4 };
    return (struct fa_step){
        .variant = {.kernel = FA_KERNEL_BACKWARD_POSTPROCESS,
                    .dtype_bf16 = plan->main.variant.dtype_bf16,
                    .head_dim = head_dim},
        .blocks = (int)CEIL_DIV(row_frags, WARPS),
        .threads = WARPS * 32,
    };
}

/* Where things are in the workspace, each at a multiple of 16 bytes. */
static void set_workspace(const struct fa_shape *shape, struct fa_backward_plan *plan)
{
    const struct fa_variant *main = &plan->main.variant;
    const int64_t query_tiles = (int64_t)shape->batch * shape->heads_q * plan->m_blocks;
    const int64_t key_tiles = (int64_t)shape->batch * shape->heads_kv * plan->n_blocks;
    const int64_t queries = query_tiles * main->tile_m, keys = key_tiles * plan->tile_n;
    const bool is_split = plan->q_splits > 1;
    int64_t end = 2 * queries; /* behind the lse and delta of each */
#define TAKE(field, size) (plan->field = end, end += CEIL_DIV(size, 4) * 4)
    TAKE(dq_accum, main->dq_buffers * queries * shape->head_dim);
    TAKE(dk_accum, is_split ? keys * shape->head_dim : 0);
    TAKE(dv_accum, is_split ? keys * shape->head_dim_v : 0);
    TAKE(dq_semaphores, main->deterministic ? main->dq_buffers * query_tiles : 0);
    TAKE(dkv_semaphores, main->deterministic && is_split ? key_tiles : 0);
    TAKE(block_counter, main->deterministic ? 1 : 0);
#undef TAKE
    plan->workspace = end;
    plan->dq = postprocess(plan, queries / 16, shape->head_dim);
    if (is_split) {
        plan->dk = postprocess(plan, keys / 16, shape->head_dim);
        plan->dv = postprocess(plan, keys / 16, shape->head_dim_v);
    }
}

/* ---- the interface --------------------------------------------------------------------------- */

int fa_plan_backward(const struct fa_shape *shape, const struct fa_backward_options *options,
                     const struct fa_device *device, int limits_arch, struct fa_backward_plan *plan,
                     struct fa_plan_error *error)
{
    *plan = (struct fa_backward_plan){0};
    if (fa_plan_supports(shape, device, error) < 0)
        return -1;
    set_main(shape, options, device, plan);
    if (set_grid(shape, device, limits_arch, plan, error) < 0)
        return -1;
    set_preprocess(shape, plan);
    set_workspace(shape, plan);
    if (options->has_sink)
        plan->dsink = (struct fa_step){
            .variant = {.kernel = FA_KERNEL_BACKWARD_SINK,
                        .dtype_bf16 = plan->main.variant.dtype_bf16,
                        .tile_m = plan->main.variant.tile_m},
            .blocks = shape->heads_q,
            .threads = 256,
        };
    return 0;
}
