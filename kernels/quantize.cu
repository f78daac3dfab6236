/* Q, K and V to int8, e4m3, mxfp8 or nvfp4, without their means, in one launch.
 *
 * Blocks add up chunks of tokens; the last of a head computes its mean and its scale; the blocks
 * that quantise it wait for that. Constants: see quantize.cuh. */
#include "params.h"

#include "quantize_codes.cuh"
#include "quantize_statistics.cuh"

template <class kind>
__device__ __forceinline__ void run(const fa_quantize_operand &x, unsigned block)
{
    if constexpr (kind::FORMAT != FORMAT_16BIT) {
        const block_work work = work_of(x, block);
        if (work.is_chunk) {
            add_up_chunk<kind>(x, work);
            if (is_last_chunk(x, work)) {
                finish_head<kind>(x, work);
                release_head(x, work);
            }
        } else if constexpr (kind::IS_TRANSPOSED)
            quantize_columns<kind>(x, work);
        else
            quantize_rows<kind>(x, work);
    }
}

/* Q comes last: where it has no statistics, its blocks run while the last of K and V wait. */
extern "C" __global__ void __launch_bounds__(THREADS)
    quantize(const __grid_constant__ fa_quantize_params params)
{
    const unsigned block = start_block(params.started);
    const unsigned of_k = block_count(params.k), of_v = block_count(params.v);
    if (block < of_k)
        run<operand_kind<K_FORMAT, HEAD_DIM, ROTATION, false>>(params.k, block);
    else if (block < of_k + of_v)
        run<operand_kind<V_FORMAT, HEAD_DIM_V, 1, true>>(params.v, block - of_k);
    else
        run<operand_kind<Q_FORMAT, HEAD_DIM, ROTATION, false>>(params.q, block - of_k - of_v);
}
