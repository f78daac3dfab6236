/* The reference implementation of putting parts together. */
#ifndef FA_CPU_COMBINE_H
#define FA_CPU_COMBINE_H

#include "../parts.h"
#include "../platform.h"

/* Computes parts->out (and lse). Pure C: call it with the GIL released. 0, or FA_OUT_OF_MEMORY or
 * FA_INTERRUPTED; then the outputs are not complete. */
int fa_cpu_combine(const struct fa_parts *parts, struct fa_threads *threads);

#endif
