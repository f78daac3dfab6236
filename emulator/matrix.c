/* Matrix instructions: mma.sync, and ldmatrix, stmatrix and movmatrix, which move what it takes.
 *
 * One layout carries them all: a register of the warp is a matrix of 8 rows of 4 words, and lane
 * 4 * row + word holds a word, that is two elements of 16 bits or four of 8 bits.
 *
 *     A [16 x k]  register r: rows from 8 * (r % 2), columns from (r / 2) times 4 words
 *     B [k x 8]   register r: its columns are the matrix's rows; elements from r times 4 words
 *     C [16 x 8]  16 bits: register r has rows from 8 * r
 *                 32 bits: register r has of rows from 8 * (r / 2) every second column from r % 2
 */

/* Fuses + with its *. A product of two elements is exact in a float (but for the least of bf16), so
 * that this changes no sum: only how soon it comes. */
#pragma GCC optimize("fp-contract=fast")

#include "emulator.h"
#include "floats.h"

#include <string.h>

enum {
    ROWS = 8,       /* of a register's matrix */
    WORDS = 4,      /* of such a row */
    ROW_BYTES = 16, /* of such a row */
    MAX_PER_WORD = 4,
    MAX_STEPS = 2, /* of 4 words along k */
    HALVES = 2,    /* of the 16 rows of A and C */
};

enum element { BF16, F16, E4M3, E5M2, S8, U8, F32, S32 };

/* opcode.detail of an mma */
#define MMA_DETAIL(k, a, b, c) ((k) << 12 | (a) << 8 | (b) << 4 | (c))

static inline enum element element_of(int detail, int shift)
{
    return (enum element)(detail >> shift & 0xf);
}

/* The aligned instructions are undefined unless the whole warp executes them together. */
static bool is_whole(struct warp *warp, const struct instruction *in, lanes active)
{
    if (active == ALL_LANES)
        return true;
    fault(warp, in, ~active, "%s needs all 32 lanes at once, but the warp has diverged",
          in->opcode->name);
    return false;
}

/* ---- elements ------------------------------------------------------------------------------- */

/* The element in the low bits of a word. */
static inline float element_value(enum element type, uint32_t word)
{
    switch (type) {
    case BF16: return float_of(word << 16);
    case F16: return widen(F16_FORMAT, word & 0xffff);
    case E4M3: return widen(E4M3_FORMAT, word & 0xff);
    case E5M2: return widen(E5M2_FORMAT, word & 0xff);
    case S8: return (int8_t)word;
    case U8: return (uint8_t)word;
    default: return float_of(word);
    }
}

static inline int elements_per_word(enum element type) { return type <= F16 ? 2 : 4; }

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
    case S8: return widen_elements(S8, words, wide);
    default: return widen_elements(U8, words, wide);
    }
}

/* ---- mma ------------------------------------------------------------------------------------ */

/* Of a row of C there are first columns 0, 2, 4, 6 and then 1, 3, 5, 7: four lanes of a register
 * are half a row then, and only B has to be brought into order. */
enum { PARITIES = 2 };
typedef float half_row __attribute__((vector_size(4 * sizeof(float)), may_alias));
typedef float row __attribute__((vector_size(8 * sizeof(float))));
typedef int32_t row_bits __attribute__((vector_size(8 * sizeof(int32_t))));
typedef uint32_t sixteen_words __attribute__((vector_size(16 * sizeof(uint32_t))));

/* Of C or D the columns of a parity, of rows from 8 * half. */
typedef float *accumulators[HALVES][PARITIES];

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

/* Matrix units make one NaN only. */
static inline row with_one_nan(row sum)
{
    const row_bits is_nan = sum != sum;
    return (row)((is_nan & 0x7fffffff) | (~is_nan & (row_bits)sum));
}

/* D = A B + C, k ascending. Registers of D may be registers of C: reads all of C first. */
static inline __attribute__((always_inline)) void
multiply_blocks(accumulators d, float a[][MAX_PER_WORD][LANES], row b[][MAX_PER_WORD][WORDS],
                accumulators c, int steps, int per_word)
{
    row sum[HALVES][ROWS];
    for (int half = 0; half < HALVES; half++)
        for (int r = 0; r < ROWS; r++)
            sum[half][r] = join((half_row *)c[half][0] + r, (half_row *)c[half][1] + r);
    for (int step = 0; step < steps; step++)
        for (int word = 0; word < WORDS; word++)
            for (int i = 0; i < per_word; i++)
                for (int half = 0; half < HALVES; half++)
                    for (int r = 0; r < ROWS; r++)
                        sum[half][r] +=
                            a[HALVES * step + half][i][WORDS * r + word] * b[step][i][word];
    for (int half = 0; half < HALVES; half++)
        for (int r = 0; r < ROWS; r++)
            split(with_one_nan(sum[half][r]), (half_row *)d[half][0] + r,
                  (half_row *)d[half][1] + r);
}

