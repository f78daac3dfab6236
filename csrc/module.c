/* The Python module flash_attn_sm120._C: method table and module state. */
#include <Python.h>
#include <string.h>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "explain.h"
#include "launch.h"
#include "platform.h"
#include "problem.h"
#include "state.h"
#include "use_tiles.h"

PyObject *fa_state_import(PyObject **slot, const char *name)
{
    if (!*slot)
        *slot = PyImport_ImportModule(name);
    return *slot;
}

/* ---- methods --------------------------------------------------------------------------------- */

static int check_count(const char *function, Py_ssize_t count, int expected)
{
    if (count == expected)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s() takes %d arguments, got %d", function, expected,
                 (int)count);
    return -1;
}

/* What every method of a call is given: q, k and v from `tensors` on, and from `options` on how to
 * compute with them. */
static struct fa_arguments arguments_of(PyObject *const *tensors, PyObject *const *options)
{
    return (struct fa_arguments){.q = tensors[0],
                                 .k = tensors[1],
                                 .v = tensors[2],
                                 .softmax_scale = options[0],
                                 .causal = options[1],
                                 .window_size = options[2],
                                 .softcap = options[3],
                                 .sink = options[4]};
}

/* The positional arguments that forward() and explain() share; one of their own follows. */
#define SHARED_ARGUMENTS 10

/* Reads the shared arguments. 0, or -1 with the exception set; fa_problem_release in both cases. */
static int read_call(PyObject *module, const char *function, PyObject *const *args,
                     Py_ssize_t count, struct fa_problem *problem)
{
    memset(problem, 0, sizeof *problem);
    if (check_count(function, count, SHARED_ARGUMENTS + 1) < 0)
        return -1;
    struct fa_arguments arguments = arguments_of(args, args + 3);
    arguments.num_splits = args[8];
    arguments.pack_gqa = args[9];
    return fa_problem_read(PyModule_GetState(module), &arguments, problem);
}

static int run_forward(struct fa_state *state, const struct fa_problem *problem)
{
    if (problem->q.device_type == FA_CUDA)
        return fa_launch_forward(state, problem);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fa_cpu_forward(problem, fa_cpu_count());
    Py_END_ALLOW_THREADS
    if (status < 0)
        PyErr_NoMemory();
    return status;
}

static PyObject *forward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct fa_state *state = PyModule_GetState(module);
    struct fa_problem problem;
    PyObject *result = NULL;
    if (read_call(module, "forward", args, count, &problem) < 0)
        goto done;
    int return_lse = PyObject_IsTrue(args[SHARED_ARGUMENTS]);
    if (return_lse >= 0 && fa_problem_allocate(state, return_lse, &problem) == 0 &&
        run_forward(state, &problem) == 0)
        result = PyTuple_Pack(2, problem.out.object, return_lse ? problem.lse.object : Py_None);
done:
    fa_problem_release(&problem);
    return result;
}

#define BACKWARD_ARGUMENTS 13

/* Reads the arguments of backward(). 0, or -1 with the exception set; both structs are to be
 * released in both cases. */
static int read_backward(struct fa_state *state, PyObject *const *args, Py_ssize_t count,
                         struct fa_problem *problem, struct fa_gradients *gradients)
{
    memset(problem, 0, sizeof *problem);
    memset(gradients, 0, sizeof *gradients);
    if (check_count("backward", count, BACKWARD_ARGUMENTS) < 0)
        return -1;
    const struct fa_arguments arguments = arguments_of(args + 1, args + 7);
    const struct fa_gradient_arguments others = {.dout = args[0],
                                                 .out = args[4],
                                                 .lse = args[5],
                                                 .dlse = args[6],
                                                 .deterministic = args[12]};
    if (fa_problem_read(state, &arguments, problem) < 0)
        return -1;
    return fa_gradients_read(state, &others, problem, gradients);
}

static int run_backward(struct fa_state *state, const struct fa_problem *problem,
                        const struct fa_gradients *gradients)
{
    if (fa_shape_is_empty(&problem->shape))
        return 0;
    if (problem->q.device_type == FA_CUDA)
        return fa_launch_backward(state, problem, gradients);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fa_cpu_backward(problem, gradients, fa_cpu_count());
    Py_END_ALLOW_THREADS
    if (status < 0)
        PyErr_NoMemory();
    return status;
}

static PyObject *backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct fa_state *state = PyModule_GetState(module);
    struct fa_problem problem;
    struct fa_gradients gradients;
    PyObject *result = NULL;
    if (read_backward(state, args, count, &problem, &gradients) == 0 &&
        fa_gradients_allocate(state, &problem, &gradients) == 0 &&
        run_backward(state, &problem, &gradients) == 0)
        result = PyTuple_Pack(4, gradients.dq.object, gradients.dk.object, gradients.dv.object,
                              gradients.dsink.object ? gradients.dsink.object : Py_None);
    fa_gradients_release(&gradients);
    fa_problem_release(&problem);
    return result;
}

