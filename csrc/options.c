#include "options.h"

#include <limits.h>
#include <math.h>
#include <stddef.h>

#include "error.h"

/* ---- readers of one value: 0, or -1 with TypeError or ValueError set ------------------------- */

/* Reading a number off a tensor would drop its gradient, and wait for its device. */
static int refuse_tensor(PyObject *object, const char *name, const char *expected)
{
    const int is_tensor = fa_has_attribute((PyObject *)Py_TYPE(object), "__dlpack__");
    if (is_tensor == 0)
        return 0;
    return fa_raise(PyExc_TypeError, "%s must be %s, got a tensor: no gradient would reach it",
                    name, expected);
}

static int read_float(PyObject *object, const char *name, float *out)
{
    if (!PyFloat_CheckExact(object) && refuse_tensor(object, name, "a number") < 0)
        return -1;
    const double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_TypeError))
        return fa_raise_value(PyExc_TypeError, name, "a number", object);
    *out = (float)value;
    if (PyErr_Occurred() || !isfinite(*out))
        return fa_raise_value(PyExc_ValueError, name, "finite in float32", object);
    return 0;
}

/* An integer of any kind; numbers beyond `least` and `most` become these. */
static int read_clamped(PyObject *object, const char *name, const char *expected, long least,
                        long most, int *out)
{
    if (!PyLong_CheckExact(object) && refuse_tensor(object, name, expected) < 0)
        return -1;
    PyObject *number = PyIndex_Check(object) ? PyNumber_Index(object) : NULL;
    if (!number)
        return fa_raise_value(PyExc_TypeError, name, expected, object);
    int overflow;
    const long value = PyLong_AsLongAndOverflow(number, &overflow);
    Py_DECREF(number);
    *out = (int)(overflow > 0 || value > most    ? most
                 : overflow < 0 || value < least ? least
                                                 : value);
    return 0;
}

static int read_scale(PyObject *object, const char *name, void *field)
{
    return object == Py_None ? 0 : read_float(object, name, field);
}

static int read_softcap(PyObject *object, const char *name, void *field)
{
    float *softcap = field;
    if (read_float(object, name, softcap) < 0)
        return -1;
    return *softcap >= 0 ? 0
                         : fa_raise_value(PyExc_ValueError, name, "0 (none) or positive", object);
}

/* In fp64, which tells 1 from what is next to it. */
static int read_probability(PyObject *object, const char *name, void *field)
{
    float rounded;
    if (read_float(object, name, &rounded) < 0)
        return -1;
    const double value = PyFloat_AsDouble(object);
    *(double *)field = value;
    return value >= 0 && value < 1 ? 0
                                   : fa_raise_value(PyExc_ValueError, name, "in [0, 1)", object);
}

static int read_flag(PyObject *object, const char *name, void *field)
{
    if (object != Py_True && object != Py_False && refuse_tensor(object, name, "True or False") < 0)
        return -1;
    const int truth = PyObject_IsTrue(object);
    *(bool *)field = truth > 0;
    return truth < 0 ? fa_raise_value(PyExc_TypeError, name, "True or False", object) : 0;
}

static int read_choice(PyObject *object, const char *name, void *field)
{
    if (object != Py_None && !PyBool_Check(object))
        return fa_raise_value(PyExc_TypeError, name, "True, False or None", object);
    *(enum fa_pack_gqa *)field = object == Py_None   ? FA_PACK_AUTO
                                 : object == Py_True ? FA_PACK_ALWAYS
                                                     : FA_PACK_NEVER;
    return 0;
}

/* What is beyond any number of keys counts as that many. */
static int read_count(PyObject *object, const char *name, void *field)
{
    int *count = field;
    if (read_clamped(object, name, "an integer", -1, FA_MAX_SIZE, count) < 0)
        return -1;
    return *count >= 0
               ? 0
               : fa_raise_value(PyExc_ValueError, name,
                                "0 (as the plan chooses), 1 (never split) or larger", object);
}

/* A bound of lengths: None is none, and so is what is beyond any sequence. */
static int read_bound(PyObject *object, const char *name, void *field)
{
    int *bound = field;
    if (object == Py_None)
        return 0;
    if (read_clamped(object, name, "an integer or None", -1, FA_NO_BOUND, bound) < 0)
        return -1;
    return *bound >= 0 ? 0 : fa_raise_value(PyExc_ValueError, name, "0 or larger", object);
}

/* One side of a window: None is unbounded, and so is what is beyond any sequence. */
static int read_window_side(PyObject *object, const char *name, int *side)
{
    const int far = 2 * FA_MAX_SIZE;
    *side = FA_UNBOUNDED;
    if (object == Py_None)
        return 0;
    if (read_clamped(object, name, "(left, right) of integers or None", -far, far + 1, side) < 0)
        return -1;
    if (*side > far)
        *side = FA_UNBOUNDED;
    return 0;
}

/* The two items of a sequence of two, which is not asked for more: it may have no end. NULL where
 * it is none, with or without an exception set. */
