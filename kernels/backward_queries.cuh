/* Which queries a block of backward.cu goes through, in which order, and how they come to shared
 * memory. */
#ifndef FA_BACKWARD_QUERIES_CUH
#define FA_BACKWARD_QUERIES_CUH

#include "backward_tile.cuh"
#include "block_list.cuh"
#include "query_tiles.cuh"
#include "score.cuh"

/* The coordinates of this thread's block: sequence, KV head, keys, and which of the q_splits blocks
 * that share them.
 *
 * Blocks that run at the same time should share Q, dO and the accumulators of dQ in the L2: so
 * group_heads (batch, KV head) pairs go through all their tiles of keys together, heads fastest.
 * With a right diagonal the first keys are seen by the most queries: these blocks start first, and
 * the short ones fill the gaps at the end. With a list of tiles, sequence by sequence, a group is
 * of heads alone, and goes through the list. Of two blocks of a pair the one with the lower keys
 * always has the lower number: ordered accumulation relies on it. */
struct backward_block {
    sequence<fa_backward_params> seq;
    int n_block, head_kv, q_split;

    __device__ __forceinline__ backward_block(const fa_backward_params &params, int number)
        : seq{params, 0}
    {
        const bool is_listed = VARLEN && params.list;
        q_split = number % params.q_splits;
        number /= params.q_splits;
        const int group_blocks = params.group_heads * params.n_blocks;
        const int first_pair = number / group_blocks * params.group_heads;
        const int all_pairs = is_listed ? params.heads_kv : params.batch * params.heads_kv;
        const int pairs = min(params.group_heads, all_pairs - first_pair);
        number %= group_blocks;
        n_block = number / pairs;
        number = first_pair + number % pairs;
        head_kv = number % params.heads_kv;
        number /= params.heads_kv;
        if (is_listed) {
            number = same_in_warp(ld_global(&params.list[n_block].sequence));
            n_block = same_in_warp(ld_global(&params.list[n_block].tile));
        }
        seq.select(number);
        seq.make_uniform();
    }
};

/* The walk of a block over the (query head, tile of queries) pairs that it adds up: of the query
 * heads that share its KV head, the tiles [m_begin, m_end) that see its keys. The q_splits blocks
 * that have the same keys divide these pairs among them; this one takes [begin, end) of them.
 */
template <bool ORDERED, bool IS_SPARSE = BLOCK_SPARSE> struct query_walk;

/* Head by head, tiles upwards. */
template <> struct query_walk<false, false> : unlisted_walk {
    int m_begin, m_end;
    int begin, end;
    int head, m_block; /* the current pair */

    __device__ __forceinline__ query_walk(const fa_backward_params &params,
                                          const backward_block &block, int m_begin, int m_end)
        : m_begin(m_begin), m_end(m_end)
    {
        head = block.head_kv * params.heads_per_kv;
        const int head_tiles = m_end - m_begin, tiles = head_tiles * params.heads_per_kv;
        begin = static_cast<fa_int64>(tiles) * block.q_split / params.q_splits;
        end = static_cast<fa_int64>(tiles) * (block.q_split + 1) / params.q_splits;
        head += begin / max(head_tiles, 1);
        m_block = m_begin + begin % max(head_tiles, 1);
    }
    __device__ __forceinline__ void advance()
    {
        m_block = m_block + 1 == m_end ? m_begin : m_block + 1;
        head += m_block == m_begin;
    }
};

/* For ordered accumulation: whole heads, which alternate from tile to tile, and tiles downwards. So
 * all blocks that run together start with the same tile of dQ and go on at the same pace, and none
 * waits for long. */
template <> struct query_walk<true, false> : unlisted_walk {
    int head_begin, head_end;
    int begin, end;
    int head, m_block; /* the current pair */

    __device__ __forceinline__ query_walk(const fa_backward_params &params,
                                          const backward_block &block, int m_begin, int m_end)
    {
        head_begin = block.head_kv * params.heads_per_kv;
        head_end = head_begin + params.heads_per_kv * (block.q_split + 1) / params.q_splits;
        head_begin += params.heads_per_kv * block.q_split / params.q_splits;
        begin = 0;
        end = (m_end - m_begin) * (head_end - head_begin);
        head = head_begin;
        m_block = m_end - 1;
    }
    __device__ __forceinline__ void advance()
    {
        head = head + 1 == head_end ? head_begin : head + 1;
        m_block -= head == head_begin;
    }
};

