/* Quantised attention, the second product: O^T [HEAD_DIM_V, queries] += V^T P^T, P and V in one of
 * three formats.
 *
 * With V as the operand A four words of an ldmatrix are one operand, as they come, and the scores
 * of a lane are its P: nothing moves between registers, and nothing crosses lanes but the scales of
 * P in e2m1. Fragments of O^T have dims as rows and queries as columns: for n, 16 dims, and half h,
 * queries g + 8 h of the rows of S:
 *
 *     O[n][h][2 i + e]   dim dim_of(n, i), query 2t + e + 8 h */
#ifndef FA_QUANTIZED_VALUES_CUH
#define FA_QUANTIZED_VALUES_CUH

#include "quantized_scores.cuh"

enum : bool { IS_V_NVFP4 = PV_FORMAT == FORMAT_NVFP4, IS_V_E4M3 = PV_FORMAT == FORMAT_E4M3 };

constexpr int O_FRAGS = HEAD_DIM_V / 16;
constexpr int STEP_KEYS = IS_V_NVFP4 ? 64 : IS_V_E4M3 ? 32 : 16;
constexpr int P_STEPS = TILE_N / STEP_KEYS;

/* P is 2^P_SHIFT times as large as its codes have it, and in e2m1 then P_REST times: 2688 in
 * all. */
constexpr int P_SHIFT = IS_V_NVFP4 ? 11 : IS_V_E4M3 ? 8 : 0;
constexpr float P_REST = IS_V_NVFP4 ? 1.3125f : 1.0f;

/* A tile of V: [keys][dims]; in e2m1 [dims][keys], whose rows are padded to what threads copy. */
constexpr int V_ROWS = IS_V_NVFP4 ? fa_padded_dim(HEAD_DIM_V, 64) : TILE_N;
constexpr int V_BYTES = IS_V_NVFP4 ? TILE_N / 2 : IS_V_E4M3 ? HEAD_DIM_V : 2 * HEAD_DIM_V;
using V_layout = tile_layout<V_BYTES, V_ROWS, STEP_BYTES, unsigned char>;

/* ---- V --------------------------------------------------------------------------------------- */

/* Scales of V in e2m1: of row g + 8 (t % 2) of the 16 dims n, in register n / 2 of the lanes with
 * t / 2 = n % 2: a word has the four groups of a tile. */
struct value_scales {
    unsigned words[ceil_div(O_FRAGS, 2)];
};

/* Where this lane's are, from tile to tile. */
struct value_scale_source {
    const unsigned short *row; /* pairs of groups, of 32 tokens */
    int pairs;                 /* of a row */
    int first_dim;

    __device__ __forceinline__ value_scale_source(const quantized_block &block, int tile)
    {
        if (!IS_V_NVFP4)
            return;
        first_dim = 16 * (quad_lane() / 2) + quad_row() + 8 * (quad_lane() % 2);
        pairs = ceil_div(block.params.seqlen_k, 32);
        row = static_cast<const unsigned short *>(block.params.v_scale) +
              (block.key_head() * HEAD_DIM_V + first_dim) * pairs + 2 * tile;
    }

    /* The next tile, of so many tokens or more. Groups without a token may hold anything: tokens 0
     * to 3 of 8 are in the first of two. */
    __device__ __forceinline__ void load(value_scales &scales, int tokens)
    {
        if (!IS_V_NVFP4)
            return;
        /* Words are aligned in all rows, or in some: one branch for all. */
        if (pairs % 2 == 0)
            load_words(scales, [](const unsigned short *from) {
                return *reinterpret_cast<const unsigned *>(from);
            });
        else
            load_words(scales, [&](const unsigned short *from) {
                return tokens > 32 ? from[0] | static_cast<unsigned>(from[1]) << 16 : from[0];
            });
        row += 2;
        if (tokens >= TILE_N)
            return;
        unsigned known = 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
            known |= (32 * (i / 2) + 4 * (i % 2) < tokens ? 0xff : 0) << 8 * i;
#pragma unroll
        for (int i = 0; i < ceil_div(O_FRAGS, 2); i++)
            scales.words[i] &= known;
    }

    template <class F>
    __device__ __forceinline__ void load_words(value_scales &scales, F load) const
    {
#pragma unroll
        for (int i = 0; i < ceil_div(O_FRAGS, 2); i++) {
            const bool exists = HEAD_DIM_V % 32 == 0 || first_dim + 32 * i < HEAD_DIM_V;
            scales.words[i] = exists ? load(row + 32 * i * static_cast<fa_int64>(pairs)) : 0;
        }
    }
};

