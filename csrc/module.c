/* The Python module flash_attn_sm120._C: method table and module state. */
#include <Python.h>
#include <string.h>

#include "append.h"
#include "attention.h"
#include "explain.h"
#include "planning.h"
#include "state.h"
#include "tile_rows.h"

/* ---- arguments ------------------------------------------------------------------------------- */

/* A method's arguments: tensors by position, then options by position, as far as all calls have
 * them, or by name. */
struct method {
    const char *name;
    enum fa_method_kind kind;
    int tensors;
};

/* The options of a call into a zeroed problem. 0, or -1 with the exception set. */
static int read_options(struct fa_state *state, const struct method *method,
                        PyObject *const *arguments, Py_ssize_t count, PyObject *kwnames,
                        struct fa_problem *problem)
{
    memset(problem, 0, sizeof *problem);
    const Py_ssize_t options = count - method->tensors;
    if (options < 0 || options > FA_OPTION_return_lse) {
        PyErr_Format(PyExc_TypeError, "%s() takes %d to %d positional arguments, got %d",
                     method->name, method->tensors, method->tensors + FA_OPTION_return_lse,
                     (int)count);
        return -1;
    }
    problem->is_cache = method->kind == FA_METHOD_CACHE;
    return fa_options_read(&state->option_names, method->name, method->kind,
                           arguments + method->tensors, (int)options, kwnames, &problem->options);
}

/* ---- methods --------------------------------------------------------------------------------- */

/* Reads and checks the tensors of a forward whose options have been read. 0 or -1. */
static int read_forward(struct fa_state *state, PyObject *const qkv[3], struct fa_problem *problem)
{
    if (fa_problem_read(&state->dlpack, qkv, FA_READ_DATA, problem) < 0)
        return -1;
    return problem->is_cache ? fa_append_read(&state->dlpack, problem) : 0;
}

/* (out, lse) of a problem that has been read. */
static PyObject *run_forward(struct fa_state *state, struct fa_problem *problem)
{
    if (fa_problem_set_results(&state->dlpack, problem) < 0 ||
        fa_attention_forward(state, problem) < 0)
        return NULL;
    return PyTuple_Pack(2, problem->out.object,
                        problem->lse.object ? problem->lse.object : Py_None);
}

static PyObject *run(PyObject *module, const struct method *method, PyObject *const *arguments,
                     Py_ssize_t count, PyObject *kwnames)
{
    struct fa_state *state = PyModule_GetState(module);
    struct fa_problem problem;
    PyObject *result = NULL;
    if (read_options(state, method, arguments, count, kwnames, &problem) == 0 &&
        read_forward(state, arguments, &problem) == 0)
        result = run_forward(state, &problem);
    fa_problem_release(&problem);
    return result;
}

static PyObject *run_if_plain(PyObject *module, const struct method *method,
                              PyObject *const *arguments, Py_ssize_t count, PyObject *kwnames)
{
    struct fa_state *state = PyModule_GetState(module);
    struct fa_problem problem;
    if (read_options(state, method, arguments, count, kwnames, &problem) < 0)
        return NULL;
    const struct fa_options *options = &problem.options;
    PyObject *const tensors[] = {
        arguments[0],       arguments[1],          arguments[2],          options->learnable_sink,
        options->out,       options->lse,          options->cu_seqlens_q, options->cu_seqlens_k,
        options->seqused_q, options->seqused_k,    options->page_table,   options->k,
        options->v,         options->dropout_seed, options->alibi_slopes, options->attn_bias,
        options->k_descale, options->v_descale,    options->q_descale};
    const int is_plain =
        fa_following_is_plain_call(&state->following, tensors, sizeof tensors / sizeof *tensors);
    PyObject *result = NULL;
    if (is_plain == 0)
        result = Py_NewRef(Py_NotImplemented);
    else if (is_plain > 0 && read_forward(state, arguments, &problem) == 0)
        result = run_forward(state, &problem);
    else if (is_plain > 0 && PyErr_ExceptionMatches(PyExc_Exception)) {
        PyErr_Clear(); /* it may have no memory, on the meta device */
        result = Py_NewRef(Py_NotImplemented);
    }
    fa_problem_release(&problem);
    return result;
}

static PyObject *forward(PyObject *module, PyObject *const *arguments, Py_ssize_t count,
                         PyObject *kwnames)
{
    static const struct method METHOD = {"forward", FA_METHOD_FORWARD, 3};
    return run(module, &METHOD, arguments, count, kwnames);
}

