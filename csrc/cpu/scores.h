/* Which keys a query row sees, and with what scores: what the backward recomputes of the forward.
 */
#ifndef FA_CPU_SCORES_H
#define FA_CPU_SCORES_H

#include <math.h>

#include "../problem.h"
#include "rows.h"

/* The keys that a query row sees: the window around the key on its diagonal, cut to the keys that
 * exist. FA_UNBOUNDED needs no case of its own: in 64 bits it reaches past every end that 32 bits
 * can hold. Both ends only grow with the row, those of empty ranges too. */
static inline struct range visible_keys(const struct fa_shape *shape, int64_t row)
{
    int64_t diagonal = row + shape->seqlen_k - shape->seqlen_q;
    int64_t begin = clamp(diagonal - shape->window_left, 0, shape->seqlen_k);
    int64_t end = clamp(diagonal + shape->window_right + 1, begin, shape->seqlen_k);
    return (struct range){begin, end};
}

/* From the first to the last key that any of the rows sees. */
static inline struct range visible_to_any(const struct fa_shape *shape, struct range rows)
{
    return (struct range){visible_keys(shape, rows.begin).begin,
                          visible_keys(shape, rows.end - 1).end};
}

/* s = softcap(scale * q . k) of two rows in fp32. */
static inline float score_of(const struct fa_shape *shape, const float *q, const float *k)
{
    float score = shape->softmax_scale * fa_dot(q, k, fa_width(shape->head_dim));
    return shape->softcap > 0 ? shape->softcap * tanhf(score / shape->softcap) : score;
}

/* The score of a head's sink, -inf where there is none: a score that takes its share of the softmax
 * and has no value. */
static inline float sink_of(const struct fa_problem *problem, int64_t head)
{
    const struct fa_tensor *sinks = &problem->sink;
    float sink = -INFINITY;
    if (sinks->object != NULL)
        fa_load_row(sinks, head * sinks->stride[0], 1, 1, &sink);
    return sink;
}

#endif
