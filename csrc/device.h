/* What a plan needs to know of a GPU. Pure C, no Python, no CUDA. */
#ifndef FA_DEVICE_H
#define FA_DEVICE_H

#include <stdbool.h>

struct fa_device {
    int arch;           /* compute capability, major * 10 + minor; FA_SM120_PLAN_AS changes it */
    bool has_tma;       /* which it cannot change; programmatic dependent launch came with it */
    int sms;            /* multiprocessors */
    int smem_per_block; /* bytes of shared memory that one block may ask for */
    int smem_per_sm;    /* bytes that the blocks of one multiprocessor share */
    int l2_bytes;
};

/* The published figures of an architecture, for planning without the card. */
struct fa_device fa_device_of_arch(int arch);

/* The shared memory that a block asks for: more than it uses where limits_arch allows fewer blocks
 * on a multiprocessor than the device does. *blocks_per_sm: how many are resident, by shared memory
 * and warps. */
int fa_device_smem_request(const struct fa_device *device, int limits_arch, int smem_bytes,
                           int threads, int *blocks_per_sm);

#endif
