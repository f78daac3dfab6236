/* The module's state: all that outlives a call. One per interpreter; no other file keeps any. */
#ifndef FA_STATE_H
#define FA_STATE_H

#include <Python.h>

#include "driver.h"
#include "kernels.h"
#include "plans.h"
#include "settings.h"
#include "tensor.h"

#define FA_MAX_WARNINGS 16

struct fa_state {
    struct fa_settings settings;
    struct fa_producers producers;
    struct fa_driver driver;
    struct fa_kernels kernels;
    struct fa_plans plans;
    struct fa_tile_list tiles;           /* those of use_tiles() */
    const char *warned[FA_MAX_WARNINGS]; /* reasons of plan.c that callers have been warned of */
    int warned_count;
    PyObject *python_producers; /* flash_attn_sm120.producers, imported when first needed */
    PyObject *python_jit;       /* flash_attn_sm120.jit, likewise */
};

/* A borrowed reference to one of the two modules above. NULL with the exception set. */
PyObject *fa_state_import(PyObject **slot, const char *name);

#endif
