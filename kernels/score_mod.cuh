/* The empty hook of a score_mod. In variants with one, what flash_attn_sm120/mods/ makes of it takes
 * the place of this file: see mods.cuh. */
#ifndef FA_SCORE_MOD_CUH
#define FA_SCORE_MOD_CUH

__device__ __forceinline__ float score_mod_of(float score, const score_coords &,
                                              const fa_captured *)
{
    return score;
}

/* Its derivative by the score. */
__device__ __forceinline__ float score_mod_slope(float, const score_coords &, const fa_captured *)
{
    return 1.0f;
}

#endif
