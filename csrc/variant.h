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
    X(VARLEN_FILL, "varlen_fill")                                                                  \
    X(KV_APPEND, "kv_append")                                                                      \
    X(KV_SCATTER, "kv_scatter")                                                                    \
    X(BACKWARD, "backward")                                                                        \
    X(BACKWARD_PREPROCESS, "backward_preprocess")                                                  \
    X(BACKWARD_POSTPROCESS, "backward_postprocess")                                                \
    X(BACKWARD_SINK, "backward_sink")                                                              \
    X(BACKWARD_CAPTURED, "backward_captured")                                                      \
    X(BACKWARD_CAPTURED_SUMS, "backward_captured_sums")                                            \
    X(BACKWARD_ORDER, "backward_order")

#define FA_ID(kernel, name) FA_KERNEL_##kernel,
enum fa_kernel_id { FA_KERNELS(FA_ID) FA_KERNEL_COUNT };
#undef FA_ID

/* The kernels that have a constant: bits 1 << enum fa_kernel_id. */
#define FA_ONLY(kernel) (1 << FA_KERNEL_##kernel)
#define FA_FORWARDS     (FA_ONLY(FORWARD) | FA_ONLY(FORWARD_TMA))
#define FA_BACKWARDS    FA_ONLY(BACKWARD)
#define FA_MAIN         (FA_FORWARDS | FA_BACKWARDS)
#define FA_SCORES       (FA_MAIN | FA_ONLY(BACKWARD_CAPTURED))
#define FA_READ_LISTS   (FA_SCORES | FA_ONLY(BACKWARD_ORDER))
#define FA_ALL_KERNELS  ((1 << FA_KERNEL_COUNT) - 1)
/* Not what goes over all rows of out, nor what is of no other use. */
#define FA_READ_LENGTHS                                                                            \
    (FA_ALL_KERNELS & ~(FA_ONLY(COMBINE) | FA_ONLY(VARLEN_FILL) | FA_ONLY(KV_APPEND) |             \
                        FA_ONLY(KV_SCATTER) | FA_ONLY(BACKWARD_CAPTURED_SUMS)))

/* How a field stands in a variant's name, behind its code. */
enum fa_code {
    FA_TYPE,   /* as the name of an enum fa_dtype */
    FA_NUMBER, /* as a number */
    FA_FLAG,   /* by the code alone, where it is 1 */
    FA_FACTOR, /* as a number, unless it is 1 */
    FA_TEXT,   /* as the number of a text, in hexadecimal, where there is one */
};

/* X(field, the constant's name in the kernel source, the kernels that have it, its code and how the
 * value follows). All are ints, so variants compare as bytes; those that a kernel does not have are
 * 0. The order is that of the name. */
