#include "block_lists.h"

#include "arithmetic.h"
#include "error.h"

/* A part of the option, with its name for messages. */
struct part {
    PyObject *object;
    const char *option, *name;
};

static int read_block_size(struct part part, int *size)
{
    const long value = PyLong_Check(part.object) ? PyLong_AsLong(part.object) : -1;
    if (value == -1 && PyErr_Occurred())
        PyErr_Clear();
    *size = (int)value;
    return value >= 1 && value <= FA_MAX_SIZE
               ? 0
               : fa_raise_value(PyExc_ValueError, "block_size", "integers from 1 on", part.object);
}

static int check_size(const struct fa_tensor *tensor, struct part part, int dimension,
                      const char *meaning, int64_t expected, bool is_broadcast)
{
    const int64_t size = tensor->shape[dimension];
    if (size == expected || (is_broadcast && size == 1))
        return 0;
    return fa_raise(PyExc_ValueError, "%s of %s must have %s %lld%s in dimension %d, got %lld",
                    part.name, part.option, meaning, (long long)expected,
                    is_broadcast ? ", or 1," : "", dimension, (long long)size);
}

/* Counts have three dimensions, indices one more. */
static int read_tensor(struct fa_dlpack *dlpack, struct part part, int ndim,
                       const struct fa_tensor *q, const struct fa_shape *shape,
                       const struct fa_block_lists_read *lists, struct fa_tensor *tensor)
{
    if (fa_tensor_read_int32(dlpack, part.object, part.name, ndim, tensor) < 0)
        return -1;
    if (tensor->device_type != q->device_type || tensor->device_id != q->device_id) {
        char expected[FA_DEVICE_NAME_SIZE], got[FA_DEVICE_NAME_SIZE];
        fa_device_name(q, expected);
        fa_device_name(tensor, got);
        return fa_raise(PyExc_ValueError, "%s of %s must be on q's device, %s, got %s", part.name,
                        part.option, expected, got);
    }
    if (check_size(tensor, part, 0, "q's batch", shape->batch, true) < 0 ||
        check_size(tensor, part, 1, "q's heads", shape->heads_q, true) < 0 ||
        check_size(tensor, part, 2, "one row for each of the blocks,", lists->rows, false) < 0)
        return -1;
    if (ndim == 4 && tensor->shape[3] > lists->blocks)
        return fa_raise(PyExc_ValueError,
                        "%s of %s must list no more than the %d blocks that there are, got %lld",
                        part.name, part.option, lists->blocks, (long long)tensor->shape[3]);
    if (ndim == 4 && !fa_tensor_has_contiguous_rows(tensor))
        return fa_raise(PyExc_ValueError, "%s of %s must be contiguous in its last dimension",
                        part.name, part.option);
    return 0;
}

int fa_block_lists_read(struct fa_dlpack *dlpack, PyObject *option, const char *name,
                        bool lists_keys, const struct fa_tensor *q, const struct fa_shape *shape,
                        struct fa_block_lists_read *lists)
{
    enum { SIZE_Q, SIZE_K, COUNTS, INDICES, FULL_COUNTS, FULL_INDICES, PARTS };
    static const char *const names[] = {"block_size",  "block_size",      "the counts",
                                        "the indices", "the full counts", "the full indices"};
    if (!option)
        return 0;
    if (!PyTuple_Check(option) || PyTuple_Size(option) != PARTS)
        return fa_raise_value(PyExc_TypeError, name, "block sizes, and counts and indices of lists",
                              option);
    struct part parts[PARTS];
    for (int i = 0; i < PARTS; i++)
        parts[i] = (struct part){PyTuple_GetItem(option, i), name, names[i]};
    if (read_block_size(parts[SIZE_Q], &lists->block_q) < 0 ||
        read_block_size(parts[SIZE_K], &lists->block_k) < 0)
        return -1;
    const int q_blocks = CEIL_DIV(shape->seqlen_q, lists->block_q);
    const int k_blocks = CEIL_DIV(shape->seqlen_k, lists->block_k);
    lists->rows = lists_keys ? q_blocks : k_blocks;
    lists->blocks = lists_keys ? k_blocks : q_blocks;
    struct fa_tensor *const tensors[] = {&lists->counts, &lists->indices, &lists->full_counts,
                                         &lists->full_indices};
    const bool has_full = parts[FULL_COUNTS].object != Py_None;
    if (has_full != (parts[FULL_INDICES].object != Py_None))
        return fa_raise(PyExc_ValueError,
                        "full blocks of %s need counts and indices: got one of them", name);
    for (int i = COUNTS; i < (has_full ? PARTS : FULL_COUNTS); i++)
        if (read_tensor(dlpack, parts[i], i % 2 ? 4 : 3, q, shape, lists, tensors[i - COUNTS]) < 0)
            return -1;
    return 0;
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

void fa_block_lists_release(struct fa_block_lists_read *lists)
{
    fa_tensor_release(&lists->counts);
    fa_tensor_release(&lists->indices);
    fa_tensor_release(&lists->full_counts);
    fa_tensor_release(&lists->full_indices);
}
