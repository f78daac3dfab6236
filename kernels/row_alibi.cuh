/* ALiBi for the rows that a lane of the forward has. */
#ifndef FA_ROW_ALIBI_CUH
#define FA_ROW_ALIBI_CUH

#include "forward_block.cuh"

/* Rows of a lane lie 8 apart. They are 8 queries apart, too, and have one slope: so scores with the
 * same row - column share a product. With PACK_GQA each row has its own query and head. */
struct row_alibi {
    enum { ROWS = PACK_GQA ? 2 * M_FRAGS : 1 };
    float slope[ROWS];
    int diagonal[ROWS]; /* the key there */

    __device__ __forceinline__ explicit row_alibi(const forward_block &block)
    {
        if (ALIBI)
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int row = block.lane_row + 8 * i;
                /* Rows after the last one have no head: any that exists will do. */
                const int head = block.head + block.head_of(min(row, block.last_row));
                slope[i] = load_slope(block.params, block.seq.batch, head);
                diagonal[i] = block.diagonal_of(row);
            }
    }

    /* `key`: that of S[0][0][0]. */
    __device__ __forceinline__ void add_to(float (&S)[M_FRAGS][S_FRAGS][4], int key,
                                           float scale) const
    {
        if (ALIBI)
            for_each_score(S, [&](float &s, int row, int column) {
                const int i = PACK_GQA ? row / 8 : 0;
                const float distance = diagonal[i] - key;
                s = with_alibi(s, scale, slope[i], distance + ((PACK_GQA ? 0 : row) - column));
            });
    }
};

#endif
