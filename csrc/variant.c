#include "variant.h"

#include <stdio.h>

const char *fa_variant_kernel(const struct fa_variant *variant)
{
    static const char *const names[] = {"forward", "forward_tma"}; /* by enum fa_kernel_id */
    return names[variant->kernel];
}

void fa_variant_name(const struct fa_variant *variant, char name[FA_VARIANT_NAME_SIZE])
{
    static const char *const producers[] = {"_p0", "_p1", "_p2"};
    snprintf(name, FA_VARIANT_NAME_SIZE, "%s_%s_d%d_dv%d_n%dx%d_w%dx%d_s%d%s%s%s%s%s",
             fa_variant_kernel(variant), variant->dtype_bf16 ? "bf16" : "fp16", variant->head_dim,
             variant->head_dim_v, variant->tile_n, variant->sub_n, variant->warps, variant->warp_m,
             variant->stages,
             variant->kernel == FA_KERNEL_FORWARD_TMA ? producers[variant->producer] : "",
             variant->mask_right ? "_right" : "", variant->mask_left ? "_left" : "",
             variant->softcap ? "_cap" : "", variant->pack_gqa ? "_pack" : "");
}

void fa_variant_option(const struct fa_variant *variant, size_t i,
                       char option[FA_VARIANT_OPTION_SIZE])
{
    static const char *const constants[] = {
#define FA_NAME(field, constant) constant,
        FA_VARIANT_FIELDS(FA_NAME)
#undef FA_NAME
    };
    const int values[] = {
#define FA_VALUE(field, constant) variant->field,
        FA_VARIANT_FIELDS(FA_VALUE)
#undef FA_VALUE
    };
    snprintf(option, FA_VARIANT_OPTION_SIZE, "-D%s=%d", constants[i], values[i]);
}
