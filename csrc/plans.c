#include "plans.h"

#include <string.h>

#include "hash.h"

static size_t slot(const struct fa_plan_key *key)
{
    return fa_hash(key, sizeof *key, 0) % FA_PLAN_SLOTS;
}

void fa_plans_key(const struct fa_shape *shape, int ordinal, const struct fa_tile_list *own,
                  struct fa_plan_key *key)
{
    memcpy(&key->shape, shape, sizeof *shape); /* padding, too */
    key->ordinal = ordinal;
    key->tiles_version = own->version;
}

bool fa_plans_find(const struct fa_plans *plans, const struct fa_plan_key *key,
                   struct fa_planned *planned)
{
    const struct fa_plan_entry *entry = &plans->entries[slot(key)];
    planned->kernel = NULL;
    if (!entry->planned.kernel || memcmp(&entry->key, key, sizeof *key) != 0)
        return false;
    *planned = entry->planned;
    return true;
}

void fa_plans_keep(struct fa_plans *plans, const struct fa_plan_key *key,
                   const struct fa_planned *planned)
{
    struct fa_plan_entry *entry = &plans->entries[slot(key)];
    memcpy(&entry->key, key, sizeof *key);
    entry->planned = *planned;
}