static PyObject *forward_if_plain(PyObject *module, PyObject *const *arguments, Py_ssize_t count,
                                  PyObject *kwnames)
{
    static const struct method METHOD = {"forward_if_plain", FA_METHOD_FORWARD, 3};
    return run_if_plain(module, &METHOD, arguments, count, kwnames);
}

static PyObject *cache_forward(PyObject *module, PyObject *const *arguments, Py_ssize_t count,
                               PyObject *kwnames)
{
    static const struct method METHOD = {"cache_forward", FA_METHOD_CACHE, 3};
    return run(module, &METHOD, arguments, count, kwnames);
}

static PyObject *cache_forward_if_plain(PyObject *module, PyObject *const *arguments,
                                        Py_ssize_t count, PyObject *kwnames)
{
    static const struct method METHOD = {"cache_forward_if_plain", FA_METHOD_CACHE, 3};
    return run_if_plain(module, &METHOD, arguments, count, kwnames);
}

static PyObject *backward(PyObject *module, PyObject *const *arguments, Py_ssize_t count,
                          PyObject *kwnames)
{
    static const struct method METHOD = {"backward", FA_METHOD_BACKWARD, 7};
    struct fa_state *state = PyModule_GetState(module);
    struct fa_problem problem;
    struct fa_gradients gradients = {0};
    PyObject *result = NULL;
    if (read_options(state, &METHOD, arguments, count, kwnames, &problem) == 0 &&
        fa_problem_read(&state->dlpack, arguments + 1, FA_READ_DATA, &problem) == 0 &&
        fa_gradients_read(&state->dlpack, arguments[0], arguments[4], arguments[5], arguments[6],
                          &problem, &gradients) == 0 &&
        fa_gradients_allocate(&state->dlpack, &problem, &gradients) == 0 &&
        fa_attention_backward(state, &problem, &gradients) == 0)
        result = PyTuple_Pack(gradients.dbias.object ? 5 : 4, gradients.dq.object,
                              gradients.dk.object, gradients.dv.object,
                              gradients.dsink.object ? gradients.dsink.object : Py_None,
                              gradients.dbias.object);
    fa_gradients_release(&gradients);
    fa_problem_release(&problem);
    return result;
}

static PyObject *combine(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    struct fa_state *state = PyModule_GetState(module);
    struct fa_parts parts = {0};
    if (count != 6) {
        PyErr_Format(PyExc_TypeError, "combine() takes 6 positional arguments, got %d", (int)count);
        return NULL;
    }
    const bool is_done = fa_parts_read(&state->dlpack, arguments, &parts) == 0 &&
                         fa_attention_combine(state, &parts) == 0;
    fa_parts_release(&parts);
    return is_done ? Py_NewRef(Py_None) : NULL;
}

static PyObject *scatter(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    struct fa_state *state = PyModule_GetState(module);
    struct fa_scatter call = {0};
    PyObject *all[FA_SCATTER_TENSORS] = {
        [FA_SCATTER_K_DESCALE] = Py_None, [FA_SCATTER_V_DESCALE] = Py_None};
    if (count != FA_SCATTER_K_DESCALE && count != FA_SCATTER_TENSORS) {
        PyErr_Format(PyExc_TypeError, "scatter() takes 5 or 7 positional arguments, got %d",
                     (int)count);
        return NULL;
    }
    memcpy(all, arguments, (size_t)count * sizeof *all);
    const bool is_done =
        fa_scatter_read(&state->dlpack, all, &call) == 0 && fa_attention_scatter(state, &call) == 0;
    fa_scatter_release(&call);
    return is_done ? Py_NewRef(Py_None) : NULL;
}

static PyObject *explain_direction(PyObject *module, const struct method *method,
                                   enum fa_direction direction, PyObject *const *arguments,
                                   Py_ssize_t count, PyObject *kwnames)
{
    struct fa_state *state = PyModule_GetState(module);
    struct fa_problem problem;
    PyObject *result = NULL;
    if (read_options(state, method, arguments, count, kwnames, &problem) == 0 &&
        fa_problem_read(&state->dlpack, arguments, FA_READ_LAYOUT, &problem) == 0)
        result = fa_explain(state, &problem, direction);
    fa_problem_release(&problem);
    return result;
}

static PyObject *explain(PyObject *module, PyObject *const *arguments, Py_ssize_t count,
                         PyObject *kwnames)
{
    static const struct method METHOD = {"explain", FA_METHOD_EXPLAIN, 3};
    return explain_direction(module, &METHOD, FA_FORWARD, arguments, count, kwnames);
}

