/* Arguments -> struct fa_problem: all validation, all messages. What leaves here is safe to launch.
 */
#include "problem.h"

#include <math.h>
#include <string.h>

#include "state.h"

#define FA_MAX_HEAD_DIM 256

/* ---- scalars --------------------------------------------------------------------------------- */

/* A finite float. 0 or -1. */
static int read_float(PyObject *object, const char *name, float *out)
{
    double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "%s must be a number, got %R", name, object);
        return -1;
    }
    *out = (float)value;
    if (!isfinite(*out)) {
        PyErr_Format(PyExc_ValueError, "%s must be finite, got %R", name, object);
        return -1;
    }
    return 0;
}

/* One side of the window: None is unbounded, negative values are legal. What is beyond any sequence
 * counts as unbounded, or as the largest negative bound. */
static int read_window_side(PyObject *object, int *out)
{
    if (object == Py_None) {
        *out = FA_UNBOUNDED;
        return 0;
    }
    if (!PyLong_Check(object)) {
        PyErr_Format(PyExc_TypeError, "window_size must hold integers or None, got %R", object);
        return -1;
    }
    int overflow;
    long value = PyLong_AsLongAndOverflow(object, &overflow);
    if (overflow > 0 || value > 2 * FA_MAX_SIZE)
        value = FA_UNBOUNDED;
    else if (overflow < 0 || value < -2 * FA_MAX_SIZE)
        value = -2 * FA_MAX_SIZE;
    *out = (int)value;
    return 0;
}

static int read_window(PyObject *window_size, PyObject *causal, struct fa_shape *shape)
{
    if (!PyTuple_Check(window_size) || PyTuple_Size(window_size) != 2) {
        PyErr_Format(PyExc_TypeError, "window_size must be a tuple (left, right), got %R",
                     window_size);
        return -1;
    }
    int is_causal = PyObject_IsTrue(causal);
    if (is_causal < 0 ||
        read_window_side(PyTuple_GetItem(window_size, 0), &shape->window_left) < 0 ||
        read_window_side(PyTuple_GetItem(window_size, 1), &shape->window_right) < 0)
        return -1;
    if (is_causal)
        shape->window_right = 0;
    return 0;
}

/* What is beyond any number of keys counts as so many. */
static int read_num_splits(PyObject *object, int *out)
{
    if (!PyLong_Check(object)) {
        PyErr_Format(PyExc_TypeError, "num_splits must be an integer, got %R", object);
        return -1;
    }
    int overflow;
    const long value = PyLong_AsLongAndOverflow(object, &overflow);
    if (overflow < 0 || (overflow == 0 && value < 0)) {
        PyErr_Format(
            PyExc_ValueError,
            "num_splits must be 0 (as the plan chooses), 1 (never split) or larger, got %R",
            object);
        return -1;
    }
    *out = overflow || value > FA_MAX_SIZE ? FA_MAX_SIZE : (int)value;
    return 0;
}

static int read_pack_gqa(PyObject *object, enum fa_pack_gqa *out)
{
    if (object != Py_None && !PyBool_Check(object)) {
        PyErr_Format(PyExc_TypeError, "pack_gqa must be True, False or None, got %R", object);
        return -1;
    }
    *out = object == Py_None ? FA_PACK_AUTO : object == Py_True ? FA_PACK_ALWAYS : FA_PACK_NEVER;
    return 0;
}

static int read_scalars(const struct fa_arguments *arguments, struct fa_shape *shape)
{
    if (arguments->softmax_scale == Py_None)
        shape->softmax_scale = 1.0f / sqrtf((float)shape->head_dim);
    else if (read_float(arguments->softmax_scale, "softmax_scale", &shape->softmax_scale) < 0)
        return -1;
    if (read_float(arguments->softcap, "softcap", &shape->softcap) < 0)
        return -1;
    if (shape->softcap < 0) {
        PyErr_Format(PyExc_ValueError, "softcap must be 0 (none) or positive, got %R",
                     arguments->softcap);
        return -1;
    }
    if ((arguments->num_splits && read_num_splits(arguments->num_splits, &shape->num_splits) < 0) ||
        (arguments->pack_gqa && read_pack_gqa(arguments->pack_gqa, &shape->pack_gqa) < 0))
        return -1;
    return read_window(arguments->window_size, arguments->causal, shape);
}

/* ---- tensors --------------------------------------------------------------------------------- */

static int check_device(const struct fa_tensor *q, const struct fa_tensor *tensor, const char *name)
{
    if (tensor->device_type == q->device_type && tensor->device_id == q->device_id)
        return 0;
    char expected[FA_DEVICE_NAME_SIZE], got[FA_DEVICE_NAME_SIZE];
    fa_device_name(q, expected);
    fa_device_name(tensor, got);
    PyErr_Format(PyExc_ValueError, "%s must be on q's device, %s, got %s", name, expected, got);
    return -1;
}

