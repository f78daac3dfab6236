/* What a plan needs to know of a GPU. Pure C, no Python, no CUDA. */
#ifndef FA_DEVICE_H
#define FA_DEVICE_H

#include <stdbool.h>

/* The class of a 12.x card: how fast its mma.sync is beside the rest of a multiprocessor. */
enum fa_card_kind { FA_NO_KIND, FA_GEFORCE_LIKE, FA_PRO_LIKE };

/* Why a card counts as of its class. */
enum fa_kind_reason {
    FA_KIND_BY_ARCH, /* of the card that stands for the architecture */
    FA_KIND_BY_NAME,
    FA_KIND_BY_TUNE, /* measured, as its name is unknown */
    FA_KIND_BY_SETTING,
    FA_KIND_BY_DEFAULT, /* neither: most cards are GeForce-like */
    FA_KIND_REASON_COUNT
};

struct fa_device {
    int arch;              /* compute capability, major * 10 + minor; FA_SM120_PLAN_AS changes it */
    bool has_tma;          /* which it cannot change; programmatic dependent launch came with it */
    bool has_block_scales; /* nor can it this: mma.sync with block scales, of 12.x alone */
    int sms;               /* multiprocessors */
    int smem_per_block;    /* bytes of shared memory that one block may ask for */
    int smem_per_sm;       /* bytes that the blocks of one multiprocessor share */
    int l2_bytes;
    int dram_gbs;    /* bandwidth of its memory in 10^9 bytes per second, as published */
    int kind;        /* enum fa_card_kind; FA_NO_KIND outside 12.x */
    int kind_reason; /* enum fa_kind_reason */
};

/* How many times as long mma.sync takes as on an H100, at boost clocks: FLOP per clock are 2495
 * there, 512 and 1024 on 12.x. 1 outside 12.x. */
double fa_device_mma_time(const struct fa_device *device);

/* Bytes per microsecond that a multiprocessor of a 12.x card has of the bandwidth; 0 elsewhere,
 * where what depends on it has been measured. */
int fa_device_share(const struct fa_device *device);

/* The class of a card by its name, as the driver has it; FA_NO_KIND where that is unknown, or the
 * architecture has no classes. */
int fa_device_kind_of_name(const char *name, int arch);

/* The published figures of an architecture, for planning without the card. */
struct fa_device fa_device_of_arch(int arch);

/* The shared memory that a block asks for: more than it uses where limits_arch allows fewer blocks
 * on a multiprocessor than the device does. *blocks_per_sm: how many are resident, by shared memory
 * and warps. */
int fa_device_smem_request(const struct fa_device *device, int limits_arch, int smem_bytes,
                           int threads, int *blocks_per_sm);

#endif
