/* What all kernels of the backward share. */
#ifndef FA_BACKWARD_CUH
#define FA_BACKWARD_CUH

#include "layout.cuh"
#include "sink.cuh"

/* In bf16, P is scaled by 2^P_SHIFT, and with it the accumulators of all gradients until they are
 * stored: only exponents change. P goes from warp group 0 to group 1 in fp16, which has three bits
 * more than bf16 but few exponents: scaled, small P stay normal numbers. 2^14, as P <= 1 must stay
 * below the largest fp16, 2^16. */
constexpr float P_SHIFT = DTYPE_BF16 ? 14.0f : 0.0f;
constexpr float P_SCALE = DTYPE_BF16 ? 16384.0f : 1.0f;

#endif
