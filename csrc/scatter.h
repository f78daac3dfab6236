/* New rows of K and V that are written to their slots in caches of pages, by a call of its own:
 * slot s is row s % page_size of page s / page_size. Validated: everything that cpu/scatter.c and
 * launch.c need to know. */
#ifndef FA_SCATTER_H
#define FA_SCATTER_H

#include "tensor.h"

enum fa_scatter_tensor {
    FA_SCATTER_K,         /* [tokens or more, heads, head_dim] */
    FA_SCATTER_V,         /* [tokens or more, heads, head_dim_v] */
    FA_SCATTER_K_CACHE,   /* [pages, page_size, heads, head_dim], of k's type or both e4m3 */
    FA_SCATTER_V_CACHE,   /* [pages, page_size, heads, head_dim_v] */
    FA_SCATTER_SLOTS,     /* [tokens] int32; negative: the token has none */
    FA_SCATTER_K_DESCALE, /* fp32, one number: what rows in e4m3 are divided by; object NULL: 1 */
    FA_SCATTER_V_DESCALE,
    FA_SCATTER_TENSORS
};

struct fa_scatter {
    struct fa_tensor tensors[FA_SCATTER_TENSORS];
    int tokens, heads, page_size;
    int slots; /* that the caches have */
    bool is_e4m3;
};

/* Reads and checks the arguments, in the order of the enum, into a zeroed struct. 0, or -1 with
 * TypeError or ValueError set; fa_scatter_release in both cases. */
int fa_scatter_read(struct fa_dlpack *dlpack, PyObject *const *arguments,
                    struct fa_scatter *scatter);

/* As fa_problem_recheck. */
int fa_scatter_recheck(const struct fa_scatter *scatter);

void fa_scatter_release(struct fa_scatter *scatter);

#endif
