#include "enqueue.h"

#include <float.h>
#include <math.h>

#include "arithmetic.h"
#include "state.h"

int fa_planning_device(struct fa_state *state, int ordinal, int arch, struct fa_device *device)
{
    if (fa_settings_read(&state->settings) < 0)
        return -1;
    if (arch) {
        *device = fa_device_of_arch(arch);
        return 0;
    }
    struct fa_cuda_device *cuda = NULL;
    if (fa_driver_open(&state->driver, state->settings.driver) == 0)
        cuda = fa_driver_device(&state->driver, ordinal);
    if (!cuda)
        return -1;
    *device = cuda->device;
    if (state->settings.plan_as)
        device->arch = state->settings.plan_as;
    return 0;
}

int fa_raise_plan_error(const struct fa_plan_error *error)
{
    PyErr_SetString(error->unsupported ? PyExc_NotImplementedError : PyExc_ValueError,
                    error->message);
    return -1;
}

struct fa_scales fa_scales_of(const struct fa_shape *shape)
{
    const double log2_e = 1.4426950408889634;
    struct fa_scales scales = {0};
    float factor = shape->softmax_scale;
    if (shape->softcap != 0) {
        factor = fminf(shape->softcap, 0x1p100f);
        scales.scale_in_cap = fmaxf(fminf(shape->softmax_scale / factor, FLT_MAX), -FLT_MAX);
    }
    const float scale_log2 = (float)(factor * log2_e);
    scales.scale_log2 = scale_log2 != 0 ? scale_log2 : FLT_TRUE_MIN;
    scales.hidden_score = scales.scale_log2 > 0 ? -INFINITY : INFINITY;
    return scales;
}

struct fa_strides fa_outer_strides(const struct fa_tensor *tensor)
{
    return (struct fa_strides){tensor->stride[0], tensor->stride[1], tensor->stride[2]};
}

struct fa_divisor fa_divisor_of(int number)
{
    int shift = 0;
    while (INT64_C(1) << shift < number)
        shift++;
    const int64_t multiplier = CEIL_DIV(INT64_C(1) << (31 + shift), MAX(number, 1));
    return (struct fa_divisor){number, (unsigned)multiplier, shift};
}

int fa_encode_tensor_map(struct fa_driver *driver, const struct fa_tensor *tensor, int rows,
                         struct fa_tensor_map *map)
{
    const int chunk = fa_chunk_elements(tensor->dtype); /* in elements */
    const int padded = fa_padded_dim((int)tensor->shape[3], fa_mma_k(tensor->dtype));
    const int cols = fa_segment_chunks(padded / chunk);
    const int swizzle = cols == 8   ? CU_TENSOR_MAP_SWIZZLE_128B
                        : cols == 4 ? CU_TENSOR_MAP_SWIZZLE_64B
                                    : CU_TENSOR_MAP_SWIZZLE_32B;
    static const int order[] = {3, 1, 2, 0}; /* head_dim, seqlen, heads, batch */
    uint64_t sizes[4], strides[4];
    for (int i = 0; i < 4; i++) {
        sizes[i] = (uint64_t)tensor->shape[order[i]];
        strides[i] = (uint64_t)fa_element_bytes(tensor->dtype) *
                     (sizes[i] > 1 ? (uint64_t)tensor->stride[order[i]] : sizes[0]);
    }
    const uint32_t box[] = {(uint32_t)(cols * chunk), (uint32_t)rows, 1, 1};
    static const uint32_t ones[] = {1, 1, 1, 1};
    return FA_CUDA(driver, cuTensorMapEncodeTiled,
                   (map,
                    tensor->dtype == FA_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                    4, tensor->data, sizes, strides + 1, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                    swizzle, CU_TENSOR_MAP_L2_PROMOTION_128B, CU_TENSOR_MAP_OOB_FILL_ZEROS));
}

int fa_enqueue(struct fa_driver *driver, CUkernel kernel, int blocks, int threads, int smem,
               CUstream stream, void *params)
{
    const CUlaunchConfig config = {
        .grid_x = (unsigned)blocks,
        .grid_y = 1,
        .grid_z = 1,
        .block_x = (unsigned)threads,
        .block_y = 1,
        .block_z = 1,
        .shared_bytes = (unsigned)smem,
        .stream = stream,
    };
    void *arguments[] = {params};
    CUresult result;
    Py_BEGIN_ALLOW_THREADS
    result = driver->cuLaunchKernelEx(&config, kernel, arguments, NULL);
    Py_END_ALLOW_THREADS
    return fa_driver_check(driver, result, "cuLaunchKernelEx");
}
