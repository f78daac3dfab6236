/* The threads of a call on the CPU: how many there are, and that Ctrl-C ends them. */
#ifndef FA_CPU_THREADS_H
#define FA_CPU_THREADS_H

#include <Python.h>

#include "platform.h"

/* As many threads as torch uses (torch.set_num_threads); where it is not imported, as OpenMP's
 * OMP_NUM_THREADS says; else as there are cores. -1 with the exception set. */
int fa_cpu_thread_count(void);

/* Before work on the CPU by so many threads: releases the GIL. Runs no Python code. */
void fa_cpu_threads_begin(struct fa_threads *threads, int count);

/* After it: takes the GIL back. 0 where `status`, which the work returned, is 0; else -1 with the
 * exception set: MemoryError, or what a signal's handler raised, say KeyboardInterrupt. */
int fa_cpu_threads_end(struct fa_threads *threads, int status);

#endif
