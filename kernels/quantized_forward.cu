/* Attention forward with Q, K, P and V in 8 and 4 bits: for each recipe of docs/quantized.md one
 * set of constants. A block has queries of one head, 16 of each warp; a tile is 64 keys.
 *
 *   QK_FORMAT, PV_FORMAT    enum quantized_format, of Q and K, of V and P
 *   HEAD_DIM, HEAD_DIM_V    of Q and K, of V and O: multiples of 16 up to 256
 *   DTYPE                   enum fa_dtype: of V in 16 bits
 *   OUT_DTYPE               of out
 *   SOFTCAP                 1: scores are capped by a tanh
 *   SINK                    1: one more logit of each head, see sink.cuh
 *   MX_E4M3                 1: products of e4m3 by the block-scaled mma of 12.x, with scales of 1
 *   TRANSPOSES_BYTES        1: ldmatrix of 12.x transposes bytes; 0: pairs of bytes
 *   WARPS                   of a block
 *   STAGE_TILES             tiles that come at a time
 *   SMEM_BYTES              what the host launches it with
 *   BLOCKS                  of a multiprocessor, for which registers are to be enough */
#include "params.h"

#include "ptx.cuh"
#include "quantized_nonfinite.cuh"
#include "quantized_softmax.cuh"

/* What a warp's rows of O are brought to in order to be written, in fp32. */
constexpr int OUT_BYTES = WARP_M * HEAD_DIM_V * 4;
static_assert(SMEM_BYTES >= STAGES * STAGE_TILES * TILE_BYTES && SMEM_BYTES >= WARPS * OUT_BYTES,
              "the host computes the same");

/* The factor of a row of Q in its head or block. */
__device__ __forceinline__ float query_factor(const quantized_block &block)
{
    const fa_quantized_params &params = block.params;
    if (QK_FORMAT != FORMAT_INT8)
        return factor_of(params.q_head_scale, block.query_head());
    const int row = min(block.warp_row(), params.seqlen_q - 1);
    const int blocks = ceil_div(params.seqlen_q, INT8_QUERIES);
    return ld_global(static_cast<const float *>(params.q_scale) + block.query_head() * blocks +
                     row / INT8_QUERIES);
}

__device__ __forceinline__ void clear(softmax_rows &rows, float (&O_rmem)[O_FRAGS][2][4])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        rows.m[half] = LOWEST_FLOAT;
        rows.l[half] = 0.0f;
#pragma unroll
        for (int n = 0; n < O_FRAGS; n++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                O_rmem[n][half][r] = 0.0f;
    }
}

/* What goes out with the rows g and g + 8. */
struct row_ends {
    float l[2];     /* of all lanes, times 2^P_SHIFT: what O is divided by */
    float share[2]; /* of the keys in all weights, where SINK */
    float lse[2];   /* natural logarithm */
};

/* `left_out`: of the scores, what K's mean would add; 0 where SOFTCAP. The sink is one of the first
 * part's weights. */
__device__ __forceinline__ void end_rows(row_ends &ends, const softmax_rows &rows,
                                         const float (&left_out)[2], const quantized_block &block)
{
    const fa_quantized_params &params = block.params;
    const float sink =
        SINK && block.part == 0 ? load_sink(params.sink, params.sink_dtype, block.head) : -INF;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float l = ends.l[half] = quad_sum(rows.l[half]), m = rows.m[half] - P_SHIFT;
        if (SINK) {
            const float rescale = add_sink(l, m, sink - left_out[half]);
            ends.share[half] = ends.l[half] * rescale / l;
        }
        ends.lse[half] = l == 0.0f ? sink : (m + log2_approx(l)) * LN2 + left_out[half];
    }
}

__device__ __forceinline__ void store_lse(const row_ends &ends, const quantized_block &block)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = block.lane_row() + 8 * half;
        if (quad_lane() == 0 && row < block.params.seqlen_q)
            block.params.lse[block.lse_row(row)] = ends.lse[half];
    }
}

/* Where four numbers of a row of O are, from dim on: pairs of rows alternate between banks. */
__device__ __forceinline__ int out_offset(int row, int dim)
{
    return (row * HEAD_DIM_V + (dim ^ row / 2 % 2 * 8)) * 4;
}

/* O^T / l, times the factor of V and plus its mean, to this warp's part of shared memory as O, and
 * from there to `out`. */
