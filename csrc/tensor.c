/* DLPack in: torch tensors through the C exchange API, all others through capsules. */
#include "tensor.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arithmetic.h"
#include "dlpack.h"
#include "error.h"
#include "import.h"

const char *fa_dtype_name(enum fa_dtype dtype)
{
    static const char *const names[] = {"float32",       "float16", "bfloat16", "int32",  "int64",
                                        "float8_e4m3fn", "8-bit",   "16-bit",   "32-bit", "64-bit"};
    return names[dtype];
}

void fa_device_name(const struct fa_tensor *tensor, char name[FA_DEVICE_NAME_SIZE])
{
    snprintf(name, FA_DEVICE_NAME_SIZE, "%s:%d",
             tensor->device_type == FA_DEVICE_CPU ? "cpu" : "cuda", tensor->device_id);
}

int fa_tensor_check_device(const struct fa_tensor *tensor, const char *name,
                           const struct fa_tensor *like, const char *like_name)
{
    if (tensor->device_type == like->device_type && tensor->device_id == like->device_id)
        return 0;
    char expected[FA_DEVICE_NAME_SIZE], got[FA_DEVICE_NAME_SIZE];
    fa_device_name(like, expected);
    fa_device_name(tensor, got);
    return fa_raise(PyExc_ValueError, "%s must be on %s's device, %s, got %s", name, like_name,
                    expected, got);
}

int fa_tensor_check_size(const struct fa_tensor *tensor, const char *name, int dimension,
                         const char *meaning, int64_t expected)
{
    if (tensor->shape[dimension] == expected)
        return 0;
    return fa_raise(PyExc_ValueError, "%s must have %s %lld in dimension %d, got %lld", name,
                    meaning, (long long)expected, dimension, (long long)tensor->shape[dimension]);
}

static PyObject *import_frameworks(struct fa_dlpack *dlpack)
{
    return fa_import(&dlpack->frameworks, dlpack->package, "frameworks");
}

/* Raises what frameworks.py knows of an object without memory that we can read; the exception that
 * is set, if any, is what its framework said. Returns -1. */
static int refuse(struct fa_dlpack *dlpack, PyObject *object, const char *name)
{
    PyObject *error = fa_error_take();
    PyObject *frameworks = import_frameworks(dlpack);
    if (frameworks)
        Py_XDECREF(PyObject_CallMethod(frameworks, "refuse", "OsO", object, name,
                                       error ? error : Py_None));
    Py_XDECREF(error);
    return -1;
}

/* ---- what the producer gave -> struct fa_tensor ---------------------------------------------- */

/* Types narrower than 16 bits, DLPack's codes 7 to 17. */
static const char *narrow_type(unsigned code)
{
    static const char *const names[] = {"float8_e3m4",     "float8_e4m3",     "float8_e4m3b11fnuz",
                                        "float8_e4m3fn",   "float8_e4m3fnuz", "float8_e5m2",
                                        "float8_e5m2fnuz", "float8_e8m0fnu",  "float6_e2m3fn",
                                        "float6_e3m2fn",   "float4_e2m1fn"};
    return code >= 7 && code - 7 < sizeof names / sizeof *names ? names[code - 7] : NULL;
}

static int refuse_dtype(DLDataType dtype, const char *name, const char *expected)
{
    static const char *const codes[] = {"int",    "uint",    "float", "handle",
                                        "bfloat", "complex", "bool"};
    const char *narrow = narrow_type(dtype.code);
    if (narrow)
        return fa_raise(PyExc_NotImplementedError, "%s is %s, which is not supported yet", name,
                        narrow);
    return fa_raise(PyExc_TypeError, "%s must be %s, got %s%d%s", name, expected,
                    dtype.code < sizeof codes / sizeof *codes ? codes[dtype.code] : "unknown",
                    dtype.bits, dtype.lanes == 1 ? "" : " in vectors");
}

/* Of any type: how many bytes an element has. */
static int read_size(DLDataType dtype, const char *name, enum fa_dtype *out)
{
    if (dtype.lanes != 1 ||
        (dtype.bits != 8 && dtype.bits != 16 && dtype.bits != 32 && dtype.bits != 64))
        return refuse_dtype(dtype, name, "a number of 8, 16, 32 or 64 bits");
    *out = dtype.bits == 8    ? FA_BYTES_1
           : dtype.bits == 16 ? FA_BYTES_2
           : dtype.bits == 32 ? FA_BYTES_4
                              : FA_BYTES_8;
    return 0;
}

/* `*out` is FA_INT32 or FA_INT64 where that is wanted, FA_FLOAT8_E4M3 where that may
 * come, FA_BYTES_1 or more where any type is. */
