/* DLPack in: torch tensors through the C exchange API, all others through capsules. */
#include "tensor.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "arithmetic.h"
#include "dlpack.h"
#include "import.h"

size_t fa_dtype_size(enum fa_dtype dtype) { return dtype == FA_FLOAT32 ? 4 : 2; }

const char *fa_dtype_name(enum fa_dtype dtype)
{
    static const char *const names[] = {"float32", "float16", "bfloat16"};
    return names[dtype];
}

void fa_device_name(const struct fa_tensor *tensor, char name[FA_DEVICE_NAME_SIZE])
{
    snprintf(name, FA_DEVICE_NAME_SIZE, "%s:%d",
             tensor->device_type == FA_DEVICE_CPU ? "cpu" : "cuda", tensor->device_id);
}

static void set_type_error(const char *name, PyObject *object)
{
    PyObject *type_name = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__");
    if (type_name)
        PyErr_Format(PyExc_TypeError,
                     "%s must be a tensor (torch.Tensor, or any object with __dlpack__), got %S",
                     name, type_name);
    Py_XDECREF(type_name);
}

static PyObject *import_frameworks(struct fa_dlpack *dlpack)
{
    return fa_import(&dlpack->frameworks, "flash_attn_sm120.frameworks");
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

static int refuse_dtype(DLDataType dtype, const char *name)
{
    static const char *const codes[] = {"int",    "uint",    "float", "handle",
                                        "bfloat", "complex", "bool"};
    const char *narrow = narrow_type(dtype.code);
    if (narrow)
        PyErr_Format(PyExc_NotImplementedError, "%s is %s, which is not supported yet", name,
                     narrow);
    else
        PyErr_Format(PyExc_TypeError, "%s must be float16, bfloat16 or float32, got %s%d%s", name,
                     dtype.code < sizeof codes / sizeof *codes ? codes[dtype.code] : "unknown",
                     dtype.bits, dtype.lanes == 1 ? "" : " in vectors");
    return -1;
}

static int read_dtype(DLDataType dtype, const char *name, enum fa_dtype *out)
{
    if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 32)
        *out = FA_FLOAT32;
    else if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 16)
        *out = FA_FLOAT16;
    else if (dtype.lanes == 1 && dtype.code == kDLBfloat && dtype.bits == 16)
        *out = FA_BFLOAT16;
    else
        return refuse_dtype(dtype, name);
    return 0;
}

static int read_device(DLDevice device, const char *name, struct fa_tensor *tensor)
{
    switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: tensor->device_type = FA_DEVICE_CPU; break;
    case kDLCUDA:
    case kDLCUDAManaged: tensor->device_type = FA_DEVICE_CUDA; break;
    default:
        PyErr_Format(PyExc_ValueError,
                     "%s must be on the CPU or a CUDA device, got DLPack device type %d", name,
                     device.device_type);
        return -1;
    }
    tensor->device_id = tensor->device_type == FA_DEVICE_CPU ? 0 : device.device_id;
    return 0;
}

static bool is_empty(const struct fa_tensor *tensor)
{
    for (int i = 0; i < tensor->ndim; i++)
        if (tensor->shape[i] == 0)
            return true;
    return false;
}

/* Every element must be within 2^62 bytes of the first: then no offset computed from indices
 * overflows. */
static int check_extent(const struct fa_tensor *tensor, const char *name)
{
    int64_t extent = 0;
    for (int i = 0; i < tensor->ndim; i++) {
        const int64_t stride = tensor->stride[i];
        const int64_t distance = stride >= 0 ? stride : stride > INT64_MIN ? -stride : INT64_MAX;
        extent = fa_saturating_add(extent, fa_saturating_multiply(distance, tensor->shape[i] - 1));
        if (extent > INT64_MAX / 8) {
            PyErr_Format(PyExc_ValueError, "%s spans more than 64-bit byte offsets can address",
                         name);
            return -1;
        }
    }
    return 0;
}

