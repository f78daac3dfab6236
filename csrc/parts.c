#include "parts.h"

#include "error.h"
#include "overlap.h"

#define TENSORS 6
static const char *const NAMES[TENSORS] = {"out_partial", "lse_partial", "out",
                                           "lse",         "cu_seqlens",  "seqused"};

static void tensors_of(const struct fa_parts *parts, const struct fa_tensor *tensors[TENSORS])
{
    const struct fa_tensor *const all[] = {&parts->out_parts, &parts->lse_parts,  &parts->out,
                                           &parts->lse,       &parts->cu_seqlens, &parts->seqused};
    for (int i = 0; i < TENSORS; i++)
        tensors[i] = all[i];
}

int64_t fa_parts_rows(const struct fa_parts *parts)
{
    return parts->out.shape[0] * parts->out.shape[1] * parts->out.shape[2];
}

/* ---- checks ---------------------------------------------------------------------------------- */

static int check_float32(const struct fa_tensor *tensor, const char *name)
{
    if (tensor->dtype == FA_FLOAT32)
        return 0;
    return fa_raise(PyExc_TypeError, "%s must be float32, got %s", name,
                    fa_dtype_name(tensor->dtype));
}

/* Dimension i of the tensor is dimension `like[i]` of out_partial. */
static int check_sizes(const struct fa_parts *parts, const struct fa_tensor *tensor,
                       const char *name, const int *like)
{
    for (int i = 0; i < tensor->ndim; i++)
        if (tensor->shape[i] != parts->out_parts.shape[like[i]])
            return fa_raise(PyExc_ValueError, "%s must have size %lld like out_partial, got %lld",
                            name, (long long)parts->out_parts.shape[like[i]],
                            (long long)tensor->shape[i]);
    return 0;
}

static int check_counts(const struct fa_parts *parts)
{
    const int64_t *shape = parts->out_parts.shape, dims = shape[4];
    if (dims < 8 || dims > FA_MAX_PARTS_HEAD_DIM || dims % 8 != 0)
        return fa_raise(PyExc_ValueError,
                        "the head_dim of out_partial must be a multiple of 8 from 8 to %d, got "
                        "%lld",
                        FA_MAX_PARTS_HEAD_DIM, (long long)dims);
    int64_t rows = 1;
    for (int i = 1; i < 4; i++) {
        if (shape[i] > INT32_MAX || (shape[i] > 0 && rows > INT32_MAX / shape[i]))
            return fa_raise(PyExc_ValueError, "out_partial has more than 2^31 - 1 rows");
        rows *= shape[i];
    }
    if (shape[0] > INT32_MAX / 8)
        return fa_raise(PyExc_ValueError, "out_partial has %lld parts, at most %d are supported",
                        (long long)shape[0], INT32_MAX / 8);
    return 0;
}

/* Whether out can be written in place. 0 or -1. */
static int check_result(const struct fa_parts *parts, const struct fa_tensor *result,
                        const char *name)
{
    const struct fa_tensor *tensors[TENSORS];
    tensors_of(parts, tensors);
    if (result->is_read_only)
        return fa_raise(PyExc_ValueError, "%s is read-only", name);
    if (fa_tensor_overlaps_itself(result))
        return fa_raise(PyExc_ValueError, "%s has elements that share memory", name);
    for (int i = 0; i < TENSORS; i++)
        if (tensors[i] != result && tensors[i]->object && fa_tensors_overlap(result, tensors[i]))
            return fa_raise(PyExc_ValueError, "%s overlaps %s", name, NAMES[i]);
    return 0;
}

/* ---- reading --------------------------------------------------------------------------------- */

static int read_parts(struct fa_dlpack *dlpack, PyObject *const *arguments, struct fa_parts *parts)
{
    static const int like[] = {0, 1, 2, 3};
    struct fa_tensor *out = &parts->out_parts, *lse = &parts->lse_parts;
    if (fa_tensor_read(dlpack, arguments[0], NAMES[0], 5, out) < 0 || check_counts(parts) < 0 ||
        fa_tensor_read(dlpack, arguments[1], NAMES[1], 4, lse) < 0 ||
        check_float32(lse, NAMES[1]) < 0 ||
        fa_tensor_check_device(lse, NAMES[1], &parts->out_parts, NAMES[0]) < 0 ||
        check_sizes(parts, lse, NAMES[1], like) < 0)
        return -1;
    return fa_tensor_ensure_readable(dlpack, NAMES[0], out);
}

