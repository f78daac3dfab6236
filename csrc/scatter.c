#include "scatter.h"

#include "error.h"
#include "overlap.h"

static const char *const NAMES[FA_SCATTER_TENSORS] = {"k",     "v",         "k_cache",  "v_cache",
                                                      "slots", "k_descale", "v_descale"};

/* ---- checks ---------------------------------------------------------------------------------- */

static int check_like_k(const struct fa_scatter *scatter, int i)
{
    const struct fa_tensor *k = &scatter->tensors[FA_SCATTER_K], *tensor = &scatter->tensors[i];
    const bool is_cache = i == FA_SCATTER_K_CACHE || i == FA_SCATTER_V_CACHE;
    const enum fa_dtype expected_dtype = is_cache && scatter->is_e4m3 ? FA_FLOAT8_E4M3
                                         : i >= FA_SCATTER_K_DESCALE  ? FA_FLOAT32
                                                                      : k->dtype;
    if (i != FA_SCATTER_SLOTS && tensor->dtype != expected_dtype)
        return fa_raise(PyExc_TypeError, "%s must be %s%s, got %s", NAMES[i],
                        fa_dtype_name(expected_dtype),
                        expected_dtype == k->dtype         ? " like k"
                        : expected_dtype == FA_FLOAT8_E4M3 ? " like k_cache"
                                                           : "",
                        fa_dtype_name(tensor->dtype));
    return fa_tensor_check_device(tensor, NAMES[i], k, "k");
}

static int check_sizes(const struct fa_scatter *scatter)
{
    const struct fa_tensor *tensors = scatter->tensors, *k = &tensors[FA_SCATTER_K];
    const struct fa_tensor *k_cache = &tensors[FA_SCATTER_K_CACHE];
    const int64_t tokens = tensors[FA_SCATTER_SLOTS].shape[0];
    for (int i = FA_SCATTER_K; i <= FA_SCATTER_V; i++) {
        const struct fa_tensor *rows = &tensors[i], *cache = &tensors[FA_SCATTER_K_CACHE + i];
        const char *name = NAMES[FA_SCATTER_K_CACHE + i];
        if (rows->shape[0] < tokens)
            return fa_raise(PyExc_ValueError, "%s has %lld rows, slots are for %lld", NAMES[i],
                            (long long)rows->shape[0], (long long)tokens);
        const int step = scatter->is_e4m3 ? 16 : 8;
        if (rows->shape[2] % step != 0)
            return fa_raise(PyExc_ValueError,
                            "the head_dim of %s must be a multiple of %d, got %lld", NAMES[i], step,
                            (long long)rows->shape[2]);
        if (fa_tensor_check_size(rows, NAMES[i], 1, "k's heads", k->shape[1]) < 0 ||
            fa_tensor_check_size(cache, name, 0, "k_cache's pages", k_cache->shape[0]) < 0 ||
            fa_tensor_check_size(cache, name, 1, "k_cache's page_size", k_cache->shape[1]) < 0 ||
            fa_tensor_check_size(cache, name, 2, "k's heads", k->shape[1]) < 0 ||
            fa_tensor_check_size(cache, name, 3, "the head_dim", rows->shape[2]) < 0)
            return -1;
    }
    return 0;
}

static int check_descale(const struct fa_scatter *scatter, int i)
{
    const struct fa_tensor *descale = &scatter->tensors[i];
    if (i < FA_SCATTER_K_DESCALE)
        return 0;
    if (!scatter->is_e4m3)
        return fa_raise(PyExc_ValueError, "%s is for caches in float8_e4m3fn", NAMES[i]);
    if (descale->ndim == 0 || (descale->ndim == 1 && descale->shape[0] == 1))
        return 0;
    return fa_raise(PyExc_ValueError, "%s must be one number", NAMES[i]);
}

/* Numbers of rows, and of the chunks of a row, are ints in the kernel. */
static int check_counts(const struct fa_scatter *scatter)
{
    const struct fa_tensor *tensors = scatter->tensors;
    const int64_t *pages = tensors[FA_SCATTER_K_CACHE].shape, *k = tensors[FA_SCATTER_K].shape;
    const int64_t widest =
        k[2] > tensors[FA_SCATTER_V].shape[2] ? k[2] : tensors[FA_SCATTER_V].shape[2];
    if (tensors[FA_SCATTER_SLOTS].shape[0] > INT32_MAX || k[1] > INT32_MAX ||
        (k[1] > 0 && widest > INT32_MAX / k[1]))
        return fa_raise(PyExc_ValueError,
                        "k and v have more than 2^31 - 1 tokens or elements each");
    if (pages[1] > INT32_MAX || (pages[1] > 0 && pages[0] > INT32_MAX / pages[1]))
        return fa_raise(PyExc_ValueError, "the caches have more than 2^31 - 1 slots");
    return 0;
}

