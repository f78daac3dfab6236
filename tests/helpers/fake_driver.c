/* A CUDA driver that launches nothing: it answers for a machine described by the environment, and
 * appends every launch to the file FAKE_LAUNCHES. FAKE_VERSION, FAKE_DEVICES, FAKE_ARCH,
 * FAKE_CAPTURING; FAKE_FAIL names the entry point that fails, with error FAKE_ERROR. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../kernels/params.h"

static int number(const char *variable, int otherwise)
{
    const char *value = getenv(variable);
    return value ? atoi(value) : otherwise;
}

static int result(const char *entry)
{
    const char *fails = getenv("FAKE_FAIL");
    return fails && strcmp(fails, entry) == 0 ? number("FAKE_ERROR", 999) : 0;
}

int cuInit(unsigned flags) { return flags ? 1 : result("cuInit"); }

int cuDriverGetVersion(int *version)
{
    *version = number("FAKE_VERSION", 13000);
    return 0;
}

int cuGetErrorName(int error, const char **name)
{
    *name = error == 3 ? "CUDA_ERROR_NOT_INITIALIZED" : "CUDA_ERROR_UNKNOWN";
    return 0;
}

int cuGetErrorString(int error, const char **text)
{
    *text = error == 3 ? "initialization error" : "unknown error";
    return 0;
}

int cuDeviceGetCount(int *count)
{
    *count = number("FAKE_DEVICES", 2);
    return result("cuDeviceGetCount");
}

int cuDeviceGet(int *device, int ordinal)
{
    *device = ordinal;
    return result("cuDeviceGet");
}

int cuDeviceGetName(char *name, int size, int device)
{
    const char *asked = getenv("FAKE_NAME");
    if (asked)
        snprintf(name, (size_t)size, "%s", asked);
    else
        snprintf(name, (size_t)size, "Fake %d", device);
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    switch (attribute) {
    case 16: *value = number("FAKE_SMS", 170); break;
    case 36: *value = number("FAKE_MHZ", 0) * 1000; break; /* of the memory; 0: not told */
    case 37: *value = number("FAKE_BITS", 0); break;
    case 38: *value = number("FAKE_L2_MB", 96) << 20; break;
    case 75: *value = number("FAKE_ARCH", 120) / 10; break;
    case 76: *value = number("FAKE_ARCH", 120) % 10; break;
    case 81: *value = 100 << 10; break;
    case 97: *value = 99 << 10; break;
    default: return 1;
    }
    return 0;
}

/* Contexts are the addresses of these; the current one is on a stack of the process. */
static int contexts[64], *stack[64], depth;

int cuDevicePrimaryCtxRetain(void **context, int device)
{
    *context = &contexts[device];
    return result("cuDevicePrimaryCtxRetain");
}

int cuCtxGetCurrent(void **context)
{
    *context = depth ? stack[depth - 1] : NULL;
    return 0;
}

int cuCtxPushCurrent_v2(void *context)
{
    stack[depth++] = context;
    return 0;
}

int cuCtxPopCurrent_v2(void **context)
{
    *context = stack[--depth];
    return 0;
}

int cuStreamIsCapturing(void *stream, int *status)
{
    (void)stream;
    *status = number("FAKE_CAPTURING", 0);
    return 0;
}

int cuStreamSynchronize(void *stream)
{
    (void)stream;
    return result("cuStreamSynchronize");
}

int cuMemcpyDtoHAsync_v2(void *host, const void *device, size_t size, void *stream)
{
    (void)stream;
    memcpy(host, device, size);
    return result("cuMemcpyDtoHAsync_v2");
}

int cuLibraryLoadData(void **library, const void *code, int *a, void **b, unsigned c, int *d,
                      void **e, unsigned f)
{
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    const int is_combine = strstr(code, ".entry combine") != NULL;
    if (!is_combine && !strstr(code, ".entry forward"))
        return 200;
    *library = malloc(sizeof is_combine);
    memcpy(*library, &is_combine, sizeof is_combine);
    return result("cuLibraryLoadData");
}

int cuLibraryUnload(void *library)
{
    free(library);
    return 0;
}

int cuLibraryGetKernel(void **kernel, void *library, const char *name)
{
    (void)name;
    *kernel = library;
    return result("cuLibraryGetKernel");
}

