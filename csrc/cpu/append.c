/* Row i that is new to sequence b becomes row cache_seqlens[b] + i of its cache, which is also its
 * position. A pair of dims (x, y) of a row at position p is rotated by the angle of the tables:
 *
 *     (x cos[p, pair] - y sin[p, pair], y cos[p, pair] + x sin[p, pair])
 */
#include "append.h"

#include <stdlib.h>

#include "rows.h"
#include "sequence.h"

/* ---- rows ------------------------------------------------------------------------------------ */

/* The angles of a position; of the last one if there are not so many. */
struct rotation {
    float cos[FA_MAX_HEAD_DIM / 2], sin[FA_MAX_HEAD_DIM / 2];
    int dim; /* of a row are rotated */
    bool is_interleaved;
};

static struct rotation rotation_of(const struct fa_problem *problem, int64_t position)
{
    const struct fa_append *append = &problem->append;
    struct rotation rotation = {.dim = fa_rotary_dim(append),
                                .is_interleaved = problem->options.rotary_interleaved};
    if (rotation.dim == 0)
        return rotation;
    const int64_t row = min64(position, append->cos.shape[0] - 1);
    const int pairs = rotation.dim / 2;
    fa_load_row(&append->cos, row * append->cos.stride[0], pairs, pairs, rotation.cos);
    fa_load_row(&append->sin, row * append->sin.stride[0], pairs, pairs, rotation.sin);
    return rotation;
}

static void rotate(const struct rotation *rotation, float *row)
{
    const int pairs = rotation->dim / 2;
    for (int pair = 0; pair < pairs; pair++) {
        float *x = &row[rotation->is_interleaved ? 2 * pair : pair];
        float *y = x + (rotation->is_interleaved ? 1 : pairs);
        const float cos = rotation->cos[pair], sin = rotation->sin[pair];
        const float rotated = *x * cos - *y * sin;
        *y = *y * cos + *x * sin;
        *x = rotated;
    }
}

/* Where a row of all heads is. */
struct place {
    const struct fa_tensor *tensor;
    struct side side;
    int64_t row;
};

/* `descale`, where the rows become e4m3: what they are divided by. */
static void move_row(struct place from, struct place to, const struct rotation *rotation,
                     const struct fa_tensor *descale, int64_t number)
{
    const int n = (int)from.tensor->shape[from.tensor->ndim - 1];
    const int64_t heads = from.tensor->shape[from.tensor->ndim - 2];
    float row[FA_MAX_HEAD_DIM];
    for (int64_t head = 0; head < heads; head++) {
        fa_load_row(from.tensor, fa_row_offset(from.tensor, from.side, from.row, head), n, n, row);
        if (rotation)
            rotate(rotation, row);
        const float factor = descale ? 1 / fa_descale(descale, number, head) : 1;
        for (int d = 0; d < n; d++)
            row[d] *= factor;
        fa_store_row(to.tensor, fa_row_offset(to.tensor, to.side, to.row, head), n, row);
    }
}

/* Rows that the cache of a sequence holds before. */
static int64_t held_rows(const struct fa_problem *problem, int64_t batch)
{
    const int64_t held = problem->seqused_k.object ? ((const int *)problem->seqused_k.data)[batch]
                                                   : problem->append.cache_seqlen;
    /* Checked before, but other threads may write to the lengths meanwhile. */
    return clamp(held, 0, problem->shape.seqlen_k - problem->append.k.shape[1]);
}

static void append_rows(const struct fa_problem *problem, const struct fa_cpu_append *append,
                        int64_t batch, int64_t held)
{
    const int64_t rows = problem->append.k.shape[1];
    struct side cache = fa_sequence(&append->problem, batch).k;
    const struct side new = {.batch = batch};
    const struct fa_tensor *k_descale = problem->shape.is_e4m3 ? &problem->k_descale : NULL;
    const struct fa_tensor *v_descale = problem->shape.is_e4m3 ? &problem->v_descale : NULL;
    cache.begin = 0; /* whatever its first key is */
    for (int64_t row = 0; row < rows; row++) {
        const struct rotation rotation = rotation_of(problem, held + row);
        move_row((struct place){&problem->append.k, new, row},
                 (struct place){&problem->k, cache, held + row}, &rotation, k_descale, batch);
        move_row((struct place){&problem->append.v, new, row},
                 (struct place){&problem->v, cache, held + row}, NULL, v_descale, batch);
    }
}

static void rotate_queries(const struct fa_problem *problem, const struct fa_cpu_append *append,
                           int64_t batch, int64_t held)
{
    const struct side side = fa_sequence(problem, batch).q;
    const bool advances = fa_queries_advance(&problem->shape);
    for (int64_t row = 0; row < side.length; row++) {
        const struct rotation rotation = rotation_of(problem, held + (advances ? row : 0));
        move_row((struct place){&problem->q, side, row},
                 (struct place){&append->problem.q, side, row}, &rotation, NULL, batch);
    }
}

/* ---- the interface --------------------------------------------------------------------------- */

/* q of the attention, where it is rotated: contiguous, in new memory. False where there is none. */
static bool allocate_q(const struct fa_problem *problem, struct fa_cpu_append *append)
{
    struct fa_tensor *q = &append->problem.q;
    int64_t elements = 1;
    if (!problem->append.cos.object)
        return true;
    for (int i = q->ndim - 1; i >= 0; i--) {
        q->stride[i] = elements;
        elements *= q->shape[i];
    }
    q->data = append->rotated_q =
        calloc((size_t)elements + 1, (size_t)fa_element_bytes(problem->q.dtype));
    return q->data != NULL;
}

int fa_cpu_append_begin(const struct fa_problem *problem, struct fa_cpu_append *append)
{
    *append = (struct fa_cpu_append){.problem = *problem};
    append->seqused_k = malloc((size_t)(problem->shape.batch + 1) * sizeof *append->seqused_k);
    append->problem.seqused_k =
        (struct fa_tensor){.object = problem->q.object, .data = append->seqused_k};
    if (append->seqused_k && allocate_q(problem, append))
        return 0;
    fa_cpu_append_end(append);
    return FA_OUT_OF_MEMORY;
}

void fa_cpu_append(const struct fa_problem *problem, const struct fa_cpu_append *append)
{
    for (int64_t batch = 0; batch < problem->shape.batch; batch++) {
        const int64_t held = held_rows(problem, batch);
        append->seqused_k[batch] = (int)(held + problem->append.k.shape[1]);
        append_rows(problem, append, batch, held);
        if (append->rotated_q)
            rotate_queries(problem, append, batch, held);
    }
}

void fa_cpu_append_end(struct fa_cpu_append *append)
{
    free(append->seqused_k);
    free(append->rotated_q);
}