static int read_dtype(DLDataType dtype, const char *name, enum fa_dtype *out)
{
    if (*out >= FA_BYTES_1)
        return read_size(dtype, name, out);
    if (*out == FA_INT32) {
        if (dtype.lanes == 1 && dtype.code == kDLInt && dtype.bits == 32)
            return 0;
        return refuse_dtype(dtype, name, "int32");
    }
    if (*out == FA_INT64) {
        if (dtype.lanes == 1 && (dtype.code == kDLInt || dtype.code == kDLUInt) && dtype.bits == 64)
            return 0;
        return refuse_dtype(dtype, name, "int64 or uint64");
    }
    if (*out == FA_FLOAT8_E4M3 && dtype.lanes == 1 && dtype.code == kDLFloat8_e4m3fn &&
        dtype.bits == 8)
        return 0;
    if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 32)
        *out = FA_FLOAT32;
    else if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 16)
        *out = FA_FLOAT16;
    else if (dtype.lanes == 1 && dtype.code == kDLBfloat && dtype.bits == 16)
        *out = FA_BFLOAT16;
    else
        return refuse_dtype(dtype, name, "float16, bfloat16 or float32");
    return 0;
}

static int read_device(DLDevice device, const char *name, enum fa_device_type *type, int *id)
{
    *type = FA_DEVICE_CPU;
    *id = 0;
    if (device.device_type == kDLCPU || device.device_type == kDLCUDAHost)
        return 0;
    *type = FA_DEVICE_CUDA;
    *id = device.device_id;
    if (device.device_type == kDLCUDA || device.device_type == kDLCUDAManaged)
        return 0;
    return fa_raise(PyExc_ValueError,
                    "%s must be on the CPU or a CUDA device, got DLPack device type %d", name,
                    device.device_type);
}

/* Sets where the elements begin and end. Each must be within 2^62 bytes of the first, and all in
 * one address space: then no offset computed from indices, and no address, overflows. */
static int set_extent(struct fa_tensor *tensor, const char *name)
{
    int64_t extent = 0, before = 0; /* elements */
    for (int i = 0; i < tensor->ndim; i++) {
        const int64_t stride = tensor->stride[i];
        const int64_t distance = stride >= 0 ? stride : stride > INT64_MIN ? -stride : INT64_MAX;
        const int64_t reach = fa_saturating_multiply(distance, tensor->shape[i] - 1);
        extent = fa_saturating_add(extent, reach);
        if (extent > INT64_MAX / 8)
            goto too_far;
        before += stride < 0 ? reach : 0;
    }
    const uintptr_t size = (uintptr_t)fa_element_bytes(tensor->dtype),
                    data = (uintptr_t)tensor->data;
    tensor->begin = data - (uintptr_t)before * size;
    tensor->end = data + (uintptr_t)(extent - before + 1) * size;
    if (tensor->begin <= data && data < tensor->end)
        return 0;
too_far:
    return fa_raise(PyExc_ValueError, "%s spans more than 64-bit byte offsets can address", name);
}

static void exchange(int64_t *a, int64_t *b)
{
    const int64_t kept = *a;
    *a = *b;
    *b = kept;
}

/* From the order of the object to ours, and back. */
static void exchange_heads(struct fa_tensor *tensor)
{
    exchange(&tensor->shape[1], &tensor->shape[2]);
    exchange(&tensor->stride[1], &tensor->stride[2]);
}

/* The tensor in the order of its object: itself, or `other`, which is set. */
static const struct fa_tensor *in_order_of_object(const struct fa_tensor *tensor,
                                                  struct fa_tensor *other)
{
    if (!tensor->is_heads_first)
        return tensor;
    *other = *tensor;
    exchange_heads(other);
    return other;
}

/* Reads what a producer gave, borrowed or owned, into the tensor, which has its object. 0 or -1. */
static int read_dltensor(struct fa_dlpack *dlpack, const DLTensor *source, const char *name,
                         int ndim, struct fa_tensor *tensor)
{
    if (read_dtype(source->dtype, name, &tensor->dtype) < 0 ||
        read_device(source->device, name, &tensor->device_type, &tensor->device_id) < 0)
        return -1;
    tensor->is_heads_first = ndim == FA_HEADS_FIRST;
    if (ndim == FA_HEADS_FIRST)
        ndim = 4;
    if (ndim == FA_ONE_OR_TWO)
        ndim = source->ndim == 1 ? 1 : 2;
    if (ndim == FA_ANY_NDIM)
        ndim = MIN(source->ndim, FA_CAPTURED_NDIM);
    if (ndim == FA_UP_TO_TWO)
        ndim = source->ndim >= 0 && source->ndim < 2 ? source->ndim : 2;
    if (source->ndim != ndim)
        return fa_raise(PyExc_ValueError, "%s must have %d dimension%s, got %d", name, ndim,
                        ndim == 1 ? "" : "s", source->ndim);
    if (!source->shape && ndim > 0)
        return fa_raise(PyExc_ValueError, "%s has no shape: its DLPack struct is malformed", name);
    tensor->ndim = ndim;
    int64_t compact = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        int64_t size = tensor->shape[i] = source->shape[i];
        if (size < 0)
            return fa_raise(PyExc_ValueError, "%s has a negative size, %lld, in dimension %d", name,
                            (long long)size, i);
        tensor->stride[i] = source->strides ? source->strides[i] : compact;
        /* What does not fit is refused by set_extent where it is used. */
        compact = fa_saturating_multiply(compact, MAX(size, 1));
    }
    if (tensor->is_heads_first)
        exchange_heads(tensor);
    if (fa_tensor_is_empty(tensor))
        return 0;
    if (!source->data)
        return refuse(dlpack, tensor->object, name);
    const uintptr_t start = (uintptr_t)source->data, data = start + source->byte_offset;
    if (data < start || source->byte_offset > UINTPTR_MAX)
        return fa_raise(PyExc_ValueError, "%s has a byte offset beyond its address space", name);
    tensor->data = (void *)data;
    return set_extent(tensor, name);
}