static int check_dtype(const struct fa_tensor *q, const struct fa_tensor *tensor, const char *name)
{
    if (tensor->dtype == q->dtype)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s must be %s like q, got %s", name, fa_dtype_name(q->dtype),
                 fa_dtype_name(tensor->dtype));
    return -1;
}

static int check_size(const struct fa_tensor *tensor, const char *name, int dimension,
                      const char *meaning, int64_t expected)
{
    if (tensor->shape[dimension] == expected)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s must have %s %lld in dimension %d, got %lld", name, meaning,
                 (long long)expected, dimension, (long long)tensor->shape[dimension]);
    return -1;
}

static int check_head_dim(const char *what, int64_t head_dim)
{
    if (head_dim >= 8 && head_dim <= FA_MAX_HEAD_DIM && head_dim % 8 == 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s must be a multiple of 8 from 8 to %d, got %lld", what,
                 FA_MAX_HEAD_DIM, (long long)head_dim);
    return -1;
}

static int check_heads(int64_t heads_q, int64_t heads_kv)
{
    if (heads_q > 0 && heads_kv > 0 && heads_q % heads_kv == 0)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "the heads of q must be a multiple of the heads of k and v, got %lld and %lld",
                 (long long)heads_q, (long long)heads_kv);
    return -1;
}

/* Batch, lengths and heads count in 32 bits; so does every index that a kernel computes from them.
 */
static int check_counts(const struct fa_tensor *tensor, const char *name)
{
    for (int i = 0; i < tensor->ndim; i++)
        if (tensor->shape[i] > FA_MAX_SIZE) {
            PyErr_Format(PyExc_ValueError,
                         "%s has size %lld in dimension %d, at most %d is supported", name,
                         (long long)tensor->shape[i], i, FA_MAX_SIZE);
            return -1;
        }
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
    shape->dtype = problem->q.dtype;
    shape->batch = (int)problem->q.shape[0];
    shape->seqlen_q = (int)problem->q.shape[1];
    shape->heads_q = (int)problem->q.shape[2];
    shape->head_dim = (int)problem->q.shape[3];
    shape->seqlen_k = (int)problem->k.shape[1];
    shape->heads_kv = (int)problem->k.shape[2];
    shape->head_dim_v = (int)problem->v.shape[3];
}

static int read_sink(struct fa_state *state, PyObject *object, struct fa_problem *problem)
{
    if (object == Py_None)
        return 0;
    struct fa_tensor *sink = &problem->sink;
    if (fa_tensor_read(state, object, "learnable_sink", 1, sink) < 0 ||
        check_size(sink, "learnable_sink", 0, "q's heads", problem->shape.heads_q) < 0 ||
        check_device(&problem->q, sink, "learnable_sink") < 0)
        return -1;
    return fa_tensor_ensure_readable(state, "learnable_sink", sink);
}

/* A tensor of the forward's output or its gradient: [batch, seqlen_q, heads_q, head_dim_v]. */
static int read_like_out(struct fa_state *state, PyObject *object, const char *name,
                         const struct fa_problem *problem, struct fa_tensor *tensor)
{
    const struct fa_shape *shape = &problem->shape;
    if (fa_tensor_read(state, object, name, 4, tensor) < 0 ||
        check_dtype(&problem->q, tensor, name) < 0 || check_device(&problem->q, tensor, name) < 0 ||
        check_size(tensor, name, 0, "q's batch", shape->batch) < 0 ||
        check_size(tensor, name, 1, "q's seqlen", shape->seqlen_q) < 0 ||
        check_size(tensor, name, 2, "q's heads", shape->heads_q) < 0 ||
        check_size(tensor, name, 3, "v's head_dim", shape->head_dim_v) < 0)
        return -1;
    return fa_tensor_ensure_readable(state, name, tensor);
}

/* The log-sum-exp or its gradient: [batch, heads_q, seqlen_q] fp32. */
static int read_like_lse(struct fa_state *state, PyObject *object, const char *name,
                         const struct fa_problem *problem, struct fa_tensor *tensor)
{
    const struct fa_shape *shape = &problem->shape;
    if (fa_tensor_read(state, object, name, 3, tensor) < 0)
        return -1;
    if (tensor->dtype != FA_FLOAT32) {
        PyErr_Format(PyExc_TypeError, "%s must be float32, got %s", name,
                     fa_dtype_name(tensor->dtype));
        return -1;
    }
    if (check_device(&problem->q, tensor, name) < 0 ||
        check_size(tensor, name, 0, "q's batch", shape->batch) < 0 ||
        check_size(tensor, name, 1, "q's heads", shape->heads_q) < 0 ||
        check_size(tensor, name, 2, "q's seqlen", shape->seqlen_q) < 0)
        return -1;
    return fa_tensor_ensure_contiguous(state, name, tensor);
}

/* dsink where no query meets a key: the sink alone makes the lse, and whatever flows into that
 * flows on into the sink. 0 or -1. */