__device__ __forceinline__ void store_out(float (&O_rmem)[O_FRAGS][2][4], const row_ends &ends,
                                          const quantized_block &block, unsigned smem)
{
    const fa_quantized_params &params = block.params;
    const float factor = factor_of(params.v_head_scale, block.key_head()) / P_REST;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sums[2], shares[2];
        of_columns(sums, ends.l[half]);
        if (SINK)
            of_columns(shares, ends.share[half]);
#pragma unroll
        for (int n = 0; n < O_FRAGS; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int dim = dim_of(n, r / 2), row = 8 * half + 2 * quad_lane() + r % 2;
                float x = O_rmem[n][half][r] / sums[r % 2] * factor;
                if (params.v_mean)
                    x += ld_global(params.v_mean + block.key_head() * HEAD_DIM_V + dim);
                if (SINK)
                    x *= shares[r % 2];
                st_shared(smem + out_offset(row, dim),
                          __float_as_uint(sums[r % 2] == 0.0f ? 0.0f : x));
            }
    }
    __syncwarp();
    constexpr int CHUNK = OUT_DTYPE == FA_FLOAT32 ? 4 : 8, CHUNKS = HEAD_DIM_V / CHUNK;
    constexpr int OUT_ELEMENT = fa_element_bytes(OUT_DTYPE);
    for (int i = lane_id(); i < WARP_M * CHUNKS; i += 32) {
        const int row = block.warp_row() + i / CHUNKS, dim = i % CHUNKS * CHUNK;
        if (row >= params.seqlen_q)
            break;
        const unsigned from = smem + out_offset(i / CHUNKS, dim);
        uint4 chunk = ld_shared_16(from);
        if (CHUNK == 8) {
            const uint4 next = ld_shared_16(from + 16);
            chunk = make_uint4(pack<OUT_DTYPE>(__uint_as_float(chunk.x), __uint_as_float(chunk.y)),
                               pack<OUT_DTYPE>(__uint_as_float(chunk.z), __uint_as_float(chunk.w)),
                               pack<OUT_DTYPE>(__uint_as_float(next.x), __uint_as_float(next.y)),
                               pack<OUT_DTYPE>(__uint_as_float(next.z), __uint_as_float(next.w)));
        }
        *reinterpret_cast<uint4 *>(static_cast<char *>(params.out) +
                                   (block.out_row(row) * HEAD_DIM_V + dim) * OUT_ELEMENT) = chunk;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    quantized_forward(const __grid_constant__ fa_quantized_params params)
{
    extern __shared__ __align__(128) char smem[];
    const quantized_block block(params);
    const int end = block.first_tile(block.part + 1);
    const int whole_begin = block.first_whole_tile(), whole_end = block.end_whole_tile();
    const int begin = block.first_tile(block.part);
    int tile = begin;
    quantized_ring ring(block, smem, tile);
    if (tile < end)
        ring.copy_stage(tile, end);

    unsigned Q_rmem[D_STEPS][4];
    load_queries(Q_rmem, block);
    query_scales Q_scales;
    Q_scales.load(block);

    const float scale = fabsf(params.softmax_scale), of_query = query_factor(block);
    const float cap = SOFTCAP ? 1.0f / params.softcap : LOG2_E;
    const score_factor factor = {scale * cap * of_query *
                                     factor_of(params.k_head_scale, block.key_head()),
                                 params.softcap * LOG2_E};
    float O_rmem[O_FRAGS][2][4], shift[2] = {0.0f, 0.0f};
    softmax_rows rows;
    clear(rows, O_rmem);
    if (SOFTCAP)
        left_out(shift, Q_rmem, block);
#pragma unroll
    for (int half = 0; half < 2; half++)
        rows.shift[half] = SOFTCAP ? shift[half] * of_query * scale * cap : 0.0f;

    key_scale_source K_scale_source(block, tile);
    value_scale_source V_scale_source(block, tile);
    key_scales K_scales, next_K_scales;
    if (tile < end)
        K_scale_source.load(K_scales, block, params.seqlen_k - tile * TILE_N);
    /* Computed once: the compiler would do it again for each tile. */
    const unsigned K_lane = not_before(ring.smem + K_lane_offset());
    const unsigned V_lane = not_before(ring.smem + V_lane_offset() + K_layout::BYTES);
    for (; tile < end; tile++) {
        if ((tile - begin) % STAGE_TILES == 0) {
            cp_async_wait<0>();
            __syncthreads(); /* the stage has come, and the other one is free */
            if (STAGE_TILES > 1 && tile + STAGE_TILES < end)
                ring.copy_stage(tile + STAGE_TILES, end);
        }
        if (tile + 1 < end) {
            if (STAGE_TILES == 1)
                ring.copy_stage(tile + 1, end);
            K_scale_source.load(next_K_scales, block, params.seqlen_k - (tile + 1) * TILE_N);
        }
        value_scales V_scales;
        V_scale_source.load(V_scales, params.seqlen_k - tile * TILE_N);
        const bool is_whole = whole_begin <= tile && tile < whole_end;
        if (!is_whole) {
            if constexpr (IS_V_NVFP4)
                take_nan_scales(O_rmem, V_scales, block, tile * TILE_N);
            else
                take_nonfinite(O_rmem, ring.V_tile(tile), block, tile * TILE_N);
        }
        if (is_whole || block.warp_sees(tile)) {
            float S_rmem[S_FRAGS][4];
            weights P;
            scores(S_rmem, Q_rmem, K_lane + ring.slot(tile), Q_scales, K_scales);
            if (is_whole)
                weigh<false>(P, S_rmem, O_rmem, rows, factor, K_scales, block, tile * TILE_N);
            else
                weigh<true>(P, S_rmem, O_rmem, rows, factor, K_scales, block, tile * TILE_N);
            add_values(O_rmem, P, V_lane + ring.slot(tile), V_scales);
        }
        K_scales = next_K_scales;
    }

    if (!SOFTCAP && (SINK || params.lse))
        left_out(shift, Q_rmem, block);
#pragma unroll
    for (int half = 0; half < 2; half++)
        shift[half] = SOFTCAP ? 0.0f : shift[half] * of_query * scale;
    row_ends ends;
    end_rows(ends, rows, shift, block);
    if (params.lse)
        store_lse(ends, block);
    __syncthreads(); /* no warp reads the ring any more */
    store_out(O_rmem, ends, block, ring.smem + read_thread_index() / 32 * OUT_BYTES);
}
