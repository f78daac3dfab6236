/* Tensors as the C code sees them, whatever framework they come from. */
#ifndef FA_TENSOR_H
#define FA_TENSOR_H

#include <Python.h>
#include <stdbool.h>
#include <stdint.h>

#include "../kernels/geometry.h" /* fa_element_bytes */

#define FA_MAX_NDIM    5
#define FA_ONE_OR_TWO  (-1)
#define FA_ANY_NDIM    (-2) /* of what a mod captured */
#define FA_UP_TO_TWO   (-3)
#define FA_HEADS_FIRST (-4) /* 4, the heads before seqlen: 1 and 2 are exchanged when it is read */

enum fa_device_type { FA_DEVICE_CPU = 1, FA_DEVICE_CUDA = 2 }; /* DLPack's numbers */

struct fa_tensor {
    void *data;
    int ndim;
    int64_t shape[FA_MAX_NDIM];
    int64_t stride[FA_MAX_NDIM]; /* in elements; 0 and negative are legal */
    uintptr_t begin, end;        /* all elements lie in between; both 0 where there are none */
    enum fa_dtype dtype; /* floating-point; of lengths and pages FA_INT32, of seeds FA_INT64, of
                          * caches also FA_FLOAT8_E4M3 */
    enum fa_device_type device_type;
    int device_id;
    bool is_heads_first;            /* read by FA_HEADS_FIRST: its object has 1 and 2 exchanged */
    bool is_read_only;              /* its producer says so */
    PyObject *object;               /* what it was read from, a strong reference; NULL: no tensor */
    const void *api;                /* DLPackExchangeAPI of its type; NULL: it came in a capsule */
    PyObject *empty_like;           /* that of its type, borrowed; NULL: none is known */
    void *managed;                  /* the producer's DLPack struct that we own; NULL: borrowed */
    void (*release)(void *managed); /* and how to give it back */
};

/* What tensor.c keeps between calls: the tensor types that it has met. */
#define FA_MAX_TENSOR_TYPES 16
struct fa_tensor_type {
    PyObject *type;       /* a reference, so that its address is not used again by another type */
    const void *api;      /* DLPackExchangeAPI; NULL: the type has none */
    PyObject *empty_like; /* makes a tensor like one, faster than one of a shape; or None */
};
struct fa_dlpack {
    struct fa_tensor_type types[FA_MAX_TENSOR_TYPES];
    int type_count;
    PyObject *package;    /* its name; the module's state owns it */
    PyObject *frameworks; /* frameworks.py, imported when first needed */
};

/* Reads `object` (an argument called `name` that must have `ndim` dimensions, or FA_ONE_OR_TWO,
 * FA_UP_TO_TWO, FA_HEADS_FIRST) without copying. 0, or -1 with TypeError or ValueError set and
 * nothing held. */
int fa_tensor_read(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                   struct fa_tensor *tensor);

/* The same for lengths and pages: int32. */
int fa_tensor_read_int32(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                         struct fa_tensor *tensor);

/* The same, of float8_e4m3fn, too. */
int fa_tensor_read_or_e4m3(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                           struct fa_tensor *tensor);

/* And for seeds: int64 or uint64. */
int fa_tensor_read_int64(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                         struct fa_tensor *tensor);

/* And for what a mod captured: of any type, and up to FA_CAPTURED_NDIM dimensions. */
int fa_tensor_read_captured(struct fa_dlpack *dlpack, PyObject *object, const char *name,
                            struct fa_tensor *tensor);

/* What is borrowed (read by the exchange API) is good until Python code runs: that may resize or
 * free the memory of an argument that was read before. So a call that has done all that can run
 * Python, and is about to use the memory, reads what is borrowed again: 0, or -1 with ValueError
 * set where it is not what it was. What came in a capsule is ours until it is released; torch alone
 * breaks that promise, where a storage is resized while a capsule of it is out. */
int fa_tensor_recheck(const struct fa_tensor *tensor, const char *name);

static inline bool fa_tensor_is_empty(const struct fa_tensor *tensor)
{
    for (int i = 0; i < tensor->ndim; i++)
        if (tensor->shape[i] == 0)
            return true;
    return false;
}

/* The outer strides of a tensor [batch, seqlen, heads, head_dim], or packed [total, heads,
 * head_dim]: there is no step from sequence to sequence then. */
static inline struct fa_strides fa_tensor_strides(const struct fa_tensor *tensor)
{
    const int64_t *inner = &tensor->stride[tensor->ndim - 3];
    return (struct fa_strides){tensor->ndim == 4 ? inner[-1] : 0, inner[0], inner[1]};
}