static PyObject *pair_of(PyObject *object)
{
    const bool is_pair = PySequence_Check(object) && PySequence_Size(object) == 2;
    PyObject *first = is_pair ? PySequence_GetItem(object, 0) : NULL;
    PyObject *second = first ? PySequence_GetItem(object, 1) : NULL;
    PyObject *pair = second ? PyTuple_Pack(2, first, second) : NULL;
    Py_XDECREF(first);
    Py_XDECREF(second);
    return pair;
}

static int read_window(PyObject *object, const char *name, void *field)
{
    struct fa_window *window = field;
    if (object == Py_None)
        return 0;
    PyObject *sides = PyTuple_CheckExact(object) ? Py_NewRef(object) : pair_of(object);
    int status = -1;
    if (!sides || PyTuple_Size(sides) != 2)
        fa_raise_value(PyExc_TypeError, name, "(left, right)", object);
    else if (read_window_side(PyTuple_GetItem(sides, 0), name, &window->left) == 0)
        status = read_window_side(PyTuple_GetItem(sides, 1), name, &window->right);
    Py_XDECREF(sides);
    return status;
}

static int read_arch(PyObject *object, const char *name, void *field)
{
    int *arch = field;
    if (object == Py_None)
        return 0;
    if (read_clamped(object, name, "a compute capability or None", 0, 10000, arch) < 0)
        return -1;
    return *arch < 10000 && *arch > 0
               ? 0
               : fa_raise_value(PyExc_ValueError, name, "a compute capability such as 120", object);
}

static int read_object(PyObject *object, const char *name, void *field)
{
    (void)name;
    *(PyObject **)field = object == Py_None ? NULL : object;
    return 0;
}

/* ---- the table ------------------------------------------------------------------------------- */

static const struct row {
    const char *name;
    int (*read)(PyObject *object, const char *name, void *field);
    size_t offset;
} ROWS[] = {
#define FA_ROW(name, type, reader, value, text)                                                    \
    {#name, read_##reader, offsetof(struct fa_options, name)},
    FA_OPTIONS(FA_ROW)
#undef FA_ROW
};

static const struct fa_options DEFAULTS = {
#define FA_DEFAULT(name, type, reader, value, text) .name = value,
    FA_OPTIONS(FA_DEFAULT)
#undef FA_DEFAULT
};

static bool takes(enum fa_method_kind kind, int option)
{
    if (option < FA_OPTION_return_lse)
        return true;
    if (option < FA_OPTION_bias_gradient)
        return kind == FA_METHOD_FORWARD || kind == FA_METHOD_CACHE;
    if (option < FA_OPTION_arch)
        return kind == FA_METHOD_BACKWARD || kind == FA_METHOD_EXPLAIN;
    return kind == (option < FA_OPTION_k ? FA_METHOD_EXPLAIN : FA_METHOD_CACHE);
}

/* The option of that name, looked for from `next` on, where it is if names come in order. -1 where
 * there is none. */
static int find_option(const struct fa_option_names *names, PyObject *name, int next)
{
    for (int option = next; option < FA_OPTION_COUNT; option++)
        if (names->names[option] == name)
            return option;
    for (int option = 0; option < FA_OPTION_COUNT; option++)
        if (names->names[option] == name || PyUnicode_Compare(names->names[option], name) == 0)
            return option;
    return -1;
}

/* Causal makes the right side 0. A window that hides every key from every query (left + right < 0)
 * is none, as in FlashAttention-4; (-1, -1) is FlashAttention-2's name for that. Causal stays. */
static void resolve_window(struct fa_options *options)
{
    struct fa_window *window = &options->window_size;
    if (options->causal)
        window->right = 0;
    if (window->left == FA_UNBOUNDED || window->right == FA_UNBOUNDED ||
        window->left + window->right >= 0)
        return;
    *window = (struct fa_window){FA_UNBOUNDED, options->causal ? 0 : FA_UNBOUNDED};
}

int fa_option_names_make(struct fa_option_names *names)
{
    for (int i = 0; i < FA_OPTION_COUNT; i++)
        if (!(names->names[i] = PyUnicode_InternFromString(ROWS[i].name)))
            return -1;
    return 0;
}

static int read_option(int option, PyObject *value, struct fa_options *options)
{
    const struct row *row = &ROWS[option];
    return row->read(value, row->name, (char *)options + row->offset);
}

int fa_options_read(const struct fa_option_names *names, const char *method,
                    enum fa_method_kind kind, PyObject *const *values, int positional,
                    PyObject *kwnames, struct fa_options *options)
{
    *options = DEFAULTS;
    for (int i = 0; i < positional; i++)
        if (read_option(i, values[i], options) < 0)
            return -1;
    const Py_ssize_t count = kwnames ? PyTuple_Size(kwnames) : 0;
    int next = positional;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *name = PyTuple_GetItem(kwnames, i);
        const int option = find_option(names, name, next);
        if (option < 0 || !takes(kind, option))
            return fa_raise(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", method,
                            name);
        if (option < positional)
            return fa_raise(PyExc_TypeError, "%s() got multiple values for argument '%U'", method,
                            name);
        if (read_option(option, values[positional + i], options) < 0)
            return -1;
        next = option + 1;
    }
    resolve_window(options);
    return 0;
}
