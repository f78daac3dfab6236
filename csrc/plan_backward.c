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

/* Up to so many (batch, head) pairs, many blocks take turns at each: with two sums of dQ neighbours
 * run side by side. With more pairs the second sum costs more than the turns do. The machine has no
 * say in it, nor in the size of the workspace. */
#define FEW_HEADS 16

static int dq_sums(const struct fa_shape *shape, bool deterministic)
{
    return deterministic && (int64_t)shape->batch * shape->heads_q <= FEW_HEADS ? 2 : 1;
}

static void set_main(const struct fa_shape *shape, const struct fa_backward_options *options,
                     const struct fa_device *device, struct fa_backward_plan *plan)
{
    const struct fa_backward_tile *tile = choose_tile(shape);
    plan->main.variant = (struct fa_variant){
        .kernel = FA_KERNEL_BACKWARD,
        .dtype = shape->dtype,
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
        .dq_sums = dq_sums(shape, options->deterministic),
    };
    plan->main.threads = tile->warps * 32;
    plan->tile_n = tile->warps / 2 * tile->warp_n;
    plan->m_blocks = CEIL_DIV(shape->seqlen_q, tile->tile_m);
    plan->n_blocks = CEIL_DIV(shape->seqlen_k, plan->tile_n);
}

static int backward_smem(const struct fa_shape *shape, const struct fa_backward_plan *plan)
{
    const struct fa_variant *main = &plan->main.variant;
    return fa_backward_smem_of(shape->head_dim, shape->head_dim_v, main->tile_m, plan->tile_n,
                               main->stages, main->dq_dim_warps, shape->dtype)
        .bytes;
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

/* What a block takes besides its tiles of queries, in units of one: its keys, and dK and dV; the
 * latter are added to sums where it has only a part, and those are converted by kernels of their
 * own. */
#define WHOLE_BLOCK 0.7
#define PART_BLOCK  1.7
#define CONVERSION  1.0

/* From so many rounds on, no multiprocessor is idle for long. */
#define MANY_ROUNDS 4

/* The most that one of so many blocks has, which share a tile of keys: see choose_parts(). */
static double longest_part(const struct fa_shape *shape, const struct fa_backward_plan *plan,
                           int parts)
{
    const int heads_per_kv = fa_heads_per_kv(shape);
    const double walk = longest_walk(shape, plan);
    return plan->main.variant.deterministic ? walk / heads_per_kv * CEIL_DIV(heads_per_kv, parts)
                                            : walk / parts;
}

/* The time until the last of the blocks is done. Blocks of one size run in rounds; of a triangle
 * the long ones start first and short ones fill the gaps, so that it takes no less than the
 * longest, nor than the machine takes for all. */
static double time_of(const struct fa_shape *shape, const struct fa_backward_plan *plan,
                      double blocks, double places, int parts)
{
    const double own = parts > 1 ? PART_BLOCK : WHOLE_BLOCK;
    const double longest = longest_part(shape, plan, parts) + own;
    const double average = average_walk(shape, plan) / parts + own;
    const double rounds = blocks * parts / places;
    const double time = is_triangle(plan) ? MAX(longest, rounds * average) : ceil(rounds) * longest;
    return time + (parts > 1 ? CONVERSION : 0);
}

/* Thread blocks that share a tile of keys: more than one where few keys, or few heads, leave
 * multiprocessors idle. Where blocks take turns each has whole heads: else what one begins with,
 * another block of keys, whose turn comes before, might end with. */
static int choose_parts(const struct fa_shape *shape, const struct fa_backward_plan *plan,
                        double blocks, int places)
{
    enum { MAX_PARTS = 64 };
    if (blocks >= MANY_ROUNDS * (double)places)
        return 1;
    int most = (int)MIN(MAX_PARTS, longest_walk(shape, plan));
    if (plan->main.variant.deterministic)
        most = MIN(most, fa_heads_per_kv(shape));
    int best = 1;
    double best_time = time_of(shape, plan, blocks, places, 1);
    for (int parts = 2; parts <= most; parts++) {
        const double time = time_of(shape, plan, blocks, places, parts);
        if (time < best_time)
            best = parts, best_time = time;
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
    plan->parts = choose_parts(shape, plan, blocks, MAX(1, device->sms) * plan->blocks_per_sm);
    const double query_tiles = (double)shape->batch * shape->heads_q * plan->m_blocks;
    if (blocks * plan->parts > INT32_MAX || query_tiles > INT32_MAX) {
        *error = (struct fa_plan_error){
            false, "batch * heads * seqlen needs more than 2^31 - 1 thread blocks"};
        return -1;
    }
    main->blocks = (int)blocks * plan->parts;
    return 0;
}

/* ---- before and after ------------------------------------------------------------------------ */

static void set_delta(const struct fa_shape *shape, struct fa_backward_plan *plan)
{
    const struct fa_variant *main = &plan->main.variant;
    plan->delta = (struct fa_step){
        .variant = {.kernel = FA_KERNEL_BACKWARD_DELTA,
                    .dtype = main->dtype,
                    .head_dim_v = main->head_dim_v,
                    .tile_m = main->tile_m},
        .blocks = shape->batch * shape->heads_q * plan->m_blocks,
        .threads = FA_PREPROCESS_THREADS,
    };
}

/* The conversion of a sum of so many fragments of 16 rows. */
static struct fa_step conversion(const struct fa_backward_plan *plan, int64_t row_frags,
                                 int head_dim)
{
    return (struct fa_step){
        .variant = {.kernel = FA_KERNEL_BACKWARD_CONVERT,
                    .dtype = plan->main.variant.dtype,
                    .head_dim = head_dim},
        .blocks = (int)CEIL_DIV(row_frags, FA_POSTPROCESS_WARPS),
        .threads = FA_POSTPROCESS_WARPS * 32,
    };
}

/* Where things are in the workspace, each at a multiple of 16 bytes. */
static void set_workspace(const struct fa_shape *shape, struct fa_backward_plan *plan)
{
    const struct fa_variant *main = &plan->main.variant;
    const int64_t query_tiles = (int64_t)shape->batch * shape->heads_q * plan->m_blocks;
    const int64_t key_tiles = (int64_t)shape->batch * shape->heads_kv * plan->n_blocks;
    const int64_t queries = query_tiles * main->tile_m, keys = key_tiles * plan->tile_n;
    const bool is_split = plan->parts > 1;
    int64_t end = 2 * queries; /* behind the lse and delta of each */
#define TAKE(field, size) (plan->field = end, end += CEIL_DIV(size, 4) * 4)
    TAKE(dq_sum, main->dq_sums * queries * shape->head_dim);
    TAKE(dk_sum, is_split ? keys * shape->head_dim : 0);
    TAKE(dv_sum, is_split ? keys * shape->head_dim_v : 0);
    TAKE(turns, main->deterministic ? main->dq_sums * query_tiles : 0);
    TAKE(dk_turns, main->deterministic && is_split ? key_tiles : 0);
    TAKE(tickets, main->deterministic ? 1 : 0);
#undef TAKE
    plan->workspace = end;
    plan->dq = conversion(plan, queries / 16, shape->head_dim);
    if (is_split) {
        plan->dk = conversion(plan, keys / 16, shape->head_dim);
        plan->dv = conversion(plan, keys / 16, shape->head_dim_v);
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
    set_delta(shape, plan);
    set_workspace(shape, plan);
    if (options->has_sink)
        plan->dsink = (struct fa_step){
            .variant = {.kernel = FA_KERNEL_BACKWARD_SINK,
                        .dtype = plan->main.variant.dtype,
                        .tile_m = plan->main.variant.tile_m},
            .blocks = shape->heads_q,
            .threads = FA_SINK_THREADS,
        };
    return 0;
}
