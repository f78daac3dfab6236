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

/* A row's numbers, of which there are `count`, or `with_above`. */
static int read_ints(PyObject *row, Py_ssize_t count, Py_ssize_t with_above, int *fields)
{
    const Py_ssize_t size = PyTuple_Check(row) ? PyTuple_Size(row) : 0;
    if (size != count && size != with_above) {
        PyErr_Format(PyExc_TypeError, "a tile row must be a tuple of %d ints, got %R", (int)count,
                     row);
        return -1;
    }
    for (Py_ssize_t i = 0; i < size; i++) {
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

static int read_row(PyObject *row, void *memory)
{
    struct fa_tile_row *into = memory;
    /* `above`, which may be missing, comes last. */
    if (read_ints(row, FIELD_COUNT, FIELD_COUNT + ABOVE_COUNT, (int *)into) < 0)
        return -1;
    const char *why = why_impossible(&into->tile);
    if (!why)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s in the tile row %R", why, row);
    return -1;
}

/* The rules of kernels/backward_tile.cuh. */
static const char *why_impossible_backward(const struct fa_backward_tile *tile)
{
    if (tile->warps < 4 || tile->warps > 16 || tile->warps % 4 || tile->warp_n < 16 ||
        tile->warp_n % 16)
        return "warps must be 4 to 16 in groups of four, warp_n a multiple of 16";
    if (tile->sub_m < 16 || tile->sub_m % 16 || tile->tile_m < 32 || tile->tile_m % 32 ||
        tile->tile_m / 2 % tile->sub_m || tile->tile_m / tile->sub_m > 11)
        return "sub_m must be a multiple of 16, and tile_m one of 2 * sub_m, 11 of them at most";
    return tile->stages == 1 || tile->stages == 2 ? NULL : "stages must be 1 or 2";
}

static int read_backward_row(PyObject *row, void *memory)
{
    struct fa_backward_tile *into = memory;
    enum { COUNT = sizeof *into / sizeof(int) };
    if (read_ints(row, COUNT, COUNT, (int *)into) < 0)
        return -1;
    const char *why = why_impossible_backward(into);
    if (!why)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s in the tile row %R", why, row);
    return -1;
}

/* An array of rows of `size` bytes; NULL with the exception set. */
static void *read_rows(PyObject *rows, size_t size, int (*read)(PyObject *row, void *into),
                       size_t *count)
{
    const Py_ssize_t length = PySequence_Size(rows);
    if (length < 0)
        return NULL;
    char *array = calloc((size_t)length + 1, size);
    if (!array) {
        PyErr_NoMemory();
        return NULL;
    }
    for (*count = 0; *count < (size_t)length; ++*count) {
        PyObject *row = PySequence_GetItem(rows, (Py_ssize_t)*count);
        const int status = row ? read(row, array + *count * size) : -1;
        Py_XDECREF(row);
        if (status < 0) {
            free(array);
            return NULL;
        }
    }
    return array;
}

int fa_use_tiles(PyObject *rows, struct fa_tile_list *list)
{
    size_t count;
    struct fa_tile_row *read = read_rows(rows, sizeof *read, read_row, &count);
    if (!read)
        return -1;
    free(list->rows);
    list->rows = read;
    list->count = count;
    list->version++;
    return 0;
}

int fa_use_backward_tiles(PyObject *rows, struct fa_tile_list *list)
{
    size_t count;
    struct fa_backward_tile *read = read_rows(rows, sizeof *read, read_backward_row, &count);
    if (!read)
        return -1;
    free(list->backward_rows);
    list->backward_rows = read;
    list->backward_count = count;
    list->version++;
    return 0;
}

void fa_tile_rows_clear(struct fa_tile_list *list)
{
    free(list->rows);
    free(list->backward_rows);
    *list = (struct fa_tile_list){0};
}
