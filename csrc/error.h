/* Exceptions as the contract has them: one line of at most FA_MESSAGE_SIZE characters, with the
 * cause kept. */
#ifndef FA_ERROR_H
#define FA_ERROR_H

#include <Python.h>

#define FA_MESSAGE_SIZE 200

/* Raises `type`; the format is that of PyUnicode_FromFormat. An exception that is set becomes the
 * cause, unless it says nothing of the call's arguments (KeyboardInterrupt, SystemExit,
 * MemoryError, RecursionError): then it stays. Returns -1. */
int fa_raise(PyObject *type, const char *format, ...);

/* The same, saying "NAME must be EXPECTED, got VALUE". */
int fa_raise_value(PyObject *type, const char *name, const char *expected, PyObject *value);

/* The exception that is set, no longer set; NULL where none is. */
PyObject *fa_error_take(void);

/* Whether the object has the attribute: 1 or 0; -1 with an exception other than AttributeError set,
 * which PyObject_HasAttrString would swallow. */
int fa_has_attribute(PyObject *object, const char *name);

#endif
