/* Attention as it is defined, in the order of the definition. For one query row i of one head:
 *
 *     s_j = scale * q_i . k_j                     then softcap:  s_j = c * tanh(s_j / c)
 *                                                 then ALiBi:    s_j -= slope * |distance|
 *                                                 then the bias: s_j += bias_ij
 *     p_j = exp(s_j) / sum_j exp(s_j)             over the keys that i sees (and the sink's exp)
 *     out_i = sum_j p_j v_j                       lse_i = log(sum_j exp(s_j))
 *
 * where dropout makes some p_j of out_i 0, and the others larger.
 *
 * One task computes a block of ROWS query rows of one head of one sequence. It keeps all their
 * scores, so that every step is a whole pass over the keys; K and V pass through a tile of KEYS
 * rows in fp32, converted once for all rows of the block.
 *
 * What a row sees is an interval of keys, or those of it that listed blocks have. The passes walk
 * that interval and nothing else, and scores of blocks that are not listed are -inf, which is
 * why whatever lies in masked keys (NaN, inf) cannot reach the output, and what lies in visible
 * ones does. */
#include "forward.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "block_map.h"
#include "rows.h"
#include "scores.h"

enum {
    ROWS = 32, /* query rows of a task */
    KEYS = 64, /* rows of K or V in the tile */
};

struct block { /* what one task works on */
    const struct fa_problem *problem;
    struct sequence sequence;
    int64_t head, head_kv;
    struct range rows, keys; /* the keys from the first to the last one that any row sees */
    int width, width_v;      /* head_dim and head_dim_v, padded */
    float *Q;                /* [rows, width] */
    float *tile;             /* [KEYS, width] of K or [KEYS, width_v] of V */
    double *S;               /* [rows, keys]: the scores */
    float *O;                /* [rows, width_v] */
    float *part;             /* [width_v]: one tile's share of a row of O */
    struct dropout dropout;
    struct softmax *softmax; /* [rows] */
    const struct fa_block_map *map;
    struct fa_worker *worker;
};

/* ---- The steps ------------------------------------------------------------------------------- */

/* The scores of a row; the first one is that of key block->keys.begin. */
static double *scores_of(const struct block *block, int64_t row)
{
    return block->S + (row - block->rows.begin) * count_of(block->keys);
}

static struct range keys_of(const struct block *block, int64_t row)
{
    return visible_keys(&block->problem->shape, &block->sequence, row);
}

/* Whether a pair within a row's keys is in a block that the call lists. */
static bool is_listed(const struct block *block, int64_t row, int64_t key)
{
    return fa_is_listed(block->map, block->sequence.number, block->head, row, key);
}

/* The keys of the block that pass through the tile next, from key `from` on. */
static struct range next_tile(const struct block *block, int64_t from)
{
    return tile_from(block->keys, from, KEYS);
}

/* Rows in e4m3 times their factor. */
static void scale_rows(const struct block *block, const struct fa_tensor *tensor,
                       const struct fa_tensor *descale, struct range rows, float *matrix)
{
    const int width = fa_width((int)tensor->shape[tensor->ndim - 1]);
    if (tensor->dtype != FA_FLOAT8_E4M3)
        return;
    const float factor = fa_descale(descale, block->sequence.number, block->head_kv);
    for (int64_t i = 0; i < count_of(rows) * width; i++)
        matrix[i] *= factor;
}

static void load_queries(struct block *block)
{
    const struct fa_problem *problem = block->problem;
    fa_load_rows(&problem->q, block->sequence.q, block->rows, block->head, block->Q);
    scale_rows(block, &problem->q, &problem->q_descale, block->rows, block->Q);
}

/* Rows of K or V into the tile. */
static void load_tile(struct block *block, const struct fa_tensor *tensor,
                      const struct fa_tensor *descale, struct range tile)
{
    fa_load_rows(tensor, block->sequence.k, tile, block->head_kv, block->tile);
    scale_rows(block, tensor, descale, tile, block->tile);
}

