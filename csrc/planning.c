#include "planning.h"

#include <string.h>

#include "arithmetic.h"

/* The least power of two that is not below it: few plans serve all lengths. */
static int rounded_up(int length)
{
    int bound = length > 0 ? 1 : 0;
    while (bound < MIN(length, FA_MAX_SIZE))
        bound *= 2;
    return MIN(bound, FA_MAX_SIZE);
}

/* A length that all sequences have, or a bound of their lengths: that of the caller, if a side has
 * one, whatever the rows of the tensor are. */
static int planned_length(const struct fa_shape *shape, int seqlen, bool is_bounded, int max_seqlen)
{
    if (!shape->is_varlen)
        return seqlen;
    return rounded_up(is_bounded && max_seqlen != FA_NO_BOUND ? max_seqlen : seqlen);
}

/* The same for keys: 0 where there is no row of any. No tensor map describes those of the forward,
 * and no block of the backward has any, to store dQ. */
static int planned_keys(const struct fa_problem *problem)
{
    const struct fa_shape *shape = &problem->shape;
    const bool is_bounded = shape->is_packed_k || shape->page_size;
    if (fa_tensor_is_empty(&problem->k))
        return 0;
    return planned_length(shape, shape->seqlen_k, is_bounded, problem->options.max_seqlen_k);
}

/* Whether a tensor map can describe K or V, or in the backward Q or dO. Those of packed queries
 * begin some rows before the tensor, see arguments.c, which must not be far. */
static bool has_map(const struct fa_shape *shape, bool is_forward, const struct fa_tensor *tensor)
{
    enum { MOST_BYTES_OF_A_ROW = 1 << 20 };
    if (!shape->is_varlen || is_forward)
        return fa_tensor_has_tma_strides(tensor);
    const int64_t row_bytes = tensor->stride[0] * fa_element_bytes(tensor->dtype);
    return shape->is_packed_q && fa_tensor_has_tma_strides(tensor) &&
           (tensor->shape[0] < 2 || row_bytes <= MOST_BYTES_OF_A_ROW);
}

/* Rows of the boxes of pages, as far as plans differ by them. */
static int planned_box_rows(int page_size)
{
    const int rows = page_size ? fa_page_box_rows(FA_TMA_KEY_STEP, page_size) : 0;
    return rows < FA_TMA_KEY_STEP ? MIN(rows, FA_MIN_BOX_ROWS) : rows;
}

struct fa_plan_input fa_planning_input(const struct fa_problem *problem,
                                       enum fa_direction direction, const struct fa_tensor *dout)
{
    const struct fa_shape *shape = &problem->shape;
    const struct fa_options *options = &problem->options;
    const bool is_forward = direction == FA_FORWARD;
    const int keys = planned_keys(problem);
    const struct fa_block_lists_read *lists =
        is_forward ? &problem->key_blocks : &problem->query_blocks;
    const struct fa_tensor *first = is_forward ? &problem->k : &problem->q;
    const struct fa_tensor *second = is_forward ? &problem->v : dout;
    return (struct fa_plan_input){
        .direction = direction,
        .dtype = shape->dtype,
        .batch = shape->is_varlen ? 1 : shape->batch,
        .seqlen_q =
            planned_length(shape, shape->seqlen_q, shape->is_packed_q, options->max_seqlen_q),
        .seqlen_k = CEIL_DIV(keys, FA_KEY_STEP) * FA_KEY_STEP,
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
        .dropout = shape->dropout != 0,
        .alibi = problem->alibi_slopes.object != NULL,
        .bias = problem->bias.object != NULL,
        .bias_fp32 = problem->bias.object && problem->bias.dtype == FA_FLOAT32,
        .bias_pairs = is_forward && fa_bias_has_pairs(&problem->bias),
        .bias_shared = fa_bias_is_shared(problem),
        .bias_gradient = !is_forward && problem->bias.object && options->bias_gradient,
        .score_mod = problem->score_mod.number,
        .mask_mod = problem->mask_mod.number,
        .captured_gradients = !is_forward && fa_mod_has_gradients(&problem->score_mod),
        .sink = problem->sink.object != NULL,
        .num_splits = is_forward ? options->num_splits : 0,
        .pack_gqa = is_forward ? (int)options->pack_gqa : FA_PACK_AUTO,
        .deterministic = !is_forward && options->deterministic,
        .varlen = shape->is_varlen,
        .paged = shape->page_size != 0,
        .leftpad = shape->page_size && problem->leftpad_k.object,
        .e4m3 = shape->is_e4m3,
        .q_e4m3 = shape->is_q_e4m3,
        .append = problem->append.k.object != NULL,
        .box_rows = planned_box_rows(shape->page_size),
        .block_q = lists->block_q,
        .block_k = lists->block_k,
        .own_lists = fa_block_lists_are_own(lists),
        .tma_strides =
            has_map(shape, is_forward, first) && (!second || has_map(shape, is_forward, second)),
    };
}

