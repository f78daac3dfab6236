/* ldmatrix, stmatrix and movmatrix, which move what mma takes: see mma.c for a register's matrix.
 * Those of 16-bit elements move 8 x 8 of them, those of 8-bit elements 16 x 16 or 16 x 8. */
#include "emulator.h"

#include <string.h>

enum {
    ROWS = 8,       /* of a register's matrix */
    WORDS = 4,      /* of such a row */
    ROW_BYTES = 16, /* of such a row, and of any row in memory */
    TALL_ROWS = 16, /* of an m16n16 */
};

/* opcode.detail: how many matrices, and whether each is transposed on its way. */
#define MOVE_DETAIL(count, transposed) ((count) << 1 | (transposed))

static inline int matrices_of(const struct instruction *in) { return in->opcode->detail >> 1; }

/* ---- 16-bit elements ------------------------------------------------------------------------ */

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

/* The addresses of the first `rows` lanes, one per row. Eight rows are a pass at best. */
static void read_addresses(struct warp *warp, const struct instruction *in, int operand, int rows,
                           uint64_t address[LANES])
{
    for (int lane = 0; lane < LANES; lane++)
        address[lane] = address_of(warp, in, operand, lane);
    count_wavefronts(warp, in, ALL_LANES >> (LANES - rows), address, ROW_BYTES);
}