/* Whether a loop over tiles goes on with this one. */
static bool is_next(const struct block *block, struct range tile)
{
    return count_of(tile) > 0 && !fa_has_ended(block->worker);
}

/* S = softcap(scale * Q K^T) wherever a row sees a key. */
static void compute_scores(struct block *block)
{
    const struct fa_problem *problem = block->problem;
    const struct addends addends = addends_of(problem, &block->sequence, block->head);
    struct range tile = next_tile(block, 0);
    for (; is_next(block, tile); tile = next_tile(block, tile.end)) {
        load_tile(block, &problem->k, &problem->k_descale, tile);
        for (int64_t row = block->rows.begin; row < block->rows.end; row++) {
            const float *q = block->Q + (row - block->rows.begin) * block->width;
            double *scores = scores_of(block, row);
            struct range keys = intersection(keys_of(block, row), tile);
            for (int64_t key = keys.begin; key < keys.end; key++) {
                const float *k = block->tile + (key - tile.begin) * block->width;
                const double addend = addend_of(&addends, row, key);
                scores[key - block->keys.begin] = is_listed(block, row, key)
                                                      ? score_of(&problem->shape, q, k, addend)
                                                      : -INFINITY;
            }
        }
    }
}

static void compute_softmax(struct block *block)
{
    const float sink = sink_of(block->problem, block->head);
    for (int64_t row = block->rows.begin; row < block->rows.end && !fa_has_ended(block->worker);
         row++) {
        struct range keys = keys_of(block, row);
        const double *scores = scores_of(block, row) + (keys.begin - block->keys.begin);
        block->softmax[row - block->rows.begin] = softmax_of(scores, count_of(keys), sink);
    }
}

/* Adds to a row of O what the keys of the tile give it. They are summed up on their own first: a
 * sum of short sums is rounded far less than one long sum. */
static void weigh_tile(struct block *block, struct range tile, int64_t row)
{
    const int width = block->width_v;
    const double *scores = scores_of(block, row);
    const struct softmax softmax = block->softmax[row - block->rows.begin];
    struct range keys = intersection(keys_of(block, row), tile);
    for (int d = 0; d < width; d++)
        block->part[d] = 0;
    for (int64_t key = keys.begin; key < keys.end; key++) {
        const float *v = block->tile + (key - tile.begin) * width;
        if (!is_listed(block, row, key))
            continue;
        const double score = scores[key - block->keys.begin];
        const float weight = block->problem->shape.is_q_e4m3 ? narrow_weight_of(softmax, score)
                                                             : weight_of(softmax, score);
        fa_add_scaled(block->part, weight * dropout_factor(&block->dropout, row, key), v, width);
    }
    fa_add_scaled(block->O + (row - block->rows.begin) * width, 1, block->part, width);
}

/* O = P V, over the keys that each row sees. */
static void weigh_values(struct block *block)
{
    memset(block->O, 0, (size_t)(count_of(block->rows) * block->width_v) * sizeof *block->O);
    struct range tile = next_tile(block, 0);
    for (; is_next(block, tile); tile = next_tile(block, tile.end)) {
        load_tile(block, &block->problem->v, &block->problem->v_descale, tile);
        for (int64_t row = block->rows.begin; row < block->rows.end; row++)
            weigh_tile(block, tile, row);
    }
}

static void store(const struct block *block)
{
    const struct fa_tensor *out = &block->problem->out, *lse = &block->problem->lse;
    fa_store_rows(out, block->sequence.q, block->rows, block->head, block->O);
    for (int64_t row = block->rows.begin; lse->object != NULL && row < block->rows.end; row++) {
        const float value = lse_of(block->softmax[row - block->rows.begin]);
        fa_store_row(lse, fa_lse_offset(lse, block->sequence.q, row, block->head), 1, &value);
    }
}

/* ---- Tasks ----------------------------------------------------------------------------------- */

