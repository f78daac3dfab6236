/* mma.sync: D = A B + C of a warp's registers.
 *
 * A register of the warp is a matrix of 8 rows of 4 words, and lane 4 * row + word holds a word:
 * two elements of 16 bits, four of 8, eight of 4, the lowest k in the lowest bits.
 *
 *     A [16 x k]  register r: rows from 8 * (r % 2), columns from (r / 2) times 4 words
 *     B [k x 8]   register r: its columns are the matrix's rows; elements from r times 4 words
 *     C [16 x 8]  16 bits: register r has rows from 8 * r
 *                 32 bits: register r has of rows from 8 * (r / 2) every second column from r % 2
 *
 * Elements of 16 bits are summed in float, k ascending. Those of 8 and 4 bits are summed as sm_120
 * does, to the bit: see "sums of small floats". */

/* Fuses + with its *. A product of two elements is exact in a float (but for the least of bf16), so
 * that this changes no sum: only how soon it comes. */
#pragma GCC optimize("fp-contract=fast")

#include "emulator.h"
#include "floats.h"

#include <math.h>
#include <string.h>

enum {
    ROWS = 8,  /* of a register's matrix */
    WORDS = 4, /* of such a row */
    MAX_PER_WORD = 8,
    MAX_STEPS = 2, /* of 4 words along k */
    HALVES = 2,    /* of the 16 rows of A and C */
    GROUPS = 4,    /* of 16 products, of 4-bit elements */
};

enum element { BF16, F16, E4M3, E5M2, E2M1, S8, U8, F32, S32, UE8M0, UE4M3 };

/* opcode.detail of an mma; with factors, their type and how many a row of A has. */
#define MMA_DETAIL(k, a, b, c)     ((k) << 12 | (a) << 8 | (b) << 4 | (c))
#define SCALED_DETAIL(type, count) ((count) << 24 | (type) << 20)

static inline enum element element_of(int detail, int shift)
{
    return (enum element)(detail >> shift & 0xf);
}

static inline int depth_of(int detail) { return detail >> 12 & 0xff; }

/* ---- elements ------------------------------------------------------------------------------- */

/* The element in the low bits of a word. */
static inline float element_value(enum element type, uint32_t word)
{
    switch (type) {
    case BF16: return float_of(word << 16);
    case F16: return widen(F16_FORMAT, word & 0xffff);
    case E4M3: return widen(E4M3_FORMAT, word & 0xff);
    case E5M2: return widen(E5M2_FORMAT, word & 0xff);
    case E2M1: return widen(E2M1_FORMAT, word & 0xf);
    case S8: return (int8_t)word;
    case U8: return (uint8_t)word;
    default: return float_of(word);
    }
}

static inline int elements_per_word(enum element type)
{
    return type <= F16 ? 2 : type == E2M1 ? 8 : 4;
}

static inline __attribute__((always_inline)) void
widen_elements(enum element type, const uint32_t words[LANES], float wide[][LANES])
{
    const int per_word = elements_per_word(type), width = 32 / per_word;
    for (int i = 0; i < per_word; i++)
        for (int lane = 0; lane < LANES; lane++)
            wide[i][lane] = element_value(type, words[lane] >> i * width);
}

/* wide[i][lane]: element i of a lane's word. */
static void widen_words(enum element type, const uint32_t words[LANES], float wide[][LANES])
{
    switch (type) { /* constants, so that each has its own loops without branches */
    case BF16: return widen_elements(BF16, words, wide);
    case F16: return widen_elements(F16, words, wide);
    case E4M3: return widen_elements(E4M3, words, wide);
    case E5M2: return widen_elements(E5M2, words, wide);
    case E2M1: return widen_elements(E2M1, words, wide);
    case S8: return widen_elements(S8, words, wide);
    default: return widen_elements(U8, words, wide);
    }
}

/* ---- operands ------------------------------------------------------------------------------- */

/* Of a row of C there are first columns 0, 2, 4, 6 and then 1, 3, 5, 7: four lanes of a register
 * are half a row then, and only B has to be brought into order. */
