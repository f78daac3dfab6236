/* The gradients of attention as they are defined. From out, its lse and their gradients, for every
 * pair of a query i of one head and a key j that i sees:
 *
 *     s_ij  = softcap(scale * q_i . k_j) + a_ij       a_ij: ALiBi, bias
 *     p_ij  = exp(s_ij - lse_i)                       a weight of the softmax
 *     dp_ij = m_ij dout_i . v_j                       its gradient: m_ij is what dropout multiplies
 *                                                     p_ij by before it weighs v_j, else 1
 *     ds_ij = p_ij (dp_ij - delta_i) * scale          that of q_i . k_j; with softcap c times the
 *                                                     slope of tanh, 1 - (s_ij / c)^2 of the score
 *                                                     before a_ij is added
 *     delta_i = dout_i . out_i - dlse_i               what the softmax's normalisation takes off
 *             = sum_j p_ij dp_ij - dlse_i             the same without the rounding of out
 *
 *     dq_i = sum_j ds_ij k_j      dk_j = sum_i ds_ij q_i      dv_j = sum_i m_ij p_ij dout_i
 *     dsink = -sum_i exp(sink - lse_i) delta_i        a weight whose gradient dp is 0
 *     dbias_ij = p_ij (dp_ij - delta_i)               summed over all pairs that share it
 *
 * where the sums over i go over all query heads that read the KV head, for dsink over the batch.
 *
 * The query rows come first: a task computes all pairs of a tile of rows, then the softmax and
 * delta of each row, then dq. After that a task computes a tile of dk and dv, while all queries
 * that see its keys pass in tiles. So every sum is one task's, in one order, at the price of
 * computing the pairs twice, and a third time for dbias. Pairs that the mask hides are never
 * touched: nothing in them (NaN, inf) can reach a gradient. */
#include "backward.h"

#include <stdlib.h>
#include <string.h>

#include "block_map.h"
#include "rows.h"
#include "scores.h"

enum { TILE = 32 }; /* query rows or keys */

/* What the gradients of a row's pairs have in common. */
struct row {
    struct softmax softmax; /* a weight is exp(s - max) / sum */
    double delta;
};