static int check_written(const struct fa_scatter *scatter, int written)
{
    const struct fa_tensor *cache = &scatter->tensors[written];
    const char *flaw = cache->is_read_only                ? "is read-only"
                       : fa_tensor_overlaps_itself(cache) ? "has elements that share memory"
                       : fa_tensor_is_readable(cache)
                           ? NULL
                           : "must have contiguous rows at multiples of 16 bytes";
    if (flaw)
        return fa_raise(PyExc_ValueError, "%s %s", NAMES[written], flaw);
    for (int i = 0; i < FA_SCATTER_TENSORS; i++)
        if (i != written && scatter->tensors[i].object &&
            fa_tensors_overlap(cache, &scatter->tensors[i]))
            return fa_raise(PyExc_ValueError, "%s overlaps %s", NAMES[written], NAMES[i]);
    return 0;
}

/* On a CUDA device the kernel drops the rows of slots that the caches have not. */
static int check_slots(const struct fa_scatter *scatter)
{
    const struct fa_tensor *slots = &scatter->tensors[FA_SCATTER_SLOTS];
    if (slots->device_type != FA_DEVICE_CPU)
        return 0;
    for (int i = 0; i < scatter->tokens; i++) {
        const int slot = ((const int *)slots->data)[i * slots->stride[0]];
        if (slot >= scatter->slots)
            return fa_raise(PyExc_ValueError, "slots must be below %d, got %d for token %d",
                            scatter->slots, slot, i);
    }
    return 0;
}

/* ---- the interface --------------------------------------------------------------------------- */

int fa_scatter_read(struct fa_dlpack *dlpack, PyObject *const *arguments,
                    struct fa_scatter *scatter)
{
    static const struct {
        int ndim;
        int (*read)(struct fa_dlpack *, PyObject *, const char *, int, struct fa_tensor *);
    } how[] = {{3, fa_tensor_read},           {3, fa_tensor_read},
               {4, fa_tensor_read_or_e4m3},   {4, fa_tensor_read_or_e4m3},
               {1, fa_tensor_read_int32},     {FA_UP_TO_TWO, fa_tensor_read},
               {FA_UP_TO_TWO, fa_tensor_read}};
    struct fa_tensor *tensors = scatter->tensors;
    for (int i = 0; i < FA_SCATTER_TENSORS; i++) {
        if (i >= FA_SCATTER_K_DESCALE && arguments[i] == Py_None)
            continue;
        if (how[i].read(dlpack, arguments[i], NAMES[i], how[i].ndim, &tensors[i]) < 0)
            return -1;
        if (i == FA_SCATTER_K_CACHE)
            scatter->is_e4m3 = tensors[i].dtype == FA_FLOAT8_E4M3;
        if (check_like_k(scatter, i) < 0 || check_descale(scatter, i) < 0)
            return -1;
    }
    if (tensors[FA_SCATTER_K].device_type == FA_DEVICE_CUDA &&
        tensors[FA_SCATTER_K].dtype == FA_FLOAT32)
        return fa_raise(PyExc_TypeError, "k must be float16 or bfloat16 on CUDA, got float32");
    if (check_sizes(scatter) < 0 || check_counts(scatter) < 0 ||
        fa_tensor_ensure_readable(dlpack, NAMES[FA_SCATTER_K], &tensors[FA_SCATTER_K]) < 0 ||
        fa_tensor_ensure_readable(dlpack, NAMES[FA_SCATTER_V], &tensors[FA_SCATTER_V]) < 0)
        return -1;
    const int64_t *pages = tensors[FA_SCATTER_K_CACHE].shape;
    scatter->tokens = (int)tensors[FA_SCATTER_SLOTS].shape[0];
    scatter->heads = (int)pages[2];
    scatter->page_size = (int)pages[1];
    scatter->slots = (int)(pages[0] * pages[1]);
    if (fa_scatter_recheck(scatter) < 0 || check_written(scatter, FA_SCATTER_K_CACHE) < 0 ||
        check_written(scatter, FA_SCATTER_V_CACHE) < 0)
        return -1;
    return check_slots(scatter);
}

int fa_scatter_recheck(const struct fa_scatter *scatter)
{
    for (int i = 0; i < FA_SCATTER_TENSORS; i++)
        if (scatter->tensors[i].object && fa_tensor_recheck(&scatter->tensors[i], NAMES[i]) < 0)
            return -1;
    return 0;
}

void fa_scatter_release(struct fa_scatter *scatter)
{
    for (int i = 0; i < FA_SCATTER_TENSORS; i++)
        fa_tensor_release(&scatter->tensors[i]);
}