int cuKernelGetFunction(void **function, void *kernel)
{
    *function = kernel;
    return 0;
}

int cuKernelSetAttribute(int attribute, int value, void *kernel, int device)
{
    (void)kernel, (void)device;
    return attribute == 8 && value <= 99 << 10 ? result("cuKernelSetAttribute") : 1;
}

int cuTensorMapEncodeTiled(struct fa_tensor_map *map, int data_type, unsigned rank, void *address,
                           const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,
                           const uint32_t *element_strides, int interleave, int swizzle,
                           int l2_promotion, int oob_fill)
{
    (void)map, (void)data_type, (void)rank, (void)address, (void)sizes, (void)strides, (void)box;
    (void)element_strides, (void)interleave, (void)swizzle, (void)l2_promotion, (void)oob_fill;
    return result("cuTensorMapEncodeTiled");
}

struct attribute {
    int id, padding, value[16];
};

struct config {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    const struct attribute *attributes;
    unsigned attribute_count;
};

/* Whether the kernel may start before the one before it has ended. */
static int overlaps(const struct config *config)
{
    return config->attribute_count == 1 && config->attributes->id == 6 &&
           config->attributes->value[0] == 1;
}

static void print_combine(FILE *file, const struct fa_combine_params *p)
{
    fprintf(file, "\"rows\": %u, \"parts\": %d, \"slices\": %d, \"lse\": %s, ", p->rows, p->parts,
            p->slices.number, p->lse ? "true" : "false");
    fprintf(file, "\"out_parts\": %lld, \"lse_parts\": %lld, ", (long long)p->out_parts,
            (long long)p->lse_parts);
    fprintf(file, "\"out_stride\": [%lld, %lld, %lld]}\n", (long long)p->out_stride.batch,
            (long long)p->out_stride.seqlen, (long long)p->out_stride.head);
}

static void print_divisors(FILE *file, const struct fa_forward_params *p)
{
    const struct fa_divisor all[] = {p->heads, p->heads_per_kv, p->m_blocks, p->group_heads,
                                     p->parts};
    fprintf(file, "\"divisors\": [");
    for (int i = 0; i < 5; i++)
        fprintf(file, "%s[%d, %u, %d]", i ? ", " : "", all[i].number, all[i].multiplier,
                all[i].shift);
    fprintf(file, "], ");
}

static void print_forward(FILE *file, const struct fa_forward_params *p)
{
    fprintf(file, "\"batch\": %d, \"heads\": %d, \"heads_per_kv\": %d, ", p->batch, p->heads.number,
            p->heads_per_kv.number);
    fprintf(file, "\"seqlen_q\": %d, \"seqlen_k\": %d, ", p->seqlen_q, p->seqlen_k);
    fprintf(file, "\"m_blocks\": %d, \"group_heads\": %d, ", p->m_blocks.number,
            p->group_heads.number);
    fprintf(file, "\"parts\": %d, \"out\": %lld, ", p->parts.number, (long long)p->out);
    print_divisors(file, p);
    fprintf(file, "\"window_left\": %d, \"window_right\": %d, ", p->window_left, p->window_right);
    fprintf(file, "\"scale_log2\": %.9g, \"lse\": %s, ", p->scale_log2, p->lse ? "true" : "false");
    fprintf(file, "\"q_stride\": [%lld, %lld, %lld]}\n", (long long)p->q_stride.batch,
            (long long)p->q_stride.seqlen, (long long)p->q_stride.head);
}

int cuLaunchKernelEx(const struct config *config, void *kernel, void **parameters, void **extra)
{
    (void)extra;
    if (result("cuLaunchKernelEx"))
        return result("cuLaunchKernelEx");
    FILE *file = fopen(getenv("FAKE_LAUNCHES"), "a");
    fprintf(file, "{\"device\": %ld, \"depth\": %d, \"stream\": %lld, ",
            depth ? (long)(stack[depth - 1] - contexts) : -1, depth, (long long)config->stream);
    fprintf(file, "\"grid\": %u, \"block\": %u, \"shared\": %u, ", config->grid[0],
            config->block[0], config->shared_bytes);
    fprintf(file, "\"overlaps\": %s, ", overlaps(config) ? "true" : "false");
    if (*(const int *)kernel)
        print_combine(file, parameters[0]);
    else
        print_forward(file, parameters[0]);
    fclose(file);
    return 0;
}
