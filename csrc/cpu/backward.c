/* The gradients of attention as they are defined. From out, its lse and their gradients, for every
 * pair of a query i of one head and a key j that i sees:
 *
 *     s_ij  = softcap(scale * q_i . k_j)
 *     p_ij  = exp(s_ij - lse_i)                       a weight of the softmax
 *     dp_ij = dout_i . v_j                            its gradient
 *     ds_ij = p_ij (dp_ij - delta_i) * scale          that of q_i . k_j; with softcap c times the
 *                                                     slope of tanh, 1 - (s_ij / c)^2
 *     delta_i = dout_i . out_i - dlse_i               what the softmax's normalisation takes off
 *
 *     dq_i = sum_j ds_ij k_j      dk_j = sum_i ds_ij q_i      dv_j = sum_i p_ij dout_i
 *     dsink = -sum_i exp(sink - lse_i) delta_i        a weight whose gradient dp is 0
 *
 * where the sums over i go over all query heads that read the KV head, for dsink over the batch.
 *
 * One task computes a tile of dq, or a tile of dk and dv, while all that its rows see, or are seen
 * by, passes in tiles of fp32. So every sum is one task's, in one order, at the price of computing
 * the pairs twice. Pairs that the mask hides are never touched: nothing in them (NaN, inf) can
 * reach a gradient. */
#include "backward.h"

#include <stdlib.h>
#include <string.h>

#include "rows.h"
#include "scores.h"

enum { TILE = 32 }; /* query rows or keys */

struct task {
    const struct fa_problem *problem;
    const struct fa_gradients *gradients;
    struct fa_worker *worker;
    struct lengths longest; /* of all sequences */
    int width, width_v;     /* head_dim and head_dim_v, padded */
    struct sequence sequence;
    int64_t head, head_kv;
    struct range rows, keys; /* the tiles at hand */
    float *Q, *dO;           /* [TILE, width], [TILE, width_v] */
    float *K, *V;            /* [TILE, width], [TILE, width_v] */
    float *lse, *delta;      /* [TILE] */
    float *out;              /* [width_v]: one row */
    float *sums, *part; /* [TILE, width + width_v]: the gradients, and a tile's share of them */
};

/* ---- Tiles ----------------------------------------------------------------------------------- */

static struct range all_rows(const struct task *task)
{
    return (struct range){0, task->sequence.q.length};
}

static struct range all_keys(const struct task *task)
{
    return (struct range){0, task->sequence.k.length};
}

static void load_queries(struct task *task, int64_t head, struct range rows)
{
    const struct fa_problem *problem = task->problem;
    const struct fa_gradients *gradients = task->gradients;
    const struct fa_tensor *out = &problem->out, *dlse = &gradients->dlse;
    const struct side side = task->sequence.q;
    const int count = (int)count_of(rows);
    task->head = head;
    task->rows = rows;
    fa_load_rows(&problem->q, side, rows, head, task->Q);
    fa_load_rows(&gradients->dout, side, rows, head, task->dO);
    fa_load_row(&problem->lse, fa_lse_offset(&problem->lse, side, rows.begin, head), count, count,
                task->lse);

    memset(task->delta, 0, (size_t)count * sizeof *task->delta);
    if (dlse->object != NULL)
        fa_load_row(dlse, fa_lse_offset(dlse, side, rows.begin, head), count, count, task->delta);
    for (int row = 0; row < count; row++) {
        fa_load_row(out, fa_row_offset(out, side, rows.begin + row, head),
                    problem->shape.head_dim_v, task->width_v, task->out);
        const float *dout = task->dO + row * task->width_v;
        task->delta[row] = fa_dot(dout, task->out, task->width_v) - task->delta[row];
    }
}

static void load_keys(struct task *task, struct range keys)
{
    task->keys = keys;
    fa_load_rows(&task->problem->k, task->sequence.k, keys, task->head_kv, task->K);
    fa_load_rows(&task->problem->v, task->sequence.k, keys, task->head_kv, task->V);
}

/* Whether any of the rows sees any of the keys. */
static bool meet(const struct task *task, struct range rows, struct range keys)
{
    const struct range visible = visible_to_any(&task->problem->shape, &task->sequence, rows);
    return count_of(intersection(visible, keys)) > 0;
}