struct call {
    const struct fa_problem *problem;
    int64_t row_blocks; /* of the longest sequence */
    struct fa_block_map map;
};

/* Block `index` of [batch, heads_q, row_blocks]; it has no rows where its sequence is shorter. */
static struct block locate(const struct call *call, int64_t index)
{
    const struct fa_problem *problem = call->problem;
    const struct fa_shape *shape = &problem->shape;
    const int64_t head_index = index / call->row_blocks;
    struct block block = {
        .problem = problem,
        .map = &call->map,
        .sequence = fa_sequence(problem, head_index / shape->heads_q),
        .head = head_index % shape->heads_q,
        .width = fa_width(shape->head_dim),
        .width_v = fa_width(shape->head_dim_v),
    };
    block.head_kv = block.head / fa_heads_per_kv(shape);
    block.dropout = dropout_of(problem, block.sequence.number, block.head);
    block.rows = tile_from((struct range){0, block.sequence.q.length},
                           index % call->row_blocks * ROWS, ROWS);
    block.keys = visible_to_any(shape, &block.sequence, block.rows);
    return block;
}

static int compute_block(void *context, int64_t index, struct fa_worker *worker)
{
    struct block block = locate(context, index);
    const int64_t rows = count_of(block.rows);
    if (rows <= 0)
        return 0;
    const int64_t tile_size = KEYS * max64(block.width, block.width_v);
    enum { DOUBLES = sizeof(struct softmax) / sizeof(double) };
    const int64_t doubles = rows * (count_of(block.keys) + DOUBLES); /* S and softmax */
    const int64_t floats = rows * (block.width + block.width_v) + tile_size + block.width_v;
    double *memory = malloc((size_t)doubles * sizeof(double) + (size_t)floats * sizeof(float));
    if (memory == NULL)
        return FA_OUT_OF_MEMORY;
    block.worker = worker;
    block.softmax = (struct softmax *)memory;
    block.S = memory + DOUBLES * rows;
    block.Q = (float *)(memory + doubles);
    block.tile = block.Q + rows * block.width;
    block.O = block.tile + tile_size;
    block.part = block.O + rows * block.width_v;

    load_queries(&block);
    compute_scores(&block);
    compute_softmax(&block);
    weigh_values(&block);
    if (!fa_has_ended(worker))
        store(&block);
    free(memory);
    return 0;
}

/* Rows that no sequence has: 0, and an lse of -inf. Those of sequences are overwritten. */
static void fill_rows(const struct fa_problem *problem)
{
    static const float zeros[FA_MAX_HEAD_DIM], nothing = -INFINITY;
    const struct fa_shape *shape = &problem->shape;
    const struct fa_tensor *out = &problem->out, *lse = &problem->lse;
    struct side all = {.length = shape->is_packed_q ? shape->total_q : shape->seqlen_q};
    for (; all.batch < (shape->is_packed_q ? 1 : shape->batch); all.batch++)
        for (int64_t head = 0; head < shape->heads_q; head++)
            for (int64_t row = 0; row < all.length; row++) {
                fa_store_row(out, fa_row_offset(out, all, row, head), shape->head_dim_v, zeros);
                if (lse->object)
                    fa_store_row(lse, fa_lse_offset(lse, all, row, head), 1, &nothing);
            }
}

int fa_cpu_forward(const struct fa_problem *problem, struct fa_threads *threads)
{
    const struct fa_shape *shape = &problem->shape;
    struct call call = {problem, (fa_longest(problem).q + ROWS - 1) / ROWS, {0}};
    const int64_t tasks = shape->batch * call.row_blocks * shape->heads_q;
    if (shape->is_varlen)
        fill_rows(problem);
    int status = fa_block_map_make(&problem->key_blocks, true, &call.map);
    if (status == 0)
        status = fa_parallel_for(tasks, threads, compute_block, &call);
    fa_block_map_release(&call.map);
    return status;
}
