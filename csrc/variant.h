/* A variant: exactly the compile-time constants that a plan chose for a kernel. */
#ifndef FA_VARIANT_H
#define FA_VARIANT_H

#include <stdbool.h>
#include <stddef.h>

#include "../kernels/geometry.h"

/* X(kernel, its source file and entry point) */
#define FA_KERNELS(X)                                                                              \
    X(FORWARD, "forward")                                                                          \
    X(FORWARD_TMA, "forward_tma")                                                                  \
    X(COMBINE, "combine")                                                                          \
    X(BACKWARD, "backward")                                                                        \
    X(BACKWARD_PREPROCESS, "backward_preprocess")                                                  \
    X(BACKWARD_POSTPROCESS, "backward_postprocess")                                                \
    X(BACKWARD_SINK, "backward_sink")

#define FA_ID(kernel, name) FA_KERNEL_##kernel,
enum fa_kernel_id { FA_KERNELS(FA_ID) FA_KERNEL_COUNT };
#undef FA_ID

/* The kernels that have a constant: bits 1 << enum fa_kernel_id. */
#define FA_FORWARDS         (1 << FA_KERNEL_FORWARD | 1 << FA_KERNEL_FORWARD_TMA)
#define FA_BACKWARDS        (1 << FA_KERNEL_BACKWARD)
#define FA_MAIN_AND(kernel) (FA_FORWARDS | FA_BACKWARDS | 1 << FA_KERNEL_##kernel)
#define FA_ALL_KERNELS      ((1 << FA_KERNEL_COUNT) - 1)

/* X(field, the constant's name in the kernel source, the kernels that have it). All are ints, so
 * variants compare as bytes; those that a kernel does not have are 0. */
#define FA_VARIANT_FIELDS(X)                                                                       \
    X(dtype_bf16, "DTYPE_BF16", FA_ALL_KERNELS)                                                    \
    X(head_dim, "HEAD_DIM", FA_MAIN_AND(BACKWARD_POSTPROCESS))                                     \
    X(head_dim_v, "HEAD_DIM_V", FA_MAIN_AND(COMBINE) | 1 << FA_KERNEL_BACKWARD_PREPROCESS)         \
    X(tile_n, "TILE_N", FA_FORWARDS)                                                               \
    X(sub_n, "SUB_N", FA_FORWARDS)                                                                 \
    X(warp_n, "WARP_N", FA_BACKWARDS)                                                              \
    X(tile_m, "TILE_M",                                                                            \
      FA_BACKWARDS | 1 << FA_KERNEL_BACKWARD_PREPROCESS | 1 << FA_KERNEL_BACKWARD_SINK)            \
    X(sub_m, "SUB_M", FA_BACKWARDS)                                                                \
    X(dq_dim_warps, "DQ_DIM_WARPS", FA_BACKWARDS)                                                  \
    X(warps, "WARPS", FA_MAIN_AND(COMBINE))                                                        \
    X(warp_m, "WARP_M", FA_FORWARDS)                                                               \
    X(stages, "STAGES", FA_FORWARDS | FA_BACKWARDS)                                                \
    X(producer, "PRODUCER", FA_FORWARDS)                                                           \
    X(tma, "TMA", FA_BACKWARDS)                                                                    \
    X(mask_right, "MASK_RIGHT", FA_FORWARDS | FA_BACKWARDS)                                        \
    X(mask_left, "MASK_LEFT", FA_FORWARDS | FA_BACKWARDS)                                          \
    X(softcap, "SOFTCAP", FA_FORWARDS | FA_BACKWARDS)                                              \
    X(pack_gqa, "PACK_GQA", FA_FORWARDS)                                                           \
    X(split, "SPLIT", FA_FORWARDS)                                                                 \
    X(deterministic, "DETERMINISTIC", FA_BACKWARDS)                                                \
    X(dq_buffers, "DQ_BUFFERS", FA_BACKWARDS)

struct fa_variant {
    int kernel; /* enum fa_kernel_id */
#define FA_FIELD(field, constant, kernels) int field;
    FA_VARIANT_FIELDS(FA_FIELD)
#undef FA_FIELD
};

#define FA_VARIANT_NAME_SIZE   128
#define FA_VARIANT_OPTION_SIZE 40
#define FA_VARIANT_FIELD_COUNT (sizeof(struct fa_variant) / sizeof(int) - 1)

/* The kernel's name: its source file, its entry point. */
const char *fa_variant_kernel(const struct fa_variant *variant);

/* The canonical name, say forward_bf16_d128_dv128_n32x16_w4x32_s3_right. Of forward_tma, _p and
 * the producer come after the stages; of other kernels it is shorter, say combine_bf16_dv128_w8. */
void fa_variant_name(const struct fa_variant *variant, char name[FA_VARIANT_NAME_SIZE]);

/* The compiler's option for the i-th constant, say -DHEAD_DIM=128; false if the kernel has none. */
bool fa_variant_option(const struct fa_variant *variant, size_t i,
                       char option[FA_VARIANT_OPTION_SIZE]);

#endif
