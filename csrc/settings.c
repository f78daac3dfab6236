#include "settings.h"

#include <Python.h>
#include <stdlib.h>
#include <string.h>

/* The one value that both architecture variables know so far is sm_120's. */
static int read_arch(const char *variable, int *arch)
{
    const char *value = getenv(variable);
    if (!value || !*value) {
        *arch = 0;
        return 0;
    }
    if (strcmp(value, "120") != 0) {
        PyErr_Format(PyExc_ValueError, "%s must be 120 or unset, got \"%s\"", variable, value);
        return -1;
    }
    *arch = 120;
    return 0;
}

static int read_path(const char *variable, char *path, size_t size)
{
    const char *value = getenv(variable);
    if (value && strlen(value) >= size) {
        PyErr_Format(PyExc_ValueError, "%s must be shorter than %d bytes", variable, (int)size);
        return -1;
    }
    strcpy(path, value ? value : "");
    return 0;
}

int fa_settings_read(struct fa_settings *settings)
{
    if (settings->ready)
        return 0;
    if (read_arch("FA_SM120_LIMITS", &settings->limits_arch) < 0 ||
        read_arch("FA_SM120_PLAN_AS", &settings->plan_as) < 0 ||
        read_path("FA_SM120_DRIVER", settings->driver, sizeof settings->driver) < 0)
        return -1;
    settings->ready = true;
    return 0;
}
