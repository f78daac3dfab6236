#include "mods.h"

#include <stdlib.h>

#include "error.h"
#include "overlap.h"

const char *fa_mod_captured_name(const char *name)
{
    return name[0] == 's' ? "a tensor that score_mod captures" : "a tensor that mask_mod captures";
}

static int read_captured(struct fa_dlpack *dlpack, PyObject *object, const char *name,
                         struct fa_tensor *tensor)
{
    if (fa_tensor_read_captured(dlpack, object, name, tensor) < 0)
        return -1;
    for (int i = 0; i < tensor->ndim; i++)
        if (tensor->shape[i] < 1 || tensor->shape[i] > INT32_MAX)
            return fa_raise(PyExc_ValueError, "%s has the size %lld in dimension %d", name,
                            (long long)tensor->shape[i], i);
    return 0;
}

/* The gradient of a captured tensor, which is made for it: of the same shape. */
static int read_gradient(struct fa_dlpack *dlpack, PyObject *object, const char *name,
                         const struct fa_tensor *captured, struct fa_tensor *gradient)
{
    if (object == Py_None)
        return 0;
    if (fa_tensor_read_captured(dlpack, object, name, gradient) < 0)
        return -1;
    bool alike = gradient->dtype == FA_BYTES_4 && gradient->ndim == captured->ndim &&
                 fa_tensor_is_contiguous(gradient);
    for (int i = 0; alike && i < captured->ndim; i++)
        alike = gradient->shape[i] == captured->shape[i];
    return alike ? 0
                 : fa_raise(PyExc_ValueError, "the gradient of %s must be contiguous fp32", name);
}

int fa_mod_read(struct fa_dlpack *dlpack, PyObject *object, const char *name, struct fa_mod *mod)
{
    const char *captured_name = fa_mod_captured_name(name);
    PyObject *captured, *gradients;
    if (!PyTuple_Check(object) || !PyArg_ParseTuple(object, "iO!O!", &mod->number, &PyTuple_Type,
                                                    &captured, &PyTuple_Type, &gradients)) {
        PyErr_Clear();
        return fa_raise(PyExc_TypeError, "%s must be what flash_attn_sm120.mods makes of it", name);
    }
    const Py_ssize_t count = PyTuple_Size(captured), wanted = PyTuple_Size(gradients);
    if (mod->number < 1 || count > FA_MAX_CAPTURED || (wanted != 0 && wanted != count))
        return fa_raise(PyExc_ValueError, "%s has a number or tensors out of range", name);
    mod->captured = calloc((size_t)count + 1, sizeof *mod->captured);
    if (!mod->captured) {
        PyErr_NoMemory();
        return -1;
    }
    mod->count = (int)count; /* what is not read yet holds nothing */
    for (int i = 0; i < mod->count; i++) {
        struct fa_captured_tensor *each = &mod->captured[i];
        if (read_captured(dlpack, PyTuple_GetItem(captured, i), captured_name, &each->tensor) < 0)
            return -1;
        if (wanted && read_gradient(dlpack, PyTuple_GetItem(gradients, i), captured_name,
                                    &each->tensor, &each->gradient) < 0)
            return -1;
    }
    return 0;
}

bool fa_mod_has_gradients(const struct fa_mod *mod)
{
    for (int i = 0; i < mod->count; i++)
        if (mod->captured[i].gradient.object)
            return true;
    return false;
}

int64_t fa_mod_elements(const struct fa_captured_tensor *captured)
{
    int64_t elements = 1;
    for (int i = 0; i < captured->tensor.ndim; i++)
        elements *= captured->tensor.shape[i];
    return elements;
}

int fa_mod_allocate_sums(struct fa_dlpack *dlpack, const struct fa_tensor *like,
                         const struct fa_mod *mod)
{
    for (int i = 0; i < mod->count; i++) {
        struct fa_captured_tensor *each = &mod->captured[i];
        /* Zeros in fp32 are those of integers, too. */
        const int64_t size = 2 * sizeof(fa_int64) / sizeof(float) * fa_mod_elements(each);
        if (each->gradient.object &&
            fa_tensor_zeros(dlpack, like, "sums", FA_FLOAT32, 1, &size, &each->sums) < 0)
            return -1;
    }
    return 0;
}

int fa_mod_check_apart(const struct fa_mod *mod, const char *name, const struct fa_tensor *result,
                       const char *result_name)
{
    for (int i = 0; i < mod->count; i++)
        if (fa_tensors_overlap(result, &mod->captured[i].tensor))
            return fa_tensor_recheck(&mod->captured[i].tensor, fa_mod_captured_name(name)) < 0
                       ? -1
                       : fa_raise(PyExc_ValueError, "%s overlaps %s", result_name,
                                  fa_mod_captured_name(name));
    return 0;
}

int fa_mod_recheck(const struct fa_mod *mod, const char *name)
{
    const char *captured_name = fa_mod_captured_name(name);
    for (int i = 0; i < mod->count; i++) {
        const struct fa_captured_tensor *each = &mod->captured[i];
        if (fa_tensor_recheck(&each->tensor, captured_name) < 0 ||
            (each->gradient.object && fa_tensor_recheck(&each->gradient, captured_name) < 0) ||
            (each->sums.object && fa_tensor_recheck(&each->sums, "sums") < 0))
            return -1;
    }
    return 0;
}

void fa_mod_release(struct fa_mod *mod)
{
    for (int i = 0; i < mod->count; i++) {
        fa_tensor_release(&mod->captured[i].tensor);
        fa_tensor_release(&mod->captured[i].gradient);
        fa_tensor_release(&mod->captured[i].sums);
    }
    free(mod->captured);
    *mod = (struct fa_mod){0};
}
