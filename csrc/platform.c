#define _GNU_SOURCE /* sched_getaffinity */

#include "platform.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>

#ifdef _WIN32

#include <windows.h>

const char *const FA_CUDA_DRIVER_NAME = "nvcuda.dll";

void *fa_library_open(const char *path, char *reason, size_t reason_size)
{
    HMODULE library = LoadLibraryA(path);
    if (library == NULL) {
        snprintf(reason, reason_size, "cannot load %s (Windows error %lu)", path, GetLastError());
    }
    return (void *)library;
}

void *fa_library_symbol(void *library, const char *name)
{
    return (void *)GetProcAddress((HMODULE)library, name);
}

int fa_cpu_count(void)
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

static void thread_join(thread_handle thread)
{
    WaitForSingleObject(thread, INFINITE);
    CloseHandle(thread);
}

#else

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

const char *const FA_CUDA_DRIVER_NAME = "libcuda.so.1";

void *fa_library_open(const char *path, char *reason, size_t reason_size)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char *error = dlerror();
        snprintf(reason, reason_size, "%s", error != NULL ? error : "unknown error");
    }
    return library;
}

void *fa_library_symbol(void *library, const char *name) { return dlsym(library, name); }

int fa_cpu_count(void)
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

static void thread_join(thread_handle thread) { pthread_join(thread, NULL); }

#endif

/* More than this many threads are not started: their handles live on the caller's stack. */
#define MAX_THREADS 256

struct parallel_for {
    _Atomic int64_t next; /* the first index that nobody has taken yet */
    int64_t tasks;
    void (*task)(void *context, int64_t index);
    void *context;
};

static THREAD_RESULT take_tasks(void *argument)
{
    struct parallel_for *loop = argument;
    int64_t index;
    /* Relaxed is enough: the counter hands out indices only; creating and joining the threads is
     * what orders everybody's memory. */
    while ((index = atomic_fetch_add_explicit(&loop->next, 1, memory_order_relaxed)) <
           loop->tasks) {
        loop->task(loop->context, index);
    }
    return 0;
}

void fa_parallel_for(int64_t tasks, int threads, void (*task)(void *context, int64_t index),
                     void *context)
{
    struct parallel_for loop = {.tasks = tasks, .task = task, .context = context};
    thread_handle helpers[MAX_THREADS];
    int64_t wanted = (threads < tasks ? threads : tasks) - 1;
    int started = 0;
    while (started < wanted && started < MAX_THREADS &&
           thread_start(&helpers[started], take_tasks, &loop)) {
        started++;
    }
    take_tasks(&loop);
    for (int i = 0; i < started; i++) {
        thread_join(helpers[i]);
    }
}
