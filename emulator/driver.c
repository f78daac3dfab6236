/* The CUDA driver's entry points as far as the package uses them, for one device that is emulated,
 * and what the tests ask besides. Host memory is device memory, and every launch is over when
 * cuLaunchKernelEx returns. */
#include "emulator.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* CUresult */
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_PTX = 218,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719,
};

struct kernel {
    struct program *program;
};

struct profile_row {
    const char *text, *file;
    int line, source_line, kind;
    uint64_t executed, wavefronts, wavefronts_ideal, global_bytes;
};

struct registration {
    int64_t id;
    struct region region;
};

static struct {
    pthread_mutex_t lock;
    uint64_t seed;
    int late_copies;
    int threads;
    struct registration *regions;
    int region_count, region_capacity;
    int64_t last_id;
    const struct program *profiled; /* of the last launch */
    struct tally *tally;
} driver = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* Of the last call that failed in this thread. */
static _Thread_local char report[2048];

static int context; /* there is one, at this address */

/* ---- the device ------------------------------------------------------------------------------ */

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }

int cuDriverGetVersion(int *version)
{
    *version = 13000;
    return SUCCESS;
}

int cuGetErrorName(int error, const char **name)
{
    *name = error == INVALID_PTX     ? "CUDA_ERROR_INVALID_PTX"
            : error == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED"
            : error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
                                     : "CUDA_ERROR_UNKNOWN";
    return SUCCESS;
}

int cuGetErrorString(int error, const char **text)
{
    *text = error && report[0] ? report : "no further word";
    return SUCCESS;
}

int cuDeviceGetCount(int *count)
{
    *count = 1;
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal)
{
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}

int cuDeviceGetName(char *name, int size, int device)
{
    (void)device;
    snprintf(name, (size_t)size, "Emulated sm_120");
    return SUCCESS;
}

/* Those of a GeForce RTX 5090. */
int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    switch (attribute) {
    case 16: *value = 170; break;       /* multiprocessors */
    case 38: *value = 96 << 20; break;  /* bytes of L2 */
    case 75: *value = 12; break;        /* compute capability, major */
    case 76: *value = 0; break;         /* and minor */
    case 81: *value = 100 << 10; break; /* bytes of shared memory per multiprocessor */
    case 97: *value = MAX_SHARED; break;
    default: return INVALID_VALUE;
    }
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **retained, int device)
{
    (void)device;
    *retained = &context;
    return SUCCESS;
}

int cuCtxGetCurrent(void **current)
{
    *current = &context;
    return SUCCESS;
}

int cuCtxPushCurrent_v2(void *pushed) { return pushed == &context ? SUCCESS : INVALID_VALUE; }

int cuCtxPopCurrent_v2(void **popped)
{
    *popped = &context;
    return SUCCESS;
}

int cuStreamIsCapturing(void *stream, int *status)
{
    (void)stream;
    *status = 0;
    return SUCCESS;
}

int cuStreamSynchronize(void *stream)
{
    (void)stream;
    return SUCCESS;
}

int cuMemcpyDtoHAsync_v2(void *host, const void *device, size_t size, void *stream)
{
    (void)stream;
    memcpy(host, device, size);
    return SUCCESS;
}

/* ---- kernels -------------------------------------------------------------------------------- */

int cuLibraryLoadData(struct kernel **library, const void *code, int *jit_options,
                      void **jit_values, unsigned jit_count, int *options, void **values,
                      unsigned count)
{
    (void)jit_options, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
    struct program *program = parse_program(code, report, sizeof report);
    if (!program)
        return INVALID_PTX;
    *library = malloc(sizeof **library);
    if (!*library) {
        free_program(program);
        return OUT_OF_MEMORY;
    }
    (*library)->program = program;
    return SUCCESS;
}

static void forget_profile(void)
{
    free(driver.tally);
    driver.tally = NULL;
    driver.profiled = NULL;
}

