/* The sequence that a block works on: its lengths, and where its rows begin. Kernels read lengths
 * here and nowhere else. */
#ifndef FA_SEQUENCE_CUH
#define FA_SEQUENCE_CUH

#include "params.h"

/* One entry of the batch, by the parameters of any kernel. All entries have the same lengths, which
 * are read from constant memory where they are needed: that takes no register. */
template <class params_t> struct sequence {
    const params_t &params;
    int batch;

    __device__ __forceinline__ int seqlen_q() const { return params.seqlen_q; }
    __device__ __forceinline__ int seqlen_k() const { return params.seqlen_k; }

    /* From the beginning of a tensor [batch, seqlen, heads, head_dim] to row 0 of a head. */
    __device__ __forceinline__ fa_int64 q_offset(const fa_strides &stride, int head) const
    {
        return batch * stride.batch + head * stride.head;
    }
    __device__ __forceinline__ fa_int64 k_offset(const fa_strides &stride, int head) const
    {
        return batch * stride.batch + head * stride.head;
    }
    /* From the beginning of lse, [batch, heads, seqlen_q], to query 0 of a head: `pair` is the
     * number of this batch entry and head. */
    __device__ __forceinline__ fa_int64 lse_offset(fa_int64 pair) const
    {
        return pair * seqlen_q();
    }
};

#endif
