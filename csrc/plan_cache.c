#include "plan_cache.h"

#include <stddef.h>
#include <string.h>

#include "hash.h"

/* Keys are hashed and compared as bytes. */
_Static_assert(sizeof(struct fa_plan_input) % sizeof(int) == 0 &&
                   sizeof(struct fa_plan_key) == sizeof(struct fa_plan_input) + 2 * sizeof(int),
               "a key has no padding");

static size_t slot(const struct fa_plan_key *key)
{
    return fa_hash(key, sizeof *key, 0) % FA_PLAN_SLOTS;
}

/* All of it is large beside what most calls use. */
static void copy_for_launch(const struct fa_planned *from, struct fa_planned *to)
{
    const size_t count = (size_t)from->plan.step_count;
    memcpy(&to->plan, &from->plan, offsetof(struct fa_plan, steps));
    memcpy(to->plan.steps, from->plan.steps, count * sizeof *to->plan.steps);
    memcpy(to->kernels, from->kernels, count * sizeof *to->kernels);
    to->plan.reason_count = 0;
}

bool fa_plan_cache_find(const struct fa_plan_cache *cache, const struct fa_plan_key *key,
                        struct fa_planned *planned)
{
    const size_t first = slot(key);
    for (size_t i = 0; i < 2; i++) {
        const struct fa_plan_entry *entry = &cache->entries[first ^ i];
        if (entry->is_used && memcmp(&entry->key, key, sizeof *key) == 0) {
            copy_for_launch(&entry->planned, planned);
            return true;
        }
    }
    return false;
}

void fa_plan_cache_keep(struct fa_plan_cache *cache, const struct fa_plan_key *key,
                        const struct fa_planned *planned)
{
    struct fa_plan_entry *entry = &cache->entries[slot(key)];
    if (entry->is_used)
        cache->entries[slot(key) ^ 1] = *entry;
    *entry = (struct fa_plan_entry){true, *key, *planned};
}
