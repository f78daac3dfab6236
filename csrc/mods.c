#include "mods.h"

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

int fa_mod_read(struct fa_dlpack *dlpack, PyObject *object, const char *name, struct fa_mod *mod)
{
    const Py_ssize_t size = PyTuple_Check(object) ? PyTuple_Size(object) : 0;
    const long number = size ? PyLong_AsLong(PyTuple_GetItem(object, 0)) : 0;
    if (number == -1 && PyErr_Occurred())
        return -1;
    if (number < 1 || number > INT32_MAX || size > 1 + FA_MAX_CAPTURED)
        return fa_raise(PyExc_TypeError, "%s must be what flash_attn_sm120.mods makes of it", name);
    for (int i = 0; i + 1 < size; i++) {
        if (read_captured(dlpack, PyTuple_GetItem(object, i + 1), fa_mod_captured_name(name),
                          &mod->captured[i]) < 0)
            return -1;
        mod->count++;
    }
    mod->number = (int)number;
    return 0;
}

int fa_mod_check_apart(const struct fa_mod *mod, const char *name, const struct fa_tensor *result,
                       const char *result_name)
{
    for (int i = 0; i < mod->count; i++)
        if (fa_tensors_overlap(result, &mod->captured[i]))
            return fa_tensor_recheck(&mod->captured[i], fa_mod_captured_name(name)) < 0
                       ? -1
                       : fa_raise(PyExc_ValueError, "%s overlaps %s", result_name,
                                  fa_mod_captured_name(name));
    return 0;
}

int fa_mod_recheck(const struct fa_mod *mod, const char *name)
{
    for (int i = 0; i < mod->count; i++)
        if (fa_tensor_recheck(&mod->captured[i], fa_mod_captured_name(name)) < 0)
            return -1;
    return 0;
}

void fa_mod_release(struct fa_mod *mod)
{
    for (int i = 0; i < FA_MAX_CAPTURED; i++)
        fa_tensor_release(&mod->captured[i]);
    mod->count = 0;
}
