/* The parts of a split forward put together: of each row, with lse_i and out_i of the keys of part
 * i alone,
 *
 *     lse = log2(sum_i 2^lse_i)        out = sum_i 2^(lse_i - lse) out_i
 *
 * A part without keys has lse_i = -inf and out_i = 0, and so no weight; a row without any gets
 * those very values. The order of the sums depends on nothing but the number of parts and slices.
 *
 *   DTYPE         of out, enum fa_dtype in params.h
 *   PARTS_DTYPE   of out_i
 *   HEAD_DIM_V    a multiple of 8 up to 512
 *   WARPS         of a block */
#include "params.h"

#define VARLEN 0 /* what differs from sequence to sequence is which rows there are, see is_used() */

#include "geometry.h"
#include "division.cuh"
#include "sequence.cuh"
#include "sink.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int LANES = fa_combine_lanes(HEAD_DIM_V);          /* threads of a row */
constexpr int SLOTS = fa_combine_slots(THREADS, HEAD_DIM_V); /* slices of rows in a block */
constexpr int AHEAD = 4;

/* m lies so far above the largest lse_i that the sum of 2^16 parts of the largest bf16 values is
 * still in the range of fp32. */
constexpr float MAX_OFFSET = 16.0f;

/* A sum of parts, weighed by 2^(lse_i - m): m rises with the largest of them, l and o follow. */
struct weighted {
    float m = LOWEST_FLOAT; /* finite: -inf - m is no NaN */
    float l = 0.0f;         /* sum of the weights */
    float4 o = {};          /* sum of the rows */

    __device__ __forceinline__ void add(float lse, float l_lse, const float4 &o_lse, float above)
    {
        const float raised = fmaxf(m, lse + above);
        const float own = exp2_approx(m - raised), weight = exp2_approx(lse - raised);
        m = raised;
        l = l * own + l_lse * weight;
        o.x = o.x * own + o_lse.x * weight;
        o.y = o.y * own + o_lse.y * weight;
        o.z = o.z * own + o_lse.z * weight;
        o.w = o.w * own + o_lse.w * weight;
    }
};

/* Four dims of a part from `offset` on. */
__device__ __forceinline__ float4 load_part(const void *parts, fa_int64 offset)
{
    if constexpr (PARTS_DTYPE == FA_FLOAT32)
        return *reinterpret_cast<const float4 *>(static_cast<const float *>(parts) + offset);
    const uint2 pairs =
        *reinterpret_cast<const uint2 *>(static_cast<const unsigned short *>(parts) + offset);
    const float2 low = unpack<PARTS_DTYPE>(pairs.x), high = unpack<PARTS_DTYPE>(pairs.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ void store_out(void *out, fa_int64 offset, const float4 &x)
{
    if constexpr (DTYPE == FA_FLOAT32)
        *reinterpret_cast<float4 *>(static_cast<float *>(out) + offset) = x;
    else
        *reinterpret_cast<uint2 *>(static_cast<element *>(out) + offset) =
            make_uint2(pack(x.x, x.y), pack(x.z, x.w));
}

/* Whether a sequence has and uses the row, where there are lengths. */
__device__ __forceinline__ bool is_used(const fa_combine_params &params, int batch, int row)
{
    const fa_lengths &lengths = params.lengths;
    if (!lengths.cu_seqlens_q && !lengths.seqused_q)
        return true;
    if (params.sequences == 0)
        return false;
    const int number = lengths.cu_seqlens_q
                           ? last_sequence(params.sequences,
                                           [&](int other) {
                                               return first_row(lengths.cu_seqlens_q,
                                                                lengths.total_q, other) <= row;
                                           })
                           : batch;
    const sequence_rows used = read_queries(lengths, params.seqlen_q.number, number);
    return row >= used.begin && row < used.begin + used.count;
}

/* From the beginning of a tensor [batch, seqlen, heads, head_dim] to a row of a head. */
__device__ __forceinline__ fa_int64 offset_in(const fa_strides &stride, int batch, int row,
                                              int head)
{
    return batch * stride.batch + row * stride.seqlen + head * stride.head;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    combine(const __grid_constant__ struct fa_combine_params params)
{
    /* ---- 1. Which dims of which row, which slice of its parts: while the forward still runs. */
    const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES;
    const int block_rows = divide(SLOTS, params.slices).quotient;
    const auto [block_row, slice] = divide(slot, params.slices);
    const unsigned row = blockIdx.x * block_rows + block_row;
    const bool exists = block_row < block_rows && row < params.rows;
    const auto [pair, query] = divide(row, params.seqlen_q);
    const auto [batch, head] = divide(pair, params.heads_q);
    const float sink =
        exists && slice == 0 ? load_sink(params.sink, params.sink_dtype, head) : -INF;
    const fa_int64 out_part = offset_in(params.out_parts_stride, batch, query, head) + lane * 4;
    const fa_int64 lse_part = offset_in(params.lse_parts_stride, batch, query, head);
    const int parts = exists && is_used(params, batch, query) ? params.parts : 0;
    wait_for_previous_kernel();

    /* ---- 2. The sum of a slice. The loads of AHEAD parts are on their way together; one that is
     * not there has no weight, as a part without keys has none. */
    weighted sum;
    for (int first = slice; first < parts; first += AHEAD * params.slices.number) {
        float lse[AHEAD];
        float4 o[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const fa_int64 part = first + i * params.slices.number;
            lse[i] =
                part < parts ? params.lse_parts[part * params.lse_parts_step + lse_part] : -INF;
            o[i] = part < parts
                       ? load_part(params.out_parts, part * params.out_parts_step + out_part)
                       : float4{};
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            sum.add(lse[i] * params.lse_parts_log2, 1.0f, o[i], MAX_OFFSET);
    }

    /* ---- 3. The sum of all slices, by the threads of the first. */
    __shared__ float m_smem[THREADS], l_smem[THREADS];
    __shared__ float4 o_smem[THREADS];
    m_smem[threadIdx.x] = sum.m;
    l_smem[threadIdx.x] = sum.l;
    o_smem[threadIdx.x] = sum.o;
    __syncthreads(); /* every slice is there */
    if (!exists || slice > 0)
        return;
    for (int i = 1; i < params.slices.number; i++) {
        const int from = threadIdx.x + i * LANES;
        sum.add(m_smem[from], l_smem[from], o_smem[from], 0.0f);
    }

    /* ---- 4. The sink, and out. */
    if (params.sink && sum.l != 0.0f)
        sum.add(sink * LOG2_E, 1.0f, {}, MAX_OFFSET);
    const float inverse = sum.l == 0.0f ? 0.0f : 1.0f / sum.l; /* 0: no keys */
    store_out(
        params.out, offset_in(params.out_stride, batch, query, head) + lane * 4,
        make_float4(sum.o.x * inverse, sum.o.y * inverse, sum.o.z * inverse, sum.o.w * inverse));
    if (params.lse && lane == 0)
        params.lse[row] = sum.l == 0.0f ? sink : lse_log2(sum.m, sum.l) * LN2;
}
