/* Parts put together as it is defined, one row of one head after the other:
 *
 *     lse = log(sum_i exp(lse_i))        out = sum_i exp(lse_i - lse) out_i
 *
 * over the parts i that have keys; without any, out is 0 and lse -inf. */
#include "combine.h"

#include <math.h>

#include "rows.h"

/* The used rows of sequence `number`, counted in its entry of the batch. Other threads may write to
 * lengths meanwhile: nothing is read outside of the tensors. */
static struct range used_rows(const struct fa_parts *parts, int64_t number)
{
    struct range rows = {0, parts->out.shape[1]};
    if (parts->cu_seqlens.object) {
        const int *starts = parts->cu_seqlens.data;
        const int64_t begin = clamp(starts[number], 0, rows.end);
        rows = (struct range){begin, clamp(starts[number + 1], begin, rows.end)};
    }
    if (parts->seqused.object) {
        const int used = ((const int *)parts->seqused.data)[number];
        rows.end = rows.begin + clamp(used, 0, count_of(rows));
    }
    return rows;
}

static bool is_used(const struct fa_parts *parts, int64_t batch, int64_t row)
{
    const bool is_packed = parts->cu_seqlens.object != NULL;
    const int64_t first = is_packed ? 0 : batch, end = is_packed ? parts->sequences : batch + 1;
    for (int64_t number = first; number < end; number++) {
        const struct range rows = used_rows(parts, number);
        if (row >= rows.begin && row < rows.end)
            return true;
    }
    return false;
}

struct place {
    int64_t batch, row, head;
};

static int64_t offset_of(const int64_t *stride, int64_t part, struct place at)
{
    return part * stride[0] + at.batch * stride[1] + at.row * stride[2] + at.head * stride[3];
}

static void combine_row(const struct fa_parts *parts, struct place at, int64_t count)
{
    const int dims = (int)parts->out.shape[3], width = fa_width(dims);
    const float *lse_parts = parts->lse_parts.data;
    const int64_t *lse_stride = parts->lse_parts.stride;
    float sum[FA_MAX_PARTS_HEAD_DIM] = {0}, part[FA_MAX_PARTS_HEAD_DIM];
    double max = -INFINITY, total = 0;
    for (int64_t i = 0; i < count; i++) {
        const double lse_part = lse_parts[offset_of(lse_stride, i, at)];
        if (lse_part > max) {
            total *= exp(max - lse_part);
            max = lse_part;
        }
        total += lse_part == -INFINITY ? 0 : exp(lse_part - max);
    }
    const float lse = total == 0 ? -INFINITY : (float)(max + log(total));
    for (int64_t i = 0; i < count; i++) {
        const float lse_part = lse_parts[offset_of(lse_stride, i, at)];
        if (lse_part == -INFINITY)
            continue;
        fa_load_row(&parts->out_parts, offset_of(parts->out_parts.stride, i, at), dims, width,
                    part);
        fa_add_scaled(sum, (float)(exp(lse_part - max) / total), part, width);
    }
    const struct side side = {.batch = at.batch};
    fa_store_row(&parts->out, fa_row_offset(&parts->out, side, at.row, at.head), dims, sum);
    if (parts->lse.object)
        fa_store_row(&parts->lse, fa_lse_offset(&parts->lse, side, at.row, at.head), 1, &lse);
}

/* Row `index` of [batch, seqlen], all heads. */
static int combine_heads(void *context, int64_t index, struct fa_worker *worker)
{
    const struct fa_parts *parts = context;
    const int64_t *shape = parts->out.shape;
    struct place at = {index / shape[1], index % shape[1], 0};
    const int64_t count = is_used(parts, at.batch, at.row) ? parts->out_parts.shape[0] : 0;
    for (; at.head < shape[2] && !fa_has_ended(worker); at.head++)
        combine_row(parts, at, count);
    return 0;
}

int fa_cpu_combine(const struct fa_parts *parts, struct fa_threads *threads)
{
    const int64_t rows = parts->out.shape[0] * parts->out.shape[1];
    return fa_parallel_for(rows, threads, combine_heads, (void *)parts);
}