static void multiply(accumulators d, float a[][MAX_PER_WORD][LANES], row b[][MAX_PER_WORD][WORDS],
                     accumulators c, int steps, int per_word)
{
    if (per_word == 4) /* constants again */
        multiply_blocks(d, a, b, c, 2, 4);
    else if (steps == 2)
        multiply_blocks(d, a, b, c, 2, 2);
    else
        multiply_blocks(d, a, b, c, 1, 2);
}

/* The same, where the registers have no floats. */
typedef float floats[HALVES][PARITIES][LANES] __attribute__((aligned(sizeof(row))));

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
    if (!is_whole(warp, in, active))
        return;
    const int detail = in->opcode->detail;
    const enum element a_type = element_of(detail, 8), b_type = element_of(detail, 4),
                       c_type = element_of(detail, 0);
    const int per_word = elements_per_word(a_type);
    const int steps = (detail >> 12) / (WORDS * per_word);
    const int first_a = c_type == F16 ? 2 : 4, first_b = first_a + HALVES * steps,
              first_c = first_b + steps;
    float a[HALVES * MAX_STEPS][MAX_PER_WORD][LANES];
    row b[MAX_STEPS][MAX_PER_WORD][WORDS];
    floats sums = {0};
    accumulators c, d;
    for (int r = 0; r < HALVES * steps; r++)
        widen_words(a_type, r32(warp, in, first_a + r), a[r]);
    for (int r = 0; r < steps; r++) {
        sixteen_words rows[2];
        transpose_b(r32(warp, in, first_b + r), rows);
        widen_words(b_type, (const uint32_t *)rows, (float (*)[LANES])b[r]);
    }
    for (int half = 0; half < HALVES && c_type == F16; half++)
        widen_words(F16, r32(warp, in, first_c + half), sums[half]);
    place(warp, in, first_c, c_type, sums, c);
    place(warp, in, 0, c_type, sums, d);
    multiply(d, a, b, c, steps, per_word);
    if (c_type == F16)
        narrow_halves(warp, in, sums);
    else if (c_type == S32)
        add_s32(warp, in, first_c, sums);
}

/* ---- ldmatrix, stmatrix, movmatrix ---------------------------------------------------------- */

/* opcode.detail: how many matrices, and whether each is transposed on its way. */
#define MOVE_DETAIL(count, transposed) ((count) << 1 | (transposed))

typedef uint16_t matrix_row __attribute__((vector_size(ROW_BYTES), may_alias));

/* Deals like cards, first half of the rows against the second: the highest bit of an element's
 * index becomes the lowest. */
