/* Block sparsity as callers pass it: lists of blocks of the side that a kernel's blocks walk over,
 * see kernels/block_list.cuh. */
#ifndef FA_BLOCK_LISTS_H
#define FA_BLOCK_LISTS_H

#include "shape.h"
#include "tensor.h"

/* For each block of the one side the blocks of the other, the first `count` of a row of indices.
 * int32; batch and heads of lists may have the size 1: all have the same. */
struct fa_block_lists_read {
    struct fa_tensor counts, indices; /* [batch, heads_q, rows], [batch, heads_q, rows, most]; */
                                      /* object NULL: nothing is listed, all is seen */
    struct fa_tensor full_counts, full_indices; /* the same; object NULL: none are full */
    int block_q, block_k;                       /* queries and keys of a block */
    int rows, blocks;                           /* blocks of the one side, and of the other */
};

/* Reads (block_q, block_k, counts, indices, full_counts, full_indices), the option `name`;
 * `lists_keys`: rows are blocks of queries, which list blocks of keys, else the other way round.
 * 0, or -1 with TypeError or ValueError set. */
int fa_block_lists_read(struct fa_dlpack *dlpack, PyObject *option, const char *name,
                        bool lists_keys, const struct fa_tensor *q, const struct fa_shape *shape,
                        struct fa_block_lists_read *lists);

/* Whether any of the lists differ from head to head. */
bool fa_block_lists_are_own(const struct fa_block_lists_read *lists);

/* Where the list of a row is in counts (or indices), of any kind, in elements. */
struct fa_strides fa_block_list_strides(const struct fa_tensor *tensor);

#endif
