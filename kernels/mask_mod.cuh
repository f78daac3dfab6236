/* The empty hook of a mask_mod, as score_mod.cuh. */
#ifndef FA_MASK_MOD_CUH
#define FA_MASK_MOD_CUH

__device__ __forceinline__ bool mask_mod_of(const score_coords &, const fa_captured *)
{
    return true;
}

#endif
