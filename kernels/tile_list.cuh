/* The tiles of all sequences in the order of their blocks, for packed sides whose lengths differ: a
 * grid from the bound alone has blocks for the longest sequence in all of them. A kernel that runs
 * before makes the list. Sequences are sorted, the longest first, so that the blocks that take
 * longest start first and short ones fill the gaps at the end. */
#ifndef FA_TILE_LIST_CUH
#define FA_TILE_LIST_CUH

#include "sequence.cuh"

/* How long the blocks of a sequence take, and how many there are. */
struct sequence_work {
    int length, tiles;
};

/* Writes the tiles of sequence `number` behind those of all that come before it, by all threads of
 * a block; from the last to the first where they are `reversed`. `work_of` gives the work of any.
 * There is no room for more than `places`, whatever lengths say: so few that sums of that many for
 * each thread are within 32 bits. The rest of the list gets a tile that no sequence has, because
 * none has that many. */
template <int THREADS, class F>
__device__ __forceinline__ void list_tiles(fa_listed_tile *list, int places, int sequences,
                                           int number, bool reversed, F work_of)
{
    __shared__ int sums[THREADS / 32];
    const sequence_work own = work_of(number);
    int before = 0;
    bool is_last = true;
    for (int i = threadIdx.x; i < sequences; i += THREADS) {
        const sequence_work other = work_of(i);
        if (other.length > own.length || (other.length == own.length && i < number))
            before = min(before + other.tiles, places);
        else if (i != number)
            is_last = false;
    }
    for (int distance = 16; distance > 0; distance /= 2)
        before += __shfl_xor_sync(0xffffffff, before, distance);
    if (threadIdx.x % 32 == 0)
        sums[threadIdx.x / 32] = before;
    is_last = __syncthreads_and(is_last); /* sums are written */
    int place = 0;
    for (int i = 0; i < THREADS / 32; i++)
        place += sums[i];
    const int end = is_last ? places : min(place + own.tiles, places);
    for (int i = place + static_cast<int>(threadIdx.x); i < end; i += THREADS) {
        const int tile = i - place;
        if (tile >= own.tiles)
            list[i] = {number, places};
        else
            list[i] = {number, reversed ? own.tiles - 1 - tile : tile};
    }
}

#endif
