/* What the C code answers that needs neither Python nor a GPU: plans, overlaps, the rounding of
 * number formats, sums, a loop over threads. The output is the same on every platform. */
#include <stdio.h>
#include <string.h>

#include "../../csrc/cpu/rows.h"
#include "../../csrc/overlap.h"
#include "../../csrc/plan.h"
#include "../../csrc/platform.h"
#include "../../csrc/shape.h"
#include "../../csrc/split.h"

/* ---- Random numbers: splitmix64 -------------------------------------------------------------- */

static uint64_t random_bits(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* From [0, count). */
static int pick(uint64_t *state, int count) { return (int)(random_bits(state) % (unsigned)count); }

/* A size from 1 to 2^most_bits, small ones as often as large ones. */
static int size(uint64_t *state, int most_bits)
{
    return 1 + pick(state, 1 << (1 + pick(state, most_bits)));
}

static uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static uint64_t checksum(const void *data, size_t bytes, uint64_t sum)
{
    for (size_t i = 0; i < bytes; i++)
        sum = (sum ^ ((const unsigned char *)data)[i]) * 0x100000001b3u;
    return sum;
}

/* ---- Plans ----------------------------------------------------------------------------------- */

static struct fa_plan_input random_call(uint64_t *state, enum fa_direction direction)
{
    struct fa_plan_input input = {
        .direction = direction,
        .dtype = FA_FLOAT16 + pick(state, 2),
        .batch = size(state, 4),
        .seqlen_q = size(state, 14),
        .seqlen_k = FA_KEY_STEP * size(state, 12),
        .heads_kv = size(state, 4),
        .head_dim = 8 * (1 + pick(state, 32)),
        .head_dim_v = 8 * (1 + pick(state, 32)),
        .window_left = pick(state, 2) ? FA_UNBOUNDED : size(state, 12),
        .window_right = pick(state, 2) ? FA_UNBOUNDED : 0,
        .softcap = pick(state, 2),
        .sink = pick(state, 2),
        .num_splits = pick(state, 4),
        .pack_gqa = pick(state, 3),
        .deterministic = pick(state, 2),
        .tma_strides = pick(state, 2),
    };
    input.heads_q = input.heads_kv * (1 + pick(state, 8));
    input.mask_left = input.window_left != FA_UNBOUNDED;
    input.mask_right = input.window_right != FA_UNBOUNDED;
    return input;
}

static void print_plan(const struct fa_plan *plan)
{
    const struct fa_workspace *workspace = &plan->workspace;
    printf("  %d of %d steps, tile %dx%d, blocks %dx%d, group %d, splits %d, slices %d, smem %d\n",
           plan->main, plan->step_count, plan->tile_m, plan->tile_n, plan->m_blocks, plan->n_blocks,
           plan->group_heads, plan->splits, plan->combine_slices, plan->smem_bytes);
    printf("  workspace %lld, zeros from %lld\n", (long long)workspace->size,
           (long long)workspace->zeros);
    for (int i = 0; i < plan->step_count; i++) {
        const struct fa_step *step = &plan->steps[i];
        char name[FA_VARIANT_NAME_SIZE];
        fa_variant_name(&step->variant, name);
        printf("  %d: %s, %d blocks of %d threads, %d bytes\n", step->job, name, step->blocks,
               step->threads, step->smem_request);
    }
    for (int i = 0; i < plan->reason_count; i++)
        printf("  %s%s: %s\n", plan->reasons[i].dropped ? "not " : "", plan->reasons[i].choice,
               plan->reasons[i].why);
}

static void print_plans(int count)
{
    static const int archs[] = {80, 89, 90, 100, 120, 121};
    const struct fa_tile_list none = {0};
    uint64_t state = 1;
    for (int i = 0; i < count; i++) {
        const struct fa_plan_target target = {
            .device = fa_device_of_arch(archs[pick(&state, 6)]),
            .limits_arch = pick(&state, 4) ? 0 : 120,
            .tiles = &none,
        };
        const struct fa_plan_input input = random_call(&state, i % 2 ? FA_BACKWARD : FA_FORWARD);
        struct fa_plan plan = {0};
        struct fa_plan_error error;
        printf("plan %d for sm_%d\n", i, target.device.arch);
        if (fa_plan_make(&input, &target, &plan, &error) < 0)
            printf("  refused: %s\n", error.message);
        else
            print_plan(&plan);
    }
}

static void print_splits(int count)
{
    uint64_t state = 2;
    for (int i = 0; i < count; i++) {
        const struct fa_grid grid = {
            .blocks = size(&state, 10),
            .tiles = size(&state, 12),
            .tile_m = 16 << pick(&state, 4),
            .tile_n = 16 << pick(&state, 4),
            .key_bytes = 32 << pick(&state, 5),
            .kv_heads = size(&state, 10),
            .row_bytes = size(&state, 20),
            .in_flight = size(&state, 17),
            .sms = size(&state, 7),
            .blocks_per_sm = 1 + pick(&state, 4),
            .share = pick(&state, 2) ? 0 : size(&state, 14),
            .mma_time = 1 + pick(&state, 3),
        };
        printf("split %d: %d\n", i, fa_split_parts(&grid));
    }
}

/* ---- Tensors --------------------------------------------------------------------------------- */

/* A slice of a row-major [2, 3, 4, 16] in fp16, its dimensions in any order and direction. */
static struct fa_tensor random_slice(uint64_t *state, uint16_t *memory)
{
    static const int64_t shape[] = {2, 3, 4, 16}, stride[] = {192, 64, 16, 1};
    struct fa_tensor tensor = {.ndim = 4, .dtype = FA_FLOAT16};
    uint16_t *lowest = memory, *highest = memory, *first = memory;
    const int turn = pick(state, 4);
    for (int i = 0; i < 4; i++) {
        const int from = (i + turn) % 4, low = pick(state, (int)shape[from]);
        const int high = low + pick(state, (int)shape[from] - low);
        const bool reversed = pick(state, 2);
        tensor.shape[i] = high - low + 1;
        tensor.stride[i] = reversed ? -stride[from] : stride[from];
        lowest += low * stride[from];
        highest += high * stride[from];
        first += (reversed ? high : low) * stride[from];
    }
    tensor.data = first;
    tensor.begin = (uintptr_t)lowest;
    tensor.end = (uintptr_t)(highest + 1);
    return tensor;
}

static void print_overlaps(int count)
{
    static uint16_t memory[2 * 3 * 4 * 16];
    uint64_t state = 3;
    for (int i = 0; i < count; i++) {
        const struct fa_tensor a = random_slice(&state, memory), b = random_slice(&state, memory);
        printf("overlap %d: %d %d\n", i, fa_tensors_overlap(&a, &b), fa_tensor_overlaps_itself(&a));
    }
}

/* Every number of a 16-bit format to fp32, and random ones of fp32 back; what belongs to NaNs too.
 */
static void print_rounding(enum fa_dtype dtype)
{
    enum { COUNT = 1 << 16 };
    static uint16_t halves[COUNT];
    static float floats[COUNT];
    struct fa_tensor tensor = {.data = halves, .ndim = 1, .dtype = dtype};
    uint64_t state = 4, sum = 0;
    for (int i = 0; i < COUNT; i++)
        halves[i] = (uint16_t)i;
    fa_load_row(&tensor, 0, COUNT, COUNT, floats);
    printf("to fp32: %016llx\n", (unsigned long long)checksum(floats, sizeof floats, 0));
    fa_store_row(&tensor, 0, COUNT, floats);
    printf("and back: %016llx\n", (unsigned long long)checksum(halves, sizeof halves, 0));
    for (int round = 0; round < 16; round++) {
        for (int i = 0; i < COUNT; i++) {
            const uint32_t bits = (uint32_t)random_bits(&state);
            memcpy(&floats[i], &bits, sizeof bits);
        }
        fa_store_row(&tensor, 0, COUNT, floats);
        sum = checksum(halves, sizeof halves, sum);
    }
    printf("from fp32: %016llx\n", (unsigned long long)sum);
}

static void print_sums(int count)
{
    enum { WIDTH = 256 };
    float a[WIDTH], b[WIDTH];
    uint64_t state = 5;
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < WIDTH; j++) {
            a[j] = (float)(int32_t)random_bits(&state) * 0x1p-28f;
            b[j] = (float)(int32_t)random_bits(&state) * 0x1p-30f;
        }
        const float dot = fa_dot(a, b, WIDTH);
        fa_add_scaled(a, dot, b, WIDTH);
        printf("dot %d: %08x, then %08x\n", i, (unsigned)bits_of(dot), (unsigned)bits_of(a[i]));
    }
}

/* ---- Threads --------------------------------------------------------------------------------- */

static int mark(void *context, int64_t index, struct fa_worker *worker)
{
    ((unsigned char *)context)[index]++;
    return fa_has_ended(worker) ? FA_INTERRUPTED : 0;
}

static int fail(void *context, int64_t index, struct fa_worker *worker)
{
    (void)context;
    (void)worker;
    return index == 7 ? FA_OUT_OF_MEMORY : 0;
}

static void print_loop(void)
{
    enum { TASKS = 10000 };
    static unsigned char marks[TASKS];
    struct fa_threads threads = {.count = 4};
    int once = 0;
    const int status = fa_parallel_for(TASKS, &threads, mark, marks);
    for (int i = 0; i < TASKS; i++)
        once += marks[i] == 1;
    printf("loop: %d, %d tasks ran once\n", status, once);
    printf("loop that fails: %d\n", fa_parallel_for(TASKS, &threads, fail, NULL));
}

int main(void)
{
    print_plans(200);
    print_splits(100);
    print_overlaps(200);
    print_rounding(FA_FLOAT16);
    print_rounding(FA_BFLOAT16);
    print_sums(32);
    print_loop();
    return 0;
}
