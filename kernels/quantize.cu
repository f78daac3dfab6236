/* Q, K and V to int8, e4m3, mxfp8 or nvfp4, without the means and in the scales of heads that
 * quantize_heads.cu has left.
 *
 * A block has 64 tokens of a head, or as many as share a scale in int8. Blocks run in the opposite
 * order of those of quantize_statistics.cu: what these have read last may be in L2.
 *
 * Constants, beside those of quantize.cuh:
 *   Q_FORMAT, K_FORMAT, V_FORMAT   enum quantized_format; FORMAT_16BIT: is left as it is */
#include "params.h"

#include "quantize_formats.cuh"
#include "quantize_scale.cuh"
#include "quantize_vector.cuh"

constexpr int TOKENS = 64; /* at most, of a block */
constexpr bool IS_V_TRANSPOSED = V_FORMAT == FORMAT_NVFP4;
constexpr int PITCH = HEAD_DIM_V + 8; /* columns of V are read without bank conflicts */

__shared__ float means[THREADS];
__shared__ __align__(16) element V_tile[IS_V_TRANSPOSED ? TOKENS * PITCH : 1];

__device__ __forceinline__ void store(void *to, const unsigned (&words)[4])
{
    *static_cast<uint4 *>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ void store(void *to, const unsigned (&words)[2])
{
    *static_cast<uint2 *>(to) = make_uint2(words[0], words[1]);
}

/* The codes of a row of `dims` numbers, from the one at `dim` on, and their scale. */
template <int FORMAT>
__device__ __forceinline__ void store(const fa_quantize_operand &x, fa_int64 row, fa_int64 dims,
                                      int dim, const coded_vector<FORMAT> &coded)
{
    using coded_t = coded_vector<FORMAT>;
    store(static_cast<char *>(x.data) + (row * dims + dim) * coded_t::CODE_BITS / 8, coded.words);
    if constexpr (coded_t::GROUP)
        if (dim % coded_t::GROUP == 0)
            static_cast<unsigned char *>(x.scale)[(row * dims + dim) / coded_t::GROUP] =
                coded.scale;
}

/* Along the dims. */
template <class kind> struct rows {
    enum : int { PER_THREAD = (TOKENS * kind::VECTORS + THREADS - 1) / THREADS };

    const fa_quantize_operand &x;
    const head_part &part;
    raw_vector raw[PER_THREAD];

    __device__ __forceinline__ int row_of(int i) const
    {
        return (threadIdx.x + i * THREADS) / kind::VECTORS;
    }
    __device__ __forceinline__ int token_of(int i) const { return part.index * x.rows + row_of(i); }
    __device__ __forceinline__ int dim_of(int i) const
    {
        return (threadIdx.x + i * THREADS) % kind::VECTORS * VECTOR;
    }
    __device__ __forceinline__ bool exists(int i) const
    {
        return row_of(i) < x.rows && token_of(i) < x.seqlen;
    }

    __device__ __forceinline__ rows(const fa_quantize_operand &x, const head_part &part)
        : x(x), part(part)
    {
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++)
            raw[i] = load_vector(x, part, token_of(i), dim_of(i), exists(i));
    }

    __device__ __forceinline__ void values(float (&y)[VECTOR], int i) const
    {
        widen<kind>(y, raw[i]);
        for (int j = 0; j < VECTOR; j++)
            y[j] -= means[dim_of(i) + j];
    }

    __device__ __forceinline__ float block_scale() const
    {
        float largest = 0;
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            float y[VECTOR];
            values(y, i);
            if (exists(i))
                largest = max_or_nan(largest, largest_of(y));
        }
        return scale_of(block_max(largest), 127);
    }

    __device__ __forceinline__ void write(float scale) const
    {
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            float y[VECTOR];
            values(y, i);
            const coded_vector<kind::FORMAT> coded = encode<kind::FORMAT>(y, scale);
            const fa_int64 token = static_cast<fa_int64>(part.batch) * x.seqlen + token_of(i);
            if (exists(i))
                store(x, token * x.heads + part.head, kind::DIM, dim_of(i), coded);
        }
    }
};

/* V in e2m1: along the tokens, of which 32 are permuted among themselves. */
template <class kind>
__device__ __forceinline__ void quantize_columns(const fa_quantize_operand &x,
                                                 const head_part &part, float scale)
{
    const int begin = part.index * TOKENS;
    for (int i = threadIdx.x; i < TOKENS * kind::VECTORS; i += THREADS) {
        const int row = i / kind::VECTORS, dim = i % kind::VECTORS * VECTOR;
        const raw_vector raw = load_vector(x, part, begin + row, dim, begin + row < x.seqlen);
        for (int j = 0; j < 2; j++)
            reinterpret_cast<uint4 *>(V_tile + row * PITCH + dim)[j] = raw.half[j];
    }
    __syncthreads();
    const fa_int64 stored = ceil_div(x.seqlen, 32) * 32ll;
    for (int i = threadIdx.x; i < TOKENS / VECTOR * kind::DIM; i += THREADS) {
        const int first = i % (TOKENS / VECTOR) * VECTOR, dim = i / (TOKENS / VECTOR);
        float y[VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            const int at = first + j,
                      row = (at & ~31) + (at / 2 % 4) * 8 + (at / 8 % 4) * 2 + at % 2;
            const float value = unpack(V_tile[row * PITCH + dim]).x;
            y[j] = begin + row < x.seqlen ? value - means[dim] : 0;
        }
        const coded_vector<kind::FORMAT> coded = encode<kind::FORMAT>(y, scale);
        if (begin + first < stored)
            store(x, part.number * kind::DIM + dim, stored, begin + first, coded);
    }
}

template <class kind> struct quantizer {
    static __device__ __forceinline__ unsigned blocks(const fa_quantize_operand &x)
    {
        return x.rows ? head_count(x) * ceil_div(x.seqlen, x.rows) : 0;
    }

    static __device__ __forceinline__ void run(const fa_quantize_operand &x, unsigned block)
    {
        if constexpr (kind::FORMAT != FORMAT_16BIT) {
            const head_part part(x, block, ceil_div(x.seqlen, x.rows));
            if (threadIdx.x < kind::DIM)
                means[threadIdx.x] = x.mean ? x.mean[part.number * kind::DIM + threadIdx.x] : 0;
            float scale = x.head_scale ? x.head_scale[part.number] : 1;
            if constexpr (kind::IS_V && IS_V_TRANSPOSED) {
                quantize_columns<kind>(x, part, scale);
            } else {
                const rows<kind> own(x, part);
                __syncthreads();
                if (kind::FORMAT == FORMAT_INT8) {
                    scale = own.block_scale();
                    if (!threadIdx.x)
                        static_cast<float *>(x.scale)[block] = scale;
                }
                own.write(scale);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize(const __grid_constant__ fa_quantize_params params)
{
    run_block<quantizer<operand_kind<Q_FORMAT, HEAD_DIM, ROTATION, false>>,
              quantizer<operand_kind<K_FORMAT, HEAD_DIM, ROTATION, false>>,
              quantizer<operand_kind<V_FORMAT, HEAD_DIM_V, 1, true>>>(params,
                                                                      gridDim.x - 1 - blockIdx.x);
}
