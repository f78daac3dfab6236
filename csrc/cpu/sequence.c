#include "sequence.h"

#include "../error.h"

/* What tells the lengths of one side, and where its rows are. */
struct source {
    const char *name; /* "q" */
    const struct fa_tensor *tensor, *cu_seqlens, *seqused;
    const struct fa_tensor *pages; /* NULL: none */
    int max_seqlen;
    int64_t
        rows; /* of the tensor, or of a batch entry, or those that the pages of a sequence have */
};

static struct source queries_of(const struct fa_problem *problem)
{
    const struct fa_tensor *q = &problem->q;
    return (struct source){"q",
                           q,
                           &problem->cu_seqlens_q,
                           &problem->seqused_q,
                           NULL,
                           problem->options.max_seqlen_q,
                           q->shape[q->ndim - 3]};
}

static struct source keys_of(const struct fa_problem *problem)
{
    const struct fa_tensor *k = &problem->k;
    const bool is_paged = problem->shape.page_size != 0;
    return (struct source){"k",
                           k,
                           &problem->cu_seqlens_k,
                           &problem->seqused_k,
                           is_paged ? &problem->page_table : NULL,
                           problem->options.max_seqlen_k,
                           is_paged ? problem->shape.seqlen_k : k->shape[k->ndim - 3]};
}

static int64_t number(const struct fa_tensor *lengths, int64_t i)
{
    return ((const int *)lengths->data)[i];
}

/* The pages of a sequence. */
static const int *pages_of(const struct source *source, int64_t batch)
{
    return (const int *)source->pages->data + batch * source->pages->stride[0];
}

static struct side side_of(const struct source *source, int64_t batch)
{
    const int64_t rows = source->rows;
    struct side side = {.batch = batch, .length = rows};
    if (source->pages) {
        side.pages = pages_of(source, batch);
        side.page_size = source->tensor->shape[1];
    }
    if (source->cu_seqlens->object) {
        side.batch = 0;
        side.begin = clamp(number(source->cu_seqlens, batch), 0, rows);
        side.length = clamp(number(source->cu_seqlens, batch + 1), side.begin, rows) - side.begin;
    }
    if (source->seqused->object)
        side.length = clamp(number(source->seqused, batch), 0, side.length);
    return side;
}

struct sequence fa_sequence(const struct fa_problem *problem, int64_t batch)
{
    const struct source queries = queries_of(problem), keys = keys_of(problem);
    return (struct sequence){side_of(&queries, batch), side_of(&keys, batch)};
}

struct lengths fa_longest(const struct fa_problem *problem)
{
    const struct fa_shape *shape = &problem->shape;
    struct lengths longest = {0, 0};
    if (!shape->is_varlen)
        return (struct lengths){shape->seqlen_q, shape->seqlen_k};
    for (int64_t batch = 0; batch < shape->batch; batch++) {
        const struct sequence sequence = fa_sequence(problem, batch);
        longest.q = max64(longest.q, sequence.q.length);
        longest.k = max64(longest.k, sequence.k.length);
    }
    return longest;
}

/* ---- checks ---------------------------------------------------------------------------------- */

/* Where a packed sequence begins and ends. Returns its length, or -1 with ValueError set. */
static int64_t check_packed(const struct source *source, int64_t batch)
{
    const int64_t begin = number(source->cu_seqlens, batch);
    const int64_t end = number(source->cu_seqlens, batch + 1);
    const char *const name = source->name;
    if (begin < 0 || end < begin)
        fa_raise(PyExc_ValueError,
                 "cu_seqlens_%s must rise from 0 on: sequence %lld begins at %lld and ends at %lld",
                 name, (long long)batch, (long long)begin, (long long)end);
    else if (end > source->rows)
        fa_raise(PyExc_ValueError,
                 "cu_seqlens_%s must end within %s: sequence %lld ends at %lld, the total is %lld",
                 name, name, (long long)batch, (long long)end, (long long)source->rows);
    else if (end - begin > source->max_seqlen)
        fa_raise(PyExc_ValueError,
                 "max_seqlen_%s must not be below any length: sequence %lld has %lld, got %d", name,
                 (long long)batch, (long long)(end - begin), source->max_seqlen);
    else
        return end - begin;
    return -1;
}

/* Whether the pages exist of all keys that queries see. 0, or -1 with ValueError set. */
static int check_pages(const struct fa_problem *problem, int64_t batch)
{
    const struct sequence sequence = fa_sequence(problem, batch);
    const struct range queries = {0, sequence.q.length};
    const int64_t page_size = sequence.k.page_size, count = problem->k.shape[0];
    if (!sequence.k.pages || count_of(queries) == 0)
        return 0;
    const struct range keys = visible_to_any(&problem->shape, &sequence, queries);
    for (int64_t i = keys.begin / page_size; i * page_size < keys.end; i++) {
        const int page = sequence.k.pages[i];
        if (page < 0 || page >= count)
            return fa_raise(PyExc_ValueError,
                            "page_table must have pages from 0 to %lld where a query sees keys: "
                            "page %lld of sequence %lld is %d",
                            (long long)count - 1, (long long)i, (long long)batch, page);
    }
    return 0;
}

static int check_side(const struct source *source, int64_t batch)
{
    const int64_t length = source->cu_seqlens->object ? check_packed(source, batch) : source->rows;
    if (length < 0)
        return -1;
    const int64_t used = source->seqused->object ? number(source->seqused, batch) : length;
    if (used >= 0 && used <= length)
        return 0;
    return fa_raise(PyExc_ValueError,
                    "seqused_%s must be from 0 to the length: sequence %lld has %lld, got %lld",
                    source->name, (long long)batch, (long long)length, (long long)used);
}

int fa_check_sequences(const struct fa_problem *problem)
{
    const struct source queries = queries_of(problem), keys = keys_of(problem);
    const int64_t checked = problem->shape.is_varlen ? problem->shape.batch : 0;
    for (int64_t batch = 0; batch < checked; batch++)
        if (check_side(&queries, batch) < 0 || check_side(&keys, batch) < 0 ||
            check_pages(problem, batch) < 0)
            return -1;
    return 0;
}
