/* Arguments -> struct fa_problem: all validation, all messages. What leaves here is safe to launch.
 */
#include "problem.h"

#include <math.h>
#include <string.h>

#include "error.h"
#include "overlap.h"

/* ---- tensors --------------------------------------------------------------------------------- */

static int check_device(const struct fa_tensor *q, const struct fa_tensor *tensor, const char *name)
{
    if (tensor->device_type == q->device_type && tensor->device_id == q->device_id)
        return 0;
    char expected[FA_DEVICE_NAME_SIZE], got[FA_DEVICE_NAME_SIZE];
    fa_device_name(q, expected);
    fa_device_name(tensor, got);
    return fa_raise(PyExc_ValueError, "%s must be on q's device, %s, got %s", name, expected, got);
}

static int check_dtype(const struct fa_tensor *q, const struct fa_tensor *tensor, const char *name)
{
    if (tensor->dtype == q->dtype)
        return 0;
    return fa_raise(PyExc_TypeError, "%s must be %s like q, got %s", name, fa_dtype_name(q->dtype),
                    fa_dtype_name(tensor->dtype));
}

static int check_size(const struct fa_tensor *tensor, const char *name, int dimension,
                      const char *meaning, int64_t expected)
{
    if (tensor->shape[dimension] == expected)
        return 0;
    return fa_raise(PyExc_ValueError, "%s must have %s %lld in dimension %d, got %lld", name,
                    meaning, (long long)expected, dimension, (long long)tensor->shape[dimension]);
}

static int check_head_dim(const char *what, int64_t head_dim)
{
    if (head_dim >= 8 && head_dim <= FA_MAX_HEAD_DIM && head_dim % 8 == 0)
        return 0;
    return fa_raise(PyExc_ValueError, "%s must be a multiple of 8 from 8 to %d, got %lld", what,
                    FA_MAX_HEAD_DIM, (long long)head_dim);
}

static int check_heads(int64_t heads_q, int64_t heads_kv)
{
    if (heads_q > 0 && heads_kv > 0 && heads_q % heads_kv == 0)
        return 0;
    return fa_raise(PyExc_ValueError,
                    "the heads of q must be a multiple of the heads of k and v, got %lld and %lld",
                    (long long)heads_q, (long long)heads_kv);
}

/* Batch, lengths and heads count in 32 bits; so does every index that a kernel computes from them.
 */
static int check_counts(const struct fa_tensor *tensor, const char *name)
{
    for (int i = 0; i < tensor->ndim; i++)
        if (tensor->shape[i] > FA_MAX_SIZE)
            return fa_raise(PyExc_ValueError,
                            "%s has size %lld in dimension %d, at most %d is supported", name,
                            (long long)tensor->shape[i], i, FA_MAX_SIZE);
    return 0;
}

static int check_shapes(const struct fa_tensor *q, const struct fa_tensor *k,
                        const struct fa_tensor *v)
{
    if (check_dtype(q, k, "k") < 0 || check_device(q, k, "k") < 0 || check_dtype(q, v, "v") < 0 ||
        check_device(q, v, "v") < 0)
        return -1;
    if (check_counts(q, "q") < 0 || check_counts(k, "k") < 0 || check_counts(v, "v") < 0)
        return -1;
    if (check_head_dim("head_dim (of q and k)", q->shape[3]) < 0 ||
        check_size(k, "k", 3, "q's head_dim", q->shape[3]) < 0 ||
        check_head_dim("head_dim_v (of v)", v->shape[3]) < 0)
        return -1;
    if (check_size(k, "k", 0, "q's batch", q->shape[0]) < 0 ||
        check_size(v, "v", 0, "q's batch", q->shape[0]) < 0 ||
        check_size(v, "v", 1, "k's seqlen", k->shape[1]) < 0 ||
        check_size(v, "v", 2, "k's heads", k->shape[2]) < 0)
        return -1;
    return check_heads(q->shape[2], k->shape[2]);
}

