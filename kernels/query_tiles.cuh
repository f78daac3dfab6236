/* Tiles of queries in the workspace of the backward: where those of a sequence and head are, and
 * whose a tile is. */
#ifndef FA_QUERY_TILES_CUH
#define FA_QUERY_TILES_CUH

#include "sequence.cuh"

/* Whose a tile is: of which sequence and head, and which of their tiles. */
struct query_tile_place {
    int pair; /* batch * heads_q + head */
    int batch, head, m_block;
};

template <class params_t, bool HAS_LENGTHS = VARLEN> struct query_tiles;

/* [batch, heads_q, m_blocks] */
template <class params_t> struct query_tiles<params_t, false> {
    const params_t &params;

    /* The tiles of a head that lie one after the other, the queries in them, and how often. */
    __device__ __forceinline__ int in_a_row() const { return params.m_blocks; }
    __device__ __forceinline__ int queries_in_a_row() const { return params.seqlen_q; }
    __device__ __forceinline__ int rows() const { return params.batch; }
    /* The number of a tile, in a buffer of dQ where there are several. */
    __device__ __forceinline__ fa_int64 index(const sequence<params_t, false> &seq, int head,
                                              int m_block, int buffer = 0) const
    {
        const int batch = buffer * params.batch + seq.batch;
        return (static_cast<fa_int64>(batch) * params.heads_q + head) * params.m_blocks + m_block;
    }
    __device__ __forceinline__ query_tile_place place_of(int tile) const
    {
        const int m_block = tile % params.m_blocks, pair = tile / params.m_blocks;
        const int batch = pair / params.heads_q, head = pair % params.heads_q;
        return {pair, batch, head, m_block};
    }
};

/* [heads_q, tiles of all sequences] */
template <class params_t> struct query_tiles<params_t, true> {
    const params_t &params;

    __device__ __forceinline__ sequence_tiles of_head() const
    {
        return {params.lengths, params.batch, params.m_blocks, TILE_M, params.query_tiles};
    }
    __device__ __forceinline__ int in_a_row() const { return params.query_tiles; }
    __device__ __forceinline__ int queries_in_a_row() const { return in_a_row() * TILE_M; }
    __device__ __forceinline__ int rows() const { return 1; }
    __device__ __forceinline__ fa_int64 index(const sequence<params_t, true> &seq, int head,
                                              int m_block, int buffer = 0) const
    {
        const fa_int64 pair = static_cast<fa_int64>(buffer) * params.heads_q + head;
        return pair * in_a_row() + of_head().first(seq.q_begin, seq.batch) + m_block;
    }
    __device__ __forceinline__ query_tile_place place_of(int tile) const
    {
        const auto [batch, m_block] = of_head().place_of(tile % in_a_row());
        const int head = tile / in_a_row();
        return {batch * params.heads_q + head, batch, head, m_block};
    }
};

#endif
