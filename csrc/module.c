/* The Python module flash_attn_sm120._C: method table and module state. */
#include <Python.h>
#include <string.h>

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

/* The positional arguments that forward() and explain() share, in the order of struct fa_arguments;
 * one of their own follows. */
#define SHARED_ARGUMENTS 9

/* Reads the shared arguments. 0, or -1 with the exception set; fa_problem_release in both cases. */
static int read_call(PyObject *module, const char *function, PyObject *const *args,
                     Py_ssize_t count, struct fa_problem *problem)
{
    memset(problem, 0, sizeof *problem);
    if (count != SHARED_ARGUMENTS + 1) {
        PyErr_Format(PyExc_TypeError, "%s() takes %d arguments, got %d", function,
                     SHARED_ARGUMENTS + 1, (int)count);
        return -1;
    }
    const struct fa_arguments arguments = {args[0], args[1], args[2], args[3], args[4],
                                           args[5], args[6], args[7], args[8]};
    return fa_problem_read(PyModule_GetState(module), &arguments, problem);
}

static int run(struct fa_state *state, const struct fa_problem *problem)
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
        run(state, &problem) == 0)
        result = PyTuple_Pack(2, problem.out.object, return_lse ? problem.lse.object : Py_None);
done:
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
     "forward(q, k, v, softmax_scale, causal, window_size, softcap, learnable_sink, pack_gqa, "
     "return_lse) -> (out, lse)"},
    {"explain", (PyCFunction)(void (*)(void))explain, METH_FASTCALL,
     "explain(q, k, v, softmax_scale, causal, window_size, softcap, learnable_sink, pack_gqa, "
     "arch) -> dict"},
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
