#include "launch.h"

#include <float.h>
#include <math.h>

#include "state.h"

#define LOG2_E 1.4426950408889634

static int raise_plan_error(const struct fa_plan_error *error)
{
    PyErr_SetString(error->unsupported ? PyExc_NotImplementedError : PyExc_ValueError,
                    error->message);
    return -1;
}

int fa_launch_plan(struct fa_state *state, const struct fa_shape *shape, int ordinal, int arch,
                   struct fa_plan *plan)
{
    struct fa_device device;
    if (fa_settings_read(&state->settings) < 0)
        return -1;
    if (arch)
        device = fa_device_of_arch(arch);
    else {
        struct fa_cuda_device *cuda = NULL;
        if (fa_driver_open(&state->driver, state->settings.driver) == 0)
            cuda = fa_driver_device(&state->driver, ordinal);
        if (!cuda)
            return -1;
        device = cuda->device;
        if (state->settings.plan_as)
            device.arch = state->settings.plan_as;
    }
    struct fa_plan_error error;
    if (fa_plan_forward(shape, &device, state->settings.limits_arch, &state->tiles, plan, &error) <
        0)
        return raise_plan_error(&error);
    return 0;
}

static struct fa_strides outer_strides(const struct fa_tensor *tensor)
{
    return (struct fa_strides){tensor->stride[0], tensor->stride[1], tensor->stride[2]};
}

/* The numbers that take a score s to the exponent of 2. They keep away from the ends of fp32:
 * 0 times the infinite score of a hidden key is NaN, the smallest number times any other score
 * rounds away; and no score is near a cap of 2^100, which then changes none. */
static void set_scales(const struct fa_shape *shape, struct fa_forward_params *params)
{
    float factor = shape->softmax_scale;
    if (shape->softcap != 0) {
        factor = fminf(shape->softcap, 0x1p100f);
        params->scale_in_cap = fmaxf(fminf(shape->softmax_scale / factor, FLT_MAX), -FLT_MAX);
    }
    const float scale_log2 = (float)(factor * LOG2_E);
    params->scale_log2 = scale_log2 != 0 ? scale_log2 : FLT_TRUE_MIN;
    params->hidden_score = params->scale_log2 > 0 ? -INFINITY : INFINITY;
}

static struct fa_forward_params forward_params(const struct fa_problem *problem,
                                               const struct fa_plan *plan)
{
    const struct fa_shape *shape = &problem->shape;
    const int heads_per_kv = shape->heads_q / shape->heads_kv;
    return (struct fa_forward_params){
        .q = problem->q.data,
        .k = problem->k.data,
        .v = problem->v.data,
        .out = problem->out.data,
        .lse = problem->lse.object ? problem->lse.data : NULL,
        .q_stride = outer_strides(&problem->q),
        .k_stride = outer_strides(&problem->k),
        .v_stride = outer_strides(&problem->v),
        .out_stride = outer_strides(&problem->out),
        .batch = shape->batch,
        .heads = plan->variant.pack_gqa ? shape->heads_kv : shape->heads_q,
        .heads_per_kv = heads_per_kv,
        .heads_per_kv_inverse = (unsigned)(((1LL << 32) + heads_per_kv - 1) / heads_per_kv),
        .seqlen_q = shape->seqlen_q,
        .seqlen_k = shape->seqlen_k,
        .m_blocks = plan->m_blocks,
        .group_heads = plan->group_heads,
        .window_left = shape->window_left,
        .window_right = shape->window_right,
    };
}

/* K or V, in boxes of one tile's keys and as many dims as tile_layout in kernels/tile.cuh puts in a
 * row of a segment. 0 or -1. */
