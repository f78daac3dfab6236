#include "overlap.h"

#include <stdlib.h>

#include "arithmetic.h"

/* A tensor as runs of contiguous bytes: runs start at its begin plus multiples of the steps. */
struct runs {
    int64_t length; /* of a run, in bytes */
    int64_t period; /* all steps are multiples of it; 0: there is one run */
    bool overlaps;  /* runs may share bytes */
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

/* The dimensions that have steps, the smallest first. */
static int sorted_dimensions(const struct fa_tensor *tensor, struct dimension *dimensions)
{
    const int64_t element = fa_element_bytes(tensor->dtype);
    int count = 0;
    for (int i = 0; i < tensor->ndim; i++) {
        const int64_t size = tensor->shape[i];
        if (size <= 1)
            continue; /* its stride may be any number */
        const int64_t step = tensor->stride[i] * element;
        dimensions[count++] = (struct dimension){size, step < 0 ? -step : step};
    }
    qsort(dimensions, (size_t)count, sizeof *dimensions, by_step);
    return count;
}

static struct runs runs_of(const struct fa_tensor *tensor)
{
    struct dimension dimensions[FA_MAX_NDIM];
    struct runs runs = {.length = fa_element_bytes(tensor->dtype)};
    const int count = sorted_dimensions(tensor, dimensions);
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
    return runs;
}

bool fa_tensors_overlap(const struct fa_tensor *a, const struct fa_tensor *b)
{
    if (a->end <= b->begin || b->end <= a->begin)
        return false;
    const struct runs x = runs_of(a), y = runs_of(b);
    /* Both repeat with one period, say the row of a packed tensor: their places in it decide. */
    const int64_t period = greatest_common_divisor(x.period, y.period);
    if (period == 0)
        return true;
    const int64_t distance =
        (int64_t)(b->begin % (uintptr_t)period) - (int64_t)(a->begin % (uintptr_t)period);
    const int64_t ahead = distance < 0 ? distance + period : distance; /* from a's run to b's */
    return !(x.length <= ahead && y.length <= period - ahead);
}

bool fa_tensor_overlaps_itself(const struct fa_tensor *tensor)
{
    return !fa_tensor_is_empty(tensor) && runs_of(tensor).overlaps;
}