static int read_results(struct fa_dlpack *dlpack, PyObject *const *arguments,
                        struct fa_parts *parts)
{
    static const int like_out[] = {1, 2, 3, 4}, like_lse[] = {1, 3, 2};
    struct fa_tensor *out = &parts->out, *lse = &parts->lse;
    if (fa_tensor_read(dlpack, arguments[2], NAMES[2], 4, out) < 0 ||
        fa_tensor_check_device(out, NAMES[2], &parts->out_parts, NAMES[0]) < 0 ||
        check_sizes(parts, out, NAMES[2], like_out) < 0)
        return -1;
    if (!fa_tensor_is_readable(out))
        return fa_raise(PyExc_ValueError, "out must have contiguous rows at multiples of 16 bytes");
    if (arguments[3] != Py_None &&
        (fa_tensor_read(dlpack, arguments[3], NAMES[3], 3, lse) < 0 ||
         check_float32(lse, NAMES[3]) < 0 ||
         fa_tensor_check_device(lse, NAMES[3], &parts->out_parts, NAMES[0]) < 0 ||
         check_sizes(parts, lse, NAMES[3], like_lse) < 0))
        return -1;
    if (lse->object && !fa_tensor_is_contiguous(lse))
        return fa_raise(PyExc_ValueError, "lse must be contiguous");
    return 0;
}

static int read_lengths(struct fa_dlpack *dlpack, PyObject *const *arguments,
                        struct fa_parts *parts)
{
    struct fa_tensor *const lengths[] = {&parts->cu_seqlens, &parts->seqused};
    for (int i = 0; i < 2; i++)
        if (arguments[4 + i] != Py_None &&
            (fa_tensor_read_int32(dlpack, arguments[4 + i], NAMES[4 + i], 1, lengths[i]) < 0 ||
             fa_tensor_check_device(lengths[i], NAMES[4 + i], &parts->out_parts, NAMES[0]) < 0 ||
             fa_tensor_ensure_contiguous(dlpack, NAMES[4 + i], lengths[i]) < 0))
            return -1;
    const bool is_packed = parts->cu_seqlens.object != NULL;
    const int64_t count = is_packed ? parts->cu_seqlens.shape[0] - 1 : parts->out_parts.shape[1];
    if (count < 0 || count > INT32_MAX / 8)
        return fa_raise(PyExc_ValueError, "cu_seqlens must have the size of a batch and one");
    if (parts->seqused.object && parts->seqused.shape[0] != count)
        return fa_raise(PyExc_ValueError, "seqused must have size %lld, got %lld", (long long)count,
                        (long long)parts->seqused.shape[0]);
    parts->sequences = (int)count;
    return 0;
}

int fa_parts_read(struct fa_dlpack *dlpack, PyObject *const *arguments, struct fa_parts *parts)
{
    if (read_parts(dlpack, arguments, parts) < 0 || read_results(dlpack, arguments, parts) < 0 ||
        read_lengths(dlpack, arguments, parts) < 0 || fa_parts_recheck(parts) < 0 ||
        check_result(parts, &parts->out, NAMES[2]) < 0)
        return -1;
    return parts->lse.object ? check_result(parts, &parts->lse, NAMES[3]) : 0;
}

int fa_parts_recheck(const struct fa_parts *parts)
{
    const struct fa_tensor *tensors[TENSORS];
    tensors_of(parts, tensors);
    for (int i = 0; i < TENSORS; i++)
        if (tensors[i]->object && fa_tensor_recheck(tensors[i], NAMES[i]) < 0)
            return -1;
    return 0;
}

void fa_parts_release(struct fa_parts *parts)
{
    struct fa_tensor *const all[] = {&parts->out_parts, &parts->lse_parts,  &parts->out,
                                     &parts->lse,       &parts->cu_seqlens, &parts->seqused};
    for (int i = 0; i < TENSORS; i++)
        fa_tensor_release(all[i]);
}
