#include "attention.h"

#include "cpu/append.h"
#include "cpu/backward.h"
#include "cpu/block_map.h"
#include "cpu/combine.h"
#include "cpu/forward.h"
#include "cpu/scatter.h"
#include "cpu/sequence.h"
#include "cpu_threads.h"
#include "launch.h"

/* Asks how many threads there are, then looks at the tensors and at the sequences a last time and
 * releases the GIL. 0 or -1. */
static int begin(const struct fa_problem *problem, const struct fa_gradients *gradients,
                 struct fa_threads *threads)
{
    const int count = fa_cpu_thread_count();
    if (count < 0 || fa_problem_recheck(problem, gradients, NULL) < 0 ||
        fa_check_sequences(problem) < 0 ||
        fa_block_map_check(gradients ? &problem->query_blocks : &problem->key_blocks) < 0)
        return -1;
    fa_cpu_threads_begin(threads, count);
    return 0;
}

static int append_and_attend(const struct fa_problem *problem)
{
    struct fa_cpu_append append;
    struct fa_threads threads;
    if (fa_cpu_append_begin(problem, &append) < 0) {
        PyErr_NoMemory();
        return -1;
    }
    int status = begin(problem, NULL, &threads);
    if (status == 0) {
        fa_cpu_append(problem, &append);
        status = fa_cpu_threads_end(&threads, fa_cpu_forward(&append.problem, &threads));
    }
    fa_cpu_append_end(&append);
    return status;
}

int fa_attention_forward(struct fa_state *state, const struct fa_problem *problem)
{
    if (problem->q.device_type == FA_DEVICE_CUDA)
        return fa_launch(state, problem, NULL);
    if (problem->append.k.object)
        return append_and_attend(problem);
    struct fa_threads threads;
    if (begin(problem, NULL, &threads) < 0)
        return -1;
    return fa_cpu_threads_end(&threads, fa_cpu_forward(problem, &threads));
}

int fa_attention_backward(struct fa_state *state, const struct fa_problem *problem,
                          const struct fa_gradients *gradients)
{
    if (fa_shape_is_empty(&problem->shape))
        return 0; /* fa_gradients_allocate made them zero */
    if (problem->q.device_type == FA_DEVICE_CUDA)
        return fa_launch(state, problem, gradients);
    struct fa_threads threads;
    if (begin(problem, gradients, &threads) < 0)
        return -1;
    return fa_cpu_threads_end(&threads, fa_cpu_backward(problem, gradients, &threads));
}

int fa_attention_combine(struct fa_state *state, const struct fa_parts *parts)
{
    if (parts->out.device_type == FA_DEVICE_CUDA)
        return fa_launch_combine(state, parts);
    struct fa_threads threads;
    const int count = fa_cpu_thread_count();
    if (count < 0 || fa_parts_recheck(parts) < 0)
        return -1;
    fa_cpu_threads_begin(&threads, count);
    return fa_cpu_threads_end(&threads, fa_cpu_combine(parts, &threads));
}

int fa_attention_scatter(struct fa_state *state, const struct fa_scatter *scatter)
{
    if (scatter->tensors[FA_SCATTER_K].device_type == FA_DEVICE_CUDA)
        return fa_launch_scatter(state, scatter);
    Py_BEGIN_ALLOW_THREADS
    fa_cpu_scatter(scatter);
    Py_END_ALLOW_THREADS
    return 0;
}
