/* Sums in fixed point: those of integers are the same in any order, which sums in fp32 are not.
 * The units of a sum go by the largest magnitude `largest` < 2^e that is added to it, which has to
 * be known first. What is added counts in units of 2^(e - bits); and what that rounds off, in units
 * that are 2^(bits + 1) times smaller. So additions keep 2 * bits below the largest of their sum.
 *
 * The host chooses `bits`, at most 30, such that no sum reaches 2^63: see csrc/shape.h. */
#ifndef FA_FIXED_POINT_SUMS_CUH
#define FA_FIXED_POINT_SUMS_CUH

#include "params.h"

/* The least e with largest < 2^e; of zero that of the least normal number. */
__device__ __forceinline__ int exponent_above(float largest)
{
    return max(__float_as_int(largest) >> 23, 1) - 126;
}

/* Makes x count for `largest`. */
__device__ __forceinline__ void add_to_largest(float *largest, float x)
{
    atomicMax(reinterpret_cast<int *>(largest), __float_as_int(fabsf(x)));
}

/* `sum` [2]: of units, and of what these round off. */
__device__ __forceinline__ void add_in_units(fa_int64 *sum, float x, float largest, int bits)
{
    /* What was found and what is added may be rounded in two ways, as kernels of their own. */
    const float most = 1 << bits, exact = ldexpf(x, bits - exponent_above(largest));
    const float scaled = fminf(fmaxf(exact, -most), most), whole = rintf(scaled);
    const float rest = ldexpf(scaled - whole, bits + 1);
    unsigned long long *to = reinterpret_cast<unsigned long long *>(sum);
    atomicAdd(to, static_cast<long long>(__float2int_rn(whole)));
    if (rest != 0.0f)
        atomicAdd(to + 1, static_cast<long long>(__float2int_rn(rest)));
}

/* The sum in fp32; NaN where something that was added is inf or NaN. */
__device__ __forceinline__ float sum_of_units(const fa_int64 *sum, float largest, int bits)
{
    constexpr int INF_BITS = 0x7f800000, NAN_BITS = 0x7fffffff;
    if (__float_as_int(largest) >= INF_BITS)
        return __int_as_float(NAN_BITS);
    const fa_int64 whole = sum[0] + (sum[1] >> (bits + 1));
    const int rest = sum[1] & ((1ll << (bits + 1)) - 1);
    const float units = __ll2float_rn(whole) + ldexpf(rest, -bits - 1);
    return ldexpf(units, exponent_above(largest) - bits);
}

#endif