/* Whether a loop over tiles goes on with this one. */
static bool is_next(const struct task *task, struct range tile)
{
    return count_of(tile) > 0 && !fa_has_ended(task->worker);
}

/* ---- Sums ------------------------------------------------------------------------------------ */

/* A pair's weight p and the gradient ds of q . k. */
struct pair {
    float p, ds;
};

static struct pair pair_of(const struct task *task, int64_t row, const float *k, const float *v)
{
    const struct fa_shape *shape = &task->problem->shape;
    const float score = score_of(shape, task->Q + row * task->width, k);
    const float capped = shape->softcap > 0 ? score / shape->softcap : 0;
    const float dp = fa_dot(task->dO + row * task->width_v, v, task->width_v);
    const float p = expf(score - task->lse[row]);
    const float ds = p * (dp - task->delta[row]) * (1 - capped * capped);
    return (struct pair){p, shape->softmax_scale * ds};
}

/* Adds what the pairs of the tiles at hand give to dQ, or to dK and dV where that is NULL. */
static void add_pairs(struct task *task, float *dQ, float *dK, float *dV)
{
    const int width = task->width, width_v = task->width_v;
    for (int64_t row = 0; row < count_of(task->rows); row++) {
        if (task->lse[row] == -INFINITY)
            continue; /* no key has any weight */
        struct range keys =
            visible_keys(&task->problem->shape, &task->sequence, task->rows.begin + row);
        keys = intersection(keys, task->keys);
        for (int64_t key = keys.begin - task->keys.begin; key < keys.end - task->keys.begin;
             key++) {
            const float *k = task->K + key * width, *v = task->V + key * width_v;
            const struct pair pair = pair_of(task, row, k, v);
            if (dQ) {
                fa_add_scaled(dQ + row * width, pair.ds, k, width);
            } else {
                fa_add_scaled(dK + key * width, pair.ds, task->Q + row * width, width);
                fa_add_scaled(dV + key * width_v, pair.p, task->dO + row * width_v, width_v);
            }
        }
    }
}

/* Sums of short sums are rounded far less than one long sum: every pair of tiles has its own. */
static void clear(const struct task *task, float *sums)
{
    memset(sums, 0, (size_t)(TILE * (task->width + task->width_v)) * sizeof *sums);
}

static void add_part(const struct task *task)
{
    fa_add_scaled(task->sums, 1, task->part, TILE * (task->width + task->width_v));
}

/* ---- What one task computes ------------------------------------------------------------------ */

static int64_t tile_count(int64_t n) { return (n + TILE - 1) / TILE; }

/* Tile `index` of [batch, heads, tiles] in the rows of `all` of its sequence, which has fewer tiles
 * than the longest; returns the head. */
static int64_t locate(struct task *task, int64_t index, int64_t heads, int64_t tiles,
                      struct range (*all)(const struct task *task), struct range *tile)
{
    task->sequence = fa_sequence(task->problem, index / tiles / heads);
    *tile = tile_from(all(task), index % tiles * TILE, TILE);
    return index / tiles % heads;
}

static void compute_dq(struct task *task, int64_t index)
{
    const struct fa_shape *shape = &task->problem->shape;
    struct range rows;
    const int64_t tiles = tile_count(task->longest.q);
    const int64_t head = locate(task, index, shape->heads_q, tiles, all_rows, &rows);
    if (count_of(rows) <= 0)
        return;
    task->head_kv = head / fa_heads_per_kv(shape);
    load_queries(task, head, rows);
    clear(task, task->sums);
    struct range visible = visible_to_any(shape, &task->sequence, rows);
    struct range tile = tile_from(visible, 0, TILE);
    for (; is_next(task, tile); tile = tile_from(visible, tile.end, TILE)) {
        load_keys(task, tile);
        clear(task, task->part);
        add_pairs(task, task->part, NULL, NULL);
        add_part(task);
    }
    fa_store_rows(&task->gradients->dq, task->sequence.q, rows, head, task->sums);
}

