#include "launch.h"

#include "arguments.h"
#include "device_check.h"
#include "planning.h"

/* A call on its way to the stream. */
struct call {
    struct fa_state *state;
    const struct fa_problem *problem;
    const struct fa_gradients *gradients; /* NULL: the forward */
    int ordinal;
    CUstream stream;
    struct fa_plan_key key;
    struct fa_planned *planned;
    bool is_kept; /* in the cache: its kernels are loaded */
};

/* The plan, from the cache or made anew. 0 or -1. */
static int find_plan(struct call *call)
{
    struct fa_state *state = call->state;
    call->key = (struct fa_plan_key){
        .input = fa_planning_input(call->problem, call->gradients ? FA_BACKWARD : FA_FORWARD,
                                   call->gradients ? &call->gradients->dout : NULL),
        .ordinal = call->ordinal,
        .tiles_version = state->tiles.version,
    };
    struct fa_plan *plan = &call->planned->plan;
    if (fa_planning_set_may_split(state, call->problem, call->ordinal, 0, &call->key.input) < 0)
        return -1;
    call->is_kept = fa_plan_cache_find(&state->plans, &call->key, call->planned);
    if (call->is_kept)
        return fa_planning_fit(call->problem, &call->key.input, plan);
    state->plans.made++;
    if (fa_planning_make(state, &call->key.input, call->ordinal, 0, plan) < 0 ||
        fa_planning_fit(call->problem, &call->key.input, plan) < 0)
        return -1;
    return fa_planning_warn(state, plan);
}

/* Looks at lengths, pages and lists of blocks, where FA_SM120_CHECK asks for it. 0 or -1. */
static int check(const struct call *call)
{
    const struct fa_options *options = &call->problem->options;
    const bool has_lists = options->key_blocks || options->query_blocks;
    if (!call->state->settings.check || !(call->problem->shape.is_varlen || has_lists))
        return 0;
    return fa_problem_recheck(call->problem, call->gradients, NULL) < 0
               ? -1
               : fa_device_check(&call->state->driver, call->problem, call->stream);
}

/* The kernels of the plan, loaded, where they are not yet. 0 or -1. */
static int load_kernels(struct call *call)
{
    const struct fa_plan *plan = &call->planned->plan;
    struct fa_state *state = call->state;
    if (call->is_kept)
        return 0;
    for (int i = 0; i < plan->step_count; i++) {
        const struct fa_step *step = &plan->steps[i];
        call->planned->kernels[i] = NULL;
        if (step->blocks == 0 && !call->key.input.varlen)
            continue; /* nor has the next call with this plan any */
        call->planned->kernels[i] =
            fa_kernel_table_get(&state->kernels, &state->driver, &step->variant, step->smem_request,
                                call->ordinal, call->stream);
        if (!call->planned->kernels[i])
            return -1;
    }
    fa_plan_cache_keep(&state->plans, &call->key, call->planned);
    return 0;
}

/* Captured graphs have programmatic dependencies since CUDA 12.3. */
#define OVERLAP_VERSION 12030

/* Launches a kernel whose single argument is *params, without waiting for it. 0 or -1. */
static int enqueue(struct fa_driver *driver, CUkernel kernel, const struct fa_step *step,
                   CUstream stream, void *params)
{
    CUlaunchAttribute overlap = {CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                                 .value.programmatic_stream_serialization = 1};
    const CUlaunchConfig config = {
        .grid_x = (unsigned)step->blocks,
        .grid_y = 1,
        .grid_z = 1,
        .block_x = (unsigned)step->threads,
        .block_y = 1,
        .block_z = 1,
        .shared_bytes = (unsigned)step->smem_request,
        .stream = stream,
        .attributes = &overlap,
        .attribute_count = step->overlaps_previous && driver->version >= OVERLAP_VERSION,
    };
    void *arguments[] = {params};
    CUresult result;
    Py_BEGIN_ALLOW_THREADS
    result = driver->cuLaunchKernelEx(&config, kernel, arguments, NULL);
    Py_END_ALLOW_THREADS
    return fa_driver_check(driver, result, "cuLaunchKernelEx");
}

static int launch_kernels(const struct call *call, float *workspace)
{
    const struct fa_plan *plan = &call->planned->plan;
    struct fa_driver *driver = &call->state->driver;
    union fa_arguments arguments;
    if (fa_arguments_make(driver, call->problem, call->gradients, plan, workspace, &arguments) < 0)
        return -1;
    for (int i = 0; i < plan->step_count; i++) {
        const struct fa_step *step = &plan->steps[i];
        if (step->blocks > 0 && enqueue(driver, call->planned->kernels[i], step, call->stream,
                                        fa_arguments_of(&arguments, step->job)) < 0)
            return -1;
    }
    return 0;
}

