/* Which tiles of keys a block of the forward goes through, in which order, and which of them take
 * masked iterations. */
#ifndef FA_FORWARD_WALK_CUH
#define FA_FORWARD_WALK_CUH

#include "kv_source.cuh"
#include "softmax.cuh"

/* Makes the tiles [begin, end) those of one of their splits, which differ by one tile at most. */
__device__ __forceinline__ void take_split(int &begin, int &end, int split,
                                           const fa_divisor &splits)
{
    const divided share = divide(end - begin, splits);
    begin += split * share.quotient + min(split, share.rest);
    end = begin + share.quotient + (split < share.rest);
}

template <bool IS_SPARSE = BLOCK_SPARSE> struct forward_walk;

/* The tiles of keys that a block goes through, from the last to the first. Any row sees keys of the
 * tiles [begin, end), every row all keys of [inner_begin, inner_end).
 *
 *   key 0  |  left edge  |          unmasked          |  right edge  |  seqlen_k
 *        begin      inner_begin                   inner_end         end
 *   i =  count  <-- unmasked_end <---------------- right_end  <----- 0
 *
 * The right edge is masked by the length and the right diagonal, the left edge by the left diagonal
 * alone. m is found at the right edge, so if START_KEYS is 1 the first unmasked tile counts as one
 * of the edge: then every row has seen a key. With ALiBi the edge goes on to the diagonal, where
 * scores are largest: from there on m is large enough, unless slopes are negative. */
template <> struct forward_walk<false> : unlisted_walk {
    int end, count;
    int inner_begin, inner_end;

    __device__ __forceinline__ forward_walk(const forward_block &block, const fa_divisor &splits)
    {
        int begin = block.keys_of(block.block_row).begin / TILE_N;
        end = max(begin, ceil_div(block.keys_of(block.last_row).end, TILE_N));
        inner_begin = min(ceil_div(block.keys_of(block.last_row).begin, TILE_N), end);
        inner_end =
            max((block.edge_of(block.block_row) + TILE_N - START_KEYS) / TILE_N, inner_begin);
        if (SPLIT) { /* of all these the tiles of one split, which may be none */
            take_split(begin, end, block.split, splits);
            inner_begin = min(max(inner_begin, begin), end);
            inner_end = min(max(inner_end, inner_begin), end);
        }
        count = end - begin;
    }

    __device__ __forceinline__ tile_order<false> order() const { return {end}; }
    /* Where the iterations of the walk change. */
    __device__ __forceinline__ int unmasked_end() const { return end - inner_begin; }
    __device__ __forceinline__ int right_end() const { return min(end - inner_end + 1, count); }
    __device__ __forceinline__ int masked_end_from(int) const { return count; }
    __device__ __forceinline__ bool is_inner() const { return true; }

    /* The first key of the i-th tile. */
    __device__ __forceinline__ int key(int i) const { return order().key(i); }
    __device__ __forceinline__ void advance() {}

    __device__ __forceinline__ row_set rows_to_update(const forward_block &block, int row,
                                                      int tile_key) const
    {
        return ::rows_to_update(block, row, tile_key, end * TILE_N);
    }
};

/* Listed tiles, one after the other, see block_list.cuh. Partial ones are masked, if there is a
 * mask_mod, and every one that is not seen by all rows. m is found at these, and at the first full
 * one: then every row has seen a key, unless masks hide all so far. ALiBi, whose scores rise towards the diagonal, would
 * overflow behind any other tile: with it all are masked. */
template <> struct forward_walk<true> {
    tile_order<true> listed;
    int count;
    range inner; /* the keys that every row sees */
    listed_walk at;

    __device__ __forceinline__ forward_walk(const forward_block &block, const fa_divisor &splits)
        : listed{block.listed(), 0}, count(listed.tiles.count()),
          inner{block.keys_of(block.last_row).begin, block.keys_of(block.block_row).end},
          at(listed.tiles, 0)
    {
        if (SPLIT) {
            take_split(listed.begin, count, block.split, splits);
            count -= listed.begin;
            at = listed_walk(listed.tiles, listed.begin);
        }
    }

    __device__ __forceinline__ tile_order<true> order() const { return listed; }
    __device__ __forceinline__ int unmasked_end() const { return ALIBI ? 0 : count; }
    __device__ __forceinline__ int right_end() const
    {
        const int masked = MASK_MOD ? max(listed.tiles.partial_tiles() - listed.begin, 0) : 0;
        return ALIBI ? count : min(masked + 1, count);
    }
    __device__ __forceinline__ int masked_end_from(int i) const { return min(i + 1, count); }
    /* Whether all rows see all keys of the current tile. */
    __device__ __forceinline__ bool is_inner() const
    {
        const int key = at.tile * TILE_N;
        return key >= inner.begin && key + TILE_N <= inner.end;
    }

    __device__ __forceinline__ bool is_partial() const { return at.is_partial(); }

    /* Of the current tile: it is the i-th. */
    __device__ __forceinline__ int key(int) const { return at.tile * TILE_N; }
    __device__ __forceinline__ void advance() { at.advance(); }

    __device__ __forceinline__ row_set rows_to_update(const forward_block &, int, int) const
    {
        return {~0u};
    }
};

#endif
