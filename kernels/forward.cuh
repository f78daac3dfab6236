/* The block of queries that forward.cu and forward_tma.cu compute: all of the kernel but the way in
 * which K and V come to shared memory. That is a ring:
 *
 *   ring(params, smem)   once per block
 *   start(walk)          puts the first tiles of keys on their way, again for every pass
 *   is_producer()        is this warp one that only feeds the ring?
 *   feed()               what such a warp does
 *   wait_own()           until this thread may read its share of the tile in use, see copy_place
 *   wait_all()           until all may read all of it
 *   any(x)               wait_all(), and whether x holds for any thread that computes
 *   refill(i)            after one of these two: puts a tile on its way to the stage of tile i - 1
 *   advance()            this warp is done with the tile in use, the next one is
 *   K_smem, V_smem       of the tile in use: where this lane's rows for ldmatrix are
 *   V_tile()             and where its V is
 */
#ifndef FA_FORWARD_CUH
#define FA_FORWARD_CUH

#include "nonfinite.cuh"
#include "softmax.cuh"

/* Q [WARP_M, HEAD_DIM] from global memory into the layout of the mma's A operand. Missing rows
 * are zeros, and so is the second half of the last step if HEAD_DIM is not a multiple of 16. */
__device__ __forceinline__ void load_queries(unsigned (&Q_rmem)[M_FRAGS][D_STEPS][4],
                                             const fa_forward_params &params)
{
    const forward_block block(params);
    const element *Q_gmem =
        static_cast<const element *>(params.q) + block.seq.q_offset(params.q_stride, block.head);
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = block.lane_row + 16 * m + 8 * half;
            const element *Q_row =
                Q_gmem + block.row_offset(params.q_stride, row) + quad_lane() * 2;
#pragma unroll
            for (int chunk = 0; chunk < 2 * D_STEPS; chunk++) {
                const bool exists = chunk < HEAD_DIM / 8 && row < block.row_count();
                Q_rmem[m][chunk / 2][chunk % 2 * 2 + half] =
                    exists ? *reinterpret_cast<const unsigned *>(Q_row + chunk * 8) : 0;
            }
        }
}

/* Makes [begin, end) one of its parts, which differ by one tile at most. */
__device__ __forceinline__ void take_part(int &begin, int &end, int part, const fa_divisor &parts)
{
    const divided share = divide(end - begin, parts);
    begin += part * share.quotient + min(part, share.rest);
    end = begin + share.quotient + (part < share.rest);
}

/* O / l and lse of one part for combine.cu. The lanes of a quad write 32 contiguous bytes. */
__device__ __forceinline__ void store_part(const fa_forward_params &params,
                                           const float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                           const float (&l_rmem)[M_FRAGS][2],
                                           const float (&m_rmem)[M_FRAGS][2], unsigned left_out)
{
    const forward_block block(params);
    const fa_int64 split_offset = block.split_offset();
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float l = quad_sum(l_rmem[m][half]);
            const float inverse = l == 0.0f ? 0.0f : 1.0f / l; /* 0: no keys */
            const int row = block.lane_row + 16 * m + 8 * half;
            if (row >= block.row_count() || left_out >> 2 * m + half & 1)
                continue;
            const fa_int64 at = split_offset + block.lse_offset(row);
            float *out_row = static_cast<float *>(params.out) + at * HEAD_DIM_V;
#pragma unroll
            for (int n = 0; n < O_FRAGS; n++) {
                const float *O = O_rmem[m][n] + 2 * half;
                reinterpret_cast<float2 *>(out_row + 8 * n)[quad_lane()] =
                    make_float2(O[0] * inverse, O[1] * inverse);
            }
            if (quad_lane() == 0)
                params.lse[at] = l == 0.0f ? -INF : m_rmem[m][half] + log2_approx(l);
        }
}

