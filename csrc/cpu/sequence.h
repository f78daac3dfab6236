/* The sequence that a task works on: its lengths, where its rows begin, as in kernels/sequence.cuh,
 * and the keys that queries see. The reference implementation reads lengths here alone. */
#ifndef FA_CPU_SEQUENCE_H
#define FA_CPU_SEQUENCE_H

#include "../problem.h"
#include "rows.h"

struct sequence {
    int64_t number; /* of the batch */
    struct side q, k;
};

/* Sequence `batch` of a problem. Whatever its lengths are, its rows are within the tensors. */
struct sequence fa_sequence(const struct fa_problem *problem, int64_t batch);

/* The most rows that a sequence of the problem has on each side. */
struct lengths {
    int64_t q, k;
};
struct lengths fa_longest(const struct fa_problem *problem);

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

/* Whether all lengths, and the pages of all keys that a query sees, are what they should be; needs
 * the GIL. 0, or -1 with a ValueError set that tells the sequence's number. */
int fa_check_sequences(const struct fa_problem *problem);

#endif
