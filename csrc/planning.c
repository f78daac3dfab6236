#include "planning.h"

#include "arithmetic.h"

struct fa_plan_input fa_planning_input(const struct fa_problem *problem,
                                       enum fa_direction direction, const struct fa_tensor *dout)
{
    const struct fa_shape *shape = &problem->shape;
    const struct fa_options *options = &problem->options;
    const bool is_forward = direction == FA_FORWARD;
    const struct fa_tensor *first = is_forward ? &problem->k : &problem->q;
    const struct fa_tensor *second = is_forward ? &problem->v : dout;
    return (struct fa_plan_input){
        .direction = direction,
        .dtype = shape->dtype,
        .batch = shape->batch,
        .seqlen_q = shape->seqlen_q,
        .seqlen_k = CEIL_DIV(shape->seqlen_k, FA_KEY_STEP) * FA_KEY_STEP,
        .heads_q = shape->heads_q,
        .heads_kv = shape->heads_kv,
        .head_dim = shape->head_dim,
        .head_dim_v = shape->head_dim_v,
        .window_left = shape->window_left,
        .window_right = shape->window_right,
        .mask_right = fa_shape_has_right_mask(shape),
        .mask_left = fa_shape_has_left_mask(shape),
        .all_see_keys = fa_shape_all_see_keys(shape),
        .softcap = shape->softcap != 0,
        .sink = problem->sink.object != NULL,
        .num_splits = is_forward ? options->num_splits : 0,
        .pack_gqa = is_forward ? (int)options->pack_gqa : FA_PACK_AUTO,
        .deterministic = !is_forward && options->deterministic,
        .tma_strides =
            fa_tensor_has_tma_strides(first) && (!second || fa_tensor_has_tma_strides(second)),
    };
}

static int set_target(struct fa_state *state, int ordinal, int arch, struct fa_plan_target *target)
{
    if (fa_settings_read(&state->settings) < 0)
        return -1;
    target->limits_arch = state->settings.limits_arch;
    target->tiles = &state->tiles;
    if (arch) {
        target->device = fa_device_of_arch(arch);
        return 0;
    }
    const struct fa_cuda_device *cuda = NULL;
    if (fa_driver_open(&state->driver, state->settings.driver) == 0)
        cuda = fa_driver_device(&state->driver, ordinal);
    if (!cuda)
        return -1;
    target->device = cuda->device;
    if (state->settings.plan_as)
        target->device.arch = state->settings.plan_as;
    return 0;
}

int fa_planning_make(struct fa_state *state, const struct fa_plan_input *input, int ordinal,
                     int arch, struct fa_plan *plan)
{
    struct fa_plan_target target;
    struct fa_plan_error error;
    if (set_target(state, ordinal, arch, &target) < 0)
        return -1;
    if (fa_plan_make(input, &target, plan, &error) == 0)
        return 0;
    PyErr_SetString(error.unsupported ? PyExc_NotImplementedError : PyExc_ValueError,
                    error.message);
    return -1;
}

int fa_planning_warn(struct fa_state *state, const struct fa_plan *plan)
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
