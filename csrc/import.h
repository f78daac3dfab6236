/* A module of the package, imported when C code first needs it. The package has the name that it
 * was imported by: there may be another of this project beside it. */
#ifndef FA_IMPORT_H
#define FA_IMPORT_H

#include <Python.h>

/* A borrowed reference to the module, which *slot keeps. NULL with the exception set. */
static inline PyObject *fa_import(PyObject **slot, PyObject *package, const char *name)
{
    if (*slot)
        return *slot;
    PyObject *full_name = PyUnicode_FromFormat("%U.%s", package, name);
    *slot = full_name ? PyImport_Import(full_name) : NULL;
    Py_XDECREF(full_name);
    return *slot;
}

#endif
