#include "rows.h"

#include <string.h>

/* ---- Number formats -------------------------------------------------------------------------- */

static float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float from_bfloat16(uint16_t half) { return from_bits((uint32_t)half << 16); }

/* A bfloat16 is the upper half of a float: round the lower half to nearest, ties to even. */
static uint16_t to_bfloat16(float value)
{
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return (uint16_t)(bits >> 16 | 0x40); /* a NaN stays one though its payload is cut */
    }
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* float16 has 5 exponent bits with bias 15 and 10 mantissa bits; float has 8, 127 and 23. */
static const uint32_t REBIAS = (127 - 15) << 23;

static float from_float16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t magnitude = half & 0x7fff;
    if (magnitude < 0x0400) { /* zero and subnormals count in units of 2^-24 */
        return from_bits(sign | to_bits((float)magnitude * 0x1p-24f));
    }
    uint32_t special = magnitude >= 0x7c00 ? REBIAS : 0; /* inf, NaN: on to the largest exponent */
    return from_bits(sign | ((magnitude << 13) + REBIAS + special));
}

static uint16_t to_float16(float value)
{
    uint32_t bits = to_bits(value);
    uint32_t sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00 | (magnitude >> 13 & 0x3ff); /* NaN */
    } else if (magnitude >= to_bits(65520.0f)) {
        half = 0x7c00; /* halfway from the largest float16 to the next power of two, and up: inf */
    } else if (magnitude < to_bits(0x1p-14f)) {
        /* Subnormal: floats in [0.5, 1] are 2^-24 apart, so the addition does the rounding. */
        half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    } else {
        half = (magnitude - REBIAS + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    return (uint16_t)(sign | half);
}

/* e4m3 has 4 exponent bits with bias 7 and 3 mantissa bits, no inf, and NaN in place of 480. */
static float from_e4m3(uint8_t byte)
{
    const uint32_t sign = (uint32_t)(byte & 0x80) << 24, magnitude = byte & 0x7f;
    if (magnitude == 0x7f)
        return from_bits(sign | 0x7fc00000);
    if (magnitude < 8) /* zero and subnormals count in units of 2^-9 */
        return from_bits(sign | to_bits((float)magnitude * 0x1p-9f));
    return from_bits(sign | ((magnitude << 20) + ((uint32_t)(127 - 7) << 23)));
}

/* Saturating: what is beyond 448, inf included, becomes that. */
static uint8_t to_e4m3(float value)
{
    const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffff, sign = bits >> 24 & 0x80;
    if (magnitude > 0x7f800000)
        return (uint8_t)(sign | 0x7f);
    if (magnitude >= to_bits(448.0f))
        return (uint8_t)(sign | 0x7e);
    if (magnitude < to_bits(0x1p-6f)) /* floats in [2^14, 2^15) are 2^-9 apart */
        return (uint8_t)(sign | (to_bits(from_bits(magnitude) + 0x1p14f) - to_bits(0x1p14f)));
    const uint32_t rebiased = magnitude - ((uint32_t)(127 - 7) << 23);
    return (uint8_t)(sign | (rebiased + 0x7ffff + (magnitude >> 20 & 1)) >> 20);
}

float fa_round_to_e4m3(float value) { return from_e4m3(to_e4m3(value)); }

/* ---- Rows of tensors ------------------------------------------------------------------------- */

int fa_width(int n) { return (n + FA_LANES - 1) / FA_LANES * FA_LANES; }

int64_t fa_row_offset(const struct fa_tensor *tensor, struct side side, int64_t row, int64_t head)
{
    const struct fa_strides stride = fa_tensor_strides(tensor);
    row += side.begin;
    if (side.pages) {
        /* Checked before, but other threads may write to the table meanwhile. */
        side.batch = clamp(side.pages[row / side.page_size], 0, tensor->shape[0] - 1);
        row %= side.page_size;
    }
    return side.batch * stride.batch + row * stride.seqlen + head * stride.head;
}

int64_t fa_lse_offset(const struct fa_tensor *tensor, struct side side, int64_t row, int64_t head)
{
    const int64_t *inner = &tensor->stride[tensor->ndim - 2];
    const int64_t batch = tensor->ndim == 3 ? side.batch * inner[-1] : 0;
    return batch + head * inner[0] + (side.begin + row) * inner[1];
}

void fa_load_row(const struct fa_tensor *tensor, int64_t offset, int n, int width, float *row)
{
    if (tensor->dtype == FA_FLOAT32) {
        memcpy(row, (const float *)tensor->data + offset, (size_t)n * sizeof *row);
    } else if (tensor->dtype == FA_FLOAT8_E4M3) {
        for (int d = 0; d < n; d++)
            row[d] = from_e4m3(((const uint8_t *)tensor->data)[offset + d]);
    } else {
        const uint16_t *source = (const uint16_t *)tensor->data + offset;
        if (tensor->dtype == FA_BFLOAT16) {
            for (int d = 0; d < n; d++)
                row[d] = from_bfloat16(source[d]);
        } else {
            for (int d = 0; d < n; d++)
                row[d] = from_float16(source[d]);
        }
    }
    for (int d = n; d < width; d++)
        row[d] = 0;
}

void fa_store_row(const struct fa_tensor *tensor, int64_t offset, int n, const float *row)
{
    if (tensor->dtype == FA_FLOAT32) {
        memcpy((float *)tensor->data + offset, row, (size_t)n * sizeof *row);
        return;
    }
    if (tensor->dtype == FA_FLOAT8_E4M3) {
        for (int d = 0; d < n; d++)
            ((uint8_t *)tensor->data)[offset + d] = to_e4m3(row[d]);
        return;
    }
    uint16_t *target = (uint16_t *)tensor->data + offset;
    for (int d = 0; d < n; d++) {
        target[d] = tensor->dtype == FA_BFLOAT16 ? to_bfloat16(row[d]) : to_float16(row[d]);
    }
}

void fa_load_rows(const struct fa_tensor *tensor, struct side side, struct range rows, int64_t head,
                  float *matrix)
{
    const int n = (int)tensor->shape[tensor->ndim - 1], width = fa_width(n);
    for (int64_t row = rows.begin; row < rows.end; row++, matrix += width)
        fa_load_row(tensor, fa_row_offset(tensor, side, row, head), n, width, matrix);
}

void fa_store_rows(const struct fa_tensor *tensor, struct side side, struct range rows,
                   int64_t head, const float *matrix)
{
    const int n = (int)tensor->shape[tensor->ndim - 1], width = fa_width(n);
    for (int64_t row = rows.begin; row < rows.end; row++, matrix += width)
        fa_store_row(tensor, fa_row_offset(tensor, side, row, head), n, matrix);
}

float fa_descale(const struct fa_tensor *descale, int64_t number, int64_t head_kv)
{
    const struct fa_descale factors = fa_tensor_descale(descale);
    return factors.scale
               ? factors.scale[number * factors.batch_stride + head_kv * factors.head_stride]
               : 1;
}

/* ---- Arithmetic ------------------------------------------------------------------------------ */

/* Both loops below have an inner loop of constant length without a dependence between its steps:
 * compilers make vector instructions of it without being allowed to reorder sums. */

double fa_dot(const float *restrict a, const float *restrict b, int width)
{
    double sums[FA_LANES] = {0};
    for (int d = 0; d < width; d += FA_LANES) {
        for (int lane = 0; lane < FA_LANES; lane++)
            sums[lane] += (double)a[d + lane] * b[d + lane];
    }
    for (int half = FA_LANES / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; lane++)
            sums[lane] += sums[lane + half];
    }
    return sums[0];
}

void fa_add_scaled(float *restrict sum, float factor, const float *restrict row, int width)
{
    for (int d = 0; d < width; d += FA_LANES) {
        for (int lane = 0; lane < FA_LANES; lane++)
            sum[d + lane] += factor * row[d + lane];
    }
}