/* ---- the exchange API: no Python objects made ------------------------------------------------ */

/* The exchange API in a capsule, of the major version that we speak; NULL where there is none. */
static const DLPackExchangeAPI *open_exchange_capsule(PyObject *capsule)
{
    enum { MAX_MAJOR_VERSIONS = 16 }; /* a chain that is longer has no end */
    const DLPackExchangeAPI *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!api)
        PyErr_Clear(); /* something else under that name: the type is read through its capsules */
    for (int i = 0; api && api->version.major != DLPACK_MAJOR_VERSION; i++)
        api = i < MAX_MAJOR_VERSIONS ? api->prev_api : NULL;
    return api && api->managed_tensor_from_py_object_no_sync && api->current_work_stream ? api
                                                                                         : NULL;
}

/* Finds the exchange API of a type; NULL where it has none, or one whose reads run Python code:
 * what is borrowed would not outlive the next read. 0 or -1. */
static int find_exchange_api(PyObject *frameworks, PyObject *type, const DLPackExchangeAPI **api)
{
    static const char NAME[] = "__dlpack_c_exchange_api__";
    *api = NULL;
    const int has = fa_has_attribute(type, NAME);
    PyObject *capsule = has > 0 ? PyObject_GetAttrString(type, NAME) : NULL;
    if (!capsule)
        return has > 0 ? -1 : has;
    *api = open_exchange_capsule(capsule);
    Py_DECREF(capsule);
    if (!*api)
        return 0;
    PyObject *runs = PyObject_CallMethod(frameworks, "reads_run_python", "(O)", type);
    if (runs == Py_True)
        *api = NULL;
    Py_XDECREF(runs);
    return runs ? 0 : -1;
}

/* Adds a type to the table, as long as there is room. 0 or -1. */
static int keep_type(struct fa_dlpack *dlpack, PyObject *frameworks, PyObject *type,
                     const DLPackExchangeAPI *api)
{
    if (dlpack->type_count == FA_MAX_TENSOR_TYPES)
        return 0;
    PyObject *empty_like = PyObject_CallMethod(frameworks, "empty_like", "(O)", type);
    if (!empty_like)
        return -1;
    dlpack->types[dlpack->type_count++] = (struct fa_tensor_type){Py_NewRef(type), api, empty_like};
    return 0;
}

/* Sets what is known of the type of the tensor's object, from the table where that has it. 0 or -1.
 */
static int set_type(struct fa_dlpack *dlpack, PyObject *object, struct fa_tensor *tensor)
{
    PyObject *type = (PyObject *)Py_TYPE(object);
    for (int i = 0; i < dlpack->type_count; i++)
        if (dlpack->types[i].type == type) {
            tensor->api = dlpack->types[i].api;
            tensor->empty_like = dlpack->types[i].empty_like;
            return 0;
        }
    PyObject *frameworks = import_frameworks(dlpack);
    const DLPackExchangeAPI *api;
    if (!frameworks || find_exchange_api(frameworks, type, &api) < 0 ||
        keep_type(dlpack, frameworks, type, api) < 0)
        return -1;
    tensor->api = api;
    return 0;
}

static void release_versioned(void *managed)
{
    DLManagedTensorVersioned *tensor = managed;
    if (tensor->deleter)
        tensor->deleter(tensor);
}

static void release_legacy(void *managed)
{
    DLManagedTensor *tensor = managed;
    if (tensor->deleter)
        tensor->deleter(tensor);
}

static int read_by_exchange(struct fa_dlpack *dlpack, const char *name, int ndim,
                            struct fa_tensor *tensor)
{
    const DLPackExchangeAPI *api = tensor->api;
    if (api->dltensor_from_py_object_no_sync) {
        DLTensor borrowed;
        if (api->dltensor_from_py_object_no_sync(tensor->object, &borrowed) == 0)
            return read_dltensor(dlpack, &borrowed, name, ndim, tensor);
    } else {
        DLManagedTensorVersioned *managed;
        if (api->managed_tensor_from_py_object_no_sync(tensor->object, &managed) == 0) {
            tensor->managed = managed;
            tensor->release = release_versioned;
            tensor->is_read_only = managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY;
            return read_dltensor(dlpack, &managed->dl_tensor, name, ndim, tensor);
        }
    }
    return refuse(dlpack, tensor->object, name);
}

/* ---- capsules -------------------------------------------------------------------------------- */

/* Takes the managed tensor out of a capsule; from here on it is ours to release. NULL with the
 * exception set. */