/* Listed tiles, head by head: each query head has a list. */
template <> struct query_walk<false, true> {
    const backward_block *block;
    int begin, end;
    int head, m_block; /* the current pair */
    int head_end;
    listed_walk at;

    __device__ __forceinline__ query_walk(const fa_backward_params &params,
                                          const backward_block &block, int, int)
        : block(&block)
    {
        head = block.head_kv * params.heads_per_kv;
        head_end = head + params.heads_per_kv;
        int tiles = 0;
        for (int i = head; i < head_end; i++)
            tiles += list_of(i).count();
        begin = static_cast<fa_int64>(tiles) * block.q_split / params.q_splits;
        end = static_cast<fa_int64>(tiles) * (block.q_split + 1) / params.q_splits;
        start(begin);
    }
    __device__ __forceinline__ listed_tiles list_of(int query_head) const
    {
        return listed_tiles(block->seq.params, block->seq.batch, query_head, block->n_block);
    }
    /* At tile number `i` of the current head, or of those that follow. */
    __device__ __forceinline__ void start(int i)
    {
        listed_tiles list = list_of(head);
        while (i >= list.count() && head + 1 < head_end) {
            i -= list.count();
            list = list_of(++head);
        }
        at = listed_walk(list, i);
        m_block = at.tile;
    }
    __device__ __forceinline__ bool is_partial() const { return at.is_partial(); }
    __device__ __forceinline__ void advance()
    {
        at.advance();
        m_block = at.tile;
        if (at.block >= at.tiles.blocks && ++head < head_end)
            start(0);
    }
};

/* The same for ordered accumulation: whole heads, and a list from its end to its beginning. Where
 * the last queries see the most keys, as by a causal mask, blocks then start with the same tile. */
template <> struct query_walk<true, true> {
    const backward_block *thread_block;
    int begin, end;
    int head, m_block; /* the current pair */
    int head_end;
    listed_tiles list;
    int block, left; /* of the list, and the tiles before the current one in it */
    int entry;       /* of the block before it in the list */

    __device__ __forceinline__ query_walk(const fa_backward_params &params,
                                          const backward_block &thread_block, int, int)
        : thread_block(&thread_block)
    {
        const int first = thread_block.head_kv * params.heads_per_kv;
        head = first + params.heads_per_kv * thread_block.q_split / params.q_splits;
        head_end = first + params.heads_per_kv * (thread_block.q_split + 1) / params.q_splits;
        begin = 0;
        end = 0;
        for (int i = head; i < head_end; i++)
            end += list_of(i).count();
        start();
    }
    __device__ __forceinline__ listed_tiles list_of(int query_head) const
    {
        const sequence<fa_backward_params> &seq = thread_block->seq;
        return listed_tiles(seq.params, seq.batch, query_head, thread_block->n_block);
    }
    /* At the last tile of the current head, or of the next one that has any. */
    __device__ __forceinline__ void start()
    {
        list = list_of(head);
        while (list.blocks == 0 && head + 1 < head_end)
            list = list_of(++head);
        block = list.blocks - 1;
        entry = list.read_entry(max(block, 0));
        take_entry();
    }
    __device__ __forceinline__ void take_entry()
    {
        left = list.lists->tiles.number - 1;
        m_block = list.tile_of(entry, left);
        entry = list.read_entry(max(block - 1, 0));
    }
    __device__ __forceinline__ bool is_partial() const { return block < list.partial_blocks; }
    __device__ __forceinline__ void advance()
    {
        if (left-- > 0)
            m_block--;
        else if (--block >= 0)
            take_entry();
        else if (++head < head_end)
            start();
    }
};

/* With ordered accumulation: how many additions to the current tile of dQ, of queries from `query0`
 * on, come before that of this block. */
template <class walk_t>
__device__ __forceinline__ int added_before(const walk_t &, const backward_block &block,
                                            const attention_mask &mask, int query0)
{
    return (block.n_block - mask.keys_of(query0).begin / TILE_N) / DQ_BUFFERS;
}
/* By the rows of lower keys, and by the tiles of lower keys of the block's own row. */
__device__ __forceinline__ int added_before(const query_walk<true, true> &walk,
                                            const backward_block &block, const attention_mask &,
                                            int)
{
    const fa_extended_backward_params &params = extended(block.seq.params);
    const fa_addition_order &order = params.order;
    const divided row = divide(block.n_block, params.lists.row_tiles);
    const int pair = block.seq.batch * order.heads + (order.heads > 1 ? walk.head : 0);
    const fa_int64 first = static_cast<fa_int64>(pair) * (order.rows + 1) + row.quotient;
    const int *before = order.before + first * params.lists.blocks +
                        divide(walk.m_block, params.lists.tiles).quotient;
    const int rows_before = ld_global(before),
              through_own = ld_global(before + params.lists.blocks);
    return rows_before * params.lists.row_tiles.number + row.rest * (through_own - rows_before);
}

/* A tile of queries in shared memory: Q [TILE_M, HEAD_DIM], dO [TILE_M, HEAD_DIM_V], lse_log2
 * [TILE_M] and behind it delta [TILE_M]. `count` tiles were loaded before it. With the TMA, one
 * mbarrier says when Q, lse_log2 and delta are there, and one when dO is. */
struct query_tile {
    unsigned Q_smem, dO_smem, lse_smem;
    unsigned Q_mbarrier, Q_parity, dO_mbarrier, dO_parity;
    int head, query0; /* of the first row */
    bool is_partial;  /* whether a mask_mod may hide keys from its queries */

