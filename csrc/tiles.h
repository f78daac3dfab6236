/* The tile table: which shape of block serves which calls. */
#ifndef FA_TILES_H
#define FA_TILES_H

#include <stddef.h>

#include "device.h"
#include "variant.h"

enum fa_direction { FA_FORWARD, FA_BACKWARD };

/* X(field): which calls a row is for, and the tile that they get. All are ints.
 *   arch            compute capability: serves all of the same major version
 *   kind            enum fa_card_kind, of a 12.x card
 *   head_dim, head_dim_v, heads_per_kv, seqlen_q, rows_per_sm
 *                   serves calls up to these; heads_per_kv is query heads per KV head, rows_per_sm
 *                   the query rows of all heads for each multiprocessor: how large tiles may be
 *                   before some of them have none
 *   mask_right, mask_left
 *                   1 (0): serves calls whose keys do (do not) end, start, at a diagonal
 * FA_ANY in place of a number: of any. */
#define FA_TILE_KEY(X)                                                                             \
    X(arch)                                                                                        \
    X(kind)                                                                                        \
    X(head_dim) X(head_dim_v) X(heads_per_kv) X(seqlen_q) X(rows_per_sm) X(mask_right) X(mask_left)

/*   tile_n          keys per stage of the ring in shared memory
 *   sub_n           keys whose scores are in registers at a time
 *   warps, warp_m   query rows per warp; tile_m is warps * warp_m
 *   stages          of the ring; each holds a K and a V tile
 *   kernel          enum fa_kernel_id: how K and V come to the ring
 *   producer        enum fa_producer: who refills it; 0 where the kernel is FA_KERNEL_FORWARD */
#define FA_TILE(X) X(tile_n) X(sub_n) X(warps) X(warp_m) X(stages) X(kernel) X(producer)

#define FA_ANY (-1)

/* Of calls of no more queries, as in decoding, rows_per_sm is the rows of the query heads that
 * share a KV head. */
#define FA_FEW_QUERIES 16

#define FA_INT(field) int field;
struct fa_tile {
    FA_TILE(FA_INT)
};

/* Bounds below which a row was not measured: it serves only calls above them. 0: all calls. */
#define FA_TILE_ABOVE(X) X(head_dim) X(head_dim_v) X(heads_per_kv) X(seqlen_q) X(rows_per_sm)

struct fa_tile_above {
    FA_TILE_ABOVE(FA_INT)
};

struct fa_tile_row {
    FA_TILE_KEY(FA_INT)
    struct fa_tile tile;
    struct fa_tile_above above;
};

extern const struct fa_tile_row FA_TILES[];
extern const size_t FA_TILE_COUNT;

/* K and V in e4m3; calls that no row of these serves have those of FA_TILES. */
extern const struct fa_tile_row FA_E4M3_TILES[];
extern const size_t FA_E4M3_TILE_COUNT;

/* Q in e4m3, too: rows for every call. */
extern const struct fa_tile_row FA_Q_E4M3_TILES[];
extern const size_t FA_Q_E4M3_TILE_COUNT;

/* Where K and V are in pages of whole boxes, and a row of FA_TILES asks for cp.async. */
extern const struct fa_tile_row FA_PAGED_TILES[];
extern const size_t FA_PAGED_TILE_COUNT;

/* Where a row of FA_TILES leaves no registers for dropout, a bias, mods or listed blocks. */
extern const struct fa_tile_row FA_ROOMY_TILES[];
extern const size_t FA_ROOMY_TILE_COUNT;

/* Where a row of FA_TILES has more rows than the grid has use for, see fill_waves(). */
extern const struct fa_tile_row FA_WAVE_TILES[];
extern const size_t FA_WAVE_TILE_COUNT;

/* The same of kernels/backward.cu.
 *   head_dim        serves calls whose head dims are both up to it
 *   varlen_k        serves sequences of any lengths alone, of up to so many keys
 *   keys_per_sm     the keys of all KV heads for each multiprocessor; of sequences of any lengths,
 *                   the keys of the longest */
#define FA_BACKWARD_KEY(X)                                                                         \
    X(arch)                                                                                        \
    X(kind)                                                                                        \
    X(head_dim) X(varlen_k) X(keys_per_sm) X(mask_right) X(mask_left)

/*   warps, warp_n   keys per warp of a group, of which there are two
 *   tile_m, sub_m   queries in shared memory, and in registers
 *   stages          of Q in shared memory */
#define FA_BACKWARD_TILE(X) X(warps) X(warp_n) X(tile_m) X(sub_m) X(stages)

#define FA_BACKWARD_ABOVE(X) X(head_dim) X(keys_per_sm)

struct fa_backward_tile {
    FA_BACKWARD_TILE(FA_INT)
};

struct fa_backward_above {
    FA_BACKWARD_ABOVE(FA_INT)
};

struct fa_backward_row {
    FA_BACKWARD_KEY(FA_INT)
    struct fa_backward_tile tile;
    struct fa_backward_above above;
};
#undef FA_INT

extern const struct fa_backward_row FA_BACKWARD_TILES[];
extern const size_t FA_BACKWARD_TILE_COUNT;

/* Of calls with dropout, a bias, mods or listed blocks that would spill registers in those; calls
 * that no row of these serves have those. */
extern const struct fa_backward_row FA_CROWDED_BACKWARD_TILES[];
extern const size_t FA_CROWDED_BACKWARD_TILE_COUNT;

/* Whether a row of an architecture and a class of cards serves a device. */
static inline bool fa_row_is_of(int arch, int kind, const struct fa_device *device)
{
    return (arch == FA_ANY || arch / 10 == device->arch / 10) &&
           (kind == FA_ANY || kind == device->kind);
}

/* Rows that come before those above. The first row that serves a call is taken, if it fits the
 * device's shared memory. */
struct fa_tile_list {
    struct fa_tile_row *rows;
    size_t count;
    struct fa_backward_row *backward_rows;
    size_t backward_count;
    unsigned version; /* how often the rows were replaced: plans with other ones are void */
};

#endif