/* O / l and lse of the rows of this lane that are not in the set `left_out`. */
__device__ __forceinline__ void store_rows(const fa_forward_params &params,
                                           const float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                           float (&l_rmem)[M_FRAGS][2], float (&m_rmem)[M_FRAGS][2],
                                           unsigned left_out)
{
    const forward_block block(params);
    element *out_gmem =
        static_cast<element *>(params.out) + block.seq.q_offset(params.out_stride, block.head);
    float *lse_gmem = quad_lane() == 0 ? params.lse : nullptr;
    const float sink0 = load_sink(params.sink, params.sink_dtype, block.head);
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = block.lane_row + 16 * m + 8 * half;
            const bool stores = row < block.row_count() && !(left_out >> 2 * m + half & 1);
            const float sink = PACK_GQA ? load_sink(params.sink, params.sink_dtype,
                                                    block.head + block.head_of(row))
                                        : sink0;
            float &l = l_rmem[m][half];
            l = quad_sum(l);
            const float rescale = add_sink(l, m_rmem[m][half], sink);
            const float inverse = l == 0.0f ? 0.0f : rescale * (1.0f / l); /* 0: no keys */
            element *out_row = out_gmem + block.row_offset(params.out_stride, row);
            store_row<O_FRAGS>(out_row, O_rmem[m], half, inverse, stores);
            if (lse_gmem && stores)
                lse_gmem[block.lse_offset(row)] =
                    l == 0.0f ? sink : (m_rmem[m][half] + log2_approx(l)) * LN2;
        }
}

