/* A call of flash_attn_with_kvcache: k and v of its problem are caches, and rows that are appended
 * to them are read and checked here. Kernels append them before attention reads them, see
 * kernels/kv_append.cu and cpu/append.h. */
#ifndef FA_APPEND_H
#define FA_APPEND_H

#include "problem.h"

/* Reads and checks what the options say of caches, into a problem that was read. 0, or -1 with the
 * exception set. */
int fa_append_read(struct fa_dlpack *dlpack, struct fa_problem *problem);

#endif