static int read_dltensor(const DLTensor *source, const char *name, int ndim,
                         struct fa_tensor *tensor)
{
    if (read_dtype(source->dtype, name, &tensor->dtype) < 0 ||
        read_device(source->device, name, tensor) < 0)
        return -1;
    if (source->ndim != ndim) {
        PyErr_Format(PyExc_ValueError, "%s must have %d dimension%s, got %d", name, ndim,
                     ndim == 1 ? "" : "s", source->ndim);
        return -1;
    }
    if (!source->shape) {
        PyErr_Format(PyExc_ValueError, "%s has no shape: its DLPack struct is malformed", name);
        return -1;
    }
    tensor->ndim = ndim;
    int64_t compact = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        int64_t size = tensor->shape[i] = source->shape[i];
        if (size < 0) {
            PyErr_Format(PyExc_ValueError, "%s has a negative size, %lld, in dimension %d", name,
                         (long long)size, i);
            return -1;
        }
        tensor->stride[i] = source->strides ? source->strides[i] : compact;
        /* What does not fit is refused by check_extent where it is used. */
        compact = fa_saturating_multiply(compact, MAX(size, 1));
    }
    if (is_empty(tensor))
        return 0;
    if (!source->data) {
        PyErr_Format(PyExc_ValueError, "%s has no data: its DLPack struct is malformed", name);
        return -1;
    }
    tensor->data = (char *)source->data + source->byte_offset;
    return check_extent(tensor, name);
}

/* ---- the exchange API: no Python objects made ------------------------------------------------ */

/* The exchange API in a capsule, of the major version that we speak; NULL where there is none. */
static const DLPackExchangeAPI *open_exchange_capsule(PyObject *capsule)
{
    const DLPackExchangeAPI *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!api)
        PyErr_Clear(); /* something else under that name: the type is read through its capsules */
    while (api && api->version.major != DLPACK_MAJOR_VERSION)
        api = api->prev_api;
    return api && api->managed_tensor_from_py_object_no_sync && api->current_work_stream ? api
                                                                                         : NULL;
}

static const DLPackExchangeAPI *look_up_exchange_api(struct fa_dlpack *dlpack, PyObject *type)
{
    const DLPackExchangeAPI *api = NULL;
    PyObject *capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    if (capsule)
        api = open_exchange_capsule(capsule);
    else
        PyErr_Clear();
    Py_XDECREF(capsule);
    if (dlpack->type_count < FA_MAX_DLPACK_TYPES) {
        dlpack->types[dlpack->type_count].type = Py_NewRef(type);
        dlpack->types[dlpack->type_count++].api = api;
    }
    return api;
}

