/* What C has no operators for. */
#ifndef FA_ARITHMETIC_H
#define FA_ARITHMETIC_H

#include <stdint.h>

/* Arguments are evaluated twice. */
#define MIN(a, b)      ((a) < (b) ? (a) : (b))
#define MAX(a, b)      ((a) > (b) ? (a) : (b))
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))

/* Of numbers that are not negative: INT64_MAX where the result does not fit. */
static inline int64_t fa_saturating_add(int64_t a, int64_t b)
{
    return a <= INT64_MAX - b ? a + b : INT64_MAX;
}

static inline int64_t fa_saturating_multiply(int64_t a, int64_t b)
{
    if (a <= INT32_MAX && b <= INT32_MAX)
        return a * b; /* without the division, which takes longer than all else of a shape */
    return b == 0 || a <= INT64_MAX / b ? a * b : INT64_MAX;
}

#endif