static void *take(PyObject *capsule, const char *kind, const char *used, void (*release)(void *),
                  struct fa_tensor *tensor)
{
    void *managed = PyCapsule_GetPointer(capsule, kind);
    if (!managed || PyCapsule_SetName(capsule, used) < 0)
        return NULL;
    tensor->managed = managed;
    tensor->release = release;
    return managed;
}

static int consume_versioned(struct fa_dlpack *dlpack, PyObject *capsule, const char *name,
                             int ndim, struct fa_tensor *tensor)
{
    const DLManagedTensorVersioned *managed =
        take(capsule, "dltensor_versioned", "used_dltensor_versioned", release_versioned, tensor);
    if (!managed)
        return -1;
    if (managed->version.major != DLPACK_MAJOR_VERSION)
        return fa_raise(PyExc_TypeError, "%s uses DLPack %u.%u; version %d is supported", name,
                        managed->version.major, managed->version.minor, DLPACK_MAJOR_VERSION);
    tensor->is_read_only = managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY;
    return read_dltensor(dlpack, &managed->dl_tensor, name, ndim, tensor);
}

static int consume_legacy(struct fa_dlpack *dlpack, PyObject *capsule, const char *name, int ndim,
                          struct fa_tensor *tensor)
{
    const DLManagedTensor *managed =
        take(capsule, "dltensor", "used_dltensor", release_legacy, tensor);
    return managed ? read_dltensor(dlpack, &managed->dl_tensor, name, ndim, tensor) : -1;
}

static int consume_capsule(struct fa_dlpack *dlpack, PyObject *capsule, const char *name, int ndim,
                           struct fa_tensor *tensor)
{
    const char *kind = PyCapsule_GetName(capsule);
    if (kind && strcmp(kind, "dltensor_versioned") == 0)
        return consume_versioned(dlpack, capsule, name, ndim, tensor);
    if (kind && strcmp(kind, "dltensor") == 0)
        return consume_legacy(dlpack, capsule, name, ndim, tensor);
    if (kind && strncmp(kind, "used_dltensor", strlen("used_dltensor")) == 0)
        return fa_raise(PyExc_ValueError, "%s is a DLPack capsule that was consumed before", name);
    return fa_raise(PyExc_TypeError, "%s must be a DLPack capsule, got one named \"%s\"", name,
                    kind ? kind : "");
}

static int read_by_capsule(struct fa_dlpack *dlpack, const char *name, int ndim,
                           struct fa_tensor *tensor)
{
    if (PyCapsule_CheckExact(tensor->object))
        return consume_capsule(dlpack, tensor->object, name, ndim, tensor);
    PyObject *frameworks = import_frameworks(dlpack);
    PyObject *capsule =
        frameworks ? PyObject_CallMethod(frameworks, "export", "Os", tensor->object, name) : NULL;
    if (!capsule)
        return -1;
    int status = -1;
    if (PyCapsule_CheckExact(capsule))
        status = consume_capsule(dlpack, capsule, name, ndim, tensor);
    else
        fa_raise(PyExc_TypeError, "%s.__dlpack__() must return a capsule", name);
    Py_DECREF(capsule);
    return status;
}

/* ---- the interface --------------------------------------------------------------------------- */

static int read_tensor(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                       enum fa_dtype dtype, struct fa_tensor *tensor)
{
    tensor->data = NULL;
    tensor->begin = tensor->end = 0;
    tensor->dtype = dtype;
    tensor->is_read_only = false;
    tensor->api = NULL;
    tensor->object = tensor->empty_like = NULL;
    tensor->managed = NULL;
    if (set_type(dlpack, object, tensor) < 0)
        return fa_raise(PyExc_TypeError, "%s cannot be read through DLPack", name);
    tensor->object = Py_NewRef(object);
    int status = tensor->api ? read_by_exchange(dlpack, name, ndim, tensor)
                             : read_by_capsule(dlpack, name, ndim, tensor);
    if (status < 0)
        fa_tensor_release(tensor);
    return status;
}

int fa_tensor_read(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                   struct fa_tensor *tensor)
{
    return read_tensor(dlpack, object, name, ndim, FA_FLOAT32, tensor);
}

int fa_tensor_read_or_e4m3(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                           struct fa_tensor *tensor)
{
    return read_tensor(dlpack, object, name, ndim, FA_FLOAT8_E4M3, tensor);
}

int fa_tensor_read_int32(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                         struct fa_tensor *tensor)
{
    return read_tensor(dlpack, object, name, ndim, FA_INT32, tensor);
}

int fa_tensor_read_int64(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                         struct fa_tensor *tensor)
{
    return read_tensor(dlpack, object, name, ndim, FA_INT64, tensor);
}

int fa_tensor_read_captured(struct fa_dlpack *dlpack, PyObject *object, const char *name,
                            struct fa_tensor *tensor)
{
    return read_tensor(dlpack, object, name, FA_ANY_NDIM, FA_BYTES_1, tensor);
}

static bool is_alike(const struct fa_tensor *a, const struct fa_tensor *b)
{
    bool alike = a->dtype == b->dtype && a->device_type == b->device_type &&
                 a->device_id == b->device_id && a->ndim == b->ndim;
    for (int i = 0; alike && i < a->ndim; i++)
        alike = a->shape[i] == b->shape[i];
    return alike;
}

