/* Quantisers: 16 dims of a token, which a thread loads, and rotates with its neighbours. */
#ifndef FA_QUANTIZE_VECTOR_CUH
#define FA_QUANTIZE_VECTOR_CUH

#include "quantize.cuh"

/* As it lies in memory. */
struct raw_vector {
    uint4 half[2];
};

/* Zeros where there is none. */
__device__ __forceinline__ raw_vector load_vector(const fa_quantize_operand &x,
                                                  const block_work &work, int token, int dim,
                                                  bool exists)
{
    raw_vector raw = {};
    if (exists) {
        const element *first = static_cast<const element *>(x.x) + work.batch * x.stride.batch +
                               work.head * x.stride.head + token * x.stride.seqlen + dim;
        raw.half[0] = reinterpret_cast<const uint4 *>(first)[0];
        raw.half[1] = reinterpret_cast<const uint4 *>(first)[1];
    }
    return raw;
}

constexpr float reciprocal_root_of(int power_of_two)
{
    return power_of_two == 1   ? 1.0f
           : power_of_two == 2 ? 0.707106781186547524f
                               : 0.5f * reciprocal_root_of(power_of_two / 4);
}

/* By a Hadamard matrix, rounded as rotate() of quantize.py does it. All lanes of the warp come
 * here; each SIZE / 16 of them have the dims of a block. */
template <int SIZE> __device__ __forceinline__ void rotate(float (&x)[VECTOR])
{
    if constexpr (SIZE > 1) {
#pragma unroll
        for (int step = 1; step < VECTOR; step *= 2)
#pragma unroll
            for (int i = 0; i < VECTOR; i++)
                if (!(i & step)) {
                    const float first = x[i], second = x[i + step];
                    x[i] = first + second;
                    x[i + step] = first - second;
                }
#pragma unroll
        for (int step = 1; step < SIZE / VECTOR; step *= 2)
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                const float other = __shfl_xor_sync(0xffffffff, x[i], step);
                x[i] = threadIdx.x & step ? other - x[i] : x[i] + other;
            }
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            x[i] = __fmul_rn(x[i], reciprocal_root_of(SIZE)); /* not fused with what follows */
    }
}

/* In fp32, rotated. All lanes of the warp come here. */
template <class kind>
__device__ __forceinline__ void widen(float (&x)[VECTOR], const raw_vector &raw)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unsigned words[4] = {raw.half[i].x, raw.half[i].y, raw.half[i].z, raw.half[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 pair = unpack(words[j]);
            x[8 * i + 2 * j] = pair.x;
            x[8 * i + 2 * j + 1] = pair.y;
        }
    }
    rotate<kind::HADAMARD>(x);
}

#endif
