/* The reference implementation: every semantic of the forward, in fp32, for CPU tensors. */
#ifndef FA_CPU_FORWARD_H
#define FA_CPU_FORWARD_H

#include "../problem.h"

/* Computes problem->out (and lse) on `threads` threads. Pure C: call it with the GIL released.
 * 0, or -1 where scratch memory ran out. */
int fa_cpu_forward(const struct fa_problem *problem, int threads);

#endif
