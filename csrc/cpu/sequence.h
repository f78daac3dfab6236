/* The sequence that a task works on: its lengths, and where its rows begin, as in
 * kernels/sequence.cuh. The reference implementation reads lengths here and nowhere else. */
#ifndef FA_CPU_SEQUENCE_H
#define FA_CPU_SEQUENCE_H

#include "../problem.h"
#include "rows.h"

struct sequence {
    struct side q, k;
};

/* Sequence `batch` of a problem. Whatever its lengths are, its rows are within the tensors. */
struct sequence fa_sequence(const struct fa_problem *problem, int64_t batch);

/* The most rows that a sequence of the problem has on each side. */
struct lengths {
    int64_t q, k;
};
struct lengths fa_longest(const struct fa_problem *problem);

/* Whether all lengths, and the pages of all keys, are what they should be; needs the GIL. 0, or -1
 * with a ValueError set that tells the sequence's number. */
int fa_check_sequences(const struct fa_problem *problem);

#endif
