#include "block_map.h"

#include <stdlib.h>

#include "../error.h"
#include "../platform.h"
#include "rows.h"

/* One kind of lists. */
struct source {
    const struct fa_tensor *counts, *indices;
    enum fa_block_kind kind;
};

/* The blocks of a row: how many, and their numbers, which may be any. */
static int64_t read_row(const struct source *source, int64_t batch, int64_t head, int64_t row,
                        const int **indices)
{
    const struct fa_strides count = fa_block_list_strides(source->counts);
    const struct fa_strides index = fa_block_list_strides(source->indices);
    *indices = (const int *)source->indices->data + batch * index.batch + head * index.head +
               row * index.seqlen;
    return ((const int *)
                source->counts->data)[batch * count.batch + head * count.head + row * count.seqlen];
}

/* The kinds of a call's lists, which number `count`. */
static int sources_of(const struct fa_block_lists_read *lists, struct source sources[2])
{
    sources[0] = (struct source){&lists->counts, &lists->indices, FA_BLOCK_PARTIAL};
    sources[1] = (struct source){&lists->full_counts, &lists->full_indices, FA_BLOCK_FULL};
    return lists->full_counts.object ? 2 : 1;
}

/* The batch or the heads of all lists: 1 where every kind has the same for all. */
static int64_t size_of(const struct fa_block_lists_read *lists, int dimension)
{
    struct source sources[2];
    int64_t size = 1;
    for (int i = sources_of(lists, sources) - 1; i >= 0; i--)
        size = max64(
            size, max64(sources[i].counts->shape[dimension], sources[i].indices->shape[dimension]));
    return size;
}

int fa_block_map_make(const struct fa_block_lists_read *lists, bool lists_keys,
                      struct fa_block_map *map)
{
    *map = (struct fa_block_map){.block_q = lists->block_q, .block_k = lists->block_k};
    if (!lists->counts.object)
        return 0;
    const int64_t rows = lists->rows, blocks = lists->blocks;
    const int64_t batches = size_of(lists, 0), heads = size_of(lists, 1);
    map->k_blocks = lists_keys ? blocks : rows;
    map->head_step = heads > 1 ? rows * blocks : 0;
    map->batch_step = batches > 1 ? heads * rows * blocks : 0;
    map->kinds = calloc((size_t)max64(batches * heads * rows * blocks, 1), 1);
    if (!map->kinds)
        return FA_OUT_OF_MEMORY;
    struct source sources[2];
    const int kinds = sources_of(lists, sources);
    for (int64_t i = 0; i < batches * heads * rows * kinds; i++) {
        const struct source *source = &sources[i % kinds];
        const int64_t row = i / kinds % rows, pair = i / kinds / rows;
        const int *indices;
        const int64_t count = read_row(source, pair / heads, pair % heads, row, &indices);
        uint8_t *of_pair = map->kinds + pair * rows * blocks;
        for (int64_t n = 0; n < clamp(count, 0, source->indices->shape[3]); n++) {
            const int64_t other = clamp(indices[n], 0, blocks - 1);
            of_pair[lists_keys ? row * blocks + other : other * rows + row] = (uint8_t)source->kind;
        }
    }
    return 0;
}

void fa_block_map_release(struct fa_block_map *map) { free(map->kinds); }

static int check_row(const struct source *source, int64_t blocks, int64_t row, int64_t count,
                     const int *indices)
{
    const int64_t most = source->indices->shape[3];
    if (count < 0 || count > most)
        return fa_raise(PyExc_ValueError,
                        "counts of listed blocks must be from 0 to %lld, the indices of a row: row "
                        "%lld has %lld",
                        (long long)most, (long long)row, (long long)count);
    for (int64_t n = 0; n < count; n++)
        if (indices[n] < 0 || indices[n] >= blocks)
            return fa_raise(PyExc_ValueError,
                            "indices of listed blocks must be from 0 to %lld: row %lld has %d",
                            (long long)blocks - 1, (long long)row, indices[n]);
    return 0;
}

int fa_block_map_check(const struct fa_block_lists_read *lists)
{
    struct source sources[2];
    if (!lists->counts.object)
        return 0;
    const int kinds = sources_of(lists, sources);
    const int64_t heads = size_of(lists, 1), pairs = size_of(lists, 0) * heads;
    for (int kind = 0; kind < kinds; kind++)
        for (int64_t i = 0; i < pairs * lists->rows; i++) {
            const int64_t row = i % lists->rows, pair = i / lists->rows;
            const int *indices;
            const int64_t count =
                read_row(&sources[kind], pair / heads, pair % heads, row, &indices);
            if (check_row(&sources[kind], lists->blocks, row, count, indices) < 0)
                return -1;
        }
    return 0;
}
