#include "sequence.h"

#include "../error.h"

/* What tells the lengths of one side, and where its rows are. */
struct source {
    const char *name; /* "q" */
    const struct fa_tensor *tensor, *cu_seqlens, *seqused;
    const struct fa_tensor *pages; /* NULL: none */
    int max_seqlen;
    int64_t rows; /* of the tensor, or of a batch entry, or for which a sequence has pages */
    /* Of caches, else object NULL and 0: */
    const struct fa_tensor *leftpad;
    int64_t new_rows; /* that the call appends to those in use */
    const char *seqused_name, *pages_name;
};

static struct source queries_of(const struct fa_problem *problem)
{
    const struct fa_tensor *q = &problem->q;
    static const struct fa_tensor none;
    return (struct source){.name = "q",
                           .tensor = q,
                           .cu_seqlens = &problem->cu_seqlens_q,
                           .seqused = &problem->seqused_q,
                           .max_seqlen = problem->options.max_seqlen_q,
                           .rows = q->shape[q->ndim - 3],
                           .leftpad = &none,
                           .seqused_name = "seqused_q"};
}

static struct source keys_of(const struct fa_problem *problem)
{
    const struct fa_shape *shape = &problem->shape;
    const bool appends = problem->append.k.object && problem->seqused_k.object;
    return (struct source){
        .name = "k",
        .tensor = &problem->k,
        .cu_seqlens = &problem->cu_seqlens_k,
        .seqused = &problem->seqused_k,
        .pages = shape->page_size ? &problem->page_table : NULL,
        .max_seqlen = problem->options.max_seqlen_k,
        .rows = shape->is_packed_k ? shape->total_k : shape->seqlen_k,
        .leftpad = &problem->leftpad_k,
        .new_rows = appends ? problem->append.k.shape[1] : 0,
        .seqused_name = problem->is_cache ? "cache_seqlens" : "seqused_k",
        .pages_name = problem->options.cache_batch_idx ? "cache_batch_idx" : "page_table",
    };
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
    if (source->leftpad->object) {
        const int64_t pad = clamp(number(source->leftpad, batch), 0, side.length);
        side.begin += pad;
        side.length -= pad;
    }
    return side;
}

struct sequence fa_sequence(const struct fa_problem *problem, int64_t batch)
{
    const struct source queries = queries_of(problem), keys = keys_of(problem);
    return (struct sequence){batch, side_of(&queries, batch), side_of(&keys, batch)};
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

/* Whether the pages of some rows of a sequence exist. 0, or -1 with ValueError set. */
static int check_pages_of_rows(const struct source *source, int64_t batch, struct range rows)
{
    const int64_t page_size = source->tensor->shape[1], count = source->tensor->shape[0];
    const int *pages = pages_of(source, batch);
    if (count_of(rows) == 0)
        return 0;
    for (int64_t i = rows.begin / page_size; i * page_size < rows.end; i++)
        if (pages[i] < 0 || pages[i] >= count)
            return fa_raise(PyExc_ValueError,
                            "%s must have pages from 0 to %lld where keys are used: page %lld of "
                            "sequence %lld is %d",
                            source->pages_name, (long long)count - 1, (long long)i,
                            (long long)batch, pages[i]);
    return 0;
}

/* The same of the keys that queries see, and of the rows that the call appends. */
static int check_pages(const struct fa_problem *problem, const struct source *keys, int64_t batch)
{
    const struct fa_tensor *appended = &problem->append.k;
    struct sequence sequence = fa_sequence(problem, batch);
    sequence.k.length += keys->new_rows;
    const struct range queries = {0, sequence.q.length};
    const int64_t begin = sequence.k.begin, end = begin + sequence.k.length;
    const struct range written = {appended->object ? end - appended->shape[1] : end, end};
    struct range seen = {0, 0};
    if (count_of(queries) > 0)
        seen = visible_to_any(&problem->shape, &sequence, queries);
    seen = (struct range){begin + seen.begin, begin + seen.end};
    return check_pages_of_rows(keys, batch, seen) < 0 ? -1
                                                      : check_pages_of_rows(keys, batch, written);
}

static int check_leftpad(const struct source *source, int64_t batch, int64_t used)
{
    const int64_t pad = number(source->leftpad, batch);
    if (pad >= 0 && pad <= used)
        return 0;
    return fa_raise(PyExc_ValueError,
                    "cache_leftpad must be from 0 to the rows in use: sequence %lld has %lld, got "
                    "%lld",
                    (long long)batch, (long long)used, (long long)pad);
}

static int check_side(const struct source *source, int64_t batch)
{
    const int64_t length = source->cu_seqlens->object ? check_packed(source, batch) : source->rows;
    if (length < 0)
        return -1;
    const int64_t used = source->seqused->object ? number(source->seqused, batch) : length;
    if (used < 0 || used > length - source->new_rows)
        return fa_raise(
            PyExc_ValueError, "%s must be from 0 to %s: sequence %lld has %lld, got %lld",
            source->seqused_name, source->new_rows ? "what leaves room for new rows" : "the length",
            (long long)batch, (long long)(length - source->new_rows), (long long)used);
    return source->leftpad->object ? check_leftpad(source, batch, used + source->new_rows) : 0;
}

int fa_check_sequences(const struct fa_problem *problem)
{
    const struct source queries = queries_of(problem), keys = keys_of(problem);
    const int64_t checked = problem->shape.is_varlen ? problem->shape.batch : 0;
    for (int64_t batch = 0; batch < checked; batch++)
        if (check_side(&queries, batch) < 0 || check_side(&keys, batch) < 0 ||
            (keys.pages && check_pages(problem, &keys, batch) < 0))
            return -1;
    return 0;
}
