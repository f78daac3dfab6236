#include "arithmetic.h"
#include "enqueue.h"
#include "launch.h"
#include "plan_backward.h"
#include "state.h"

/* A planned backward on its way to the stream. */
struct backward {
    struct fa_state *state;
    const struct fa_problem *problem;
    const struct fa_gradients *gradients;
    struct fa_backward_plan plan;
    struct fa_tensor workspace;
    CUstream stream;
};

static float *at(const struct backward *call, int64_t offset)
{
    return (float *)call->workspace.data + offset;
}

static struct fa_backward_params backward_params(const struct backward *call)
{
    const struct fa_problem *problem = call->problem;
    const struct fa_gradients *gradients = call->gradients;
    const struct fa_shape *shape = &problem->shape;
    const struct fa_backward_plan *plan = &call->plan;
    const struct fa_scales scales = fa_scales_of(shape);
    const int64_t zero_chunks = (plan->workspace - plan->dq_accum) / 4;
    return (struct fa_backward_params){
        .q = problem->q.data,
        .k = problem->k.data,
        .v = problem->v.data,
        .out = problem->out.data,
        .dout = gradients->dout.data,
        .lse = problem->lse.data,
        .dlse = gradients->dlse.object ? gradients->dlse.data : NULL,
        .sink = problem->sink.object ? problem->sink.data : NULL,
        .dk = gradients->dk.data,
        .dv = gradients->dv.data,
        .dsink = gradients->dsink.object ? gradients->dsink.data : NULL,
        .lse_delta = at(call, 0),
        .dq_accum = at(call, plan->dq_accum),
        .dk_accum = at(call, plan->dk_accum),
        .dv_accum = at(call, plan->dv_accum),
        .dq_semaphores = (int *)at(call, plan->dq_semaphores),
        .dkv_semaphores = (int *)at(call, plan->dkv_semaphores),
        .block_counter = (int *)at(call, plan->block_counter),
        .zeros = at(call, plan->dq_accum),
        .zero_chunks = zero_chunks,
        .q_stride = fa_outer_strides(&problem->q),
        .k_stride = fa_outer_strides(&problem->k),
        .v_stride = fa_outer_strides(&problem->v),
        .out_stride = fa_outer_strides(&problem->out),
        .dout_stride = fa_outer_strides(&gradients->dout),
        .dk_stride = fa_outer_strides(&gradients->dk),
        .dv_stride = fa_outer_strides(&gradients->dv),
        .batch = shape->batch,
        .heads_q = shape->heads_q,
        .heads_kv = shape->heads_kv,
        .heads_per_kv = fa_heads_per_kv(shape),
        .seqlen_q = shape->seqlen_q,
        .seqlen_k = shape->seqlen_k,
        .m_blocks = plan->m_blocks,
        .n_blocks = plan->n_blocks,
        .q_splits = plan->q_splits,
        .window_left = shape->window_left,
        .window_right = shape->window_right,
        .sink_dtype = (int)problem->sink.dtype,
        .scale_log2 = scales.scale_log2,
        .masked_score = scales.hidden_score,
        .scale_in_cap = scales.scale_in_cap,
        .softmax_scale = shape->softmax_scale,
        .zero_share = CEIL_DIV(zero_chunks, MAX(plan->preprocess.blocks, 1)),
    };
}

/* The argument of the main kernel and of those before it. 0 or -1. */
static int make_params(const struct backward *call, struct fa_backward_params *params)
{
    const struct fa_variant *variant = &call->plan.main.variant;
    struct fa_driver *driver = &call->state->driver;
    *params = backward_params(call);
    if (!variant->tma)
        return 0;
    if (fa_encode_tensor_map(driver, &call->problem->q, variant->tile_m, &params->q_map) < 0)
        return -1;
    return fa_encode_tensor_map(driver, &call->gradients->dout, variant->tile_m, &params->dout_map);
}

static struct fa_postprocess_params postprocess_params(const struct backward *call, int64_t accum,
                                                       const struct fa_tensor *tensor, int rows,
                                                       float scale, int buffers)
{
    return (struct fa_postprocess_params){
        .accum = at(call, accum),
        .tensor = tensor->data,
        .stride = fa_outer_strides(tensor),
        .batch = (int)tensor->shape[0],
        .seqlen = (int)tensor->shape[1],
        .buffers = buffers,
        .scale = scale,
        .heads = fa_divisor_of((int)tensor->shape[2]),
        .row_frags = fa_divisor_of(rows / 16),
    };
}

