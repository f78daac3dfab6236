#include "device.h"

#include <stddef.h>
#include <string.h>

#include "arithmetic.h"

/* CUDA reserves 1 KB of a multiprocessor's shared memory for each resident block: CUDA C++
 * programming guide, "Shared Memory" of compute capability 8.x. */
#define SMEM_RESERVED_PER_BLOCK 1024

/* Shared memory is given out in steps of 128 bytes, from the same place. */
#define SMEM_STEP 128

/* Shared memory per architecture: CUDA C++ programming guide, table "Technical specifications per
 * compute capability". Multiprocessors, L2 and bandwidth: of the largest card of the kind that the
 * project knows. */
static const struct fa_device DEVICES[] = {
    {80, false, false, 108, 163 << 10, 164 << 10, 40 << 20, 2039, 0, 0},  /* A100 */
    {86, false, false, 84, 99 << 10, 100 << 10, 6 << 20, 936, 0, 0},      /* RTX 3090 class */
    {89, false, false, 128, 99 << 10, 100 << 10, 72 << 20, 1008, 0, 0},   /* RTX 4090 */
    {90, true, false, 132, 227 << 10, 228 << 10, 50 << 20, 3350, 0, 0},   /* H100, H200 */
    {100, true, false, 148, 227 << 10, 228 << 10, 126 << 20, 8000, 0, 0}, /* B200 */
    {120, true, true, 170, 99 << 10, 100 << 10, 96 << 20, 1792, FA_GEFORCE_LIKE, 0}, /* RTX 5090 */
    {121, true, true, 48, 99 << 10, 100 << 10, 24 << 20, 273, FA_PRO_LIKE, 0},       /* DGX Spark */
};

/* Warps that are resident on a multiprocessor at most, from the same table. */
static int warps_per_sm(int arch) { return arch == 80 || arch == 90 || arch == 100 ? 64 : 48; }

struct fa_device fa_device_of_arch(int arch)
{
    struct fa_device device = DEVICES[0];
    for (size_t i = 0; i < sizeof DEVICES / sizeof *DEVICES; i++)
        if (DEVICES[i].arch <= arch)
            device = DEVICES[i];
    device.arch = arch;
    return device;
}

double fa_device_mma_time(const struct fa_device *device)
{
    return device->kind == FA_GEFORCE_LIKE ? 3.6 : device->kind == FA_PRO_LIKE ? 1.8 : 1;
}

int fa_device_share(const struct fa_device *device)
{
    return device->arch / 10 == 12 ? (int)(device->dram_gbs * 1000LL / MAX(1, device->sms)) : 0;
}

/* GB10, that of DGX Spark, reaches 95 TF in attention on 48 multiprocessors, more than the 512 FLOP
 * per clock of a GeForce card allow. */
int fa_device_kind_of_name(const char *name, int arch)
{
    if (arch / 10 != 12)
        return FA_NO_KIND;
    if (strstr(name, "RTX PRO") || strstr(name, "GB10"))
        return FA_PRO_LIKE;
    return strstr(name, "GeForce") || strstr(name, "RTX 50") ? FA_GEFORCE_LIKE : FA_NO_KIND;
}

static int blocks_that_fit(const struct fa_device *device, int smem_bytes, int threads)
{
    const int by_smem = device->smem_per_sm / (smem_bytes + SMEM_RESERVED_PER_BLOCK);
    return MAX(1, MIN(by_smem, warps_per_sm(device->arch) * 32 / threads));
}

int fa_device_smem_request(const struct fa_device *device, int limits_arch, int smem_bytes,
                           int threads, int *blocks_per_sm)
{
    *blocks_per_sm = blocks_that_fit(device, smem_bytes, threads);
    if (!limits_arch)
        return smem_bytes;
    const struct fa_device limits = fa_device_of_arch(limits_arch);
    *blocks_per_sm = MIN(*blocks_per_sm, blocks_that_fit(&limits, smem_bytes, threads));
    const int one_too_many = device->smem_per_sm / (*blocks_per_sm + 1) - SMEM_RESERVED_PER_BLOCK;
    const int padded = (one_too_many / SMEM_STEP + 1) * SMEM_STEP;
    return MIN(MAX(smem_bytes, padded), device->smem_per_block);
}
