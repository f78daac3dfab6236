/* Quantisers: from Q, K and V to codes, by blocks of 64 tokens of a head, or of as many as share a
 * scale in int8. */
#ifndef FA_QUANTIZE_CODES_CUH
#define FA_QUANTIZE_CODES_CUH

#include "quantize_formats.cuh"
#include "quantize_order.cuh"
#include "quantize_scale.cuh"
#include "quantize_vector.cuh"

__shared__ __align__(16) float means[THREADS];

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

/* Along the dims. Loads begin before the wait for the mean, which hides their latency. */
template <class kind> struct rows {
    enum : int { PER_THREAD = (TOKENS * kind::VECTORS + THREADS - 1) / THREADS };

    const fa_quantize_operand &x;
    const block_work &work;
    raw_vector raw[PER_THREAD];
    float values[PER_THREAD][VECTOR];

    __device__ __forceinline__ int row_of(int i) const
    {
        return (threadIdx.x + i * THREADS) / kind::VECTORS;
    }
    __device__ __forceinline__ int token_of(int i) const { return work.index * x.rows + row_of(i); }
    __device__ __forceinline__ int dim_of(int i) const
    {
        return (threadIdx.x + i * THREADS) % kind::VECTORS * VECTOR;
    }
    __device__ __forceinline__ bool exists(int i) const
    {
        return row_of(i) < x.rows && token_of(i) < x.seqlen;
    }

    __device__ __forceinline__ rows(const fa_quantize_operand &x, const block_work &work)
        : x(x), work(work)
    {
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++)
            raw[i] = load_vector(x, work, token_of(i), dim_of(i), exists(i));
    }

    __device__ __forceinline__ void subtract_means()
    {
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            widen<kind>(values[i], raw[i]);
            const float4 *mean = reinterpret_cast<const float4 *>(means + dim_of(i));
#pragma unroll
            for (int j = 0; j < VECTOR / 4; j++) {
                const float4 four = mean[j];
                values[i][4 * j] -= four.x;
                values[i][4 * j + 1] -= four.y;
                values[i][4 * j + 2] -= four.z;
                values[i][4 * j + 3] -= four.w;
            }
        }
    }

    __device__ __forceinline__ float block_scale() const
    {
        float largest = 0;
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++)
            if (exists(i))
                largest = max_or_nan(largest, largest_of(values[i]));
        return scale_of(block_max(largest), 127);
    }

    __device__ __forceinline__ void write(float scale)
    {
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            const auto coded = encode<kind::FORMAT>(values[i], scale);
            const fa_int64 token = static_cast<fa_int64>(work.batch) * x.seqlen + token_of(i);
            if (exists(i))
                store(x, token * x.heads + work.head, kind::DIM, dim_of(i), coded);
        }
    }
};

/* The scale of the head, once it is there; its mean goes to `means`. */
template <class kind>
__device__ __forceinline__ float read_head(const fa_quantize_operand &x, const block_work &work)
{
    wait_for_head(x, work);
    const int dim = threadIdx.x;
    if (dim < kind::DIM)
        means[dim] = x.mean ? x.mean[work.first_dim(kind::DIM) + dim] : 0;
    __syncthreads();
    return x.head_scale ? x.head_scale[work.head_number] : 1;
}

/* V in e2m1: along the tokens, of which 32 are permuted among themselves. */
template <class kind>
__device__ __forceinline__ void quantize_columns(const fa_quantize_operand &x,
                                                 const block_work &work)
{
    const int begin = work.index * TOKENS;
    for (int i = threadIdx.x; i < TOKENS * kind::VECTORS; i += THREADS) {
        const int row = i / kind::VECTORS, dim = i % kind::VECTORS * VECTOR;
        const raw_vector raw = load_vector(x, work, begin + row, dim, begin + row < x.seqlen);
        for (int j = 0; j < 2; j++)
            reinterpret_cast<uint4 *>(shared.V_tile + row * PITCH + dim)[j] = raw.half[j];
    }
    const float scale = read_head<kind>(x, work);
    const fa_int64 stored = ceil_div(x.seqlen, 32) * 32ll;
#pragma unroll 1
    for (int i = threadIdx.x; i < TOKENS / VECTOR * kind::DIM; i += THREADS) {
        const int first = i % (TOKENS / VECTOR) * VECTOR, dim = i / (TOKENS / VECTOR);
        float y[VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            const int at = first + j;
            const int row = (at & ~31) + (at / 2 % 4) * 8 + (at / 8 % 4) * 2 + at % 2;
            const float value = unpack(shared.V_tile[row * PITCH + dim]).x;
            y[j] = begin + row < x.seqlen ? value - means[dim] : 0;
        }
        const coded_vector<kind::FORMAT> coded = encode<kind::FORMAT>(y, scale);
        if (begin + first < stored)
            store(x, work.first_dim(kind::DIM) + dim, stored, begin + first, coded);
    }
}

template <class kind>
__device__ __forceinline__ void quantize_rows(const fa_quantize_operand &x, const block_work &work)
{
    rows<kind> own(x, work);
    float scale = read_head<kind>(x, work);
    own.subtract_means();
    if (kind::FORMAT == FORMAT_INT8) {
        scale = own.block_scale();
        if (!threadIdx.x)
            static_cast<float *>(
                x.scale)[static_cast<fa_int64>(work.head_number) * x.parts + work.index] = scale;
    }
    own.write(scale);
}

#endif