/* The factors of e4m3: [batch, heads_kv], or, of fewer dimensions, one for all. */
static inline struct fa_descale fa_tensor_descale(const struct fa_tensor *descale)
{
    const bool is_one = descale->ndim < 2;
    return (struct fa_descale){
        .scale = descale->object ? descale->data : NULL,
        .batch_stride = is_one ? 0 : descale->stride[0],
        .head_stride = is_one ? 0 : descale->stride[1],
    };
}

/* The number of dimensions to read or make another tensor by that has the dimensions of this one,
 * in their order. */
static inline int fa_tensor_order(const struct fa_tensor *tensor)
{
    return tensor->is_heads_first ? FA_HEADS_FIRST : tensor->ndim;
}

/* Whether rows of the innermost dimension lie contiguous and, for the 16-byte accesses of the
 * kernels, aligned. */
bool fa_tensor_is_readable(const struct fa_tensor *tensor);

/* Whether the innermost dimension alone is contiguous. */
bool fa_tensor_has_contiguous_rows(const struct fa_tensor *tensor);

/* Whether it is contiguous in all dimensions. */
bool fa_tensor_is_contiguous(const struct fa_tensor *tensor);

/* Makes the tensor contiguous where the kernels could not read its layout in place. 0 or -1. */
int fa_tensor_ensure_readable(struct fa_dlpack *dlpack, const char *name, struct fa_tensor *tensor);

/* Gives it the strides of a contiguous copy where the kernels could not read it in place; no data
 * is touched. */
void fa_tensor_assume_readable(struct fa_tensor *tensor);

/* Makes the tensor contiguous in all dimensions. 0 or -1. */
int fa_tensor_ensure_contiguous(struct fa_dlpack *dlpack, const char *name,
                                struct fa_tensor *tensor);

/* A new tensor for the result `name`, of the framework and device of `like`; its elements are
 * uninitialised, or 0. It is contiguous; with FA_HEADS_FIRST (`shape` has seqlen first, as tensors
 * have here) it has the order in memory that `like` has. 0 or -1. */
int fa_tensor_empty(struct fa_dlpack *dlpack, const struct fa_tensor *like, const char *name,
                    enum fa_dtype dtype, int ndim, const int64_t *shape, struct fa_tensor *tensor);
int fa_tensor_zeros(struct fa_dlpack *dlpack, const struct fa_tensor *like, const char *name,
                    enum fa_dtype dtype, int ndim, const int64_t *shape, struct fa_tensor *tensor);

/* The sums of a tensor [batch, heads, seqlen] over all but its heads, for the result `name`. 0 or
 * -1. */
int fa_tensor_sum_heads(struct fa_dlpack *dlpack, const struct fa_tensor *summed, const char *name,
                        struct fa_tensor *tensor);

/* Room for so many floats, of the framework of `like`. It can be given back once the kernels that
 * use it are enqueued: the next owner of that memory uses it after them, on the same stream. 0, or
 * -1 with the framework's own exception, which tells the size, too. */
int fa_tensor_workspace(struct fa_dlpack *dlpack, const struct fa_tensor *like, int64_t floats,
                        struct fa_tensor *workspace);

/* Whether the TMA can step over the dimensions: in multiples of 16 bytes below 2^40, no less than a
 * row. So it reads neither expanded nor flipped tensors. */
bool fa_tensor_has_tma_strides(const struct fa_tensor *tensor);

/* The stream on which the framework of `tensor` works now (CUDA only). 0 or -1. */
int fa_tensor_stream(struct fa_dlpack *dlpack, const struct fa_tensor *tensor, void **stream);

/* Drops what the tensor holds; safe on a zeroed one. */
void fa_tensor_release(struct fa_tensor *tensor);

/* The device as torch names it, "cuda:1". */
#define FA_DEVICE_NAME_SIZE 24
void fa_device_name(const struct fa_tensor *tensor, char name[FA_DEVICE_NAME_SIZE]);

/* Whether a tensor is on the device of `like`, an argument called `like_name`; and whether it has
 * the size `expected`, which `meaning` tells, in a dimension. 0, or -1 with ValueError set. */
int fa_tensor_check_device(const struct fa_tensor *tensor, const char *name,
                           const struct fa_tensor *like, const char *like_name);
int fa_tensor_check_size(const struct fa_tensor *tensor, const char *name, int dimension,
                         const char *meaning, int64_t expected);

const char *fa_dtype_name(enum fa_dtype dtype); /* as torch names it: "float32", "float8_e4m3fn" */

#endif
