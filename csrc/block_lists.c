#include "block_lists.h"

#include <stdio.h>

#include "arithmetic.h"
#include "error.h"

static int read_block_size(PyObject *object, int *size)
{
    const long value = PyLong_Check(object) ? PyLong_AsLong(object) : -1;
    if (value == -1 && PyErr_Occurred())
        PyErr_Clear();
    *size = (int)value;
    return value >= 1 && value <= FA_MAX_SIZE
               ? 0
               : fa_raise_value(PyExc_ValueError, "block_size", "integers from 1 on", object);
}

static int check_size_or_1(const struct fa_tensor *tensor, const char *name, int dimension,
                           const char *meaning, int64_t expected)
{
    const int64_t size = tensor->shape[dimension];
    if (size == expected || size == 1)
        return 0;
    return fa_raise(PyExc_ValueError, "%s must have %s %lld, or 1, in dimension %d, got %lld", name,
                    meaning, (long long)expected, dimension, (long long)size);
}

/* Counts have three dimensions, indices one more. */
static int read_tensor(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                       const struct fa_tensor *q, const struct fa_shape *shape,
                       const struct fa_block_lists_read *lists, struct fa_tensor *tensor)
{
    if (fa_tensor_read_int32(dlpack, object, name, ndim, tensor) < 0 ||
        fa_tensor_check_device(tensor, name, q, "q") < 0 ||
        check_size_or_1(tensor, name, 0, "q's batch", shape->batch) < 0 ||
        check_size_or_1(tensor, name, 1, "q's heads", shape->heads_q) < 0 ||
        fa_tensor_check_size(tensor, name, 2, "one row for each of the blocks,", lists->rows) < 0)
        return -1;
    if (ndim == 4 && tensor->shape[3] > lists->blocks)
        return fa_raise(PyExc_ValueError,
                        "%s must list no more than the %d blocks that there are, got %lld", name,
                        lists->blocks, (long long)tensor->shape[3]);
    if (ndim == 4 && !fa_tensor_has_contiguous_rows(tensor))
        return fa_raise(PyExc_ValueError, "%s must be contiguous in its last dimension", name);
    return 0;
}

int fa_block_lists_read(struct fa_dlpack *dlpack, PyObject *option, const char *name,
                        bool lists_keys, const struct fa_tensor *q, const struct fa_shape *shape,
                        struct fa_block_lists_read *lists)
{
    enum { SIZE_Q, SIZE_K, COUNTS, INDICES, FULL_COUNTS, FULL_INDICES, PARTS };
    static const char *const kinds[PARTS] = {[COUNTS] = "counts",
                                             [INDICES] = "indices",
                                             [FULL_COUNTS] = "full counts",
                                             [FULL_INDICES] = "full indices"};
    struct fa_tensor *const tensors[PARTS] = {[COUNTS] = &lists->counts,
                                              [INDICES] = &lists->indices,
                                              [FULL_COUNTS] = &lists->full_counts,
                                              [FULL_INDICES] = &lists->full_indices};
    if (!option)
        return 0;
    if (!PyTuple_Check(option) || PyTuple_Size(option) != PARTS)
        return fa_raise_value(PyExc_TypeError, name, "block sizes, and counts and indices of lists",
                              option);
    if (read_block_size(PyTuple_GetItem(option, SIZE_Q), &lists->block_q) < 0 ||
        read_block_size(PyTuple_GetItem(option, SIZE_K), &lists->block_k) < 0)
        return -1;
    const int q_blocks = CEIL_DIV(shape->seqlen_q, lists->block_q);
    const int k_blocks = CEIL_DIV(shape->seqlen_k, lists->block_k);
    lists->rows = lists_keys ? q_blocks : k_blocks;
    lists->blocks = lists_keys ? k_blocks : q_blocks;
    const bool has_full = PyTuple_GetItem(option, FULL_COUNTS) != Py_None;
    if (has_full != (PyTuple_GetItem(option, FULL_INDICES) != Py_None))
        return fa_raise(PyExc_ValueError,
                        "full blocks of %s need counts and indices: got one of them", name);
    for (int i = COUNTS; i < (has_full ? PARTS : FULL_COUNTS); i++) {
        char part[64];
        snprintf(part, sizeof part, "the %s of %s", kinds[i], name);
        if (read_tensor(dlpack, PyTuple_GetItem(option, i), part, i % 2 ? 4 : 3, q, shape, lists,
                        tensors[i]) < 0)
            return -1;
    }
    return 0;
}

bool fa_block_lists_are_own(const struct fa_block_lists_read *lists)
{
    const struct fa_tensor *const all[] = {&lists->counts, &lists->indices, &lists->full_counts,
                                           &lists->full_indices};
    for (int i = 0; i < 4; i++)
        if (all[i]->object && all[i]->shape[1] > 1)
            return true;
    return false;
}

struct fa_strides fa_block_list_strides(const struct fa_tensor *tensor)
{
    const int64_t *shape = tensor->shape, *stride = tensor->stride;
    return (struct fa_strides){
        .batch = shape[0] > 1 ? stride[0] : 0,
        .seqlen = stride[2],
        .head = shape[1] > 1 ? stride[1] : 0,
    };
}