/* Whether what is borrowed now is what was read; an exception may be set where it is not. */
static bool is_still(const DLTensor *now, const struct fa_tensor *read, const char *name)
{
    struct fa_tensor other;
    const struct fa_tensor *tensor = in_order_of_object(read, &other);
    const size_t size = sizeof *now->shape * (size_t)tensor->ndim;
    enum fa_dtype dtype = tensor->dtype;
    enum fa_device_type device_type;
    int device_id;
    if (now->ndim != tensor->ndim || (!now->shape && now->ndim > 0) ||
        read_dtype(now->dtype, name, &dtype) < 0 ||
        read_device(now->device, name, &device_type, &device_id) < 0)
        return false;
    return dtype == tensor->dtype && device_type == tensor->device_type &&
           device_id == tensor->device_id &&
           (fa_tensor_is_empty(tensor) ||
            (uintptr_t)now->data + now->byte_offset == (uintptr_t)tensor->data) &&
           memcmp(now->shape, tensor->shape, size) == 0 &&
           (now->strides ? memcmp(now->strides, tensor->stride, size) == 0
                         : fa_tensor_is_contiguous(tensor));
}

static int refuse_changed(const char *name)
{
    return fa_raise(PyExc_ValueError, "%s was changed while the call prepared its other tensors",
                    name);
}

/* The same of a tensor; one that is ours always is. */
static bool is_unchanged(const struct fa_tensor *tensor, const char *name)
{
    const DLPackExchangeAPI *api = tensor->api;
    DLTensor borrowed;
    return !api || tensor->managed ||
           (api->dltensor_from_py_object_no_sync(tensor->object, &borrowed) == 0 &&
            is_still(&borrowed, tensor, name));
}

int fa_tensor_recheck(const struct fa_tensor *tensor, const char *name)
{
    return is_unchanged(tensor, name) ? 0 : refuse_changed(name);
}

bool fa_tensor_has_tma_strides(const struct fa_tensor *tensor)
{
    const int last = tensor->ndim - 1;
    const int64_t size = fa_element_bytes(tensor->dtype), row = tensor->shape[last];
    for (int i = 0; i < last; i++) {
        const int64_t stride = tensor->stride[i];
        if (tensor->shape[i] > 1 &&
            (stride < row || stride >= ((int64_t)1 << 40) / size || stride * size % 16 != 0))
            return false;
    }
    return (uintptr_t)tensor->data % 16 == 0;
}

void fa_tensor_release(struct fa_tensor *tensor)
{
    /* A deleter may run Python code, which must not meet the exception that a caller is about to
     * raise. What Python itself destroys does not. */
    if (tensor->managed && tensor->release) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        tensor->release(tensor->managed);
        PyErr_Restore(type, value, traceback);
    }
    tensor->managed = NULL;
    Py_CLEAR(tensor->object);
}

bool fa_tensor_is_readable(const struct fa_tensor *tensor)
{
    const int last = tensor->ndim - 1;
    const int64_t size = fa_element_bytes(tensor->dtype);
    if (fa_tensor_is_empty(tensor))
        return true;
    if ((tensor->shape[last] > 1 && tensor->stride[last] != 1) || (uintptr_t)tensor->data % 16 != 0)
        return false;
    for (int i = 0; i < last; i++)
        if (tensor->shape[i] > 1 && tensor->stride[i] * size % 16 != 0)
            return false;
    return true;
}

/* Whether elements lie where their type may. */
static bool is_aligned(const struct fa_tensor *tensor)
{
    return (uintptr_t)tensor->data % (uintptr_t)fa_element_bytes(tensor->dtype) == 0;
}

bool fa_tensor_has_contiguous_rows(const struct fa_tensor *tensor)
{
    const int last = tensor->ndim - 1;
    return fa_tensor_is_empty(tensor) ||
           (is_aligned(tensor) && (tensor->shape[last] == 1 || tensor->stride[last] == 1));
}

bool fa_tensor_is_contiguous(const struct fa_tensor *tensor)
{
    int64_t compact = 1;
    if (fa_tensor_is_empty(tensor))
        return true;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (tensor->shape[i] > 1 && tensor->stride[i] != compact)
            return false;
        compact *= tensor->shape[i];
    }
    return is_aligned(tensor);
}

/* "float32 (2, 5, 4, 16) on cpu:0" */
#define LAYOUT_SIZE 128
static void describe_layout(const struct fa_tensor *tensor, char text[LAYOUT_SIZE])
{
    char device[FA_DEVICE_NAME_SIZE];
    fa_device_name(tensor, device);
    int length = snprintf(text, LAYOUT_SIZE, "%s (", fa_dtype_name(tensor->dtype));
    for (int i = 0; i < tensor->ndim; i++)
        length += snprintf(text + length, (size_t)(LAYOUT_SIZE - length), "%s%lld", i ? ", " : "",
                           (long long)tensor->shape[i]);
    snprintf(text + length, (size_t)(LAYOUT_SIZE - length), ") on %s", device);
}

/* Whether what was made for us lies as its users rely on: those that read heads first ask for rows
 * alone. */
