#include "attention.h"

#include "cpu/backward.h"
#include "cpu/combine.h"
#include "cpu/forward.h"
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
        fa_check_sequences(problem) < 0)
        return -1;
    fa_cpu_threads_begin(threads, count);
    return 0;
}

int fa_attention_forward(struct fa_state *state, const struct fa_problem *problem)
{
    if (problem->q.device_type == FA_DEVICE_CUDA)
        return fa_launch(state, problem, NULL);
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
