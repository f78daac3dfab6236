/* Attention as it is defined, in the order of the definition. For one query row i of one head:
 *
 *     s_j = scale * q_i . k_j                     then softcap:  s_j = c * tanh(s_j / c)
 *     p_j = exp(s_j) / sum_j exp(s_j)             over the keys that i sees (and the sink's exp)
 *     out_i = sum_j p_j v_j                       lse_i = log(sum_j exp(s_j))
 *
 * One task computes a block of ROWS query rows of one head of one batch entry. It keeps all their
 * scores, so that every step is a whole pass over the keys; K and V pass through a tile of KEYS
 * rows in fp32, converted once for all rows of the block.
 *
 * What a row sees is an interval of keys. The passes walk that interval and nothing else, which is
 * why whatever lies in masked keys (NaN, inf) cannot reach the output, and what lies in visible
 * ones does. */
#include "forward.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "../platform.h"

enum {
    ROWS = 32,  /* query rows of a task */
    KEYS = 64,  /* rows of K or V in the tile */
    LANES = 16, /* partial sums of a dot product; rows are padded with zeros to a multiple of it */
};

struct range {
    int64_t begin, end;
};

struct block { /* what one task works on */
    const struct fa_problem *problem;
    int64_t batch, head, head_kv;
    int64_t first_row;
    int rows;
    int width, width_v;         /* head_dim and head_dim_v, padded */
    struct range visible[ROWS]; /* the keys that each row sees */
    struct range keys;          /* from the first to the last key that any row sees */
    float *Q;                   /* [rows, width] */
    float *tile;                /* [KEYS, width] of K or [KEYS, width_v] of V */
    float *S;                   /* [rows, keys]: the scores, then the probabilities */
    float *O;                   /* [rows, width_v] */
    float *part;                /* [width_v]: one tile's share of a row of O */
    float lse[ROWS];
};

/* ---- Number formats -------------------------------------------------------------------------- */

static float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float from_bfloat16(uint16_t half) { return from_bits((uint32_t)half << 16); }

/* A bfloat16 is the upper half of a float: round the lower half to nearest, ties to even. */
static uint16_t to_bfloat16(float value)
{
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return (uint16_t)(bits >> 16 | 0x40); /* a NaN stays one though its payload is cut */
    }
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* float16 has 5 exponent bits with bias 15 and 10 mantissa bits; float has 8, 127 and 23. */
static const uint32_t REBIAS = (127 - 15) << 23;

static float from_float16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t magnitude = half & 0x7fff;
    if (magnitude < 0x0400) { /* zero and subnormals count in units of 2^-24 */
        return from_bits(sign | to_bits((float)magnitude * 0x1p-24f));
    }
    uint32_t special = magnitude >= 0x7c00 ? REBIAS : 0; /* inf, NaN: on to the largest exponent */
    return from_bits(sign | ((magnitude << 13) + REBIAS + special));
}

static uint16_t to_float16(float value)
{
    uint32_t bits = to_bits(value);
    uint32_t sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00 | (magnitude >> 13 & 0x3ff); /* NaN */
    } else if (magnitude >= to_bits(65520.0f)) {
        half = 0x7c00; /* halfway from the largest float16 to the next power of two, and up: inf */
    } else if (magnitude < to_bits(0x1p-14f)) {
        /* Subnormal: floats in [0.5, 1] are 2^-24 apart, so the addition does the rounding. */
        half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    } else {
        half = (magnitude - REBIAS + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    return (uint16_t)(sign | half);
}

/* ---- Rows of tensors ------------------------------------------------------------------------- */

/* Where the vector [i, j, l, :] starts, in elements. */
static int64_t offset_of(const struct fa_tensor *tensor, int64_t i, int64_t j, int64_t l)
{
    return i * tensor->stride[0] + j * tensor->stride[1] + l * tensor->stride[2];
}

/* n elements from `offset` on as fp32, then zeros up to `width`. */
static void load_row(const struct fa_tensor *tensor, int64_t offset, int n, int width, float *row)
{
    if (tensor->dtype == FA_FLOAT32) {
        memcpy(row, (const float *)tensor->data + offset, (size_t)n * sizeof *row);
    } else {
        const uint16_t *source = (const uint16_t *)tensor->data + offset;
        if (tensor->dtype == FA_BFLOAT16) {
            for (int d = 0; d < n; d++)
                row[d] = from_bfloat16(source[d]);
        } else {
            for (int d = 0; d < n; d++)
                row[d] = from_float16(source[d]);
        }
    }
    for (int d = n; d < width; d++)
        row[d] = 0;
}

static void store_row(const struct fa_tensor *tensor, int64_t offset, int n, const float *row)
{
    if (tensor->dtype == FA_FLOAT32) {
        memcpy((float *)tensor->data + offset, row, (size_t)n * sizeof *row);
        return;
    }
    uint16_t *target = (uint16_t *)tensor->data + offset;
    for (int d = 0; d < n; d++) {
        target[d] = tensor->dtype == FA_BFLOAT16 ? to_bfloat16(row[d]) : to_float16(row[d]);
    }
}

/* Both loops below have an inner loop of constant length without a dependence between its steps:
 * compilers make vector instructions of it without being allowed to reorder sums. */

static float dot(const float *restrict a, const float *restrict b, int width)
{
    float sums[LANES] = {0};
    for (int d = 0; d < width; d += LANES) {
        for (int lane = 0; lane < LANES; lane++)
            sums[lane] += a[d + lane] * b[d + lane];
    }
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; lane++)
            sums[lane] += sums[lane + half];
    }
    return sums[0];
}