static bool lies_well(const struct fa_tensor *tensor)
{
    return tensor->is_heads_first ? fa_tensor_is_readable(tensor) : fa_tensor_is_contiguous(tensor);
}

/* Checks what was made for us: a copy, or memory for a result. It may be anything; what passes has
 * dtype, device and shape of `expected`, is contiguous and, for kernels, aligned. 0 or -1. */
static int check_made(const struct fa_tensor *tensor, const char *name,
                      const struct fa_tensor *expected, bool is_result)
{
    const char *kind = is_result ? "memory for" : "copy of";
    const char *wrong = NULL;
    char wanted[LAYOUT_SIZE], got[LAYOUT_SIZE];
    if (!is_alike(expected, tensor))
        wrong = "of another kind";
    else if (!lies_well(tensor))
        wrong = "not contiguous";
    else if (tensor->device_type == FA_DEVICE_CUDA && !fa_tensor_is_empty(tensor) &&
             (uintptr_t)tensor->data % 16 != 0)
        wrong = "misaligned";
    else if (is_result && tensor->is_read_only)
        wrong = "read-only";
    if (!wrong)
        return 0;
    describe_layout(expected, wanted);
    describe_layout(tensor, got);
    return fa_raise(PyExc_ValueError, "the %s %s is %s: expected %s, got %s", kind, name, wrong,
                    wanted, got);
}

/* Reads what Python code made for us. 0 or -1. */
static int read_made(struct fa_dlpack *dlpack, PyObject *object, const char *name,
                     const struct fa_tensor *expected, bool is_result, struct fa_tensor *tensor)
{
    if (fa_tensor_read(dlpack, object, name, fa_tensor_order(expected), tensor) < 0)
        return -1;
    if (check_made(tensor, name, expected, is_result) == 0)
        return 0;
    fa_tensor_release(tensor);
    return -1;
}

/* A tensor that we own, on its way to torch. */
struct lent {
    DLManagedTensor dlpack;
    int64_t shape[FA_MAX_NDIM], stride[FA_MAX_NDIM];
    void *managed;
    void (*release)(void *managed);
};

static void release_lent(DLManagedTensor *dlpack)
{
    struct lent *lent = dlpack->manager_ctx;
    lent->release(lent->managed);
    free(lent);
}

/* Of a capsule that torch did not take. */
static void destroy_capsule(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, "dltensor"))
        release_legacy(PyCapsule_GetPointer(capsule, "dltensor"));
}

/* Makes what is borrowed ours, if it still is what was read. 0 or -1. */
static int own(struct fa_tensor *tensor, const char *name)
{
    const DLPackExchangeAPI *api = tensor->api;
    DLManagedTensorVersioned *managed;
    if (tensor->managed)
        return 0;
    if (api->managed_tensor_from_py_object_no_sync(tensor->object, &managed) != 0)
        return fa_raise(PyExc_TypeError, "%s cannot be read through DLPack", name);
    tensor->managed = managed;
    tensor->release = release_versioned;
    return is_still(&managed->dl_tensor, tensor, name) ? 0 : refuse_changed(name);
}

/* Hands the tensor over as a capsule that says what was validated: its producer, asked again, might
 * say something else, and torch believes what it is told. NULL with the exception set. */
static PyObject *lend(struct fa_tensor *tensor, const char *name)
{
    static const DLDataType dtypes[] = {[FA_FLOAT32] = {kDLFloat, 32, 1},
                                        [FA_FLOAT16] = {kDLFloat, 16, 1},
                                        [FA_BFLOAT16] = {kDLBfloat, 16, 1},
                                        [FA_FLOAT8_E4M3] = {kDLFloat8_e4m3fn, 8, 1}};
    if (own(tensor, name) < 0)
        return NULL;
    struct lent *lent = calloc(1, sizeof *lent);
    if (!lent)
        return PyErr_NoMemory();
    struct fa_tensor other;
    const struct fa_tensor *given = in_order_of_object(tensor, &other);
    memcpy(lent->shape, given->shape, sizeof lent->shape);
    memcpy(lent->stride, given->stride, sizeof lent->stride);
    lent->managed = tensor->managed;
    lent->release = tensor->release;
    lent->dlpack = (DLManagedTensor){
        .dl_tensor = {.data = tensor->data,
                      .device = {(int32_t)tensor->device_type, tensor->device_id},
                      .ndim = tensor->ndim,
                      .dtype = dtypes[tensor->dtype],
                      .shape = lent->shape,
                      .strides = lent->stride},
        .manager_ctx = lent,
        .deleter = release_lent,
    };
    PyObject *capsule = PyCapsule_New(lent, "dltensor", destroy_capsule);
    if (capsule)
        tensor->managed = NULL;
    else
        free(lent);
    return capsule;
}

/* A contiguous copy by its own framework, where that is torch or numpy, else by torch. NULL with
 * the exception set. */
