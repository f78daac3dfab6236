/* One attention call, validated: everything that plan.c, cpu/ and launch.c need to know of it. */
#ifndef FA_PROBLEM_H
#define FA_PROBLEM_H

#include <stdbool.h>
#include <stdint.h>

#include "tensor.h"

#define FA_UNBOUNDED INT32_MAX /* a window side without an end */

/* Batch, lengths and heads, and packed rows: so that kernels can add a few of them, and a window,
 * in 32 bits. */
#define FA_MAX_SIZE (INT32_MAX / 8)

/* Whether the query heads of one KV head share the rows of a block: up to the plan, yes, no. */
enum fa_pack_gqa { FA_PACK_AUTO, FA_PACK_ALWAYS, FA_PACK_NEVER };

/* What the call computes, apart from where its data lies: all that a plan depends on. */
struct fa_shape {
    enum fa_dtype dtype;
    int batch, seqlen_q, seqlen_k;
    int heads_q, heads_kv;
    int head_dim, head_dim_v;
    /* Query i sees the keys i + seqlen_k - seqlen_q + [-window_left, window_right]. */
    int window_left, window_right;
    float softmax_scale;
    float softcap;             /* 0: none */
    int num_splits;            /* parts of the keys: 0: as the plan chooses; else at most so many */
    enum fa_pack_gqa pack_gqa; /* as the caller asked */
    bool tma_strides;          /* tensor maps can describe where K and V lie */
};

struct fa_problem {
    struct fa_shape shape;
    struct fa_tensor q;    /* [batch, seqlen_q, heads_q, head_dim] */
    struct fa_tensor k;    /* [batch, seqlen_k, heads_kv, head_dim] */
    struct fa_tensor v;    /* [batch, seqlen_k, heads_kv, head_dim_v] */
    struct fa_tensor sink; /* [heads_q]; object NULL where there is none */
    struct fa_tensor out;  /* [batch, seqlen_q, heads_q, head_dim_v] */
    struct fa_tensor lse;  /* [batch, heads_q, seqlen_q] fp32; object NULL where not wanted */
};

/* What the backward has beside the problem, whose out and lse it is given. */
struct fa_gradients {
    bool deterministic;
    struct fa_tensor dout;       /* [batch, seqlen_q, heads_q, head_dim_v] */
    struct fa_tensor dlse;       /* [batch, heads_q, seqlen_q] fp32; object NULL: no gradient flows
                                  * into the lse */
    struct fa_tensor dq, dk, dv; /* like q, k, v; allocated */
    struct fa_tensor dsink;      /* [heads_q] fp32; object NULL where there is no sink */
};

/* The arguments of flash_attn_func as Python gave them; the last two NULL: as the plan chooses. */
struct fa_arguments {
    PyObject *q, *k, *v, *softmax_scale, *causal, *window_size, *softcap, *sink, *num_splits,
        *pack_gqa;
};

/* And those that the backward has besides. */
struct fa_gradient_arguments {
    PyObject *dout, *out, *lse, *dlse, *deterministic;
};

/* Reads and checks all arguments into a zeroed problem; out and lse are not allocated yet. 0, or -1
 * with the exception of the design set; fa_problem_release in both cases. */
int fa_problem_read(struct fa_state *state, const struct fa_arguments *arguments,
                    struct fa_problem *problem);

/* Allocates out, and lse where it is wanted. 0 or -1. */
int fa_problem_allocate(struct fa_state *state, bool return_lse, struct fa_problem *problem);

void fa_problem_release(struct fa_problem *problem);

/* Reads and checks out and lse of the forward, and their gradients, into a problem that was read
 * and into zeroed gradients. What was read has contiguous rows, the lse and its gradient are
 * contiguous in all dimensions. 0, or -1 with the exception set; fa_gradients_release in both
 * cases. */
int fa_gradients_read(struct fa_state *state, const struct fa_gradient_arguments *arguments,
                      struct fa_problem *problem, struct fa_gradients *gradients);

/* Allocates dq, dk, dv, and dsink where there is a sink. Of a problem without queries or without
 * keys they are final: nothing is left to compute. 0 or -1. */
int fa_gradients_allocate(struct fa_state *state, const struct fa_problem *problem,
                          struct fa_gradients *gradients);

void fa_gradients_release(struct fa_gradients *gradients);

/* Query heads that share a KV head, of a shape that is not empty. */
static inline int fa_heads_per_kv(const struct fa_shape *shape)
{
    return shape->heads_q / shape->heads_kv;
}

/* Whether no query meets any key, because there are none. */
bool fa_shape_is_empty(const struct fa_shape *shape);

#endif