enum { PARITIES = 2 };
typedef float half_row __attribute__((vector_size(4 * sizeof(float)), may_alias));
typedef float row __attribute__((vector_size(8 * sizeof(float))));
typedef int32_t row_bits __attribute__((vector_size(8 * sizeof(int32_t))));
typedef uint32_t sixteen_words __attribute__((vector_size(16 * sizeof(uint32_t))));

/* Of C or D the columns of a parity, of rows from 8 * half. */
typedef float *accumulators[HALVES][PARITIES];

/* The same, where the registers have no floats. */
typedef float floats[HALVES][PARITIES][LANES] __attribute__((aligned(sizeof(row))));

struct operands {
    int steps, per_word;
    int first_c;                                      /* operands of the instruction */
    float a[HALVES * MAX_STEPS][MAX_PER_WORD][LANES]; /* [HALVES * step + half][i] */
    row b[MAX_STEPS][MAX_PER_WORD][WORDS];            /* [step][i][word] */
    floats sums;                                      /* C and D where they are no floats */
    accumulators c, d;
};

/* From a column of B in each row of the register to a row of B for each of its words. */
static inline void transpose_b(const uint32_t words[LANES], sixteen_words out[2])
{
#define ROW_OF_B(word)                                                                             \
    word, word + 8, word + 16, word + 24, word + 4, word + 12, word + 20, word + 28
    const sixteen_words *in = (const sixteen_words *)words;
    out[0] = __builtin_shufflevector(in[0], in[1], ROW_OF_B(0), ROW_OF_B(1));
    out[1] = __builtin_shufflevector(in[0], in[1], ROW_OF_B(2), ROW_OF_B(3));
}

/* The two half rows of one row. */
static inline row join(const half_row *even, const half_row *odd)
{
    return __builtin_shufflevector(*even, *odd, 0, 1, 2, 3, 4, 5, 6, 7);
}

static inline void split(row whole, half_row *even, half_row *odd)
{
    *even = __builtin_shufflevector(whole, whole, 0, 1, 2, 3);
    *odd = __builtin_shufflevector(whole, whole, 4, 5, 6, 7);
}

static inline row row_of(accumulators c, int half, int r)
{
    return join((half_row *)c[half][0] + r, (half_row *)c[half][1] + r);
}

static inline void set_row(accumulators d, int half, int r, row value)
{
    split(value, (half_row *)d[half][0] + r, (half_row *)d[half][1] + r);
}

/* Where the floats of C or D are: in its registers, from number `first` on, or in the scratch. */
static void place(const struct warp *warp, const struct instruction *in, int first,
                  enum element type, floats scratch, accumulators accumulators)
{
    for (int half = 0; half < HALVES; half++)
        for (int parity = 0; parity < PARITIES; parity++)
            accumulators[half][parity] = type == F32
                                             ? f32(warp, in, first + PARITIES * half + parity)
                                             : scratch[half][parity];
}

static void read_operands(const struct warp *warp, const struct instruction *in, struct operands *o)
{
    const int detail = in->opcode->detail;
    const enum element a_type = element_of(detail, 8), b_type = element_of(detail, 4),
                       c_type = element_of(detail, 0);
    const int first_a = c_type == F16 ? 2 : 4;
    o->per_word = elements_per_word(a_type);
    o->steps = depth_of(detail) / (WORDS * o->per_word);
    const int first_b = first_a + HALVES * o->steps;
    o->first_c = first_b + o->steps;
    for (int r = 0; r < HALVES * o->steps; r++)
        widen_words(a_type, r32(warp, in, first_a + r), o->a[r]);
    for (int r = 0; r < o->steps; r++) {
        sixteen_words rows[2];
        transpose_b(r32(warp, in, first_b + r), rows);
        widen_words(b_type, (const uint32_t *)rows, (float (*)[LANES])o->b[r]);
    }
    memset(o->sums, 0, sizeof o->sums);
    for (int half = 0; half < HALVES && c_type == F16; half++)
        widen_words(F16, r32(warp, in, o->first_c + half), o->sums[half]);
    place(warp, in, o->first_c, c_type, o->sums, o->c);
    place(warp, in, 0, c_type, o->sums, o->d);
}

/* ---- sums in float -------------------------------------------------------------------------- */

/* Matrix units make one NaN only. */
static inline row with_one_nan(row sum)
{
    const row_bits is_nan = sum != sum;
    return (row)((is_nan & 0x7fffffff) | (~is_nan & (row_bits)sum));
}

