/* Mods alone, of one score: explain(costs=True) counts the PTX instructions. It is never launched.
 *
 * Constants:
 *   SCORE_MOD, MASK_MOD   as in mods.cuh
 *   BACKWARD              whether the derivative is computed, too
 *   DTYPE, BLOCK_SPARSE   any, 0: what is included asks for them */
#include "mods.cuh"

extern "C" __global__ void mod_cost(fa_mods mods, score_coords at, float scale, float *scores,
                                    bool *is_seen)
{
    is_seen[0] = mask_mod_of(at, mods.mask);
    scores[0] = score_mod_of(scores[0], scale, at, mods.score);
    if constexpr (BACKWARD)
        scores[1] = score_mod_slope(scores[2], scale, at, mods.score);
}
