/* What bulk.c, mbarrier.c and tensor_map.c share: the mbarriers of a block, and bulk copies.
 *
 * Known limits. Lanes that arrive at an mbarrier without the rest of their warp pass on what the
 * warp knew: that does not include what they did themselves since its last synchronisation. So a
 * bar.warp.sync is expected before, and a kernel that rightly does without one is reported. A fence
 * orders nothing by itself: synchronisation through flags in memory is unknown here. That what an
 * ordinary store wrote needs a fence.proxy.async before a bulk store reads it is not checked. */
#ifndef BULK_H
#define BULK_H

#include "emulator.h"

enum {
    MAX_RANK = 5,
    CHUNK = 16, /* bytes that swizzles keep together, and that sizes and addresses are made of */
    MAX_MBARRIERS = 128,
    MAX_LOADS = 1 << 20, /* of a block: their epochs are what the shadow memory can tell apart */
};

/* ---- tensor maps ---------------------------------------------------------------------------- */

/* What the 128 bytes of a CUtensorMap are here. Dimensions go from the innermost outwards. */
struct tensor_map {
    uint64_t magic; /* TENSOR_MAP_MAGIC, or it is no tensor map */
    uint64_t address;
    uint64_t size[MAX_RANK]; /* in elements */
    int64_t stride[MAX_RANK];
    uint32_t box[MAX_RANK]; /* in elements */
    uint8_t rank, element;  /* dimensions, and bytes of an element */
    uint8_t span;           /* of the swizzle, in bytes; one chunk: there is none */
    bool fills_nan;         /* elements out of bounds are NaN, not 0 */
};

/* A bulk copy of one box between the tensor and shared memory. */
struct transfer {
    struct tensor_map map; /* of a plain copy: one dimension of bytes */
    int32_t corner[MAX_RANK];
    uint32_t shared;   /* address of the box */
    uint32_t mbarrier; /* address of the one that a load signals */
    uint32_t group;    /* of a store: the lane's number of its bulk group */
    bool adds;         /* a store adds f32 to what is there */
    struct warp *warp; /* who issued it */
    const struct instruction *in;
    int lane;
};

/* The tensor map at a lane's address, in parameters or in global memory. False after a fault. */
bool fetch_tensor_map(struct warp *warp, const struct instruction *in, int lane, int operand,
                      struct tensor_map *map);

/* Plain bytes as a tensor of one dimension, and a box that is all of it. */
struct tensor_map map_bytes(uint64_t address, uint32_t bytes);

uint32_t box_bytes(const struct tensor_map *map);

/* Is the box at a place in shared memory where it may be? False after a fault. */
bool check_box(const struct transfer *transfer);

/* A part of a box that is in the tensor: bytes at a global address, and at an offset in shared
 * memory. False after a fault. */
typedef bool piece(const struct transfer *transfer, uint64_t global, uint32_t offset,
                   uint32_t bytes);
bool each_piece(const struct transfer *transfer, piece *visit);

/* ---- mbarriers ------------------------------------------------------------------------------ */

struct mbarrier {
    uint32_t address;
    uint32_t expected, pending; /* arrivals of a phase, and those that it lacks */
    int32_t bytes;              /* expected and not yet copied */
    uint32_t phase;             /* number of the current one, from 0 */
    bool is_fenced;             /* the bulk copies' engine knows that it is initialised */
    int warp, lane;             /* who initialised it */
    struct clock arriving;      /* what those have seen that came in the current phase, */
    struct clock completed;     /* and in the one before */
};

struct transfers {
    struct transfer *all;
    int count, capacity;
};

struct bulk {
    struct mbarrier mbarriers[MAX_MBARRIERS];
    int mbarrier_count;
    struct transfers loads, stores;    /* on their way, oldest first */
    uint32_t groups[MAX_WARPS][LANES]; /* of bulk stores that a lane has committed */
    uint32_t epoch;                    /* of the last load that has landed */
};

handler init_mbarriers, drop_mbarriers, arrive_at_mbarriers, expect_bytes, test_mbarriers,
    fence_mbarriers;

/* The mbarrier at address operand `operand` of a lane. NULL after a fault: there is none. */
struct mbarrier *find_mbarrier(struct warp *warp, const struct instruction *in, int lane,
                               int operand);

/* A load has landed: its bytes count, and who waits for the phase will know its epoch. */
void complete_bytes(const struct transfer *load, uint32_t epoch);

/* Lands the loads that signal an mbarrier. False after a fault. */
bool land_loads(struct block *block, uint32_t mbarrier);

/* What arrive_at_mbarriers and test_mbarriers find in opcode.detail. */
enum {
    ARRIVE_ONCE,
    ARRIVE_COUNT,
    ARRIVE_EXPECT_BYTES,
    TEST_STATE = 0,
    TEST_PARITY,
};

#endif
