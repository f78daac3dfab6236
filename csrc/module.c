/* The Python module flash_attn_sm120._C: method table and module state. */
#include <Python.h>
#include <string.h>

#include "cpu/forward.h"
#include "explain.h"
#include "launch.h"
#include "platform.h"
#include "problem.h"
#include "state.h"

PyObject *fa_state_import(PyObject **slot, const char *name)
{
    if (!*slot)
        *slot = PyImport_ImportModule(name);
    return *slot;
}

/* ---- methods --------------------------------------------------------------------------------- */

/* The positional arguments that forward() and explain() share, in the order of struct fa_arguments;
 * one of their own follows. */
#define SHARED_ARGUMENTS 8

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
    const struct fa_arguments arguments = {args[0], args[1], args[2], args[3],
                                           args[4], args[5], args[6], args[7]};
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

/* (head_dim, head_dim_v, mask_left, tile_n, sub_n, warps, warp_m, stages, kernel, producer) */
static int read_tile(PyObject *tuple, struct fa_tile_row *row)
{
    int mask_left;
    struct fa_tile *tile = &row->tile;
    if (!PyArg_ParseTuple(tuple, "iipiiiiiii", &row->head_dim, &row->head_dim_v, &mask_left,
                          &tile->tile_n, &tile->sub_n, &tile->warps, &tile->warp_m, &tile->stages,
                          &tile->kernel, &tile->producer))
        return -1;
    row->mask_left = mask_left;
    if (tile->warps > 0 && tile->kernel >= 0 && tile->kernel < FA_KERNEL_COUNT &&
        tile->producer >= 0 && tile->producer < FA_PRODUCER_COUNT)
        return 0;
    PyErr_Format(PyExc_ValueError, "no such tile, kernel or producer: %R", tuple);
    return -1;
}

static PyObject *use_tiles(PyObject *module, PyObject *rows)
{
    struct fa_state *state = PyModule_GetState(module);
    const Py_ssize_t count = PyList_Size(rows);
    if (count > FA_MAX_OWN_TILES)
        PyErr_Format(PyExc_ValueError, "at most %d rows are possible", FA_MAX_OWN_TILES);
    state->tile_count = 0;
    for (int i = 0; i < count && !PyErr_Occurred(); i++)
        read_tile(PyList_GetItem(rows, i), &state->tiles[i]);
    if (PyErr_Occurred())
        return NULL;
    state->tile_count = (int)count;
    Py_RETURN_NONE;
}

static PyMethodDef METHODS[] = {
    {"forward", (PyCFunction)(void (*)(void))forward, METH_FASTCALL,
     "forward(q, k, v, softmax_scale, causal, window_size, softcap, learnable_sink, return_lse) -> "
     "(out, lse)"},
    {"explain", (PyCFunction)(void (*)(void))explain, METH_FASTCALL,
     "explain(q, k, v, softmax_scale, causal, window_size, softcap, learnable_sink, arch) -> dict"},
    {"devices", devices, METH_NOARGS, "devices() -> (driver version, [device, ...])"},
    {"use_tiles", use_tiles, METH_O, "use_tiles(rows) -> None"},
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
    if (state)
        fa_kernels_clear(&state->kernels, &state->driver);
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
