#define _GNU_SOURCE /* sched_getaffinity */

#include "platform.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32

#include <windows.h>

const char *const FA_CUDA_DRIVER_NAME = "nvcuda.dll";

void *fa_library_open(const char *path, char *reason, size_t reason_size)
{
    /* Of a name without a path, System32's: never one in the working directory. */
    HMODULE library = LoadLibraryExA(path, NULL, LOAD_LIBRARY_SEARCH_DEFAULT_DIRS);
    if (library == NULL)
        snprintf(reason, reason_size, "Windows error %lu", GetLastError());
    return (void *)library;
}

void *fa_library_symbol(void *library, const char *name)
{
    return (void *)(intptr_t)GetProcAddress((HMODULE)library, name);
}

static int core_count(void)
{
    DWORD count = GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
    return count > 0 ? (int)count : 1;
}

typedef HANDLE thread_handle;
#define THREAD_RESULT DWORD WINAPI

static bool thread_start(thread_handle *thread, LPTHREAD_START_ROUTINE run, void *argument)
{
    *thread = CreateThread(NULL, 0, run, argument, 0, NULL);
    return *thread != NULL;
}

/* Whether the thread ends within some milliseconds. */
static bool thread_join(thread_handle thread, int milliseconds)
{
    if (WaitForSingleObject(thread, milliseconds) == WAIT_TIMEOUT)
        return false;
    CloseHandle(thread);
    return true;
}

bool fa_is_main_thread(void) { return true; } /* Windows has no such thread */

static int64_t milliseconds_now(void) { return (int64_t)GetTickCount64(); }

typedef volatile LONG64 shared_count;
typedef volatile LONG shared_status;

static int64_t count_up(shared_count *count) { return InterlockedExchangeAdd64(count, 1); }

static int status_of(const shared_status *status) { return *status; }

static void set_first(shared_status *status, int value)
{
    InterlockedCompareExchange(status, value, 0);
}

#else

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

const char *const FA_CUDA_DRIVER_NAME = "libcuda.so.1";

void *fa_library_open(const char *path, char *reason, size_t reason_size)
{
    struct stat status;
    if (strchr(path, '/') && stat(path, &status) == 0 && !S_ISREG(status.st_mode)) {
        snprintf(reason, reason_size, "it is not a regular file"); /* a pipe would be waited for */
        return NULL;
    }
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char *error = dlerror();
        const size_t named = strlen(path);
        if (error && strncmp(error, path, named) == 0 && strncmp(error + named, ": ", 2) == 0)
            error += named + 2;
        snprintf(reason, reason_size, "%s", error != NULL ? error : "unknown error");
    }
    return library;
}

void *fa_library_symbol(void *library, const char *name) { return dlsym(library, name); }

static int core_count(void)
{
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        return CPU_COUNT(&allowed);
    }
    long online = sysconf(_SC_NPROCESSORS_ONLN); /* more cores than a cpu_set_t holds */
    return online > 0 ? (int)online : 1;
}

typedef pthread_t thread_handle;
#define THREAD_RESULT void *

static bool thread_start(thread_handle *thread, void *(*run)(void *), void *argument)
{
    return pthread_create(thread, NULL, run, argument) == 0;
}

/* Whether the thread ends within some milliseconds. */
static bool thread_join(thread_handle thread, int milliseconds)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += milliseconds * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    return pthread_timedjoin_np(thread, NULL, &until) != ETIMEDOUT;
}

bool fa_is_main_thread(void) { return syscall(SYS_gettid) == getpid(); }

static int64_t milliseconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

typedef _Atomic int64_t shared_count; /* returned as it was, then one more */
typedef atomic_int shared_status;     /* set once from 0 */

/* Relaxed is enough: the counter hands out indices only, a status ends loops; creating and joining
 * the threads is what orders memory between them. */
static int64_t count_up(shared_count *count)
{
    return atomic_fetch_add_explicit(count, 1, memory_order_relaxed);
}

static int status_of(const shared_status *status)
{
    return atomic_load_explicit(status, memory_order_relaxed);
}

static void set_first(shared_status *status, int value)
{
    int unset = 0;
    atomic_compare_exchange_strong(status, &unset, value);
}

#endif

int fa_thread_count(void)
{
    const char *wanted = getenv("OMP_NUM_THREADS"); /* a list of numbers, the first for us */
    const long count = wanted ? strtol(wanted, NULL, 10) : 0;
    if (count < 1)
        return core_count();
    return count < FA_MAX_THREADS ? (int)count : FA_MAX_THREADS;
}

/* ---- Loops over threads ---------------------------------------------------------------------- */

#define POLL_MS 50

struct loop {
    shared_count next;    /* the first index that no thread has taken yet */
    shared_status status; /* not 0: the loop ends */
    int64_t tasks;
    fa_task *task;
    void *context;
    struct fa_threads *threads;
};

struct fa_worker {
    struct loop *loop;
    bool asks;      /* the caller's thread asks whether to end, */
    int64_t ask_at; /* next at this time */
};

bool fa_has_ended(struct fa_worker *worker)
{
    struct loop *loop = worker->loop;
    if (status_of(&loop->status))
        return true;
    if (!worker->asks || milliseconds_now() < worker->ask_at)
        return false;
    const bool interrupted = loop->threads->interrupted(loop->threads);
    if (interrupted)
        set_first(&loop->status, FA_INTERRUPTED);
    worker->ask_at = milliseconds_now() + POLL_MS;
    return interrupted;
}

static void work(struct fa_worker *worker)
{
    struct loop *loop = worker->loop;
    while (!fa_has_ended(worker)) {
        const int64_t index = count_up(&loop->next);
        if (index >= loop->tasks)
            return;
        const int status = loop->task(loop->context, index, worker);
        if (status)
            set_first(&loop->status, status);
    }
}

static THREAD_RESULT work_as_helper(void *loop)
{
    struct fa_worker helper = {.loop = loop};
    work(&helper);
    return 0;
}

int fa_parallel_for(int64_t tasks, struct fa_threads *threads, fa_task *task, void *context)
{
    struct loop loop = {.tasks = tasks, .task = task, .context = context, .threads = threads};
    struct fa_worker caller = {.loop = &loop, .asks = threads->interrupted != NULL};
    caller.ask_at = milliseconds_now() + POLL_MS;
    thread_handle helpers[FA_MAX_THREADS];
    const int64_t wanted = (threads->count < tasks ? threads->count : tasks) - 1;
    int started = 0;
    while (started < wanted && started < FA_MAX_THREADS &&
           thread_start(&helpers[started], work_as_helper, &loop))
        started++;
    work(&caller);
    for (int i = 0; i < started; i++)
        while (!thread_join(helpers[i], POLL_MS))
            fa_has_ended(&caller);
    return status_of(&loop.status);
}