static bool has_blocks(const struct fa_plan *plan)
{
    for (int i = 0; i < plan->step_count; i++)
        if (plan->steps[i].blocks > 0)
            return true;
    return false;
}

int fa_launch(struct fa_state *state, const struct fa_problem *problem,
              const struct fa_gradients *gradients)
{
    struct fa_planned planned; /* large, and set by find_plan() as far as it is read */
    struct call call = {
        .state = state,
        .problem = problem,
        .gradients = gradients,
        .ordinal = problem->q.device_id,
        .planned = &planned,
    };
    struct fa_driver *driver = &state->driver;
    struct fa_tensor workspace = {0};
    void *stream;
    if (find_plan(&call) < 0 || fa_tensor_stream(&state->dlpack, &problem->q, &stream) < 0)
        return -1;
    const struct fa_plan *plan = &planned.plan;
    if (!has_blocks(plan))
        return 0;
    if (plan->workspace.size > 0 &&
        fa_tensor_workspace(&state->dlpack, &problem->q, plan->workspace.size, &workspace) < 0)
        return -1;
    call.stream = stream;
    int status = -1;
    bool pushed;
    if (fa_driver_enter(driver, &driver->devices[call.ordinal], &pushed) == 0) {
        if (check(&call) == 0 && load_kernels(&call) == 0 &&
            fa_problem_recheck(problem, gradients, &workspace) == 0)
            status = launch_kernels(&call, workspace.data);
        fa_driver_leave(driver, pushed);
    }
    fa_tensor_release(&workspace);
    return status;
}

/* ---- a kernel alone -------------------------------------------------------------------------- */

/* What a kernel is launched for without a plan. */
struct request {
    const struct fa_tensor *tensor; /* whose device it is */
    const void *call;
    int (*recheck)(const void *call);
};

static int launch_alone(struct fa_state *state, const struct request *request,
                        const struct fa_step *step, void *params)
{
    struct fa_driver *driver = &state->driver;
    const int ordinal = request->tensor->device_id;
    if (fa_settings_read(&state->settings) < 0 ||
        fa_driver_open(driver, state->settings.driver) < 0)
        return -1;
    struct fa_cuda_device *device = fa_driver_device(driver, ordinal);
    void *stream;
    if (!device || fa_tensor_stream(&state->dlpack, request->tensor, &stream) < 0)
        return -1;
    int status = -1;
    bool pushed;
    if (fa_driver_enter(driver, device, &pushed) == 0) {
        const CUkernel kernel =
            fa_kernel_table_get(&state->kernels, driver, &step->variant, 0, ordinal, stream);
        if (kernel && request->recheck(request->call) == 0)
            status = enqueue(driver, kernel, step, stream, params);
        fa_driver_leave(driver, pushed);
    }
    return status;
}

static int recheck_parts(const void *parts) { return fa_parts_recheck(parts); }

int fa_launch_combine(struct fa_state *state, const struct fa_parts *parts)
{
    const struct fa_tensor *out = &parts->out;
    const struct request request = {out, parts, recheck_parts};
    struct fa_step step =
        fa_plan_combine((int)out->dtype, (int)parts->out_parts.dtype, (int)out->shape[3]);
    const int slices =
        fa_plan_fit_combine(fa_parts_rows(parts), (int)parts->out_parts.shape[0], &step);
    struct fa_combine_params params = fa_arguments_of_parts(parts, slices);
    return step.blocks == 0 ? 0 : launch_alone(state, &request, &step, &params);
}

static int recheck_scatter(const void *scatter) { return fa_scatter_recheck(scatter); }

int fa_launch_scatter(struct fa_state *state, const struct fa_scatter *scatter)
{
    const struct fa_tensor *k = &scatter->tensors[FA_SCATTER_K];
    const struct request request = {k, scatter, recheck_scatter};
    const struct fa_step step = {
        .variant = {.kernel = FA_KERNEL_KV_SCATTER,
                    .dtype = (int)k->dtype,
                    .kv_e4m3 = scatter->is_e4m3},
        .blocks = scatter->tokens,
        .threads = FA_APPEND_THREADS,
    };
    struct fa_scatter_params params;
    if (scatter->tokens == 0 || scatter->slots == 0)
        return 0;
    params = fa_arguments_of_scatter(scatter);
    return launch_alone(state, &request, &step, &params);
}
