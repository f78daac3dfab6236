/* The bias that a call adds to scores: fa_bias in params.h. */
#ifndef FA_BIAS_CUH
#define FA_BIAS_CUH

#include "score.cuh"

template <bool FP32> struct bias_types {
    using element = float;
    using pair = float2;
};
template <> struct bias_types<false> {
    using element = unsigned short;
    using pair = unsigned;
};
using bias_element = bias_types<BIAS_FP32>::element;
using bias_pair = bias_types<BIAS_FP32>::pair;

__device__ __forceinline__ float bias_to_float(float x) { return x; }
__device__ __forceinline__ float bias_to_float(unsigned short x) { return unpack(x).x; }

__device__ __forceinline__ float2 bias_to_floats(float2 pair) { return pair; }
__device__ __forceinline__ float2 bias_to_floats(unsigned pair) { return unpack(pair); }

__device__ __forceinline__ float2 bias_pair_of(float low, float high)
{
    return make_float2(low, high);
}
__device__ __forceinline__ unsigned bias_pair_of(unsigned short low, unsigned short high)
{
    return low | static_cast<unsigned>(high) << 16;
}

/* The biases of a query of a head. */
template <class params_t>
__device__ __forceinline__ const bias_element *bias_row(const params_t &params, int batch, int head,
                                                        int query)
{
    const fa_strides &stride = params.bias.stride;
    return static_cast<const bias_element *>(params.bias.data) + batch * stride.batch +
           head * stride.head + query * stride.seqlen;
}

#endif