int cuLibraryUnload(struct kernel *library)
{
    pthread_mutex_lock(&driver.lock);
    if (driver.profiled == library->program)
        forget_profile();
    pthread_mutex_unlock(&driver.lock);
    free_program(library->program);
    free(library);
    return SUCCESS;
}

int cuLibraryGetKernel(struct kernel **kernel, struct kernel *library, const char *name)
{
    *kernel = library;
    if (strcmp(library->program->name, name) == 0)
        return SUCCESS;
    snprintf(report, sizeof report, "the module's kernel is %s, not %s", library->program->name,
             name);
    return NOT_FOUND;
}

int cuKernelGetFunction(void **function, struct kernel *kernel)
{
    *function = kernel;
    return SUCCESS;
}

int cuKernelSetAttribute(int attribute, int value, struct kernel *kernel, int device)
{
    (void)device;
    const uint32_t fixed = kernel->program->shared_bytes;
    if (attribute == 8 && value >= 0 && value + fixed <= MAX_SHARED)
        return SUCCESS;
    snprintf(report, sizeof report, "%d bytes of shared memory and %u fixed ones: a block has %d",
             value, fixed, MAX_SHARED);
    return INVALID_VALUE;
}

int cuTensorMapEncodeTiled(void *map, int data_type, uint32_t rank, void *address,
                           const uint64_t *global_dim, const uint64_t *global_strides,
                           const uint32_t *box_dim, const uint32_t *element_strides, int interleave,
                           int swizzle, int l2_promotion, int oob_fill)
{
    return encode_tensor_map(map, data_type, rank, address, global_dim, global_strides, box_dim,
                             element_strides, interleave, swizzle, l2_promotion, oob_fill);
}

/* ---- launches ------------------------------------------------------------------------------- */

struct config {
    uint32_t grid[3], block[3], shared_bytes;
    void *stream, *attributes; /* which change when a launch starts: here the one before is over */
    uint32_t attribute_count;
};

/* What a launch asks for that no device of this kind has: said in `report`. */
static bool is_possible(const struct config *config, const struct program *program)
{
    const uint64_t threads = (uint64_t)config->block[0] * config->block[1] * config->block[2];
    const uint64_t shared = (uint64_t)config->shared_bytes + program->shared_bytes;
    const uint64_t most = program->max_threads ? program->max_threads : MAX_WARPS * LANES;
    report[0] = 0;
    if (threads == 0 || threads > most || threads % LANES)
        snprintf(report, sizeof report,
                 "%s: a block of %llu threads: whole warps are run here, and %llu at most",
                 program->name, (unsigned long long)threads, (unsigned long long)most);
    else if (!config->grid[0] || !config->grid[1] || !config->grid[2])
        snprintf(report, sizeof report, "%s: a grid without blocks", program->name);
    else if (shared > MAX_SHARED)
        snprintf(report, sizeof report, "%s: %llu bytes of shared memory: a block has %d",
                 program->name, (unsigned long long)shared, MAX_SHARED);
    return report[0] == 0;
}

/* The memory that is registered now. */
static struct pages *snapshot_pages(void)
{
    pthread_mutex_lock(&driver.lock);
    struct region *regions = malloc((size_t)(driver.region_count + 1) * sizeof *regions);
    struct pages *pages = NULL;
    for (int i = 0; regions && i < driver.region_count; i++)
        regions[i] = driver.regions[i].region;
    if (regions)
        pages = make_pages(regions, driver.region_count);
    pthread_mutex_unlock(&driver.lock);
    free(regions);
    return pages;
}

static void keep_profile(const struct program *program, struct tally *tally)
{
    pthread_mutex_lock(&driver.lock);
    forget_profile();
    driver.profiled = program;
    driver.tally = tally;
    pthread_mutex_unlock(&driver.lock);
}