static int raise_plan_error(const struct fa_plan_error *error)
{
    PyErr_SetString(error->unsupported ? PyExc_NotImplementedError : PyExc_ValueError,
                    error->message);
    return -1;
}

static struct fa_extent extent_of(const struct fa_problem *problem)
{
    const struct fa_shape *shape = &problem->shape;
    const struct fa_append *append = &problem->append;
    return (struct fa_extent){
        .batch = shape->batch,
        .seqlen_q = shape->seqlen_q,
        .seqlen_k = shape->seqlen_k,
        .is_packed_q = shape->is_packed_q,
        .is_packed_k = shape->is_packed_k,
        .has_unused_rows = shape->is_packed_q || problem->seqused_q.object,
        .rows_q = fa_shape_rows_q(shape),
        .rows_k = shape->total_k,
        .new_blocks = append->k.object ? (int64_t)2 * shape->batch * fa_append_blocks(append) : 0,
        .q_blocks = append->cos.object ? (int64_t)shape->batch * shape->seqlen_q : 0,
    };
}

int fa_planning_fit(const struct fa_problem *problem, const struct fa_plan_input *input,
                    struct fa_plan *plan)
{
    const struct fa_extent extent = extent_of(problem);
    struct fa_plan_error error;
    if (!input->varlen || fa_plan_fit(input, &extent, plan, &error) == 0)
        return 0;
    return raise_plan_error(&error);
}

/* The class of a 12.x card, or of what is to be planned as one. */
static void set_kind(const struct fa_state *state, const char *name, struct fa_device *device)
{
    if (state->settings.plan_as) {
        device->arch = state->settings.plan_as;
        device->kind = state->settings.plan_kind;
        device->kind_reason = FA_KIND_BY_SETTING;
    } else if (device->kind == FA_NO_KIND && device->arch / 10 == 12) {
        const bool is_tuned = state->tuned_kind && strcmp(state->tuned_card, name) == 0;
        device->kind = is_tuned ? state->tuned_kind : FA_GEFORCE_LIKE;
        device->kind_reason = is_tuned ? FA_KIND_BY_TUNE : FA_KIND_BY_DEFAULT;
    }
}

int fa_planning_use_card(struct fa_state *state, const char *name, int kind)
{
    if (strlen(name) >= sizeof state->tuned_card || kind < FA_NO_KIND || kind > FA_PRO_LIKE) {
        PyErr_Format(PyExc_ValueError, "no class %d of the card %.40s", kind, name);
        return -1;
    }
    strcpy(state->tuned_card, name);
    state->tuned_kind = kind;
    state->tiles.version++;
    return 0;
}

static int set_target(struct fa_state *state, int ordinal, int arch, struct fa_plan_target *target)
{
    if (fa_settings_read(&state->settings) < 0)
        return -1;
    target->limits_arch = state->settings.limits_arch;
    target->tensor_repeat = state->settings.tensor_repeat;
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
    set_kind(state, cuda->name, &target->device);
    return 0;
}

int fa_planning_set_may_split(struct fa_state *state, const struct fa_problem *problem, int ordinal,
                              int arch, struct fa_plan_input *input)
{
    struct fa_plan_target target;
    const struct fa_extent extent = extent_of(problem);
    if (!input->varlen || input->direction != FA_FORWARD)
        return 0;
    if (set_target(state, ordinal, arch, &target) < 0)
        return -1;
    input->may_split = fa_plan_may_split(input, &extent, &target.device);
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
    return raise_plan_error(&error);
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
