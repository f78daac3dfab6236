/* Block sparsity of the reference implementation: lists become a map that is asked pair by pair. */
#ifndef FA_CPU_BLOCK_MAP_H
#define FA_CPU_BLOCK_MAP_H

#include "../problem.h"

/* Which blocks of [queries, keys] the lists of a call have. */
enum fa_block_kind { FA_BLOCK_HIDDEN, FA_BLOCK_PARTIAL, FA_BLOCK_FULL };

struct fa_block_map {
    uint8_t *kinds; /* [batch, heads_q, q_blocks, k_blocks]; NULL: nothing is listed, all is seen */
    int64_t batch_step, head_step; /* 0 where all have the same */
    int64_t k_blocks;
    int block_q, block_k;
};

/* The lists of a call, of keys or of queries. Whatever they hold, the map is of blocks that exist.
 * 0, or FA_OUT_OF_MEMORY and nothing is held. */
int fa_block_map_make(const struct fa_block_lists_read *lists, bool lists_keys,
                      struct fa_block_map *map);
void fa_block_map_release(struct fa_block_map *map);

/* Whether lists have indices of blocks that exist; needs the GIL. 0, or -1 with ValueError set. */
int fa_block_map_check(const struct fa_block_lists_read *lists);

static inline bool fa_is_listed(const struct fa_block_map *map, int64_t batch, int64_t head,
                                int64_t query, int64_t key)
{
    return !map->kinds || map->kinds[batch * map->batch_step + head * map->head_step +
                                     query / map->block_q * map->k_blocks + key / map->block_k];
}

#endif
