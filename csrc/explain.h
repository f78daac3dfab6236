/* Plans as Python reads them: what explain() and devices() return. */
#ifndef FA_EXPLAIN_H
#define FA_EXPLAIN_H

#include <Python.h>

#include "problem.h"

struct fa_state;

/* A dict of the plan of `problem` on its own device, or on an architecture (arch > 0) without a
 * card. */
PyObject *fa_explain(struct fa_state *state, const struct fa_problem *problem, int arch);

/* The same of the backward of `problem`, whose dout is taken to lie like a new tensor. */
PyObject *fa_explain_backward(struct fa_state *state, const struct fa_problem *problem,
                              bool deterministic, int arch);

/* (driver version, [{name, arch, sms, smem_per_block, smem_per_sm, l2_bytes}, ...]). */
PyObject *fa_explain_devices(struct fa_state *state);

#endif
