/* Of ordered accumulation by listed blocks: how often a block of queries is listed by rows of lower
 * keys, for every row and one behind the last. Before backward.cu, whose blocks wait for as many
 * additions to a tile of dQ: see added_before() in backward_queries.cuh.
 *
 * It reads the lists that backward.cu goes through, and clamps them as that does: so what is waited
 * for comes, whatever lists hold. A thread block counts for a head, or for all where they share
 * lists.
 *
 * Constants as in backward.cu. */
#include "params.h"

#include "block_list.cuh"

constexpr int THREADS = FA_ORDER_THREADS;

/* Adds to `counts` how often a row lists each of the blocks. */
__device__ __forceinline__ void count_listed(int *counts, const fa_block_list &list, int blocks,
                                             int batch, int head, int row)
{
    const int count = read_count(list, batch, head, row);
    const int *indices = list.indices + list_offset(list.index, batch, head, row);
    for (int i = threadIdx.x % 32; i < count; i += 32)
        atomic_add(counts + clamp(ld_global(indices + i), 0, blocks - 1), 1);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    backward_order(const __grid_constant__ argument_of<fa_backward_params> params)
{
    const fa_block_lists &lists = params.lists;
    const int batch = blockIdx.x / params.order.heads, head = blockIdx.x % params.order.heads;
    const int rows = params.order.rows, blocks = lists.blocks;
    int *before = params.order.before + static_cast<fa_int64>(blockIdx.x) * (rows + 1) * blocks;
    for (int row = threadIdx.x / 32; row < rows; row += THREADS / 32) {
        int *counts = before + static_cast<fa_int64>(row + 1) * blocks; /* zeros so far */
        count_listed(counts, lists.partial, blocks, batch, head, row);
        count_listed(counts, lists.full, blocks, batch, head, row);
    }
    __syncthreads(); /* all rows are counted */
    for (int column = threadIdx.x; column < blocks; column += THREADS) {
        int sum = 0;
        for (int row = 1; row <= rows; row++) {
            int *count = before + static_cast<fa_int64>(row) * blocks + column;
            sum += *count;
            *count = sum;
        }
    }
}
