/* The data type of Q, K, V and O, by the constant DTYPE, a number of enum fa_dtype; K and V of the
 * forward, and Q with them, may have another, see kv_operands.cuh. */
#ifndef FA_ELEMENT_CUH
#define FA_ELEMENT_CUH

#include "geometry.h"

constexpr bool IS_BF16 = DTYPE == FA_BFLOAT16;
constexpr int ELEMENT_BYTES = fa_element_bytes(DTYPE);
constexpr int CHUNK_ELEMENTS = fa_chunk_elements(DTYPE);
constexpr int MMA_K = fa_mma_k(DTYPE);

using element = unsigned short; /* bits: only the mma and pack() know the type */
static_assert(sizeof(element) == ELEMENT_BYTES || DTYPE == FA_FLOAT32, "as the type has");

#endif
