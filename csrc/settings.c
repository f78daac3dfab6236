#include "settings.h"

#include <Python.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

/* Whether `value` is one of those that `known` separates by "|". */
static bool is_known(const char *known, const char *value)
{
    const size_t length = strlen(value);
    for (; *known; known += *known == '|') {
        const size_t size = strcspn(known, "|");
        if (size == length && strncmp(known, value, size) == 0)
            return true;
        known += size;
    }
    return false;
}

/* A variable that knows some numbers; 0 where it is unset. */
static int read_number(const char *variable, const char *known, int *number)
{
    const char *value = getenv(variable);
    *number = 0;
    if (!value || !*value)
        return 0;
    if (!is_known(known, value)) {
        PyErr_Format(PyExc_ValueError, "%s must be %s or unset, got \"%s\"", variable, known,
                     value);
        return -1;
    }
    *number = atoi(value);
    return 0;
}

/* An architecture, and the class of its cards. */
static int read_plan_as(struct fa_settings *settings)
{
    static const char variable[] = "FA_SM120_PLAN_AS";
    if (read_number(variable, "120|120-geforce|120-pro", &settings->plan_as) < 0)
        return -1;
    const bool is_pro = settings->plan_as && strstr(getenv(variable), "pro");
    settings->plan_kind = is_pro ? FA_PRO_LIKE : FA_GEFORCE_LIKE;
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
    if (read_number("FA_SM120_LIMITS", "120", &settings->limits_arch) < 0 ||
        read_plan_as(settings) < 0 ||
        read_number("FA_SM120_TENSOR_REPEAT", "1|2|4", &settings->tensor_repeat) < 0 ||
        read_number("FA_SM120_CHECK", "1", &settings->check) < 0 ||
        read_path("FA_SM120_DRIVER", settings->driver, sizeof settings->driver) < 0)
        return -1;
    settings->ready = true;
    return 0;
}