static void execute_ldmatrix(struct warp *warp, const struct instruction *in, lanes active)
{
    const int count = matrices_of(in);
    const bool transposed = in->opcode->detail & 1;
    uint64_t address[LANES];
    if (!is_whole(warp, in, active))
        return;
    read_addresses(warp, in, count, ROWS * count, address);
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
    const int count = matrices_of(in);
    const bool transposed = in->opcode->detail & 1;
    uint64_t address[LANES];
    if (!is_whole(warp, in, active))
        return;
    read_addresses(warp, in, 0, ROWS * count, address);
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

/* ---- 8-bit elements ------------------------------------------------------------------------- */

/* The rows of lanes from 0 on: false after a fault. */
static bool load_rows(struct warp *warp, const struct instruction *in, int operand, int count,
                      uint8_t rows[LANES][ROW_BYTES])
{
    uint64_t address[LANES];
    read_addresses(warp, in, operand, count, address);
    for (int lane = 0; lane < count; lane++) {
        const void *from = read_shared(warp, in, lane, address[lane], ROW_BYTES);
        if (!from)
            return false;
        memcpy(rows[lane], from, ROW_BYTES);
    }
    return true;
}

/* Matrix m has the rows of lanes from 16 * m: register 2 * m + h of lane 4 * g + t has column
 * 8 * h + g of rows 4 * t to 4 * t + 3. */
static void execute_ldmatrix_m16n16(struct warp *warp, const struct instruction *in, lanes active)
{
    const int count = matrices_of(in);
    uint8_t rows[LANES][ROW_BYTES];
    if (!is_whole(warp, in, active) || !load_rows(warp, in, 2 * count, TALL_ROWS * count, rows))
        return;
    for (int r = 0; r < 2 * count; r++) {
        uint32_t *d = r32(warp, in, r);
        for (int lane = 0; lane < LANES; lane++) {
            const int row = TALL_ROWS * (r / 2) + 4 * (lane % 4), column = 8 * (r % 2) + lane / 4;
            d[lane] = (uint32_t)rows[row + 3][column] << 24 |
                      (uint32_t)rows[row + 2][column] << 16 | (uint32_t)rows[row + 1][column] << 8 |
                      rows[row][column];
        }
    }
}

/* Rows of 16 nibbles, then 8 bytes that are skipped: register m of lane 4 * g + t has nibbles 4 * t
 * to 4 * t + 3 of row g, each in the low half of a byte. */
static void execute_ldmatrix_b4x16(struct warp *warp, const struct instruction *in, lanes active)
{
    const int count = matrices_of(in);
    uint8_t rows[LANES][ROW_BYTES];
    if (!is_whole(warp, in, active) || !load_rows(warp, in, count, ROWS * count, rows))
        return;
    for (int m = 0; m < count; m++) {
        uint32_t *d = r32(warp, in, m);
        for (int lane = 0; lane < LANES; lane++) {
            const uint8_t *pairs = &rows[ROWS * m + lane / 4][2 * (lane % 4)];
            d[lane] = (uint32_t)(pairs[1] >> 4) << 24 | (uint32_t)(pairs[1] & 0xf) << 16 |
                      (uint32_t)(pairs[0] >> 4) << 8 | (pairs[0] & 0xf);
        }
    }
}

/* Byte b of register m, of lane 4 * g + t, goes to byte g + 8 * (b / 2) of the row that lane
 * 8 * m + 2 * t + b % 2 names: four accumulators of a lane, narrowed in order, are stored
 * transposed. */
static void execute_stmatrix_m16n8(struct warp *warp, const struct instruction *in, lanes active)
{
    const int count = matrices_of(in);
    uint64_t address[LANES];
    if (!is_whole(warp, in, active))
        return;
    read_addresses(warp, in, 0, ROWS * count, address);
    for (int row = 0; row < ROWS * count; row++) {
        const uint32_t *words = r32(warp, in, 1 + row / ROWS);
        uint8_t *to = write_shared(warp, in, row, address[row], ROW_BYTES);
        if (!to)
            return;
        for (int i = 0; i < ROW_BYTES; i++) {
            const int lane = 4 * (i % 8) + row % ROWS / 2, byte = row % 2 + 2 * (i / 8);
            to[i] = (uint8_t)(words[lane] >> 8 * byte);
        }
    }
}

/* ---- the table ------------------------------------------------------------------------------ */

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

#define LDMATRIX_M16N16(space, count, registers)                                                   \
    {"ldmatrix.sync.aligned.m16n16.x" #count ".trans" space ".b8", "W" #registers " [",            \
     execute_ldmatrix_m16n16, KIND_LDMATRIX, MOVE_DETAIL(count, 1)},

#define LDMATRIX_B4X16(space, count)                                                               \
    {"ldmatrix.sync.aligned.m8n16.x" #count space ".b8x16.b4x16_p64", "W" #count " [",             \
     execute_ldmatrix_b4x16, KIND_LDMATRIX, MOVE_DETAIL(count, 0)},

#define STMATRIX_M16N8(space, count)                                                               \
    {"stmatrix.sync.aligned.m16n8.x" #count ".trans" space ".b8", "[ w" #count,                    \
     execute_stmatrix_m16n8, KIND_STMATRIX, MOVE_DETAIL(count, 1)},

#define BYTE_MOVES(space)                                                                          \
    LDMATRIX_M16N16(space, 1, 2)                                                                   \
    LDMATRIX_M16N16(space, 2, 4)                                                                   \
    LDMATRIX_B4X16(space, 1)                                                                       \
    LDMATRIX_B4X16(space, 2)                                                                       \
    LDMATRIX_B4X16(space, 4)                                                                       \
    STMATRIX_M16N8(space, 1)                                                                       \
    STMATRIX_M16N8(space, 2)                                                                       \
    STMATRIX_M16N8(space, 4)

/* clang-format off */
const struct opcode MATRIX_OPCODES[] = {
    MOVES(LDMATRIX, ".shared")
    MOVES(LDMATRIX, ".shared::cta")
    MOVES(STMATRIX, ".shared")
    MOVES(STMATRIX, ".shared::cta")
    BYTE_MOVES(".shared")
    BYTE_MOVES(".shared::cta")
    {"movmatrix.sync.aligned.m8n8.trans.b16", "W w", execute_movmatrix, KIND_SHUFFLE, 0},
    {NULL, NULL, NULL, KIND_COUNT, 0},
};
/* clang-format on */