template <class tile_ring>
__device__ __forceinline__ void attend(const fa_forward_params &params, tile_ring &ring)
{
    unsigned Q_rmem[M_FRAGS][D_STEPS][4];
    float O_rmem[M_FRAGS][O_FRAGS][4];
    float m_rmem[M_FRAGS][2]; /* p = 2^(s - m), for the rows g and g + 8 of each fragment */
    float l_rmem[M_FRAGS][2]; /* sum of this lane's p */

    /* Only the first tiles of a row raise its m to the maximum. The others take m as it is, because
     * any m cancels in the end, as long as no number leaves the range of its type. The end shows
     * whether one has: because a score has grown so much, or because V holds an inf or NaN, which
     * spoils even rows that do not see its key (0 * inf). Then the block computes once more, raises
     * m at every tile, looks for such V, and stores the rows of the set `redo`, which were not
     * stored before: what a row does, and so each bit of its result, depends on no other row of its
     * block. With a mask this second time is code of its own, so that the first has no instruction
     * of it. On 8.x that would spill: there both are the same code, which looks for it at once. */
    constexpr bool MASKED = MASK_RIGHT || MASK_LEFT;
    constexpr bool OWN_CODE = MASKED && __CUDA_ARCH__ >= 900;
    unsigned redo = 0;
#pragma unroll(OWN_CODE ? 2 : 1)
    for (bool again = false;; again = true) {
        /* ---- 1. Which queries. */
        const forward_block at(params);

        /* ---- 2. Which keys: any row sees those of the tiles [tile_begin, tile_end), every row
         * all those of [inner_begin, inner_end), or if START_KEYS is 1 all but the last. From the
         * last to the first: careful at the right edge and for one of those tiles, so that every
         * row has an m, see rows_at_edge(); then fast; then careful at the left edge, where rows
         * are masked alone. The length can cut short the last tile alone, which comes first. */
        int tile_begin = at.keys_of(at.block_row).begin / TILE_N;
        int tile_end = max(tile_begin, ceil_div(at.keys_of(at.last_row).end, TILE_N));
        int inner_begin = min(ceil_div(at.keys_of(at.last_row).begin, TILE_N), tile_end);
        int inner_end =
            max((at.keys_of(at.block_row).end + TILE_N - START_KEYS) / TILE_N, inner_begin);
        if (SPLIT) { /* of all these the tiles of one part, which may be none */
            take_part(tile_begin, tile_end, at.split, params.parts);
            inner_begin = min(max(inner_begin, tile_begin), tile_end);
            inner_end = min(max(inner_end, inner_begin), tile_end);
        }
        const int tiles = tile_end - tile_begin;
        const int fast_end = again ? 0 : tile_end - inner_begin;
        int careful_end = again ? tiles : min(tile_end - inner_end + 1, tiles);

        /* ---- 3. Start the ring. A warp that only feeds it has nothing else to do. */
        ring.start({at.seq.batch, at.head_kv, tile_end, tiles});
        if (ring.is_producer()) {
            ring.feed();
            redo = 0;
        } else {
            /* ---- 4. The state of the computation, all of it in registers. */
            load_queries(Q_rmem, params);
            clear(O_rmem, l_rmem, m_rmem);

            for (int i = 0; i < tiles; careful_end = tiles) {
                /* ---- 5. Careful tiles. Sub-tiles that no row of the warp sees are skipped. */
#pragma unroll 1
                for (; i < careful_end; i++) {
                    ring.wait_own();
                    bool nonfinite = false;
                    if (MASKED && (again || !OWN_CODE))
                        nonfinite = ring.any(holds_nonfinite(ring.V_tile()));
                    else
                        ring.wait_all();
                    ring.refill(i);

#pragma unroll 1
                    for (int n = 0; n < TILE_N; n += SUB_N) {
                        const int tile_key = (tile_end - 1 - i) * TILE_N, key = tile_key + n;
                        const int row = not_before(at.lane_row);
                        if (key + SUB_N <= at.keys_of(at.warp_row).begin ||
                            key >= at.keys_of(at.warp_row + WARP_M - 1).end)
                            continue;
                        const unsigned K_sub_smem = ring.K_smem + n * K_layout::ROW_BYTES;
                        const unsigned V_sub_smem = ring.V_smem + n * V_layout::ROW_BYTES;
                        float S_rmem[M_FRAGS][S_FRAGS][4];
                        unsigned P_rmem[M_FRAGS][S_FRAGS / 2][4];
                        scores(S_rmem, Q_rmem, K_sub_smem);
                        softcap(S_rmem, params.scale_in_cap);
                        const int lane_key = key + 2 * quad_lane();
                        const auto coords_of = [&](int r, int c) {
                            return at.coords(row + r, lane_key + c);
                        };
                        score_mod(S_rmem, coords_of);
                        mask_scores<MASK_LEFT, true>(S_rmem, params.masked_score, [&](int r) {
                            return at.keys_of(row + r) - lane_key;
                        });
                        const unsigned raised =
                            again ? ~0u : rows_at_edge(at, row, tile_key, tile_end * TILE_N);
                        raise_max(O_rmem, l_rmem, m_rmem, S_rmem, params.scale_log2, raised);
                        exponentials(P_rmem, l_rmem, S_rmem, m_rmem, params.scale_log2, raised,
                                     coords_of);
                        if (nonfinite) {
                            add_values_seen(O_rmem, P_rmem, V_sub_smem, at, row, key);
                            load_queries(Q_rmem, params); /* again: that took Q's registers */
                        } else
                            add_values(O_rmem, P_rmem, V_sub_smem);
                    }
                    ring.advance();
                }

                /* ---- 6. Fast tiles: no mask, no maximum. */
#pragma unroll 1
                for (; i < fast_end; i++) {
                    ring.wait_own();
                    ring.wait_all();
                    ring.refill(i);
#pragma unroll SUB_UNROLL
                    for (int n = 0; n < TILE_N; n += SUB_N) {
                        float S_rmem[M_FRAGS][S_FRAGS][4];
                        unsigned P_rmem[M_FRAGS][S_FRAGS / 2][4];
                        scores(S_rmem, Q_rmem, ring.K_smem + n * K_layout::ROW_BYTES);
                        softcap(S_rmem, params.scale_in_cap);
                        const int lane_key = (tile_end - 1 - i) * TILE_N + n + 2 * quad_lane();
                        const auto coords_of = [&](int r, int c) {
                            return at.coords(at.lane_row + r, lane_key + c);
                        };
                        score_mod(S_rmem, coords_of);
                        exponentials(P_rmem, l_rmem, S_rmem, m_rmem, params.scale_log2, 0,
                                     coords_of);
                        add_values(O_rmem, P_rmem, ring.V_smem + n * V_layout::ROW_BYTES);
                    }
                    ring.advance();
                }
            }
            /* ---- 7. O / l and lse out. */
            const unsigned left_out = again ? ~redo : out_of_range(O_rmem, l_rmem);
            if (SPLIT)
                store_part(params, O_rmem, l_rmem, m_rmem, rows_of_lane(left_out));
            else
                store_rows(params, O_rmem, l_rmem, m_rmem, rows_of_lane(left_out));
            redo = left_out;
        }

        /* Barrier: all of the block start again or none, and not before all warps are done with
         * the ring. */
        if (again || !__syncthreads_or(redo))
            return;
    }
}

#endif
