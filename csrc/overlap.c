#include "overlap.h"

#include <stdlib.h>

#include "arithmetic.h"

/* A tensor as runs of contiguous bytes: runs start at `begin` plus multiples of the steps. */
struct runs {
    uintptr_t begin, end; /* all of its bytes lie in between */
    int64_t length;       /* of a run, in bytes */
    int64_t period;       /* all steps are multiples of it; 0: there is one run */
    bool overlaps;        /* runs may share bytes */
};

struct dimension {
    int64_t size, step; /* in bytes */
};

static int by_step(const void *a, const void *b)
{
    const struct dimension *x = a, *y = b;
    return (x->step > y->step) - (x->step < y->step);
}

static int64_t greatest_common_divisor(int64_t a, int64_t b)
{
    while (b) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* The dimensions that have steps, the smallest first; `begin` moves to the first byte. */
static int sorted_dimensions(const struct fa_tensor *tensor, struct dimension *dimensions,
                             uintptr_t *begin)
{
    const int64_t element = (int64_t)fa_dtype_size(tensor->dtype);
    int count = 0;
    *begin = (uintptr_t)tensor->data;
    for (int i = 0; i < tensor->ndim; i++) {
        const int64_t size = tensor->shape[i];
        if (size <= 1)
            continue; /* its stride may be any number */
        const int64_t step = tensor->stride[i] * element;
        if (step < 0)
            *begin -= (uintptr_t)(-step * (size - 1));
        dimensions[count++] = (struct dimension){size, step < 0 ? -step : step};
    }
    qsort(dimensions, (size_t)count, sizeof *dimensions, by_step);
    return count;
}

static struct runs runs_of(const struct fa_tensor *tensor)
{
    struct dimension dimensions[FA_MAX_NDIM];
    struct runs runs = {.length = (int64_t)fa_dtype_size(tensor->dtype)};
    const int count = sorted_dimensions(tensor, dimensions, &runs.begin);
    int64_t reach = runs.length; /* bytes from the first to behind the last so far */
    for (int i = 0; i < count; i++) {
        const struct dimension *dimension = &dimensions[i];
        runs.overlaps |= dimension->step < reach;
        if (runs.period == 0 && dimension->step == runs.length)
            runs.length *= dimension->size;
        else
            runs.period = greatest_common_divisor(runs.period, dimension->step);
        reach += dimension->step * (dimension->size - 1);
    }
    runs.end = runs.begin + (uintptr_t)reach;
    return runs;
}

static bool is_empty(const struct fa_tensor *tensor)
{
    for (int i = 0; i < tensor->ndim; i++)
        if (tensor->shape[i] == 0)
            return true;
    return false;
}

bool fa_tensors_overlap(const struct fa_tensor *a, const struct fa_tensor *b)
{
    if (is_empty(a) || is_empty(b))
        return false;
    const struct runs x = runs_of(a), y = runs_of(b);
    if (x.end <= y.begin || y.end <= x.begin)
        return false;
    /* Both repeat with one period, say the row of a packed tensor: their places in it decide. */
    const int64_t period = greatest_common_divisor(x.period, y.period);
    if (period == 0)
        return true;
    const int64_t distance =
        (int64_t)(y.begin % (uintptr_t)period) - (int64_t)(x.begin % (uintptr_t)period);
    const int64_t ahead = distance < 0 ? distance + period : distance; /* from x's run to y's */
    return !(x.length <= ahead && y.length <= period - ahead);
}

bool fa_tensor_overlaps_itself(const struct fa_tensor *tensor)
{
    return !is_empty(tensor) && runs_of(tensor).overlaps;
}
