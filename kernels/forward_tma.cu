/* Attention forward, as forward.cu, with K and V brought by the TMA: for every GPU since 9.0.
 *
 * Its constants are those of forward.cu, and
 *   PRODUCER               enum fa_producer in geometry.h: who refills the ring */
#include "params.h"

#include "ptx.cuh"
#include "tma_ring.cuh"
#include "forward.cuh"

extern "C" __global__ void __launch_bounds__(tma_ring::BLOCK_THREADS, 1)
    forward_tma(const __grid_constant__ argument_of<fa_forward_tma_params> params)
{
    extern __shared__ __align__(1024) char smem[]; /* the pattern of the widest swizzle */
    const fa_forward_tma_params &own = params_of<fa_forward_tma_params>(params);
    tma_ring ring(own, smem);
    attend(own.forward, ring);
}
