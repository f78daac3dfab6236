/* The reference implementation of what a call appends to its caches, for CPU tensors. */
#ifndef FA_CPU_APPEND_H
#define FA_CPU_APPEND_H

#include "../platform.h"
#include "../problem.h"

/* A call that appends, as its attention reads it. */
struct fa_cpu_append {
    struct fa_problem problem; /* q rotated, lengths with the new rows; borrows all else */
    int *seqused_k;
    void *rotated_q; /* NULL: q is not rotated */
};

/* Makes room for what attention reads. 0, or FA_OUT_OF_MEMORY and nothing is held. */
int fa_cpu_append_begin(const struct fa_problem *problem, struct fa_cpu_append *append);

/* Fills that room, and appends to caches whose lengths have been checked. Nothing interrupts it: a
 * cache is never half written. */
void fa_cpu_append(const struct fa_problem *problem, const struct fa_cpu_append *append);

void fa_cpu_append_end(struct fa_cpu_append *append);

#endif
