/* K and V on their way from shared memory to the mma.
 *
 *   KV_E4M3   1: K and V are e4m3, in global and in shared memory. Unless Q_E4M3 they become fp16
 *             in registers, which holds every e4m3 number, and so do P, and Q: see queries.cuh
 *   Q_E4M3    1: Q is e4m3, too, and so are the operands of both products
 *   MX_E4M3   1: these are multiplied by the block-scaled mma */
#ifndef FA_KV_OPERANDS_CUH
#define FA_KV_OPERANDS_CUH

#include "layout.cuh"
#include "product.cuh"

constexpr int KV_DTYPE = KV_E4M3 ? FA_FLOAT8_E4M3 : DTYPE;
constexpr bool WIDENS = KV_E4M3 && !Q_E4M3;
constexpr int OPERAND = Q_E4M3    ? FA_FLOAT8_E4M3
                        : KV_E4M3 ? FA_FLOAT16
                                  : DTYPE; /* of both products */
constexpr int PRODUCT_TYPE = MX_E4M3 ? UNIT_SCALED_E4M3 : OPERAND;
constexpr int OPERAND_K = fa_mma_k(OPERAND); /* dims, or keys, of a step of the mma */
constexpr bool IS_BF16_OPERAND = OPERAND == FA_BFLOAT16;

template <int BYTES> struct bits_of;
template <> struct bits_of<1> {
    using type = unsigned char;
};
template <> struct bits_of<2> {
    using type = unsigned short;
};
using kv_element = bits_of<fa_element_bytes(KV_DTYPE)>::type;
using q_element = bits_of<Q_E4M3 ? 1 : ELEMENT_BYTES>::type;

/* What the four matrices of an ldmatrix are enough for: a chunk has 8 elements of 16 bits, and 16
 * of e4m3. */
constexpr int K_STEPS = WIDENS ? 2 : 1;   /* steps of OPERAND_K dims, of 16 keys */
constexpr int V_COLUMNS = WIDENS ? 4 : 2; /* columns of 8 dims, of OPERAND_K keys */

/* B operands of Q K^T, [steps][2 columns of 8 keys][2 halves of the dims]: of the keys from 8 n on,
 * and the dims from OPERAND_K * d on. `smem`: of this lane, see K_lane_offset().
 *
 * Where WIDENS a lane gets four adjacent dims of e4m3, 4t to 4t + 3 of 16, where the operand has
 * 2t, 2t + 1, and 8 further on: the order of dims in a product is free, and load_queries() has the
 * same. */
template <class layout>
__device__ __forceinline__ void load_keys(unsigned (&K_rmem)[4 * K_STEPS], unsigned smem, int n,
                                          int d)
{
    unsigned x[4]; /* [2 key columns][2 chunks] */
    ldmatrix_x4(x, layout::moved(smem, 8 * n, WIDENS ? d : 2 * d));
#pragma unroll
    for (int column = 0; column < 2; column++)
#pragma unroll
        for (int chunk = 0; chunk < 2; chunk++)
            if (WIDENS) {
                unsigned halves[2];
                widen_e4m3(halves, x[2 * column + chunk]);
                K_rmem[2 * (chunk % K_STEPS * 2 + column)] = halves[0];
                K_rmem[2 * (chunk % K_STEPS * 2 + column) + 1] = halves[1];
            } else
                K_rmem[2 * column + chunk] = x[2 * column + chunk];
}

/* B operands of P V, [columns of 8 dims][2 halves of the keys]: of the keys from OPERAND_K * k on,
 * and the columns from n on. `smem`: of this lane, see V_lane_offset().
 *
 * ldmatrix transposes pairs of bytes: a lane gets the dims 2g, 2g + 1 of two keys. The even dims of
 * a chunk become one column, the odd ones the next, see adjacent_dims(). Two such pairs of keys are
 * the four k of a register of e4m3: 2t, 2t + 1, 2t + 8, 2t + 9 of 16, as narrow_weights() has
 * them. */
template <class layout>
__device__ __forceinline__ void load_values(unsigned (&V_rmem)[2 * V_COLUMNS], unsigned smem, int k,
                                            int n)
{
    unsigned x[4]; /* [2 chunks][2 halves of the 16 keys]; where Q_E4M3 [4 times 8 keys] */
    if (Q_E4M3) {
        ldmatrix_x4_trans(x, layout::moved(smem, OPERAND_K * k, n / 2));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            V_rmem[half] = __byte_perm(x[2 * half], x[2 * half + 1], 0x6420);
            V_rmem[2 + half] = __byte_perm(x[2 * half], x[2 * half + 1], 0x7531);
        }
        return;
    }
    ldmatrix_x4_trans(x, layout::moved(smem, 16 * k, KV_E4M3 ? n / 2 : n));
#pragma unroll
    for (int chunk = 0; chunk < 2; chunk++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (KV_E4M3) {
                unsigned columns[2];
                widen_e4m3(columns, __byte_perm(x[2 * chunk + half], 0, 0x3120));
                V_rmem[4 * chunk % (2 * V_COLUMNS) + half] = columns[0];
                V_rmem[(4 * chunk + 2) % (2 * V_COLUMNS) + half] = columns[1];
            } else
                V_rmem[2 * chunk + half] = x[2 * chunk + half];
}

/* Four weights of a row as e4m3, of two blocks of 8 keys: c0, c1 of one C fragment and of the next.
 */
__device__ __forceinline__ unsigned narrow_weights(float c0, float c1, float next0, float next1)
{
    const float x[4] = {c0, c1, next0, next1};
    return pack_e4m3(x);
}

/* Of a row of O that V in e4m3 made, from dim 16 * chunk + 4t on. */
template <int FRAGS>
__device__ __forceinline__ float4 adjacent_dims(const float (&O)[FRAGS][4], int half, int chunk,
                                                float scale)
{
    const float *even = O[2 * chunk] + 2 * half, *odd = O[(2 * chunk + 1) % FRAGS] + 2 * half;
    return make_float4(even[0] * scale, odd[0] * scale, even[1] * scale, odd[1] * scale);
}

/* Writes such a row. The lanes of a quad write 32 contiguous bytes. */
template <int FRAGS>
__device__ __forceinline__ void store_adjacent_dims(element *row, const float (&O)[FRAGS][4],
                                                    int half, float scale, bool exists)
{
#pragma unroll
    for (int chunk = 0; chunk < FRAGS / 2; chunk++) {
        const float4 x = adjacent_dims(O, half, chunk, scale);
        if (exists)
            reinterpret_cast<uint2 *>(row + 16 * chunk)[quad_lane()] =
                make_uint2(pack(x.x, x.y), pack(x.z, x.w));
    }
}

/* Of 16 bytes of V: sets bits of NONFINITE_CARRY where they hold an inf or NaN. A full exponent, to
 * which one is added, carries into the (cleared) sign bit of its element; in e4m3 a NaN has the
 * mantissa full, too. */
constexpr unsigned NONFINITE_CARRY = KV_E4M3 ? 0x80808080 : 0x80008000;
__device__ __forceinline__ unsigned nonfinite_carries(uint4 x)
{
    constexpr unsigned FULL = KV_E4M3 ? 0x7f7f7f7f : IS_BF16_OPERAND ? 0x7f807f80 : 0x7c007c00;
    constexpr unsigned ONE = KV_E4M3 ? 0x01010101 : IS_BF16_OPERAND ? 0x00800080 : 0x04000400;
    return ((x.x & FULL) + ONE) | ((x.y & FULL) + ONE) | ((x.z & FULL) + ONE) |
           ((x.w & FULL) + ONE);
}

#endif
