#include "tile_rows.h"

#include <limits.h>
#include <stdlib.h>

#define FIELD_COUNT (offsetof(struct fa_tile_row, above) / sizeof(int))
#define ABOVE_COUNT (sizeof(struct fa_tile_above) / sizeof(int))

PyObject *fa_tile_fields(void)
{
    static const char *const names[] = {
#define FA_NAME(field) #field,
        FA_TILE_KEY(FA_NAME) FA_TILE(FA_NAME)
#undef FA_NAME
    };
    PyObject *fields = PyTuple_New(FIELD_COUNT);
    for (size_t i = 0; fields && i < FIELD_COUNT; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name || PyTuple_SetItem(fields, (Py_ssize_t)i, name) < 0)
            Py_CLEAR(fields);
    }
    return fields;
}

static PyObject *write_ints(const struct fa_tile_row *row)
{
    const int *fields = (const int *)row;
    PyObject *numbers = PyTuple_New(FIELD_COUNT);
    for (size_t i = 0; numbers && i < FIELD_COUNT; i++) {
        PyObject *number = PyLong_FromLong(fields[i]);
        if (!number || PyTuple_SetItem(numbers, (Py_ssize_t)i, number) < 0)
            Py_CLEAR(numbers);
    }
    return numbers;
}

PyObject *fa_tiles(void)
{
    PyObject *rows = PyList_New(0);
    for (size_t i = 0; rows && i < FA_TILE_COUNT; i++) {
        PyObject *row = write_ints(&FA_TILES[i]);
        if (!row || PyList_Append(rows, row) < 0)
            Py_CLEAR(rows);
        Py_XDECREF(row);
    }
    return rows;
}

static int read_ints(PyObject *row, struct fa_tile_row *into)
{
    int *fields = (int *)into; /* `above`, which may be missing, comes last */
    const Py_ssize_t count = PyTuple_Check(row) ? PyTuple_Size(row) : 0;
    if (count != (Py_ssize_t)FIELD_COUNT && count != (Py_ssize_t)(FIELD_COUNT + ABOVE_COUNT)) {
        PyErr_Format(PyExc_TypeError, "a tile row must be a tuple of %d ints, got %R",
                     (int)FIELD_COUNT, row);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        const long long value = PyLong_AsLongLong(PyTuple_GetItem(row, i));
        const bool is_huge =
            value == -1 && PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_OverflowError);
        if (value == -1 && PyErr_Occurred() && !is_huge)
            return -1;
        if (is_huge || value < FA_ANY || value > INT_MAX) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%.20R is out of range in the tile row %R",
                         PyTuple_GetItem(row, i), row);
            return -1;
        }
        fields[i] = (int)value;
    }
    return 0;
}

/* A tile that keeps the rules compiles, or spills at worst. */
static const char *why_impossible(const struct fa_tile *tile)
{
#define CHECK(condition, message)                                                                  \
    if (!(condition))                                                                              \
        return message;
    FA_FORWARD_TILE_RULES(CHECK, tile->warps, tile->warp_m, tile->tile_n, tile->sub_n, tile->stages)
#undef CHECK
    if (tile->kernel < 0 || tile->kernel > FA_KERNEL_FORWARD_TMA)
        return "kernel must be 0 (cp.async) or 1 (TMA)";
    if (tile->producer < 0 || tile->producer >= FA_PRODUCER_COUNT ||
        (tile->producer && tile->kernel != FA_KERNEL_FORWARD_TMA))
        return "producer must be 0, 1 or 2, and 0 where the kernel is 0";
    return NULL;
}

static int read_row(PyObject *row, struct fa_tile_row *into)
{
    if (read_ints(row, into) < 0)
        return -1;
    const char *why = why_impossible(&into->tile);
    if (!why)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s in the tile row %R", why, row);
    return -1;
}

int fa_use_tiles(PyObject *rows, struct fa_tile_list *list)
{
    struct fa_tile_list read = {.version = list->version + 1};
    const Py_ssize_t count = PySequence_Size(rows);
    if (count < 0)
        return -1;
    read.rows = calloc((size_t)count + 1, sizeof *read.rows);
    if (!read.rows) {
        PyErr_NoMemory();
        return -1;
    }
    for (; read.count < (size_t)count; read.count++) {
        PyObject *row = PySequence_GetItem(rows, (Py_ssize_t)read.count);
        const int status = row ? read_row(row, &read.rows[read.count]) : -1;
        Py_XDECREF(row);
        if (status < 0) {
            fa_tile_rows_clear(&read);
            return -1;
        }
    }
    fa_tile_rows_clear(list);
    *list = read;
    return 0;
}

void fa_tile_rows_clear(struct fa_tile_list *list)
{
    free(list->rows);
    *list = (struct fa_tile_list){0};
}
