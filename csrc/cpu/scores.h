/* What happens to a score, in the order of kernels/score.cuh: scale, softcap, score_mod (no call
 * has one yet), biases, softmax, dropout. The mask is in sequence.h: what it hides has no score.
 * The backward recomputes with these what the forward computed, to the bit.
 *
 * Scores are fp64: what makes a weight is their difference to the row max, and in fp32 the rounding
 * of a large score would be a large part of that. Weights are fp32. */
#ifndef FA_CPU_SCORES_H
#define FA_CPU_SCORES_H

#include <math.h>
#include <stdlib.h>

#include "../../kernels/philox.h"
#include "../problem.h"
#include "rows.h"
#include "sequence.h"

static inline double softcapped(const struct fa_shape *shape, double score)
{
    return shape->softcap > 0 ? shape->softcap * tanh(score / shape->softcap) : score;
}

/* What is added to the scores of a head of a sequence. */
struct addends {
    double slope;                 /* of ALiBi; 0 where there is none */
    int64_t diagonal;             /* the key on that of query 0 */
    const struct fa_tensor *bias; /* NULL: none */
    int64_t bias_begin;           /* where that of the head starts, in elements */
    int64_t bias_stride;          /* from query to query */
};

static inline struct addends addends_of(const struct fa_problem *problem,
                                        const struct sequence *sequence, int64_t head)
{
    const struct fa_tensor *slopes = &problem->alibi_slopes, *bias = &problem->bias;
    const int64_t *stride = slopes->stride;
    struct addends addends = {.diagonal = sequence->k.length - sequence->q.length};
    float slope = 0;
    if (slopes->object != NULL)
        fa_load_row(slopes,
                    slopes->ndim == 1 ? head * stride[0]
                                      : sequence->number * stride[0] + head * stride[1],
                    1, 1, &slope);
    addends.slope = slope;
    if (bias->object != NULL) {
        const struct fa_strides strides = fa_bias_strides(bias);
        addends.bias = bias;
        addends.bias_begin = sequence->number * strides.batch + head * strides.head;
        addends.bias_stride = strides.seqlen;
    }
    return addends;
}

/* A bias below it, as the lowest numbers of fp32 and bf16 are, is -inf in the powers of two that
 * kernels have. */
#define FA_LOWEST_BIAS (-2.35e38f)

/* What is added to the score of a query and a key. */
static inline double addend_of(const struct addends *addends, int64_t query, int64_t key)
{
    float bias = 0;
    if (addends->bias)
        fa_load_row(addends->bias, addends->bias_begin + query * addends->bias_stride + key, 1, 1,
                    &bias);
    if (bias < FA_LOWEST_BIAS)
        bias = -INFINITY;
    return bias - addends->slope * (double)llabs(query + addends->diagonal - key);
}

/* The score of two rows, if the query sees the key. */
static inline double score_of(const struct fa_shape *shape, const float *q, const float *k,
                              double addend)
{
    const double score = shape->softmax_scale * fa_dot(q, k, fa_width(shape->head_dim));
    return softcapped(shape, score) + addend;
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

/* The softmax of a row of scores: a score s has the weight exp(s - max) / sum. */
struct softmax {
    double max, sum;
    double key_max; /* of the scores alone, without the sink */
};

static inline struct softmax softmax_of(const double *scores, int64_t count, float sink)
{
    double max = sink, key_max = -INFINITY;
    for (int64_t n = 0; n < count; n++) {
        if (scores[n] > max || isnan(scores[n]))
            max = scores[n];
        if (scores[n] > key_max)
            key_max = scores[n];
    }
    if (max == -INFINITY)
        return (struct softmax){max, 0, key_max}; /* nothing has any weight */
    double sums[FA_LANES] = {expf((float)(sink - max))};
    for (int64_t n = 0; n < count; n++)
        sums[n % FA_LANES] += expf((float)(scores[n] - max));
    double sum = 0;
    for (int lane = 0; lane < FA_LANES; lane++)
        sum += sums[lane];
    return (struct softmax){max, sum, key_max};
}

static inline float weight_of(struct softmax softmax, double score)
{
    if (softmax.sum == 0)
        return 0;
    return (float)(expf((float)(score - softmax.max)) / softmax.sum);
}

/* The same as kernels have it where q is e4m3: rounded to e4m3 as p = 2^(s - m), where s is in
 * powers of two and m lies 8 below their max, which is rounded up. The sum is that of the exact p.
 */
static inline float narrow_weight_of(struct softmax softmax, double score)
{
    static const double LOG2_E = 1.44269504088896340736;
    if (softmax.sum == 0 || isnan(score) || isinf(softmax.max))
        return weight_of(softmax, score);
    const double m = ceil(softmax.key_max * LOG2_E) - 8;
    const float p = fa_round_to_e4m3(exp2f((float)(score * LOG2_E - m)));
    return (float)(p * exp2(m - softmax.max * LOG2_E) / softmax.sum);
}

/* Which weights of a head of a sequence are dropped, and what the others count. */
struct dropout {
    struct fa_dropout_stream stream;
    unsigned threshold;
    float factor; /* 1 where nothing is dropped */
};

static inline struct dropout dropout_of(const struct fa_problem *problem, int64_t sequence,
                                        int64_t head)
{
    struct dropout dropout = {.factor = 1};
    if (problem->shape.dropout == 0)
        return dropout;
    const uint64_t *seed = problem->dropout_seed.data;
    const unsigned words[] = {(unsigned)seed[0], (unsigned)(seed[0] >> 32), (unsigned)seed[1],
                              (unsigned)(seed[1] >> 32)};
    dropout.stream = fa_dropout_stream_of(words, (int)sequence, (int)head);
    dropout.threshold = (unsigned)problem->shape.dropout << 16;
    dropout.factor = 1 / fa_keep_probability(&problem->shape);
    return dropout;
}

/* What a weight is multiplied by. */
static inline float dropout_factor(const struct dropout *dropout, int64_t row, int64_t key)
{
    if (dropout->threshold == 0)
        return 1;
    return fa_dropout_keeps_weight(&dropout->stream, (int)row, (int)key, dropout->threshold)
               ? dropout->factor
               : 0;
}

/* As torch.logsumexp: +inf where a score is, although no weight is defined there. */
static inline float lse_of(struct softmax softmax)
{
    return (float)(isinf(softmax.max) ? softmax.max : softmax.max + log(softmax.sum));
}

#endif
