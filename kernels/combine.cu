/* The parts of a split forward put together: of each row, with lse_i and out_i of the keys of part
 * i alone,
 *
 *     lse = log2(sum_i 2^lse_i)        out = sum_i 2^(lse_i - lse) out_i
 *
 * A part without keys has lse_i = -inf and out_i = 0, and so no weight; a row without any gets
 * those very values. The order of the sums depends on nothing but the number of parts and slices.
 *
 *   DTYPE        of out, enum fa_dtype in params.h
 *   HEAD_DIM_V   a multiple of 8 up to 256
 *   WARPS        of a block */
#include "params.h"

#include "geometry.h"
#include "division.cuh"
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
    wait_for_previous_kernel();

    /* ---- 2. The sum of a slice. The loads of AHEAD parts are on their way together; one that is
     * not there has no weight, as a part without keys has none. */
    weighted sum;
    for (int first = slice; exists && first < params.parts; first += AHEAD * params.slices.number) {
        float lse[AHEAD];
        float4 o[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int part = first + i * params.slices.number;
            const fa_int64 at = static_cast<fa_int64>(part) * params.rows + row;
            const float4 *out_row = reinterpret_cast<const float4 *>(params.out_parts) + at * LANES;
            lse[i] = part < params.parts ? params.lse_parts[at] : -INF;
            o[i] = part < params.parts ? out_row[lane] : float4{};
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            sum.add(lse[i], 1.0f, o[i], MAX_OFFSET);
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
    unsigned short *out_row = static_cast<unsigned short *>(params.out) +
                              batch * params.out_stride.batch + head * params.out_stride.head +
                              query * params.out_stride.seqlen;
    const float inverse = sum.l == 0.0f ? 0.0f : 1.0f / sum.l; /* 0: no keys */
    reinterpret_cast<uint2 *>(out_row)[lane] = make_uint2(
        pack(sum.o.x * inverse, sum.o.y * inverse), pack(sum.o.z * inverse, sum.o.w * inverse));
    if (params.lse && lane == 0)
        params.lse[row] = sum.l == 0.0f ? sink : lse_log2(sum.m, sum.l) * LN2;
}