static PyObject *explain_backward(PyObject *module, PyObject *const *arguments, Py_ssize_t count,
                                  PyObject *kwnames)
{
    static const struct method METHOD = {"explain_backward", FA_METHOD_EXPLAIN, 3};
    return explain_direction(module, &METHOD, FA_BACKWARD, arguments, count, kwnames);
}

static PyObject *follow(PyObject *module, PyObject *arguments)
{
    struct fa_state *state = PyModule_GetState(module);
    PyObject *plain_types, *questions, *forward_ad;
    if (!PyArg_ParseTuple(arguments, "OOO:follow", &plain_types, &questions, &forward_ad) ||
        fa_following_set(&state->following, plain_types, questions, forward_ad) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *devices(PyObject *module, PyObject *Py_UNUSED(unused))
{
    struct fa_state *state = PyModule_GetState(module);
    return fa_explain_devices(state);
}

static PyObject *device_of_arch(PyObject *Py_UNUSED(module), PyObject *arch)
{
    int number;
    if (!PyArg_Parse(arch, "i:device_of_arch", &number))
        return NULL;
    const struct fa_device device = fa_device_of_arch(number);
    return fa_explain_device("", &device);
}

static PyObject *counts(PyObject *module, PyObject *Py_UNUSED(unused))
{
    return fa_explain_counts(PyModule_GetState(module));
}

static PyObject *use_rows(PyObject *module, PyObject *rows, enum fa_direction direction)
{
    struct fa_state *state = PyModule_GetState(module);
    if (fa_use_tiles(rows, direction, &state->tiles) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *use_tiles(PyObject *module, PyObject *rows)
{
    return use_rows(module, rows, FA_FORWARD);
}

static PyObject *use_backward_tiles(PyObject *module, PyObject *rows)
{
    return use_rows(module, rows, FA_BACKWARD);
}

static PyObject *tiles(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return fa_tiles(FA_FORWARD);
}

static PyObject *backward_tiles(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return fa_tiles(FA_BACKWARD);
}

static PyObject *tile_fields(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return fa_tile_fields(FA_FORWARD);
}

static PyObject *backward_tile_fields(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return fa_tile_fields(FA_BACKWARD);
}

static PyObject *use_card(PyObject *module, PyObject *arguments)
{
    struct fa_state *state = PyModule_GetState(module);
    const char *name;
    int kind;
    if (!PyArg_ParseTuple(arguments, "si:use_card", &name, &kind) ||
        fa_planning_use_card(state, name, kind) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *card_kind(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    const char *name;
    int arch;
    if (!PyArg_ParseTuple(arguments, "si:card_kind", &name, &arch))
        return NULL;
    return PyLong_FromLong(fa_device_kind_of_name(name, arch));
}

/* ---- the method table ------------------------------------------------------------------------ */

/* Signatures as inspect.signature() reads them. */
#define CALL_OPTIONS     FA_CALL_OPTIONS(FA_OPTION_SIGNATURE)
#define RESULT_OPTIONS   FA_RESULT_OPTIONS(FA_OPTION_SIGNATURE)
#define GRADIENT_OPTIONS FA_GRADIENT_OPTIONS(FA_OPTION_SIGNATURE)
#define PLAN_OPTIONS     FA_PLAN_OPTIONS(FA_OPTION_SIGNATURE)
#define CACHE_OPTIONS    FA_CACHE_OPTIONS(FA_OPTION_SIGNATURE)
#define FAST_METHOD(name, doc)                                                                     \
    {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL | METH_KEYWORDS, doc}

static PyMethodDef METHODS[] = {
    FAST_METHOD(forward, "forward($module, q, k, v, /" CALL_OPTIONS ", *" RESULT_OPTIONS ")\n--\n\n"
                         "(out, lse) of a call; the options are those of flash_attn_func."),
    FAST_METHOD(forward_if_plain,
                "forward_if_plain($module, q, k, v, /" CALL_OPTIONS ", *" RESULT_OPTIONS ")\n--\n\n"
                "The same, or NotImplemented where torch may follow the call: see follow()."),
    FAST_METHOD(cache_forward, "cache_forward($module, q, k_cache, v_cache, /" CALL_OPTIONS
                               ", *" RESULT_OPTIONS CACHE_OPTIONS
                               ")\n--\n\n(out, lse) of a call of caches, to which k and v are "
                               "appended first."),
    FAST_METHOD(cache_forward_if_plain,
                "cache_forward_if_plain($module, q, k_cache, v_cache, /" CALL_OPTIONS
                ", *" RESULT_OPTIONS CACHE_OPTIONS
                ")\n--\n\nThe same, or NotImplemented, as forward_if_plain()."),
    FAST_METHOD(
        backward,
        "backward($module, dout, q, k, v, out, lse, dlse, /" CALL_OPTIONS ", *" GRADIENT_OPTIONS
        ")\n--\n\n(dq, dk, dv, dsink) of a call, and dbias where bias_gradient asks for it; dlse "
        "and dsink may be None."),
    {"combine", (PyCFunction)(void (*)(void))combine, METH_FASTCALL,
     "combine($module, out_parts, lse_parts, out, lse, cu_seqlens, seqused, /)\n--\n\n"
     "Puts parts together, into out and lse; the last three may be None."},
    {"scatter", (PyCFunction)(void (*)(void))scatter, METH_FASTCALL,
     "scatter($module, k, v, k_cache, v_cache, slots, k_descale=None, v_descale=None, /)\n--\n\n"
     "Writes rows of k and v to their slots in caches of pages; a negative slot is none."},
    FAST_METHOD(explain, "explain($module, q, k, v, /" CALL_OPTIONS
                         ", *" GRADIENT_OPTIONS PLAN_OPTIONS ")\n--\n\n"
                         "The plan of the forward of a call: a dict."),
    FAST_METHOD(explain_backward, "explain_backward($module, q, k, v, /" CALL_OPTIONS
                                  ", *" GRADIENT_OPTIONS PLAN_OPTIONS ")\n--\n\n"
                                  "The plan of the backward of a call: a dict."),
    {"follow", follow, METH_VARARGS,
     "follow($module, plain_types, questions, forward_ad, /)\n--\n\n"
     "Tells what forward_if_plain() asks: see flash_attn_sm120/following.py."},
    {"devices", devices, METH_NOARGS,
     "devices($module, /)\n--\n\n(driver version, [device, ...])."},
    {"device_of_arch", device_of_arch, METH_O,
     "device_of_arch($module, arch, /)\n--\n\n"
     "The device that plans of a compute capability are made for where there is none."},
    {"counts", counts, METH_NOARGS,
     "counts($module, /)\n--\n\nHow many plans calls have made, and kernels loaded, so far."},
    {"use_tiles", use_tiles, METH_O,
     "use_tiles($module, rows, /)\n--\n\nPuts rows before those of csrc/tiles.c."},
    {"use_backward_tiles", use_backward_tiles, METH_O,
     "use_backward_tiles($module, rows, /)\n--\n\nThe same of the backward."},
    {"tiles", tiles, METH_NOARGS, "tiles($module, /)\n--\n\nThe rows of csrc/tiles.c."},
    {"backward_tiles", backward_tiles, METH_NOARGS,
     "backward_tiles($module, /)\n--\n\nThe same of the backward."},
    {"tile_fields", tile_fields, METH_NOARGS,
     "tile_fields($module, /)\n--\n\nThe names of a row's numbers."},
    {"backward_tile_fields", backward_tile_fields, METH_NOARGS,
     "backward_tile_fields($module, /)\n--\n\nThe same of the backward."},
    {"use_card", use_card, METH_VARARGS,
     "use_card($module, name, kind, /)\n--\n\n"
     "Has a 12.x card of an unknown name count as of a class: 1 GeForce-like, 2 PRO-like."},
    {"card_kind", card_kind, METH_VARARGS,
     "card_kind($module, name, arch, /)\n--\n\nThe class of a card by its name; 0: unknown."},
    {NULL, NULL, 0, NULL},
};

/* ---- the module ------------------------------------------------------------------------------ */

static int exec_module(PyObject *module)
{
    return fa_state_init(PyModule_GetState(module), module);
}

static int traverse_module(PyObject *module, visitproc visit, void *arg)
{
    struct fa_state *state = PyModule_GetState(module);
    return state ? fa_state_traverse(state, visit, arg) : 0;
}

static int clear_module(PyObject *module)
{
    struct fa_state *state = PyModule_GetState(module);
    if (state)
        fa_state_clear(state);
    return 0;
}

static void free_module(void *module)
{
    struct fa_state *state = PyModule_GetState(module);
    if (state)
        fa_state_free(state);
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
