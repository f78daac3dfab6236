/* Parts of attention that are put together by a call of their own: each of other keys, say of other
 * devices. Validated: everything that cpu/combine.c and launch.c need to know. */
#ifndef FA_PARTS_H
#define FA_PARTS_H

#include "tensor.h"

/* A packed side is a batch of one here. */
struct fa_parts {
    struct fa_tensor out_parts;  /* [parts, batch, seqlen, heads, head_dim], of any type */
    struct fa_tensor lse_parts;  /* [parts, batch, seqlen, heads] fp32, natural logarithm */
    struct fa_tensor out;        /* [batch, seqlen, heads, head_dim], of any type */
    struct fa_tensor lse;        /* [batch, heads, seqlen] fp32; object NULL where not wanted */
    struct fa_tensor cu_seqlens; /* [sequences + 1] int32; object NULL where not packed */
    struct fa_tensor seqused;    /* [sequences] int32; object NULL: all of each sequence */
    int sequences;
};

#define FA_MAX_PARTS_HEAD_DIM 512

/* Reads and checks (out_parts, lse_parts, out, lse, cu_seqlens, seqused), the last three or None,
 * into a zeroed struct. 0, or -1 with TypeError or ValueError set; fa_parts_release in both cases.
 */
int fa_parts_read(struct fa_dlpack *dlpack, PyObject *const *arguments, struct fa_parts *parts);

/* As fa_problem_recheck. */
int fa_parts_recheck(const struct fa_parts *parts);

void fa_parts_release(struct fa_parts *parts);

/* Of out, of all heads: less than 2^31. */
int64_t fa_parts_rows(const struct fa_parts *parts);

#endif
