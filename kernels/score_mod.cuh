/* The empty hook of a score_mod. In variants with one, what flash_attn_sm120/mods/ makes of it
 * takes the place of this file: see mods.cuh. */
#ifndef FA_SCORE_MOD_CUH
#define FA_SCORE_MOD_CUH

/* Whether its result may differ from key to key where the score does not. */
enum : bool { SCORE_MOD_READS_KEY = false };

/* Of the score s * scale, in powers of two. */
__device__ __forceinline__ float score_mod_of(float s, float scale, const score_coords &,
                                              const fa_captured *)
{
    return s * (scale * LOG2_E);
}

/* Its derivative by the score. */
__device__ __forceinline__ float score_mod_slope(float, float, const score_coords &,
                                                 const fa_captured *)
{
    return 1.0f;
}

/* Calls gradients.add() with what a gradient of the result makes of those of captured tensors; or
 * adds to `sums`, of elements that all scores of a head have in common, which the second function
 * takes to gradients.add_sum(). */
template <class gradients_t>
__device__ __forceinline__ void add_score_mod_gradients(float, float, float, const score_coords &,
                                                        const fa_captured *, const gradients_t &,
                                                        float *)
{
}
template <class gradients_t>
__device__ __forceinline__ void add_score_mod_sums(const score_coords &, const gradients_t &,
                                                   float *)
{
}

#endif