static void compute_dk_dv(struct task *task, int64_t index)
{
    const struct fa_shape *shape = &task->problem->shape;
    const int64_t dv = TILE * task->width; /* dK is followed by dV */
    const int heads_per_kv = fa_heads_per_kv(shape);
    struct range keys;
    task->head_kv =
        locate(task, index, shape->heads_kv, tile_count(task->longest.k), all_keys, &keys);
    if (count_of(keys) <= 0)
        return;
    load_keys(task, keys);
    clear(task, task->sums);
    for (int64_t i = 0; i < heads_per_kv; i++) {
        struct range tile = tile_from(all_rows(task), 0, TILE);
        for (; is_next(task, tile); tile = tile_from(all_rows(task), tile.end, TILE)) {
            if (!meet(task, tile, keys))
                continue;
            load_queries(task, task->head_kv * heads_per_kv + i, tile);
            clear(task, task->part);
            add_pairs(task, NULL, task->part, task->part + dv);
            add_part(task);
        }
    }
    fa_store_rows(&task->gradients->dk, task->sequence.k, keys, task->head_kv, task->sums);
    fa_store_rows(&task->gradients->dv, task->sequence.k, keys, task->head_kv, task->sums + dv);
}

static void compute_dsink(struct task *task, int64_t head)
{
    const struct fa_shape *shape = &task->problem->shape;
    const struct fa_tensor *dsink = &task->gradients->dsink;
    const float sink = sink_of(task->problem, head);
    double sum = 0;
    for (int64_t batch = 0; batch < shape->batch; batch++) {
        task->sequence = fa_sequence(task->problem, batch);
        struct range tile = tile_from(all_rows(task), 0, TILE);
        for (; is_next(task, tile); tile = tile_from(all_rows(task), tile.end, TILE)) {
            load_queries(task, head, tile);
            for (int64_t row = 0; row < count_of(tile); row++)
                if (task->lse[row] > -INFINITY)
                    sum -= expf(sink - task->lse[row]) * task->delta[row];
        }
    }
    const float rounded = (float)sum;
    fa_store_row(dsink, head * dsink->stride[0], 1, &rounded);
}

/* ---- Tasks ----------------------------------------------------------------------------------- */

struct call {
    const struct fa_problem *problem;
    const struct fa_gradients *gradients;
    struct lengths longest;
    void (*compute)(struct task *task, int64_t index);
};

static int run_task(void *context, int64_t index, struct fa_worker *worker)
{
    struct call *call = context;
    struct task task = {
        .problem = call->problem,
        .gradients = call->gradients,
        .worker = worker,
        .longest = call->longest,
        .width = fa_width(call->problem->shape.head_dim),
        .width_v = fa_width(call->problem->shape.head_dim_v),
    };
    const int64_t both = TILE * (task.width + task.width_v);
    float *memory = malloc((size_t)(4 * both + 2 * TILE + task.width_v) * sizeof *memory);
    if (memory == NULL)
        return FA_OUT_OF_MEMORY;
    task.Q = memory;
    task.dO = task.Q + TILE * task.width;
    task.K = task.Q + both;
    task.V = task.K + TILE * task.width;
    task.sums = task.K + both;
    task.part = task.sums + both;
    task.lse = task.part + both;
    task.delta = task.lse + TILE;
    task.out = task.delta + TILE;
    call->compute(&task, index);
    free(memory);
    return 0;
}

int fa_cpu_backward(const struct fa_problem *problem, const struct fa_gradients *gradients,
                    struct fa_threads *threads)
{
    const struct fa_shape *shape = &problem->shape;
    const struct lengths longest = fa_longest(problem);
    const int64_t rows = shape->batch * shape->heads_q * tile_count(longest.q);
    const int64_t keys = shape->batch * shape->heads_kv * tile_count(longest.k);
    struct call call = {problem, gradients, longest, compute_dq};
    int status = fa_parallel_for(rows, threads, run_task, &call);
    if (status)
        return status;
    call.compute = compute_dk_dv;
    status = fa_parallel_for(keys, threads, run_task, &call);
    if (status || !problem->sink.object)
        return status;
    call.compute = compute_dsink;
    return fa_parallel_for(shape->heads_q, threads, run_task, &call);
}
