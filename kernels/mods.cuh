/* FlexAttention's score_mod and mask_mod: callables that flash_attn_sm120/mods/ has translated into
 * score_mod.cuh and mask_mod.cuh, and what their text calls.
 *
 *   SCORE_MOD, MASK_MOD   0: none; else a number for the text, which is compiled in */
#ifndef FA_MODS_CUH
#define FA_MODS_CUH

#include "argument.cuh"
#include "sink.cuh"

/* Whose score it is: sequence, query head, and query and key of the sequence. */
struct score_coords {
    int batch, head, query, key;
};

/* ---- captured tensors ------------------------------------------------------------------------ */

/* Bits of 16-bit types. */
struct captured_fp16 {
    unsigned short bits;
};
struct captured_bf16 {
    unsigned short bits;
};

template <class T> __device__ __forceinline__ T as_number(T x) { return x; }
__device__ __forceinline__ float as_number(captured_fp16 x) { return unpack<FA_FLOAT16>(x.bits).x; }
__device__ __forceinline__ float as_number(captured_bf16 x)
{
    return unpack<FA_BFLOAT16>(x.bits).x;
}

/* Negative indices count from the end, as in torch; what lies outside is clamped. */
__device__ __forceinline__ fa_int64 captured_offset(const fa_captured &, int) { return 0; }
template <class... more_t>
__device__ __forceinline__ fa_int64 captured_offset(const fa_captured &tensor, int dimension,
                                                    fa_int64 index, more_t... more)
{
    const fa_int64 size = tensor.size[dimension];
    index += index < 0 ? size : 0;
    index = index < 0 ? 0 : index < size ? index : size - 1;
    return index * tensor.stride[dimension] + captured_offset(tensor, dimension + 1, more...);
}

/* The element at these indices. */
template <class T, class... index_t>
__device__ __forceinline__ auto captured(const fa_captured &tensor, index_t... index)
{
    return as_number(*(static_cast<const T *>(tensor.data) + captured_offset(tensor, 0, index...)));
}

/* ---- torch's arithmetic ---------------------------------------------------------------------- */

/* Integers wrap around. */
template <class T> __device__ __forceinline__ T plus(T a, T b) { return a + b; }
template <class T> __device__ __forceinline__ T minus(T a, T b) { return a - b; }
template <class T> __device__ __forceinline__ T times(T a, T b) { return a * b; }
__device__ __forceinline__ int plus(int a, int b) { return unsigned(a) + unsigned(b); }
__device__ __forceinline__ int minus(int a, int b) { return unsigned(a) - unsigned(b); }
__device__ __forceinline__ int times(int a, int b) { return unsigned(a) * unsigned(b); }

/* Rounded down, and the rest, which has the sign of b. */
template <class T> __device__ __forceinline__ T floor_divided(T a, T b)
{
    return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
template <class T> __device__ __forceinline__ T floor_rest(T a, T b)
{
    const T rest = a % b;
    return rest + (rest != 0 && (rest < 0) != (b < 0) ? b : 0);
}
__device__ __forceinline__ float floor_rest(float a, float b)
{
    const float rest = fmodf(a, b);
    return rest + (rest != 0.0f && (rest < 0.0f) != (b < 0.0f) ? b : 0.0f);
}
__device__ __forceinline__ float floor_divided(float a, float b)
{
    return roundf((a - floor_rest(a, b)) / b);
}

template <class T> __device__ __forceinline__ T smaller(T a, T b) { return a < b ? a : b; }
template <class T> __device__ __forceinline__ T larger(T a, T b) { return a > b ? a : b; }
__device__ __forceinline__ float smaller(float a, float b) { return min_or_nan(a, b); }
__device__ __forceinline__ float larger(float a, float b) { return max_or_nan(a, b); }

template <class T> __device__ __forceinline__ T sign_of(T x) { return (x > 0) - (x < 0); }
template <class T> __device__ __forceinline__ T magnitude(T x) { return x < 0 ? -x : x; }
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ float exponential(float x) { return exp2f(x * LOG2_E); }
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* sqrt(2 / pi) * (x + 0.044715 x^3), and its derivative. */
__device__ __forceinline__ float gelu_inner(float x)
{
    return 0.79788456f * (x + 0.044715f * x * x * x);
}
__device__ __forceinline__ float gelu_inner_slope(float x)
{
    return 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
}
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
__device__ __forceinline__ float gelu_slope(float x)
{
    const float density = 0.39894228f * exponential(-0.5f * x * x);
    return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * density;
}
__device__ __forceinline__ float gelu_by_tanh(float x)
{
    return 0.5f * x * (1.0f + tanhf(gelu_inner(x)));
}
__device__ __forceinline__ float gelu_by_tanh_slope(float x)
{
    const float t = tanhf(gelu_inner(x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * gelu_inner_slope(x);
}

#include "mask_mod.cuh"
#include "score_mod.cuh"

#endif
