/* Attention forward: O = softmax(scale * Q K^T, masked) V, for one block of queries of one
 * head.
 *
 * For every GPU since 8.0: mma.sync, ldmatrix, cp.async. Q and O stay in registers, K and V
 * stream through a ring in shared memory, from the last tile of keys to the first.
 *
 * One source, compiled once per set of constants:
 *   DTYPE                  enum fa_dtype in params.h, of all tensors
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
 *   VARLEN                 1: sequences differ in length
 *   PAGED                  1: K and V lie in pages, of which every sequence has a list
 *   KV_E4M3                1: K and V are e4m3, not DTYPE */
#include "params.h"

#include "ptx.cuh"
#include "cp_async_ring.cuh"
#include "forward.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward(const __grid_constant__ struct fa_forward_params params)
{
    extern __shared__ __align__(128) char smem[];
    cp_async_ring ring(params, smem);
    attend(params, ring);
}
