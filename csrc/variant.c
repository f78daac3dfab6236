#include "variant.h"

#include <stdio.h>

const char *fa_variant_kernel(const struct fa_variant *variant)
{
    static const char *const names[] = {
#define FA_NAME(kernel, name) name,
        FA_KERNELS(FA_NAME)
#undef FA_NAME
    };
    return names[variant->kernel];
}

static const char *mask_name(const struct fa_variant *variant)
{
    return variant->mask_right ? (variant->mask_left ? "_right_left" : "_right")
                               : (variant->mask_left ? "_left" : "");
}

static const char *order_name(const struct fa_variant *variant)
{
    return variant->dq_buffers > 1  ? "_deterministic_2"
           : variant->deterministic ? "_deterministic"
                                    : "";
}

void fa_variant_name(const struct fa_variant *variant, char name[FA_VARIANT_NAME_SIZE])
{
    static const char *const producers[] = {"_p0", "_p1", "_p2"};
    char head[64];
    snprintf(head, sizeof head, "%s_%s", fa_variant_kernel(variant),
             variant->dtype_bf16 ? "bf16" : "fp16");
    switch ((enum fa_kernel_id)variant->kernel) {
    case FA_KERNEL_COMBINE:
        snprintf(name, FA_VARIANT_NAME_SIZE, "%s_dv%d_w%d", head, variant->head_dim_v,
                 variant->warps);
        break;
    case FA_KERNEL_BACKWARD_PREPROCESS:
        snprintf(name, FA_VARIANT_NAME_SIZE, "%s_dv%d_m%d", head, variant->head_dim_v,
                 variant->tile_m);
        break;
    case FA_KERNEL_BACKWARD_POSTPROCESS:
        snprintf(name, FA_VARIANT_NAME_SIZE, "%s_d%d", head, variant->head_dim);
        break;
    case FA_KERNEL_BACKWARD_SINK:
        snprintf(name, FA_VARIANT_NAME_SIZE, "%s_m%d", head, variant->tile_m);
        break;
    case FA_KERNEL_BACKWARD:
        snprintf(name, FA_VARIANT_NAME_SIZE, "%s_d%d_dv%d_m%dx%d_w%dx%d_s%d%s%s%s%s", head,
                 variant->head_dim, variant->head_dim_v, variant->tile_m, variant->sub_m,
                 variant->warps, variant->warp_n, variant->stages, variant->tma ? "_tma" : "",
                 mask_name(variant), variant->softcap ? "_cap" : "", order_name(variant));
        break;
    default:
        snprintf(name, FA_VARIANT_NAME_SIZE, "%s_d%d_dv%d_n%dx%d_w%dx%d_s%d%s%s%s%s%s", head,
                 variant->head_dim, variant->head_dim_v, variant->tile_n, variant->sub_n,
                 variant->warps, variant->warp_m, variant->stages,
                 variant->kernel == FA_KERNEL_FORWARD_TMA ? producers[variant->producer] : "",
                 mask_name(variant), variant->softcap ? "_cap" : "",
                 variant->pack_gqa ? "_pack" : "", variant->split ? "_split" : "");
    }
}

bool fa_variant_option(const struct fa_variant *variant, size_t i,
                       char option[FA_VARIANT_OPTION_SIZE])
{
    static const struct {
        const char *name;
        int kernels;
    } constants[] = {
#define FA_NAME(field, constant, kernels) {constant, kernels},
        FA_VARIANT_FIELDS(FA_NAME)
#undef FA_NAME
    };
    const int values[] = {
#define FA_VALUE(field, constant, kernels) variant->field,
        FA_VARIANT_FIELDS(FA_VALUE)
#undef FA_VALUE
    };
    if (!(constants[i].kernels >> variant->kernel & 1))
        return false;
    snprintf(option, FA_VARIANT_OPTION_SIZE, "-D%s=%d", constants[i].name, values[i]);
    return true;
}