struct task {
    const struct fa_problem *problem;
    const struct fa_gradients *gradients;
    struct fa_worker *worker;
    int width, width_v; /* head_dim and head_dim_v, padded */
    struct sequence sequence;
    struct lengths longest; /* of all sequences */
    int64_t head, head_kv;
    struct dropout dropout;  /* of the head */
    struct addends addends;  /* of the head */
    struct range rows, keys; /* the current tiles */
    float *Q, *dO;           /* [TILE, width], [TILE, width_v] */
    float *K, *V;            /* [TILE, width], [TILE, width_v] */
    float *sums, *part; /* [TILE, width + width_v]: the gradients, and a tile's share of them */
    double *S, *dP;     /* [TILE, visible keys]: scores and their gradients; for dQ alone */
    struct row *of_row; /* [TILE], within [heads_q, rows of all sequences] of the call */
    struct row *of_call;
    const struct fa_block_map *map;
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

static struct row *rows_of_head(const struct task *task, int64_t head)
{
    const struct fa_shape *shape = &task->problem->shape;
    const struct side side = task->sequence.q;
    const int64_t first = side.batch * shape->seqlen_q + side.begin;
    return task->of_call + head * fa_shape_rows_q(shape) + first;
}

static void load_queries(struct task *task, int64_t head, struct range rows)
{
    task->head = head;
    task->dropout = dropout_of(task->problem, task->sequence.number, head);
    task->addends = addends_of(task->problem, &task->sequence, head);
    task->rows = rows;
    task->of_row = rows_of_head(task, head) + rows.begin;
    fa_load_rows(&task->problem->q, task->sequence.q, rows, head, task->Q);
    fa_load_rows(&task->gradients->dout, task->sequence.q, rows, head, task->dO);
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

/* ---- Rows ------------------------------------------------------------------------------------ */

/* That of a row of the tile in lse or dlse. */
static float element_of_row(const struct task *task, const struct fa_tensor *tensor, int64_t row)
{
    float value;
    const int64_t offset =
        fa_lse_offset(tensor, task->sequence.q, task->rows.begin + row, task->head);
    fa_load_row(tensor, offset, 1, 1, &value);
    return value;
}

static double dout_dot_out(const struct task *task, int64_t row)
{
    const struct fa_tensor *out = &task->problem->out;
    const int64_t offset = fa_row_offset(out, task->sequence.q, task->rows.begin + row, task->head);
    float *out_row = task->part; /* not in use yet */
    fa_load_row(out, offset, task->problem->shape.head_dim_v, task->width_v, out_row);
    return fa_dot(task->dO + row * task->width_v, out_row, task->width_v);
}

/* The softmax and delta of a row, from its scores and their gradients.
 *
 * They are the row's own where the given lse is what the forward returns, to the bit: then nothing
 * is lost by the rounding of lse and out. Any other lse belongs to more keys than these, as in ring
 * attention: then it counts, and so does the out that came with it. */
static struct row describe_row(const struct task *task, int64_t row, const double *S,
                               const double *dP, int64_t count)
{
    const struct fa_tensor *dlse = &task->gradients->dlse;
    const struct softmax own = softmax_of(S, count, sink_of(task->problem, task->head));
    const float lse = element_of_row(task, &task->problem->lse, row);
    struct row result = {own, 0};
    if (lse == lse_of(own)) {
        for (int64_t n = 0; n < count; n++)
            result.delta += (double)weight_of(own, S[n]) * dP[n];
    } else {
        result.softmax.max = lse == INFINITY ? NAN : lse;
        result.softmax.sum = lse == -INFINITY ? 0 : 1;
        result.delta = dout_dot_out(task, row);
    }
    if (dlse->object != NULL)
        result.delta -= element_of_row(task, dlse, row);
    return result;
}

/* Whether any key or the sink has a weight. */
static bool has_weight(const struct row *row) { return row->softmax.sum != 0; }

/* ---- Pairs ----------------------------------------------------------------------------------- */

/* The keys of the tile that a row of the tile sees. */
static struct range keys_of(const struct task *task, int64_t row)
{
    const struct fa_shape *shape = &task->problem->shape;
    return intersection(visible_keys(shape, &task->sequence, task->rows.begin + row), task->keys);
}

/* Whether a row of the tile and a key are in a block that the call lists. */
static bool is_listed(const struct task *task, int64_t row, int64_t key)
{
    return fa_is_listed(task->map, task->sequence.number, task->head, task->rows.begin + row, key);
}

/* m of a row of the tile and a key. */
static float factor_of(const struct task *task, int64_t row, int64_t key)
{
    return dropout_factor(&task->dropout, task->rows.begin + row, key);
}

/* What is added to the score of a row of the tile and a key of the sequence. */
static double addend_of_pair(const struct task *task, int64_t row, int64_t key)
{
    return addend_of(&task->addends, task->rows.begin + row, key);
}

/* A pair's weight p, the gradient ds of q . k, and that of what is added to the score. */
struct pair {
    float p, ds, dbias;
};

static struct pair pair_of(const struct fa_shape *shape, const struct row *row, double score,
                           double addend, double dp)
{
    const float p = weight_of(row->softmax, score);
    const bool is_capped = shape->softcap > 0 && score != -INFINITY;
    const double capped = is_capped ? (score - addend) / shape->softcap : 0;
    const double dbias = p * (dp - row->delta), ds = dbias * (1 - capped * capped);
    return (struct pair){p, (float)(shape->softmax_scale * ds), (float)dbias};
}

/* ---- Sums ------------------------------------------------------------------------------------ */

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

/* Tile `index` of [batch, heads, tiles], where tiles are those of the longest sequence. Returns the
 * head, and the tile in rows of `all`: none where the sequence is shorter. */
static int64_t locate(struct task *task, int64_t index, int64_t heads, int64_t tiles,
                      struct range (*all)(const struct task *task), struct range *tile)
{
    task->sequence = fa_sequence(task->problem, index / tiles / heads);
    *tile = tile_from(all(task), index % tiles * TILE, TILE);
    return index / tiles % heads;
}

/* S and dP of the tile of queries and all keys that any of them sees. */
static void compute_scores(struct task *task, struct range visible)
{
    const struct fa_shape *shape = &task->problem->shape;
    const int width = task->width, width_v = task->width_v;
    struct range tile = tile_from(visible, 0, TILE);
    for (; is_next(task, tile); tile = tile_from(visible, tile.end, TILE)) {
        load_keys(task, tile);
        for (int64_t row = 0; row < count_of(task->rows); row++) {
            const int64_t first = row * count_of(visible) - visible.begin;
            struct range keys = keys_of(task, row);
            for (int64_t key = keys.begin; key < keys.end; key++) {
                const float *k = task->K + (key - tile.begin) * width;
                const float *v = task->V + (key - tile.begin) * width_v;
                const double addend = addend_of_pair(task, row, key);
                task->S[first + key] = -INFINITY;
                task->dP[first + key] = 0;
                if (!is_listed(task, row, key))
                    continue;
                task->S[first + key] = score_of(shape, task->Q + row * width, k, addend);
                task->dP[first + key] =
                    factor_of(task, row, key) * fa_dot(task->dO + row * width_v, v, width_v);
            }
        }
    }
}

static void describe_rows(struct task *task, struct range visible)
{
    const struct fa_shape *shape = &task->problem->shape;
    for (int64_t row = 0; row < count_of(task->rows) && !fa_has_ended(task->worker); row++) {
        struct range keys = visible_keys(shape, &task->sequence, task->rows.begin + row);
        const int64_t first = row * count_of(visible) + keys.begin - visible.begin;
        task->of_row[row] =
            describe_row(task, row, task->S + first, task->dP + first, count_of(keys));
    }
}

/* Adds what the keys of the tile give to dQ. */
static void add_to_dQ(struct task *task, struct range visible, float *dQ)
{
    const int width = task->width;
    for (int64_t row = 0; row < count_of(task->rows); row++) {
        const struct row *of_row = &task->of_row[row];
        const int64_t first = row * count_of(visible) - visible.begin;
        struct range keys = keys_of(task, row);
        for (int64_t key = keys.begin; has_weight(of_row) && key < keys.end; key++) {
            const double score = task->S[first + key], dp = task->dP[first + key];
            if (!is_listed(task, row, key))
                continue;
            const double addend = addend_of_pair(task, row, key);
            const struct pair pair = pair_of(&task->problem->shape, of_row, score, addend, dp);
            const float *k = task->K + (key - task->keys.begin) * width;
            fa_add_scaled(dQ + row * width, pair.ds, k, width);
        }
    }
}

/* That of a row and a key of the current tiles; `factor`: that of the pair. */
static struct pair pair_in_tiles(const struct task *task, int64_t row, int64_t key, float factor)
{
    const struct fa_shape *shape = &task->problem->shape;
    const int width = task->width, width_v = task->width_v;
    const float *k = task->K + (key - task->keys.begin) * width;
    const float *v = task->V + (key - task->keys.begin) * width_v;
    const double addend = addend_of_pair(task, row, key);
    const double score = score_of(shape, task->Q + row * width, k, addend);
    const double dp = factor * fa_dot(task->dO + row * width_v, v, width_v);
    return pair_of(shape, &task->of_row[row], score, addend, dp);
}

/* Adds what the pairs of the current tiles give to dK and dV. */
static void add_pairs(struct task *task, float *dK, float *dV)
{
    const int width = task->width, width_v = task->width_v;
    for (int64_t row = 0; row < count_of(task->rows); row++) {
        const float *q = task->Q + row * width, *dout = task->dO + row * width_v;
        struct range keys = keys_of(task, row);
        for (int64_t i = keys.begin; has_weight(&task->of_row[row]) && i < keys.end; i++) {
            const int64_t key = i - task->keys.begin;
            if (!is_listed(task, row, i))
                continue;
            const float factor = factor_of(task, row, i);
            const struct pair pair = pair_in_tiles(task, row, i, factor);
            fa_add_scaled(dK + key * width, pair.ds, q, width);
            fa_add_scaled(dV + key * width_v, factor * pair.p, dout, width_v);
        }
    }
}

/* And to the gradient of the bias. */
static void add_to_dbias(const struct task *task, int64_t batch)
{
    const struct fa_tensor *dbias = &task->gradients->dbias;
    const struct fa_strides stride = fa_bias_strides(dbias);
    float *of_head = (float *)dbias->data + batch * stride.batch + task->head * stride.head;
    for (int64_t row = 0; row < count_of(task->rows); row++) {
        struct range keys = keys_of(task, row);
        float *of_row = of_head + (task->rows.begin + row) * stride.seqlen;
        for (int64_t key = keys.begin; has_weight(&task->of_row[row]) && key < keys.end; key++)
            if (is_listed(task, row, key))
                of_row[key] += pair_in_tiles(task, row, key, factor_of(task, row, key)).dbias;
    }
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
    struct range visible = visible_to_any(shape, &task->sequence, rows);
    compute_scores(task, visible);
    describe_rows(task, visible);
    clear(task, task->sums);
    struct range tile = tile_from(visible, 0, TILE);
    for (; is_next(task, tile); tile = tile_from(visible, tile.end, TILE)) {
        load_keys(task, tile);
        clear(task, task->part);
        add_to_dQ(task, visible, task->part);
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
    const int64_t tiles = tile_count(task->longest.k);
    task->head_kv = locate(task, index, shape->heads_kv, tiles, all_keys, &keys);
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
            add_pairs(task, task->part, task->part + dv);
            add_part(task);
        }
    }
    fa_store_rows(&task->gradients->dk, task->sequence.k, keys, task->head_kv, task->sums);
    fa_store_rows(&task->gradients->dv, task->sequence.k, keys, task->head_kv, task->sums + dv);
}

/* Those of the dimension that entry `index` of a bias of so many entries is for. */
static struct range sharing(int64_t entries, int64_t index, int64_t count)
{
    return entries == 1 ? (struct range){0, count} : (struct range){index, index + 1};
}

/* Entry `index` of [batch, heads] of the bias. */
static void compute_dbias(struct task *task, int64_t index)
{
    const struct fa_shape *shape = &task->problem->shape;
    const int64_t *entries = task->problem->bias.shape;
    const struct range batches = sharing(entries[0], index / entries[1], shape->batch);
    const struct range heads = sharing(entries[1], index % entries[1], shape->heads_q);
    for (int64_t batch = batches.begin; batch < batches.end; batch++)
        for (int64_t head = heads.begin; head < heads.end; head++) {
            task->sequence = fa_sequence(task->problem, batch);
            task->head_kv = head / fa_heads_per_kv(shape);
            struct range rows = tile_from(all_rows(task), 0, TILE);
            for (; is_next(task, rows); rows = tile_from(all_rows(task), rows.end, TILE)) {
                const struct range visible = visible_to_any(shape, &task->sequence, rows);
                load_queries(task, head, rows);
                struct range tile = tile_from(visible, 0, TILE);
                for (; is_next(task, tile); tile = tile_from(visible, tile.end, TILE)) {
                    load_keys(task, tile);
                    add_to_dbias(task, batch);
                }
            }
        }
}

static void compute_dsink(struct task *task, int64_t head)
{
    const struct fa_shape *shape = &task->problem->shape;
    const struct fa_tensor *dsink = &task->gradients->dsink;
    const float sink = sink_of(task->problem, head);
    double sum = 0;
    for (int64_t batch = 0; batch < shape->batch; batch++) {
        task->sequence = fa_sequence(task->problem, batch);
        const struct row *of_row = rows_of_head(task, head);
        for (int64_t row = 0; row < task->sequence.q.length; row++)
            if (has_weight(&of_row[row]))
                sum -= weight_of(of_row[row].softmax, sink) * of_row[row].delta;
    }
    const float rounded = (float)sum;
    fa_store_row(dsink, head * dsink->stride[0], 1, &rounded);
}

/* ---- Tasks ----------------------------------------------------------------------------------- */

struct call {
    const struct fa_problem *problem;
    const struct fa_gradients *gradients;
    struct lengths longest;
    struct row *rows;
    void (*compute)(struct task *task, int64_t index);
    struct fa_block_map map;
};

static int run_task(void *context, int64_t index, struct fa_worker *worker)
{
    struct call *call = context;
    struct task task = {
        .problem = call->problem,
        .gradients = call->gradients,
        .worker = worker,
        .longest = call->longest,
        .of_call = call->rows,
        .map = &call->map,
        .width = fa_width(call->problem->shape.head_dim),
        .width_v = fa_width(call->problem->shape.head_dim_v),
    };
    const int64_t both = TILE * (task.width + task.width_v);
    const int64_t pairs = call->compute == compute_dq ? TILE * call->longest.k : 0;
    double *memory =
        malloc((size_t)(2 * pairs) * sizeof(double) + (size_t)(4 * both) * sizeof(float));
    if (memory == NULL)
        return FA_OUT_OF_MEMORY;
    task.S = memory;
    task.dP = task.S + pairs;
    task.Q = (float *)(task.dP + pairs);
    task.dO = task.Q + TILE * task.width;
    task.K = task.Q + both;
    task.V = task.K + TILE * task.width;
    task.sums = task.K + both;
    task.part = task.sums + both;
    call->compute(&task, index);
    free(memory);
    return 0;
}

int fa_cpu_backward(const struct fa_problem *problem, const struct fa_gradients *gradients,
                    struct fa_threads *threads)
{
    const struct fa_shape *shape = &problem->shape;
    const struct lengths longest = fa_longest(problem);
    const int64_t rows = tile_count(longest.q) * shape->batch * shape->heads_q;
    const int64_t keys = tile_count(longest.k) * shape->batch * shape->heads_kv;
    struct call call = {problem, gradients, longest, NULL, compute_dq, {0}};
    call.rows = malloc((size_t)(shape->heads_q * fa_shape_rows_q(shape)) * sizeof *call.rows);
    int status =
        call.rows ? fa_block_map_make(&problem->query_blocks, false, &call.map) : FA_OUT_OF_MEMORY;
    if (status)
        goto done;
    status = fa_parallel_for(rows, threads, run_task, &call);
    if (status)
        goto done;
    call.compute = compute_dk_dv;
    status = fa_parallel_for(keys, threads, run_task, &call);
    if (status)
        goto done;
    if (gradients->dbias.object) {
        const int64_t *entries = problem->bias.shape;
        call.compute = compute_dbias;
        status = fa_parallel_for(entries[0] * entries[1], threads, run_task, &call);
    }
    if (status || !problem->sink.object)
        goto done;
    call.compute = compute_dsink;
    status = fa_parallel_for(shape->heads_q, threads, run_task, &call);
done:
    fa_block_map_release(&call.map);
    free(call.rows);
    return status;
}
