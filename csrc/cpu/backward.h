/* The reference implementation of the backward, in fp32, for CPU tensors. */
#ifndef FA_CPU_BACKWARD_H
#define FA_CPU_BACKWARD_H

#include "../problem.h"

/* Computes dq, dk, dv, and dsink where there is a sink, of a problem that is not empty, on
 * `threads` threads; the same to the bit however many they are. Pure C: call it with the GIL
 * released. 0, or -1 where scratch memory ran out. */
int fa_cpu_backward(const struct fa_problem *problem, const struct fa_gradients *gradients,
                    int threads);

#endif
