#include "cpu_threads.h"

static PyObject *imported(const char *name)
{
    PyObject *text = PyUnicode_FromString(name);
    PyObject *module = text ? PyImport_GetModule(text) : NULL;
    Py_XDECREF(text);
    return module;
}

int fa_cpu_thread_count(void)
{
    PyObject *torch = imported("torch");
    if (!torch || torch == Py_None) { /* None in sys.modules forbids the import */
        Py_XDECREF(torch);
        return PyErr_Occurred() ? -1 : fa_thread_count();
    }
    PyObject *number = PyObject_CallMethod(torch, "get_num_threads", NULL);
    const long count = number ? PyLong_AsLong(number) : -1;
    Py_XDECREF(number);
    Py_DECREF(torch);
    if (PyErr_Occurred())
        return -1;
    return count < 1 ? 1 : count > FA_MAX_THREADS ? FA_MAX_THREADS : (int)count;
}

/* Runs the handlers of signals that have arrived; what one of them raises stays set. */
static bool interrupted(struct fa_threads *threads)
{
    PyEval_RestoreThread(threads->context);
    const bool raised = PyErr_CheckSignals() < 0;
    threads->context = PyEval_SaveThread();
    return raised;
}

void fa_cpu_threads_begin(struct fa_threads *threads, int count)
{
    /* Python handles signals in its main thread. Others, which may be daemons, must not wait for
     * the GIL in the middle of the work: at exit Python ends them there. */
    *threads = (struct fa_threads){
        .count = count,
        .interrupted = fa_is_main_thread() ? interrupted : NULL,
        .context = PyEval_SaveThread(),
    };
}

int fa_cpu_threads_end(struct fa_threads *threads, int status)
{
    PyEval_RestoreThread(threads->context);
    if (status == 0)
        return 0;
    if (status == FA_OUT_OF_MEMORY)
        PyErr_NoMemory();
    return -1;
}