/* One of the kernels and its argument. */
struct launch {
    const struct fa_step *step;
    void *params;
    CUkernel kernel;
};

/* Launches those that have blocks: all or, as far as can be known before, none. */
static int launch_all(const struct backward *call, struct launch *launches, int count)
{
    const int ordinal = call->problem->q.device_id;
    struct fa_driver *driver = &call->state->driver;
    for (int i = 0; i < count; i++) {
        const struct fa_step *step = launches[i].step;
        if (step->blocks == 0)
            continue;
        launches[i].kernel =
            fa_kernels_get(call->state, &step->variant, step->smem_request, ordinal, call->stream);
        if (!launches[i].kernel)
            return -1;
    }
    for (int i = 0; i < count; i++) {
        const struct fa_step *step = launches[i].step;
        if (step->blocks > 0 &&
            fa_enqueue(driver, launches[i].kernel, step->blocks, step->threads, step->smem_request,
                       call->stream, launches[i].params) < 0)
            return -1;
    }
    return 0;
}

static int launch_kernels(const struct backward *call)
{
    const struct fa_backward_plan *plan = &call->plan;
    const struct fa_gradients *gradients = call->gradients;
    const int queries = plan->m_blocks * plan->main.variant.tile_m;
    const int keys = plan->n_blocks * plan->tile_n;
    const float scale = call->problem->shape.softmax_scale;
    struct fa_backward_params params;
    struct fa_postprocess_params dq = postprocess_params(
        call, plan->dq_accum, &gradients->dq, queries, scale, plan->main.variant.dq_buffers);
    struct fa_postprocess_params dk =
        postprocess_params(call, plan->dk_accum, &gradients->dk, keys, scale, 1);
    struct fa_postprocess_params dv =
        postprocess_params(call, plan->dv_accum, &gradients->dv, keys, 1, 1);
    if (make_params(call, &params) < 0)
        return -1;
    struct launch launches[] = {
        {&plan->preprocess, &params, NULL},
        {&plan->main, &params, NULL},
        {&plan->dq, &dq, NULL},
        {&plan->dk, &dk, NULL},
        {&plan->dv, &dv, NULL},
        {&plan->dsink, &params, NULL},
    };
    return launch_all(call, launches, (int)(sizeof launches / sizeof *launches));
}

int fa_launch_plan_backward(struct fa_state *state, const struct fa_shape *shape,
                            const struct fa_backward_options *options, int ordinal, int arch,
                            struct fa_backward_plan *plan)
{
    struct fa_device device;
    struct fa_plan_error error;
    if (fa_planning_device(state, ordinal, arch, &device) < 0)
        return -1;
    if (fa_plan_backward(shape, options, &device, state->settings.limits_arch, plan, &error) < 0)
        return fa_raise_plan_error(&error);
    return 0;
}

int fa_launch_backward(struct fa_state *state, const struct fa_problem *problem,
                       const struct fa_gradients *gradients)
{
    struct backward call = {.state = state, .problem = problem, .gradients = gradients};
    struct fa_driver *driver = &state->driver;
    const struct fa_backward_options options = {
        .deterministic = gradients->deterministic,
        .tma_strides =
            fa_tensor_has_tma_strides(&problem->q) && fa_tensor_has_tma_strides(&gradients->dout),
        .has_sink = problem->sink.object,
    };
    void *stream;
    if (fa_launch_plan_backward(state, &problem->shape, &options, problem->q.device_id, 0,
                                &call.plan) < 0 ||
        fa_tensor_stream(state, &problem->q, &stream) < 0 ||
        fa_tensor_workspace(state, &problem->q, call.plan.workspace, &call.workspace) < 0)
        return -1;
    call.stream = stream;
    int status = -1;
    bool pushed;
    if (fa_driver_enter(driver, &driver->devices[problem->q.device_id], &pushed) == 0) {
        status = launch_kernels(&call);
        fa_driver_leave(driver, pushed);
    }
    fa_tensor_release(&call.workspace);
    return status;
}
