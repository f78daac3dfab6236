/* The reference implementation: every semantic of the forward, for CPU tensors. */
#ifndef FA_CPU_FORWARD_H
#define FA_CPU_FORWARD_H

#include "../platform.h"
#include "../problem.h"

/* Computes problem->out (and lse). Pure C: call it with the GIL released. 0, or FA_OUT_OF_MEMORY or
 * FA_INTERRUPTED; then the outputs are not complete. */
int fa_cpu_forward(const struct fa_problem *problem, struct fa_threads *threads);

#endif
