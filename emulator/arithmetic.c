/* What lanes compute each for itself: moves, integers, comparisons, conversions, floats.
 *
 * A family of opcodes is a list of lines such as
 *
 *     X(2, "and.b32", and_b32, INTEGER, u32, u32, u32, a & b)
 *
 * how many sources, name, handler, kind, types of the destination and of the sources a, b ..., and
 * the result. It is read twice: X = DEFINE makes the handlers, X = ROW the rows of the table. ALSO
 * instead of a number adds the name of another opcode that does the same.
 *
 * NaNs are the GPU's: arithmetic makes only one, 0x7fffffff (0x7fff for 16 bits), and never looks
 * at a payload. */
#include "emulator.h"
#include "floats.h"

#include <math.h>

/* ---- pairs of small floats ------------------------------------------------------------------ */

INLINE uint32_t narrow2(struct format f, float high, float low)
{
    return narrow(f, high) << (1 + f.exponent + f.mantissa) | narrow(f, low);
}

/* Two small floats of `from` as two of `to`. */
INLINE uint32_t convert2(struct format to, struct format from, uint32_t pair)
{
    return narrow2(to, widen(from, pair >> (1 + from.exponent + from.mantissa)), widen(from, pair));
}

INLINE uint32_t relu2(uint32_t halves)
{
    const uint32_t high = halves >> 31 ? 0 : halves & 0xffff0000;
    return high | (halves >> 15 & 1 ? 0 : halves & 0xffff);
}

/* The power of two that |a| is cut to, or rounded up to: its exponent as 8 bits. */
INLINE uint32_t to_ue8m0(float a, bool is_up, bool is_finite)
{
    const uint32_t magnitude = bits_of(a) & 0x7fffffff, exponent = magnitude >> 23;
    const bool is_between = (magnitude & 0x7fffff) && magnitude > 0x400000; /* 2^-127 is 0 */
    const uint32_t power = exponent + (is_up && is_between && magnitude < 0x7f800000);
    return is_finite && magnitude <= 0x7f800000 && power == 0xff ? 0xfe : power;
}

INLINE uint32_t ue8m0_to_bf16(uint32_t power)
{
    return power == 0xff ? 0x7fff : power == 0 ? 0x0040 : power << 7;
}

/* ---- types ---------------------------------------------------------------------------------- */

/* A type: how many a lane has in a register, its element in warp->values, the C type to compute
 * in, and the way there and back. 8 and 16 bits are kept zero-extended, a converted s8 as s16; a
 * b8 is a register of 8 bits.
 * ftz is f32 whose subnormals are zeros. */
#define TYPES(X)                                                                                   \
    X(b8, 1, uint32_t, uint32_t, bits, (uint8_t)value)                                             \
    X(s8, 1, uint32_t, int32_t, (int8_t)bits, (uint16_t)(int8_t)value)                             \
    X(u8, 1, uint32_t, uint32_t, (uint8_t)bits, (uint8_t)value)                                    \
    X(s16, 1, uint32_t, int32_t, (int16_t)bits, (uint16_t)value)                                   \
    X(u16, 1, uint32_t, uint32_t, bits, (uint16_t)value)                                           \
    X(s32, 1, uint32_t, int32_t, (int32_t)bits, (uint32_t)value)                                   \
    X(u32, 1, uint32_t, uint32_t, bits, value)                                                     \
    X(s64, 1, uint64_t, int64_t, (int64_t)bits, (uint64_t)value)                                   \
    X(u64, 1, uint64_t, uint64_t, bits, value)                                                     \
    X(f32, 1, float, float, bits, canonical(value))                                                \
    X(ftz, 1, float, float, flush(bits), flush(canonical(value)))                                  \
    X(f32x2, 2, float, float, bits, canonical(value))                                              \
    X(f16, 1, uint32_t, float, widen(F16_FORMAT, bits), narrow(F16_FORMAT, value))                 \
    X(bf16, 1, uint32_t, float, widen(BF16_FORMAT, bits), narrow(BF16_FORMAT, value))              \
    X(f16x2, 2, uint16_t, float, widen(F16_FORMAT, bits), (uint16_t)narrow(F16_FORMAT, value))     \
    X(bf16x2, 2, uint16_t, float, widen(BF16_FORMAT, bits), (uint16_t)narrow(BF16_FORMAT, value))

