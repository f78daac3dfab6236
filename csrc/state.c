#include "state.h"

#include <string.h>

#include "tile_rows.h"

/* "a.b" of a module a.b._C; NULL with the exception set. */
static PyObject *package_of(PyObject *module)
{
    PyObject *name = PyModule_GetNameObject(module);
    PyObject *parts = name ? PyObject_CallMethod(name, "rpartition", "s", ".") : NULL;
    PyObject *package = parts ? PySequence_GetItem(parts, 0) : NULL;
    Py_XDECREF(parts);
    Py_XDECREF(name);
    return package;
}

int fa_state_init(struct fa_state *state, PyObject *module)
{
    memset(state, 0, sizeof *state);
    state->package = state->dlpack.package = state->kernels.package = package_of(module);
    return state->package ? fa_option_names_make(&state->option_names) : -1;
}

int fa_state_traverse(struct fa_state *state, visitproc visit, void *arg)
{
    Py_VISIT(state->dlpack.frameworks);
    Py_VISIT(state->kernels.jit);
    for (int i = 0; i < state->dlpack.type_count; i++) {
        Py_VISIT(state->dlpack.types[i].type);
        Py_VISIT(state->dlpack.types[i].empty_like);
    }
    return fa_following_traverse(&state->following, visit, arg);
}

void fa_state_clear(struct fa_state *state)
{
    Py_CLEAR(state->dlpack.frameworks);
    Py_CLEAR(state->kernels.jit);
    fa_following_clear(&state->following);
    while (state->dlpack.type_count > 0) {
        struct fa_tensor_type *last = &state->dlpack.types[--state->dlpack.type_count];
        Py_CLEAR(last->type);
        Py_CLEAR(last->empty_like);
    }
}

void fa_state_free(struct fa_state *state)
{
    fa_state_clear(state);
    for (int i = 0; i < FA_OPTION_COUNT; i++)
        Py_CLEAR(state->option_names.names[i]);
    fa_kernel_table_clear(&state->kernels, &state->driver);
    fa_tile_rows_clear(&state->tiles);
    Py_CLEAR(state->package);
}
