/* Division by numbers that the host knows, struct fa_divisor of params.h: a multiplication and a
 * shift, where the GPU's own takes some 25 instructions, one waiting for the other. */
#ifndef FA_DIVISION_CUH
#define FA_DIVISION_CUH

struct divided {
    int quotient, rest;
};

/* n, which is not negative, by a number. */
__device__ __forceinline__ divided divide(int n, const fa_divisor &by)
{
    const int quotient = __umulhi(2u * n, by.multiplier) >> by.shift;
    return {quotient, n - quotient * by.number};
}

#endif
