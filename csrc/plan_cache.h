/* The plans of recent calls: a call like one before it costs a look-up, however many rows of tiles
 * there are. Of fixed size: a key has two places, its slot and the one beside it, to which what is
 * found in the slot goes. So two calls one after the other never take each other's place. */
#ifndef FA_PLAN_CACHE_H
#define FA_PLAN_CACHE_H

#include "driver.h"
#include "plan.h"

/* All that a plan depends on but the environment, which is read once. Ints without padding. */
struct fa_plan_key {
    struct fa_plan_input input;
    int ordinal;            /* of the device */
    unsigned tiles_version; /* of the rows that were in use */
};

/* A call that is ready to be launched. */
struct fa_planned {
    struct fa_plan plan;
    CUkernel kernels[FA_MAX_STEPS]; /* of the steps that have blocks, or may have, loaded */
};

#define FA_PLAN_SLOTS 64 /* a power of two */
struct fa_plan_cache {
    long long made; /* plans that were not found here */
    struct fa_plan_entry {
        bool is_used;
        struct fa_plan_key key;
        struct fa_planned planned;
    } entries[FA_PLAN_SLOTS];
};

/* Copies what a launch reads of what is kept of `key`: the steps that there are, and no reasons.
 * False where nothing is kept. */
bool fa_plan_cache_find(const struct fa_plan_cache *cache, const struct fa_plan_key *key,
                        struct fa_planned *planned);

void fa_plan_cache_keep(struct fa_plan_cache *cache, const struct fa_plan_key *key,
                        const struct fa_planned *planned);

#endif
