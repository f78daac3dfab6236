/* Which keys a query sees, and which queries see a key. csrc/cpu/scores.h has the same. */
#ifndef FA_MASK_CUH
#define FA_MASK_CUH

#include "sequence.cuh"

struct range {
    int begin, end; /* half-open */

    __device__ __forceinline__ range operator-(int origin) const
    {
        return {begin - origin, end - origin};
    }
};

/* Query i sees key j if i + left <= j <= i + right: a band between diagonals that are aligned to
 * the bottom right corner of [seqlen_q, seqlen_k]. */
struct attention_mask {
    int left, right, seqlen_q, seqlen_k;

    attention_mask() = default;

    template <class params_t>
    __device__ __forceinline__ attention_mask(const sequence<params_t> &seq)
        : seqlen_q(seq.seqlen_q()), seqlen_k(seq.seqlen_k())
    {
        /* A window longer than the sequence hides nothing more: min() keeps the sums below from
         * overflowing. */
        const int diagonal = seqlen_k - seqlen_q;
        left = MASK_LEFT ? diagonal - min(seq.params.window_left, seqlen_k) : 0;
        right = MASK_RIGHT ? diagonal + min(seq.params.window_right, seqlen_q) : 0;
    }

    /* The keys that a query sees. A range that is empty may have its end before its begin. */
    __device__ __forceinline__ range keys_of(int query) const
    {
        return {MASK_LEFT ? max(query + left, 0) : 0,
                MASK_RIGHT ? max(min(query + right + 1, seqlen_k), 0) : seqlen_k};
    }
    /* The queries that see a key. */
    __device__ __forceinline__ range queries_of(int key) const
    {
        return {MASK_RIGHT ? max(key - right, 0) : 0,
                MASK_LEFT ? min(key - left + 1, seqlen_q) : seqlen_q};
    }
};

#endif
