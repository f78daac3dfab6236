#include "error.h"

#include <stdbool.h>

#define VALUE_SIZE 80 /* characters of a value in a message */

PyObject *fa_error_take(void)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    if (!type)
        return NULL;
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback)
        PyException_SetTraceback(error, traceback);
    Py_DECREF(type);
    Py_XDECREF(traceback);
    return error;
}

/* Whether an exception is set that must reach the caller as it is. */
static bool passes(void)
{
    return PyErr_Occurred() &&
           (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError) ||
            PyErr_ExceptionMatches(PyExc_RecursionError));
}

/* The text, a reference that is stolen, in one line of at most `size` characters. NULL with the
 * exception set. */
static PyObject *one_line(PyObject *text, Py_ssize_t size)
{
    PyObject *space = PyUnicode_FromString(" ");
    PyObject *words = space && text ? PyObject_CallMethod(text, "split", NULL) : NULL;
    PyObject *line = words ? PyUnicode_Join(space, words) : NULL;
    if (line && PyUnicode_GetLength(line) > size) {
        PyObject *head = PyUnicode_Substring(line, 0, size - 3);
        Py_DECREF(line);
        line = head ? PyUnicode_FromFormat("%U...", head) : NULL;
        Py_XDECREF(head);
    }
    Py_XDECREF(words);
    Py_XDECREF(space);
    Py_XDECREF(text);
    return line;
}

/* Raises `type` with the text; steals text and cause, either of which may be NULL. Returns -1. */
static int raise_from(PyObject *type, PyObject *text, PyObject *cause)
{
    PyObject *line = text ? one_line(text, FA_MESSAGE_SIZE) : NULL;
    if (line) {
        PyErr_SetObject(type, line);
        Py_DECREF(line);
    }
    if (!cause)
        return -1;
    PyObject *error = fa_error_take();
    PyException_SetContext(error, Py_NewRef(cause));
    PyException_SetCause(error, cause);
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
    return -1;
}

int fa_raise(PyObject *type, const char *format, ...)
{
    if (passes())
        return -1;
    PyObject *cause = fa_error_take();
    va_list arguments;
    va_start(arguments, format);
    PyObject *text = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    return raise_from(type, text, cause);
}

/* The value as a message shows it: its type where it has no repr. NULL with the exception set. */
static PyObject *describe(PyObject *value)
{
    PyObject *text = PyObject_Repr(value);
    if (text)
        return one_line(text, VALUE_SIZE);
    if (passes())
        return NULL;
    PyErr_Clear();
    text = PyObject_Repr((PyObject *)Py_TYPE(value));
    return text ? one_line(text, VALUE_SIZE) : NULL;
}

int fa_raise_value(PyObject *type, const char *name, const char *expected, PyObject *value)
{
    if (passes())
        return -1;
    PyObject *cause = fa_error_take(), *got = describe(value);
    PyObject *text =
        got ? PyUnicode_FromFormat("%s must be %s, got %U", name, expected, got) : NULL;
    Py_XDECREF(got);
    return raise_from(type, text, cause);
}

int fa_has_attribute(PyObject *object, const char *name)
{
    PyObject *value = PyObject_GetAttrString(object, name);
    Py_XDECREF(value);
    if (value)
        return 1;
    if (!PyErr_ExceptionMatches(PyExc_AttributeError))
        return -1;
    PyErr_Clear();
    return 0;
}
