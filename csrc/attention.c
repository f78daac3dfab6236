#include "attention.h"

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "launch.h"
#include "platform.h"

int fa_attention_forward(struct fa_state *state, const struct fa_problem *problem)
{
    if (problem->q.device_type == FA_DEVICE_CUDA)
        return fa_launch(state, problem, NULL);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fa_cpu_forward(problem, fa_cpu_count());
    Py_END_ALLOW_THREADS
    if (status < 0)
        PyErr_NoMemory();
    return status;
}

int fa_attention_backward(struct fa_state *state, const struct fa_problem *problem,
                          const struct fa_gradients *gradients)
{
    if (fa_shape_is_empty(&problem->shape))
        return 0; /* fa_gradients_allocate made them zero */
    if (problem->q.device_type == FA_DEVICE_CUDA)
        return fa_launch(state, problem, gradients);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fa_cpu_backward(problem, gradients, fa_cpu_count());
    Py_END_ALLOW_THREADS
    if (status < 0)
        PyErr_NoMemory();
    return status;
}
