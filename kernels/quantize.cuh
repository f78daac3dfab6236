/* Quantisers: the argument of kernels/quantize_statistics.cu, kernels/quantize_heads.cu and
 * kernels/quantize.cu, which work on Q, K and V in one launch each.
 *
 * The structs are mirrored in flash_attn_sm120/quantized/device_quantize.py; a test compares both.
 *
 * Constants:
 *   DTYPE                  enum fa_dtype: of Q, K and V
 *   HEAD_DIM, HEAD_DIM_V   multiples of 16 up to 256
 *   ROTATION               size of the Hadamard blocks of Q and K; 1: they are not rotated */
#ifndef FA_QUANTIZE_CUH
#define FA_QUANTIZE_CUH

#include "layout.cuh"
#include "quantized_format.cuh"

constexpr int THREADS = 256;
constexpr int VECTOR = 16; /* dims of a thread */
static_assert(HEAD_DIM <= THREADS && HEAD_DIM_V <= THREADS, "a thread has one dim of a head");

/* One of Q, K and V. Of what is not asked for the pointer is NULL. */
struct fa_quantize_operand {
    const void *x;     /* [batch, seqlen, head, dim], dims contiguous, 16-byte aligned */
    float *statistics; /* [batch, head, chunk, 3, dim]: the sums, the least, the largest */
    void *data, *scale;
    float *head_scale; /* [batch, head] */
    float *mean;       /* [batch, head, dim] */
    struct fa_strides stride;
    int batch, seqlen, heads;
    int chunk, chunks;  /* tokens of one, and their number; 0: without statistics */
    int rows;           /* tokens of a block of quantize.cu; 0: there is no such operand */
    float head_largest; /* what the largest of a head becomes */
};

struct fa_quantize_params {
    struct fa_quantize_operand q, k, v;
};

/* How an operand is quantised, as far as kernels are compiled for it. */
template <int FORMAT_, int DIM_, int HADAMARD_, bool IS_V_> struct operand_kind {
    enum : int { FORMAT = FORMAT_, DIM = DIM_, HADAMARD = HADAMARD_, VECTORS = DIM / VECTOR };
    enum : bool { IS_V = IS_V_ };
};

/* Which head of an operand a block has, and which part of it, of as many for each head. */
struct head_part {
    fa_int64 number; /* of the head, batch by batch */
    int index, batch, head;

    __device__ __forceinline__ head_part(const fa_quantize_operand &x, unsigned block,
                                         unsigned parts)
        : number(block / parts), index(block % parts), batch(block / parts / x.heads),
          head(block / parts % x.heads)
    {
    }
};

__device__ __forceinline__ unsigned head_count(const fa_quantize_operand &x)
{
    return x.batch * x.heads;
}

/* Runs this block's work: blocks of Q come first, then those of K, then of V. */
template <class work_q, class work_k, class work_v>
__device__ __forceinline__ void run_block(const fa_quantize_params &params, unsigned block)
{
    const unsigned of_q = work_q::blocks(params.q), of_k = work_k::blocks(params.k);
    if (block < of_q)
        work_q::run(params.q, block);
    else if (block < of_q + of_k)
        work_k::run(params.k, block - of_q);
    else
        work_v::run(params.v, block - of_q - of_k);
}

#endif