static void set_shape(struct fa_problem *problem)
{
    struct fa_shape *shape = &problem->shape;
    const struct fa_options *options = &problem->options;
    shape->dtype = problem->q.dtype;
    shape->batch = (int)problem->q.shape[0];
    shape->seqlen_q = (int)problem->q.shape[1];
    shape->heads_q = (int)problem->q.shape[2];
    shape->head_dim = (int)problem->q.shape[3];
    shape->seqlen_k = (int)problem->k.shape[1];
    shape->heads_kv = (int)problem->k.shape[2];
    shape->head_dim_v = (int)problem->v.shape[3];
    shape->window_left = options->window_size.left;
    shape->window_right = options->window_size.right;
    shape->softmax_scale = isnan(options->softmax_scale) ? 1.0f / sqrtf((float)shape->head_dim)
                                                         : options->softmax_scale;
    shape->softcap = options->softcap;
}

static int read_sink(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    struct fa_tensor *sink = &problem->sink;
    if (!problem->options.learnable_sink)
        return 0;
    if (fa_tensor_read(dlpack, problem->options.learnable_sink, "learnable_sink", 1, sink) < 0 ||
        check_size(sink, "learnable_sink", 0, "q's heads", problem->shape.heads_q) < 0)
        return -1;
    return check_device(&problem->q, sink, "learnable_sink");
}

/* A tensor of the forward's output or its gradient: [batch, seqlen_q, heads_q, head_dim_v]. */
static int read_like_out(struct fa_dlpack *dlpack, PyObject *object, const char *name,
                         const struct fa_problem *problem, struct fa_tensor *tensor)
{
    const struct fa_shape *shape = &problem->shape;
    if (fa_tensor_read(dlpack, object, name, 4, tensor) < 0 ||
        check_dtype(&problem->q, tensor, name) < 0 || check_device(&problem->q, tensor, name) < 0 ||
        check_size(tensor, name, 0, "q's batch", shape->batch) < 0 ||
        check_size(tensor, name, 1, "q's seqlen", shape->seqlen_q) < 0 ||
        check_size(tensor, name, 2, "q's heads", shape->heads_q) < 0)
        return -1;
    return check_size(tensor, name, 3, "v's head_dim", shape->head_dim_v);
}

/* The log-sum-exp or its gradient: [batch, heads_q, seqlen_q] fp32. */
static int read_like_lse(struct fa_dlpack *dlpack, PyObject *object, const char *name,
                         const struct fa_problem *problem, struct fa_tensor *tensor)
{
    const struct fa_shape *shape = &problem->shape;
    if (fa_tensor_read(dlpack, object, name, 3, tensor) < 0)
        return -1;
    if (tensor->dtype != FA_FLOAT32)
        return fa_raise(PyExc_TypeError, "%s must be float32, got %s", name,
                        fa_dtype_name(tensor->dtype));
    if (check_device(&problem->q, tensor, name) < 0 ||
        check_size(tensor, name, 0, "q's batch", shape->batch) < 0 ||
        check_size(tensor, name, 1, "q's heads", shape->heads_q) < 0)
        return -1;
    return check_size(tensor, name, 2, "q's seqlen", shape->seqlen_q);
}

/* ---- results: written in place, whoever allocated them --------------------------------------- */

struct named_tensor {
    const struct fa_tensor *tensor;
    const char *name;
};

/* All tensors of a call, some of which may not be there (yet). */
#define MAX_TENSORS 12
static int tensors_of(const struct fa_problem *problem, const struct fa_gradients *gradients,
                      struct named_tensor tensors[MAX_TENSORS])
{
    const struct named_tensor forward[] = {
        {&problem->q, "q"},     {&problem->k, "k"},
        {&problem->v, "v"},     {&problem->sink, "learnable_sink"},
        {&problem->out, "out"}, {&problem->lse, "lse"},
    };
    memcpy(tensors, forward, sizeof forward);
    if (!gradients)
        return 6;
    const struct named_tensor backward[] = {
        {&gradients->dout, "dout"}, {&gradients->dlse, "dlse"}, {&gradients->dq, "dq"},
        {&gradients->dk, "dk"},     {&gradients->dv, "dv"},     {&gradients->dsink, "dsink"},
    };
    memcpy(tensors + 6, backward, sizeof backward);
    return MAX_TENSORS;
}

