/* What the kernels of the backward agree on. */
#ifndef FA_BACKWARD_CUH
#define FA_BACKWARD_CUH

#include "layout.cuh"
#include "sink.cuh"

/* In bf16, P is larger by 2^14 than it should be, and with it all sums of gradients, until they are
 * written: only exponents change. As P goes from one group of warps to the other in fp16, which has
 * three bits more than bf16 but few exponents, the small ones keep their bits. */
constexpr float P_SHIFT = fa_p_shift(DTYPE);
constexpr float P_SCALE = 1 << fa_p_shift(DTYPE);

#endif
