/* An emulated GPU of compute capability 12.0: what its parts share.
 *
 *     PTX text             parse.c     -> struct program, one struct instruction per line
 *     a launch             run.c       blocks over threads, a block's warps in turns by a seed
 *     an instruction       its row of an opcode table -> a handler over all lanes of a warp:
 *                          arithmetic.c lanes.c mma.c matrix.c memory.c copies.c barriers.c bulk.c
 *     a byte of memory     memory.c    is it the launch's at all?
 *     a shared byte        shadow.c    who touched it last, and did a barrier come between?
 *     the driver's API     driver.c    cuInit ... cuLaunchKernelEx, and what the tests ask
 *
 * A handler never guesses: what it cannot do exactly ends the launch with fault(). */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    LANES = 32,
    MAX_WARPS = 32,
    AGENTS = MAX_WARPS + 1, /* who can touch shared memory: the warps, */
    BULK_AGENT = MAX_WARPS, /* and the engine of the bulk copies */
    BARRIERS = 16,
    MAX_OPERANDS = 20,
    MAX_SHARED = 99 * 1024, /* bytes per block on compute capability 12.x */
    SHARED_BASE = 1024,     /* the first shared address: below is the system's, as on hardware */
};

typedef uint32_t lanes; /* a set of lanes: bit l is lane l */
#define ALL_LANES 0xffffffffu

struct warp;
struct block;
struct launch;
struct instruction;

/* ---- programs ------------------------------------------------------------------------------- */

enum kind {
    KIND_CONTROL, /* branches and exits */
    KIND_MOVE,
    KIND_INTEGER,
    KIND_FLOAT,
    KIND_CONVERT,
    KIND_SPECIAL, /* what the MUFU pipe does: ex2, lg2, rcp */
    KIND_MMA,
    KIND_LDMATRIX,
    KIND_STMATRIX,
    KIND_LOAD_SHARED,
    KIND_STORE_SHARED,
    KIND_LOAD_GLOBAL,
    KIND_STORE_GLOBAL,
    KIND_ATOMIC,
    KIND_COPY, /* cp.async and bulk copies */
    KIND_SHUFFLE,
    KIND_BARRIER,
    KIND_COUNT
};

/* Executes an instruction for the lanes `active`, never none. */
typedef void handler(struct warp *warp, const struct instruction *in, lanes active);

/* A row of an opcode table. `operands` has one item per operand, in PTX's order, with a space
 * between two:
 *     p b h w d  a source: predicate, 8, 16, 32, 64 bits; P B H W D a destination. Constants are
 *                fine.
 *     w4         a vector {a, b, c, d} of four such registers: four operands in a row
 *     W|P        a destination with a predicate beside it: two operands
 *     [          an address: register plus constant, or symbol plus constant: one operand
 *     [w3        a tensor coordinate, [map, {x, y, z}]: an address and then three sources
 *     i          an integer constant, in .offset
 *     l          a label: the instruction's .target
 * Rows of the same name differ in their operands. A handler may read `detail`. */
struct opcode {
    const char *name; /* with every modifier, as PTX spells it */
    const char *operands;
    handler *execute;
    enum kind kind;
    int detail;
};

/* Each ends with a row whose name is NULL. */
extern const struct opcode ARITHMETIC_OPCODES[], LANE_OPCODES[], MMA_OPCODES[], MATRIX_OPCODES[],
    MEMORY_OPCODES[], COPY_OPCODES[], BARRIER_OPCODES[], BULK_OPCODES[], CONTROL_OPCODES[];

struct operand {
    uint32_t slot;  /* in warp->values; constants and special registers have slots too */
    bool is_source; /* its lanes must have been written before */
    bool is_dest;
    bool is_wide;   /* 64 bits */
    int64_t offset; /* of an address, or the value of an `i` */
};