/* Whether the tensors of the call that are there leave a result to itself. 0 or -1. */
static int check_apart(const struct fa_problem *problem, const struct fa_gradients *gradients,
                       const struct fa_tensor *result, const char *name)
{
    struct named_tensor tensors[MAX_TENSORS];
    const int count = tensors_of(problem, gradients, tensors);
    for (int i = 0; i < count; i++)
        if (tensors[i].tensor != result && tensors[i].tensor->object &&
            fa_tensors_overlap(result, tensors[i].tensor))
            /* memory that was freed meanwhile may be the result's now */
            return fa_tensor_recheck(tensors[i].tensor, tensors[i].name) < 0
                       ? -1
                       : fa_raise(PyExc_ValueError, "%s overlaps %s", name, tensors[i].name);
    return 0;
}

/* Whether a result that the caller gave can be written in place: it is never written to a copy.
 * `flaw`: what is wrong with its layout; NULL: nothing. 0 or -1. */
static int check_given(const struct fa_problem *problem, const struct fa_tensor *result,
                       const char *name, const char *flaw)
{
    if (result->is_read_only)
        flaw = "is read-only";
    else if (!flaw && fa_tensor_overlaps_itself(result))
        flaw = "has elements that share memory";
    if (flaw)
        return fa_raise(PyExc_ValueError, "%s %s", name, flaw);
    return check_apart(problem, NULL, result, name);
}

static int set_out(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    const struct fa_shape *shape = &problem->shape;
    const int64_t sizes[] = {shape->batch, shape->seqlen_q, shape->heads_q, shape->head_dim_v};
    struct fa_tensor *out = &problem->out;
    if (problem->options.out)
        return read_like_out(dlpack, problem->options.out, "out", problem, out) < 0
                   ? -1
                   : check_given(problem, out, "out",
                                 fa_tensor_is_readable(out)
                                     ? NULL
                                     : "must have contiguous rows at multiples of 16 bytes");
    if (fa_tensor_empty(dlpack, &problem->q, "out", shape->dtype, 4, sizes, out) < 0)
        return -1;
    return check_apart(problem, NULL, out, "out");
}

static int set_lse(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    const struct fa_shape *shape = &problem->shape;
    const int64_t sizes[] = {shape->batch, shape->heads_q, shape->seqlen_q};
    struct fa_tensor *lse = &problem->lse;
    if (problem->options.lse)
        return read_like_lse(dlpack, problem->options.lse, "lse", problem, lse) < 0
                   ? -1
                   : check_given(problem, lse, "lse",
                                 fa_tensor_is_contiguous(lse) ? NULL : "must be contiguous");
    if (!problem->options.return_lse)
        return 0;
    if (fa_tensor_empty(dlpack, &problem->q, "lse", FA_FLOAT32, 3, sizes, lse) < 0)
        return -1;
    return check_apart(problem, NULL, lse, "lse");
}

/* ---- the interface --------------------------------------------------------------------------- */

int fa_problem_read(struct fa_dlpack *dlpack, PyObject *const qkv[3], enum fa_read read,
                    struct fa_problem *problem)
{
    static const char *const names[] = {"q", "k", "v", "learnable_sink"};
    struct fa_tensor *const tensors[] = {&problem->q, &problem->k, &problem->v, &problem->sink};
    for (int i = 0; i < 3; i++)
        if (fa_tensor_read(dlpack, qkv[i], names[i], 4, tensors[i]) < 0)
            return -1;
    if (check_shapes(&problem->q, &problem->k, &problem->v) < 0)
        return -1;
    set_shape(problem);
    if (read_sink(dlpack, problem) < 0)
        return -1;
    for (int i = 0; i < 4; i++) {
        if (!tensors[i]->object)
            continue;
        if (read == FA_READ_LAYOUT)
            fa_tensor_assume_readable(tensors[i]);
        else if (fa_tensor_ensure_readable(dlpack, names[i], tensors[i]) < 0)
            return -1;
    }
    return 0;
}

int fa_problem_set_results(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    return set_out(dlpack, problem) < 0 ? -1 : set_lse(dlpack, problem);
}

static void release(struct fa_tensor *const *tensors, int count)
{
    for (int i = 0; i < count; i++)
        fa_tensor_release(tensors[i]);
}