static void add_scaled(float *restrict sum, float factor, const float *restrict row, int width)
{
    for (int d = 0; d < width; d += LANES) {
        for (int lane = 0; lane < LANES; lane++)
            sum[d + lane] += factor * row[d + lane];
    }
}

/* ---- What is visible ------------------------------------------------------------------------- */

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t clamp(int64_t value, int64_t low, int64_t high)
{
    return max64(low, min64(value, high));
}

/* The keys that a query row sees: the window around the key on its diagonal, cut to the keys that
 * exist. FA_UNBOUNDED needs no case of its own: in 64 bits it reaches past every end that 32 bits
 * can hold. Both ends only grow with the row, those of empty ranges too. */
static struct range visible_keys(const struct fa_shape *shape, int64_t row)
{
    int64_t diagonal = row + shape->seqlen_k - shape->seqlen_q;
    int64_t begin = clamp(diagonal - shape->window_left, 0, shape->seqlen_k);
    int64_t end = clamp(diagonal + shape->window_right + 1, begin, shape->seqlen_k);
    return (struct range){begin, end};
}

static struct range intersection(struct range a, struct range b)
{
    return (struct range){max64(a.begin, b.begin), min64(a.end, b.end)};
}

/* The rows [begin, end) of K and V that fill the tile from key `from` on, none when all keys of the
 * block are done. Tiles end at multiples of KEYS wherever the block starts. */
static struct range tile_from(const struct block *block, int64_t from)
{
    int64_t begin = max64(from, block->keys.begin);
    return (struct range){begin, min64(begin - begin % KEYS + KEYS, block->keys.end)};
}

/* ---- The steps ------------------------------------------------------------------------------- */

static int64_t key_count(struct range keys) { return keys.end - keys.begin; }

/* The scores of a row; the first one is that of key block->keys.begin. */
static float *scores_of(const struct block *block, int row)
{
    return block->S + row * key_count(block->keys);
}

static void load_queries(struct block *block)
{
    const struct fa_tensor *q = &block->problem->q;
    for (int row = 0; row < block->rows; row++) {
        load_row(q, offset_of(q, block->batch, block->first_row + row, block->head),
                 block->problem->shape.head_dim, block->width, block->Q + row * block->width);
    }
}

static void load_tile(struct block *block, const struct fa_tensor *tensor, struct range keys, int n,
                      int width)
{
    for (int64_t key = keys.begin; key < keys.end; key++) {
        load_row(tensor, offset_of(tensor, block->batch, key, block->head_kv), n, width,
                 block->tile + (key - keys.begin) * width);
    }
}

/* S = softcap(scale * Q K^T) wherever a row sees a key. */
static void compute_scores(struct block *block)
{
    const struct fa_shape *shape = &block->problem->shape;
    struct range tile = tile_from(block, 0);
    for (; tile.begin < tile.end; tile = tile_from(block, tile.end)) {
        load_tile(block, &block->problem->k, tile, shape->head_dim, block->width);
        for (int row = 0; row < block->rows; row++) {
            float *scores = scores_of(block, row);
            struct range keys = intersection(block->visible[row], tile);
            for (int64_t key = keys.begin; key < keys.end; key++) {
                const float *k = block->tile + (key - tile.begin) * block->width;
                float score =
                    shape->softmax_scale * dot(block->Q + row * block->width, k, block->width);
                if (shape->softcap > 0)
                    score = shape->softcap * tanhf(score / shape->softcap);
                scores[key - block->keys.begin] = score;
            }
        }
    }
}

/* Turns a row's scores into probabilities; returns the row's lse. `sink` is -inf where there is
 * none: an extra score that takes its share of the sum and has no value. */
static float softmax(float *scores, int64_t count, float sink)
{
    float max = sink;
    for (int64_t n = 0; n < count; n++) {
        if (scores[n] > max)
            max = scores[n];
    }
    if (max == -INFINITY)
        max = 0; /* nothing to sum up: all terms below become 0, not NaN */

    float sums[LANES] = {expf(sink - max)};
    for (int64_t n = 0; n < count; n++) {
        scores[n] = expf(scores[n] - max);
        sums[n % LANES] += scores[n];
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++)
        sum += sums[lane];

    float divisor = sum == 0 ? 1 : sum; /* a row without any weight gives 0 */
    for (int64_t n = 0; n < count; n++)
        scores[n] /= divisor;
    return max + logf(sum);
}

