/* The tile of backward.cu: its sizes, its shared memory, and the barriers between its warps. */
#ifndef FA_BACKWARD_TILE_CUH
#define FA_BACKWARD_TILE_CUH

#include "backward.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int GROUP_WARPS = WARPS / 2; /* of a warp group */
constexpr int GROUP_THREADS = THREADS / 2;
constexpr int TILE_N = GROUP_WARPS * WARP_N; /* keys per block */
constexpr int HALF_M = TILE_M / 2;           /* the lower or the upper queries of a tile */
constexpr int N_FRAGS = WARP_N / 16;         /* 16-key fragments per warp */
constexpr int M_FRAGS = SUB_M / 8;           /* 8-query fragments of a sub-tile of scores */
constexpr int D_STEPS = (HEAD_DIM + 15) / 16;
constexpr int DV_STEPS = (HEAD_DIM_V + 15) / 16;

using K_layout = tile_layout<HEAD_DIM, TILE_N, MMA_K * DQ_DIM_WARPS>;
using Q_layout = tile_layout<HEAD_DIM, TILE_M>;
using dO_layout = tile_layout<HEAD_DIM_V, TILE_M>;
using dS_layout = tile_layout<TILE_M, TILE_N>; /* [keys, queries]: P^T, then dS^T in its place */

/* K or V [WARP_N, dim] and dV or dK [WARP_N, dim] of a warp: one array for either, as large as the
 * larger one. */
constexpr int MAX_STEPS = D_STEPS > DV_STEPS ? D_STEPS : DV_STEPS;
constexpr int MAX_FRAGS =
    Q_layout::PADDED > dO_layout::PADDED ? Q_layout::PADDED : dO_layout::PADDED;

/* dQ [TILE_M, HEAD_DIM]: each warp group computes half of the rows, which its warps share as
 * DQ_ROW_WARPS x DQ_DIM_WARPS parts. */
constexpr int HALF_FRAGS = HALF_M / 16; /* 16-query fragments */
constexpr int DQ_ROW_WARPS = GROUP_WARPS / DQ_DIM_WARPS;
constexpr int DQ_ROW_FRAGS = HALF_FRAGS / DQ_ROW_WARPS;
constexpr int DQ_DIM_FRAGS = K_layout::PADDED / DQ_DIM_WARPS;

/* Whether blocks add to a tile of dQ one after the other. */
constexpr bool DQ_IS_ORDERED = DETERMINISTIC && !DQ_DIRECT;

static_assert(HALF_FRAGS % DQ_ROW_WARPS == 0, "whole fragments of dQ");
static_assert(WARP_N % 16 == 0 && SUB_M % 16 == 0, "whole mma steps");
static_assert(HALF_M % SUB_M == 0 && TILE_M / SUB_M <= 11, "a named barrier for every sub-tile");

/* Where warp group 0 waits for dO: right before product 3, or, where registers are few, at the
 * start of the tile (benchmarks/NOTES.md, backward, idea 9). */
constexpr bool WAITS_LATE_FOR_DO = HEAD_DIM <= 96 && HEAD_DIM_V <= 96;

/* Where the tiles are in shared memory, in bytes. */
constexpr fa_backward_smem SMEM =
    fa_backward_smem_of(HEAD_DIM, HEAD_DIM_V, TILE_M, TILE_N, STAGES, DQ_DIM_WARPS, DTYPE);
constexpr int LSE_DELTA_BYTES = 2 * TILE_M * 4;

/* The named barriers of a tile of queries. Its lower queries are [0, HALF_M), its upper ones
 * [HALF_M, TILE_M): in product 5, group 0 reads dS^T of the lower ones, group 1 of the upper ones.
 *
 *   id             arrives              waits                what it says
 *   LOWER_FREE     group 0, before it   group 0              dS_smem, lower queries: dS^T of the
 *                  writes lower P^T                          previous tile has been read
 *   UPPER_FREE     group 1, after       group 0, before it   dS_smem, upper queries: the same
 *                  product 5            writes upper P^T
 *   P_FULL + i     group 0, having      group 1, before it   dS_smem, sub-tile i: P^T is written
 *                  written P^T          computes dS^T
 *   LOWER_FULL     group 1, having      group 0, before      dS_smem, lower queries: dS^T is
 *                  written lower dS^T   product 5            written
 *   QUERIES_FREE   group 0, after       group 1, after       Q, dO, lse and delta have been read;
 *                  product 3            product 4            dS_smem: dS^T is written
 *
 * UPPER_FREE is primed: group 1 arrives once before the loop, since no tile comes before the first,
 * and does not arrive after the last tile. LOWER_FREE synchronises group 0 alone. The next tile is
 * loaded after QUERIES_FREE, by a thread of group 1, which asks the TMA. With cp.async all threads
 * copy, and a barrier of the block takes its place. */
constexpr int LOWER_FREE = 1, UPPER_FREE = 2, QUERIES_FREE = 3, LOWER_FULL = 4, P_FULL = 5;

#endif