    __device__ __forceinline__ query_tile(unsigned smem, unsigned count, int head, int query0,
                                          bool is_partial)
        : head(head), query0(query0), is_partial(is_partial)
    {
        const unsigned stage = count % STAGES;
        Q_smem = smem + SMEM.q + stage * Q_layout::BYTES;
        dO_smem = smem + SMEM.dout;
        lse_smem = smem + SMEM.lse_delta + stage * LSE_DELTA_BYTES;
        Q_mbarrier = smem + SMEM.q_mbarriers + stage * FA_BACKWARD_MBARRIER_STRIDE;
        Q_parity = count / STAGES % 2;
        dO_mbarrier = smem + SMEM.dout_mbarrier;
        dO_parity = count % 2;
    }
    __device__ __forceinline__ void wait_Q() const
    {
        if (TMA)
            mbarrier_wait(Q_mbarrier, Q_parity);
    }
    __device__ __forceinline__ void wait_dO() const
    {
        if (TMA)
            mbarrier_wait(dO_mbarrier, dO_parity);
    }
};

/* Loads tiles of queries into shared memory: one thread asks the TMA, or all copy with cp.async.
 * Queries after the last become zeros. */
struct query_loader {
    sequence<fa_backward_params> seq;
    unsigned smem;
    int thread;

    /* A thread of group 1, see QUERIES_FREE. */
    __device__ __forceinline__ bool asks_tma() const { return thread == THREADS - 1; }

    __device__ __forceinline__ void init_mbarriers() const
    {
        if (thread == 0) {
            for (int i = 0; i < STAGES + 1; i++) /* those of the stages of Q, and that of dO */
                mbarrier_init(smem + SMEM.q_mbarriers + i * FA_BACKWARD_MBARRIER_STRIDE, 1);
            fence_mbarrier_init();
        }
    }

    /* Q, lse_log2 and delta. */
    __device__ __forceinline__ void load_Q(int stage, int head, int m_block) const
    {
        const unsigned Q_smem = smem + SMEM.q + stage * Q_layout::BYTES;
        const unsigned lse_smem = smem + SMEM.lse_delta + stage * LSE_DELTA_BYTES;
        const float *lse_gmem =
            seq.params.lse_delta +
            query_tiles<fa_backward_params>{seq.params}.index(seq, head, m_block) * 2 * TILE_M;
        if (TMA) {
            if (asks_tma()) {
                const unsigned mbarrier =
                    smem + SMEM.q_mbarriers + stage * FA_BACKWARD_MBARRIER_STRIDE;
                mbarrier_expect(mbarrier, Q_layout::BYTES + LSE_DELTA_BYTES);
                load_boxes<Q_layout>(Q_smem, seq.params.q_map, mbarrier, head, m_block);
                bulk_load(lse_smem, lse_gmem, LSE_DELTA_BYTES, mbarrier);
            }
            return;
        }
        const copy_place<Q_layout, THREADS> share;
        share.copy(Q_smem,
                   share.first_chunk(seq.params.q, seq.params.q_stride, seq.batch, head,
                                     seq.q_begin + m_block * TILE_M),
                   seq.params.q_stride.seqlen, seq.seqlen_q() - m_block * TILE_M);
        if (thread < LSE_DELTA_BYTES / 16)
            cp_async_16(lse_smem + thread * 16, lse_gmem + thread * 4, 16);
    }

    __device__ __forceinline__ void load_dO(int head, int m_block) const
    {
        if (TMA) {
            if (asks_tma()) {
                const unsigned mbarrier = smem + SMEM.dout_mbarrier;
                mbarrier_expect(mbarrier, dO_layout::BYTES);
                load_boxes<dO_layout>(smem + SMEM.dout, seq.params.dout_map, mbarrier, head,
                                      m_block);
            }
            return;
        }
        const copy_place<dO_layout, THREADS> share;
        share.copy(smem + SMEM.dout,
                   share.first_chunk(seq.params.dout, seq.params.dout_stride, seq.batch, head,
                                     seq.q_begin + m_block * TILE_M),
                   seq.params.dout_stride.seqlen, seq.seqlen_q() - m_block * TILE_M);
    }

  private:
    /* A tile in boxes of the TMA, each a segment of the layout. Of packed queries a box has the
     * rows up to the end of the tile or of the sequence, and then zeros: see fa_backward_params. */
    template <class layout>
    __device__ __forceinline__ void load_boxes(unsigned tile_smem, const fa_tensor_map &map,
                                               unsigned mbarrier, int head, int m_block) const
    {
        const int query0 = m_block * TILE_M;
        const int rows = min(TILE_M, seq.seqlen_q() - query0);
        const int row = VARLEN ? TILE_M - rows : query0;
        const int entry = VARLEN ? seq.q_begin + query0 + rows : seq.batch;
#pragma unroll
        for (int c = 0; c < layout::PADDED; c += layout::COLS)
            tma_load_4d(tile_smem + c / layout::COLS * layout::SEGMENT_BYTES, &map, mbarrier, c * 8,
                        row, head, entry);
    }
};

#endif
