/* What depends on the operating system: shared libraries, threads. Nothing else in csrc/ asks
 * which. */
#ifndef FA_PLATFORM_H
#define FA_PLATFORM_H

#include <stddef.h>
#include <stdint.h>

/* Opens a shared library; NULL, with why written into `reason`, where it cannot. Never closed. */
void *fa_library_open(const char *path, char *reason, size_t reason_size);
void *fa_library_symbol(void *library, const char *name);

/* The name under which the CUDA driver is installed. */
extern const char *const FA_CUDA_DRIVER_NAME;

/* Cores that this process may use. */
int fa_cpu_count(void);

/* Runs task(context, i) for i in [0, tasks) over `threads` threads, the caller's among them;
 * returns when all are done. Threads live only as long as the call, so a fork never loses any.
 * Where none can be started the caller does all the work. */
void fa_parallel_for(int64_t tasks, int threads, void (*task)(void *context, int64_t index),
                     void *context);

#endif
