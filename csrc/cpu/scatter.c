#include "scatter.h"

#include <string.h>

#include "rows.h"

static void narrow_row(const struct fa_tensor *rows, const struct fa_tensor *cache, int64_t from,
                       int64_t to, float factor)
{
    for (int64_t d = 0; d < rows->shape[2]; d++) {
        float x;
        fa_load_row(rows, from + d, 1, 1, &x);
        x *= factor;
        fa_store_row(cache, to + d, 1, &x);
    }
}

static void copy_row(const struct fa_tensor *rows, const struct fa_tensor *cache, int64_t token,
                     int64_t page, int64_t row, const struct fa_tensor *descale)
{
    const size_t element = (size_t)fa_element_bytes(rows->dtype);
    for (int64_t head = 0; head < rows->shape[1]; head++) {
        const int64_t from = token * rows->stride[0] + head * rows->stride[1];
        const int64_t to =
            page * cache->stride[0] + row * cache->stride[1] + head * cache->stride[2];
        if (cache->dtype == FA_FLOAT8_E4M3) {
            narrow_row(rows, cache, from, to, 1 / fa_descale(descale, 0, 0));
            continue;
        }
        memcpy((char *)cache->data + to * (int64_t)element,
               (const char *)rows->data + from * (int64_t)element,
               (size_t)rows->shape[2] * element);
    }
}

void fa_cpu_scatter(const struct fa_scatter *scatter)
{
    const struct fa_tensor *tensors = scatter->tensors, *slots = &tensors[FA_SCATTER_SLOTS];
    for (int64_t token = 0; token < scatter->tokens; token++) {
        const int slot = ((const int *)slots->data)[token * slots->stride[0]];
        if (slot < 0 || slot >= scatter->slots) /* checked, but threads may write meanwhile */
            continue;
        for (int i = FA_SCATTER_K; i <= FA_SCATTER_V; i++)
            copy_row(&tensors[i], &tensors[FA_SCATTER_K_CACHE + i], token,
                     slot / scatter->page_size, slot % scatter->page_size,
                     &tensors[FA_SCATTER_K_DESCALE + i]);
    }
}
