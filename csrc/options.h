/* The options of a call, a row each: from this table come argument parsing, the methods' signatures
 * and what the readers check. A new option is a row here, its use where it belongs, and a feature
 * in tests/helpers/features.py, which is tested beside every other. */
#ifndef FA_OPTIONS_H
#define FA_OPTIONS_H

#include <Python.h>
#include <stdbool.h>

#include "shape.h"

struct fa_window {
    int left, right; /* keys before and after the diagonal; FA_UNBOUNDED: all */
};

#define FA_NO_WINDOW {FA_UNBOUNDED, FA_UNBOUNDED}
#define FA_NO_BOUND  INT32_MAX /* a max_seqlen that is None */

/* X(name, type of the field, reader in options.c, default in C, default in Python)
 *
 * What they mean is told to users by the docstrings of flash_attn_func and flash_attn_varlen_func.
 * heads_first is aten.py's: dense tensors are [batch, heads, seqlen, head_dim], results too, which
 * lie as q, k and v do.
 * PyObject fields are borrowed from the caller's arguments; NULL where they are None. */
#define FA_CALL_OPTIONS(X)                                                                         \
    X(cu_seqlens_q, PyObject *, object, NULL, "None")                                              \
    X(cu_seqlens_k, PyObject *, object, NULL, "None")                                              \
    X(max_seqlen_q, int, bound, FA_NO_BOUND, "None")                                               \
    X(max_seqlen_k, int, bound, FA_NO_BOUND, "None")                                               \
    X(seqused_q, PyObject *, object, NULL, "None")                                                 \
    X(seqused_k, PyObject *, object, NULL, "None")                                                 \
    X(page_table, PyObject *, object, NULL, "None")                                                \
    X(softmax_scale, float, scale, NAN, "None")                                                    \
    X(causal, bool, flag, false, "False")                                                          \
    X(window_size, struct fa_window, window, FA_NO_WINDOW, "(None, None)")                         \
    X(learnable_sink, PyObject *, object, NULL, "None")                                            \
    X(alibi_slopes, PyObject *, object, NULL, "None")                                              \
    X(softcap, float, softcap, 0, "0.0")                                                           \
    X(dropout_p, double, probability, 0, "0.0")                                                    \
    X(dropout_seed, PyObject *, object, NULL, "None")                                              \
    X(num_splits, int, count, 0, "0")                                                              \
    X(pack_gqa, enum fa_pack_gqa, choice, FA_PACK_AUTO, "None")                                    \
    X(attn_bias, PyObject *, object, NULL, "None")                                                 \
    X(k_descale, PyObject *, object, NULL, "None")                                                 \
    X(v_descale, PyObject *, object, NULL, "None")                                                 \
    X(q_descale, PyObject *, object, NULL, "None")                                                 \
    X(score_mod, PyObject *, object, NULL, "None")                                                 \
    X(mask_mod, PyObject *, object, NULL, "None")                                                  \
    X(deterministic, bool, flag, false, "False")                                                   \
    X(key_blocks, PyObject *, object, NULL, "None")                                                \
    X(query_blocks, PyObject *, object, NULL, "None")                                              \
    X(heads_first, bool, flag, false, "False")

/* Those of the forward alone. */
#define FA_RESULT_OPTIONS(X)                                                                       \
    X(return_lse, bool, flag, false, "False")                                                      \
    X(out, PyObject *, object, NULL, "None")                                                       \
    X(lse, PyObject *, object, NULL, "None")

/* Those of the backward, and of what explains. */
#define FA_GRADIENT_OPTIONS(X) X(bias_gradient, bool, flag, false, "False")

/* And those of the two that explain. */
#define FA_PLAN_OPTIONS(X) X(arch, int, arch, 0, "None")

/* Those of the forward whose k and v are caches, see append.h: the docstring of
 * fa2.flash_attn_with_kvcache tells what they mean. */
#define FA_CACHE_OPTIONS(X)                                                                        \
    X(k, PyObject *, object, NULL, "None")                                                         \
    X(v, PyObject *, object, NULL, "None")                                                         \
    X(rotary_cos, PyObject *, object, NULL, "None")                                                \
    X(rotary_sin, PyObject *, object, NULL, "None")                                                \
    X(cache_seqlens, PyObject *, object, NULL, "None")                                             \
    X(cache_batch_idx, PyObject *, object, NULL, "None")                                           \
    X(cache_leftpad, PyObject *, object, NULL, "None")                                             \
    X(rotary_interleaved, bool, flag, true, "True")

#define FA_OPTIONS(X)                                                                              \
    FA_CALL_OPTIONS(X)                                                                             \
    FA_RESULT_OPTIONS(X) FA_GRADIENT_OPTIONS(X) FA_PLAN_OPTIONS(X) FA_CACHE_OPTIONS(X)

struct fa_options {
#define FA_FIELD(name, type, reader, value, text) type name;
    FA_OPTIONS(FA_FIELD)
#undef FA_FIELD
};

#define FA_ID(name, type, reader, value, text) FA_OPTION_##name,
enum fa_option_id { FA_OPTIONS(FA_ID) FA_OPTION_COUNT };
#undef FA_ID

/* The part of a method's signature that the table makes: ", softmax_scale=None, causal=False". */
#define FA_OPTION_SIGNATURE(name, type, reader, value, text) ", " #name "=" text

/* Which options a method takes: those of calls, and its own. */
enum fa_method_kind {
    FA_METHOD_FORWARD,
    FA_METHOD_BACKWARD,
    FA_METHOD_EXPLAIN,
    FA_METHOD_CACHE, /* the forward, of caches */
};

/* The names as Python's interned strings, which calls pass by the same address. */
struct fa_option_names {
    PyObject *names[FA_OPTION_COUNT];
};

/* 0, or -1 with the exception set. */
int fa_option_names_make(struct fa_option_names *names);

/* Reads the options of `method`: `values` has those of the first `positional` rows, then those that
 * `kwnames` names, a tuple or NULL; causal is resolved into the window. 0, or -1 with TypeError or
 * ValueError set. */
int fa_options_read(const struct fa_option_names *names, const char *method,
                    enum fa_method_kind kind, PyObject *const *values, int positional,
                    PyObject *kwnames, struct fa_options *options);

#endif
