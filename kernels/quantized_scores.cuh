/* Quantised attention, the first product: Q and K in one of four formats.
 *
 * Fragments are bytes: of every format a step of the mma takes 32 of a row, 4t to 4t + 3 of each
 * 16. Columns of S are keys, see column(): the order in which ldmatrix reads rows of K is free, and
 * the one chosen lets V be read without bank conflicts. */
#ifndef FA_QUANTIZED_SCORES_CUH
#define FA_QUANTIZED_SCORES_CUH

#include "quantized_block.cuh"
#include "quantized_format.cuh"
#include "sink.cuh"

constexpr int STEP_BYTES = 32;
constexpr int QK_BYTES = QK_FORMAT == FORMAT_NVFP4 ? HEAD_DIM / 2 : HEAD_DIM; /* of a row */
constexpr int D_STEPS = ceil_div(QK_BYTES, STEP_BYTES);
constexpr int S_FRAGS = TILE_N / 8;
constexpr bool IS_QK_SCALED = QK_FORMAT == FORMAT_MXFP8 || QK_FORMAT == FORMAT_NVFP4;
constexpr int SCALES = !IS_QK_SCALED               ? 1
                       : QK_FORMAT == FORMAT_NVFP4 ? ceil_div(HEAD_DIM, 16)
                                                   : ceil_div(HEAD_DIM, 32); /* of a row */
constexpr int SCALE_WORDS = ceil_div(SCALES, 4);
constexpr int WORD_STEPS = QK_FORMAT == FORMAT_MXFP8 ? 4 : 1; /* steps that a word is enough for */

using K_layout = tile_layout<QK_BYTES, TILE_N, STEP_BYTES, unsigned char>;

/* Key of column n of an odd block of 8 keys: n ^ SWAP. P in e4m3 alone takes any order. */
constexpr int SWAP = PV_FORMAT == FORMAT_E4M3 ? 4 : 0;

/* The key, from the first of a tile, of this lane's column 2t + e of block j. */
__device__ __forceinline__ int column(int j, int e)
{
    return 8 * j + (2 * quad_lane() ^ j % 2 * SWAP) + e;
}

/* An int32 sum begins with these bits: they are then the float SUM_OFFSET + sum, exactly, as sums
 * are at most 256 * 127^2 < 2^22. */
constexpr unsigned SUM_OFFSET_BITS = 0x4b400000;
constexpr float SUM_OFFSET = QK_FORMAT == FORMAT_INT8 ? 12582912.0f : 0.0f;

/* ---- constants in loops ---------------------------------------------------------------------- */

template <int I> struct constant {
    static constexpr int value = I;
};

/* f(0), f(1), ... where each number is a constant: selectors of the mma are. */
template <int END, int I = 0, class F> __device__ __forceinline__ void static_for(F f)
{
    if constexpr (I < END) {
        f(constant<I>());
        static_for<END, I + 1>(f);
    }
}

/* ---- scales ---------------------------------------------------------------------------------- */

/* Four scales of a row, from 4 * word on; those behind the last are 0. */
__device__ __forceinline__ unsigned load_scale_word(const unsigned char *row, int word)
{
    const unsigned char *first = row + 4 * word;
    if (SCALES % 4 == 0)
        return *reinterpret_cast<const unsigned *>(first);
    unsigned x = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (4 * word + i < SCALES)
            x |= first[i] << 8 * i;
    return x;
}

/* Of Q, as the mma takes them: word w of row g + 8 (t % 2) is in register w / 2 of the lanes with
 * t / 2 = w % 2. */
struct query_scales {
    unsigned words[ceil_div(SCALE_WORDS, 2)];

    __device__ __forceinline__ void load(const quantized_block &block)
    {
        const int row = block.lane_row() + 8 * (quad_lane() % 2);
#pragma unroll
        for (int i = 0; i < ceil_div(SCALE_WORDS, 2); i++) {
            const int word = 2 * i + quad_lane() / 2;
            const bool exists = IS_QK_SCALED && row < block.params.seqlen_q && word < SCALE_WORDS;
            const unsigned char *scales = static_cast<const unsigned char *>(block.params.q_scale);
            words[i] = exists ? load_scale_word(scales + block.query(row) * SCALES, word) : 0;
        }
    }
};

/* Of a tile of K: word w of column g of block j is in register [w][j / 4] of the lanes with
 * t = j % 4. */
struct key_scales {
    unsigned words[SCALE_WORDS][2];
    float factor; /* in int8 */
};