struct instruction {
    const struct opcode *opcode;
    int count; /* of operands */
    struct operand operand[MAX_OPERANDS];
    int guard; /* slot of the predicate of @p, -1: none */
    bool guard_negated;
    bool converges;   /* all lanes of the warp have to come: .sync instructions and barriers */
    int target;       /* of a branch: an index into program->code */
    int line;         /* of the PTX, from 1 */
    int source;       /* of the CUDA C: program->sources, -1: unknown */
    const char *text; /* the PTX of it */
};

/* A register that has its value before the first instruction. */
struct preset {
    enum special {
        CONSTANT,
        TID_X,
        TID_Y,
        TID_Z,
        NTID_X,
        NTID_Y,
        NTID_Z,
        CTAID_X,
        CTAID_Y,
        CTAID_Z,
        NCTAID_X,
        NCTAID_Y,
        NCTAID_Z,
        LANEID,
        WARPID,
        LANEMASK_LT,
    } special;
    uint32_t slot;
    uint64_t value; /* of a CONSTANT */
    bool is_wide;
};

/* Where an instruction comes from: a line, and the line that the function was inlined at. */
struct source {
    int file, line; /* .file number; 0: unknown */
    int caller_file, caller_line;
};

#define MAX_FILES  32
#define MAX_PARAMS 16

struct program {
    char *text; /* a copy of the PTX, its statements cut by NULs */
    char name[64];
    struct instruction *code;
    int length;
    struct preset *presets;
    int preset_count;
    uint32_t slots;       /* of 32 lanes x 32 bits; a 64-bit register has two */
    uint32_t param_bytes; /* one parameter space, offsets as the ABI lays them out */
    int param_count;
    uint32_t param_offset[MAX_PARAMS], param_size[MAX_PARAMS];
    uint32_t shared_bytes;  /* static ones; dynamic shared memory starts after them */
    uint32_t max_threads;   /* .maxntid; 0: any */
    struct source *sources; /* each .loc */
    int source_count;
    char files[MAX_FILES][64]; /* names without folders, by .file number */
};

/* Reads the entry of a PTX module (the only one that it has). NULL, with the reason in `message`:
 * an instruction, type, modifier, operand or directive that nobody here knows. */
struct program *parse_program(const char *ptx, char *message, size_t size);
void free_program(struct program *program);

/* "PTX line 210 (ptx.cuh:50, in tile.cuh:113, in forward.cu:116)" */
void describe_place(const struct program *program, const struct instruction *in, char *text,
                    size_t size);

/* ---- execution ------------------------------------------------------------------------------ */

/* What was seen of each agent: everything up to its epoch `epoch[agent]` happened before. */
struct clock {
    uint32_t epoch[AGENTS];
};

/* Lanes of a warp that go on together. */
struct path {
    int pc; /* of their next instruction */
    lanes mask;
    bool yielded; /* they poll for something, or wait for lanes that do: others first */
};

struct warp {
    struct block *block;
    int index;
    struct path paths[LANES]; /* by pc, the lowest first; together the lanes that have not exited */
    int path_count;
    int current;               /* the path that executes now */
    bool waiting;              /* at a barrier */
    int idle_turns;            /* one after the other, see run.c, */
    uint64_t idle_since;       /* while block->progress was this */
    uint32_t (*values)[LANES]; /* [slot][lane]; a 64-bit register spans two slots */
    lanes *defined;            /* [slot], which lanes have been written */
    uint32_t epoch;            /* of its accesses now; ends with every synchronisation */
    struct clock clock;        /* what happened before; of its own lanes all but this epoch */
    struct copies *copies;     /* its cp.async on their way, see copies.c */
};

/* One of the block's sixteen barriers. */
struct barrier {
    int expected, arrived; /* threads; 0: nobody is here */
    uint32_t waiting;      /* set of warps */
    struct clock clock;
    int reduced;                             /* of bar.red */
    const struct instruction *at[MAX_WARPS]; /* where each of them waits */
};

/* What a launch did, per instruction of the program. */
struct tally {
    uint64_t executed;         /* by a warp */
    uint64_t wavefronts;       /* passes through shared memory that it took, */
    uint64_t wavefronts_ideal; /* and would take without bank conflicts */
    uint64_t global_bytes;
};

