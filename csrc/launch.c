#include "launch.h"

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

/* Room for the parts of a split call, of the tensors' framework. It can be given back once the
 * kernels are enqueued: whoever gets that memory next uses it after them, on the same stream. 0 or
 * -1. */
static int allocate_workspace(struct fa_state *state, const struct fa_problem *problem,
                              const struct fa_plan *plan, struct fa_tensor *workspace)
{
    const int64_t floats = plan->combine.out_floats + plan->combine.lse_floats;
    if (fa_tensor_empty(state, &problem->q, FA_FLOAT32, 1, &floats, workspace) == 0)
        return 0;
    PyObject *type, *value, *traceback; /* the framework's own exception is the best to catch */
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_Format(type,
                 "the %d parts that num_splits divides the keys into need %lld bytes (1 needs "
                 "none): %S",
                 plan->parts, (long long)floats * 4, value ? value : Py_None);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return -1;
}

static struct fa_forward_params forward_params(const struct fa_problem *problem,
                                               const struct fa_plan *plan)
{
    const struct fa_shape *shape = &problem->shape;
    return (struct fa_forward_params){
        .q = problem->q.data,
        .k = problem->k.data,
        .v = problem->v.data,
        .out = problem->out.data,
        .lse = problem->lse.object ? problem->lse.data : NULL,
        .sink = problem->sink.object ? problem->sink.data : NULL,
        .q_stride = outer_strides(&problem->q),
        .k_stride = outer_strides(&problem->k),
        .v_stride = outer_strides(&problem->v),
        .out_stride = outer_strides(&problem->out),
        .batch = shape->batch,
        .heads_q = shape->heads_q,
        .heads_per_kv = shape->heads_q / shape->heads_kv,
        .seqlen_q = shape->seqlen_q,
        .seqlen_k = shape->seqlen_k,
        .m_blocks = plan->m_blocks,
        .parts = plan->parts,
        .group_heads = plan->group_heads,
        .window_left = shape->window_left,
        .window_right = shape->window_right,
        .scale_log2 = (float)(shape->softmax_scale * LOG2_E),
        .sink_dtype = (int)problem->sink.dtype,
    };
}

/* K or V, in boxes of one tile's keys and as many dims as tile_layout in kernels/layout.cuh puts in a
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
                       const struct fa_plan *plan, float *workspace,
                       struct fa_forward_tma_params *params)
{
    params->forward = forward_params(problem, plan);
    if (plan->parts > 1) {
        params->forward.out = workspace;
        params->forward.lse = workspace + plan->combine.out_floats;
    }
    if (plan->variant.kernel != FA_KERNEL_FORWARD_TMA)
        return 0;
    const int tile_n = plan->variant.tile_n;
    if (encode_tensor_map(driver, &problem->k, tile_n, &params->k_map) < 0)
        return -1;
    return encode_tensor_map(driver, &problem->v, tile_n, &params->v_map);
}

static struct fa_combine_params combine_params(const struct fa_problem *problem,
                                               const struct fa_plan *plan, const float *workspace)
{
    const struct fa_shape *shape = &problem->shape;
    return (struct fa_combine_params){
        .out_parts = workspace,
        .lse_parts = workspace + plan->combine.out_floats,
        .out = problem->out.data,
        .lse = problem->lse.object ? problem->lse.data : NULL,
        .sink = problem->sink.object ? problem->sink.data : NULL,
        .out_stride = outer_strides(&problem->out),
        .rows = (unsigned)(shape->batch * shape->heads_q * shape->seqlen_q),
        .heads_q = (unsigned)shape->heads_q,
        .seqlen_q = (unsigned)shape->seqlen_q,
        .parts = plan->parts,
        .slices = plan->combine.slices,
        .sink_dtype = (int)problem->sink.dtype,
    };
}

static int launch(struct fa_driver *driver, CUkernel kernel, int blocks, int threads, int smem,
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

/* The kernels of the plan, loaded, where they are not yet. 0 or -1. */
static int load_kernels(struct fa_state *state, int ordinal, CUstream stream,
                        struct fa_planned *call)
{
    const struct fa_plan *plan = &call->plan;
    if (plan->parts > 1) {
        call->combine = fa_kernels_get(state, &plan->combine.variant, 0, ordinal, stream);
        if (!call->combine)
            return -1;
    }
    call->kernel = fa_kernels_get(state, &plan->variant, plan->smem_request, ordinal, stream);
    return call->kernel ? 0 : -1;
}

/* Launches the plan's kernel and, where it is split, combine behind it: both or, as far as can be
 * known before, none. */
static int launch_kernels(struct fa_driver *driver, const struct fa_problem *problem,
                          const struct fa_planned *call, float *workspace, CUstream stream)
{
    const struct fa_plan *plan = &call->plan;
    struct fa_forward_tma_params params;
    if (make_params(driver, problem, plan, workspace, &params) < 0 ||
        launch(driver, call->kernel, plan->blocks, plan->threads, plan->smem_request, stream,
               &params) < 0)
        return -1;
    if (plan->parts == 1)
        return 0;
    struct fa_combine_params combining = combine_params(problem, plan, workspace);
    return launch(driver, call->combine, plan->combine.blocks, plan->combine.threads, 0, stream,
                  &combining);
}

int fa_launch_forward(struct fa_state *state, const struct fa_problem *problem)
{
    const int ordinal = problem->q.device_id;
    struct fa_driver *driver = &state->driver;
    struct fa_tensor workspace = {0};
    struct fa_plan_key key;
    struct fa_planned call;
    void *stream;
    fa_plans_key(&problem->shape, ordinal, &state->tiles, &key);
    const bool is_kept = fa_plans_find(&state->plans, &key, &call);
    if (!is_kept && fa_launch_plan(state, &problem->shape, ordinal, 0, &call.plan) < 0)
        return -1;
    if (fa_tensor_stream(state, &problem->q, &stream) < 0)
        return -1;
    if (call.plan.blocks == 0)
        return 0;
    if (call.plan.parts > 1 && allocate_workspace(state, problem, &call.plan, &workspace) < 0)
        return -1;

    int status = -1;
    bool pushed;
    if (fa_driver_enter(driver, &driver->devices[ordinal], &pushed) == 0) {
        if (is_kept || load_kernels(state, ordinal, stream, &call) == 0) {
            if (!is_kept)
                fa_plans_keep(&state->plans, &key, &call);
            status = launch_kernels(driver, problem, &call, workspace.data, stream);
        }
        fa_driver_leave(driver, pushed);
    }
    fa_tensor_release(&workspace);
    return status;
}

int fa_launch_backward(struct fa_state *Py_UNUSED(state),
                       const struct fa_problem *Py_UNUSED(problem),
                       const struct fa_gradients *Py_UNUSED(gradients))
{
    PyErr_SetString(PyExc_NotImplementedError, "the backward is not supported on CUDA yet");
    return -1;
}
