/* Gradients of captured tensors from sums in fixed point, behind both launches of
 * backward_captured.cu where that is DETERMINISTIC.
 *
 * Constants as in backward.cu. */
#include "params.h"

#include "fixed_point_sums.cuh"
#include "geometry.h"

constexpr int THREADS = FA_CAPTURED_SUMS_THREADS;

extern "C" __global__ void __launch_bounds__(THREADS)
    backward_captured_sums(const __grid_constant__ fa_captured_params params)
{
    const fa_int64 first = static_cast<fa_int64>(blockIdx.x) * THREADS + threadIdx.x;
    const fa_int64 step = static_cast<fa_int64>(gridDim.x) * THREADS;
    for (int i = 0; i < FA_MAX_CAPTURED; i++) {
        float *gradient = params.backward.mods.gradients[i]; /* so far the largest magnitudes */
        const fa_int64 *sums = params.sums[i];
        for (fa_int64 e = first; e < params.elements[i]; e += step)
            gradient[e] = sum_of_units(sums + 2 * e, gradient[e], params.bits);
    }
}
