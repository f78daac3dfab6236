/* The block of queries that forward.cu and forward_tma.cu compute: all of the kernel but the way in
 * which K and V come to shared memory. That is a ring:
 *
 *   ring(params, smem)   once per block
 *   start(walk, seq)     starts the loads of the first tiles, again for every pass
 *   clear_tail(seqlen_k) before the first tile is used: its V after the last key becomes zeros
 *   is_producer()        is this warp one that only loads?
 *   feed()               what such a warp does
 *   wait_own()           until this thread may read the chunks that it copies itself
 *   wait_all()           until all may read all of the tile in use
 *   any(x)               wait_all(), and whether x holds for any thread that computes
 *   refill(i)            after one of these two: starts the load into the stage of tile i - 1
 *   advance()            this warp is done with the tile in use, the next one is
 *   K_smem, V_smem       of the tile in use: this lane's rows for ldmatrix
 *   V_tile()             of the tile in use: where its V starts
 */
#ifndef FA_FORWARD_CUH
#define FA_FORWARD_CUH

#include "forward_walk.cuh"
#include "nonfinite.cuh"
#include "queries.cuh"
#include "row_alibi.cuh"
#include "row_bias.cuh"
#include "softmax.cuh"

/* O / l and lse of one split for combine.cu. The lanes of a quad write 32 contiguous bytes. */
__device__ __forceinline__ void store_split(const fa_forward_params &params,
                                            const float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                            const float (&l_rmem)[M_FRAGS][2],
                                            const float (&m_rmem)[M_FRAGS][2], row_set left_out)
{
    const forward_block block(params);
    const fa_int64 split_offset = block.split_offset();
    const float v_descale =
        KV_E4M3 ? load_descale(params.v_descale, block.seq.batch, block.head_kv) : 1.0f;
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float l = quad_sum(l_rmem[m][half]);
            float inverse = l == 0.0f ? 0.0f : 1.0f / l; /* 0: no keys */
            if (DROPOUT)
                inverse *= params.dropout.scale;
            inverse *= 1.0f / TENSOR_REPEAT;
            inverse *= v_descale;
            const int row = block.lane_row + 16 * m + 8 * half;
            if (row >= block.row_count() || left_out.has(m, half))
                continue;
            const fa_int64 at = split_offset + block.lse_offset(row);
            float *out_row = static_cast<float *>(params.out) + at * HEAD_DIM_V;
#pragma unroll
            for (int n = 0; n < O_FRAGS; n += KV_E4M3 ? 2 : 1) {
                const float *O = O_rmem[m][n] + 2 * half;
                if (KV_E4M3)
                    reinterpret_cast<float4 *>(out_row + 8 * n)[quad_lane()] =
                        adjacent_dims(O_rmem[m], half, n / 2, inverse);
                else
                    reinterpret_cast<float2 *>(out_row + 8 * n)[quad_lane()] =
                        make_float2(O[0] * inverse, O[1] * inverse);
            }
            if (quad_lane() == 0)
                params.lse[at] = l == 0.0f ? -INF : lse_log2(m_rmem[m][half], l);
        }
}

/* O / l and lse of the rows of this lane that are not in the set `left_out`. */
__device__ __forceinline__ void store_rows(const fa_forward_params &params,
                                           const float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                           float (&l_rmem)[M_FRAGS][2], float (&m_rmem)[M_FRAGS][2],
                                           row_set left_out)
{
    const forward_block block(params);
    element *out_gmem =
        static_cast<element *>(params.out) + block.seq.q_offset(params.out_stride, block.head);
    float *lse_gmem = quad_lane() == 0 ? params.lse : nullptr;
    const float v_descale =
        KV_E4M3 ? load_descale(params.v_descale, block.seq.batch, block.head_kv) : 1.0f;
    const float sink0 = load_sink(params.sink, params.sink_dtype, block.head);
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = block.lane_row + 16 * m + 8 * half;
            const bool stores = row < block.row_count() && !left_out.has(m, half);
            const float sink = PACK_GQA ? load_sink(params.sink, params.sink_dtype,
                                                    block.head + block.head_of(row))
                                        : sink0;
            float &l = l_rmem[m][half];
            l = quad_sum(l);
            const float rescale = add_sink(l, m_rmem[m][half], sink);
            float inverse = l == 0.0f ? 0.0f : rescale * (1.0f / l); /* 0: no keys */
            if (DROPOUT)
                inverse *= params.dropout.scale;
            inverse *= 1.0f / TENSOR_REPEAT;
            inverse *= v_descale;
            element *out_row = out_gmem + block.row_offset(params.out_stride, row);
            if (KV_E4M3)
                store_adjacent_dims(out_row, O_rmem[m], half, inverse, stores);
            else
                store_row<O_FRAGS>(out_row, O_rmem[m], half, inverse, stores);
            if (lse_gmem && stores)
                lse_gmem[block.lse_offset(row)] =
                    l == 0.0f ? sink : lse_log2(m_rmem[m][half], l) * LN2;
        }
}

