/* Rows of tensors as fp32, whatever they are stored as, and what attention does with them: dot
 * products and weighted sums. */
#ifndef FA_CPU_ROWS_H
#define FA_CPU_ROWS_H

#include <stdint.h>

#include "../tensor.h"

/* ---- ranges of rows -------------------------------------------------------------------------- */

struct range {
    int64_t begin, end;
};

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t clamp(int64_t value, int64_t low, int64_t high)
{
    return max64(low, min64(value, high));
}

static inline int64_t count_of(struct range range) { return range.end - range.begin; }

static inline struct range intersection(struct range a, struct range b)
{
    return (struct range){max64(a.begin, b.begin), min64(a.end, b.end)};
}

/* The tile of `range` that starts at `from`, or where the range does; empty after its end. Tiles
 * end at multiples of `size` wherever the range begins. */
static inline struct range tile_from(struct range range, int64_t from, int size)
{
    int64_t begin = max64(from, range.begin);
    return (struct range){begin, min64(begin - begin % size + size, range.end)};
}

/* ---- rows in memory -------------------------------------------------------------------------- */

/* Partial sums of a dot product. Rows in fp32 are padded with zeros to a multiple of it. */
#define FA_LANES 16

/* n, padded. */
int fa_width(int n);

/* Where the rows of a sequence are in a tensor [batch, seqlen, heads, n], or [total, heads, n], or
 * [pages, page_size, heads, n]. */
struct side {
    int64_t batch;    /* 0 where the tensor is packed */
    int64_t begin;    /* its first row there; else 0 */
    int64_t length;   /* how many there are */
    const int *pages; /* the page of its first rows, of the next ones, ...; NULL: not in pages */
    int64_t page_size;
};

/* Where a row of a head starts, in elements. */
int64_t fa_row_offset(const struct fa_tensor *tensor, struct side side, int64_t row, int64_t head);

/* And its number in a tensor like lse, [batch, heads, seqlen] or [heads, total]. */
int64_t fa_lse_offset(const struct fa_tensor *tensor, struct side side, int64_t row, int64_t head);

/* n elements from `offset` on as fp32, then zeros up to `width`. */
void fa_load_row(const struct fa_tensor *tensor, int64_t offset, int n, int width, float *row);

void fa_store_row(const struct fa_tensor *tensor, int64_t offset, int n, const float *row);

/* Rows of a sequence, of one head: a matrix [rows, fa_width(n)]. */
void fa_load_rows(const struct fa_tensor *tensor, struct side side, struct range rows, int64_t head,
                  float *matrix);
void fa_store_rows(const struct fa_tensor *tensor, struct side side, struct range rows,
                   int64_t head, const float *matrix);

/* The nearest number of e4m3, saturating. */
float fa_round_to_e4m3(float value);

/* What e4m3 rows of a sequence and KV head are multiplied by; 1 where there is no factor. */
float fa_descale(const struct fa_tensor *descale, int64_t number, int64_t head_kv);

/* ---- arithmetic ------------------------------------------------------------------------------ */

/* In fp64, where products of fp32 are exact: scores and their gradients take part in differences
 * that are far smaller than they are. */
double fa_dot(const float *restrict a, const float *restrict b, int width);

/* sum += factor * row */
void fa_add_scaled(float *restrict sum, float factor, const float *restrict row, int width);

#endif