/* D = A B + C, k ascending. Registers of D may be registers of C: reads all of C first. */
static inline __attribute__((always_inline)) void
multiply_blocks(struct operands *o, accumulators d, accumulators c, int steps, int per_word)
{
    row sum[HALVES][ROWS];
    for (int half = 0; half < HALVES; half++)
        for (int r = 0; r < ROWS; r++)
            sum[half][r] = row_of(c, half, r);
    for (int step = 0; step < steps; step++)
        for (int word = 0; word < WORDS; word++)
            for (int i = 0; i < per_word; i++)
                for (int half = 0; half < HALVES; half++)
                    for (int r = 0; r < ROWS; r++)
                        sum[half][r] +=
                            o->a[HALVES * step + half][i][WORDS * r + word] * o->b[step][i][word];
    for (int half = 0; half < HALVES; half++)
        for (int r = 0; r < ROWS; r++)
            set_row(d, half, r, with_one_nan(sum[half][r]));
}

static void multiply(struct operands *o, accumulators d, accumulators c)
{
    if (o->per_word == 8) /* constants again */
        multiply_blocks(o, d, c, 2, 8);
    else if (o->per_word == 4)
        multiply_blocks(o, d, c, 2, 4);
    else if (o->steps == 2)
        multiply_blocks(o, d, c, 2, 2);
    else
        multiply_blocks(o, d, c, 1, 2);
}

static void narrow_halves(const struct warp *warp, const struct instruction *in, floats d)
{
    for (int half = 0; half < HALVES; half++) {
        uint32_t *words = r32(warp, in, half);
        for (int lane = 0; lane < LANES; lane++)
            words[lane] =
                narrow(F16_FORMAT, d[half][0][lane]) | narrow(F16_FORMAT, d[half][1][lane]) << 16;
    }
}

/* Sums of products of bytes are exact in floats, but not with any 32-bit C: it is added last. */
static void add_s32(const struct warp *warp, const struct instruction *in, int first_c, floats d)
{
    uint32_t total[HALVES * PARITIES][LANES];
    for (int r = 0; r < HALVES * PARITIES; r++) {
        const uint32_t *c = r32(warp, in, first_c + r);
        const float *sum = d[r / PARITIES][r % PARITIES];
        for (int lane = 0; lane < LANES; lane++)
            total[r][lane] = c[lane] + (uint32_t)(int32_t)sum[lane];
    }
    for (int r = 0; r < HALVES * PARITIES; r++)
        memcpy(r32(warp, in, r), total[r], sizeof total[r]);
}

static void execute_mma(struct warp *warp, const struct instruction *in, lanes active)
{
    const enum element c_type = element_of(in->opcode->detail, 0);
    struct operands o;
    if (!is_whole(warp, in, active))
        return;
    read_operands(warp, in, &o);
    multiply(&o, o.d, o.c);
    if (c_type == F16)
        narrow_halves(warp, in, o.sums);
    else if (c_type == S32)
        add_s32(warp, in, o.first_c, o.sums);
}

/* ---- factors of block-scaled products ------------------------------------------------------- */

/* A number is significand * 2^exponent. Subnormals keep the least exponent of their type. */
enum {
    ABSENT = -4096, /* exponent of zero: less than any */
};

static inline int exponent_of(float value, int least)
{
    const int exponent = (int)(bits_of(value) >> 23 & 0xff) - 127;
    return value == 0 ? ABSENT : exponent < least ? least : exponent;
}