template <class tile_ring>
__device__ __forceinline__ void attend(const fa_forward_params &params, tile_ring &ring)
{
    unsigned Q_rmem[M_FRAGS][D_STEPS][4]; /* [WARP_M, HEAD_DIM], the A operand */
    row_factors factors;
    float O_rmem[M_FRAGS][O_FRAGS][4];            /* [WARP_M, HEAD_DIM_V], accumulators */
    float m_rmem[M_FRAGS][2], l_rmem[M_FRAGS][2]; /* [WARP_M]: p = 2^(s - m), and this lane's sum */

    /* The fast pass freezes m after the right edge, see softmax.cuh. If then a sum overflows, or V
     * holds inf or NaN, which spoil even rows that do not see their key (0 * inf), the row is
     * flagged and not stored. The exact pass, for blocks with flagged rows alone, is the exact
     * online softmax, all iterations masked; it looks for inf and NaN in V, and stores the flagged
     * rows. So what happens to a row, and each bit of its result, depends on no other row.
     *
     * With a mask or lists the exact pass is a separate copy of the code, and the fast one carries
     * none of its instructions. On 8.x two copies would spill: there both passes are the same code,
     * and with a mask the first looks for inf and NaN, too. */
    if (SPLIT) /* combine.cu: it waits for the end of this kernel, but not for a launch */
        let_next_kernel_start();
    constexpr bool MASKED = MASK_RIGHT || MASK_LEFT || MASK_MOD;
    constexpr bool SEPARATE_PASSES = (MASKED || BLOCK_SPARSE) && __CUDA_ARCH__ >= 900;
    unsigned flagged = 0; /* the bits of a warp_row_set */
#pragma unroll(SEPARATE_PASSES ? 2 : 1)
    for (bool is_exact = false;; is_exact = true) {
        /* ---- 1. Which rows, and which tiles of keys. */
        const forward_block block(params);
        if (VARLEN && !block.has_rows())
            return;
        forward_walk<> tiles(block, params.parts);
        const int unmasked_end = is_exact ? 0 : tiles.unmasked_end();
        int masked_end = is_exact ? tiles.count : tiles.right_end();

        /* ---- 2. Start the ring. A producer warp only loads. */
        ring.start(
            {block.seq.k_entry(), block.seq.k_begin, block.head_kv, tiles.order(), tiles.count},
            block.seq);
        if (ring.is_producer()) {
            ring.feed();
            flagged = 0;
        } else {
            load_queries(Q_rmem, factors, params);
            clear(O_rmem, l_rmem, m_rmem);
            const dropout_stream stream(params, block.seq.batch, block.head);
            if (VARLEN)
                ring.clear_tail(block.seq.seqlen_k());
            const row_alibi alibi(block);
            const row_bias bias(block);
            bias_fragments loaded; /* [WARP_M, SUB_N] */

            /* Right edge, unmasked tiles, left edge: both edges are the same code. Listed tiles
             * alternate as they come. */
            for (int i = 0; i < tiles.count; masked_end = tiles.masked_end_from(i)) {
                /* ---- 3. Masked iterations. Sub-tiles that no row of the warp sees are skipped. */
#pragma unroll 1
                for (; i < masked_end; i++) {
                    /* Barrier: tile i has landed, and all warps are done with tile i - 1, whose
                     * stage the refill takes. */
                    ring.wait_own();
                    bool nonfinite = false;
                    if (MASKED && (is_exact || !SEPARATE_PASSES))
                        nonfinite = ring.any(holds_nonfinite(ring.V_tile()));
                    else
                        ring.wait_all();
                    ring.refill(i);

#pragma unroll 1
                    for (int n = 0; n < TILE_N; n += SUB_N) {
                        const int tile_key = tiles.key(i), key = tile_key + n;
                        const int row = not_before(block.lane_row);
                        if (key + SUB_N <= block.keys_of(block.warp_row).begin ||
                            key >= block.keys_of(block.warp_row + WARP_M - 1).end)
                            continue;
                        const unsigned K_sub_smem = ring.K_smem + n * K_layout::ROW_BYTES;
                        const unsigned V_sub_smem = ring.V_smem + n * V_layout::ROW_BYTES;
                        const int lane_key = key + 2 * quad_lane();
                        const auto coords_of = [&](int r, int c) {
                            return block.coords(row + r, lane_key + c);
                        };
                        float S_rmem[M_FRAGS][S_FRAGS][4];    /* [WARP_M, SUB_N] */
                        unsigned P_rmem[M_FRAGS][P_STEPS][4]; /* the same */
                        bias.load<true>(loaded, lane_key);
                        scores(S_rmem, Q_rmem, K_sub_smem);
                        factors.apply(S_rmem);
                        softcap(S_rmem, factors.scale_in_cap(params));
                        score_mod(S_rmem, params, coords_of);
                        alibi.add_to(S_rmem, lane_key, scale_of_rest(params));
                        bias.add_to(S_rmem, loaded, scale_of_rest(params));
                        mask_scores<MASK_LEFT, true>(S_rmem, masked_score(params), [&](int r) {
                            return block.keys_of(row + r) - lane_key;
                        });
                        if (tiles.is_partial())
                            mask_mod<true>(S_rmem, params, masked_score(params), coords_of);
                        const float scale_log2 = factors.scale_log2(params);
                        const row_set updated = Q_E4M3     ? row_set{0}
                                                : is_exact ? row_set{~0u}
                                                : SCORES_RISE
                                                    ? rows_that_grew(S_rmem, m_rmem, scale_log2)
                                                    : tiles.rows_to_update(block, row, tile_key);
                        if (Q_E4M3)
                            follow_row_max(O_rmem, l_rmem, m_rmem, S_rmem, scale_log2);
                        else
                            update_row_max(O_rmem, l_rmem, m_rmem, S_rmem, scale_log2, updated);
                        exponentials(P_rmem, l_rmem, S_rmem, m_rmem, scale_log2, updated, stream,
                                     coords_of);
                        if (nonfinite) {
                            add_values_seen(O_rmem, P_rmem, V_sub_smem, block, row, key);
                            load_queries(Q_rmem, factors,
                                         params); /* again: that took Q's registers */
                        } else
                            add_values(O_rmem, P_rmem, V_sub_smem);
                    }
                    ring.advance();
                    tiles.advance();
                }
                if (LOOKS_AT_SUMS)
                    guess_missing_row_max(m_rmem);

                /* ---- 4. Unmasked iterations: no mask, and no row max, unless fp16 or a bias needs
                 * one, see softmax.cuh. */
#pragma unroll 1
                for (; i < unmasked_end; i++) {
                    if (BLOCK_SPARSE && !tiles.is_inner())
                        break;
                    ring.wait_own();
                    ring.wait_all(); /* barrier, as above */
                    ring.refill(i);
#pragma unroll SUB_UNROLL
                    for (int n = 0; n < TILE_N; n += SUB_N) {
                        const int key = tiles.key(i) + n + 2 * quad_lane();
                        const auto coords_of = [&](int r, int c) {
                            return block.coords(block.lane_row + r, key + c);
                        };
                        float S_rmem[M_FRAGS][S_FRAGS][4];    /* [WARP_M, SUB_N] */
                        unsigned P_rmem[M_FRAGS][P_STEPS][4]; /* the same */
                        bias.load<false>(loaded, key);
                        scores(S_rmem, Q_rmem, ring.K_smem + n * K_layout::ROW_BYTES);
                        factors.apply(S_rmem);
                        softcap(S_rmem, factors.scale_in_cap(params));
                        score_mod(S_rmem, params, coords_of);
                        alibi.add_to(S_rmem, key, scale_of_rest(params));
                        bias.add_to(S_rmem, loaded, scale_of_rest(params));
                        mask_mod<!BLOCK_SPARSE>(S_rmem, params, masked_score(params), coords_of);
                        const float scale_log2 = factors.scale_log2(params);
                        row_set updated = {0};
                        if (Q_E4M3)
                            follow_row_max(O_rmem, l_rmem, m_rmem, S_rmem, scale_log2);
                        else if (LOOKS_AT_MAX)
                            updated = raise_row_max(O_rmem, l_rmem, m_rmem, S_rmem, scale_log2);
                        else if (BIAS)
                            update_row_max(O_rmem, l_rmem, m_rmem, S_rmem, scale_log2,
                                           row_set{~0u});
                        exponentials(P_rmem, l_rmem, S_rmem, m_rmem, scale_log2, updated, stream,
                                     coords_of);
                        add_values(O_rmem, P_rmem, ring.V_smem + n * V_layout::ROW_BYTES);
                    }
                    if (LOOKS_AT_SUMS)
                        raise_row_max_by_sums(O_rmem, l_rmem, m_rmem);
                    ring.advance();
                    tiles.advance();
                }
            }

            /* ---- 5. O / l and lse out. */
            const warp_row_set left_out = {is_exact ? ~flagged : out_of_range(O_rmem, l_rmem).bits};
            if (SPLIT)
                store_split(params, O_rmem, l_rmem, m_rmem, left_out.of_lane());
            else
                store_rows(params, O_rmem, l_rmem, m_rmem, left_out.of_lane());
            flagged = left_out.bits;
        }

        /* Barrier: all of the block take the exact pass or none, and no warp reads the ring any
         * more when it starts again. */
        if (is_exact || !__syncthreads_or(flagged))
            return;
    }
}

#endif