/* This lane's row for the ldmatrix of 16 dims x STEP_KEYS keys. */
__device__ __forceinline__ unsigned V_lane_offset()
{
    const int lane = lane_id();
    if (IS_V_NVFP4)
        return V_layout::offset(lane % 16, lane / 16);
    if (!IS_V_E4M3)
        return V_layout::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    if (!TRANSPOSES_BYTES)
        return V_layout::offset(lane / 8 * 8 + (lane % 8 ^ lane / 8 % 2 * SWAP), 0);
    const int q = lane / 4 % 4, r = lane % 4; /* k = 4q + r of 16 are the keys of P's bytes */
    return V_layout::offset(lane / 16 * 16 + (r < 2 ? 2 * q + r : 8 + (2 * q + r - 2 ^ SWAP)), 0);
}

/* The operand V^T of 16 dims: rows g are dim_of(n, 0), rows g + 8 dim_of(n, 1). */
__device__ __forceinline__ void load_values(unsigned (&V_rmem)[4], unsigned V_smem, int step, int n)
{
    if (IS_V_NVFP4)
        ldmatrix_x4(V_rmem, V_layout::moved(V_smem, 16 * n, 0));
    else if (!IS_V_E4M3)
        ldmatrix_x4_trans(V_rmem, V_layout::moved(V_smem, STEP_KEYS * step, 2 * n));
    else if (TRANSPOSES_BYTES)
        ldmatrix_x2_trans_bytes(V_rmem, V_layout::moved(V_smem, STEP_KEYS * step, n));
    else { /* pairs of bytes are transposed: even dims of two times 8 keys, then odd ones */
        unsigned x[4];
        ldmatrix_x4_trans(x, V_layout::moved(V_smem, STEP_KEYS * step, n));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            V_rmem[2 * half] = __byte_perm(x[2 * half], x[2 * half + 1], 0x6420);
            V_rmem[2 * half + 1] = __byte_perm(x[2 * half], x[2 * half + 1], 0x7531);
        }
    }
}
__device__ __forceinline__ int dim_of(int n, int i)
{
    constexpr bool ALTERNATES = IS_V_E4M3 && !TRANSPOSES_BYTES;
    return 16 * n + (ALTERNATES ? 2 * quad_row() + i : quad_row() + 8 * i);
}

/* ---- P --------------------------------------------------------------------------------------- */

/* As the operand B: of queries g, then g + 8. */
struct weights {
    unsigned words[P_STEPS][2][2]; /* [step][half][halves of the keys of a step] */
    unsigned scales[2];            /* in e2m1: of the groups of 16 stored keys */
};

/* In e4m3 and 16 bits; that in e2m1 is part of the exponentials. */
__device__ __forceinline__ void round_weights(weights &P, const float (&P_rmem)[S_FRAGS][4])
{
#pragma unroll
    for (int step = 0; step < P_STEPS; step++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int word = 0; word < 2; word++) {
                const int i = 2 * half;
                if (IS_V_E4M3) {
                    const float *low = P_rmem[4 * step + 2 * word];
                    const float *high = P_rmem[4 * step + 2 * word + 1];
                    const float x[4] = {low[i], low[i + 1], high[i], high[i + 1]};
                    P.words[step][half][word] = pack_e4m3(x);
                } else {
                    const float *x = P_rmem[(2 * step + word) % S_FRAGS];
                    P.words[step][half][word] = pack(x[i], x[i + 1]);
                }
            }
}

/* ---- the product ----------------------------------------------------------------------------- */

template <int N>
__device__ __forceinline__ void multiply_values(float (&O)[4], const unsigned (&V)[4],
                                                const weights &P, int step, int half,
                                                const value_scales &scales)
{
    const unsigned (&B)[2] = P.words[step][half];
    if constexpr (IS_V_NVFP4)
        mma_nvf4<N % 2, 0>(O, V, B[0], B[1], scales.words[N / 2], P.scales[half]);
    else if constexpr (!IS_V_E4M3)
        mma_m16n8k16(O, V, B[0], B[1]);
    else if constexpr (MX_E4M3)
        mma_m16n8k32_mxfp8(O, V, B[0], B[1]);
    else
        mma_m16n8k32_e4m3(O, V, B[0], B[1]);
}

/* `V_smem`: of this lane. */
__device__ __forceinline__ void add_values(float (&O_rmem)[O_FRAGS][2][4], const weights &P,
                                           unsigned V_smem, const value_scales &scales)
{
#pragma unroll
    for (int step = 0; step < P_STEPS; step++)
        static_for<O_FRAGS>([&](auto frag) {
            constexpr int N = decltype(frag)::value;
            unsigned V_rmem[4];
            load_values(V_rmem, V_smem, step, N);
#pragma unroll
            for (int half = 0; half < 2; half++)
                multiply_values<N>(O_rmem[N][half], V_rmem, P, step, half, scales);
        });
}

#endif
