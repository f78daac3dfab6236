/* Which rows of which head a block of the forward computes, and what they see. */
#ifndef FA_FORWARD_BLOCK_CUH
#define FA_FORWARD_BLOCK_CUH

#include "block_list.cuh"
#include "division.cuh"
#include "score.cuh"
#include "tile.cuh"

/* The coordinates of this thread's block: sequence, head, rows, and which split of their keys.
 *
 * Blocks that run at the same time should share K and V in the L2: so group_heads (batch, head)
 * pairs go through all their query blocks together, heads fastest. With a right diagonal the last
 * queries see the most keys: these blocks start first, and the short ones fill the gaps at the end;
 * so it is of most lists of blocks.
 * The splits of a block, which are equally long, start together. With a list of tiles, sequence by
 * sequence, a group is of heads alone, and goes through the list.
 *
 * Rows are the queries of a head. With PACK_GQA they are those of all query heads of a KV head,
 * heads fastest: row = query * heads_per_kv + head.
 *
 * Constructed anew in each stage that needs it: registers are scarcer than the few divisions, see
 * read_block_index(). */
struct forward_block {
    const fa_forward_params &params;
    sequence<fa_forward_params> seq;
    attention_mask mask;
    int pair;                          /* batch * heads + the block's head, where that is read */
    int head, head_kv;                 /* the query head of row 0 */
    int block_row, warp_row, lane_row; /* first rows; the lane has every eighth after it */
    int last_row;                      /* of the block */
    int split;

    __device__ __forceinline__ explicit forward_block(const fa_forward_params &params)
        : params(params), seq{params, 0}
    {
        const unsigned thread = read_thread_index();
        const divided by_pairs = divide(read_block_index(), params.group_heads);
        const divided by_splits =
            SPLIT ? divide(by_pairs.quotient, params.parts) : divided{by_pairs.quotient, 0};
        const divided by_ranks = divide(by_splits.quotient, params.m_blocks);
        const int group = by_ranks.quotient, rank = by_ranks.rest;
        pair = group * params.group_heads.number + by_pairs.rest;
        split = by_splits.rest;
        const divided by_heads = divide(pair, params.heads);
        head = by_heads.rest;
        int number = by_heads.quotient;
        int tile = MASK_RIGHT || BLOCK_SPARSE ? params.m_blocks.number - 1 - rank : rank;
        if (VARLEN && params.list) { /* queries are packed: lse asks for the head, not the pair */
            number = ld_global(&params.list[rank].sequence);
            tile = ld_global(&params.list[rank].tile);
        }
        seq.select(number);
        head_kv = PACK_GQA ? head : divide(head, params.heads_per_kv).quotient;
        head *= PACK_GQA ? params.heads_per_kv.number : 1;
        block_row = tile * TILE_M;
        /* The shuffle tells the compiler that the number is the same in all of the warp. */
        const int warp = __shfl_sync(0xffffffff, thread / 32, 0);
        warp_row = block_row + warp * WARP_M;
        lane_row = warp_row + thread % 32 / 4;
        last_row = min(block_row + TILE_M, row_count()) - 1;
        mask = attention_mask(seq);
    }

    /* Query heads that share a block share its list. */
    __device__ __forceinline__ listed_tiles listed() const
    {
        return listed_tiles(params, seq.batch, head, block_row / TILE_M);
    }
    __device__ __forceinline__ int row_count() const
    {
        return PACK_GQA ? seq.seqlen_q() * params.heads_per_kv.number : seq.seqlen_q();
    }
    /* The rows of a head of the block in lse, whatever sequences have them. */
    __device__ __forceinline__ int rows_of_all() const
    {
        return PACK_GQA ? seq.lse_rows() * params.heads_per_kv.number : seq.lse_rows();
    }
    /* Whether the block has any row: a grid has blocks for the longest sequence that may come. */
    __device__ __forceinline__ bool has_rows() const { return block_row < row_count(); }
    __device__ __forceinline__ int query_of(int row) const
    {
        return PACK_GQA ? divide(row, params.heads_per_kv).quotient : row;
    }
    /* The query head of a row, counted from `head`; of a row beyond the last any head. */
    __device__ __forceinline__ int head_of(int row) const
    {
        return PACK_GQA ? row - query_of(row) * params.heads_per_kv.number : 0;
    }
    /* From row 0 of this block's head to a row of it. */
    __device__ __forceinline__ fa_int64 row_offset(const fa_strides &stride, int row) const
    {
        const int query = query_of(row);
        const int head = row - query * params.heads_per_kv.number;
        return query * stride.seqlen + (PACK_GQA ? head * stride.head : 0);
    }
    /* From the beginning of lse to a row. */
    __device__ __forceinline__ fa_int64 lse_offset(int row) const
    {
        const fa_int64 first = PACK_GQA ? fa_int64{pair} * params.heads_per_kv.number : pair;
        return seq.lse_offset(first, head) + row_offset({0, 1, seq.lse_rows()}, row);
    }
    /* Where a split call writes for combine.cu, [splits, rows in the order of lse]: from the
     * beginning to this split. */
    __device__ __forceinline__ fa_int64 split_offset() const
    {
        return split * (fa_int64{seq.lse_batch()} * params.heads.number * rows_of_all());
    }

    __device__ __forceinline__ score_coords coords(int row, int key) const
    {
        return {seq.batch, head + head_of(row), query_of(row), key};
    }
    __device__ __forceinline__ range keys_of(int row) const { return mask.keys_of(query_of(row)); }
    /* The key on a row's diagonal, where there is one. */
    __device__ __forceinline__ int diagonal_of(int row) const
    {
        return query_of(row) + mask.seqlen_k - mask.seqlen_q;
    }
    /* The end of the keys whose scores keep in range with the m of the keys before edge_of(row),
     * unless a row is flagged. With ALiBi scores rise up to the diagonal, from both sides. */
    __device__ __forceinline__ int edge_of(int row) const
    {
        return ALIBI ? max(min(keys_of(row).end, diagonal_of(row) + 1), 0) : keys_of(row).end;
    }
    __device__ __forceinline__ bool sees(int row, int key) const
    {
        return key >= keys_of(row).begin && key < keys_of(row).end &&
               (!MASK_MOD || mask_mod_of(coords(row, key), mods_of(params).mask));
    }
};

#endif
