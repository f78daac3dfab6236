/* What happens to a score, in the order of kernels/score.cuh: scale, softcap, score_mod (no call
 * has one yet), mask. The backward recomputes with these what the forward computed. */
#ifndef FA_CPU_SCORES_H
#define FA_CPU_SCORES_H

#include <math.h>

#include "../problem.h"
#include "rows.h"
#include "sequence.h"

/* The mask, as attention_mask in kernels/mask.cuh: the keys that a query row sees, a window around
 * the key on its diagonal, cut to the keys that exist. FA_UNBOUNDED needs no special case: in 64
 * bits it reaches past every end that 32 bits can hold. Both ends only grow with the row, those of
 * empty ranges too. */
static inline struct range visible_keys(const struct fa_shape *shape,
                                        const struct sequence *sequence, int64_t row)
{
    const int64_t keys = sequence->k.length, diagonal = row + keys - sequence->q.length;
    int64_t begin = clamp(diagonal - shape->window_left, 0, keys);
    int64_t end = clamp(diagonal + shape->window_right + 1, begin, keys);
    return (struct range){begin, end};
}

/* From the first to the last key that any of the rows sees. */
static inline struct range visible_to_any(const struct fa_shape *shape,
                                          const struct sequence *sequence, struct range rows)
{
    return (struct range){visible_keys(shape, sequence, rows.begin).begin,
                          visible_keys(shape, sequence, rows.end - 1).end};
}

static inline float softcapped(const struct fa_shape *shape, float score)
{
    return shape->softcap > 0 ? shape->softcap * tanhf(score / shape->softcap) : score;
}

/* The score of two rows in fp32, if the query sees the key. */
static inline float score_of(const struct fa_shape *shape, const float *q, const float *k)
{
    const float score = shape->softmax_scale * fa_dot(q, k, fa_width(shape->head_dim));
    return softcapped(shape, score);
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
