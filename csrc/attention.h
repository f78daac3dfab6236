/* A validated call, computed where its tensors are: by the reference implementation in cpu/, or on
 * a CUDA device. */
#ifndef FA_ATTENTION_H
#define FA_ATTENTION_H

#include "parts.h"
#include "problem.h"
#include "scatter.h"
#include "state.h"

/* Fills out, and lse where it is wanted. 0, or -1 with the exception set. */
int fa_attention_forward(struct fa_state *state, const struct fa_problem *problem);

/* Fills the gradients. 0, or -1 with the exception set. */
int fa_attention_backward(struct fa_state *state, const struct fa_problem *problem,
                          const struct fa_gradients *gradients);

/* Parts put together: out and lse. 0 or -1. */
int fa_attention_combine(struct fa_state *state, const struct fa_parts *parts);

/* Rows of K and V to their slots. 0 or -1. */
int fa_attention_scatter(struct fa_state *state, const struct fa_scatter *scatter);

#endif
