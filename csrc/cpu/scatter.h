/* The reference implementation of rows that are written to slots. */
#ifndef FA_CPU_SCATTER_H
#define FA_CPU_SCATTER_H

#include "../scatter.h"

/* Writes to the caches. Pure C: call it with the GIL released. */
void fa_cpu_scatter(const struct fa_scatter *scatter);

#endif
