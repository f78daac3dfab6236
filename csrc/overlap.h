/* Whether tensors share memory: what is written in place must not be read, or written twice. */
#ifndef FA_OVERLAP_H
#define FA_OVERLAP_H

#include "tensor.h"

/* Whether they may share an element. Never false where they do; true for some that interleave in
 * ways that are not rows of one period. */
bool fa_tensors_overlap(const struct fa_tensor *a, const struct fa_tensor *b);

/* Whether two of its indices may have one address, as in expanded tensors. */
bool fa_tensor_overlaps_itself(const struct fa_tensor *tensor);

#endif
