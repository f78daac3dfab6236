/* A variant: exactly the compile-time constants that a plan chose for a kernel. */
#ifndef FA_VARIANT_H
#define FA_VARIANT_H

#include <stddef.h>

enum fa_kernel_id { FA_KERNEL_FORWARD, FA_KERNEL_FORWARD_TMA, FA_KERNEL_COUNT };

/* Who refills the ring of forward_tma, see kernels/forward_tma.cu. */
enum fa_producer { FA_PRODUCER_BARRIER, FA_PRODUCER_THREAD, FA_PRODUCER_WARP, FA_PRODUCER_COUNT };

/* X(field, the constant's name in the kernel source). All are ints, so variants compare as bytes.
 */
#define FA_VARIANT_FIELDS(X)                                                                       \
    X(dtype_bf16, "DTYPE_BF16")                                                                    \
    X(head_dim, "HEAD_DIM")                                                                        \
    X(head_dim_v, "HEAD_DIM_V")                                                                    \
    X(tile_n, "TILE_N")                                                                            \
    X(sub_n, "SUB_N")                                                                              \
    X(warps, "WARPS")                                                                              \
    X(warp_m, "WARP_M")                                                                            \
    X(stages, "STAGES")                                                                            \
    X(producer, "PRODUCER")                                                                        \
    X(mask_right, "MASK_RIGHT")                                                                    \
    X(mask_left, "MASK_LEFT")                                                                      \
    X(pack_gqa, "PACK_GQA")                                                                        \
    X(softcap, "SOFTCAP")

struct fa_variant {
    int kernel; /* enum fa_kernel_id */
#define FA_FIELD(field, constant) int field;
    FA_VARIANT_FIELDS(FA_FIELD)
#undef FA_FIELD
};

#define FA_VARIANT_NAME_SIZE   128
#define FA_VARIANT_OPTION_SIZE 40
#define FA_VARIANT_FIELD_COUNT (sizeof(struct fa_variant) / sizeof(int) - 1)

/* The kernel's name: its source file, its entry point. */
const char *fa_variant_kernel(const struct fa_variant *variant);

/* The canonical name, say forward_bf16_d128_dv128_n32x16_w4x32_s3_right. Of forward_tma, _p and
 * the producer come after the stages. */
void fa_variant_name(const struct fa_variant *variant, char name[FA_VARIANT_NAME_SIZE]);

/* The compiler's option for the i-th constant, say -DHEAD_DIM=128. */
void fa_variant_option(const struct fa_variant *variant, size_t i,
                       char option[FA_VARIANT_OPTION_SIZE]);

#endif
