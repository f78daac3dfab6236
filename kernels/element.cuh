/* The data type of Q, K, V and O, by the constant DTYPE, a number of enum fa_dtype. */
#ifndef FA_ELEMENT_CUH
#define FA_ELEMENT_CUH

#include "geometry.h"

/* What PTX calls the type of this number. fp32, which combine.cu alone writes, has no pairs. */
#define FA_PTX_TYPE_0          "bf16"
#define FA_PTX_TYPE_1          "f16"
#define FA_PTX_TYPE_2          "bf16"
#define FA_PTX_TYPE_OF_(dtype) FA_PTX_TYPE_##dtype
#define FA_PTX_TYPE_OF(dtype)  FA_PTX_TYPE_OF_(dtype)
#define FA_PTX_TYPE            FA_PTX_TYPE_OF(DTYPE)
static_assert(FA_FLOAT16 == 1 && FA_BFLOAT16 == 2, "the names above go by these numbers");

constexpr bool IS_BF16 = DTYPE == FA_BFLOAT16;
constexpr int ELEMENT_BYTES = fa_element_bytes(DTYPE);
constexpr int CHUNK_ELEMENTS = fa_chunk_elements(DTYPE);
constexpr int MMA_K = fa_mma_k(DTYPE);

using element = unsigned short; /* bits: only the mma and pack() know the type */
static_assert(sizeof(element) == ELEMENT_BYTES || DTYPE == FA_FLOAT32, "as the type has");

#endif
