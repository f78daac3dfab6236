/* The reference implementation of the backward, in fp32, for CPU tensors. */
#ifndef FA_CPU_BACKWARD_H
#define FA_CPU_BACKWARD_H

#include "../platform.h"
#include "../problem.h"

/* Computes dq, dk, dv, and dsink where there is a sink, of a problem that is not empty; the same to
 * the bit however many threads there are. Pure C: call it with the GIL released. 0, or
 * FA_OUT_OF_MEMORY or FA_INTERRUPTED; then the gradients are not complete. */
int fa_cpu_backward(const struct fa_problem *problem, const struct fa_gradients *gradients,
                    struct fa_threads *threads);

#endif
