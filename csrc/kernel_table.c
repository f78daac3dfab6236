#include "kernel_table.h"

#include <stdlib.h>
#include <string.h>

#include "hash.h"
#include "import.h"

/* The entry of the key, or the free slot where it belongs. */
static struct fa_kernel_entry *find_slot(struct fa_kernel_table *table,
                                         const struct fa_variant *variant, int ordinal)
{
    const size_t mask = table->capacity - 1;
    const size_t first = fa_hash(variant, sizeof *variant, (unsigned)ordinal);
    for (size_t i = first & mask;; i = (i + 1) & mask) {
        struct fa_kernel_entry *entry = &table->entries[i];
        if (!entry->kernel ||
            (entry->ordinal == ordinal && memcmp(&entry->variant, variant, sizeof *variant) == 0))
            return entry;
    }
}

static int grow(struct fa_kernel_table *table)
{
    struct fa_kernel_table larger = {.capacity = table->capacity ? 2 * table->capacity : 64};
    larger.entries = calloc(larger.capacity, sizeof *larger.entries);
    if (!larger.entries) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < table->capacity; i++)
        if (table->entries[i].kernel)
            *find_slot(&larger, &table->entries[i].variant, table->entries[i].ordinal) =
                table->entries[i];
    larger.count = table->count;
    larger.package = table->package;
    larger.jit = table->jit;
    free(table->entries);
    *table = larger;
    return 0;
}

/* Loading a module is not allowed while a graph is captured. */
static int refuse_capture(struct fa_driver *driver, const struct fa_variant *variant,
                          CUstream stream)
{
    const int capturing = fa_driver_is_capturing(driver, stream);
    if (capturing <= 0)
        return capturing;
    char name[FA_VARIANT_NAME_SIZE];
    fa_variant_name(variant, name);
    PyErr_Format(
        PyExc_RuntimeError,
        "the kernel %s is not loaded yet, and a stream under graph capture cannot load it: "
        "run the same call once before the capture",
        name);
    return -1;
}

PyObject *fa_variant_options(const struct fa_variant *variant)
{
    char option[FA_VARIANT_OPTION_SIZE];
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < FA_VARIANT_FIELD_COUNT; i++) {
        if (!fa_variant_option(variant, i, option))
            continue;
        PyObject *text = PyUnicode_FromString(option);
        if (!text || PyList_Append(list, text) < 0)
            Py_CLEAR(list);
        Py_XDECREF(text);
    }
    PyObject *options = list ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return options;
}

/* Asks jit.py for the kernel: a bytes object, or NULL with the exception set. The
 * driver gets a cubin, a library in its place PTX, which can be read without a GPU. */
static PyObject *compile(struct fa_kernel_table *table, const struct fa_driver *driver,
                         const struct fa_variant *variant, int arch)
{
    PyObject *jit = fa_import(&table->jit, table->package, "jit");
    PyObject *options = jit ? fa_variant_options(variant) : NULL;
    if (!options)
        return NULL;
    char name[FA_VARIANT_NAME_SIZE];
    fa_variant_name(variant, name);
    PyObject *ptx = driver->takes_ptx ? Py_True : Py_False;
    PyObject *code = PyObject_CallMethod(jit, "compile", "ssOiiO", fa_variant_kernel(variant), name,
                                         options, arch, driver->version, ptx);
    if (code && !PyBytes_Check(code)) {
        PyErr_Format(PyExc_TypeError, "jit.compile must return bytes, got %R", code);
        Py_CLEAR(code);
    }
    Py_DECREF(options);
    return code;
}

/* Fills the free slot `entry`; on failure it stays free. */
static int load(struct fa_driver *driver, PyObject *code, const struct fa_variant *variant,
                int smem_request, int ordinal, struct fa_kernel_entry *entry)
{
    const struct fa_cuda_device *device = &driver->devices[ordinal];
    void *function;
    *entry = (struct fa_kernel_entry){.variant = *variant, .ordinal = ordinal};
    /* Bytes end with a NUL of Python's own, as PTX must. */
    if (FA_DRIVER_CALL(driver, cuLibraryLoadData,
                       (&entry->library, PyBytes_AsString(code), NULL, NULL, 0, NULL, NULL, 0)) < 0)
        return -1;
    /* cuKernelGetFunction ends the driver's lazy loading, which a later graph capture would trip
     * over. */
    if (FA_DRIVER_CALL(driver, cuLibraryGetKernel,
                       (&entry->kernel, entry->library, fa_variant_kernel(variant))) < 0 ||
        FA_DRIVER_CALL(driver, cuKernelGetFunction, (&function, entry->kernel)) < 0 ||
        FA_DRIVER_CALL(driver, cuKernelSetAttribute,
                       (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_request,
                        entry->kernel, device->handle)) < 0) {
        driver->cuLibraryUnload(entry->library);
        entry->kernel = NULL;
        return -1;
    }
    return 0;
}

CUkernel fa_kernel_table_get(struct fa_kernel_table *table, struct fa_driver *driver,
                             const struct fa_variant *variant, int smem_request, int ordinal,
                             CUstream stream)
{
    if (table->capacity) {
        struct fa_kernel_entry *entry = find_slot(table, variant, ordinal);
        if (entry->kernel)
            return entry->kernel;
    }
    if (refuse_capture(driver, variant, stream) < 0)
        return NULL;
    PyObject *code = compile(table, driver, variant, driver->devices[ordinal].device.arch);
    if (!code)
        return NULL;
    /* Python ran: another thread may have been first, and grown the table. */
    struct fa_kernel_entry *entry = NULL;
    if (2 * table->count < table->capacity || grow(table) == 0)
        entry = find_slot(table, variant, ordinal);
    if (entry && !entry->kernel && load(driver, code, variant, smem_request, ordinal, entry) == 0)
        table->count++;
    Py_DECREF(code);
    return entry ? entry->kernel : NULL;
}

void fa_kernel_table_clear(struct fa_kernel_table *table, struct fa_driver *driver)
{
    for (size_t i = 0; i < table->capacity; i++)
        if (table->entries[i].kernel)
            driver->cuLibraryUnload(table->entries[i].library);
    free(table->entries);
    Py_CLEAR(table->jit);
    *table = (struct fa_kernel_table){0};
}