struct block {
    struct launch *launch;
    uint32_t index[3];
    uint8_t *shared; /* of address SHARED_BASE */
    uint32_t shared_bytes;
    struct shadow *shadow;
    struct warp *warps;
    int warp_count;
    struct barrier barriers[BARRIERS];
    struct bulk *bulk;   /* mbarriers, and the bulk copies on their way, see bulk.c */
    struct tally *tally; /* [program->length] */
    uint64_t progress;   /* grows with all that somebody may have waited for */
    uint64_t random;     /* state of the schedule */
};

struct launch {
    const struct program *program;
    const uint8_t *params;
    uint32_t grid[3], threads[3]; /* blocks, and threads per block */
    uint32_t dynamic_shared;
    uint64_t seed;
    bool late_copies;          /* asynchronous copies land when they are waited for; else at once */
    const struct pages *pages; /* the memory that the launch may touch */
    struct tally *tally;
    volatile bool failed;
    char message[2048]; /* of the first fault */
};

/* Ends the launch, unless it has failed already, with a message that names kernel, PTX line,
 * block, warp and the first of the lanes `where`. A handler that has called it returns at once. */
__attribute__((format(printf, 4, 5))) void fault(struct warp *warp, const struct instruction *in,
                                                 lanes where, const char *format, ...);

/* Runs a launch to its end or to its first fault, on `threads` threads. */
void run_launch(struct launch *launch, int threads);

/* The aligned instructions are undefined unless the whole warp executes them together: false after
 * a fault. */
bool is_whole(struct warp *warp, const struct instruction *in, lanes active);

/* The path that executes now polled in vain: other paths and warps go first. */
void yield_path(struct warp *warp);

/* A number below `bound`, from the block's seed. */
uint32_t draw(struct block *block, uint32_t bound);

/* ---- registers ------------------------------------------------------------------------------ */

static inline uint32_t *r32(const struct warp *warp, const struct instruction *in, int operand)
{
    return warp->values[in->operand[operand].slot];
}

static inline uint64_t *r64(const struct warp *warp, const struct instruction *in, int operand)
{
    return (uint64_t *)warp->values[in->operand[operand].slot];
}

static inline float *f32(const struct warp *warp, const struct instruction *in, int operand)
{
    return (float *)warp->values[in->operand[operand].slot];
}

/* A predicate is a set of lanes. */
static inline lanes *predicate(const struct warp *warp, const struct instruction *in, int operand)
{
    return warp->values[in->operand[operand].slot];
}

/* Address operand `operand` of a lane, from a register of 32 or 64 bits. */
static inline uint64_t address_of(const struct warp *warp, const struct instruction *in,
                                  int operand, int lane)
{
    const struct operand *o = &in->operand[operand];
    const uint64_t base = o->is_wide ? r64(warp, in, operand)[lane] : r32(warp, in, operand)[lane];
    return base + (uint64_t)o->offset;
}

/* The lanes of a warp that have not exited. */
static inline lanes living_lanes(const struct warp *warp)
{
    lanes all = 0;
    for (int i = 0; i < warp->path_count; i++)
        all |= warp->paths[i].mask;
    return all;
}

static inline bool has_lane(lanes set, int lane) { return set >> lane & 1; }

static inline struct tally *tally_of(const struct warp *warp, const struct instruction *in)
{
    return &warp->block->tally[in - warp->block->launch->program->code];
}

/* ---- memory --------------------------------------------------------------------------------- */

enum { MAX_DIMS = 5 };

/* Memory that a launch may touch: rows of a strided tensor. */
struct region {
    uint64_t base;
    int ndim;                                  /* at most MAX_DIMS */
    int64_t shape[MAX_DIMS], stride[MAX_DIMS]; /* in elements */
    int64_t itemsize;
    bool writable;
};

/* The set of all bytes of some regions. NULL: out of memory. */
struct pages *make_pages(const struct region *regions, int count);
void free_pages(struct pages *pages);

