#include "launch.h"

#include "enqueue.h"
#include "state.h"

int fa_launch_plan(struct fa_state *state, const struct fa_shape *shape, int ordinal, int arch,
                   struct fa_plan *plan)
{
    struct fa_device device;
    struct fa_plan_error error;
    if (fa_planning_device(state, ordinal, arch, &device) < 0)
        return -1;
    if (fa_plan_forward(shape, &device, state->settings.limits_arch, &state->tiles, plan, &error) <
        0)
        return fa_raise_plan_error(&error);
    return 0;
}

static struct fa_forward_params forward_params(const struct fa_problem *problem,
                                               const struct fa_plan *plan)
{
    const struct fa_shape *shape = &problem->shape;
    const struct fa_scales scales = fa_scales_of(shape);
    return (struct fa_forward_params){
        .q = problem->q.data,
        .k = problem->k.data,
        .v = problem->v.data,
        .out = problem->out.data,
        .lse = problem->lse.object ? problem->lse.data : NULL,
        .sink = problem->sink.object ? problem->sink.data : NULL,
        .q_stride = fa_outer_strides(&problem->q),
        .k_stride = fa_outer_strides(&problem->k),
        .v_stride = fa_outer_strides(&problem->v),
        .out_stride = fa_outer_strides(&problem->out),
        .batch = shape->batch,
        .seqlen_q = shape->seqlen_q,
        .seqlen_k = shape->seqlen_k,
        .window_left = shape->window_left,
        .window_right = shape->window_right,
        .scale_log2 = scales.scale_log2,
        .hidden_score = scales.hidden_score,
        .scale_in_cap = scales.scale_in_cap,
        .sink_dtype = (int)problem->sink.dtype,
        .heads = fa_divisor_of(plan->variant.pack_gqa ? shape->heads_kv : shape->heads_q),
        .heads_per_kv = fa_divisor_of(fa_heads_per_kv(shape)),
        .m_blocks = fa_divisor_of(plan->m_blocks),
        .group_heads = fa_divisor_of(plan->group_heads),
        .parts = fa_divisor_of(plan->parts),
    };
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
    if (fa_encode_tensor_map(driver, &problem->k, tile_n, &params->k_map) < 0)
        return -1;
    return fa_encode_tensor_map(driver, &problem->v, tile_n, &params->v_map);
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
        .out_stride = fa_outer_strides(&problem->out),
        .rows = (unsigned)(shape->batch * shape->heads_q * shape->seqlen_q),
        .parts = plan->parts,
        .sink_dtype = (int)problem->sink.dtype,
        .heads_q = fa_divisor_of(shape->heads_q),
        .seqlen_q = fa_divisor_of(shape->seqlen_q),
        .slices = fa_divisor_of(plan->combine.slices),
    };
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
        fa_enqueue(driver, call->kernel, plan->blocks, plan->threads, plan->smem_request, stream,
                   &params) < 0)
        return -1;
    if (plan->parts == 1)
        return 0;
    struct fa_combine_params combining = combine_params(problem, plan, workspace);
    return fa_enqueue(driver, call->combine, plan->combine.blocks, plan->combine.threads, 0, stream,
                      &combining);
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
    struct fa_tensor workspace = {0};
    struct fa_plan_key key;
    struct fa_planned call;
    void *stream;
    fa_plans_key(&problem->shape, ordinal, &state->tiles, &key);
    const bool is_kept = fa_plans_find(&state->plans, &key, &call);
    if (!is_kept && (fa_launch_plan(state, &problem->shape, ordinal, 0, &call.plan) < 0 ||
                     warn_of_dropped(state, &call.plan) < 0))
        return -1;
    if (fa_tensor_stream(state, &problem->q, &stream) < 0)
        return -1;
    if (call.plan.blocks == 0)
        return 0;
    const struct fa_combine_plan *combine = &call.plan.combine;
    if (call.plan.parts > 1 &&
        fa_tensor_workspace(state, &problem->q, combine->out_floats + combine->lse_floats,
                            &workspace) < 0)
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
