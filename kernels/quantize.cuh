/* Quantisers: the argument of kernels/quantize_extrema.cu and kernels/quantize.cu.
 *
 * The struct is mirrored in flash_attn_sm120/quantized/device_quantize.py; a test compares both. */
#ifndef FA_QUANTIZE_CUH
#define FA_QUANTIZE_CUH

#include "ptx.cuh"

constexpr int THREADS = 256;
static_assert(HEAD_DIM <= THREADS, "a thread has one dim");

/* Of each chunk of tokens and dim of the head, in a workspace. */
struct chunk_extrema {
    float sum, least, largest;
};

struct fa_quantize_params {
    const void *x;              /* [batch, seqlen, head, dim], dims contiguous */
    chunk_extrema *extrema;     /* [batch, head, chunk, dim]; NULL: int8 without a mean */
    void *data;                 /* [batch, seqlen, head, dim] */
    float *scale;               /* int8: [batch, head, block of rows]; else [batch, head] */
    float *mean;                /* [batch, head, dim]; NULL: it is not subtracted */
    struct fa_strides x_stride; /* in elements */
    int seqlen, heads;
    int chunk, chunks; /* tokens of one, and their number */
    int rows;          /* tokens of a block; of int8, that share a scale */
};

/* Maxima that NaN wins, as in torch. */
__device__ __forceinline__ float nan_max(float a, float b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ float nan_min(float a, float b) { return a < b || a != a ? a : b; }

/* Which block this is, of as many for each head. */
struct quantize_block {
    long long number; /* of the head, batch by batch */
    int index, batch, head;
    const element *x;

    __device__ __forceinline__ quantize_block(const fa_quantize_params &params, unsigned blocks)
        : number(blockIdx.x / blocks), index(blockIdx.x % blocks), batch(number / params.heads),
          head(number % params.heads),
          x(static_cast<const element *>(params.x) + batch * params.x_stride.batch +
            head * params.x_stride.head)
    {
    }
};

#endif