static int sink_gradient_without_keys(struct fa_state *state, const struct fa_tensor *dlse,
                                      struct fa_tensor *dsink)
{
    PyObject *producers = fa_state_import(&state->python_producers, "flash_attn_sm120.producers");
    PyObject *sums =
        producers ? PyObject_CallMethod(producers, "sums_of_heads", "(O)", dlse->object) : NULL;
    int status = sums ? fa_tensor_read(state, sums, "dsink", 1, dsink) : -1;
    Py_XDECREF(sums);
    return status;
}

/* ---- the interface --------------------------------------------------------------------------- */

int fa_problem_read(struct fa_state *state, const struct fa_arguments *arguments,
                    struct fa_problem *problem)
{
    struct fa_tensor *q = &problem->q, *k = &problem->k, *v = &problem->v;
    if (fa_tensor_read(state, arguments->q, "q", 4, q) < 0 ||
        fa_tensor_read(state, arguments->k, "k", 4, k) < 0 ||
        fa_tensor_read(state, arguments->v, "v", 4, v) < 0 || check_shapes(q, k, v) < 0)
        return -1;
    set_shape(problem);
    if (read_scalars(arguments, &problem->shape) < 0 ||
        read_sink(state, arguments->sink, problem) < 0)
        return -1;
    if (fa_tensor_ensure_readable(state, "q", q) < 0 ||
        fa_tensor_ensure_readable(state, "k", k) < 0 ||
        fa_tensor_ensure_readable(state, "v", v) < 0)
        return -1;
    problem->shape.tma_strides = fa_tensor_has_tma_strides(k) && fa_tensor_has_tma_strides(v);
    return 0;
}

int fa_problem_allocate(struct fa_state *state, bool return_lse, struct fa_problem *problem)
{
    const struct fa_shape *shape = &problem->shape;
    const int64_t out_shape[] = {shape->batch, shape->seqlen_q, shape->heads_q, shape->head_dim_v};
    const int64_t lse_shape[] = {shape->batch, shape->heads_q, shape->seqlen_q};
    if (fa_tensor_empty(state, &problem->q, shape->dtype, 4, out_shape, &problem->out) < 0)
        return -1;
    return return_lse ? fa_tensor_empty(state, &problem->q, FA_FLOAT32, 3, lse_shape, &problem->lse)
                      : 0;
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

int fa_gradients_read(struct fa_state *state, const struct fa_gradient_arguments *arguments,
                      struct fa_problem *problem, struct fa_gradients *gradients)
{
    if (read_like_out(state, arguments->dout, "dout", problem, &gradients->dout) < 0 ||
        read_like_out(state, arguments->out, "out", problem, &problem->out) < 0 ||
        read_like_lse(state, arguments->lse, "lse", problem, &problem->lse) < 0)
        return -1;
    if (arguments->dlse != Py_None &&
        read_like_lse(state, arguments->dlse, "dlse", problem, &gradients->dlse) < 0)
        return -1;
    const int deterministic = PyObject_IsTrue(arguments->deterministic);
    gradients->deterministic = deterministic > 0;
    return deterministic < 0 ? -1 : 0;
}

bool fa_shape_is_empty(const struct fa_shape *shape)
{
    return shape->batch == 0 || shape->seqlen_q == 0 || shape->seqlen_k == 0;
}

/* Of an empty problem it is 0. */
static int allocate_gradient(struct fa_state *state, const struct fa_tensor *like,
                             enum fa_dtype dtype, int ndim, const int64_t *shape, bool empty,
                             struct fa_tensor *gradient)
{
    return empty ? fa_tensor_zeros(state, like, dtype, ndim, shape, gradient)
                 : fa_tensor_empty(state, like, dtype, ndim, shape, gradient);
}

int fa_gradients_allocate(struct fa_state *state, const struct fa_problem *problem,
                          struct fa_gradients *gradients)
{
    const struct fa_tensor *const inputs[] = {&problem->q, &problem->k, &problem->v};
    struct fa_tensor *const outputs[] = {&gradients->dq, &gradients->dk, &gradients->dv};
    const bool empty = fa_shape_is_empty(&problem->shape);
    for (int i = 0; i < 3; i++)
        if (allocate_gradient(state, inputs[i], inputs[i]->dtype, 4, inputs[i]->shape, empty,
                              outputs[i]) < 0)
            return -1;
    if (!problem->sink.object)
        return 0;
    if (empty && gradients->dlse.object)
        return sink_gradient_without_keys(state, &gradients->dlse, &gradients->dsink);
    const int64_t heads = problem->shape.heads_q;
    return allocate_gradient(state, &problem->q, FA_FLOAT32, 1, &heads, empty, &gradients->dsink);
}

void fa_gradients_release(struct fa_gradients *gradients)
{
    release((struct fa_tensor *const[]){&gradients->dout, &gradients->dlse, &gradients->dq,
                                        &gradients->dk, &gradients->dv, &gradients->dsink},
            6);
}