/* Where `bytes` bytes at an address are, for one lane's access; NULL after a fault: misaligned, not
 * of the block or launch, read before anyone wrote it, or a race. */
const void *read_shared(struct warp *warp, const struct instruction *in, int lane, uint64_t address,
                        uint32_t bytes);
void *write_shared(struct warp *warp, const struct instruction *in, int lane, uint64_t address,
                   uint32_t bytes);
const void *read_global(struct warp *warp, const struct instruction *in, int lane, uint64_t address,
                        uint32_t bytes);
void *write_global(struct warp *warp, const struct instruction *in, int lane, uint64_t address,
                   uint32_t bytes);

/* Adds to the tally what an access of `bytes` (1 to 16) per lane costs in passes through the 32
 * banks of 4 bytes; lanes that read the same word share it. */
void count_wavefronts(struct warp *warp, const struct instruction *in, lanes active,
                      const uint64_t address[LANES], uint32_t bytes);

/* ---- shadow memory -------------------------------------------------------------------------- */

struct shadow *make_shadow(int warp_count, uint32_t shared_bytes);
void free_shadow(struct shadow *shadow);

/* Shared memory has not been written; the warps have seen each other's past. */
void shadow_start_block(struct shadow *shadow, struct block *block);

/* An access of a lane to `bytes` bytes at `offset` from SHARED_BASE: false after a fault. */
bool shadow_read(struct warp *warp, const struct instruction *in, int lane, uint32_t offset,
                 uint32_t bytes);
bool shadow_write(struct warp *warp, const struct instruction *in, int lane, uint32_t offset,
                  uint32_t bytes);

/* A copy that a lane has issued: until it lands nobody may touch the bytes. It lands as a write of
 * that lane; a bulk copy as one of BULK_AGENT in `epoch`. */
bool shadow_copy_issued(struct warp *warp, const struct instruction *in, int lane, uint32_t offset,
                        uint32_t bytes);
void shadow_copy_landed(struct warp *warp, int lane, uint32_t offset, uint32_t bytes);
void shadow_bulk_landed(struct block *block, uint32_t epoch, uint32_t offset, uint32_t bytes);

/* A bulk store that a lane has issued reads the bytes until it says that it is done: until then
 * nobody may write them. Done, it counts as a read of that lane. */
bool shadow_store_issued(struct warp *warp, const struct instruction *in, int lane, uint32_t offset,
                         uint32_t bytes);
void shadow_store_done(struct warp *warp, int lane, uint32_t offset, uint32_t bytes);

/* What the lanes of a warp did so far happened before what they do from here on. */
void clock_advance(struct warp *warp);

/* `to` has seen all that `from` has seen. */
void clock_join(struct clock *to, const struct clock *from);

/* ---- copies and barriers -------------------------------------------------------------------- */

/* Who has not come to which barrier, for the message of a deadlock. */
void explain_barriers(const struct block *block, char *text, size_t size);

struct copies *make_copies(void);
void free_copies(struct copies *copies);
void copies_start_block(struct copies *copies);

/* mbarriers and bulk copies of a block. */
struct bulk *make_bulk(void);
void free_bulk(struct bulk *bulk);
void bulk_start_block(struct bulk *bulk);

/* Every copy of a block must have been waited for when it ends: else it still touches memory that
 * is another block's by then. */
void bulk_end_block(struct block *block);

/* Writes who is waited for, for the message of a deadlock; nothing where there is nothing. */
void explain_bulk(const struct block *block, char *text, size_t size);

/* cuTensorMapEncodeTiled: fills the 128 bytes of a tensor map. 0 or a CUresult. */
int encode_tensor_map(void *map, int data_type, uint32_t rank, void *address,
                      const uint64_t *global_dim, const uint64_t *global_strides,
                      const uint32_t *box_dim, const uint32_t *element_strides, int interleave,
                      int swizzle, int l2_promotion, int oob_fill);

#endif
