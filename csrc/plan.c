#include "plan.h"

#include "arithmetic.h"

#include "../kernels/params.h"

void fa_plan_because(struct fa_plan *plan, const char *choice, const char *why)
{
    if (plan->reason_count < FA_MAX_REASONS)
        plan->reasons[plan->reason_count++] = (struct fa_reason){choice, why, false};
}

void fa_plan_drop(struct fa_plan *plan, const char *choice, const char *why)
{
    fa_plan_because(plan, choice, why);
    plan->reasons[plan->reason_count - 1].dropped = true;
}

struct fa_step *fa_plan_add(struct fa_plan *plan, struct fa_step step)
{
    plan->steps[plan->step_count] = step;
    return &plan->steps[plan->step_count++];
}

struct fa_variant fa_plan_variant(const struct fa_plan_input *input)
{
    return (struct fa_variant){
        .dtype = input->dtype,
        .head_dim = input->head_dim,
        .head_dim_v = input->head_dim_v,
        .mask_right = input->mask_right,
        .mask_left = input->mask_left,
        .softcap = input->softcap,
        .dropout = input->dropout,
        .alibi = input->alibi,
        .bias = input->bias,
        .bias_fp32 = input->bias_fp32,
        .bias_pairs = input->bias_pairs,
        .bias_gradient = input->bias_gradient,
        .varlen = input->varlen,
        .paged = input->paged,
        .block_sparse = input->block_q != 0,
        .score_mod = input->score_mod,
        .mask_mod = input->mask_mod,
        .kv_e4m3 = input->e4m3,
        .q_e4m3 = input->q_e4m3,
    };
}

int fa_plan_list_places(int sequences, int64_t rows, int tile, int64_t blocks)
{
    enum { MOST_SEQUENCES = 4096, MOST_PLACES = 1 << 20 };
    const int64_t places = CEIL_DIV(rows, tile) + sequences;
    return sequences <= MOST_SEQUENCES && places <= MOST_PLACES && places < sequences * blocks
               ? (int)places
               : 0;
}

int fa_plan_refuse(struct fa_plan_error *error, bool unsupported, const char *message)
{
    *error = (struct fa_plan_error){unsupported, message};
    return -1;
}

struct fa_extent fa_plan_extent(const struct fa_plan_input *input)
{
    return (struct fa_extent){
        .batch = input->batch,
        .seqlen_q = input->seqlen_q,
        .seqlen_k = input->seqlen_k,
        .rows_q = (int64_t)input->batch * input->seqlen_q,
    };
}

int fa_plan_fit(const struct fa_plan_input *input, const struct fa_extent *extent,
                struct fa_plan *plan, struct fa_plan_error *error)
{
    return input->direction == FA_FORWARD ? fa_plan_fit_forward(input, extent, plan, error)
                                          : fa_plan_fit_backward(input, extent, plan, error);
}

/* The class of a 12.x card, whose rows of tiles.c a plan takes. */
static void explain_kind(const struct fa_device *device, struct fa_plan *plan)
{
#define BOTH(why)                                                                                  \
    {                                                                                              \
        "GeForce-like: " why, "PRO-like: " why                                                     \
    }
    static const char *const why[FA_KIND_REASON_COUNT][2] = {
        [FA_KIND_BY_ARCH] = BOTH("that of the card that stands for the architecture"),
        [FA_KIND_BY_NAME] = BOTH("by the name of the device"),
        [FA_KIND_BY_TUNE] = BOTH("as tune measured, for a name that is unknown"),
        [FA_KIND_BY_SETTING] = BOTH("as FA_SM120_PLAN_AS asks"),
        [FA_KIND_BY_DEFAULT] = BOTH("the name is unknown, and tune has not measured the device"),
    };
#undef BOTH
    if (device->kind != FA_NO_KIND)
        fa_plan_because(plan, "class", why[device->kind_reason][device->kind == FA_PRO_LIKE]);
}

int fa_plan_make(const struct fa_plan_input *input, const struct fa_plan_target *target,
                 struct fa_plan *plan, struct fa_plan_error *error)
{
    *plan = (struct fa_plan){0};
    if (target->device.arch < 80)
        return fa_plan_refuse(error, true,
                              "CUDA devices before compute capability 8.0 are not supported");
    if (input->dtype == FA_FLOAT32)
        return fa_plan_refuse(
            error, true,
            input->q_e4m3 ? "out in float32 is supported on the CPU alone; on CUDA that of q in "
                            "float8_e4m3fn must be float16 or bfloat16"
                          : "float32 is supported on the CPU alone; on CUDA q, k and v must be "
                            "float16 or bfloat16");
    if (input->e4m3 && target->device.arch < 89)
        return fa_plan_refuse(error, true,
                              "k and v in float8_e4m3fn need a CUDA device of compute capability "
                              "8.9 or later");
    if ((input->direction == FA_FORWARD ? fa_plan_forward(input, target, plan, error)
                                        : fa_plan_backward(input, target, plan, error)) < 0)
        return -1;
    explain_kind(&target->device, plan);
    plan->steps[plan->main].variant.tensor_repeat = MAX(target->tensor_repeat, 1);
    if (target->tensor_repeat > 1)
        fa_plan_because(plan, "tensor_repeat",
                        "FA_SM120_TENSOR_REPEAT: each mma is issued several times, for measuring");
    return 0;
}