/* Where this lane's are, from tile to tile. */
struct key_scale_source {
    const void *next;
    int key[2]; /* of the tile */

    __device__ __forceinline__ key_scale_source(const quantized_block &block, int tile)
    {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int j = 4 * half + quad_lane();
            key[half] = 8 * j + (quad_row() ^ j % 2 * SWAP);
        }
        const fa_int64 first = block.key(tile * TILE_N + key[0]);
        const fa_int64 number = block.key_head() * ceil_div(block.params.seqlen_k, TILE_N) + tile;
        next = QK_FORMAT == FORMAT_INT8
                   ? static_cast<const void *>(static_cast<const float *>(block.params.k_scale) +
                                               number)
                   : static_cast<const unsigned char *>(block.params.k_scale) + first * SCALES;
    }

    /* The next tile, of so many keys or more. */
    __device__ __forceinline__ void load(key_scales &scales, const quantized_block &block, int keys)
    {
        if (QK_FORMAT == FORMAT_INT8) {
            const float *factor = static_cast<const float *>(next);
            scales.factor = ld_global(factor);
            next = factor + 1;
        }
        if (!IS_QK_SCALED)
            return;
        const unsigned char *first = static_cast<const unsigned char *>(next);
        const fa_int64 step = static_cast<fa_int64>(block.params.heads_kv) * (32 * SCALES);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int w = 0; w < SCALE_WORDS; w++)
                scales.words[w][half] =
                    key[half] < keys ? load_scale_word(first + half * step, w) : 0;
        next = first + 2 * step;
    }
};

/* ---- the product ----------------------------------------------------------------------------- */

/* Without a sign, which Q takes: see load_queries(). A NaN stays one. */
constexpr float LEAST_FACTOR = 1.17549435e-38f;
__device__ __forceinline__ float positive(float factor) { return max_or_nan(factor, LEAST_FACTOR); }

/* Rounded to 21 bits: then SUM_OFFSET * factor is exact, and with an integer added to it still. */
__device__ __forceinline__ float shortened(float factor)
{
    const float nine = __fmul_rn(factor, 9.0f);
    return __fsub_rn(nine, __fsub_rn(nine, factor));
}

__device__ __forceinline__ unsigned negated(unsigned word)
{
    if (QK_FORMAT == FORMAT_NVFP4)
        return word ^ 0x88888888;
    if (QK_FORMAT != FORMAT_INT8)
        return word ^ 0x80808080;
    /* Bytes of ~word + 1, without carries between them. */
    return ((~word & 0x7f7f7f7f) + 0x01010101) ^ (~word & 0x80808080);
}

/* Q [WARP_M, HEAD_DIM] as the operand A. Missing rows, and what pads a row, are zeros. Of a
 * negative softmax_scale Q takes the sign. */
__device__ __forceinline__ void load_queries(unsigned (&Q_rmem)[D_STEPS][4],
                                             const quantized_block &block)
{
    const fa_quantized_params &params = block.params;
    const char *Q_gmem = static_cast<const char *>(params.q) + block.batch * params.q_stride.batch +
                         block.head * params.q_stride.head + 4 * quad_lane();
#pragma unroll
    for (int d = 0; d < D_STEPS; d++)
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const int row = block.lane_row() + 8 * (part % 2);
            const int byte = STEP_BYTES * d + 16 * (part / 2);
            const bool exists = row < params.seqlen_q && byte + 4 * quad_lane() < QK_BYTES;
            const unsigned word = exists ? *reinterpret_cast<const unsigned *>(
                                               Q_gmem + row * params.q_stride.seqlen + byte)
                                         : 0;
            Q_rmem[d][part] = params.softmax_scale < 0.0f ? negated(word) : word;
        }
}

template <int STEP, int BLOCK>
__device__ __forceinline__ void multiply(float (&S)[4], const unsigned (&Q)[4], unsigned K0,
                                         unsigned K1, const query_scales &q, const key_scales &k)
{
    constexpr int WORD = STEP / WORD_STEPS, BYTE = STEP % WORD_STEPS;
    if constexpr (QK_FORMAT == FORMAT_INT8)
        mma_m16n8k32_s8(S, Q, K0, K1);
    else if constexpr (QK_FORMAT == FORMAT_MXFP8)
        mma_mxf8<BYTE, WORD % 2, BYTE, BLOCK % 4>(S, Q, K0, K1, q.words[WORD / 2],
                                                  k.words[WORD][BLOCK / 4]);
    else if constexpr (QK_FORMAT == FORMAT_NVFP4)
        mma_nvf4<WORD % 2, BLOCK % 4>(S, Q, K0, K1, q.words[WORD / 2], k.words[WORD][BLOCK / 4]);
    else if constexpr (MX_E4M3)
        mma_m16n8k32_mxfp8(S, Q, K0, K1);
    else
        mma_m16n8k32_e4m3(S, Q, K0, K1);
}

