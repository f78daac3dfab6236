/* The argument of a kernel: its parameters, and behind them what few variants have.
 *
 *   BLOCK_SPARSE          1: the call lists blocks, see block_list.cuh
 *   SCORE_MOD, MASK_MOD   not 0: the call has callables, see mods.cuh */
#ifndef FA_ARGUMENT_CUH
#define FA_ARGUMENT_CUH

#include "params.h"

enum : bool { HAS_MODS = SCORE_MOD || MASK_MOD };

template <class params_t, bool IS_EXTENDED = BLOCK_SPARSE || HAS_MODS> struct argument {
    using type = params_t;
};
template <> struct argument<fa_forward_params, true> {
    using type = fa_extended_forward_params;
};
template <> struct argument<fa_forward_tma_params, true> {
    using type = fa_extended_forward_params;
};
template <> struct argument<fa_backward_params, true> {
    using type = fa_extended_backward_params;
};
template <class params_t> using argument_of = typename argument<params_t>::type;

/* What an argument begins with. */
template <class params_t, class argument_t>
__device__ __forceinline__ const params_t &params_of(const argument_t &argument)
{
    return reinterpret_cast<const params_t &>(argument);
}

__device__ __forceinline__ const fa_extended_forward_params &
extended(const fa_forward_params &params)
{
    return reinterpret_cast<const fa_extended_forward_params &>(params);
}
__device__ __forceinline__ const fa_extended_backward_params &
extended(const fa_backward_params &params)
{
    return reinterpret_cast<const fa_extended_backward_params &>(params);
}

template <class params_t>
__device__ __forceinline__ const fa_block_lists &lists_of(const params_t &params)
{
    return extended(params).lists;
}
template <class params_t> __device__ __forceinline__ const fa_mods &mods_of(const params_t &params)
{
    return extended(params).mods;
}

#endif
