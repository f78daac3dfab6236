/* What e4m3 is multiplied by to be a number of K or V. */
#ifndef FA_DESCALE_CUH
#define FA_DESCALE_CUH

#include "ptx.cuh"

/* That of a sequence and KV head. */
__device__ __forceinline__ float load_descale(const fa_descale &descale, int number, int head_kv)
{
    if (!descale.scale)
        return 1.0f;
    return ld_global(descale.scale + number * descale.batch_stride + head_kv * descale.head_stride);
}

#endif