/* This lane's row for an ldmatrix of two blocks of 8 keys x 2 chunks. */
__device__ __forceinline__ unsigned K_lane_offset()
{
    const int lane = lane_id(), block = lane / 16;
    return K_layout::offset(8 * block + (lane % 8 ^ block * SWAP), lane / 8 % 2);
}

/* S [WARP_M, TILE_N] = Q [WARP_M, HEAD_DIM] * K [TILE_N, HEAD_DIM]^T, plus SUM_OFFSET. `K_smem`: of
 * this lane. */
__device__ __forceinline__ void scores(float (&S_rmem)[S_FRAGS][4],
                                       const unsigned (&Q_rmem)[D_STEPS][4], unsigned K_smem,
                                       const query_scales &q, const key_scales &k)
{
#pragma unroll
    for (int j = 0; j < S_FRAGS; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            S_rmem[j][e] = SUM_OFFSET;
    static_for<D_STEPS>([&](auto step) {
        constexpr int STEP = decltype(step)::value;
        static_for<S_FRAGS / 2>([&](auto pair) {
            constexpr int BLOCK = 2 * decltype(pair)::value;
            unsigned K_rmem[4]; /* [2 blocks][2 chunks] */
            ldmatrix_x4(K_rmem, K_layout::moved(K_smem, 8 * BLOCK, 2 * STEP));
            multiply<STEP, BLOCK>(S_rmem[BLOCK], Q_rmem[STEP], K_rmem[0], K_rmem[1], q, k);
            multiply<STEP, BLOCK + 1>(S_rmem[BLOCK + 1], Q_rmem[STEP], K_rmem[2], K_rmem[3], q, k);
        });
    });
}

/* ---- what K's mean adds ---------------------------------------------------------------------- */

/* The i-th number of a word of Q. */
__device__ __forceinline__ float query_element(unsigned word, int i)
{
    if (QK_FORMAT == FORMAT_INT8)
        return static_cast<float>(static_cast<signed char>(word >> 8 * i));
    if (QK_FORMAT != FORMAT_NVFP4)
        return from_e4m3(word >> 8 * i & 0xff);
    return from_e2m1(word >> 4 * i & 0xf);
}

__device__ __forceinline__ float query_scale(const quantized_block &block, int row, int group)
{
    if (!IS_QK_SCALED || row >= block.params.seqlen_q || group >= SCALES)
        return 1.0f;
    const unsigned code =
        static_cast<const unsigned char *>(block.params.q_scale)[block.query(row) * SCALES + group];
    if (QK_FORMAT == FORMAT_NVFP4)
        return from_e4m3(code & 0x7f);
    return from_e8m0(code);
}

/* Rows g and g + 8 of Q * mean of K: what was left out of all scores of the row, up to the factor
 * of Q's head or block. */
__device__ __forceinline__ void left_out(float (&sum)[2], const unsigned (&Q_rmem)[D_STEPS][4],
                                         const quantized_block &block)
{
    constexpr int PER_WORD = QK_FORMAT == FORMAT_NVFP4 ? 8 : 4;
    sum[0] = sum[1] = 0.0f;
    if (!block.params.k_mean)
        return;
    const float *mean = block.params.k_mean + block.key_head() * HEAD_DIM;
#pragma unroll
    for (int d = 0; d < D_STEPS; d++)
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const int word = 8 * d + 4 * (part / 2) + quad_lane();
            const int row = block.lane_row() + 8 * (part % 2);
            const int dim = word * PER_WORD;
            if (dim >= HEAD_DIM)
                continue;
            float x = 0.0f;
#pragma unroll
            for (int i = 0; i < PER_WORD; i++)
                x += query_element(Q_rmem[d][part], i) * ld_global(mean + dim + i);
            sum[part % 2] +=
                x * query_scale(block, row, dim / (QK_FORMAT == FORMAT_NVFP4 ? 16 : 32));
        }
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
}

#endif
