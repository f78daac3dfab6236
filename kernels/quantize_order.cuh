/* Quantisers: which block does what, and what it waits for.
 *
 * Of each head the blocks with its chunks come first, then, `lag` heads later, those that quantise
 * it: these wait little, and what they read again is still in L2. Blocks are numbered in the order
 * of their start, and wait for blocks with lower numbers, which wait for nothing: so all end. */
#ifndef FA_QUANTIZE_ORDER_CUH
#define FA_QUANTIZE_ORDER_CUH

#include "quantize.cuh"

__shared__ int shared_number;

/* x of thread 0. */
__device__ __forceinline__ int from_first_thread(int x)
{
    __syncthreads();
    if (!threadIdx.x)
        shared_number = x;
    __syncthreads();
    return shared_number;
}

__device__ __forceinline__ unsigned start_block(int *started)
{
    if (!started)
        return blockIdx.x;
    return from_first_thread(threadIdx.x ? 0 : atomic_add(started, 1));
}

/* Blocks of an operand. */
__device__ __forceinline__ unsigned block_count(const fa_quantize_operand &x)
{
    return x.batch * x.heads * (x.chunks + x.parts);
}

__device__ __forceinline__ block_work work_of(const fa_quantize_operand &x, unsigned block)
{
    const unsigned heads = x.batch * x.heads, chunks = x.chunks, parts = x.parts, lag = x.lag;
    if (block < lag * chunks)
        return block_work(x, true, block / chunks, block % chunks);
    block -= lag * chunks;
    const unsigned head = block / (chunks + parts), index = block % (chunks + parts);
    if (head >= heads - lag) {
        block -= (heads - lag) * (chunks + parts);
        return block_work(x, false, heads - lag + block / parts, block % parts);
    }
    if (index < chunks)
        return block_work(x, true, head + lag, index);
    return block_work(x, false, head, index - chunks);
}

/* Whether this block has finished the last chunk of its head: it then reads those of the others. */
__device__ __forceinline__ bool is_last_chunk(const fa_quantize_operand &x, const block_work &work)
{
    __syncthreads(); /* all threads have written */
    int before = 0;
    if (!threadIdx.x) {
        __threadfence();
        before = atomic_add(x.done + work.head_number, 1);
        __threadfence();
    }
    return from_first_thread(before) == x.chunks - 1;
}

/* Mean and scale of the head can be read. */
__device__ __forceinline__ void release_head(const fa_quantize_operand &x, const block_work &work)
{
    __syncthreads();
    if (!threadIdx.x) {
        __threadfence();
        semaphore_release(x.done + work.head_number);
    }
}

__device__ __forceinline__ void wait_for_head(const fa_quantize_operand &x, const block_work &work)
{
    if (x.chunks && !threadIdx.x) {
        while (semaphore_load(x.done + work.head_number) != x.chunks + 1)
            ;
        __threadfence();
    }
    __syncthreads();
}

#endif
