/* A score_mod or mask_mod as flash_attn_sm120/mods/ hands it over: the number of the text that is
 * compiled into the variant, and the tensors that this text reads. Only Python knows the text. */
#ifndef FA_MODS_H
#define FA_MODS_H

#include "tensor.h"

struct fa_captured_tensor {
    struct fa_tensor tensor;
    struct fa_tensor gradient; /* fp32, contiguous, zeros to add to; object NULL: none */
    struct fa_tensor sums;     /* see fa_captured_params; object NULL: it needs none */
};

struct fa_mod {
    int number; /* of the text; 0: there is no mod */
    int count;
    struct fa_captured_tensor *captured; /* [count], allocated; NULL: none */
};

/* Reads (number, (captured tensor, ...), (gradient or None, ...)), the last of which may be empty,
 * and is, but in the backward. 0, or -1 with the exception set; fa_mod_release in both
 * cases. */
int fa_mod_read(struct fa_dlpack *dlpack, PyObject *object, const char *name, struct fa_mod *mod);

/* What messages call the captured tensors of the mod `name`. */
const char *fa_mod_captured_name(const char *name);

/* Whether they leave a result to itself. 0, or -1 with ValueError set. */
int fa_mod_check_apart(const struct fa_mod *mod, const char *name, const struct fa_tensor *result,
                       const char *result_name);

/* As fa_tensor_recheck. */
int fa_mod_recheck(const struct fa_mod *mod, const char *name);

bool fa_mod_has_gradients(const struct fa_mod *mod);

/* The elements of a captured tensor. */
int64_t fa_mod_elements(const struct fa_captured_tensor *captured);

/* Makes the sums of all gradients, where `like` is. 0, or -1 with the exception set. */
int fa_mod_allocate_sums(struct fa_dlpack *dlpack, const struct fa_tensor *like,
                         const struct fa_mod *mod);

void fa_mod_release(struct fa_mod *mod);

#endif