static PyObject *make_copy(struct fa_dlpack *dlpack, const char *name, struct fa_tensor *tensor)
{
    PyObject *frameworks = import_frameworks(dlpack);
    PyObject *copy =
        frameworks ? PyObject_CallMethod(frameworks, "own_copy", "(O)", tensor->object) : NULL;
    if (copy != Py_None)
        return copy;
    Py_DECREF(copy);
    PyObject *capsule = lend(tensor, name);
    copy = capsule ? PyObject_CallMethod(frameworks, "copy_of_capsule", "(O)", capsule) : NULL;
    Py_XDECREF(capsule);
    return copy;
}

/* Replaces the tensor by a contiguous copy. 0 or -1. */
static int copy_contiguous(struct fa_dlpack *dlpack, const char *name, struct fa_tensor *tensor)
{
    const struct fa_tensor expected = *tensor;
    PyObject *copy = make_copy(dlpack, name, tensor);
    if (!copy)
        return -1;
    fa_tensor_release(tensor);
    int status = read_made(dlpack, copy, name, &expected, false, tensor);
    Py_DECREF(copy);
    return status;
}

int fa_tensor_ensure_readable(struct fa_dlpack *dlpack, const char *name, struct fa_tensor *tensor)
{
    if (fa_tensor_is_readable(tensor))
        return 0;
    if (copy_contiguous(dlpack, name, tensor) < 0)
        return -1;
    if (fa_tensor_is_readable(tensor))
        return 0;
    fa_raise(PyExc_ValueError, "%s could not be made contiguous with rows aligned to 16 bytes",
             name);
    fa_tensor_release(tensor);
    return -1;
}

void fa_tensor_assume_readable(struct fa_tensor *tensor)
{
    int64_t compact = 1;
    if (fa_tensor_is_readable(tensor))
        return;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        tensor->stride[i] = compact;
        compact = (int64_t)((uint64_t)compact * (uint64_t)tensor->shape[i]); /* may wrap */
    }
    tensor->data = NULL; /* aligned, and not to be read */
}

int fa_tensor_ensure_contiguous(struct fa_dlpack *dlpack, const char *name,
                                struct fa_tensor *tensor)
{
    return fa_tensor_is_contiguous(tensor) ? 0 : copy_contiguous(dlpack, name, tensor);
}

