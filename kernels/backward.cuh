/* What all kernels of the backward share. */
#ifndef FA_BACKWARD_CUH
#define FA_BACKWARD_CUH

#include "layout.cuh"
#include "sink.cuh"

/* In bf16, P is scaled by 2^P_SHIFT, and with it the accumulators of all gradients until they are
 * stored: only exponents change. P goes from warp group 0 to group 1 in fp16, which has three bits
 * more than bf16 but few exponents: scaled, small P stay normal numbers. By 2^14, which leaves P <=
 * 1 a factor of 4 below the largest fp16. */
constexpr float P_SHIFT = fa_p_shift(DTYPE);
constexpr float P_SCALE = 1 << fa_p_shift(DTYPE);

#endif