int cuLaunchKernelEx(const struct config *config, struct kernel *kernel, void **parameters,
                     void **extra)
{
    const struct program *program = kernel->program;
    (void)extra;
    if (!is_possible(config, program))
        return INVALID_VALUE;
    uint8_t *params = calloc(1, program->param_bytes + 1);
    struct launch *launch = calloc(1, sizeof *launch);
    struct tally *tally = calloc((size_t)program->length, sizeof *tally);
    struct pages *pages = snapshot_pages();
    int result = OUT_OF_MEMORY;
    if (params && launch && tally && pages) {
        for (int i = 0; i < program->param_count; i++)
            memcpy(params + program->param_offset[i], parameters[i], program->param_size[i]);
        *launch = (struct launch){.program = program,
                                  .params = params,
                                  .dynamic_shared = config->shared_bytes,
                                  .seed = driver.seed,
                                  .late_copies = driver.late_copies,
                                  .pages = pages,
                                  .tally = tally};
        memcpy(launch->grid, config->grid, sizeof launch->grid);
        memcpy(launch->threads, config->block, sizeof launch->threads);
        run_launch(launch, driver.threads ? driver.threads : (int)sysconf(_SC_NPROCESSORS_ONLN));
        memcpy(report, launch->message, sizeof report);
        result = launch->failed ? LAUNCH_FAILED : SUCCESS;
        keep_profile(program, tally);
        tally = NULL;
    }
    free(params);
    free(launch);
    free(tally);
    free_pages(pages);
    return result;
}

/* ---- what the tests ask ---------------------------------------------------------------------- */

/* How launches are run from here on: the seed of all schedules, whether asynchronous copies land
 * only when they are waited for, and on how many threads (0: one per core). */
void emulator_configure(uint64_t seed, int late_copies, int threads)
{
    driver.seed = seed;
    driver.late_copies = late_copies;
    driver.threads = threads;
}

/* Memory that launches may touch until it is forbidden again by the number returned. -1: no
 * room. */
int64_t emulator_allow(const struct region *region)
{
    int64_t id = -1;
    pthread_mutex_lock(&driver.lock);
    if (driver.region_count == driver.region_capacity) {
        const int larger = driver.region_capacity ? 2 * driver.region_capacity : 64;
        void *moved = realloc(driver.regions, (size_t)larger * sizeof *driver.regions);
        if (moved) {
            driver.regions = moved;
            driver.region_capacity = larger;
        }
    }
    if (driver.region_count < driver.region_capacity) {
        id = ++driver.last_id;
        driver.regions[driver.region_count++] = (struct registration){id, *region};
    }
    pthread_mutex_unlock(&driver.lock);
    return id;
}

void emulator_forbid(int64_t id)
{
    pthread_mutex_lock(&driver.lock);
    for (int i = 0; i < driver.region_count; i++)
        if (driver.regions[i].id == id)
            driver.regions[i--] = driver.regions[--driver.region_count];
    pthread_mutex_unlock(&driver.lock);
}

/* Why the last call of this thread failed; "" if it did not. */
const char *emulator_report(void) { return report; }

/* What each instruction of the last launch did: how many there are, the first `capacity` of them
 * in rows. */
int emulator_profile(struct profile_row *rows, int capacity)
{
    static const struct source nowhere;
    pthread_mutex_lock(&driver.lock);
    const struct program *program = driver.profiled;
    const int length = program ? program->length : 0;
    for (int i = 0; i < length && i < capacity; i++) {
        const struct instruction *in = &program->code[i];
        const struct source *source = in->source < 0 ? &nowhere : &program->sources[in->source];
        const struct tally *tally = &driver.tally[i];
        rows[i] = (struct profile_row){
            in->text,          program->files[source->file], in->line,
            source->line,      (int)in->opcode->kind,        tally->executed,
            tally->wavefronts, tally->wavefronts_ideal,      tally->global_bytes};
    }
    pthread_mutex_unlock(&driver.lock);
    return length;
}
