/* The plans of recent calls: a call like one before it costs a look-up, however many rows of tiles
 * there are. Of fixed size: a call takes the place of another one whose key falls on its slot. */
#ifndef FA_PLANS_H
#define FA_PLANS_H

#include "driver.h"
#include "plan.h"

/* All that a plan depends on but the environment, which is read once. */
struct fa_plan_key {
    struct fa_shape shape;
    int ordinal;            /* of the device */
    unsigned tiles_version; /* of the rows that were in use */
};

/* A call that is ready to be launched. */
struct fa_planned {
    struct fa_plan plan;
    CUkernel kernel;  /* of the plan's variant, loaded; NULL: not yet */
    CUkernel combine; /* likewise, where parts > 1 */
};

#define FA_PLAN_SLOTS 64 /* a power of two */
struct fa_plans {
    struct fa_plan_entry {
        struct fa_plan_key key;
        struct fa_planned planned; /* kernel NULL: the slot is free */
    } entries[FA_PLAN_SLOTS];
};

/* Keys are compared as bytes: `shape` must have been zeroed before it was filled, or the same call
 * might not be found again. */
void fa_plans_key(const struct fa_shape *shape, int ordinal, const struct fa_tile_list *own,
                  struct fa_plan_key *key);

/* Copies what is kept of `key`; false, and the kernel NULL, where nothing is. */
bool fa_plans_find(const struct fa_plans *plans, const struct fa_plan_key *key,
                   struct fa_planned *planned);

void fa_plans_keep(struct fa_plans *plans, const struct fa_plan_key *key,
                   const struct fa_planned *planned);

#endif
