/* What depends on the operating system: shared libraries, threads. Nothing else in csrc/ asks
 * which. */
#ifndef FA_PLATFORM_H
#define FA_PLATFORM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Opens a shared library; NULL, with why written into `reason`, where it cannot. Never closed. */
void *fa_library_open(const char *path, char *reason, size_t reason_size);
void *fa_library_symbol(void *library, const char *name);

/* The name under which the CUDA driver is installed. */
extern const char *const FA_CUDA_DRIVER_NAME;

/* How many threads a loop has by itself: OMP_NUM_THREADS, else the cores that this process may use.
 */
int fa_thread_count(void);

/* More threads than this are not started. */
#define FA_MAX_THREADS 256

/* Whether this is the thread that the process started with. */
bool fa_is_main_thread(void);

/* ---- loops over threads ---------------------------------------------------------------------- */

/* What a loop returns other than 0. */
#define FA_OUT_OF_MEMORY (-1) /* of a task */
#define FA_INTERRUPTED   (-2)

/* The threads of a loop, the caller's among them. */
struct fa_threads {
    int count;
    /* Asked by the caller's thread every 50 ms or so, whatever it does: true ends the loop. NULL:
     * nothing does. */
    bool (*interrupted)(struct fa_threads *threads);
    void *context; /* for `interrupted` */
};

struct fa_worker; /* a thread of a loop, as its tasks know it */

/* One index of a loop: 0, or a status that ends the loop. */
typedef int fa_task(void *context, int64_t index, struct fa_worker *worker);

/* Runs task(context, i, worker) for i in [0, tasks); returns when no task runs any more: 0 when all
 * are done, FA_INTERRUPTED, or the status of the task that ended the loop. Threads live only as
 * long as the call, so a fork never loses any. Where none can be started the caller does all the
 * work. */
int fa_parallel_for(int64_t tasks, struct fa_threads *threads, fa_task *task, void *context);

/* Whether the loop has ended: then a task returns, with any status and its work undone. A task asks
 * at least every few milliseconds. */
bool fa_has_ended(struct fa_worker *worker);

#endif
