/* Which keys a query sees, and the products of the few tiles where that matters. */
#ifndef FA_MASK_CUH
#define FA_MASK_CUH

#include "division.cuh"
#include "softmax.cuh"

/* The rows of a head's tiles are its queries. With PACK_GQA they are those of all query heads of
 * a KV head, heads fastest: row = query * heads_per_kv + head. */
__device__ __forceinline__ int row_count(const fa_forward_params &params)
{
    return PACK_GQA ? params.seqlen_q * params.heads_per_kv.number : params.seqlen_q;
}
__device__ __forceinline__ int query_of(const fa_forward_params &params, int row)
{
    return PACK_GQA ? divide(row, params.heads_per_kv).quotient : row;
}
/* How far a row lies from row 0 of its tensor. */
__device__ __forceinline__ fa_int64 row_offset(const fa_forward_params &params,
                                               const fa_strides &stride, int row)
{
    const int query = query_of(params, row);
    const int head = row - query * params.heads_per_kv.number;
    return query * stride.seqlen + (PACK_GQA ? head * stride.head : 0);
}

/* The same in lse, [batch, heads_q, seqlen_q], from its beginning; `pair` is that of the block. */
__device__ __forceinline__ fa_int64 lse_offset(const fa_forward_params &params, int pair, int row)
{
    const fa_int64 head = PACK_GQA ? fa_int64{pair} * params.heads_per_kv.number : pair;
    return head * params.seqlen_q + row_offset(params, {0, 1, params.seqlen_q}, row);
}

/* Query i sees key j if i + left <= j <= i + right and j < keys: diagonals aligned to the
 * bottom right. */
struct key_mask {
    const fa_forward_params &params;
    int left, right, keys;

    __device__ __forceinline__ explicit key_mask(const fa_forward_params &params) : params(params)
    {
        /* A window as long as the sequence is no window: the cut keeps the sums below from
         * overflowing. */
        const int diagonal = params.seqlen_k - params.seqlen_q;
        left = MASK_LEFT ? diagonal - min(params.window_left, params.seqlen_k) : 0;
        right = MASK_RIGHT ? diagonal + min(params.window_right, params.seqlen_q) : 0;
        keys = params.seqlen_k;
    }

    /* The first key that row sees, and the one after the last, if these are keys at all. */
    __device__ __forceinline__ int begin(int row) const
    {
        return MASK_LEFT ? max(query_of(params, row) + left, 0) : 0;
    }
    __device__ __forceinline__ int end(int row) const
    {
        return MASK_RIGHT ? max(min(query_of(params, row) + right + 1, keys), 0) : keys;
    }
    __device__ __forceinline__ bool sees(int row, int key) const
    {
        return key >= begin(row) && key < end(row);
    }
};

/* S, but `hidden` where the mask hides the key. `row` and `key` are those of S_rmem[0][0][0]. */
__device__ __forceinline__ void mask_scores(float (&S_rmem)[M_FRAGS][S_FRAGS][4],
                                            const key_mask &mask, int row, int key, float hidden)
{
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int begin = mask.begin(row + 16 * m + 8 * half) - key;
            const int end = mask.end(row + 16 * m + 8 * half) - key;
#pragma unroll
            for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const bool seen = 8 * n + e < end && (!MASK_LEFT || 8 * n + e >= begin);
                    if (!seen)
                        S_rmem[m][n][2 * half + e] = hidden;
                }
        }
}

/* The rows of this lane that raise m at the tile whose first key is `key`, having seen fewer than
 * START_KEYS keys before: those at their right edge, or where SPLIT at that of their part, before
 * the key `part_end`. */
__device__ __forceinline__ unsigned rows_at_edge(const key_mask &mask, int row, int key,
                                                 int part_end)
{
    unsigned rows = 0;
#pragma unroll
    for (int r = 0; r < 2 * M_FRAGS; r++)
        rows |= ((SPLIT && part_end < key + TILE_N + START_KEYS) ||
                 mask.end(row + 8 * r) < key + TILE_N + START_KEYS)
                << r;
    return rows;
}

/* add_values() where V holds inf or NaN: 0 * NaN is NaN, so a probability of zero does not hide
 * such a value. One key at a time: an mma on V with all other keys zeroed, added only to the
 * rows that see the key. `row` is that of O_rmem[0][0][0], `key` the first of the sub-tile.
 * The sums have another order then: the one case in which a row's last bits depend on its block. */
__device__ __forceinline__ void add_values_seen(float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                                const unsigned (&P_rmem)[M_FRAGS][S_FRAGS / 2][4],
                                                unsigned V_smem, const key_mask &mask, int row,
                                                int key)
{
    const int t = quad_lane();
#pragma unroll
    for (int k = 0; k < S_FRAGS / 2; k++)
#pragma unroll
        for (int n = 0; n < O_FRAGS; n++) {
            unsigned V_rmem[4];
            ldmatrix_x4_trans(V_rmem, V_layout::moved(V_smem, 16 * k, n / 2 * 2));
#pragma unroll 1
            for (int j = 0; j < 16; j++) {
                /* A register of the B operand holds two keys: which half of which register
                 * survives. */
                const unsigned keep = j % 8 / 2 == t ? 0xffffu << j % 2 * 16 : 0;
                const unsigned V0 = V_rmem[n % 2 * 2] & (j < 8 ? keep : 0);
                const unsigned V1 = V_rmem[n % 2 * 2 + 1] & (j < 8 ? 0 : keep);
#pragma unroll
                for (int m = 0; m < M_FRAGS; m++) {
                    float O_key[4] = {};
                    mma_m16n8k16(O_key, P_rmem[m][k], V0, V1);
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (mask.sees(row + 16 * m + 8 * (e / 2), key + 16 * k + j))
                            O_rmem[m][n][e] += O_key[e];
                }
            }
        }
}

#endif
