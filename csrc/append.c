#include "append.h"

#include "arithmetic.h"
#include "error.h"

/* Rows that all caches hold, where the options tell a number. 0 or -1. */
static int read_cache_seqlen(const struct fa_problem *problem, int *cache_seqlen)
{
    PyObject *object = problem->options.cache_seqlens;
    int overflow;
    *cache_seqlen = FA_NO_BOUND;
    if (!object || problem->seqused_k.object)
        return 0;
    const long value = PyLong_AsLongAndOverflow(object, &overflow);
    if (overflow || value < 0 || value > problem->shape.seqlen_k)
        return fa_raise(PyExc_ValueError,
                        "cache_seqlens must be from 0 to the rows of the caches, %d, got %R",
                        problem->shape.seqlen_k, object);
    *cache_seqlen = (int)value;
    return 0;
}

/* ---- new rows -------------------------------------------------------------------------------- */

static int check_together(const struct fa_options *options)
{
    const char *flaw = !options->k != !options->v ? "k and v are appended together: got one of them"
                       : !options->rotary_cos != !options->rotary_sin
                           ? "rotary_cos and rotary_sin go together: got one of them"
                       : options->k && !options->cache_seqlens
                           ? "k and v need cache_seqlens: the rows that the caches hold"
                       : options->rotary_cos && !options->k
                           ? "rotary_cos and rotary_sin need k and v, the rows to append"
                           : NULL;
    return flaw ? fa_raise(PyExc_ValueError, "%s", flaw) : 0;
}

static int read_rows(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    static const char *const meanings[] = {"q's batch", "k's seqlen", "the caches' heads",
                                           "the caches' head_dim"};
    const struct fa_shape *shape = &problem->shape;
    struct fa_append *append = &problem->append;
    int64_t sizes[] = {shape->batch, FA_ANY_SIZE, shape->heads_kv, shape->head_dim};
    if (fa_problem_read_like_q(dlpack, problem, problem->options.k, "k", 4, sizes, meanings,
                               &append->k) < 0)
        return -1;
    const int64_t rows = append->k.shape[1];
    sizes[1] = rows;
    sizes[3] = shape->head_dim_v;
    if (fa_problem_read_like_q(dlpack, problem, problem->options.v, "v", 4, sizes, meanings,
                               &append->v) < 0)
        return -1;
    const int held = append->cache_seqlen == FA_NO_BOUND ? 0 : append->cache_seqlen;
    if (rows > shape->seqlen_k - held)
        return fa_raise(PyExc_ValueError,
                        "k has %lld rows to append, each cache has room for %d at most",
                        (long long)rows, shape->seqlen_k - held);
    return fa_tensor_ensure_readable(dlpack, "k", &append->k) < 0
               ? -1
               : fa_tensor_ensure_readable(dlpack, "v", &append->v);
}

/* ---- rotary ---------------------------------------------------------------------------------- */

static int read_table(struct fa_dlpack *dlpack, const struct fa_problem *problem, PyObject *object,
                      const char *name, const int64_t *sizes, struct fa_tensor *table)
{
    static const char *const meanings[] = {"rotary_cos' positions", "rotary_cos' columns"};
    if (fa_problem_read_like_q(dlpack, problem, object, name, 2, sizes, meanings, table) < 0)
        return -1;
    if (fa_tensor_has_contiguous_rows(table))
        return 0;
    return fa_raise(PyExc_ValueError,
                    "%s must be contiguous in its last dimension, got stride %lld", name,
                    (long long)table->stride[1]);
}

static int read_rotary(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    const struct fa_shape *shape = &problem->shape;
    const struct fa_options *options = &problem->options;
    struct fa_append *append = &problem->append;
    static const int64_t any[] = {FA_ANY_SIZE, FA_ANY_SIZE};
    if (read_table(dlpack, problem, options->rotary_cos, "rotary_cos", any, &append->cos) < 0)
        return -1;
    const int64_t *sizes = append->cos.shape;
    if (sizes[1] < 1 || sizes[1] > shape->head_dim / 2)
        return fa_raise(PyExc_ValueError,
                        "rotary_cos must have rotary_dim / 2 columns, from 1 to head_dim / 2 = %d, "
                        "got %lld",
                        shape->head_dim / 2, (long long)sizes[1]);
    if (sizes[0] < MAX(shape->seqlen_k, 1) || sizes[0] > FA_MAX_SIZE)
        return fa_raise(PyExc_ValueError,
                        "rotary_cos must have a row for each position in the caches, %d, got %lld",
                        shape->seqlen_k, (long long)sizes[0]);
    return read_table(dlpack, problem, options->rotary_sin, "rotary_sin", sizes, &append->sin);
}

/* ---- the interface --------------------------------------------------------------------------- */

int fa_append_read(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    const struct fa_options *options = &problem->options;
    struct fa_append *append = &problem->append;
    struct fa_shape *shape = &problem->shape;
    if (check_together(options) < 0 || read_cache_seqlen(problem, &append->cache_seqlen) < 0)
        return -1;
    if (!options->k) {
        shape->seqlen_k = MIN(shape->seqlen_k, append->cache_seqlen);
        return 0;
    }
    if (read_rows(dlpack, problem) < 0 || (options->rotary_cos && read_rotary(dlpack, problem) < 0))
        return -1;
    if (append->cache_seqlen !=
        FA_NO_BOUND) /* no row behind these is read: grids need not reach there */
        shape->seqlen_k = append->cache_seqlen + (int)append->k.shape[1];
    if (fa_problem_check_written(problem, &problem->k, "k_cache", NULL) < 0)
        return -1;
    return fa_problem_check_written(problem, &problem->v, "v_cache", NULL);
}
