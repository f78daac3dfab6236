/* Attention forward: O = softmax(scale * Q K^T, masked) V, for one block of queries of one
 * head.
 *
 * For every GPU since 8.0: mma.sync, ldmatrix, cp.async. Q and O stay in registers, K and V
 * stream through a ring in shared memory, from the last tile of keys to the first.
 *
 * One source, compiled once per set of constants:
 *   DTYPE                  enum fa_dtype in params.h, of all tensors but those below
 *   HEAD_DIM, HEAD_DIM_V   of Q and K, of V and O: multiples of 8 up to 256
 *   WARPS, WARP_M          queries: WARP_M (16 or 32) rows per warp, TILE_M = WARPS * WARP_M in all
 *   TILE_N, SUB_N          keys: TILE_N per stage of the ring, SUB_N at a time through registers
 *   STAGES                 of the ring
 *   MASK_RIGHT, MASK_LEFT  1: keys end (start) at a diagonal: causal, sliding windows
 *   SPLIT                  1: a block goes through a part of its keys; combine.cu follows
 *   PACK_GQA               1: the query heads of one KV head share the rows of a block
 *   SOFTCAP                1: scores are capped by a tanh
 *   DROPOUT                1: weights are dropped
 *   ALIBI                  1: scores fall with the distance of the key
 *   BIAS, BIAS_FP32        1: a bias is added to them; 1: in fp32, 0: in the type of the others
 *   BIAS_PAIRS             1: pairs of it, of an even and the next key, are aligned
 *   VARLEN                 1: sequences differ in length
 *   PAGED                  1: K and V lie in pages, of which every sequence has a list
 *   BLOCK_SPARSE           1: blocks of queries and keys are listed, and no others are read
 *   SCORE_MOD, MASK_MOD    not 0: a callable changes scores, hides keys: see mods.cuh
 *   KV_E4M3                1: K and V are e4m3, not DTYPE
 *   Q_E4M3                 1: so is Q, and both products are; DTYPE is that of O
 *   MX_E4M3                1: by the block-scaled mma of 12.x, with scales of 1
 *   TENSOR_REPEAT          how often each mma is issued: 1, see product.cuh */
#include "params.h"

#include "ptx.cuh"
#include "cp_async_ring.cuh"
#include "forward.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward(const __grid_constant__ argument_of<fa_forward_params> params)
{
    extern __shared__ __align__(128) char smem[];
    const fa_forward_params &own = params_of<fa_forward_params>(params);
    cp_async_ring ring(own, smem);
    attend(own, ring);
}
