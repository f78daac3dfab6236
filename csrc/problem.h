/* One attention call, validated: everything that planning, cpu/ and launch.c need to know of it. */
#ifndef FA_PROBLEM_H
#define FA_PROBLEM_H

#include "block_lists.h"
#include "mods.h"
#include "options.h"
#include "shape.h"
#include "tensor.h"

/* What a call appends to its caches, k and v of the problem, before it reads them: see append.h. */
struct fa_append {
    struct fa_tensor k;        /* [batch, rows, heads_kv, head_dim]; object NULL: nothing */
    struct fa_tensor v;        /* [batch, rows, heads_kv, head_dim_v] */
    struct fa_tensor cos, sin; /* [positions, rotary_dim / 2]; object NULL: nothing is rotated */
    int cache_seqlen;          /* rows that all caches hold; FA_NO_BOUND: seqused_k tells */
};

struct fa_problem {
    struct fa_shape shape;
    struct fa_options options;
    /* Where a side is packed [total, ...] takes the place of [batch, seqlen, ...], here and below,
     * and the lse is [heads_q, total]; of a page table k and v are [pages, page_size, ...]. */
    struct fa_tensor q;            /* [batch, seqlen_q, heads_q, head_dim] */
    struct fa_tensor k;            /* [batch, seqlen_k, heads_kv, head_dim] */
    struct fa_tensor v;            /* [batch, seqlen_k, heads_kv, head_dim_v] */
    struct fa_tensor sink;         /* [heads_q]; object NULL where there is none */
    struct fa_tensor dropout_seed; /* [2] int64: seed, offset; object NULL where none is needed */
    struct fa_tensor out;          /* [batch, seqlen_q, heads_q, head_dim_v] */
    struct fa_tensor lse; /* [batch, heads_q, seqlen_q] fp32; object NULL where not wanted */
    /* fp32 [heads_q] or [batch, heads_q]; object NULL where there are none */
    struct fa_tensor alibi_slopes;
    /* [batch or 1, heads_q or 1, seqlen_q or 1, seqlen_k], fp32 or like q; object NULL: none */
    struct fa_tensor bias;
    /* fp32 [batch, heads_kv], or of fewer dimensions one number: what e4m3 is multiplied by; object
     * NULL: 1 */
    struct fa_tensor k_descale, v_descale, q_descale;
    /* int32, rows contiguous; object NULL where there are none */
    struct fa_tensor cu_seqlens_q, cu_seqlens_k; /* [batch + 1]: where sequences begin and end */
    struct fa_tensor seqused_q, seqused_k;       /* [batch]: how many of their rows are used */
    struct fa_tensor page_table; /* [batch, pages of a sequence]: where its keys are in k and v */
    struct fa_tensor leftpad_k;  /* [batch]: used rows of k that come before its first key */
    /* Blocks of keys that queries see, and of queries that see keys: of the forward, and of the
     * backward. */
    struct fa_block_lists_read key_blocks, query_blocks;
    struct fa_mod score_mod, mask_mod;
    bool is_cache; /* k and v are caches, and called so */
    struct fa_append append;
};

static inline int fa_rotary_dim(const struct fa_append *append)
{
    return append->cos.object ? 2 * (int)append->cos.shape[1] : 0;
}

/* Whether a query that is rotated stands one position behind the one before it. Those that see all
 * keys stand where the first one does, as in FlashAttention-2. */
static inline bool fa_queries_advance(const struct fa_shape *shape)
{
    return shape->window_left != FA_UNBOUNDED || shape->window_right != FA_UNBOUNDED;
}

/* Thread blocks that append the rows of K, or of V, of a sequence: one at least, for its length. */
static inline int fa_append_blocks(const struct fa_append *append)
{
    return append->k.shape[1] > 0 ? (int)append->k.shape[1] : 1;
}

/* The strides of a bias or its gradient: 0 where scores of a dimension share it. */
static inline struct fa_strides fa_bias_strides(const struct fa_tensor *bias)
{
    const int64_t *shape = bias->shape, *stride = bias->stride;
    return (struct fa_strides){.batch = shape[0] == 1 ? 0 : stride[0],
                               .head = shape[1] == 1 ? 0 : stride[1],
                               .seqlen = shape[2] == 1 ? 0 : stride[2]};
}