static inline double power_of_2(int exponent)
{
    const uint64_t bits = (uint64_t)(exponent + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* One factor per row or column and group of 16 products. A significand may be NaN. Columns are in
 * the order of a row of C. */
struct factors {
    float a[GROUPS][HALVES * ROWS], b[GROUPS][ROWS];
    int32_t exponent_a[GROUPS][HALVES * ROWS], exponent_b[GROUPS][ROWS];
};

static void read_factor(enum element type, uint32_t byte, float *significand, int32_t *exponent)
{
    if (type == UE8M0) {
        *significand = byte == 0xff ? NAN : 1;
        *exponent = (int)byte - 127;
        return;
    }
    const float value = widen(E4M3_FORMAT, byte & 0x7f); /* its sign counts for nothing */
    *exponent = exponent_of(value, -6);
    *significand = value == 0 ? 0 : value * (float)power_of_2(-*exponent);
}

/* Byte and thread selectors, {bid, tid} from operand `first` on: the same in all lanes. */
static bool read_selectors(struct warp *warp, const struct instruction *in, int first, int count,
                           uint32_t threads, uint32_t selectors[2])
{
    for (int i = 0; i < 2; i++) {
        const uint32_t *values = r32(warp, in, first + i);
        for (int lane = 0; lane < LANES; lane++)
            if (values[lane] != values[0]) {
                fault(warp, in, 1u << lane, "a selector differs from that of lane 0");
                return false;
            }
        selectors[i] = values[0];
    }
    const uint32_t bytes = 4 / (uint32_t)count; /* 1X: 0 to 3; 2X: 0 and 2; 4X: 0 */
    if (selectors[0] % (uint32_t)count == 0 && selectors[0] / (uint32_t)count < bytes &&
        selectors[1] < threads)
        return true;
    fault(warp, in, 1, "selectors {%u, %u} are out of range", selectors[0], selectors[1]);
    return false;
}

/* Row m of A: lane 4 * (m % 8) + 2 * tid + m / 8. Column n of B: lane 4 * n + tid. Group g of 16
 * products, 4X: byte g; 2X: byte bid + g / 2; 1X: byte bid. */
static bool read_factors(struct warp *warp, const struct instruction *in, int first,
                         struct factors *f)
{
    const int detail = in->opcode->detail, count = detail >> 24;
    const enum element type = element_of(detail, 20);
    uint32_t at_a[2], at_b[2];
    if (!read_selectors(warp, in, first + 1, count, 2, at_a) ||
        !read_selectors(warp, in, first + 4, count, 4, at_b))
        return false;
    const uint32_t *a = r32(warp, in, first), *b = r32(warp, in, first + 3);
    for (uint32_t g = 0; g < GROUPS; g++) {
        const uint32_t step = g * (uint32_t)count / GROUPS;
        for (uint32_t m = 0; m < HALVES * ROWS; m++)
            read_factor(type, a[4 * (m % 8) + 2 * at_a[1] + m / 8] >> 8 * (at_a[0] + step) & 0xff,
                        &f->a[g][m], &f->exponent_a[g][m]);
        for (uint32_t i = 0; i < ROWS; i++) {
            const uint32_t n = i < 4 ? 2 * i : 2 * (i - 4) + 1;
            read_factor(type, b[4 * n + at_b[1]] >> 8 * (at_b[0] + step) & 0xff, &f->b[g][i],
                        &f->exponent_b[g][i]);
        }
    }
    return true;
}

static void unit_factors(struct factors *f)
{
    memset(f, 0, sizeof *f);
    for (int g = 0; g < GROUPS; g++)
        for (int m = 0; m < HALVES * ROWS; m++)
            f->a[g][m] = f->b[g][m % ROWS] = 1;
}

/* ---- sums of small floats ------------------------------------------------------------------- */

/* All terms and C are aligned to the largest exponent among them, cut toward zero to so many bits
 * below it, added exactly, and the sum is cut toward zero to a float (rounded to the nearest f16).
 * Terms are the products of 8-bit elements, their exponents added and not normalised, or the exact
 * sums of 16 products of 4-bit elements, whose exponent is that of the factors alone. */
enum {
    BYTES_KEEP = 25,
    GROUPS_KEEP = 35,
    BYTES_ZERO = -133, /* exponents of a C that is zero */
    GROUPS_ZERO = -139,
};

struct exponents {
    int32_t a[HALVES * MAX_STEPS][MAX_PER_WORD][LANES];
    row_bits b[MAX_STEPS][MAX_PER_WORD][WORDS];
};

static inline int least_exponent(enum element type) { return type == E5M2 ? -14 : -6; }

static void exponents_of(const float *values, int count, int least, int32_t *exponents)
{
    for (int i = 0; i < count; i++)
        exponents[i] = exponent_of(values[i], least);
}

static void read_exponents(const struct operands *o, int detail, struct exponents *x)
{
    const int least_a = least_exponent(element_of(detail, 8)),
              least_b = least_exponent(element_of(detail, 4));
    for (int r = 0; r < HALVES * o->steps; r++)
        exponents_of(o->a[r][0], o->per_word * LANES, least_a, x->a[r][0]);
    for (int r = 0; r < o->steps; r++)
        exponents_of((const float *)o->b[r][0], o->per_word * LANES, least_b,
                     (int32_t *)x->b[r][0]);
}

static inline int larger(int a, int b) { return a > b ? a : b; }

/* The sum of a row's terms: total * 2^(exponent - keep). */
struct aligned_sums {
    int32_t exponent[ROWS];
    double total[ROWS];
};

/* Row m: products of bytes and C. Every product times its power of two is exact in float, and 16
 * of them are less than 2^31. */
static void sum_bytes(const struct operands *o, const struct exponents *x, const struct factors *f,
                      int half, int r, row c, struct aligned_sums *sums)
{
    row_bits top = {0};
    row scale;
    top += 2 * ABSENT;
    for (int step = 0; step < MAX_STEPS; step++)
        for (int i = 0; i < 4; i++)
            for (int word = 0; word < WORDS; word++) {
                const row_bits e =
                    x->a[HALVES * step + half][i][WORDS * r + word] + x->b[step][i][word];
                const row_bits is_more = e > top;
                top = (e & is_more) | (top & ~is_more);
            }
    for (int n = 0; n < ROWS; n++) {
        const int factor = f->exponent_a[0][ROWS * half + r] + f->exponent_b[0][n];
        const int of_c = larger(exponent_of(c[n], -126), BYTES_ZERO);
        const int exponent = larger(top[n] + factor, of_c), shift = BYTES_KEEP + factor - exponent;
        sums->exponent[n] = exponent;
        scale[n] = (float)power_of_2(shift < -126 ? -126 : shift > 126 ? 126 : shift);
        sums->total[n] = trunc(c[n] * power_of_2(BYTES_KEEP - exponent));
    }
    for (int step = 0; step < MAX_STEPS; step++) {
        row_bits part = {0};
        for (int i = 0; i < 4; i++)
            for (int word = 0; word < WORDS; word++)
                part += __builtin_convertvector(o->a[HALVES * step + half][i][WORDS * r + word] *
                                                    scale * o->b[step][i][word],
                                                row_bits);
        for (int n = 0; n < ROWS; n++)
            sums->total[n] += part[n];
    }
}

/* Row m: groups of 16 products of 4-bit elements, two words each, and C. A group whose products
 * are all zeros counts for nothing, one whose products cancel has its exponent. */
static void sum_groups(const struct operands *o, const struct factors *f, int half, int r, row c,
                       struct aligned_sums *sums)
{
    const int m = ROWS * half + r;
    row group[GROUPS], magnitude[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
        group[g] = magnitude[g] = (row){0};
        for (int word = 2 * (g % 2); word < 2 * (g % 2) + 2; word++)
            for (int i = 0; i < MAX_PER_WORD; i++) {
                const row p =
                    o->a[HALVES * (g / 2) + half][i][WORDS * r + word] * o->b[g / 2][i][word];
                group[g] += p;
                magnitude[g] += p * p;
            }
    }
    for (int n = 0; n < ROWS; n++) {
        int exponent = larger(exponent_of(c[n], -126), GROUPS_ZERO), of_group[GROUPS];
        for (int g = 0; g < GROUPS; g++) {
            of_group[g] = f->exponent_a[g][m] + f->exponent_b[g][n];
            if (magnitude[g][n] > 0)
                exponent = larger(exponent, of_group[g]);
        }
        sums->exponent[n] = exponent;
        sums->total[n] = trunc(c[n] * power_of_2(GROUPS_KEEP - exponent));
        for (int g = 0; g < GROUPS; g++)
            if (magnitude[g][n] > 0 && of_group[g] > ABSENT / 2)
                sums->total[n] += trunc((double)group[g][n] * f->a[g][m] * f->b[g][n] *
                                        power_of_2(GROUPS_KEEP + of_group[g] - exponent));
    }
}

/* Cut toward zero to a float; too large: infinity. For f16 what was cut off sets the last bit: it
 * is rounded once more, to fewer bits, and must not come to lie on a tie. */
static float cut_to_float(double sum, bool is_rounded_again)
{
    const float nearest = (float)sum;
    if ((double)nearest == sum || fabs(sum) >= 0x1p128)
        return nearest + 0.0f; /* there is no negative zero */
    const float cut = fabs((double)nearest) > fabs(sum) ? float_of(bits_of(nearest) - 1) : nearest;
    return is_rounded_again ? float_of(bits_of(cut) | 1) : cut + 0.0f;
}

static inline bool is_finite(float value) { return (bits_of(value) & 0x7f800000) != 0x7f800000; }

static bool are_finite(const float *values, int count)
{
    uint32_t special = 0;
    for (int i = 0; i < count; i++)
        special |= !is_finite(values[i]);
    return !special;
}

/* What infinities and NaNs alone add up to: not finite where the sum is not. */
static void sum_specials(struct operands *o, const struct factors *f, floats specials)
{
    accumulators places;
    for (int half = 0; half < HALVES; half++)
        for (int parity = 0; parity < PARITIES; parity++) {
            places[half][parity] = specials[half][parity];
            for (int lane = 0; lane < LANES; lane++) {
                const int m = ROWS * half + lane / 4, n = 4 * parity + lane % 4;
                const float c = o->c[half][parity][lane];
                float special = is_finite(c) ? 0 : c;
                for (int g = 0; g < GROUPS; g++)
                    special += 0 * f->a[g][m] * f->b[g][n];
                specials[half][parity][lane] = special;
            }
        }
    multiply(o, places, places);
}

static bool has_specials(const struct operands *o, const struct factors *f)
{
    bool finite = are_finite(&f->a[0][0], sizeof f->a / sizeof(float)) &&
                  are_finite(&f->b[0][0], sizeof f->b / sizeof(float));
    for (int r = 0; r < HALVES * o->steps; r++)
        finite &= are_finite(o->a[r][0], o->per_word * LANES);
    for (int r = 0; r < o->steps; r++)
        finite &= are_finite((const float *)o->b[r][0], o->per_word * LANES);
    for (int half = 0; half < HALVES; half++)
        for (int parity = 0; parity < PARITIES; parity++)
            finite &= are_finite(o->c[half][parity], LANES);
    return !finite;
}

static void execute_small_mma(struct warp *warp, const struct instruction *in, lanes active)
{
    const int detail = in->opcode->detail;
    const bool is_f16 = element_of(detail, 0) == F16, is_nibbles = element_of(detail, 8) == E2M1;
    struct operands o;
    struct factors f;
    struct exponents x;
    floats specials = {0}, results;
    if (!is_whole(warp, in, active))
        return;
    read_operands(warp, in, &o);
    if (detail >> 24 == 0)
        unit_factors(&f);
    else if (!read_factors(warp, in, o.first_c + HALVES * PARITIES, &f))
        return;
    if (has_specials(&o, &f))
        sum_specials(&o, &f, specials);
    if (!is_nibbles)
        read_exponents(&o, detail, &x);
    for (int half = 0; half < HALVES; half++)
        for (int r = 0; r < ROWS; r++) {
            struct aligned_sums sums;
            const row c = row_of(o.c, half, r);
            if (is_nibbles)
                sum_groups(&o, &f, half, r, c, &sums);
            else
                sum_bytes(&o, &x, &f, half, r, c, &sums);
            for (int n = 0; n < ROWS; n++) {
                const int keep = is_nibbles ? GROUPS_KEEP : BYTES_KEEP;
                const float special = specials[half][n / 4][WORDS * r + n % 4];
                const double sum = sums.total[n] * power_of_2(sums.exponent[n] - keep);
                results[half][n / 4][WORDS * r + n % 4] =
                    is_finite(special) ? cut_to_float(sum, is_f16) : special;
            }
        }
    if (is_f16)
        return narrow_halves(warp, in, results);
    for (int half = 0; half < HALVES; half++)
        for (int parity = 0; parity < PARITIES; parity++)
            memcpy(o.d[half][parity], results[half][parity], sizeof results[half][parity]);
}

/* ---- the table ------------------------------------------------------------------------------ */

/* operands: D, A, B, C */
#define MMA(shape, k, types, operands, execute, a, b, c)                                           \
    {"mma.sync.aligned." shape ".row.col." types, operands, execute, KIND_MMA,                     \
     MMA_DETAIL(k, a, b, c)},

#define MMA_16_BITS(shape, k, a_and_b)                                                             \
    MMA(shape, k, "f32.bf16.bf16.f32", "W4 " a_and_b " w4", execute_mma, BF16, BF16, F32)          \
    MMA(shape, k, "f32.f16.f16.f32", "W4 " a_and_b " w4", execute_mma, F16, F16, F32)              \
    MMA(shape, k, "f16.f16.f16.f16", "W2 " a_and_b " w2", execute_mma, F16, F16, F16)

#define MMA_S32(types, a, b)                                                                       \
    MMA("m16n8k32", 32, "s32." types ".s32", "W4 w4 w2 w4", execute_mma, a, b, S32)

/* The kind may stand before the shape, or behind the layouts, or be left out. */
#define MMA_F8_SUMS(types, operands, a, b, c)                                                      \
    MMA("m16n8k32", 32, types, operands, execute_small_mma, a, b, c)                               \
    MMA("m16n8k32", 32, "kind::f8f6f4." types, operands, execute_small_mma, a, b, c)               \
    MMA("kind::f8f6f4.m16n8k32", 32, types, operands, execute_small_mma, a, b, c)

/* D, A, B, C, factors of A and their selectors, those of B; braces around a factor or none. */
#define MMA_SCALED(name, detail)                                                                   \
    {name, "W4 w4 w2 w4 w h2 w h2", execute_small_mma, KIND_MMA, detail},                          \
        {name, "W4 w4 w2 w4 w1 h2 w1 h2", execute_small_mma, KIND_MMA, detail},

#define MMA_KIND(shape, kind, types, detail)                                                       \
    MMA_SCALED("mma.sync.aligned.kind::" kind "." shape ".row.col." types, detail)                 \
    MMA_SCALED("mma.sync.aligned." shape ".row.col.kind::" kind "." types, detail)

#define MMA_MXF8(kind, types, a, b)                                                                \
    MMA_KIND("m16n8k32", kind, "f32." types ".f32.ue8m0",                                          \
             MMA_DETAIL(32, a, b, F32) | SCALED_DETAIL(UE8M0, 1))

#define MMA_F4(kind, factor, type, count)                                                          \
    MMA_KIND("m16n8k64", kind, "f32.e2m1.e2m1.f32." factor,                                        \
             MMA_DETAIL(64, E2M1, E2M1, F32) | SCALED_DETAIL(type, count))

#define MMA_F8(types, a, b)                                                                        \
    MMA_F8_SUMS("f32." types ".f32", "W4 w4 w2 w4", a, b, F32)                                     \
    MMA_F8_SUMS("f16." types ".f16", "W2 w4 w2 w2", a, b, F16)                                     \
    MMA_MXF8("mxf8f6f4.block_scale", types, a, b)                                                  \
    MMA_MXF8("mxf8f6f4.block_scale.scale_vec::1X", types, a, b)

/* clang-format off */
const struct opcode MMA_OPCODES[] = {
    MMA_16_BITS("m16n8k16", 16, "w4 w2")
    MMA_16_BITS("m16n8k8", 8, "w2 w1")
    MMA_S32("s8.s8", S8, S8)
    MMA_S32("s8.u8", S8, U8)
    MMA_S32("u8.s8", U8, S8)
    MMA_S32("u8.u8", U8, U8)
    MMA_F8("e4m3.e4m3", E4M3, E4M3)
    MMA_F8("e4m3.e5m2", E4M3, E5M2)
    MMA_F8("e5m2.e4m3", E5M2, E4M3)
    MMA_F8("e5m2.e5m2", E5M2, E5M2)
    MMA_F4("mxf4nvf4.block_scale.scale_vec::4X", "ue4m3", UE4M3, 4)
    MMA_F4("mxf4nvf4.block_scale.scale_vec::2X", "ue8m0", UE8M0, 2)
    MMA_F4("mxf4.block_scale.scale_vec::2X", "ue8m0", UE8M0, 2)
    MMA_F4("mxf4.block_scale", "ue8m0", UE8M0, 2)
    {NULL, NULL, NULL, KIND_COUNT, 0},
};
/* clang-format on */
