/* The module's state: all that outlives a call. One per interpreter; no other file keeps any. */
#ifndef FA_STATE_H
#define FA_STATE_H

#include "driver.h"
#include "following.h"
#include "kernel_table.h"
#include "options.h"
#include "plan_cache.h"
#include "settings.h"
#include "tensor.h"

#define FA_MAX_WARNINGS 16

struct fa_state {
    PyObject *package; /* the name of the package that the module is in */
    struct fa_settings settings;
    struct fa_option_names option_names;
    struct fa_dlpack dlpack;
    struct fa_following following;
    struct fa_driver driver;
    struct fa_kernel_table kernels;
    struct fa_plan_cache plans;
    struct fa_tile_list tiles;           /* those of use_tiles() */
    char tuned_card[256];                /* the name of what use_card() classed */
    int tuned_kind;                      /* enum fa_card_kind; FA_NO_KIND: it has not been called */
    const char *warned[FA_MAX_WARNINGS]; /* reasons of plan.c that callers have been warned of */
    int warned_count;
};

/* 0, or -1 with the exception set. */
int fa_state_init(struct fa_state *state, PyObject *module);

/* For the garbage collector, and at the end of the interpreter. */
int fa_state_traverse(struct fa_state *state, visitproc visit, void *arg);
void fa_state_clear(struct fa_state *state);
void fa_state_free(struct fa_state *state);

#endif
