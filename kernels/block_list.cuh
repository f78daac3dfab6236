/* Block sparsity: which tiles a block of either direction goes through where a call lists blocks of
 * [queries, keys]. What is not listed is not read.
 *
 * A listed block has one tile of the kernel or several. A row of the lists is a block of the side
 * whose tile a thread block holds: queries in the forward, keys in the backward. It lists blocks of
 * the other side, partial ones, then full ones, in any order; tiles are counted through both:
 *
 *   | partial block | partial block | full block | full block | full block |
 *   0   1   2   3   4  ...      partial_tiles           ...             count
 *
 *   BLOCK_SPARSE   1: the call lists blocks, see fa_block_lists in params.h */
#ifndef FA_BLOCK_LIST_CUH
#define FA_BLOCK_LIST_CUH

#include "argument.cuh"
#include "division.cuh"
#include "sequence.cuh"

static_assert(!BLOCK_SPARSE || !VARLEN, "no list has rows of packed sequences");

__device__ __forceinline__ fa_int64 list_offset(const fa_strides &stride, int batch, int head,
                                                int row)
{
    return batch * stride.batch + head * stride.head + row * stride.seqlen;
}

/* How many blocks a row lists: no more than it has room for. */
__device__ __forceinline__ int read_count(const fa_block_list &list, int batch, int head, int row)
{
    if (!list.counts)
        return 0;
    return clamp(ld_global(list.counts + list_offset(list.count, batch, head, row)), 0, list.most);
}

/* The tiles that the thread block goes through whose own tile is number `tile` of a query head. */
struct listed_tiles {
    const fa_block_lists *lists;
    const int *partial, *full; /* the indices of the row */
    int partial_blocks, blocks;

    listed_tiles() = default;

    template <class params_t>
    __device__ __forceinline__ listed_tiles(const params_t &params, int batch, int head, int tile)
        : lists(&lists_of(params))
    {
        const fa_block_lists &lists = lists_of(params);
        const int row = divide(tile, lists.row_tiles).quotient;
        partial = lists.partial.indices + list_offset(lists.partial.index, batch, head, row);
        full = lists.full.indices + list_offset(lists.full.index, batch, head, row);
        partial_blocks = same_in_warp(read_count(lists.partial, batch, head, row));
        blocks = partial_blocks + same_in_warp(read_count(lists.full, batch, head, row));
    }

    __device__ __forceinline__ int count() const { return blocks * lists->tiles.number; }
    __device__ __forceinline__ int partial_tiles() const
    {
        return partial_blocks * lists->tiles.number;
    }
    /* What the list has for a block, for tile_of() to look at when it has come; any number where
     * there is none. */
    __device__ __forceinline__ int read_entry(int block) const
    {
        if (block >= blocks)
            return 0;
        return ld_global(block < partial_blocks ? partial + block
                                                : full + (block - partial_blocks));
    }
    /* The number of a tile of a listed block. */
    __device__ __forceinline__ int tile_of(int entry, int tile_in_block) const
    {
        return clamp(entry, 0, lists->blocks - 1) * lists->tiles.number + tile_in_block;
    }
    /* The number of the i-th tile. */
    __device__ __forceinline__ int tile(int i) const
    {
        const divided place = divide(i, lists->tiles);
        return tile_of(read_entry(place.quotient), place.rest);
    }
};

/* A walk over tiles that no list has: a mask_mod may hide keys of any. */
struct unlisted_walk {
    static __device__ __forceinline__ bool is_partial() { return true; }
};

/* A walk over the tiles from number `begin` on. The list is read a block ahead: most steps are to
 * the next tile of a block. */
struct listed_walk {
    listed_tiles tiles;
    int block,
        left;  /* the number of the current block in the list, and how many tiles it has from */
    int tile;  /* the current one on */
    int entry; /* of the next block */

    listed_walk() = default;
    __device__ __forceinline__ listed_walk(const listed_tiles &tiles, int begin) : tiles(tiles)
    {
        const divided place = divide(begin, tiles.lists->tiles);
        block = place.quotient;
        left = tiles.lists->tiles.number - place.rest;
        tile = tiles.tile_of(tiles.read_entry(block), place.rest);
        entry = tiles.read_entry(block + 1);
    }
    /* Whether a mask_mod may hide keys of the current tile. */
    __device__ __forceinline__ bool is_partial() const { return block < tiles.partial_blocks; }
    __device__ __forceinline__ void advance()
    {
        tile++;
        if (--left > 0)
            return;
        block++;
        left = tiles.lists->tiles.number;
        tile = tiles.tile_of(entry, 0);
        entry = tiles.read_entry(block + 1);
    }
};

#endif
