/* The structs that host and device share, byte for byte.
 *
 * Read by NVRTC without any header, and by the C compiler of the host. Strides count elements, and
 * are 64-bit because one tensor may hold more than 2^31 elements; the innermost stride is always 1.
 */
#ifndef FA_PARAMS_H
#define FA_PARAMS_H

#ifdef __CUDACC_RTC__
typedef long long fa_int64;
#define FA_STATIC_ASSERT  static_assert
#define FA_ALIGNED(bytes) alignas(bytes)
#else
#include <stdint.h>
typedef int64_t fa_int64;
#define FA_STATIC_ASSERT  _Static_assert
#define FA_ALIGNED(bytes) _Alignas(bytes)
#endif

/* Outer strides of one [batch, seqlen, heads, head_dim] tensor. */
struct fa_strides {
    fa_int64 batch, seqlen, head;
};

/* The single argument of kernels/forward.cu. */
struct fa_forward_params {
    const void *q; /* [batch, seqlen_q, heads_q, head_dim] */
    const void *k; /* [batch, seqlen_k, heads_kv, head_dim] */
    const void *v; /* [batch, seqlen_k, heads_kv, head_dim_v] */
    void *out;     /* [batch, seqlen_q, heads_q, head_dim_v] */
    float *lse;    /* [batch, heads_q, seqlen_q], contiguous, natural log; NULL: not wanted */
    struct fa_strides q_stride, k_stride, v_stride, out_stride;
    int batch, heads; /* heads that blocks go over: heads_q, or heads_kv where PACK_GQA */
    int heads_per_kv; /* heads_q / heads_kv */
    int seqlen_q, seqlen_k;
    int m_blocks;     /* ceil(rows / TILE_M), rows as row_count() in mask.cuh counts them */
    int group_heads;  /* (batch, head) pairs that run together, see query_place in forward.cuh */
    int window_left;  /* keys a query sees before its diagonal; read only where MASK_LEFT */
    int window_right; /* and after it; read only where MASK_RIGHT, 0 for causal */
    unsigned heads_per_kv_inverse; /* ceil(2^32 / heads_per_kv); read only where PACK_GQA */
    float scale_log2;   /* softmax_scale * log2(e), softcap * log2(e) where SOFTCAP; not 0 */
    float hidden_score; /* of a key that a query does not see: scaled, it is -inf */
    float scale_in_cap; /* softmax_scale / softcap; read only where SOFTCAP */
};

FA_STATIC_ASSERT(sizeof(struct fa_forward_params) == 192, "host and device disagree on the layout");

/* A tensor as the TMA reads it, in the driver's own encoding. */
struct fa_tensor_map {
    FA_ALIGNED(64) unsigned char encoding[128];
};

/* The single argument of kernels/forward_tma.cu, which reads K and V through the maps. */
struct fa_forward_tma_params {
    struct fa_forward_params forward;
    struct fa_tensor_map k_map, v_map; /* [batch, heads_kv, seqlen_k, head_dim or head_dim_v] */
};

FA_STATIC_ASSERT(sizeof(struct fa_forward_tma_params) == 448, "192, then maps");

#endif