/* A tuple. NULL with the exception set. */
static PyObject *tuple_of(int count, const int64_t *sizes)
{
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple && i < count; i++) {
        PyObject *size = PyLong_FromLongLong(sizes[i]);
        if (!size || PyTuple_SetItem(tuple, i, size) < 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

/* What a result of that dtype and shape must be, beside `like`. */
static struct fa_tensor result_like(const struct fa_tensor *like, enum fa_dtype dtype, int ndim,
                                    const int64_t *shape)
{
    struct fa_tensor result = {.ndim = ndim == FA_HEADS_FIRST ? 4 : ndim,
                               .is_heads_first = ndim == FA_HEADS_FIRST,
                               .dtype = dtype,
                               .device_type = like->device_type,
                               .device_id = like->device_id};
    memcpy(result.shape, shape, sizeof *shape * (size_t)result.ndim);
    return result;
}

/* Whether torch's empty_like() of `like` makes what is expected. */
static bool is_made_like(const struct fa_tensor *like, const struct fa_tensor *expected)
{
    if (!like->api || !like->empty_like || like->empty_like == Py_None ||
        !is_alike(like, expected) || like->is_heads_first != expected->is_heads_first)
        return false;
    if (!expected->is_heads_first)
        return fa_tensor_is_contiguous(like);
    for (int i = 0; i < 3; i++) /* whether rows are innermost */
        if (like->shape[i] > 1 && like->stride[i] != 0 && like->stride[i] < like->shape[3])
            return false;
    return like->stride[3] == 1;
}

/* Uninitialised memory for what is expected, by the framework of `like`. NULL with the exception
 * set. */
static PyObject *make_empty(PyObject *frameworks, const struct fa_tensor *like,
                            const struct fa_tensor *expected)
{
    struct fa_tensor other;
    PyObject *sizes = tuple_of(expected->ndim, in_order_of_object(expected, &other)->shape);
    PyObject *made =
        sizes ? PyObject_CallMethod(frameworks, "empty", "OOiii", like->object, sizes,
                                    expected->dtype, expected->device_type, expected->device_id)
              : NULL;
    Py_XDECREF(sizes);
    return made;
}

/* array[...] = 0. 0 or -1. */
static int fill_with_zeros(PyObject *array)
{
    PyObject *zero = PyLong_FromLong(0);
    const int status = zero ? PyObject_SetItem(array, Py_Ellipsis, zero) : -1;
    Py_XDECREF(zero);
    return status;
}

/* Reads a result that Python code made, or NULL where it raised; it is released. 0 or -1. */
static int read_result(struct fa_dlpack *dlpack, PyObject *object, const char *name,
                       const struct fa_tensor *expected, bool is_zeroed, struct fa_tensor *tensor)
{
    int status = -1;
    if (object && (!is_zeroed || fill_with_zeros(object) == 0))
        status = read_made(dlpack, object, name, expected, true, tensor);
    Py_XDECREF(object);
    return status;
}

static int allocate(struct fa_dlpack *dlpack, const struct fa_tensor *like, const char *name,
                    enum fa_dtype dtype, int ndim, const int64_t *shape, bool is_zeroed,
                    struct fa_tensor *tensor)
{
    const struct fa_tensor expected = result_like(like, dtype, ndim, shape);
    if (is_made_like(like, &expected)) {
        PyObject *made = PyObject_CallFunctionObjArgs(like->empty_like, like->object, NULL);
        if (read_result(dlpack, made, name, &expected, is_zeroed, tensor) == 0)
            return 0;
        if (is_unchanged(like, name))
            return -1;
        PyErr_Clear(); /* `like` is no longer what it was: fa_tensor_recheck() tells */
    }
    PyObject *frameworks = import_frameworks(dlpack);
    return read_result(dlpack, frameworks ? make_empty(frameworks, like, &expected) : NULL, name,
                       &expected, is_zeroed, tensor);
}

int fa_tensor_empty(struct fa_dlpack *dlpack, const struct fa_tensor *like, const char *name,
                    enum fa_dtype dtype, int ndim, const int64_t *shape, struct fa_tensor *tensor)
{
    return allocate(dlpack, like, name, dtype, ndim, shape, false, tensor);
}

int fa_tensor_zeros(struct fa_dlpack *dlpack, const struct fa_tensor *like, const char *name,
                    enum fa_dtype dtype, int ndim, const int64_t *shape, struct fa_tensor *tensor)
{
    return allocate(dlpack, like, name, dtype, ndim, shape, true, tensor);
}

int fa_tensor_sum_heads(struct fa_dlpack *dlpack, const struct fa_tensor *summed, const char *name,
                        struct fa_tensor *tensor)
{
    const struct fa_tensor expected = result_like(summed, FA_FLOAT32, 1, &summed->shape[1]);
    PyObject *frameworks = import_frameworks(dlpack);
    PyObject *sums =
        frameworks ? PyObject_CallMethod(frameworks, "sums_of_heads", "(O)", summed->object) : NULL;
    int status = sums ? read_made(dlpack, sums, name, &expected, true, tensor) : -1;
    Py_XDECREF(sums);
    return status;
}

/* The exception says what went wrong, if the framework's own way goes wrong, too. */
static void ignore(void *context, const char *kind, const char *message)
{
    (void)context, (void)kind, (void)message;
}

/* Memory from the exchange API, without a Python object. False where that has none to give. */
static bool allocate_by_exchange(struct fa_dlpack *dlpack, const struct fa_tensor *like,
                                 const char *name, int64_t floats, struct fa_tensor *tensor)
{
    const DLPackExchangeAPI *api = like->api;
    const struct fa_tensor expected = result_like(like, FA_FLOAT32, 1, &floats);
    DLTensor prototype = {.device = {(int32_t)like->device_type, like->device_id},
                          .ndim = 1,
                          .dtype = {kDLFloat, 32, 1},
                          .shape = &floats};
    DLManagedTensorVersioned *managed = NULL;
    if (!api || !api->managed_tensor_allocator ||
        api->managed_tensor_allocator(&prototype, &managed, NULL, ignore) != 0 || !managed)
        return false;
    memset(tensor, 0, sizeof *tensor);
    tensor->managed = managed;
    tensor->release = release_versioned;
    if (managed->dl_tensor.data &&
        read_dltensor(dlpack, &managed->dl_tensor, name, 1, tensor) == 0 &&
        check_made(tensor, name, &expected, true) == 0)
        return true;
    fa_tensor_release(tensor);
    return false;
}

int fa_tensor_workspace(struct fa_dlpack *dlpack, const struct fa_tensor *like, int64_t floats,
                        struct fa_tensor *workspace)
{
    static const char NAME[] = "the workspace";
    if (allocate_by_exchange(dlpack, like, NAME, floats, workspace))
        return 0;
    PyErr_Clear();
    if (fa_tensor_empty(dlpack, like, NAME, FA_FLOAT32, 1, &floats, workspace) == 0)
        return 0;
    PyObject *error = fa_error_take(); /* the framework's own exception is the best to catch */
    PyObject *type = (PyObject *)Py_TYPE(error);
    PyObject *text = PyObject_Str(error);
    if (!text) {
        PyErr_Clear();
        text = PyUnicode_FromString("out of memory");
    }
    PyErr_SetObject(type, error);
    if (text)
        fa_raise(type, "the call needs a workspace of %lld bytes: %U", (long long)floats * 4, text);
    Py_XDECREF(text);
    Py_DECREF(error);
    return -1;
}

int fa_tensor_stream(struct fa_dlpack *dlpack, const struct fa_tensor *tensor, void **stream)
{
    const DLPackExchangeAPI *api = tensor->api;
    if (api)
        return api->current_work_stream(kDLCUDA, tensor->device_id, stream) == 0 ? 0 : -1;
    PyObject *frameworks = import_frameworks(dlpack);
    PyObject *handle =
        frameworks ? PyObject_CallMethod(frameworks, "current_stream", "i", tensor->device_id)
                   : NULL;
    if (!handle)
        return -1;
    *stream = PyLong_AsVoidPtr(handle);
    Py_DECREF(handle);
    return PyErr_Occurred() ? -1 : 0;
}
