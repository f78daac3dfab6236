/* Quantisers: the argument of kernels/quantize.cu.
 *
 * The structs are mirrored in flash_attn_sm120/quantized/device_quantize.py; a test compares both.
 *
 * Constants:
 *   DTYPE                  enum fa_dtype: of Q, K and V
 *   HEAD_DIM, HEAD_DIM_V   multiples of 16 up to 256
 *   ROTATION               size of the Hadamard blocks of Q and K; 1: they are not rotated
 *   Q_FORMAT, K_FORMAT, V_FORMAT   enum quantized_format; FORMAT_16BIT: is left as it is */
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
    int *done;         /* [batch, head]: chunks, and 1 more for mean and scale; zeros before */
    void *data, *scale;
    float *head_scale; /* [batch, head] */
    float *mean;       /* [batch, head, dim] */
    struct fa_strides stride;
    int batch, seqlen, heads;
    int chunk, chunks;  /* tokens of one, and their number; 0: without statistics */
    int rows, parts;    /* tokens of a block that quantises, and the blocks of a head */
    int lag;            /* heads whose statistics are ahead, see quantize_order.cuh */
    float head_largest; /* what the largest of a head becomes */
};

struct fa_quantize_params {
    struct fa_quantize_operand q, k, v;
    int *started; /* blocks; 0 before. NULL: none waits */
};

/* How an operand is quantised, as far as kernels are compiled for it. */
template <int FORMAT_, int DIM_, int HADAMARD_, bool IS_V_> struct operand_kind {
    enum : int { FORMAT = FORMAT_, DIM = DIM_, HADAMARD = HADAMARD_, VECTORS = DIM / VECTOR };
    enum : bool { IS_TRANSPOSED = IS_V_ && FORMAT == FORMAT_NVFP4 };
};

/* What a block has of an operand: a chunk of a head, whose statistics it computes, or a part, which
 * it quantises. */
struct block_work {
    bool is_chunk;
    int head_number, index; /* of the head, batch by batch; of the chunk or the part */
    int batch, head;

    __device__ __forceinline__ block_work(const fa_quantize_operand &x, bool is_chunk,
                                          int head_number, int index)
        : is_chunk(is_chunk), head_number(head_number), index(index), batch(head_number / x.heads),
          head(head_number % x.heads)
    {
    }
    /* Of [batch, head, dim]. */
    __device__ __forceinline__ fa_int64 first_dim(int dims) const
    {
        return static_cast<fa_int64>(head_number) * dims;
    }
};

/* What lies in shared memory at different times. */
constexpr int TOKENS = 64;            /* at most, of a block that quantises */
constexpr int PITCH = HEAD_DIM_V + 8; /* of V in 4 bits: its columns have no bank conflicts */
__shared__ union {
    float of_thread[VECTOR][THREADS];
    element V_tile[V_FORMAT == FORMAT_NVFP4 ? TOKENS * PITCH : 1];
    uint4 aligned;
} shared;

#endif