static inline void deal(const matrix_row from[ROWS], matrix_row to[ROWS])
{
    for (int r = 0; r < ROWS / 2; r++) {
        const matrix_row a = from[r], b = from[r + ROWS / 2];
        to[2 * r] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
        to[2 * r + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    }
}

/* The three bits of the row and those of the column change places. */
static inline void transpose_halves(const uint32_t from[LANES], uint32_t to[LANES])
{
    matrix_row once[ROWS], twice[ROWS];
    deal((const matrix_row *)from, once);
    deal(once, twice);
    deal(twice, (matrix_row *)to);
}

/* Of matrix m the rows are at the addresses of lanes from 8 * m. */
static void read_addresses(struct warp *warp, const struct instruction *in, int operand, int count,
                           uint64_t address[LANES])
{
    for (int lane = 0; lane < LANES; lane++)
        address[lane] = address_of(warp, in, operand, lane);
    count_wavefronts(warp, in, ALL_LANES >> (LANES - ROWS * count), address, ROW_BYTES);
}

static void execute_ldmatrix(struct warp *warp, const struct instruction *in, lanes active)
{
    const int count = in->opcode->detail >> 1;
    const bool transposed = in->opcode->detail & 1;
    uint64_t address[LANES];
    if (!is_whole(warp, in, active))
        return;
    read_addresses(warp, in, count, count, address);
    for (int matrix = 0; matrix < count; matrix++) {
        uint32_t *d = r32(warp, in, matrix);
        for (int row = 0; row < ROWS; row++) {
            const int lane = ROWS * matrix + row;
            const void *from = read_shared(warp, in, lane, address[lane], ROW_BYTES);
            if (!from)
                return;
            memcpy(&d[WORDS * row], from, ROW_BYTES);
        }
        if (transposed)
            transpose_halves(d, d);
    }
}

static void execute_stmatrix(struct warp *warp, const struct instruction *in, lanes active)
{
    const int count = in->opcode->detail >> 1;
    const bool transposed = in->opcode->detail & 1;
    uint64_t address[LANES];
    if (!is_whole(warp, in, active))
        return;
    read_addresses(warp, in, 0, count, address);
    for (int matrix = 0; matrix < count; matrix++) {
        const uint32_t *words = r32(warp, in, 1 + matrix);
        uint32_t columns[LANES] __attribute__((aligned(ROW_BYTES)));
        if (transposed) {
            transpose_halves(words, columns);
            words = columns;
        }
        for (int row = 0; row < ROWS; row++) {
            const int lane = ROWS * matrix + row;
            void *to = write_shared(warp, in, lane, address[lane], ROW_BYTES);
            if (!to)
                return;
            memcpy(to, &words[WORDS * row], ROW_BYTES);
        }
    }
}

static void execute_movmatrix(struct warp *warp, const struct instruction *in, lanes active)
{
    if (is_whole(warp, in, active))
        transpose_halves(r32(warp, in, 1), r32(warp, in, 0));
}

/* ---- the table ------------------------------------------------------------------------------ */

/* operands: D, A, B, C */
#define MMA(shape, k, types, operands, a, b, c)                                                    \
    {"mma.sync.aligned." shape ".row.col." types, operands, execute_mma, KIND_MMA,                 \
     MMA_DETAIL(k, a, b, c)},

#define MMA_16_BITS(shape, k, a_and_b)                                                             \
    MMA(shape, k, "f32.bf16.bf16.f32", "W4 " a_and_b " w4", BF16, BF16, F32)                       \
    MMA(shape, k, "f32.f16.f16.f32", "W4 " a_and_b " w4", F16, F16, F32)                           \
    MMA(shape, k, "f16.f16.f16.f16", "W2 " a_and_b " w2", F16, F16, F16)

/* The kind may stand before the shape, or behind the layouts, or be left out. */
#define MMA_F8(types, operands, a, b, c)                                                           \
    MMA("m16n8k32", 32, types, operands, a, b, c)                                                  \
    MMA("m16n8k32", 32, "kind::f8f6f4." types, operands, a, b, c)                                  \
    MMA("kind::f8f6f4.m16n8k32", 32, types, operands, a, b, c)

#define MMA_F8_SUMS(types, a, b)                                                                   \
    MMA_F8("f32." types ".f32", "W4 w4 w2 w4", a, b, F32)                                          \
    MMA_F8("f16." types ".f16", "W2 w4 w2 w2", a, b, F16)

#define MMA_S32(types, a, b) MMA("m16n8k32", 32, "s32." types ".s32", "W4 w4 w2 w4", a, b, S32)

#define LDMATRIX(space, modifiers, count, transposed)                                              \
    {"ldmatrix.sync.aligned.m8n8.x" #count modifiers space ".b16", "W" #count " [",                \
     execute_ldmatrix, KIND_LDMATRIX, MOVE_DETAIL(count, transposed)},

#define STMATRIX(space, modifiers, count, transposed)                                              \
    {"stmatrix.sync.aligned.m8n8.x" #count modifiers space ".b16", "[ w" #count, execute_stmatrix, \
     KIND_STMATRIX, MOVE_DETAIL(count, transposed)},

#define MOVES(MOVE, space)                                                                         \
    MOVE(space, "", 1, 0)                                                                          \
    MOVE(space, "", 2, 0)                                                                          \
    MOVE(space, "", 4, 0)                                                                          \
    MOVE(space, ".trans", 1, 1)                                                                    \
    MOVE(space, ".trans", 2, 1)                                                                    \
    MOVE(space, ".trans", 4, 1)

/* clang-format off */
const struct opcode MATRIX_OPCODES[] = {
    MMA_16_BITS("m16n8k16", 16, "w4 w2")
    MMA_16_BITS("m16n8k8", 8, "w2 w1")
    MMA_F8_SUMS("e4m3.e4m3", E4M3, E4M3)
    MMA_F8_SUMS("e4m3.e5m2", E4M3, E5M2)
    MMA_F8_SUMS("e5m2.e4m3", E5M2, E4M3)
    MMA_F8_SUMS("e5m2.e5m2", E5M2, E5M2)
    MMA_S32("s8.s8", S8, S8)
    MMA_S32("s8.u8", S8, U8)
    MMA_S32("u8.s8", U8, S8)
    MMA_S32("u8.u8", U8, U8)
    MOVES(LDMATRIX, ".shared")
    MOVES(LDMATRIX, ".shared::cta")
    MOVES(STMATRIX, ".shared")
    MOVES(STMATRIX, ".shared::cta")
    {"movmatrix.sync.aligned.m8n8.trans.b16", "W w", execute_movmatrix, KIND_SHUFFLE, 0},
    {NULL, NULL, NULL, KIND_COUNT, 0},
};
/* clang-format on */
