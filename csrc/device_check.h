/* FA_SM120_CHECK=1: lengths and pages that are on a CUDA device, checked on the host. */
#ifndef FA_DEVICE_CHECK_H
#define FA_DEVICE_CHECK_H

#include "driver.h"
#include "problem.h"

/* Waits for the stream and looks at lengths and pages as for CPU tensors; the context of the
 * problem's device is current. 0, or -1 with the exception set: ValueError with the sequence's
 * number; RuntimeError where the stream is under graph capture and cannot be waited for. */
int fa_device_check(struct fa_driver *driver, const struct fa_problem *problem, CUstream stream);

#endif
