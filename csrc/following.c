#include "following.h"

#include <stdbool.h>

int fa_following_set(struct fa_following *following, PyObject *plain_types, PyObject *questions,
                     PyObject *forward_ad)
{
    if (!PyTuple_Check(plain_types) || !PyTuple_Check(questions) || !PyDict_Check(forward_ad)) {
        PyErr_SetString(PyExc_TypeError, "follow() takes two tuples and a dict");
        return -1;
    }
    PyObject *level = PyUnicode_InternFromString("_current_level");
    PyObject *is_neg = PyUnicode_InternFromString("is_neg");
    if (!level || !is_neg) {
        Py_XDECREF(level);
        Py_XDECREF(is_neg);
        return -1;
    }
    fa_following_clear(following);
    *following = (struct fa_following){Py_NewRef(plain_types), Py_NewRef(questions),
                                       Py_NewRef(forward_ad), level, is_neg};
    return 0;
}

/* The truth of a new reference, which is dropped: 1, 0, or -1 with the exception set. */
static int truth_of(PyObject *answer)
{
    if (!answer)
        return -1;
    const int truth = answer == Py_False ? 0 : PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return truth;
}

static bool is_plain_type(const struct fa_following *following, PyObject *tensor)
{
    const Py_ssize_t count = PyTuple_Size(following->plain_types);
    for (Py_ssize_t i = 0; i < count; i++)
        if ((PyObject *)Py_TYPE(tensor) == PyTuple_GetItem(following->plain_types, i))
            return true;
    return false;
}

/* Whether torch has something switched on: a mode, a transform, a trace, a level of forward-mode
 * AD. 1, 0 or -1. */
static int is_switched_on(const struct fa_following *following)
{
    const Py_ssize_t count = PyTuple_Size(following->questions);
    for (Py_ssize_t i = 0; i < count; i++) {
        const int answer = truth_of(PyObject_CallNoArgs(PyTuple_GetItem(following->questions, i)));
        if (answer)
            return answer;
    }
    PyObject *level = PyDict_GetItemWithError(following->forward_ad, following->level);
    if (!level)
        return PyErr_Occurred() ? -1 : 1;
    const long number = PyLong_AsLong(level);
    return number == -1 && PyErr_Occurred() ? -1 : number >= 0;
}

int fa_following_is_plain_call(const struct fa_following *following, PyObject *const *tensors,
                               int count)
{
    if (!following->questions)
        return 1;
    const int on = is_switched_on(following);
    if (on)
        return on < 0 ? -1 : 0;
    for (int i = 0; i < count; i++) {
        if (!tensors[i])
            continue;
        if (!is_plain_type(following, tensors[i]))
            return 0;
        const int negative =
            truth_of(PyObject_CallMethodObjArgs(tensors[i], following->is_neg, NULL));
        if (negative)
            return negative < 0 ? -1 : 0;
    }
    return 1;
}

int fa_following_traverse(struct fa_following *following, visitproc visit, void *arg)
{
    Py_VISIT(following->plain_types);
    Py_VISIT(following->questions);
    Py_VISIT(following->forward_ad);
    return 0;
}

void fa_following_clear(struct fa_following *following)
{
    Py_CLEAR(following->plain_types);
    Py_CLEAR(following->questions);
    Py_CLEAR(following->forward_ad);
    Py_CLEAR(following->level);
    Py_CLEAR(following->is_neg);
}