/* Whether keys 2i and 2i + 1 of any row of a bias are an aligned pair. */
bool fa_bias_has_pairs(const struct fa_tensor *bias);

/* Whether several scores share an element of the bias: its gradient is a sum then. */
bool fa_bias_is_shared(const struct fa_problem *problem);

/* What the backward has beside the problem, whose out and lse it is given. */
struct fa_gradients {
    struct fa_tensor dout;       /* [batch, seqlen_q, heads_q, head_dim_v] */
    struct fa_tensor dlse;       /* [batch, heads_q, seqlen_q] fp32; object NULL: no gradient flows
                                  * through the lse */
    struct fa_tensor dq, dk, dv; /* like q, k, v; allocated */
    struct fa_tensor dsink;      /* [heads_q] fp32; object NULL where there is no sink */
    struct fa_tensor dbias;      /* like the bias, fp32, contiguous; object NULL: not wanted */
};

/* Tensors that kernels could not read in place are copied; or, for a plan, only taken to lie as
 * their copies would. Pages are read in place or refused. */
enum fa_read { FA_READ_DATA, FA_READ_LAYOUT };

/* Reads and checks q, k, v and the options' tensors into a zeroed problem that holds its options;
 * out and lse are not there yet. 0, or -1 with TypeError or ValueError set; fa_problem_release in
 * both cases. */
int fa_problem_read(struct fa_dlpack *dlpack, PyObject *const qkv[3], enum fa_read read,
                    struct fa_problem *problem);

/* out, and lse where it is wanted: those of the options, which are written in place or refused,
 * else new ones. 0 or -1. */
int fa_problem_set_results(struct fa_dlpack *dlpack, struct fa_problem *problem);

/* Reads a tensor of the dtype and device of q; `meanings`: what its sizes are, for messages. Of
 * sizes FA_ANY_SIZE is any. 0 or -1. */
#define FA_ANY_SIZE (-1)
int fa_problem_read_like_q(struct fa_dlpack *dlpack, const struct fa_problem *problem,
                           PyObject *object, const char *name, int ndim, const int64_t *sizes,
                           const char *const *meanings, struct fa_tensor *tensor);

/* Whether a tensor that the caller gave can be written in place: it is never written to a copy.
 * `flaw`: what is wrong with its layout; NULL: nothing. 0, or -1 with ValueError set. */
int fa_problem_check_written(const struct fa_problem *problem, const struct fa_tensor *tensor,
                             const char *name, const char *flaw);

/* The last look at all tensors of a call, after which nothing runs Python in this thread before
 * they are used. Until then much does: readers of options, producers of capsules, copies, the
 * allocation of results and workspace, warnings of the plan, the compiler, the stream of a
 * framework, the number of threads, and finalizers in any of these. `gradients` and `workspace` may
 * be NULL. 0, or -1 with ValueError set. */
int fa_problem_recheck(const struct fa_problem *problem, const struct fa_gradients *gradients,
                       const struct fa_tensor *workspace);

void fa_problem_release(struct fa_problem *problem);

/* Whether the problem has a backward. 0, or -1 with NotImplementedError set. */
int fa_problem_check_differentiable(const struct fa_problem *problem);

/* Reads and checks out and lse of the forward, and their gradients, into a problem that was read
 * and into zeroed gradients. What was read has contiguous rows; the lse and its gradient are
 * contiguous in all dimensions. 0, or -1 with the exception set; fa_gradients_release in both
 * cases. */
int fa_gradients_read(struct fa_dlpack *dlpack, PyObject *dout, PyObject *out, PyObject *lse,
                      PyObject *dlse, struct fa_problem *problem, struct fa_gradients *gradients);

/* Allocates dq, dk, dv, dsink where there is a sink, and dbias where it is wanted. Of a problem
 * without queries or without keys they are final: nothing is left to compute. 0 or -1. */
int fa_gradients_allocate(struct fa_dlpack *dlpack, const struct fa_problem *problem,
                          struct fa_gradients *gradients);

void fa_gradients_release(struct fa_gradients *gradients);

#endif