#define DEFINE_TYPE(T, per_lane, slot_type, value_type, load, store)                               \
    enum { PER_LANE_##T = per_lane };                                                              \
    typedef slot_type slot_##T;                                                                    \
    typedef value_type value_##T;                                                                  \
    INLINE value_##T load_##T(slot_##T bits) { return load; }                                      \
    INLINE slot_##T store_##T(value_##T value) { return store; }

TYPES(DEFINE_TYPE)

/* The letters of a type's register in opcode.operands. */
#define IN_b8      "b"
#define IN_s8      "h"
#define IN_u8      "h"
#define IN_s16     "h"
#define IN_u16     "h"
#define IN_s32     "w"
#define IN_u32     "w"
#define IN_s64     "d"
#define IN_u64     "d"
#define IN_f32     "w"
#define IN_ftz     "w"
#define IN_f32x2   "d"
#define IN_f16     "h"
#define IN_bf16    "h"
#define IN_f16x2   "w"
#define IN_bf16x2  "w"
#define OUT_b8     "B"
#define OUT_s8     "H"
#define OUT_u8     "H"
#define OUT_s16    "H"
#define OUT_u16    "H"
#define OUT_s32    "W"
#define OUT_u32    "W"
#define OUT_s64    "D"
#define OUT_u64    "D"
#define OUT_f32    "W"
#define OUT_ftz    "W"
#define OUT_f32x2  "D"
#define OUT_f16    "H"
#define OUT_bf16   "H"
#define OUT_f16x2  "W"
#define OUT_bf16x2 "W"

/* ---- what makes handlers and rows ----------------------------------------------------------- */

#define DEFINE(form, ...) DEFINE_##form(__VA_ARGS__)
#define ROW(form, ...)    ROW_##form(__VA_ARGS__)

#define HANDLER(id) static void id(struct warp *warp, const struct instruction *in, lanes active)

#define SLOTS(T, number) ((slot_##T *)warp->values[in->operand[number].slot])

/* A source's elements, and the value of element i. */
#define SOURCE(a, T, number) const slot_##T *const a##_slots = SLOTS(T, number)
#define LOAD(a, T)           const value_##T a = load_##T(a##_slots[i])

/* The destination may be a source, too, but then element by element. */
#define FOR_ELEMENTS(T) _Pragma("GCC ivdep") for (int i = 0; i < PER_LANE_##T * LANES; i++)

/* Element i of the destination, where its lane is active. All values are there before one is
 * chosen, and the bit of the lane is no bool: only so do the loops become vector instructions. */
#define STORE(T, value)                                                                            \
    const slot_##T result = store_##T(value), old = d_slots[i];                                    \
    d_slots[i] = active >> (i / PER_LANE_##T) & 1 ? result : old

#define DEFINE_HANDLER(id, D, sources, loads, value)                                               \
    HANDLER(id)                                                                                    \
    {                                                                                              \
        slot_##D *const d_slots = SLOTS(D, 0);                                                     \
        sources;                                                                                   \
        FOR_ELEMENTS(D)                                                                            \
        {                                                                                          \
            loads;                                                                                 \
            STORE(D, value);                                                                       \
        }                                                                                          \
    }

#define SOURCES_1(A) SOURCE(a, A, 1)
#define SOURCES_2(A, B)                                                                            \
    SOURCES_1(A);                                                                                  \
    SOURCE(b, B, 2)
#define SOURCES_3(A, B, C)                                                                         \
    SOURCES_2(A, B);                                                                               \
    SOURCE(c, C, 3)
#define SOURCES_4(A, B, C, E)                                                                      \
    SOURCES_3(A, B, C);                                                                            \
    SOURCE(e, E, 4)
#define LOADS_1(A) LOAD(a, A)
#define LOADS_2(A, B)                                                                              \
    LOADS_1(A);                                                                                    \
    LOAD(b, B)
#define LOADS_3(A, B, C)                                                                           \
    LOADS_2(A, B);                                                                                 \
    LOAD(c, C)
#define LOADS_4(A, B, C, E)                                                                        \
    LOADS_3(A, B, C);                                                                              \
    LOAD(e, E)

#define DEFINE_1(name, id, kind, D, A, value) DEFINE_HANDLER(id, D, SOURCES_1(A), LOADS_1(A), value)
#define DEFINE_2(name, id, kind, D, A, B, value)                                                   \
    DEFINE_HANDLER(id, D, SOURCES_2(A, B), LOADS_2(A, B), value)
#define DEFINE_3(name, id, kind, D, A, B, C, value)                                                \
    DEFINE_HANDLER(id, D, SOURCES_3(A, B, C), LOADS_3(A, B, C), value)
#define DEFINE_4(name, id, kind, D, A, B, C, E, value)                                             \
    DEFINE_HANDLER(id, D, SOURCES_4(A, B, C, E), LOADS_4(A, B, C, E), value)

#define ROW_1(name, id, kind, D, A, value) {name, OUT_##D " " IN_##A, id, KIND_##kind, 0},
#define ROW_2(name, id, kind, D, A, B, value)                                                      \
    {name, OUT_##D " " IN_##A " " IN_##B, id, KIND_##kind, 0},
#define ROW_3(name, id, kind, D, A, B, C, value)                                                   \
    {name, OUT_##D " " IN_##A " " IN_##B " " IN_##C, id, KIND_##kind, 0},
#define ROW_4(name, id, kind, D, A, B, C, E, value)                                                \
    {name, OUT_##D " " IN_##A " " IN_##B " " IN_##C " " IN_##E, id, KIND_##kind, 0},

#define DEFINE_ALSO(name, id, kind, operands)
#define ROW_ALSO(name, id, kind, operands) {name, operands, id, KIND_##kind, 0},

/* Division, which faults where the GPU's result is anyone's guess. */
#define DEFINE_DIVISION(name, id, T, least, value)                                                 \
    HANDLER(id)                                                                                    \
    {                                                                                              \
        slot_##T *const d_slots = SLOTS(T, 0);                                                     \
        SOURCES_2(T, T);                                                                           \
        for (int i = 0; i < LANES; i++) {                                                          \
            LOADS_2(T, T);                                                                         \
            if (!has_lane(active, i))                                                              \
                continue;                                                                          \
            if (b == 0)                                                                            \
                return fault(warp, in, 1u << i, "division by zero");                               \
            if (least && a == (value_##T)least && ~b == 0)                                         \
                return fault(warp, in, 1u << i, "the quotient is out of range");                   \
            d_slots[i] = store_##T(value);                                                         \
        }                                                                                          \
    }
#define ROW_DIVISION(name, id, T, least, value) ROW_2(name, id, INTEGER, T, T, T, value)

/* ---- predicates ----------------------------------------------------------------------------- */

/* Sets a predicate, operand 0, in the active lanes. */
static inline void set_predicate(struct warp *warp, const struct instruction *in, lanes active,
                                 lanes set)
{
    lanes *destination = predicate(warp, in, 0);
    *destination = (*destination & ~active) | (set & active);
}

/* All lanes at once. */
#define DEFINE_SETS_1(name, id, kind, value)                                                       \
    HANDLER(id)                                                                                    \
    {                                                                                              \
        const lanes a = *predicate(warp, in, 1);                                                   \
        set_predicate(warp, in, active, value);                                                    \
    }
#define DEFINE_SETS_2(name, id, kind, value)                                                       \
    HANDLER(id)                                                                                    \
    {                                                                                              \
        const lanes a = *predicate(warp, in, 1), b = *predicate(warp, in, 2);                      \
        set_predicate(warp, in, active, value);                                                    \
    }
#define ROW_SETS_1(name, id, kind, value) {name, "P p", id, KIND_##kind, 0},
#define ROW_SETS_2(name, id, kind, value) {name, "P p p", id, KIND_##kind, 0},

#define PREDICATES(X)                                                                              \
    X(SETS_1, "mov.pred", mov_pred, MOVE, a)                                                       \
    X(SETS_1, "not.pred", not_pred, INTEGER, ~a)                                                   \
    X(SETS_2, "and.pred", and_pred, INTEGER, (a & b))                                              \
    X(SETS_2, "or.pred", or_pred, INTEGER, a | b)                                                  \
    X(SETS_2, "xor.pred", xor_pred, INTEGER, a ^ b)

PREDICATES(DEFINE)

/* setp, alone or combined with a predicate: setp.lt.and.s32 p, a, b, q. */
static inline void set_compared(struct warp *warp, const struct instruction *in, lanes active,
                                lanes set)
{
    switch (in->opcode->detail) {
    case '&': set &= *predicate(warp, in, 3); break;
    case '|': set |= *predicate(warp, in, 3); break;
    case '^': set ^= *predicate(warp, in, 3); break;
    }
    set_predicate(warp, in, active, set);
}

#define DEFINE_COMPARE(name, id, kind, T, value)                                                   \
    HANDLER(id)                                                                                    \
    {                                                                                              \
        SOURCES_2(T, T);                                                                           \
        lanes set = 0;                                                                             \
        FOR_ELEMENTS(T)                                                                            \
        {                                                                                          \
            LOADS_2(T, T);                                                                         \
            set |= (lanes)(value) << i;                                                            \
        }                                                                                          \
        set_compared(warp, in, active, set);                                                       \
    }
#define ROW_COMPARE(name, id, kind, T, value) {name, "P " IN_##T " " IN_##T, id, KIND_##kind, 0},
#define DEFINE_COMBINED(name, id, kind, T, detail)
#define ROW_COMBINED(name, id, kind, T, detail)                                                    \
    {name, "P " IN_##T " " IN_##T " p", id, KIND_##kind, detail},

#define COMPARED(X, op, type, id, kind, T, value)                                                  \
    X(COMPARE, "setp" op type, id, kind, T, value)                                                 \
    X(COMBINED, "setp" op ".and" type, id, kind, T, '&')                                           \
    X(COMBINED, "setp" op ".or" type, id, kind, T, '|')                                            \
    X(COMBINED, "setp" op ".xor" type, id, kind, T, '^')

#define COMPARE_BITS(X, W)                                                                         \
    COMPARED(X, ".eq", ".b" #W, eq_b##W, INTEGER, u##W, a == b)                                    \
    COMPARED(X, ".ne", ".b" #W, ne_b##W, INTEGER, u##W, a != b)

#define COMPARE_INTEGERS(X, T)                                                                     \
    COMPARED(X, ".eq", "." #T, eq_##T, INTEGER, T, a == b)                                         \
    COMPARED(X, ".ne", "." #T, ne_##T, INTEGER, T, a != b)                                         \
    COMPARED(X, ".lt", "." #T, lt_##T, INTEGER, T, a < b)                                          \
    COMPARED(X, ".le", "." #T, le_##T, INTEGER, T, a <= b)                                         \
    COMPARED(X, ".gt", "." #T, gt_##T, INTEGER, T, a > b)                                          \
    COMPARED(X, ".ge", "." #T, ge_##T, INTEGER, T, a >= b)

#define COMPARE_UNSIGNED(X, T)                                                                     \
    COMPARE_INTEGERS(X, T)                                                                         \
    COMPARED(X, ".lo", "." #T, lo_##T, INTEGER, T, a < b)                                          \
    COMPARED(X, ".ls", "." #T, ls_##T, INTEGER, T, a <= b)                                         \
    COMPARED(X, ".hi", "." #T, hi_##T, INTEGER, T, a > b)                                          \
    COMPARED(X, ".hs", "." #T, hs_##T, INTEGER, T, a >= b)

/* Those with u are true if either is NaN. */
#define COMPARE_FLOATS(X, type, T)                                                                 \
    COMPARED(X, ".eq", type, eq_##T, FLOAT, T, a == b)                                             \
    COMPARED(X, ".ne", type, ne_##T, FLOAT, T, (a < b) | (a > b))                                  \
    COMPARED(X, ".lt", type, lt_##T, FLOAT, T, a < b)                                              \
    COMPARED(X, ".le", type, le_##T, FLOAT, T, a <= b)                                             \
    COMPARED(X, ".gt", type, gt_##T, FLOAT, T, a > b)                                              \
    COMPARED(X, ".ge", type, ge_##T, FLOAT, T, a >= b)                                             \
    COMPARED(X, ".equ", type, equ_##T, FLOAT, T, !((a < b) | (a > b)))                             \
    COMPARED(X, ".neu", type, neu_##T, FLOAT, T, a != b)                                           \
    COMPARED(X, ".ltu", type, ltu_##T, FLOAT, T, !(a >= b))                                        \
    COMPARED(X, ".leu", type, leu_##T, FLOAT, T, !(a > b))                                         \
    COMPARED(X, ".gtu", type, gtu_##T, FLOAT, T, !(a <= b))                                        \
    COMPARED(X, ".geu", type, geu_##T, FLOAT, T, !(a < b))                                         \
    COMPARED(X, ".num", type, num_##T, FLOAT, T, (a == a) & (b == b))                              \
    COMPARED(X, ".nan", type, nan_##T, FLOAT, T, (a != a) | (b != b))

#define COMPARISONS(X)                                                                             \
    COMPARE_BITS(X, 16)                                                                            \
    COMPARE_BITS(X, 32)                                                                            \
    COMPARE_BITS(X, 64)                                                                            \
    COMPARE_INTEGERS(X, s16)                                                                       \
    COMPARE_INTEGERS(X, s32)                                                                       \
    COMPARE_INTEGERS(X, s64)                                                                       \
    COMPARE_UNSIGNED(X, u16)                                                                       \
    COMPARE_UNSIGNED(X, u32)                                                                       \
    COMPARE_UNSIGNED(X, u64)                                                                       \
    COMPARE_FLOATS(X, ".f32", f32)                                                                 \
    COMPARE_FLOATS(X, ".ftz.f32", ftz)                                                             \
    COMPARE_FLOATS(X, ".f16", f16)                                                                 \
    COMPARE_FLOATS(X, ".bf16", bf16)

COMPARISONS(DEFINE)

/* ---- moves ---------------------------------------------------------------------------------- */

/* The type makes no difference, and neither does that between generic and global addresses. */
#define MOVE_ALSO(X, type, W) X(ALSO, "mov." type, mov_b##W, MOVE, OUT_u##W " " IN_u##W)
#define MOVES_OF_WIDTH(X, W)                                                                       \
    X(1, "mov.b" #W, mov_b##W, MOVE, u##W, u##W, a)                                                \
    MOVE_ALSO(X, "u" #W, W)                                                                        \
    MOVE_ALSO(X, "s" #W, W)

#define DEFINE_SELECT(type, W)                                                                     \
    HANDLER(selp_b##W)                                                                             \
    {                                                                                              \
        slot_u##W *const d_slots = SLOTS(u##W, 0);                                                 \
        const lanes chosen = *predicate(warp, in, 3);                                              \
        SOURCES_2(u##W, u##W);                                                                     \
        FOR_ELEMENTS(u##W)                                                                         \
        {                                                                                          \
            LOADS_2(u##W, u##W);                                                                   \
            STORE(u##W, chosen >> i & 1 ? a : b);                                                  \
        }                                                                                          \
    }
#define DEFINE_SELECT_ALSO(type, W)
#define ROW_SELECT(type, W)                                                                        \
    {"selp." type, OUT_u##W " " IN_u##W " " IN_u##W " p", selp_b##W, KIND_MOVE, 0},
#define ROW_SELECT_ALSO ROW_SELECT

#define SELECTS_OF_WIDTH(X, W)                                                                     \
    X(SELECT, "b" #W, W)                                                                           \
    X(SELECT_ALSO, "u" #W, W)                                                                      \
    X(SELECT_ALSO, "s" #W, W)

#define MOVES(X)                                                                                   \
    MOVES_OF_WIDTH(X, 16)                                                                          \
    MOVES_OF_WIDTH(X, 32)                                                                          \
    MOVES_OF_WIDTH(X, 64)                                                                          \
    MOVE_ALSO(X, "f32", 32)                                                                        \
    MOVE_ALSO(X, "f64", 64)                                                                        \
    X(ALSO, "cvta.global.u64", mov_b64, MOVE, "D d")                                               \
    X(ALSO, "cvta.to.global.u64", mov_b64, MOVE, "D d")                                            \
    SELECTS_OF_WIDTH(X, 16)                                                                        \
    SELECTS_OF_WIDTH(X, 32)                                                                        \
    SELECTS_OF_WIDTH(X, 64)                                                                        \
    X(SELECT_ALSO, "f32", 32)                                                                      \
    X(SELECT_ALSO, "f64", 64)

MOVES(DEFINE)

/* mov.b32 %r, {%rs1, %rs2} and the like: the first part is the lowest; opcode.detail its width. */
HANDLER(pack)
{
    const int parts = in->count - 1, width = in->opcode->detail;
    for (int lane = 0; lane < LANES; lane++) {
        uint64_t whole = 0;
        for (int part = 0; part < parts; part++)
            whole |= (uint64_t)r32(warp, in, part + 1)[lane] << part * width;
        if (!has_lane(active, lane))
            continue;
        if (in->operand[0].is_wide)
            r64(warp, in, 0)[lane] = whole;
        else
            r32(warp, in, 0)[lane] = (uint32_t)whole;
    }
}

HANDLER(unpack)
{
    const int parts = in->count - 1, width = in->opcode->detail;
    const uint32_t mask = ALL_LANES >> (32 - width);
    for (int lane = 0; lane < LANES; lane++) {
        const uint64_t whole =
            in->operand[parts].is_wide ? r64(warp, in, parts)[lane] : r32(warp, in, parts)[lane];
        for (int part = 0; part < parts && has_lane(active, lane); part++)
            r32(warp, in, part)[lane] = (uint32_t)(whole >> part * width) & mask;
    }
}

/* ---- integers ------------------------------------------------------------------------------- */

/* Products of twice the width. */
typedef int32_t wide_s16;
typedef uint32_t wide_u16;
typedef int64_t wide_s32;
typedef uint64_t wide_u32;
typedef __int128 wide_s64;
typedef unsigned __int128 wide_u64;

/* What is the same for both signs: its results wrap. */
#define BOTH_2(X, op, id, W, value)                                                                \
    X(2, op ".u" #W, id##W, INTEGER, u##W, u##W, u##W, value)                                      \
    X(ALSO, op ".s" #W, id##W, INTEGER, OUT_u##W " " IN_u##W " " IN_u##W)
#define BOTH_3(X, op, id, W, value)                                                                \
    X(3, op ".u" #W, id##W, INTEGER, u##W, u##W, u##W, u##W, value)                                \
    X(ALSO, op ".s" #W, id##W, INTEGER, OUT_u##W " " IN_u##W " " IN_u##W " " IN_u##W)

/* Shifts take any amount: all bits gone is all they can do. */
#define OF_WIDTH(X, W)                                                                             \
    BOTH_2(X, "add", add_, W, a + b)                                                               \
    BOTH_2(X, "sub", sub_, W, a - b)                                                               \
    BOTH_2(X, "mul.lo", mul_lo_, W, (a * b))                                                       \
    BOTH_3(X, "mad.lo", mad_lo_, W, c + a * b)                                                     \
    X(1, "neg.s" #W, neg_s##W, INTEGER, u##W, u##W, 0 - a)                                         \
    X(1, "abs.s" #W, abs_s##W, INTEGER, u##W, s##W, a < 0 ? 0 - (value_u##W)a : (value_u##W)a)     \
    X(1, "not.b" #W, not_b##W, INTEGER, u##W, u##W, ~a)                                            \
    X(2, "and.b" #W, and_b##W, INTEGER, u##W, u##W, u##W, (a & b))                                 \
    X(2, "or.b" #W, or_b##W, INTEGER, u##W, u##W, u##W, a | b)                                     \
    X(2, "xor.b" #W, xor_b##W, INTEGER, u##W, u##W, u##W, a ^ b)                                   \
    X(2, "shl.b" #W, shl_b##W, INTEGER, u##W, u##W, u32, b < W ? a << b : 0)                       \
    X(2, "shr.b" #W, shr_b##W, INTEGER, u##W, u##W, u32, b < W ? a >> b : 0)                       \
    X(ALSO, "shr.u" #W, shr_b##W, INTEGER, OUT_u##W " " IN_u##W " w")                              \
    X(2, "shr.s" #W, shr_s##W, INTEGER, s##W, s##W, u32, a >> (b < W ? b : W - 1))

#define OF_SIGN(X, T, W, least)                                                                    \
    X(2, "min." #T, min_##T, INTEGER, T, T, T, a < b ? a : b)                                      \
    X(2, "max." #T, max_##T, INTEGER, T, T, T, a > b ? a : b)                                      \
    X(2, "mul.hi." #T, mul_hi_##T, INTEGER, T, T, T, (value_##T)((wide_##T)a * b >> W))            \
    X(DIVISION, "div." #T, div_##T, T, least, a / b)                                               \
    X(DIVISION, "rem." #T, rem_##T, T, least, a % b)

#define WIDENING(X, T, D)                                                                          \
    X(2, "mul.wide." #T, mul_wide_##T, INTEGER, D, T, T, (value_##D)((wide_##T)a * b))             \
    X(3, "mad.wide." #T, mad_wide_##T, INTEGER, D, T, T, D, (value_##D)((wide_##T)a * b) + c)

#define INTEGERS(X)                                                                                \
    OF_WIDTH(X, 16)                                                                                \
    OF_WIDTH(X, 32)                                                                                \
    OF_WIDTH(X, 64)                                                                                \
    OF_SIGN(X, s16, 16, INT16_MIN)                                                                 \
    OF_SIGN(X, u16, 16, 0)                                                                         \
    OF_SIGN(X, s32, 32, INT32_MIN)                                                                 \
    OF_SIGN(X, u32, 32, 0)                                                                         \
    OF_SIGN(X, s64, 64, INT64_MIN)                                                                 \
    OF_SIGN(X, u64, 64, 0)                                                                         \
    WIDENING(X, s16, u32)                                                                          \
    WIDENING(X, u16, u32)                                                                          \
    WIDENING(X, s32, u64)                                                                          \
    WIDENING(X, u32, u64)

INTEGERS(DEFINE)

/* ---- bits of integers ----------------------------------------------------------------------- */

INLINE uint32_t leading_zeros(uint64_t a, uint32_t width)
{
    return a ? (uint32_t)__builtin_clzll(a) - (64 - width) : width;
}

INLINE uint64_t reversed(uint64_t a, int width)
{
    uint64_t reverse = 0;
    for (int bit = 0; bit < width; bit++)
        reverse |= (a >> bit & 1) << (width - 1 - bit);
    return reverse;
}

/* The highest bit that is not the sign's, of a number whose sign has been taken away. */
INLINE uint32_t highest_bit(uint64_t a) { return a ? 63 - leading_zeros(a, 64) : 0xffffffff; }

INLINE uint64_t low_bits(uint32_t count) { return count < 64 ? (1ull << count) - 1 : ~0ull; }

/* How many of the `length` bits from `position` on a number of `width` bits has. */
INLINE uint32_t bits_there(uint32_t position, uint32_t length, uint32_t width)
{
    const uint32_t there = position < width ? width - position : 0;
    return length < there ? length : there;
}

/* Only the low bytes of position and length count. Beyond the number are copies of its sign; of a
 * signed field the highest bit is its sign. */
INLINE uint64_t extract_bits(uint64_t a, uint32_t position, uint32_t length, uint32_t width,
                             bool is_signed)
{
    position &= 0xff, length &= 0xff;
    const uint64_t mask = low_bits(bits_there(position, length, width));
    const uint32_t last = position + length - 1;
    const bool sign = is_signed && length && a >> (last < width ? last : width - 1) & 1;
    return (position < 64 ? a >> position & mask : 0) | (sign ? ~mask : 0);
}

INLINE uint64_t insert_bits(uint64_t a, uint64_t into, uint32_t position, uint32_t length,
                            uint32_t width)
{
    position &= 0xff, length &= 0xff;
    if (position >= width)
        return into;
    const uint64_t mask = low_bits(bits_there(position, length, width)) << position;
    return (into & ~mask) | (a << position & mask);
}

/* Each nibble of the selector picks one of eight bytes, or with its highest bit copies of that
 * byte's sign. */
INLINE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector)
{
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t permuted = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t nibble = selector >> 4 * i;
        const int8_t byte = (int8_t)(bytes >> 8 * (nibble & 7));
        permuted |= (uint32_t)(uint8_t)(nibble & 8 ? byte >> 7 : byte) << 8 * i;
    }
    return permuted;
}

INLINE uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t amount)
{
    return (uint32_t)(((uint64_t)high << 32 | low) << amount >> 32);
}

INLINE uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t amount)
{
    return (uint32_t)(((uint64_t)high << 32 | low) >> amount);
}

#define BITS_OF_WIDTH(X, W)                                                                        \
    X(1, "popc.b" #W, popc_b##W, INTEGER, u32, u##W, (uint32_t)__builtin_popcountll(a))            \
    X(1, "clz.b" #W, clz_b##W, INTEGER, u32, u##W, leading_zeros(a, W))                            \
    X(1, "brev.b" #W, brev_b##W, INTEGER, u##W, u##W, (value_u##W)reversed(a, W))                  \
    X(1, "bfind.u" #W, bfind_u##W, INTEGER, u32, u##W, highest_bit(a))                             \
    X(1, "bfind.s" #W, bfind_s##W, INTEGER, u32, s##W, highest_bit((value_u##W)(a < 0 ? ~a : a)))  \
    X(1, "bfind.shiftamt.u" #W, bfind_shiftamt_u##W, INTEGER, u32, u##W,                           \
      a ? leading_zeros(a, W) : 0xffffffff)                                                        \
    X(3, "bfe.u" #W, bfe_u##W, INTEGER, u##W, u##W, u32, u32,                                      \
      (value_u##W)extract_bits(a, b, c, W, false))                                                 \
    X(3, "bfe.s" #W, bfe_s##W, INTEGER, u##W, u##W, u32, u32,                                      \
      (value_u##W)extract_bits(a, b, c, W, true))                                                  \
    X(4, "bfi.b" #W, bfi_b##W, INTEGER, u##W, u##W, u##W, u32, u32,                                \
      (value_u##W)insert_bits(a, b, c, e, W))

#define BITS(X)                                                                                    \
    BITS_OF_WIDTH(X, 32)                                                                           \
    BITS_OF_WIDTH(X, 64)                                                                           \
    X(3, "prmt.b32", prmt_b32, INTEGER, u32, u32, u32, u32, permute_bytes(a, b, c))                \
    X(3, "shf.l.wrap.b32", shf_l_wrap, INTEGER, u32, u32, u32, u32, funnel_left(a, b, c & 31))     \
    X(3, "shf.r.wrap.b32", shf_r_wrap, INTEGER, u32, u32, u32, u32, funnel_right(a, b, c & 31))    \
    X(3, "shf.l.clamp.b32", shf_l_clamp, INTEGER, u32, u32, u32, u32,                              \
      funnel_left(a, b, c < 32 ? c : 32))                                                          \
    X(3, "shf.r.clamp.b32", shf_r_clamp, INTEGER, u32, u32, u32, u32,                              \
      funnel_right(a, b, c < 32 ? c : 32))

BITS(DEFINE)

/* Bit i of the table, operand 4, is the result for bits a b c that spell i. */
HANDLER(lop3_b32)
{
    uint32_t *const d_slots = SLOTS(u32, 0);
    const uint32_t table = (uint32_t)in->operand[4].offset;
    SOURCES_3(u32, u32, u32);
    FOR_ELEMENTS(u32)
    {
        LOADS_3(u32, u32, u32);
        uint32_t result_bits = 0;
        for (int row = 0; row < 8; row++) {
            const uint32_t here = (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
            result_bits |= here & -(table >> row & 1);
        }
        STORE(u32, result_bits);
    }
}

/* ---- floats --------------------------------------------------------------------------------- */

/* The other operand for a NaN; -0 is less than +0. */
INLINE float smaller(float a, float b)
{
    const float least = a < b ? a : b;
    const float ordered = a == b ? float_of(bits_of(a) | bits_of(b)) : least;
    return b != b ? a : ordered;
}

INLINE float greater(float a, float b) { return -smaller(-a, -b); }

INLINE float smaller_or_nan(float a, float b) { return a != a ? a : b != b ? b : smaller(a, b); }

INLINE float greater_or_nan(float a, float b) { return -smaller_or_nan(-a, -b); }

INLINE float relu(float a) { return a > 0 || a != a ? a : 0; }

/* a * b + c to odd: of the two floats around it the one with the odd mantissa. It says enough for
 * the rounding to a small format that follows to be the only one. */
INLINE float fma_to_odd(float a, float b, float c)
{
    const double product = (double)a * b, sum = product + c; /* the product is exact */
    const double other = sum - product, lost = (product - (sum - other)) + (c - other);
    const float near = (float)sum;
    const double error = (sum - near) + lost; /* only its sign counts */
    const uint32_t bits = bits_of(near), step = (error > 0) == !(bits >> 31) ? 1 : -1u;
    return float_of((error > 0 || error < 0) && !(bits & 1) ? bits + step : bits);
}

/* 2^x = 2^n 2^f, n an integer and |f| <= 1/2: the Taylor series of 2^f. */
INLINE float exp2_approx(float x)
{
    const float from_below = x < -160 ? -160 : x, clamped = from_below > 130 ? 130 : from_below;
    const float n = rintf(clamped != clamped ? 0 : clamped), f = clamped - n;
    float sum = 1.5252734e-5f; /* ln(2)^7 / 7! */
    sum = fmaf(sum, f, 1.5403530e-4f);
    sum = fmaf(sum, f, 1.3333558e-3f);
    sum = fmaf(sum, f, 9.6181291e-3f);
    sum = fmaf(sum, f, 5.5504109e-2f);
    sum = fmaf(sum, f, 2.4022651e-1f);
    sum = fmaf(sum, f, 6.9314718e-1f);
    sum = fmaf(sum, f, 1);
    const int half = (int)n >> 1, rest = (int)n - half; /* 2^n itself may be out of range */
    return sum * float_of((uint32_t)(127 + half) << 23) * float_of((uint32_t)(127 + rest) << 23);
}

INLINE float rsqrt_approx(float a) { return (float)(1 / sqrt((double)a)); }

/* The reciprocal of a large divisor is lost. */
INLINE float div_approx(float a, float b)
{
    const float magnitude = fabsf(b);
    return magnitude > 0x1p126f && magnitude < INFINITY ? a * copysignf(0, b) : a / b;
}

/* Operands of one type; the name without a rounding means to nearest even, too. */
#define FLOAT_1(X, name, id, T, value) X(1, name, id##_##T, FLOAT, T, T, value)
#define FLOAT_2(X, name, id, T, value) X(2, name, id##_##T, FLOAT, T, T, T, value)
#define FLOAT_3(X, name, id, T, value) X(3, name, id##_##T, FLOAT, T, T, T, T, value)
#define NEAREST_2(X, op, type, id, T, value)                                                       \
    FLOAT_2(X, op type, id, T, value)                                                              \
    X(ALSO, op ".rn" type, id##_##T, FLOAT, OUT_##T " " IN_##T " " IN_##T)
#define SPECIAL_1(X, name, id, T, value) X(1, name, id##_##T, SPECIAL, T, T, value)
#define SPECIAL_2(X, name, id, T, value) X(2, name, id##_##T, SPECIAL, T, T, T, value)

#define SUMS(X, type, T, fused)                                                                    \
    NEAREST_2(X, "add", type, add, T, a + b)                                                       \
    NEAREST_2(X, "sub", type, sub, T, a - b)                                                       \
    NEAREST_2(X, "mul", type, mul, T, (a * b))                                                     \
    FLOAT_3(X, "fma.rn" type, fma, T, fused(a, b, c))

#define EXTREMES(X, ftz, type, T)                                                                  \
    FLOAT_1(X, "neg" ftz type, neg, T, -a)                                                         \
    FLOAT_1(X, "abs" ftz type, abs, T, fabsf(a))                                                   \
    FLOAT_2(X, "min" ftz type, min, T, smaller(a, b))                                              \
    FLOAT_2(X, "max" ftz type, max, T, greater(a, b))                                              \
    FLOAT_2(X, "min" ftz ".NaN" type, min_nan, T, smaller_or_nan(a, b))                            \
    FLOAT_2(X, "max" ftz ".NaN" type, max_nan, T, greater_or_nan(a, b))

/* Of three operands, fp32 alone. */
#define EXTREMES_OF_3(X, ftz, T)                                                                   \
    FLOAT_3(X, "min" ftz ".f32", min3, T, smaller(smaller(a, b), c))                               \
    FLOAT_3(X, "max" ftz ".f32", max3, T, greater(greater(a, b), c))

#define SMALL_FLOATS(X, type, T)                                                                   \
    SUMS(X, type, T, fma_to_odd)                                                                   \
    FLOAT_3(X, "fma.rn.relu" type, fma_relu, T, relu(fma_to_odd(a, b, c)))                         \
    EXTREMES(X, "", type, T)                                                                       \
    SPECIAL_1(X, "tanh.approx" type, tanh, T, tanhf(a))

#define SPECIALS(X, type, T)                                                                       \
    SPECIAL_2(X, "div.rn" type, div_rn, T, a / b)                                                  \
    SPECIAL_2(X, "div.full" type, div_full, T, a / b)                                              \
    SPECIAL_2(X, "div.approx" type, div_approx, T, div_approx(a, b))                               \
    SPECIAL_1(X, "rcp.rn" type, rcp_rn, T, 1 / a)                                                  \
    SPECIAL_1(X, "rcp.approx" type, rcp_approx, T, 1 / a)                                          \
    SPECIAL_1(X, "sqrt.rn" type, sqrt_rn, T, sqrtf(a))                                             \
    SPECIAL_1(X, "sqrt.approx" type, sqrt_approx, T, sqrtf(a))                                     \
    SPECIAL_1(X, "rsqrt.approx" type, rsqrt, T, rsqrt_approx(a))                                   \
    SPECIAL_1(X, "ex2.approx" type, ex2, T, exp2_approx(a))                                        \
    SPECIAL_1(X, "lg2.approx" type, lg2, T, log2f(a))                                              \
    SPECIAL_1(X, "sin.approx" type, sin, T, sinf(a))                                               \
    SPECIAL_1(X, "cos.approx" type, cos, T, cosf(a))

#define FLOATS(X)                                                                                  \
    SUMS(X, ".f32", f32, fmaf)                                                                     \
    SUMS(X, ".ftz.f32", ftz, fmaf)                                                                 \
    SUMS(X, ".f32x2", f32x2, fmaf)                                                                 \
    EXTREMES(X, "", ".f32", f32)                                                                   \
    EXTREMES(X, ".ftz", ".f32", ftz)                                                               \
    EXTREMES_OF_3(X, "", f32)                                                                      \
    EXTREMES_OF_3(X, ".ftz", ftz)                                                                  \
    SPECIALS(X, ".f32", f32)                                                                       \
    SPECIALS(X, ".ftz.f32", ftz)                                                                   \
    SPECIAL_1(X, "tanh.approx.f32", tanh, f32, tanhf(a))                                           \
    X(2, "copysign.f32", copysign_f32, FLOAT, u32, u32, u32, (a & 0x80000000) | (b & 0x7fffffff))  \
    SMALL_FLOATS(X, ".f16", f16)                                                                   \
    SMALL_FLOATS(X, ".bf16", bf16)                                                                 \
    SMALL_FLOATS(X, ".f16x2", f16x2)                                                               \
    SMALL_FLOATS(X, ".bf16x2", bf16x2)                                                             \
    SPECIAL_1(X, "ex2.approx.f16", ex2, f16, exp2_approx(a))                                       \
    SPECIAL_1(X, "ex2.approx.f16x2", ex2, f16x2, exp2_approx(a))                                   \
    SPECIAL_1(X, "ex2.approx.ftz.bf16", ex2, bf16, flush(exp2_approx(flush(a))))                   \
    SPECIAL_1(X, "ex2.approx.ftz.bf16x2", ex2, bf16x2, flush(exp2_approx(flush(a))))

FLOATS(DEFINE)

/* ---- conversions ---------------------------------------------------------------------------- */

/* A float that is an integer already, or not finite: what does not fit becomes the nearest that
 * does; of NaN 32 bits make 0, and 64 bits their highest bit. */
#define DEFINE_TO_INTEGER(T, least, bound, largest, of_nan)                                        \
    INLINE value_##T to_##T(float a)                                                               \
    {                                                                                              \
        return a != a                ? of_nan                                                      \
               : a >= bound          ? largest                                                     \
               : a <= (float)(least) ? least                                                       \
                                     : (value_##T)a;                                               \
    }
DEFINE_TO_INTEGER(s32, INT32_MIN, 0x1p31f, INT32_MAX, 0)
DEFINE_TO_INTEGER(u32, 0, 0x1p32f, UINT32_MAX, 0)
DEFINE_TO_INTEGER(s64, INT64_MIN, 0x1p63f, INT64_MAX, INT64_MIN)
DEFINE_TO_INTEGER(u64, 0, 0x1p64f, UINT64_MAX, 1ull << 63)

/* Towards zero, minus or plus infinity: from the nearest float a step, where that is beyond. */
INLINE float from_integer(__int128 exact, char towards)
{
    const bool is_up = towards == 'p' || (towards == 'z' && exact < 0);
    const float nearest = (float)exact;
    const __int128 error = (__int128)nearest - exact;
    if (is_up ? error < 0 : error > 0)
        return nextafterf(nearest, is_up ? INFINITY : -INFINITY);
    return nearest;
}

/* Integers: cut off or extended, as the source's sign says. */
#define CVT_TO(X, D, A)                                                                            \
    X(1, "cvt.u" #D "." #A, cvt_u##D##_##A, CONVERT, u##D, A, (value_u##D)a)                       \
    X(ALSO, "cvt.s" #D "." #A, cvt_u##D##_##A, CONVERT, OUT_u##D " " IN_##A)
#define CVT_INTEGERS(X, A)                                                                         \
    X(1, "cvt.u8." #A, cvt_u8_##A, CONVERT, u8, A, (value_u8)a)                                    \
    X(1, "cvt.s8." #A, cvt_s8_##A, CONVERT, s8, A, (value_s8)a)                                    \
    CVT_TO(X, 16, A)                                                                               \
    CVT_TO(X, 32, A)                                                                               \
    CVT_TO(X, 64, A)

/* The low bits of a register that is wider than the type. */
#define CVT_LOW_BITS(X, W, type, C)                                                                \
    X(1, "cvt.u" #W "." type, cvt_u##W##_of_##C, CONVERT, u##W, u##W, (value_u##W)(C)a)            \
    X(ALSO, "cvt.s" #W "." type, cvt_u##W##_of_##C, CONVERT, OUT_u##W " " IN_u##W)

#define CVT_TO_INTEGER(X, mode, round, T)                                                          \
    X(1, "cvt." #mode "." #T ".f32", cvt_##mode##_##T##_f32, CONVERT, T, f32, to_##T(round(a)))    \
    X(1, "cvt." #mode ".ftz." #T ".f32", cvt_##mode##_##T##_ftz, CONVERT, T, ftz,                  \
      to_##T(round(a)))                                                                            \
    X(ALSO, "cvt." #mode ".sat." #T ".f32", cvt_##mode##_##T##_f32, CONVERT, OUT_##T " w")         \
    X(ALSO, "cvt." #mode ".ftz.sat." #T ".f32", cvt_##mode##_##T##_ftz, CONVERT, OUT_##T " w")

#define CVT_ROUNDED(X, mode, round)                                                                \
    CVT_TO_INTEGER(X, mode, round, s32)                                                            \
    CVT_TO_INTEGER(X, mode, round, u32)                                                            \
    CVT_TO_INTEGER(X, mode, round, s64)                                                            \
    CVT_TO_INTEGER(X, mode, round, u64)                                                            \
    X(1, "cvt." #mode ".f32.f32", cvt_##mode##_f32, CONVERT, f32, f32, round(a))                   \
    X(1, "cvt." #mode ".ftz.f32.f32", cvt_##mode##_ftz, CONVERT, ftz, ftz, round(a))

#define CVT_FROM_INTEGER(X, A)                                                                     \
    X(1, "cvt.rn.f32." #A, cvt_rn_f32_##A, CONVERT, f32, A, (float)a)                              \
    X(1, "cvt.rz.f32." #A, cvt_rz_f32_##A, CONVERT, f32, A, from_integer(a, 'z'))                  \
    X(1, "cvt.rm.f32." #A, cvt_rm_f32_##A, CONVERT, f32, A, from_integer(a, 'm'))                  \
    X(1, "cvt.rp.f32." #A, cvt_rp_f32_##A, CONVERT, f32, A, from_integer(a, 'p'))

/* Of two floats the first goes to the upper half. */
#define CVT_SMALL(X, type, T, format)                                                              \
    X(1, "cvt.rn." type ".f32", cvt_rn_##T##_f32, CONVERT, T, f32, a)                              \
    X(1, "cvt.rn.relu." type ".f32", cvt_rn_relu_##T##_f32, CONVERT, T, f32, relu(a))              \
    X(1, "cvt.f32." type, cvt_f32_##T, CONVERT, f32, T, a)                                         \
    X(2, "cvt.rn." type "x2.f32", cvt_rn_##T##x2_f32, CONVERT, u32, f32, f32,                      \
      narrow2(format, a, b))                                                                       \
    X(2, "cvt.rn.relu." type "x2.f32", cvt_rn_relu_##T##x2_f32, CONVERT, u32, f32, f32,            \
      narrow2(format, relu(a), relu(b)))

/* From floats or halves to two of a small format, a register D, and back to halves. */
#define CVT_PAIR(X, type, D, format, relu_, C, clamp, clamp2)                                      \
    X(2, "cvt.rn.satfinite" relu_ "." #type ".f32", cvt_##C##type##_f32, CONVERT, D, f32, f32,     \
      narrow2(format, clamp(a), clamp(b)))                                                         \
    X(1, "cvt.rn.satfinite" relu_ "." #type ".f16x2", cvt_##C##type##_f16x2, CONVERT, D, u32,      \
      narrow2(format, clamp(widen(F16_FORMAT, a >> 16)), clamp(widen(F16_FORMAT, a))))             \
    X(1, "cvt.rn" relu_ ".f16x2." #type, cvt_##C##f16x2_##type, CONVERT, u32, D,                   \
      clamp2(convert2(F16_FORMAT, format, a)))

#define CVT_PAIRS(X, type, D, format)                                                              \
    CVT_PAIR(X, type, D, format, "", , , )                                                         \
    CVT_PAIR(X, type, D, format, ".relu", relu_, relu, relu2)

#define CVT_UE8M0(X, mode, is_up, finite, C, is_finite)                                            \
    X(2, "cvt." #mode finite ".ue8m0x2.f32", cvt_##mode##_##C##ue8m0x2_f32, CONVERT, u16, f32,     \
      f32, to_ue8m0(a, is_up, is_finite) << 8 | to_ue8m0(b, is_up, is_finite))                     \
    X(1, "cvt." #mode finite ".ue8m0x2.bf16x2", cvt_##mode##_##C##ue8m0x2_bf16x2, CONVERT, u16,    \
      u32,                                                                                         \
      to_ue8m0(float_of(a & 0xffff0000), is_up, is_finite) << 8 |                                  \
          to_ue8m0(float_of(a << 16), is_up, is_finite))

#define CONVERSIONS(X)                                                                             \
    CVT_INTEGERS(X, s8)                                                                            \
    CVT_INTEGERS(X, u8)                                                                            \
    CVT_INTEGERS(X, s16)                                                                           \
    CVT_INTEGERS(X, u16)                                                                           \
    CVT_INTEGERS(X, s32)                                                                           \
    CVT_INTEGERS(X, u32)                                                                           \
    CVT_INTEGERS(X, s64)                                                                           \
    CVT_INTEGERS(X, u64)                                                                           \
    CVT_LOW_BITS(X, 32, "s8", int8_t)                                                              \
    CVT_LOW_BITS(X, 32, "u8", uint8_t)                                                             \
    CVT_LOW_BITS(X, 32, "s16", int16_t)                                                            \
    CVT_LOW_BITS(X, 32, "u16", uint16_t)                                                           \
    CVT_LOW_BITS(X, 64, "s8", int8_t)                                                              \
    CVT_LOW_BITS(X, 64, "u8", uint8_t)                                                             \
    CVT_LOW_BITS(X, 64, "s16", int16_t)                                                            \
    CVT_LOW_BITS(X, 64, "u16", uint16_t)                                                           \
    CVT_LOW_BITS(X, 64, "s32", int32_t)                                                            \
    CVT_LOW_BITS(X, 64, "u32", uint32_t)                                                           \
    CVT_ROUNDED(X, rni, rintf)                                                                     \
    CVT_ROUNDED(X, rzi, truncf)                                                                    \
    CVT_ROUNDED(X, rmi, floorf)                                                                    \
    CVT_ROUNDED(X, rpi, ceilf)                                                                     \
    X(1, "cvt.ftz.f32.f32", cvt_ftz, CONVERT, ftz, ftz, a)                                         \
    X(1, "cvt.sat.f32.f32", cvt_sat_f32, CONVERT, f32, f32, smaller(greater(a, 0), 1))             \
    X(1, "cvt.ftz.sat.f32.f32", cvt_sat_ftz, CONVERT, ftz, ftz, smaller(greater(a, 0), 1))         \
    CVT_FROM_INTEGER(X, s8)                                                                        \
    CVT_FROM_INTEGER(X, u8)                                                                        \
    CVT_FROM_INTEGER(X, s16)                                                                       \
    CVT_FROM_INTEGER(X, u16)                                                                       \
    CVT_FROM_INTEGER(X, s32)                                                                       \
    CVT_FROM_INTEGER(X, u32)                                                                       \
    CVT_FROM_INTEGER(X, s64)                                                                       \
    CVT_FROM_INTEGER(X, u64)                                                                       \
    CVT_SMALL(X, "f16", f16, F16_FORMAT)                                                           \
    CVT_SMALL(X, "bf16", bf16, BF16_FORMAT)                                                        \
    CVT_PAIRS(X, e4m3x2, u16, E4M3_FORMAT)                                                         \
    CVT_PAIRS(X, e5m2x2, u16, E5M2_FORMAT)                                                         \
    CVT_PAIRS(X, e2m1x2, b8, E2M1_FORMAT)                                                          \
    CVT_UE8M0(X, rz, false, "", , false)                                                           \
    CVT_UE8M0(X, rz, false, ".satfinite", finite_, true)                                           \
    CVT_UE8M0(X, rp, true, "", , false)                                                            \
    CVT_UE8M0(X, rp, true, ".satfinite", finite_, true)                                            \
    X(1, "cvt.rn.bf16x2.ue8m0x2", cvt_bf16x2_ue8m0x2, CONVERT, u32, u16,                           \
      ue8m0_to_bf16(a >> 8) << 16 | ue8m0_to_bf16(a & 0xff))                                       \
    X(ALSO, "cvt.u16.u8", cvt_u16_u8, CONVERT, "H b")                                              \
    X(ALSO, "cvt.u32.u8", cvt_u32_u8, CONVERT, "W b")

CONVERSIONS(DEFINE)

#define FAMILIES(X)                                                                                \
    PREDICATES(X)                                                                                  \
    COMPARISONS(X)                                                                                 \
    MOVES(X)                                                                                       \
    INTEGERS(X)                                                                                    \
    BITS(X)                                                                                        \
    FLOATS(X)                                                                                      \
    CONVERSIONS(X)

const struct opcode ARITHMETIC_OPCODES[] = {
    {"mov.b16", "H b2", pack, KIND_MOVE, 8},
    {"mov.b32", "W b4", pack, KIND_MOVE, 8},
    {"mov.b32", "W h2", pack, KIND_MOVE, 16},
    {"mov.b64", "D w2", pack, KIND_MOVE, 32},
    {"mov.b64", "D h4", pack, KIND_MOVE, 16},
    {"mov.b16", "B2 h", unpack, KIND_MOVE, 8},
    {"mov.b32", "B4 w", unpack, KIND_MOVE, 8},
    {"mov.b32", "H2 w", unpack, KIND_MOVE, 16},
    {"mov.b64", "W2 d", unpack, KIND_MOVE, 32},
    {"mov.b64", "H4 d", unpack, KIND_MOVE, 16},
    {"lop3.b32", "W w w w i", lop3_b32, KIND_INTEGER, 0},
    FAMILIES(ROW) /* each ends with a comma */
    {NULL, NULL, NULL, 0, 0},
};