#define FA_VARIANT_FIELDS(X)                                                                       \
    X(dtype, "DTYPE", FA_ALL_KERNELS, "_", FA_TYPE)                                                \
    X(parts_dtype, "PARTS_DTYPE", FA_ONLY(COMBINE), "_of_", FA_TYPE)                               \
    X(head_dim, "HEAD_DIM", FA_SCORES | FA_ONLY(BACKWARD_POSTPROCESS), "_d", FA_NUMBER)            \
    X(head_dim_v, "HEAD_DIM_V", FA_SCORES | FA_ONLY(COMBINE) | FA_ONLY(BACKWARD_PREPROCESS),       \
      "_dv", FA_NUMBER)                                                                            \
    X(tile_n, "TILE_N", FA_FORWARDS, "_n", FA_NUMBER)                                              \
    X(sub_n, "SUB_N", FA_FORWARDS, "x", FA_NUMBER)                                                 \
    X(tile_m, "TILE_M",                                                                            \
      FA_BACKWARDS | FA_ONLY(BACKWARD_PREPROCESS) | FA_ONLY(BACKWARD_SINK) |                       \
          FA_ONLY(BACKWARD_CAPTURED),                                                              \
      "_m", FA_NUMBER)                                                                             \
    X(sub_m, "SUB_M", FA_BACKWARDS, "x", FA_NUMBER)                                                \
    X(warps, "WARPS", FA_MAIN | FA_ONLY(COMBINE), "_w", FA_NUMBER)                                 \
    X(warp_m, "WARP_M", FA_FORWARDS, "x", FA_NUMBER)                                               \
    X(warp_n, "WARP_N", FA_BACKWARDS, "x", FA_NUMBER)                                              \
    X(stages, "STAGES", FA_MAIN, "_s", FA_NUMBER)                                                  \
    X(producer, "PRODUCER", FA_ONLY(FORWARD_TMA), "_p", FA_NUMBER)                                 \
    X(dq_dim_warps, "DQ_DIM_WARPS", FA_BACKWARDS, "_dqw", FA_NUMBER)                               \
    X(dq_buffers, "DQ_BUFFERS", FA_BACKWARDS, "_dqb", FA_NUMBER)                                   \
    X(dq_direct, "DQ_DIRECT", FA_BACKWARDS, "_dqd", FA_FLAG)                                       \
    X(tma, "TMA", FA_BACKWARDS, "_tma", FA_FLAG)                                                   \
    X(mask_right, "MASK_RIGHT", FA_SCORES, "_right", FA_FLAG)                                      \
    X(mask_left, "MASK_LEFT", FA_SCORES, "_left", FA_FLAG)                                         \
    X(softcap, "SOFTCAP", FA_SCORES, "_cap", FA_FLAG)                                              \
    X(dropout, "DROPOUT", FA_SCORES, "_drop", FA_FLAG)                                             \
    X(alibi, "ALIBI", FA_SCORES, "_alibi", FA_FLAG)                                                \
    X(bias, "BIAS", FA_SCORES, "_bias", FA_FLAG)                                                   \
    X(bias_fp32, "BIAS_FP32", FA_SCORES, "32", FA_FLAG)                                            \
    X(bias_pairs, "BIAS_PAIRS", FA_FORWARDS, "x2", FA_FLAG)                                        \
    X(bias_gradient, "BIAS_GRADIENT", FA_BACKWARDS, "_dbias", FA_FLAG)                             \
    X(pack_gqa, "PACK_GQA", FA_FORWARDS, "_pack", FA_FLAG)                                         \
    X(split, "SPLIT", FA_FORWARDS, "_split", FA_FLAG)                                              \
    X(deterministic, "DETERMINISTIC", FA_BACKWARDS | FA_ONLY(BACKWARD_CAPTURED), "_deterministic", \
      FA_FLAG)                                                                                     \
    X(largest, "LARGEST", FA_ONLY(BACKWARD_CAPTURED), "_largest", FA_FLAG)                         \
    X(varlen, "VARLEN", FA_READ_LENGTHS, "_varlen", FA_FLAG)                                       \
    X(paged, "PAGED", FA_FORWARDS, "_paged", FA_FLAG)                                              \
    X(block_sparse, "BLOCK_SPARSE", FA_READ_LISTS, "_blocks", FA_FLAG)                             \
    X(tensor_repeat, "TENSOR_REPEAT", FA_MAIN, "_repeat", FA_FACTOR)                               \
    X(score_mod, "SCORE_MOD", FA_READ_LISTS, "_score", FA_TEXT)                                    \
    X(mask_mod, "MASK_MOD", FA_READ_LISTS, "_mask", FA_TEXT)                                       \
    X(kv_e4m3, "KV_E4M3", FA_FORWARDS | FA_ONLY(KV_APPEND) | FA_ONLY(KV_SCATTER), "_e4m3",         \
      FA_FLAG)                                                                                     \
    X(q_e4m3, "Q_E4M3", FA_FORWARDS, "_q", FA_FLAG)                                                \
    X(mx_e4m3, "MX_E4M3", FA_FORWARDS, "_mx", FA_FLAG)

struct fa_variant {
    int kernel; /* enum fa_kernel_id */
#define FA_FIELD(field, constant, kernels, code, kind) int field;
    FA_VARIANT_FIELDS(FA_FIELD)
#undef FA_FIELD
};

#define FA_VARIANT_NAME_SIZE   160
#define FA_VARIANT_OPTION_SIZE 40
#define FA_VARIANT_FIELD_COUNT (sizeof(struct fa_variant) / sizeof(int) - 1)

/* The kernel's name: its source file, its entry point. */
const char *fa_variant_kernel(const struct fa_variant *variant);

/* The canonical name: the kernel's, then every field that it has, say
 * forward_bf16_d128_dv128_n32x16_w4x32_s3_right or combine_bf16_of_fp32_dv128_w8. */
void fa_variant_name(const struct fa_variant *variant, char name[FA_VARIANT_NAME_SIZE]);

/* The compiler's option for the i-th constant, say -DHEAD_DIM=128; false if the kernel has none. */
bool fa_variant_option(const struct fa_variant *variant, size_t i,
                       char option[FA_VARIANT_OPTION_SIZE]);

#endif
