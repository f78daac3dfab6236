/* Quantisers: 16 numbers to codes, rounding by rounding what flash_attn_sm120/quantized/quantize.py
 * does on the CPU. */
#ifndef FA_QUANTIZE_FORMATS_CUH
#define FA_QUANTIZE_FORMATS_CUH

#include "quantize.cuh"

/* The codes of 16 numbers, and the scale of the group that these are in. */
template <int FORMAT> struct coded_vector {
    enum : int {
        CODE_BITS = FORMAT == FORMAT_NVFP4 ? 4 : 8,
        GROUP = FORMAT == FORMAT_NVFP4   ? 16
                : FORMAT == FORMAT_MXFP8 ? 32
                                         : 0, /* 0: no scale */
        WORDS = VECTOR * CODE_BITS / 32
    };
    unsigned words[WORDS];
    unsigned scale;
};

__device__ __forceinline__ void to_int8(unsigned (&words)[4], const float (&x)[VECTOR])
{
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        const float rounded = fminf(fmaxf(rintf(x[i]), -127), 127);
        const unsigned code = x[i] == x[i] ? static_cast<int>(rounded) & 0xff : 0;
        words[i / 4] = (i % 4 ? words[i / 4] : 0) | code << i % 4 * 8;
    }
}

__device__ __forceinline__ void to_e4m3(unsigned (&words)[4], const float (&x)[VECTOR])
{
#pragma unroll
    for (int i = 0; i < VECTOR; i += 4)
        words[i / 4] = pack_e4m3({x[i], x[i + 1], x[i + 2], x[i + 3]});
}

/* Before 12.x, which have an instruction. */
__device__ __forceinline__ unsigned to_e2m1(float x)
{
    const float size = fabsf(x);
    const unsigned code = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) +
                          (size > 2.5f) + (size >= 3.5f) + (size > 5.0f);
    return x == x ? __float_as_uint(x) >> 31 << 3 | code : 7;
}

__device__ __forceinline__ void to_e2m1(unsigned (&words)[2], const float (&x)[VECTOR])
{
#pragma unroll
    for (int i = 0; i < VECTOR; i += 8) {
        words[i / 8] = 0;
        if (__CUDA_ARCH__ >= 1200)
            words[i / 8] = pack_e2m1(
                {x[i], x[i + 1], x[i + 2], x[i + 3], x[i + 4], x[i + 5], x[i + 6], x[i + 7]});
        else
            for (int j = 0; j < 8; j++)
                words[i / 8] |= to_e2m1(x[i + j]) << 4 * j;
    }
}

/* The smallest power of two that is not less than x, which is not negative. */
__device__ __forceinline__ unsigned to_e8m0(float x)
{
    const unsigned bits = __float_as_uint(x), exponent = bits >> 23, fraction = bits & 0x7fffff;
    const unsigned code = exponent + (fraction > (exponent ? 0 : 1 << 22));
    return x == x ? min(code, 254) : 255;
}

/* Codes are products with the reciprocal of their scale, as a division takes many times as long.
 * That of a tiny scale is finite, as both are lifted by a power of two before. */
struct scale_divisor {
    float lift, reciprocal;

    __device__ __forceinline__ scale_divisor(float scale)
        : lift(scale < 0x1p-64f ? 0x1p64f : 1.0f), reciprocal(1.0f / (scale * lift))
    {
    }
    __device__ __forceinline__ float divide(float x) const
    {
        return __fmul_rn(__fmul_rn(x, lift), reciprocal);
    }
};

__device__ __forceinline__ float largest_of(const float (&x)[VECTOR])
{
    float largest = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
        largest = max_or_nan(largest, fabsf(x[i]));
    return largest;
}

/* A group of 16 whose scale is `scale`, rounded; and the sum of the squares of the errors, added
 * in a tree. */
__device__ __forceinline__ float to_nvfp4(coded_vector<FORMAT_NVFP4> &coded,
                                          const float (&x)[VECTOR], float scale)
{
    coded.scale = pack_e4m3({scale, 0, 0, 0}) & 0xff;
    const float factor = from_e4m3(coded.scale);
    const float to_codes = factor == 0 ? 0 : 1.0f / factor;
    float y[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
        y[i] = __fmul_rn(x[i], to_codes);
    to_e2m1(coded.words, y);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        const float code = from_e2m1(coded.words[i / 8] >> i % 8 * 4 & 0xf);
        const float error = __fsub_rn(__fmul_rn(code, factor), x[i]);
        y[i] = __fmul_rn(error, error);
    }
#pragma unroll
    for (int step = 1; step < VECTOR; step *= 2)
#pragma unroll
        for (int i = 0; i < VECTOR; i += 2 * step)
            y[i] = __fadd_rn(y[i], y[i + step]);
    return y[0];
}

/* `scale` is that of the head, or of the block in int8. All lanes of the warp come here. */
template <int FORMAT>
__device__ __forceinline__ coded_vector<FORMAT> encode(float (&x)[VECTOR], float scale)
{
    coded_vector<FORMAT> coded = {};
    if constexpr (FORMAT == FORMAT_MXFP8) {
        float largest = largest_of(x);
        largest = max_or_nan(largest, __shfl_xor_sync(0xffffffff, largest, 1));
        coded.scale = to_e8m0(largest / 448);
        scale = from_e8m0(coded.scale);
    }
    const scale_divisor divisor(scale);
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
        x[i] = divisor.divide(x[i]);
    if constexpr (FORMAT == FORMAT_INT8)
        to_int8(coded.words, x);
    else if constexpr (FORMAT == FORMAT_NVFP4) {
        const float largest = largest_of(x);
        float least_error = 0;
#pragma unroll 1
        for (int code = 6; code >= 4; code -= 2) { /* that the largest becomes */
            coded_vector<FORMAT> other;
            const float error = to_nvfp4(other, x, largest / static_cast<float>(code));
            if (code == 6 || error < least_error) {
                coded = other;
                least_error = error;
            }
        }
    } else
        to_e4m3(coded.words, x);
    return coded;
}

#endif