static const DLPackExchangeAPI *exchange_api(struct fa_dlpack *dlpack, PyObject *object)
{
    PyObject *type = (PyObject *)Py_TYPE(object);
    for (int i = 0; i < dlpack->type_count; i++)
        if (dlpack->types[i].type == type)
            return dlpack->types[i].api;
    return look_up_exchange_api(dlpack, type);
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

/* The framework's own exception says why it cannot export; the contract says TypeError. */
static void set_export_error(const char *name)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_Format(PyExc_TypeError, "%s cannot be read through DLPack: %S", name,
                 value ? value : Py_None);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

static int read_by_exchange(const DLPackExchangeAPI *api, PyObject *object, const char *name,
                            int ndim, struct fa_tensor *tensor)
{
    if (api->dltensor_from_py_object_no_sync) {
        DLTensor borrowed; /* valid while the object lives, and we hold a reference */
        if (api->dltensor_from_py_object_no_sync(object, &borrowed) == 0)
            return read_dltensor(&borrowed, name, ndim, tensor);
    } else {
        DLManagedTensorVersioned *managed;
        if (api->managed_tensor_from_py_object_no_sync(object, &managed) == 0) {
            tensor->managed = managed;
            tensor->release = release_versioned;
            tensor->is_read_only = managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY;
            return read_dltensor(&managed->dl_tensor, name, ndim, tensor);
        }
    }
    set_export_error(name);
    return -1;
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

static int consume_versioned(PyObject *capsule, const char *name, int ndim,
                             struct fa_tensor *tensor)
{
    const DLManagedTensorVersioned *managed =
        take(capsule, "dltensor_versioned", "used_dltensor_versioned", release_versioned, tensor);
    if (!managed)
        return -1;
    tensor->is_read_only = managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY;
    if (managed->version.major == DLPACK_MAJOR_VERSION)
        return read_dltensor(&managed->dl_tensor, name, ndim, tensor);
    PyErr_Format(PyExc_TypeError, "%s uses DLPack %u.%u; version %d is supported", name,
                 managed->version.major, managed->version.minor, DLPACK_MAJOR_VERSION);
    return -1;
}

static int consume_legacy(PyObject *capsule, const char *name, int ndim, struct fa_tensor *tensor)
{
    const DLManagedTensor *managed =
        take(capsule, "dltensor", "used_dltensor", release_legacy, tensor);
    return managed ? read_dltensor(&managed->dl_tensor, name, ndim, tensor) : -1;
}

static int consume_capsule(PyObject *capsule, const char *name, int ndim, struct fa_tensor *tensor)
{
    const char *kind = PyCapsule_GetName(capsule);
    if (kind && strcmp(kind, "dltensor_versioned") == 0)
        return consume_versioned(capsule, name, ndim, tensor);
    if (kind && strcmp(kind, "dltensor") == 0)
        return consume_legacy(capsule, name, ndim, tensor);
    if (kind && strncmp(kind, "used_dltensor", strlen("used_dltensor")) == 0)
        PyErr_Format(PyExc_ValueError, "%s is a DLPack capsule that was consumed before", name);
    else
        PyErr_Format(PyExc_TypeError, "%s must be a DLPack capsule, got one named \"%s\"", name,
                     kind ? kind : "");
    return -1;
}

static int read_by_capsule(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                           struct fa_tensor *tensor)
{
    if (PyCapsule_CheckExact(object))
        return consume_capsule(object, name, ndim, tensor);
    if (!PyObject_HasAttrString(object, "__dlpack__")) {
        set_type_error(name, object);
        return -1;
    }
    PyObject *frameworks = import_frameworks(dlpack);
    if (!frameworks)
        return -1;
    PyObject *capsule = PyObject_CallMethod(frameworks, "export", "(O)", object);
    if (!capsule) {
        set_export_error(name);
        return -1;
    }
    int status = -1;
    if (PyCapsule_CheckExact(capsule))
        status = consume_capsule(capsule, name, ndim, tensor);
    else
        PyErr_Format(PyExc_TypeError, "%s.__dlpack__() must return a capsule", name);
    Py_DECREF(capsule);
    return status;
}

/* ---- the interface --------------------------------------------------------------------------- */

int fa_tensor_read(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                   struct fa_tensor *tensor)
{
    memset(tensor, 0, sizeof *tensor);
    tensor->object = Py_NewRef(object);
    const DLPackExchangeAPI *api = exchange_api(dlpack, object);
    int status = api ? read_by_exchange(api, object, name, ndim, tensor)
                     : read_by_capsule(dlpack, object, name, ndim, tensor);
    if (status < 0)
        fa_tensor_release(tensor);
    return status;
}

bool fa_tensor_has_tma_strides(const struct fa_tensor *tensor)
{
    const int64_t size = (int64_t)fa_dtype_size(tensor->dtype), row = tensor->shape[3];
    for (int i = 0; i < 3; i++) {
        const int64_t stride = tensor->stride[i];
        if (tensor->shape[i] > 1 &&
            (stride < row || stride >= ((int64_t)1 << 40) / size || stride * size % 16 != 0))
            return false;
    }
    return (uintptr_t)tensor->data % 16 == 0;
}

void fa_tensor_release(struct fa_tensor *tensor)
{
    /* Deleters may run Python code, which must not meet the exception that a caller is about to
     * raise. */
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (tensor->managed && tensor->release)
        tensor->release(tensor->managed);
    tensor->managed = NULL;
    Py_CLEAR(tensor->object);
    PyErr_Restore(type, value, traceback);
}

bool fa_tensor_is_readable(const struct fa_tensor *tensor)
{
    const int last = tensor->ndim - 1;
    const int64_t size = (int64_t)fa_dtype_size(tensor->dtype);
    if (is_empty(tensor))
        return true;
    if ((tensor->shape[last] > 1 && tensor->stride[last] != 1) || (uintptr_t)tensor->data % 16 != 0)
        return false;
    for (int i = 0; i < last; i++)
        if (tensor->shape[i] > 1 && tensor->stride[i] * size % 16 != 0)
            return false;
    return true;
}

bool fa_tensor_is_contiguous(const struct fa_tensor *tensor)
{
    int64_t compact = 1;
    if (is_empty(tensor))
        return true;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (tensor->shape[i] > 1 && tensor->stride[i] != compact)
            return false;
        compact *= tensor->shape[i];
    }
    return (uintptr_t)tensor->data % fa_dtype_size(tensor->dtype) == 0;
}

/* Replaces the tensor by a contiguous copy. 0 or -1. */
static int copy_contiguous(struct fa_dlpack *dlpack, const char *name, struct fa_tensor *tensor)
{
    PyObject *frameworks = import_frameworks(dlpack);
    PyObject *copy =
        frameworks ? PyObject_CallMethod(frameworks, "contiguous", "(O)", tensor->object) : NULL;
    if (!copy)
        return -1;
    const int ndim = tensor->ndim;
    fa_tensor_release(tensor);
    int status = fa_tensor_read(dlpack, copy, name, ndim, tensor);
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
    PyErr_Format(PyExc_ValueError, "%s could not be made contiguous with rows aligned to 16 bytes",
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
    if (fa_tensor_is_contiguous(tensor))
        return 0;
    if (copy_contiguous(dlpack, name, tensor) < 0)
        return -1;
    if (fa_tensor_is_contiguous(tensor))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s could not be made contiguous", name);
    fa_tensor_release(tensor);
    return -1;
}

/* Allocates by the function of that name in frameworks.py. 0 or -1. */
static int allocate(struct fa_dlpack *dlpack, const char *function, const struct fa_tensor *like,
                    enum fa_dtype dtype, int ndim, const int64_t *shape, struct fa_tensor *tensor)
{
    PyObject *frameworks = import_frameworks(dlpack);
    PyObject *sizes = frameworks ? PyTuple_New(ndim) : NULL;
    if (!sizes)
        return -1;
    int status = -1;
    PyObject *object = NULL;
    for (int i = 0; i < ndim; i++) {
        PyObject *size = PyLong_FromLongLong(shape[i]);
        if (!size || PyTuple_SetItem(sizes, i, size) < 0)
            goto done;
    }
    object = PyObject_CallMethod(frameworks, function, "OOsii", like->object, sizes,
                                 fa_dtype_name(dtype), like->device_type, like->device_id);
    if (object)
        status = fa_tensor_read(dlpack, object, "out", ndim, tensor);
done:
    Py_XDECREF(object);
    Py_DECREF(sizes);
    return status;
}

int fa_tensor_empty(struct fa_dlpack *dlpack, const struct fa_tensor *like, enum fa_dtype dtype,
                    int ndim, const int64_t *shape, struct fa_tensor *tensor)
{
    return allocate(dlpack, "empty", like, dtype, ndim, shape, tensor);
}

int fa_tensor_zeros(struct fa_dlpack *dlpack, const struct fa_tensor *like, enum fa_dtype dtype,
                    int ndim, const int64_t *shape, struct fa_tensor *tensor)
{
    return allocate(dlpack, "zeros", like, dtype, ndim, shape, tensor);
}

int fa_tensor_workspace(struct fa_dlpack *dlpack, const struct fa_tensor *like, int64_t floats,
                        struct fa_tensor *workspace)
{
    if (fa_tensor_empty(dlpack, like, FA_FLOAT32, 1, &floats, workspace) == 0)
        return 0;
    PyObject *type, *value, *traceback; /* the framework's own exception is the best to catch */
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_Format(type, "the call needs a workspace of %lld bytes: %S", (long long)floats * 4,
                 value ? value : Py_None);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return -1;
}

int fa_tensor_stream(struct fa_dlpack *dlpack, const struct fa_tensor *tensor, void **stream)
{
    const DLPackExchangeAPI *api = exchange_api(dlpack, tensor->object);
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
