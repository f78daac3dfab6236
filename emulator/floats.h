/* Floats by their bits, and the smaller kinds of them. */
#ifndef FLOATS_H
#define FLOATS_H

#include <stdint.h>
#include <string.h>

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* What is always inlined becomes a few vector instructions per constant format. */
#define INLINE static inline __attribute__((always_inline, unused))

/* Arithmetic makes one NaN, and never looks at a payload. */
INLINE float canonical(float value) { return value == value ? value : float_of(0x7fffffff); }

/* Subnormals become zeros of their sign. */
INLINE float flush(float value)
{
    const uint32_t bits = bits_of(value);
    return float_of(bits & 0x7f800000 ? bits : bits & 0x80000000);
}

/* A sign, `exponent` bits, `mantissa` bits. */
struct format {
    int exponent, mantissa;
    uint32_t largest; /* what numbers too large become: infinity, or with .satfinite a number */
    uint32_t special; /* infinity if there is one, and NaN, start here */
};

static const struct format F16_FORMAT = {5, 10, 0x7c00, 0x7c00},
                           BF16_FORMAT = {8, 7, 0x7f80, 0x7f80}, E4M3_FORMAT = {4, 3, 0x7e, 0x7f},
                           E5M2_FORMAT = {5, 2, 0x7b, 0x7c}, E2M1_FORMAT = {2, 1, 0x7, 0x8};

/* What is added to the exponent to make it that of a float. */
INLINE uint32_t rebias(struct format f) { return 127 + 1 - (1u << (f.exponent - 1)); }

/* To nearest even. Subnormals of the format are rounded by adding a number so large that its last
 * bit is theirs. */
INLINE uint32_t narrow(struct format f, float value)
{
    const int cut = 23 - f.mantissa, width = f.exponent + f.mantissa;
    const uint32_t magnitude = bits_of(value) & 0x7fffffff, sign = bits_of(value) >> 31 << width;
    const uint32_t least_normal = (rebias(f) + 1) << 23, rounder = least_normal + (cut << 23);
    const uint32_t half = (1u << (cut - 1)) - 1 + (magnitude >> cut & 1);
    const uint32_t normal = (magnitude - (rebias(f) << 23) + half) >> cut;
    const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(rounder)) - rounder;
    const uint32_t rounded = magnitude < least_normal ? subnormal : normal;
    const uint32_t number = sign | (rounded < f.largest ? rounded : f.largest);
    return magnitude > 0x7f800000 ? (1u << width) - 1 : number;
}

/* The number in the low bits. Of a subnormal one the hidden bit that it lacks is taken away. */
INLINE float widen(struct format f, uint32_t bits)
{
    const int width = f.exponent + f.mantissa;
    const uint32_t magnitude = bits & ((1u << width) - 1), sign = bits >> width << 31;
    const uint32_t aligned = magnitude << (23 - f.mantissa), least_normal = (rebias(f) + 1) << 23;
    const float subnormal = float_of(aligned + least_normal) - float_of(least_normal);
    const uint32_t normal = aligned + (rebias(f) << 23);
    const uint32_t number = magnitude >> f.mantissa ? normal : bits_of(subnormal);
    return float_of(sign | (magnitude >= f.special ? aligned | 0x7f800000 : number));
}

#endif
