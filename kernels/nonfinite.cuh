/* O += P V where V holds inf or NaN: 0 * NaN is NaN, so a probability of zero does not hide such a
 * value from a row that does not see its key. */
#ifndef FA_NONFINITE_CUH
#define FA_NONFINITE_CUH

#include "forward_block.cuh"

/* Whether this thread's share of the V tile at `smem` holds an inf or NaN. */
__device__ __forceinline__ bool holds_nonfinite(unsigned smem)
{
    unsigned carries = 0;
    V_place().each([&](int, int, unsigned offset) {
        carries |= nonfinite_carries(ld_shared_16(smem + offset));
    });
    return carries & NONFINITE_CARRY;
}

/* add_values() for such a V. One key at a time: an mma on V with all other keys zeroed, added only
 * to the rows that see the key. `row` is that of O_rmem[0][0][0], `key` the first of the sub-tile.
 * The sums have another order then: the one case in which a row's last bits depend on its block. */
__device__ __forceinline__ void add_values_seen(float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                                const unsigned (&P_rmem)[M_FRAGS][P_STEPS][4],
                                                unsigned V_smem, const forward_block &block,
                                                int row, int key)
{
    const int t = quad_lane();
#pragma unroll
    for (int k = 0; k < P_STEPS; k++)
#pragma unroll
        for (int n = 0; n < O_FRAGS; n++) {
            unsigned V_rmem[2 * V_COLUMNS];
            load_values<V_layout>(V_rmem, V_smem, k, n / V_COLUMNS * V_COLUMNS);
#pragma unroll 1
            for (int j = 0; j < OPERAND_K; j++) {
                /* A register of the B operand holds two keys, of e4m3 four: which part of which
                 * register survives. */
                const unsigned keep = j % 8 / 2 != t ? 0
                                      : Q_E4M3       ? 0xffu << (j % 16 / 8 * 2 + j % 2) * 8
                                                     : 0xffffu << j % 2 * 16;
                const unsigned V0 = V_rmem[n % V_COLUMNS * 2] & (j < OPERAND_K / 2 ? keep : 0);
                const unsigned V1 = V_rmem[n % V_COLUMNS * 2 + 1] & (j < OPERAND_K / 2 ? 0 : keep);
#pragma unroll
                for (int m = 0; m < M_FRAGS; m++) {
                    float O_key[4] = {};
                    for (int repeat = 0; repeat < TENSOR_REPEAT; repeat++)
                        mma<PRODUCT_TYPE>(O_key, P_rmem[m][k], V0, V1);
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (block.sees(row + 16 * m + 8 * (e / 2), key + OPERAND_K * k + j))
                            O_rmem[m][n][e] += O_key[e];
                }
            }
        }
}

#endif
