/* A module of the package, imported when C code first needs it. */
#ifndef FA_IMPORT_H
#define FA_IMPORT_H

#include <Python.h>

/* A borrowed reference to the module, which *slot keeps. NULL with the exception set. */
static inline PyObject *fa_import(PyObject **slot, const char *name)
{
    if (!*slot)
        *slot = PyImport_ImportModule(name);
    return *slot;
}

#endif
