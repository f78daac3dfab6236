#include "tile_rows.h"

#include <limits.h>
#include <stdlib.h>

/* ---- the numbers of a row -------------------------------------------------------------------- */

/* A table of rows: what their numbers are called, how many come before `above`, which may be
 * missing, and how many there are with it; what tiles.c has; and what a kernel asks of a tile. */
struct table {
    const char *const *names;
    Py_ssize_t count, with_above;
    const void *rows;
    const size_t *row_count;
    const char *(*why_impossible)(const void *row);
};

#define INTS(type)  ((Py_ssize_t)(sizeof(type) / sizeof(int)))
#define NAME(field) #field,

static const char *why_impossible(const void *row);
static const char *why_impossible_backward(const void *row);

static const struct table *table_of(enum fa_direction direction)
{
    static const char *const names[] = {FA_TILE_KEY(NAME) FA_TILE(NAME)};
    static const char *const backward_names[] = {FA_BACKWARD_KEY(NAME) FA_BACKWARD_TILE(NAME)};
    static const struct table tables[] = {
        [FA_FORWARD] = {names, INTS(struct fa_tile_row) - INTS(struct fa_tile_above),
                        INTS(struct fa_tile_row), FA_TILES, &FA_TILE_COUNT, why_impossible},
        [FA_BACKWARD] = {backward_names,
                         INTS(struct fa_backward_row) - INTS(struct fa_backward_above),
                         INTS(struct fa_backward_row), FA_BACKWARD_TILES, &FA_BACKWARD_TILE_COUNT,
                         why_impossible_backward},
    };
    return &tables[direction];
}

PyObject *fa_tile_fields(enum fa_direction direction)
{
    const struct table *table = table_of(direction);
    PyObject *fields = PyTuple_New(table->count);
    for (Py_ssize_t i = 0; fields && i < table->count; i++) {
        PyObject *name = PyUnicode_FromString(table->names[i]);
        if (!name || PyTuple_SetItem(fields, i, name) < 0)
            Py_CLEAR(fields);
    }
    return fields;
}

static PyObject *write_ints(const int *fields, Py_ssize_t count)
{
    PyObject *numbers = PyTuple_New(count);
    for (Py_ssize_t i = 0; numbers && i < count; i++) {
        PyObject *number = PyLong_FromLong(fields[i]);
        if (!number || PyTuple_SetItem(numbers, i, number) < 0)
            Py_CLEAR(numbers);
    }
    return numbers;
}

PyObject *fa_tiles(enum fa_direction direction)
{
    const struct table *table = table_of(direction);
    PyObject *rows = PyList_New(0);
    for (size_t i = 0; rows && i < *table->row_count; i++) {
        const int *fields = (const int *)table->rows + i * (size_t)table->with_above;
        bool has_above = false;
        for (Py_ssize_t field = table->count; field < table->with_above; field++)
            has_above |= fields[field] != 0;
        PyObject *row = write_ints(fields, has_above ? table->with_above : table->count);
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

/* ---- what a tile must be --------------------------------------------------------------------- */

/* A tile that keeps the rules compiles, or spills at worst. */
static const char *why_impossible(const void *row)
{
    const struct fa_tile *tile = &((const struct fa_tile_row *)row)->tile;
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

/* The rules of kernels/backward_tile.cuh. */
static const char *why_impossible_backward(const void *row)
{
    const struct fa_backward_tile *tile = &((const struct fa_backward_row *)row)->tile;
    if (((const struct fa_backward_row *)row)->head_dim == FA_ANY)
        return "head_dim must be a bound";
    if (tile->warps < 4 || tile->warps > 16 || tile->warps % 4 || tile->warp_n < 16 ||
        tile->warp_n % 16)
        return "warps must be 4 to 16 in groups of four, warp_n a multiple of 16";
    if (tile->sub_m < 16 || tile->sub_m % 16 || tile->tile_m < 32 || tile->tile_m % 32 ||
        tile->tile_m / 2 % tile->sub_m || tile->tile_m / tile->sub_m > 11)
        return "sub_m must be a multiple of 16, and tile_m one of 2 * sub_m, 11 of them at most";
    return tile->stages == 1 || tile->stages == 2 ? NULL : "stages must be 1 or 2";
}

/* ---- rows that replace others ---------------------------------------------------------------- */

static int read_row(PyObject *row, const struct table *table, int *into)
{
    if (read_ints(row, table->count, table->with_above, into) < 0)
        return -1;
    const char *why = table->why_impossible(into);
    if (!why)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s in the tile row %R", why, row);
    return -1;
}

/* An array of rows; NULL with the exception set. */
static void *read_rows(PyObject *rows, const struct table *table, size_t *count)
{
    const Py_ssize_t length = PySequence_Size(rows);
    const size_t ints = (size_t)table->with_above;
    if (length < 0)
        return NULL;
    int *array = calloc((size_t)length + 1, ints * sizeof *array);
    if (!array) {
        PyErr_NoMemory();
        return NULL;
    }
    for (*count = 0; *count < (size_t)length; ++*count) {
        PyObject *row = PySequence_GetItem(rows, (Py_ssize_t)*count);
        const int status = row ? read_row(row, table, array + *count * ints) : -1;
        Py_XDECREF(row);
        if (status < 0) {
            free(array);
            return NULL;
        }
    }
    return array;
}

int fa_use_tiles(PyObject *rows, enum fa_direction direction, struct fa_tile_list *list)
{
    size_t count;
    void *read = read_rows(rows, table_of(direction), &count);
    if (!read)
        return -1;
    if (direction == FA_FORWARD) {
        free(list->rows);
        list->rows = read;
        list->count = count;
    } else {
        free(list->backward_rows);
        list->backward_rows = read;
        list->backward_count = count;
    }
    list->version++;
    return 0;
}

void fa_tile_rows_clear(struct fa_tile_list *list)
{
    free(list->rows);
    free(list->backward_rows);
    *list = (struct fa_tile_list){0};
}