void fa_problem_release(struct fa_problem *problem)
{
    release((struct fa_tensor *const[]){&problem->q, &problem->k, &problem->v, &problem->sink,
                                        &problem->out, &problem->lse},
            6);
}

int fa_gradients_read(struct fa_dlpack *dlpack, PyObject *dout, PyObject *out, PyObject *lse,
                      PyObject *dlse, struct fa_problem *problem, struct fa_gradients *gradients)
{
    if (read_like_out(dlpack, dout, "dout", problem, &gradients->dout) < 0 ||
        read_like_out(dlpack, out, "out", problem, &problem->out) < 0 ||
        read_like_lse(dlpack, lse, "lse", problem, &problem->lse) < 0)
        return -1;
    if (dlse != Py_None && read_like_lse(dlpack, dlse, "dlse", problem, &gradients->dlse) < 0)
        return -1;
    if (fa_tensor_ensure_readable(dlpack, "dout", &gradients->dout) < 0 ||
        fa_tensor_ensure_readable(dlpack, "out", &problem->out) < 0 ||
        fa_tensor_ensure_contiguous(dlpack, "lse", &problem->lse) < 0)
        return -1;
    return dlse == Py_None ? 0 : fa_tensor_ensure_contiguous(dlpack, "dlse", &gradients->dlse);
}

/* Of a problem that is empty it is 0. 0 or -1. */
static int allocate_gradient(struct fa_dlpack *dlpack, const struct fa_problem *problem,
                             const struct fa_gradients *gradients, const struct fa_tensor *like,
                             const char *name, enum fa_dtype dtype, int ndim, const int64_t *shape,
                             struct fa_tensor *gradient)
{
    const int status = fa_shape_is_empty(&problem->shape)
                           ? fa_tensor_zeros(dlpack, like, name, dtype, ndim, shape, gradient)
                           : fa_tensor_empty(dlpack, like, name, dtype, ndim, shape, gradient);
    return status < 0 ? -1 : check_apart(problem, gradients, gradient, name);
}

int fa_gradients_allocate(struct fa_dlpack *dlpack, const struct fa_problem *problem,
                          struct fa_gradients *gradients)
{
    const struct fa_tensor *const inputs[] = {&problem->q, &problem->k, &problem->v};
    struct fa_tensor *const outputs[] = {&gradients->dq, &gradients->dk, &gradients->dv};
    static const char *const names[] = {"dq", "dk", "dv"};
    for (int i = 0; i < 3; i++)
        if (allocate_gradient(dlpack, problem, gradients, inputs[i], names[i], inputs[i]->dtype, 4,
                              inputs[i]->shape, outputs[i]) < 0)
            return -1;
    if (!problem->sink.object)
        return 0;
    /* Where no query meets a key the sink alone makes the lse, and what flows into that flows on
     * into the sink. */
    if (fa_shape_is_empty(&problem->shape) && gradients->dlse.object)
        return fa_tensor_sum_heads(dlpack, &gradients->dlse, "dsink", &gradients->dsink);
    const int64_t heads = problem->shape.heads_q;
    return allocate_gradient(dlpack, problem, gradients, &problem->q, "dsink", FA_FLOAT32, 1,
                             &heads, &gradients->dsink);
}

int fa_problem_recheck(const struct fa_problem *problem, const struct fa_gradients *gradients,
                       const struct fa_tensor *workspace)
{
    static const char NAME[] = "the workspace";
    struct named_tensor tensors[MAX_TENSORS];
    const int count = tensors_of(problem, gradients, tensors);
    if (workspace && workspace->object &&
        (fa_tensor_recheck(workspace, NAME) < 0 ||
         check_apart(problem, gradients, workspace, NAME) < 0))
        return -1;
    for (int i = 0; i < count; i++)
        if (tensors[i].tensor->object && fa_tensor_recheck(tensors[i].tensor, tensors[i].name) < 0)
            return -1;
    return 0;
}

void fa_gradients_release(struct fa_gradients *gradients)
{
    release((struct fa_tensor *const[]){&gradients->dout, &gradients->dlse, &gradients->dq,
                                        &gradients->dk, &gradients->dv, &gradients->dsink},
            6);
}