static PyObject *explain(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct fa_problem problem;
    PyObject *result = NULL;
    if (read_call(module, "explain", args, count, &problem) < 0)
        goto done;
    long arch = PyLong_AsLong(args[SHARED_ARGUMENTS]);
    if (!PyErr_Occurred())
        result = fa_explain(PyModule_GetState(module), &problem, (int)arch);
done:
    fa_problem_release(&problem);
    return result;
}

static PyObject *explain_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct fa_state *state = PyModule_GetState(module);
    struct fa_problem problem = {0};
    PyObject *result = NULL;
    if (check_count("explain_backward", count, 10) < 0)
        return NULL;
    const struct fa_arguments arguments = arguments_of(args, args + 3);
    const int deterministic = PyObject_IsTrue(args[8]);
    const long arch = deterministic < 0 ? -1 : PyLong_AsLong(args[9]);
    if (!PyErr_Occurred() && fa_problem_read(state, &arguments, &problem) == 0)
        result = fa_explain_backward(state, &problem, deterministic, (int)arch);
    fa_problem_release(&problem);
    return result;
}

static PyObject *devices(PyObject *module, PyObject *Py_UNUSED(unused))
{
    struct fa_state *state = PyModule_GetState(module);
    return fa_explain_devices(state);
}

static PyObject *use_tiles(PyObject *module, PyObject *rows)
{
    struct fa_state *state = PyModule_GetState(module);
    if (fa_use_tiles(rows, &state->tiles) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *tiles(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return fa_tiles();
}

static PyObject *tile_fields(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return fa_tile_fields();
}

static PyMethodDef METHODS[] = {
    {"forward", (PyCFunction)(void (*)(void))forward, METH_FASTCALL,
     "forward(q, k, v, softmax_scale, causal, window_size, softcap, learnable_sink, num_splits, "
     "pack_gqa, return_lse) -> (out, lse)"},
    {"backward", (PyCFunction)(void (*)(void))backward, METH_FASTCALL,
     "backward(dout, q, k, v, out, lse, dlse, softmax_scale, causal, window_size, softcap, "
     "learnable_sink, deterministic) -> (dq, dk, dv, dsink)"},
    {"explain", (PyCFunction)(void (*)(void))explain, METH_FASTCALL,
     "explain(q, k, v, softmax_scale, causal, window_size, softcap, learnable_sink, num_splits, "
     "pack_gqa, "
     "arch) -> dict"},
    {"explain_backward", (PyCFunction)(void (*)(void))explain_backward, METH_FASTCALL,
     "explain_backward(q, k, v, softmax_scale, causal, window_size, softcap, learnable_sink, "
     "deterministic, arch) -> dict"},
    {"devices", devices, METH_NOARGS, "devices() -> (driver version, [device, ...])"},
    {"use_tiles", use_tiles, METH_O, "use_tiles(rows) -> None"},
    {"tiles", tiles, METH_NOARGS, "tiles() -> [row, ...]"},
    {"tile_fields", tile_fields, METH_NOARGS, "tile_fields() -> (name, ...)"},
    {NULL, NULL, 0, NULL},
};

/* ---- the module ------------------------------------------------------------------------------ */

static int exec_module(PyObject *module)
{
    struct fa_state *state = PyModule_GetState(module);
    memset(state, 0, sizeof *state);
    return 0;
}

static int traverse_module(PyObject *module, visitproc visit, void *arg)
{
    struct fa_state *state = PyModule_GetState(module);
    if (!state)
        return 0;
    Py_VISIT(state->python_producers);
    Py_VISIT(state->python_jit);
    for (int i = 0; i < state->producers.count; i++)
        Py_VISIT(state->producers.seen[i].type);
    return 0;
}

static int clear_module(PyObject *module)
{
    struct fa_state *state = PyModule_GetState(module);
    if (!state)
        return 0;
    Py_CLEAR(state->python_producers);
    Py_CLEAR(state->python_jit);
    while (state->producers.count > 0)
        Py_CLEAR(state->producers.seen[--state->producers.count].type);
    return 0;
}

static void free_module(void *module)
{
    struct fa_state *state = PyModule_GetState(module);
    clear_module(module);
    if (!state)
        return;
    fa_kernels_clear(&state->kernels, &state->driver);
    fa_tiles_clear(&state->tiles);
}

static PyModuleDef_Slot SLOTS[] = {
    {Py_mod_exec, exec_module},
    {0, NULL},
};

static struct PyModuleDef DEFINITION = {
    PyModuleDef_HEAD_INIT,
    .m_name = "flash_attn_sm120._C",
    .m_doc = "DLPack tensors -> problem -> plan -> variant -> kernel -> launch",
    .m_size = sizeof(struct fa_state),
    .m_methods = METHODS,
    .m_slots = SLOTS,
    .m_traverse = traverse_module,
    .m_clear = clear_module,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&DEFINITION); }