static int encode_tensor_map(struct fa_driver *driver, const struct fa_tensor *tensor, int tile_n,
                             struct fa_tensor_map *map)
{
    const int padded = ((int)tensor->shape[3] + 15) / 16 * 2; /* 16-byte chunks */
    const int cols = padded % 8 == 0 ? 8 : padded % 4 == 0 ? 4 : 2;
    const int swizzle = cols == 8   ? CU_TENSOR_MAP_SWIZZLE_128B
                        : cols == 4 ? CU_TENSOR_MAP_SWIZZLE_64B
                                    : CU_TENSOR_MAP_SWIZZLE_32B;
    static const int order[] = {3, 1, 2, 0}; /* head_dim, seqlen, heads, batch */
    uint64_t sizes[4], strides[4];
    for (int i = 0; i < 4; i++) {
        sizes[i] = (uint64_t)tensor->shape[order[i]];
        strides[i] = 2 * (sizes[i] > 1 ? (uint64_t)tensor->stride[order[i]] : sizes[0]);
    }
    const uint32_t box[] = {8 * (uint32_t)cols, (uint32_t)tile_n, 1, 1};
    static const uint32_t ones[] = {1, 1, 1, 1};
    return FA_CUDA(driver, cuTensorMapEncodeTiled,
                   (map,
                    tensor->dtype == FA_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                    4, tensor->data, sizes, strides + 1, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                    swizzle, CU_TENSOR_MAP_L2_PROMOTION_128B, CU_TENSOR_MAP_OOB_FILL_ZEROS));
}

/* The argument of the plan's kernel: forward takes what forward_tma's begins with. 0 or -1. */
static int make_params(struct fa_driver *driver, const struct fa_problem *problem,
                       const struct fa_plan *plan, struct fa_forward_tma_params *params)
{
    params->forward = forward_params(problem, plan);
    set_scales(&problem->shape, &params->forward);
    if (plan->variant.kernel != FA_KERNEL_FORWARD_TMA)
        return 0;
    const int tile_n = plan->variant.tile_n;
    if (encode_tensor_map(driver, &problem->k, tile_n, &params->k_map) < 0)
        return -1;
    return encode_tensor_map(driver, &problem->v, tile_n, &params->v_map);
}

/* Nothing that was asked for is dropped silently: one warning per process and reason. 0 or -1. */
static int warn_of_dropped(struct fa_state *state, const struct fa_plan *plan)
{
    for (int i = 0; i < plan->reason_count; i++) {
        const struct fa_reason *reason = &plan->reasons[i];
        int seen = 0;
        while (seen < state->warned_count && state->warned[seen] != reason->why)
            seen++;
        if (!reason->dropped || seen < state->warned_count || seen == FA_MAX_WARNINGS)
            continue;
        state->warned[state->warned_count++] = reason->why;
        if (PyErr_WarnFormat(PyExc_UserWarning, 1, "%s was asked for and is dropped: %s",
                             reason->choice, reason->why) < 0)
            return -1;
    }
    return 0;
}

int fa_launch_forward(struct fa_state *state, const struct fa_problem *problem)
{
    const int ordinal = problem->q.device_id;
    struct fa_driver *driver = &state->driver;
    struct fa_plan plan;
    void *stream;
    if (fa_launch_plan(state, &problem->shape, ordinal, 0, &plan) < 0 ||
        fa_tensor_stream(state, &problem->q, &stream) < 0)
        return -1;
    if (plan.blocks == 0)
        return 0;
    if (warn_of_dropped(state, &plan) < 0)
        return -1;

    bool pushed;
    if (fa_driver_enter(driver, &driver->devices[ordinal], &pushed) < 0)
        return -1;
    int status = -1;
    struct fa_forward_tma_params params;
    CUkernel kernel = fa_kernels_get(state, &plan, ordinal, stream);
    if (kernel && make_params(driver, problem, &plan, &params) == 0) {
        void *arguments[] = {&params};
        const CUlaunchConfig config = {
            .grid_x = (unsigned)plan.blocks,
            .grid_y = 1,
            .grid_z = 1,
            .block_x = (unsigned)plan.threads,
            .block_y = 1,
            .block_z = 1,
            .shared_bytes = (unsigned)plan.smem_request,
            .stream = stream,
        };
        CUresult result;
        Py_BEGIN_ALLOW_THREADS
        result = driver->cuLaunchKernelEx(&config, kernel, arguments, NULL);
        Py_END_ALLOW_THREADS
        status = fa_driver_check(driver, result, "cuLaunchKernelEx");
    }
    fa_driver_leave(driver, pushed);
    return status;
}
