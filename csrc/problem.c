/* Arguments -> struct fa_problem: all validation, all messages. What leaves here is safe to launch.
 */
#include "problem.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "arithmetic.h"
#include "error.h"
#include "overlap.h"

/* ---- tensors --------------------------------------------------------------------------------- */

static int check_device(const struct fa_tensor *q, const struct fa_tensor *tensor, const char *name)
{
    return fa_tensor_check_device(tensor, name, q, "q");
}

static int check_dtype(const struct fa_tensor *q, const struct fa_tensor *tensor, const char *name)
{
    if (tensor->dtype == q->dtype)
        return 0;
    return fa_raise(PyExc_TypeError, "%s must be %s like q, got %s", name, fa_dtype_name(q->dtype),
                    fa_dtype_name(tensor->dtype));
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

/* What messages call k and v, and the lengths of k. */
static const char *name_of_k(const struct fa_problem *problem)
{
    return problem->is_cache ? "k_cache" : "k";
}
static const char *name_of_v(const struct fa_problem *problem)
{
    return problem->is_cache ? "v_cache" : "v";
}
static const char *name_of_seqused_k(const struct fa_problem *problem)
{
    return problem->is_cache ? "cache_seqlens" : "seqused_k";
}
static const char *name_of_table(const struct fa_problem *problem)
{
    return problem->options.cache_batch_idx ? "cache_batch_idx" : "page_table";
}

/* ---- e4m3 ------------------------------------------------------------------------------------ */

/* v has the type of k, which is that of q or e4m3. Of e4m3 head dims are whole chunks. */
static int check_kv_dtypes(const struct fa_problem *problem)
{
    const struct fa_tensor *q = &problem->q, *k = &problem->k, *v = &problem->v;
    if (k->dtype != FA_FLOAT8_E4M3)
        return check_dtype(q, k, name_of_k(problem)) < 0 ? -1
                                                         : check_dtype(q, v, name_of_v(problem));
    if (v->dtype != k->dtype)
        return fa_raise(PyExc_TypeError, "%s must be %s like %s, got %s", name_of_v(problem),
                        fa_dtype_name(k->dtype), name_of_k(problem), fa_dtype_name(v->dtype));
    for (int i = 0; i < 2; i++) {
        const struct fa_tensor *tensor = i == 0 ? k : v;
        const long long head_dim = tensor->shape[tensor->ndim - 1];
        if (head_dim % 16 != 0)
            return fa_raise(
                PyExc_ValueError,
                "the head_dim of %s in float8_e4m3fn must be a multiple of 16, got %lld",
                i == 0 ? name_of_k(problem) : name_of_v(problem), head_dim);
    }
    return 0;
}

/* One number, or one for each sequence and KV head; of one that is expanded strides are 0. */
static int read_descale(struct fa_dlpack *dlpack, const struct fa_problem *problem,
                        PyObject *object, const char *name, const struct fa_tensor *factor_of,
                        struct fa_tensor *descale)
{
    const struct fa_shape *shape = &problem->shape;
    if (!object)
        return 0;
    if (factor_of->dtype != FA_FLOAT8_E4M3)
        return fa_raise(PyExc_ValueError, "%s is for %s in float8_e4m3fn, got %s", name,
                        factor_of == &problem->q ? "q" : "k and v",
                        fa_dtype_name(factor_of->dtype));
    if (fa_tensor_read(dlpack, object, name, FA_UP_TO_TWO, descale) < 0)
        return -1;
    if (descale->dtype != FA_FLOAT32)
        return fa_raise(PyExc_TypeError, "%s must be float32, got %s", name,
                        fa_dtype_name(descale->dtype));
    if (check_device(&problem->q, descale, name) < 0)
        return -1;
    if (descale->ndim == 2 &&
        (fa_tensor_check_size(descale, name, 0, "q's batch", shape->batch) < 0 ||
         fa_tensor_check_size(descale, name, 1, "k's heads", shape->heads_kv) < 0))
        return -1;
    if (descale->ndim == 1 && fa_tensor_check_size(descale, name, 0, "size", 1) < 0)
        return -1;
    return 0;
}

/* [batch, heads_kv] of a number that is the same for all. */
static struct fa_tensor expanded(const struct fa_problem *problem, const struct fa_tensor *descale)
{
    struct fa_tensor all = *descale;
    if (all.ndim == 2)
        return all;
    all.ndim = 2;
    all.shape[0] = problem->shape.batch;
    all.shape[1] = problem->shape.heads_kv;
    all.stride[0] = all.stride[1] = 0;
    return all;
}

/* Where the host sees it. */
static int check_positive(const struct fa_problem *problem, const struct fa_tensor *descale,
                          const char *name)
{
    if (!descale->object || descale->device_type != FA_DEVICE_CPU || fa_tensor_is_empty(descale))
        return 0;
    const struct fa_tensor all = expanded(problem, descale);
    for (int64_t i = 0; i < all.shape[0]; i++)
        for (int64_t j = 0; j < all.shape[1]; j++) {
            const float x = ((const float *)all.data)[i * all.stride[0] + j * all.stride[1]];
            if (!(x > 0) || !isfinite(x))
                return fa_raise(PyExc_ValueError, "%s must be positive and finite, got %s", name,
                                isnan(x) ? "NaN"
                                : x == 0 ? "0"
                                : x < 0  ? "a negative number"
                                         : "inf");
        }
    return 0;
}

static int read_descales(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    const struct fa_options *options = &problem->options;
    const struct {
        PyObject *object;
        const char *name;
        const struct fa_tensor *factor_of;
        struct fa_tensor *descale;
    } all[] = {{options->q_descale, "q_descale", &problem->q, &problem->q_descale},
               {options->k_descale, "k_descale", &problem->k, &problem->k_descale},
               {options->v_descale, "v_descale", &problem->v, &problem->v_descale}};
    for (int i = 0; i < 3; i++)
        if (read_descale(dlpack, problem, all[i].object, all[i].name, all[i].factor_of,
                         all[i].descale) < 0 ||
            check_positive(problem, all[i].descale, all[i].name) < 0)
            return -1;
    return 0;
}

/* ---- lengths on the device ------------------------------------------------------------------- */

/* Reads int32 numbers, with `ndim` dimensions, where there are any. 0 or -1. */
static int read_numbers(struct fa_dlpack *dlpack, PyObject *object, const char *name, int ndim,
                        const struct fa_tensor *q, struct fa_tensor *numbers)
{
    if (!object)
        return 0;
    if (fa_tensor_read_int32(dlpack, object, name, ndim, numbers) < 0 ||
        check_device(q, numbers, name) < 0 || check_counts(numbers, name) < 0)
        return -1;
    if (!fa_tensor_has_contiguous_rows(numbers))
        return fa_raise(PyExc_ValueError, "%s must be contiguous%s, got stride %lld", name,
                        ndim == 1 ? "" : " in its last dimension",
                        (long long)numbers->stride[ndim - 1]);
    return 0;
}

/* The lengths of caches, where they are on the device. */
static PyObject *cache_lengths(const struct fa_options *options)
{
    PyObject *lengths = options->cache_seqlens;
    return lengths && PyLong_Check(lengths) ? NULL : lengths;
}

/* An entry of a batch of caches is a page that holds all of a sequence: its number is a table. */
static int read_lengths_and_pages(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    const struct fa_options *options = &problem->options;
    const struct {
        PyObject *object;
        const char *name;
        int ndim;
        struct fa_tensor *numbers;
    } all[] = {
        {options->cu_seqlens_q, "cu_seqlens_q", 1, &problem->cu_seqlens_q},
        {options->cu_seqlens_k, "cu_seqlens_k", 1, &problem->cu_seqlens_k},
        {options->seqused_q, "seqused_q", 1, &problem->seqused_q},
        {options->seqused_k, "seqused_k", 1, &problem->seqused_k},
        {cache_lengths(options), "cache_seqlens", 1, &problem->seqused_k},
        {options->page_table, "page_table", 2, &problem->page_table},
        {options->cache_batch_idx, "cache_batch_idx", 1, &problem->page_table},
        {options->cache_leftpad, "cache_leftpad", 1, &problem->leftpad_k},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (read_numbers(dlpack, all[i].object, all[i].name, all[i].ndim, &problem->q,
                         all[i].numbers) < 0)
            return -1;
    if (options->cache_batch_idx)
        problem->page_table.shape[1] = 1;
    return 0;
}

/* The batch size, by q's lengths or shape; what else has one must agree. -1 with the exception set.
 */
static int64_t read_batch(const struct fa_problem *problem)
{
    const struct fa_tensor *cu_q = &problem->cu_seqlens_q, *cu_k = &problem->cu_seqlens_k;
    const struct fa_tensor *used_q = &problem->seqused_q, *used_k = &problem->seqused_k;
    const struct fa_tensor *table = &problem->page_table;
    const bool has_batch_k = !cu_k->object && !table->object;
    const int64_t batch = cu_q->object ? cu_q->shape[0] - 1 : problem->q.shape[0];
    if (batch < 0) {
        fa_raise(PyExc_ValueError, "cu_seqlens_q must have batch + 1 elements, got 0");
        return -1;
    }
    if ((cu_k->object &&
         fa_tensor_check_size(cu_k, "cu_seqlens_k", 0, "batch + 1 =", batch + 1) < 0) ||
        (has_batch_k &&
         fa_tensor_check_size(&problem->k, name_of_k(problem), 0, "q's batch", batch) < 0) ||
        (has_batch_k &&
         fa_tensor_check_size(&problem->v, name_of_v(problem), 0, "q's batch", batch) < 0) ||
        (table->object &&
         fa_tensor_check_size(table, name_of_table(problem), 0, "q's batch", batch) < 0) ||
        (used_q->object && fa_tensor_check_size(used_q, "seqused_q", 0, "q's batch", batch) < 0) ||
        (problem->leftpad_k.object &&
         fa_tensor_check_size(&problem->leftpad_k, "cache_leftpad", 0, "q's batch", batch) < 0) ||
        (used_k->object &&
         fa_tensor_check_size(used_k, name_of_seqused_k(problem), 0, "q's batch", batch) < 0))
        return -1;
    return batch;
}

/* ---- pages ----------------------------------------------------------------------------------- */

/* A cache is larger than a call: it is never copied. */
static int check_in_place(const struct fa_tensor *pages, const char *name, const char *of_what)
{
    if (fa_tensor_is_readable(pages))
        return 0;
    const int64_t *stride = pages->stride;
    return fa_raise(PyExc_ValueError,
                    "%s%s is read in place, never copied: rows must be contiguous and "
                    "16-byte-aligned, got strides (%lld, %lld, %lld, %lld)",
                    name, of_what, (long long)stride[0], (long long)stride[1], (long long)stride[2],
                    (long long)stride[3]);
}

/* The keys for which a sequence has pages; 0 where there are no pages at all. */
static int64_t keys_of_pages(const struct fa_problem *problem)
{
    const struct fa_tensor *k = &problem->k;
    return k->shape[0] == 0 ? 0 : problem->page_table.shape[1] * k->shape[1];
}

static int check_pages(const struct fa_problem *problem)
{
    const struct fa_tensor *k = &problem->k, *v = &problem->v;
    const char *k_name = name_of_k(problem), *v_name = name_of_v(problem);
    const char *of_what = problem->is_cache ? "" : " of a page_table";
    if (!problem->page_table.object && !problem->is_cache)
        return 0;
    if (check_in_place(k, k_name, of_what) < 0 || check_in_place(v, v_name, of_what) < 0)
        return -1;
    if (!problem->page_table.object)
        return 0;
    if (k->shape[1] < 1 || (k->shape[1] > FA_MAX_PAGE_SIZE && !problem->options.cache_batch_idx))
        return fa_raise(PyExc_ValueError,
                        "pages must have from 1 to %d rows (dimension 1 of %s), got %lld",
                        FA_MAX_PAGE_SIZE, k_name, (long long)k->shape[1]);
    if (fa_tensor_check_size(v, v_name, 0, "k's pages", k->shape[0]) < 0)
        return -1;
    const int64_t keys = MIN(keys_of_pages(problem), problem->options.max_seqlen_k);
    if (keys > FA_MAX_SIZE)
        return fa_raise(PyExc_ValueError,
                        "page_table has room for %lld keys of a sequence, at most %d are supported",
                        (long long)keys, FA_MAX_SIZE);
    return 0;
}

/* ---- shapes ---------------------------------------------------------------------------------- */

/* Dimensions of a tensor [batch, seqlen, heads, head_dim] or [total, heads, head_dim]. */
static int row_dimension(const struct fa_tensor *tensor) { return tensor->ndim - 3; }
static int heads_dimension(const struct fa_tensor *tensor) { return tensor->ndim - 2; }
static int head_dim_dimension(const struct fa_tensor *tensor) { return tensor->ndim - 1; }
static int rows_of(const struct fa_tensor *tensor)
{
    return (int)tensor->shape[row_dimension(tensor)];
}
static int heads_of(const struct fa_tensor *tensor)
{
    return (int)tensor->shape[heads_dimension(tensor)];
}
static int head_dim_of(const struct fa_tensor *tensor)
{
    return (int)tensor->shape[head_dim_dimension(tensor)];
}

static int check_shapes(const struct fa_problem *problem)
{
    const struct fa_tensor *q = &problem->q, *k = &problem->k, *v = &problem->v;
    const char *k_name = name_of_k(problem), *v_name = name_of_v(problem);
    if (check_kv_dtypes(problem) < 0 || check_device(q, k, k_name) < 0 ||
        check_device(q, v, v_name) < 0)
        return -1;
    if (check_counts(q, "q") < 0 || check_counts(k, k_name) < 0 || check_counts(v, v_name) < 0)
        return -1;
    if (check_head_dim("head_dim (of q and k)", head_dim_of(q)) < 0 ||
        fa_tensor_check_size(k, k_name, head_dim_dimension(k), "q's head_dim", head_dim_of(q)) <
            0 ||
        check_head_dim("head_dim_v (of v)", head_dim_of(v)) < 0)
        return -1;
    const char *rows = problem->page_table.object ? "k's page size"
                       : k->ndim == 4             ? "k's seqlen"
                                                  : "k's total";
    if (fa_tensor_check_size(v, v_name, row_dimension(v), rows, rows_of(k)) < 0 ||
        fa_tensor_check_size(v, v_name, heads_dimension(v), "k's heads", heads_of(k)) < 0)
        return -1;
    return check_heads(heads_of(q), heads_of(k));
}

/* What a side's lengths are at most: of a packed one max_seqlen, or all rows if that is None. */
static int bound_of(const struct fa_tensor *side, int max_seqlen)
{
    return side->ndim == 4 ? rows_of(side) : MIN(rows_of(side), max_seqlen);
}

/* The same of keys in pages: max_seqlen_k, or all for which there are pages. */
static int bound_of_keys(const struct fa_problem *problem)
{
    const int max_seqlen = problem->options.max_seqlen_k;
    return problem->page_table.object ? (int)MIN(keys_of_pages(problem), max_seqlen)
                                      : bound_of(&problem->k, max_seqlen);
}

static void set_shape(struct fa_problem *problem, int batch)
{
    struct fa_shape *shape = &problem->shape;
    const struct fa_options *options = &problem->options;
    const struct fa_tensor *q = &problem->q, *k = &problem->k;
    shape->is_e4m3 = k->dtype == FA_FLOAT8_E4M3;
    shape->is_q_e4m3 = q->dtype == FA_FLOAT8_E4M3;
    shape->dtype = shape->is_q_e4m3 ? FA_BFLOAT16 : q->dtype; /* or as set_out() finds out */
    shape->batch = batch;
    shape->seqlen_q = bound_of(q, options->max_seqlen_q);
    shape->seqlen_k = bound_of_keys(problem);
    shape->is_packed_q = problem->cu_seqlens_q.object != NULL;
    shape->is_packed_k = problem->cu_seqlens_k.object != NULL;
    shape->page_size = problem->page_table.object ? rows_of(k) : 0;
    shape->is_varlen = shape->is_packed_q || shape->is_packed_k || shape->page_size ||
                       problem->seqused_q.object || problem->seqused_k.object ||
                       problem->leftpad_k.object || options->k;
    shape->total_q = shape->is_packed_q ? rows_of(q) : 0;
    shape->total_k = shape->is_packed_k ? rows_of(k) : 0;
    shape->heads_q = heads_of(q);
    shape->heads_kv = heads_of(k);
    shape->head_dim = head_dim_of(q);
    shape->head_dim_v = head_dim_of(&problem->v);
    shape->window_left = options->window_size.left;
    shape->window_right = options->window_size.right;
    shape->softmax_scale = isnan(options->softmax_scale) ? 1.0f / sqrtf((float)shape->head_dim)
                                                         : options->softmax_scale;
    shape->softcap = options->softcap;
    shape->dropout = (int)MIN(options->dropout_p * 65536 + 0.5, 65535);
}

static int read_sink(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    struct fa_tensor *sink = &problem->sink;
    if (!problem->options.learnable_sink)
        return 0;
    if (fa_tensor_read(dlpack, problem->options.learnable_sink, "learnable_sink", 1, sink) < 0 ||
        fa_tensor_check_size(sink, "learnable_sink", 0, "q's heads", problem->shape.heads_q) < 0)
        return -1;
    return check_device(&problem->q, sink, "learnable_sink");
}

static int read_mod(struct fa_dlpack *dlpack, enum fa_read read, const struct fa_problem *problem,
                    PyObject *object, const char *name, struct fa_mod *mod)
{
    if (!object)
        return 0;
    if (problem->q.device_type == FA_DEVICE_CPU && read == FA_READ_DATA)
        return fa_raise(PyExc_NotImplementedError, "%s of CPU tensors is evaluated by torch", name);
    if (fa_mod_read(dlpack, object, name, mod) < 0)
        return -1;
    for (int i = 0; i < mod->count; i++)
        if (check_device(&problem->q, &mod->captured[i].tensor, fa_mod_captured_name(name)) < 0)
            return -1;
    return 0;
}

static int read_mods(struct fa_dlpack *dlpack, enum fa_read read, struct fa_problem *problem)
{
    const struct fa_options *options = &problem->options;
    return read_mod(dlpack, read, problem, options->score_mod, "score_mod", &problem->score_mod) < 0
               ? -1
               : read_mod(dlpack, read, problem, options->mask_mod, "mask_mod", &problem->mask_mod);
}

/* What is dropped depends on it alone; nothing is drawn here. */
static int read_dropout_seed(struct fa_dlpack *dlpack, enum fa_read read,
                             struct fa_problem *problem)
{
    struct fa_tensor *seed = &problem->dropout_seed;
    PyObject *object = problem->options.dropout_seed;
    if (!problem->shape.dropout || (!object && read == FA_READ_LAYOUT))
        return 0;
    if (!object)
        return fa_raise(PyExc_ValueError, "dropout_p above 0 needs a dropout_seed");
    if (fa_tensor_read_int64(dlpack, object, "dropout_seed", 1, seed) < 0 ||
        fa_tensor_check_size(seed, "dropout_seed", 0, "size", 2) < 0 ||
        check_device(&problem->q, seed, "dropout_seed") < 0)
        return -1;
    return fa_tensor_has_contiguous_rows(seed)
               ? 0
               : fa_raise(PyExc_ValueError, "dropout_seed must be contiguous, got stride %lld",
                          (long long)seed->stride[0]);
}

/* Slopes are fp32, for all sequences or for each; kernels read them with any strides. */
static int read_alibi_slopes(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    static const char NAME[] = "alibi_slopes";
    struct fa_tensor *slopes = &problem->alibi_slopes;
    const struct fa_shape *shape = &problem->shape;
    if (!problem->options.alibi_slopes)
        return 0;
    if (fa_tensor_read(dlpack, problem->options.alibi_slopes, NAME, FA_ONE_OR_TWO, slopes) < 0)
        return -1;
    if (slopes->dtype != FA_FLOAT32)
        return fa_raise(PyExc_TypeError, "%s must be float32, got %s", NAME,
                        fa_dtype_name(slopes->dtype));
    if (fa_tensor_check_size(slopes, NAME, slopes->ndim - 1, "q's heads", shape->heads_q) < 0 ||
        (slopes->ndim == 2 && fa_tensor_check_size(slopes, NAME, 0, "q's batch", shape->batch) < 0))
        return -1;
    return check_device(&problem->q, slopes, NAME);
}

/* Lists of blocks, which are those of one length for all sequences. */
static int read_blocks(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    const struct fa_options *options = &problem->options;
    if ((options->key_blocks || options->query_blocks) && problem->shape.is_varlen)
        return fa_raise(PyExc_NotImplementedError,
                        "block sparsity is not supported with packed sequences, lengths on the "
                        "device, pages and caches");
    return fa_block_lists_read(dlpack, options->key_blocks, "key_blocks", true, &problem->q,
                               &problem->shape, &problem->key_blocks) < 0
               ? -1
               : fa_block_lists_read(dlpack, options->query_blocks, "query_blocks", false,
                                     &problem->q, &problem->shape, &problem->query_blocks);
}

/* A bias is never copied: it may be as large as all scores. */
static int read_bias(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    static const char NAME[] = "attn_bias";
    static const char *const MEANINGS[] = {"q's batch", "q's heads", "q's seqlen"};
    struct fa_tensor *bias = &problem->bias;
    const struct fa_shape *shape = &problem->shape;
    const int sizes[] = {shape->batch, shape->heads_q, shape->seqlen_q};
    if (!problem->options.attn_bias)
        return 0;
    if (shape->is_varlen)
        return fa_raise(PyExc_NotImplementedError,
                        "%s is not supported with lengths or pages on the device: all sequences of "
                        "a batch have those of q and k",
                        NAME);
    if (fa_tensor_read(dlpack, problem->options.attn_bias, NAME, 4, bias) < 0)
        return -1;
    if (bias->dtype != FA_FLOAT32 && bias->dtype != shape->dtype)
        return fa_raise(PyExc_TypeError, "%s must be float32, or %s like q, got %s", NAME,
                        fa_dtype_name(shape->dtype), fa_dtype_name(bias->dtype));
    for (int i = 0; i < 3; i++)
        if (bias->shape[i] != 1 && bias->shape[i] != sizes[i])
            return fa_raise(PyExc_ValueError,
                            "%s must have size 1 or %s %d in dimension %d, got %lld", NAME,
                            MEANINGS[i], sizes[i], i, (long long)bias->shape[i]);
    if (fa_tensor_check_size(bias, NAME, 3, "k's seqlen", shape->seqlen_k) < 0 ||
        check_device(&problem->q, bias, NAME) < 0)
        return -1;
    return fa_tensor_has_contiguous_rows(bias)
               ? 0
               : fa_raise(PyExc_ValueError,
                          "%s is read in place, never copied: it must be contiguous in its last "
                          "dimension, got stride %lld",
                          NAME, (long long)bias->stride[3]);
}

bool fa_bias_has_pairs(const struct fa_tensor *bias)
{
    if (!bias->object)
        return false;
    const struct fa_strides stride = fa_bias_strides(bias);
    const uintptr_t pair_bytes = 2 * (uintptr_t)fa_element_bytes(bias->dtype);
    const int64_t odd = bias->shape[3] | stride.batch | stride.head | stride.seqlen;
    return (odd & 1) == 0 && (uintptr_t)bias->data % pair_bytes == 0;
}

bool fa_bias_is_shared(const struct fa_problem *problem)
{
    const struct fa_shape *shape = &problem->shape;
    const int64_t *sizes = problem->bias.shape;
    return problem->bias.object &&
           (sizes[0] < shape->batch || sizes[1] < shape->heads_q || sizes[2] < shape->seqlen_q);
}

/* What e4m3 has not met yet. */
static int check_e4m3(const struct fa_problem *problem)
{
    const struct fa_options *options = &problem->options;
    if (problem->shape.is_q_e4m3 && (options->alibi_slopes || problem->shape.dropout || options->k))
        return fa_raise(PyExc_NotImplementedError,
                        "q in float8_e4m3fn is not supported with alibi_slopes, dropout_p or rows "
                        "that are appended yet");
    if (!problem->shape.is_e4m3 || (!options->attn_bias && !options->key_blocks &&
                                    !problem->score_mod.number && !problem->mask_mod.number))
        return 0;
    return fa_raise(PyExc_NotImplementedError,
                    "k and v in float8_e4m3fn are not supported with attn_bias, listed blocks or a "
                    "mod yet");
}

/* Sizes of a result, and how many there are: of out [batch, seqlen_q, heads_q, head_dim_v], where q
 * is packed [total_q, heads_q, head_dim_v]; of lse [batch, heads_q, seqlen_q] or [heads_q,
 * total_q]. */
static int sizes_of_out(const struct fa_shape *shape, int64_t sizes[FA_MAX_NDIM])
{
    int count = 0;
    if (!shape->is_packed_q)
        sizes[count++] = shape->batch;
    sizes[count++] = shape->is_packed_q ? shape->total_q : shape->seqlen_q;
    sizes[count++] = shape->heads_q;
    sizes[count++] = shape->head_dim_v;
    return count;
}

static int sizes_of_lse(const struct fa_shape *shape, int64_t sizes[FA_MAX_NDIM])
{
    int count = 0;
    if (!shape->is_packed_q)
        sizes[count++] = shape->batch;
    sizes[count++] = shape->heads_q;
    sizes[count++] = shape->is_packed_q ? shape->total_q : shape->seqlen_q;
    return count;
}

/* `meanings`: what the dimensions are, for messages. */
static int check_sizes(const struct fa_tensor *tensor, const char *name, const int64_t *sizes,
                       const char *const *meanings)
{
    for (int i = 0; i < tensor->ndim; i++)
        if (sizes[i] != FA_ANY_SIZE &&
            fa_tensor_check_size(tensor, name, i, meanings[i], sizes[i]) < 0)
            return -1;
    return 0;
}

/* Of q in e4m3 it is out alone that comes here, and may have any of the wider types. */
int fa_problem_read_like_q(struct fa_dlpack *dlpack, const struct fa_problem *problem,
                           PyObject *object, const char *name, int ndim, const int64_t *sizes,
                           const char *const *meanings, struct fa_tensor *tensor)
{
    if (fa_tensor_read(dlpack, object, name, ndim, tensor) < 0 ||
        (!problem->shape.is_q_e4m3 && check_dtype(&problem->q, tensor, name) < 0) ||
        check_device(&problem->q, tensor, name) < 0)
        return -1;
    return check_sizes(tensor, name, sizes, meanings);
}

/* A tensor of the forward's output or its gradient. */
static int read_like_out(struct fa_dlpack *dlpack, PyObject *object, const char *name,
                         const struct fa_problem *problem, struct fa_tensor *tensor)
{
    static const char *const dense[] = {"q's batch", "q's seqlen", "q's heads", "v's head_dim"};
    static const char *const packed[] = {"q's total", "q's heads", "v's head_dim"};
    int64_t sizes[FA_MAX_NDIM];
    const int ndim = sizes_of_out(&problem->shape, sizes);
    return fa_problem_read_like_q(dlpack, problem, object, name,
                                  problem->options.heads_first ? FA_HEADS_FIRST : ndim, sizes,
                                  ndim == 4 ? dense : packed, tensor);
}

/* The log-sum-exp or its gradient: fp32. */
static int read_like_lse(struct fa_dlpack *dlpack, PyObject *object, const char *name,
                         const struct fa_problem *problem, struct fa_tensor *tensor)
{
    static const char *const dense[] = {"q's batch", "q's heads", "q's seqlen"};
    static const char *const packed[] = {"q's heads", "q's total"};
    int64_t sizes[FA_MAX_NDIM];
    const int ndim = sizes_of_lse(&problem->shape, sizes);
    if (fa_tensor_read(dlpack, object, name, ndim, tensor) < 0)
        return -1;
    if (tensor->dtype != FA_FLOAT32)
        return fa_raise(PyExc_TypeError, "%s must be float32, got %s", name,
                        fa_dtype_name(tensor->dtype));
    if (check_device(&problem->q, tensor, name) < 0)
        return -1;
    return check_sizes(tensor, name, sizes, ndim == 3 ? dense : packed);
}

/* ---- results: written in place, ours or the caller's ----------------------------------------- */

/* A tensor of a call, which may not be there (yet), and what messages call it. */
struct place {
    size_t offset; /* in its struct */
    const char *name;
    const char *(*name_of)(const struct fa_problem *problem); /* where the name depends on it */
};

#define PLACE(field, ...) {offsetof(struct fa_problem, field), __VA_ARGS__}
static const struct place PLACES[] = {
    PLACE(q, "q", NULL),
    PLACE(k, NULL, name_of_k),
    PLACE(v, NULL, name_of_v),
    PLACE(sink, "learnable_sink", NULL),
    PLACE(dropout_seed, "dropout_seed", NULL),
    PLACE(alibi_slopes, "alibi_slopes", NULL),
    PLACE(bias, "attn_bias", NULL),
    PLACE(k_descale, "k_descale", NULL),
    PLACE(v_descale, "v_descale", NULL),
    PLACE(q_descale, "q_descale", NULL),
    PLACE(out, "out", NULL),
    PLACE(lse, "lse", NULL),
    PLACE(cu_seqlens_q, "cu_seqlens_q", NULL),
    PLACE(cu_seqlens_k, "cu_seqlens_k", NULL),
    PLACE(seqused_q, "seqused_q", NULL),
    PLACE(seqused_k, NULL, name_of_seqused_k),
    PLACE(page_table, NULL, name_of_table),
    PLACE(leftpad_k, "cache_leftpad", NULL),
    PLACE(append.k, "k", NULL),
    PLACE(append.v, "v", NULL),
    PLACE(append.cos, "rotary_cos", NULL),
    PLACE(append.sin, "rotary_sin", NULL),
    PLACE(key_blocks.counts, "counts of key blocks", NULL),
    PLACE(key_blocks.indices, "indices of key blocks", NULL),
    PLACE(key_blocks.full_counts, "counts of full key blocks", NULL),
    PLACE(key_blocks.full_indices, "indices of full key blocks", NULL),
    PLACE(query_blocks.counts, "counts of query blocks", NULL),
    PLACE(query_blocks.indices, "indices of query blocks", NULL),
    PLACE(query_blocks.full_counts, "counts of full query blocks", NULL),
    PLACE(query_blocks.full_indices, "indices of full query blocks", NULL),
};
#undef PLACE

#define PLACE(field) {offsetof(struct fa_gradients, field), #field, NULL}
static const struct place GRADIENTS[] = {PLACE(dout), PLACE(dlse),  PLACE(dq),   PLACE(dk),
                                         PLACE(dv),   PLACE(dsink), PLACE(dbias)};
#undef PLACE

#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

static const char *name_of(const struct fa_problem *problem, const struct place *place)
{
    return place->name ? place->name : place->name_of(problem);
}

static const struct fa_tensor *tensor_at(const void *base, const struct place *place)
{
    return (const void *)((const char *)base + place->offset);
}

static int check_apart_from(const struct fa_problem *problem, const void *base,
                            const struct place *places, int count, const struct fa_tensor *result,
                            const char *name)
{
    for (int i = 0; i < count; i++) {
        const struct fa_tensor *tensor = tensor_at(base, &places[i]);
        if (!tensor->object || tensor == result || !fa_tensors_overlap(result, tensor))
            continue;
        const char *other = name_of(problem, &places[i]);
        /* memory that was freed meanwhile may be the result's now */
        return fa_tensor_recheck(tensor, other) < 0
                   ? -1
                   : fa_raise(PyExc_ValueError, "%s overlaps %s", name, other);
    }
    return 0;
}

/* Whether the tensors of the call that are there leave a result to itself. 0 or -1. */
static int check_apart(const struct fa_problem *problem, const struct fa_gradients *gradients,
                       const struct fa_tensor *result, const char *name)
{
    if (check_apart_from(problem, problem, PLACES, LENGTH(PLACES), result, name) < 0 ||
        (gradients &&
         check_apart_from(problem, gradients, GRADIENTS, LENGTH(GRADIENTS), result, name) < 0) ||
        fa_mod_check_apart(&problem->score_mod, "score_mod", result, name) < 0)
        return -1;
    return fa_mod_check_apart(&problem->mask_mod, "mask_mod", result, name);
}

int fa_problem_check_written(const struct fa_problem *problem, const struct fa_tensor *tensor,
                             const char *name, const char *flaw)
{
    if (tensor->is_read_only)
        flaw = "is read-only";
    else if (!flaw && fa_tensor_overlaps_itself(tensor))
        flaw = "has elements that share memory";
    if (flaw)
        return fa_raise(PyExc_ValueError, "%s %s", name, flaw);
    return check_apart(problem, NULL, tensor, name);
}

static int set_out(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    const struct fa_shape *shape = &problem->shape;
    int64_t sizes[FA_MAX_NDIM];
    const int ndim = sizes_of_out(shape, sizes);
    struct fa_tensor *out = &problem->out;
    if (problem->options.out) {
        if (read_like_out(dlpack, problem->options.out, "out", problem, out) < 0)
            return -1;
        problem->shape.dtype = out->dtype;
        return fa_problem_check_written(problem, out, "out",
                                        fa_tensor_is_readable(out)
                                            ? NULL
                                            : "must have contiguous rows at multiples of 16 bytes");
    }
    if (fa_tensor_empty(dlpack, &problem->q, "out", shape->dtype,
                        problem->options.heads_first ? FA_HEADS_FIRST : ndim, sizes, out) < 0)
        return -1;
    return check_apart(problem, NULL, out, "out");
}

static int set_lse(struct fa_dlpack *dlpack, struct fa_problem *problem)
{
    int64_t sizes[FA_MAX_NDIM];
    const int ndim = sizes_of_lse(&problem->shape, sizes);
    struct fa_tensor *lse = &problem->lse;
    if (problem->options.lse)
        return read_like_lse(dlpack, problem->options.lse, "lse", problem, lse) < 0
                   ? -1
                   : fa_problem_check_written(problem, lse, "lse",
                                              fa_tensor_is_contiguous(lse) ? NULL
                                                                           : "must be contiguous");
    if (!problem->options.return_lse)
        return 0;
    if (fa_tensor_empty(dlpack, &problem->q, "lse", FA_FLOAT32, ndim, sizes, lse) < 0)
        return -1;
    return check_apart(problem, NULL, lse, "lse");
}

/* ---- the interface --------------------------------------------------------------------------- */

int fa_problem_read(struct fa_dlpack *dlpack, PyObject *const qkv[3], enum fa_read read,
                    struct fa_problem *problem)
{
    const char *const names[] = {"q", name_of_k(problem), name_of_v(problem), "learnable_sink"};
    struct fa_tensor *const tensors[] = {&problem->q, &problem->k, &problem->v, &problem->sink};
    const struct fa_options *options = &problem->options;
    if (problem->is_cache && (options->cu_seqlens_k || options->seqused_k ||
                              (options->page_table && options->cache_batch_idx)))
        return fa_raise(PyExc_ValueError, "caches have cache_seqlens in place of cu_seqlens_k and "
                                          "seqused_k, and cache_batch_idx or a page_table");
    if (options->page_table && options->cu_seqlens_k)
        return fa_raise(PyExc_ValueError, "page_table takes no cu_seqlens_k: the keys of pages are "
                                          "not packed, their lengths are seqused_k");
    if (options->heads_first && (options->cu_seqlens_q || options->cu_seqlens_k ||
                                 options->page_table || problem->is_cache))
        return fa_raise(PyExc_ValueError, "heads_first takes neither packed sequences nor caches");
    for (int i = 0; i < 3; i++) {
        const bool packed = i == 0 ? options->cu_seqlens_q : options->cu_seqlens_k;
        const int order = packed ? 3 : options->heads_first ? FA_HEADS_FIRST : 4;
        if (fa_tensor_read_or_e4m3(dlpack, qkv[i], names[i], order, tensors[i]) < 0)
            return -1;
    }
    if (read_lengths_and_pages(dlpack, problem) < 0 || check_shapes(problem) < 0 ||
        check_pages(problem) < 0)
        return -1;
    const int64_t batch = read_batch(problem);
    if (batch < 0)
        return -1;
    set_shape(problem, (int)batch);
    if (read_sink(dlpack, problem) < 0 || read_alibi_slopes(dlpack, problem) < 0 ||
        read_bias(dlpack, problem) < 0 || read_descales(dlpack, problem) < 0 ||
        read_dropout_seed(dlpack, read, problem) < 0 || read_blocks(dlpack, problem) < 0 ||
        read_mods(dlpack, read, problem) < 0 || check_e4m3(problem) < 0)
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

static void release_all(void *base, const struct place *places, int count)
{
    for (int i = 0; i < count; i++)
        fa_tensor_release((void *)((char *)base + places[i].offset));
}

void fa_problem_release(struct fa_problem *problem)
{
    release_all(problem, PLACES, LENGTH(PLACES));
    fa_mod_release(&problem->score_mod);
    fa_mod_release(&problem->mask_mod);
}

/* Whether gradients of what score_mod captures are summed up in fixed point. */
static bool needs_sums(const struct fa_problem *problem)
{
    return problem->options.deterministic && fa_mod_has_gradients(&problem->score_mod);
}

int fa_problem_check_differentiable(const struct fa_problem *problem)
{
    if (problem->shape.is_e4m3)
        return fa_raise(PyExc_NotImplementedError,
                        "k and v in float8_e4m3fn have no backward: they are a cache");
    if (problem->options.key_blocks && !problem->options.query_blocks)
        return fa_raise(PyExc_ValueError, "the backward of key_blocks needs query_blocks");
    if (needs_sums(problem) && fa_shape_sum_bits(&problem->shape) < FA_LEAST_SUM_BITS)
        return fa_raise(PyExc_NotImplementedError,
                        "a gradient of alibi_slopes, or of what score_mod captures, is not "
                        "supported with deterministic=True for 2^43 scores or more");
    if (!problem->page_table.object)
        return 0;
    return fa_raise(PyExc_NotImplementedError, "page_table has no backward: K and V are a cache");
}

int fa_gradients_read(struct fa_dlpack *dlpack, PyObject *dout, PyObject *out, PyObject *lse,
                      PyObject *dlse, struct fa_problem *problem, struct fa_gradients *gradients)
{
    if (fa_problem_check_differentiable(problem) < 0 ||
        read_like_out(dlpack, dout, "dout", problem, &gradients->dout) < 0 ||
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

/* Of a problem that is empty it is 0, and so are rows that no sequence has, which nothing is
 * computed for: on the CPU from here on, elsewhere kernels clear them. 0 or -1. */
static int allocate_gradient(struct fa_dlpack *dlpack, const struct fa_problem *problem,
                             const struct fa_gradients *gradients, const struct fa_tensor *like,
                             const char *name, enum fa_dtype dtype, int ndim, const int64_t *shape,
                             struct fa_tensor *gradient)
{
    const bool is_cpu = problem->q.device_type == FA_DEVICE_CPU;
    const int status = fa_shape_is_empty(&problem->shape) || (problem->shape.is_varlen && is_cpu)
                           ? fa_tensor_zeros(dlpack, like, name, dtype, ndim, shape, gradient)
                           : fa_tensor_empty(dlpack, like, name, dtype, ndim, shape, gradient);
    return status < 0 ? -1 : check_apart(problem, gradients, gradient, name);
}

/* Zero where nothing is added to it. */
static int allocate_dbias(struct fa_dlpack *dlpack, const struct fa_problem *problem,
                          struct fa_gradients *gradients)
{
    struct fa_tensor *dbias = &gradients->dbias;
    if (fa_tensor_zeros(dlpack, &problem->q, "dbias", FA_FLOAT32, 4, problem->bias.shape, dbias) <
        0)
        return -1;
    return check_apart(problem, gradients, dbias, "dbias");
}

int fa_gradients_allocate(struct fa_dlpack *dlpack, const struct fa_problem *problem,
                          struct fa_gradients *gradients)
{
    const struct fa_tensor *const inputs[] = {&problem->q, &problem->k, &problem->v};
    struct fa_tensor *const outputs[] = {&gradients->dq, &gradients->dk, &gradients->dv};
    static const char *const names[] = {"dq", "dk", "dv"};
    for (int i = 0; i < 3; i++)
        if (allocate_gradient(dlpack, problem, gradients, inputs[i], names[i], inputs[i]->dtype,
                              fa_tensor_order(inputs[i]), inputs[i]->shape, outputs[i]) < 0)
            return -1;
    if (problem->options.bias_gradient && problem->bias.object &&
        allocate_dbias(dlpack, problem, gradients) < 0)
        return -1;
    if (needs_sums(problem) && fa_mod_allocate_sums(dlpack, &problem->q, &problem->score_mod) < 0)
        return -1;
    if (!problem->sink.object)
        return 0;
    /* Where no query meets a key the sink alone makes the lse, and what flows into that flows on
     * into the sink. */
    if (fa_shape_is_empty(&problem->shape) && !problem->shape.is_varlen && gradients->dlse.object)
        return fa_tensor_sum_heads(dlpack, &gradients->dlse, "dsink", &gradients->dsink);
    const int64_t heads = problem->shape.heads_q;
    return allocate_gradient(dlpack, problem, gradients, &problem->q, "dsink", FA_FLOAT32, 1,
                             &heads, &gradients->dsink);
}

static int recheck_all(const struct fa_problem *problem, const void *base,
                       const struct place *places, int count)
{
    for (int i = 0; i < count; i++) {
        const struct fa_tensor *tensor = tensor_at(base, &places[i]);
        if (tensor->object && fa_tensor_recheck(tensor, name_of(problem, &places[i])) < 0)
            return -1;
    }
    return 0;
}

int fa_problem_recheck(const struct fa_problem *problem, const struct fa_gradients *gradients,
                       const struct fa_tensor *workspace)
{
    static const char NAME[] = "the workspace";
    if (workspace && workspace->object &&
        (fa_tensor_recheck(workspace, NAME) < 0 ||
         check_apart(problem, gradients, workspace, NAME) < 0))
        return -1;
    if (recheck_all(problem, problem, PLACES, LENGTH(PLACES)) < 0 ||
        (gradients && recheck_all(problem, gradients, GRADIENTS, LENGTH(GRADIENTS)) < 0) ||
        fa_mod_recheck(&problem->score_mod, "score_mod") < 0)
        return -1;
    return fa_mod_recheck(&problem->mask_mod, "mask_mod");
}

void fa_gradients_release(struct fa_gradients *gradients)
{
    release_all(gradients, GRADIENTS, LENGTH(GRADIENTS));
}
