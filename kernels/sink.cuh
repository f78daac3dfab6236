/* The learnable sink: one more logit of each head, which takes its share of the softmax and has no
 * value. And the numbers that go with logarithms. */
#ifndef FA_SINK_CUH
#define FA_SINK_CUH

#include "ptx.cuh"

#define INF __int_as_float(0x7f800000)
constexpr float LOWEST_FLOAT = -3.4028234e38f; /* -FLT_MAX */
constexpr float LN2 = 0.693147180559945f;
constexpr float LOG2_E = 1.44269504088896f;

/* The sink of a head; -inf, which has no share, where there are none. */
__device__ __forceinline__ float load_sink(const void *sinks, int dtype, int head)
{
    if (!sinks)
        return -INF;
    if (dtype == FA_FLOAT32)
        return ld_global(static_cast<const float *>(sinks) + head);
    const unsigned short half = ld_global(static_cast<const unsigned short *>(sinks) + head);
    return dtype == FA_BFLOAT16 ? __int_as_float(half << 16) : from_fp16(half);
}

/* lse of a row in powers of two, from m and the sum l of 2^(s - m). As torch.logsumexp: +inf where
 * a score is +inf, although l is NaN there, and NaN where a score is NaN. */
__device__ __forceinline__ float lse_log2(float m, float l)
{
    return m == INF ? INF : m + log2_approx(l);
}

/* l += the sink's p. A sink far above m would be out of range: m rises to it, and O, computed with
 * the m before, has to be multiplied by the factor that is returned. A row without keys stays
 * without a sum. A sink of -inf changes nothing, to the bit: no branch asks whether there is one,
 * because the compiler would then write all that follows twice. */
__device__ __forceinline__ float add_sink(float &l, float &m, float sink)
{
    const float raised = fmaxf(m, sink * LOG2_E);
    const float rescale = exp2_approx(m - raised);
    l = l == 0.0f ? 0.0f : l * rescale + exp2_approx(sink * LOG2_E - raised);
    m = raised;
    return rescale;
}

#endif