static void compute_softmax(struct block *block)
{
    const struct fa_tensor *sinks = &block->problem->sink;
    float sink = -INFINITY;
    if (sinks->object != NULL) {
        load_row(sinks, block->head * sinks->stride[0], 1, 1, &sink);
    }
    for (int row = 0; row < block->rows; row++) {
        struct range keys = block->visible[row];
        float *scores = scores_of(block, row) + (keys.begin - block->keys.begin);
        block->lse[row] = softmax(scores, key_count(keys), sink);
    }
}

/* Adds to a row of O what the keys of the tile give it. They are summed up on their own first: a
 * sum of short sums is rounded far less than one long sum. */
static void weigh_tile(struct block *block, struct range tile, int row)
{
    const int width = block->width_v;
    const float *probabilities = scores_of(block, row);
    struct range keys = intersection(block->visible[row], tile);
    for (int d = 0; d < width; d++)
        block->part[d] = 0;
    for (int64_t key = keys.begin; key < keys.end; key++) {
        const float *v = block->tile + (key - tile.begin) * width;
        add_scaled(block->part, probabilities[key - block->keys.begin], v, width);
    }
    add_scaled(block->O + row * width, 1, block->part, width);
}

/* O = P V, over the keys that each row sees. */
static void weigh_values(struct block *block)
{
    int head_dim_v = block->problem->shape.head_dim_v;
    memset(block->O, 0, (size_t)(block->rows * block->width_v) * sizeof *block->O);
    struct range tile = tile_from(block, 0);
    for (; tile.begin < tile.end; tile = tile_from(block, tile.end)) {
        load_tile(block, &block->problem->v, tile, head_dim_v, block->width_v);
        for (int row = 0; row < block->rows; row++)
            weigh_tile(block, tile, row);
    }
}

static void store(const struct block *block)
{
    const struct fa_problem *problem = block->problem;
    for (int row = 0; row < block->rows; row++) {
        int64_t i = block->first_row + row;
        store_row(&problem->out, offset_of(&problem->out, block->batch, i, block->head),
                  problem->shape.head_dim_v, block->O + row * block->width_v);
        if (problem->lse.object != NULL) {
            store_row(&problem->lse, offset_of(&problem->lse, block->batch, block->head, i), 1,
                      &block->lse[row]);
        }
    }
}

/* ---- Tasks ----------------------------------------------------------------------------------- */

struct call {
    const struct fa_problem *problem;
    atomic_bool out_of_memory;
};

static int64_t row_blocks(const struct fa_shape *shape)
{
    return ((int64_t)shape->seqlen_q + ROWS - 1) / ROWS;
}

static int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

/* Block `index` of [batch, heads_q, row_blocks]. */
static struct block locate(const struct fa_problem *problem, int64_t index)
{
    const struct fa_shape *shape = &problem->shape;
    int64_t head_index = index / row_blocks(shape);
    struct block block = {
        .problem = problem,
        .batch = head_index / shape->heads_q,
        .head = head_index % shape->heads_q,
        .first_row = index % row_blocks(shape) * ROWS,
        .width = padded(shape->head_dim),
        .width_v = padded(shape->head_dim_v),
    };
    block.head_kv = block.head / (shape->heads_q / shape->heads_kv);
    block.rows = (int)min64(ROWS, shape->seqlen_q - block.first_row);
    for (int row = 0; row < block.rows; row++)
        block.visible[row] = visible_keys(shape, block.first_row + row);
    block.keys = (struct range){block.visible[0].begin, block.visible[block.rows - 1].end};
    return block;
}

static void compute_block(void *context, int64_t index)
{
    struct call *call = context;
    if (atomic_load(&call->out_of_memory))
        return;

    struct block block = locate(call->problem, index);
    int64_t q_size = block.rows * block.width;
    int64_t tile_size = KEYS * max64(block.width, block.width_v);
    int64_t o_size = block.rows * block.width_v;
    int64_t s_size = block.rows * key_count(block.keys);
    int64_t count = q_size + tile_size + o_size + block.width_v + s_size;
    float *memory = malloc((size_t)count * sizeof *memory);
    if (memory == NULL) {
        atomic_store(&call->out_of_memory, true);
        return;
    }
    block.Q = memory;
    block.tile = block.Q + q_size;
    block.O = block.tile + tile_size;
    block.part = block.O + o_size;
    block.S = block.part + block.width_v;

    load_queries(&block);
    compute_scores(&block);
    compute_softmax(&block);
    weigh_values(&block);
    store(&block);
    free(memory);
}

int fa_cpu_forward(const struct fa_problem *problem, int threads)
{
    const struct fa_shape *shape = &problem->shape;
    struct call call = {.problem = problem};
    int64_t tasks = shape->batch * row_blocks(shape) * shape->heads_q;
    fa_parallel_for(tasks, threads, compute_block, &call);
    return atomic_load(&call.out_of_memory) ? -1 : 0;
}
