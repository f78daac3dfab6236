/* The number formats of quantised tensors, see docs/quantized.md, and the values of their codes. */
#ifndef FA_QUANTIZED_FORMAT_CUH
#define FA_QUANTIZED_FORMAT_CUH

#include "ptx.cuh"

/* Mirrored in flash_attn_sm120/quantized/formats.py. */
enum quantized_format { FORMAT_16BIT, FORMAT_INT8, FORMAT_E4M3, FORMAT_MXFP8, FORMAT_NVFP4 };

__device__ __forceinline__ float from_e4m3(unsigned byte)
{
    unsigned pairs[2];
    widen_e4m3(pairs, byte);
    return unpack<FA_FLOAT16>(pairs[0]).x;
}

/* The bits of an e2m1 number are those of fp16 with another bias. */
__device__ __forceinline__ float from_e2m1(unsigned nibble)
{
    return from_fp16((nibble & 8) << 12 | (nibble & 7) << 9) * 16384.0f;
}

__device__ __forceinline__ float from_e8m0(unsigned byte)
{
    return __uint_as_float(byte == 0 ? 1 << 22 : byte == 255 ? 0x7fc00000 : byte << 23);
}

#endif
