/* How rows of tensors lie in shared memory, and how they get there. */
#ifndef FA_LAYOUT_CUH
#define FA_LAYOUT_CUH

#include "ptx.cuh"

/* This lane, 4g + t in the fragment layouts of ptx.cuh: g is its row, t its column pair. */
__device__ __forceinline__ unsigned lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ unsigned quad_row() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int quad_lane() { return threadIdx.x % 4; }

/* The sum of what the four lanes of a quad have, which share a row. */
__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

/* All bits that any of the four has. */
__device__ __forceinline__ unsigned quad_or(unsigned x)
{
    x |= __shfl_xor_sync(0xffffffff, x, 1);
    return x | __shfl_xor_sync(0xffffffff, x, 2);
}

/* The max of what the four lanes of a quad have. */
__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ unsigned quad_max(unsigned x)
{
    x = max(x, __shfl_xor_sync(0xffffffff, x, 1));
    return max(x, __shfl_xor_sync(0xffffffff, x, 2));
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* A [ROWS, DIM] tile in shared memory: [segment][row][chunk], with segments of COLS chunks, as wide
 * as DIM allows, 128 bytes at best; rows are padded to a multiple of ALIGN. Chunks are swizzled by
 * an XOR with the number of their 128 bytes, which hold 8 / COLS rows: for COLS of 2, 4 and 8 the
 * same as CU_TENSOR_MAP_SWIZZLE_32B, _64B and _128B. Then one chunk of 8 rows, which an ldmatrix
 * reads, takes every bank once, and so do the 128 bytes that 8 threads copy. Those must be
 * contiguous, conflicts or not: see "columns of chunks" in benchmarks/NOTES.md. */
template <int DIM, int ROWS_, int ALIGN = MMA_K, class T = ::element> struct tile_layout {
    using element = T;
    static constexpr int ROWS = ROWS_;
    static constexpr int CHUNK_ELEMENTS = FA_CHUNK_BYTES / sizeof(T);
    static constexpr int CHUNKS = DIM / CHUNK_ELEMENTS;
    static constexpr int PADDED = fa_padded_dim(DIM, ALIGN) / CHUNK_ELEMENTS;
    static constexpr int COLS = fa_segment_chunks(PADDED);
    static constexpr int ROW_BYTES = COLS * FA_CHUNK_BYTES;
    static constexpr int SEGMENT_BYTES = ROWS * ROW_BYTES;
    static constexpr int BYTES = ROWS * PADDED * FA_CHUNK_BYTES;

    /* The swizzled offset of a chunk of the first segment. */
    static __device__ __forceinline__ unsigned offset(int row, int chunk)
    {
        return row * ROW_BYTES + (chunk ^ row / (8 / COLS) % COLS) * FA_CHUNK_BYTES;
    }
    /* A swizzled step: from the address of chunk 0 or 1 of a row to the chunk that lies `row` rows
     * (a multiple of 8) and `chunk` chunks (even) further. */
    static __device__ __forceinline__ unsigned moved(unsigned address, int row, int chunk)
    {
        return (address ^ chunk % COLS * FA_CHUNK_BYTES) + chunk / COLS * SEGMENT_BYTES +
               row * ROW_BYTES;
    }
};

/* The share of a tile that one of some threads copies, or looks at: chunk `col` (then col + COLS,
 * ...) of row `row` (then row + STEP, ...). */
template <class layout, int THREADS> struct copy_place {
    using element = typename layout::element;
    static constexpr int STEP = THREADS / layout::COLS;
    static_assert(layout::ROWS % STEP == 0 || STEP % layout::ROWS == 0,
                  "no thread copies beyond the tile");
    int row, col;

    __device__ __forceinline__ copy_place()
    {
        row = read_thread_index() / layout::COLS;
        col = read_thread_index() % layout::COLS;
    }

    /* Calls f(r, c, offset in the tile) for each chunk, r rows and c chunks from the first. */
    template <class F> __device__ __forceinline__ void each(F f) const
    {
        const unsigned first = layout::offset(row, col);
        if (STEP > layout::ROWS && row >= layout::ROWS)
            return; /* more threads than chunks */
#pragma unroll
        for (int r = 0; r < layout::ROWS; r += STEP) {
            /* Steps of 8 rows find the same permutation; a single warp may step by 4. */
            const unsigned row_r =
                (first ^ layout::offset(r, 0) % layout::ROW_BYTES) + r * layout::ROW_BYTES;
#pragma unroll
            for (int c = 0; c < layout::PADDED; c += layout::COLS)
                f(r, c, row_r + c / layout::COLS * layout::SEGMENT_BYTES);
        }
    }

    /* Where this thread starts to copy from: its first chunk of the tile whose first row is `row0`,
     * of one batch entry and head. */
    __device__ __forceinline__ const element *
    first_chunk(const void *tensor, const fa_strides &stride, int batch, int head, int row0) const
    {
        return static_cast<const element *>(tensor) + batch * stride.batch + head * stride.head +
               (row0 + row) * stride.seqlen + col * layout::CHUNK_ELEMENTS;
    }

    /* Whether such a chunk is one of the first `rows` rows, and does not pad its row. */
    __device__ __forceinline__ bool exists(int r, int c, int rows) const
    {
        const bool padding = c + layout::COLS > layout::CHUNKS && col + c >= layout::CHUNKS;
        return !padding && (rows >= layout::ROWS || row + r < rows);
    }
    /* Copies a tile to `smem`, this thread from `gmem` on. Rows from `rows` on, and the chunks that
     * pad a row, become zeros: there no memory is read. */
    __device__ __forceinline__ void copy(unsigned smem, const element *gmem, fa_int64 row_stride,
                                         int rows) const
    {
        each([&](int r, int c, unsigned offset) {
            const int bytes = exists(r, c, rows) ? FA_CHUNK_BYTES : 0;
            cp_async_16(smem + offset, gmem + r * row_stride + c * layout::CHUNK_ELEMENTS, bytes);
        });
    }
};

/* A 4x4 transpose of words in the four lanes of a quad: lane t passes word t of four rows, and
 * receives row t. */
__device__ __forceinline__ uint4 quad_transpose(unsigned x0, unsigned x1, unsigned x2, unsigned x3)
{
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    const unsigned from01 = __shfl_xor_sync(0xffffffff, odd ? x0 : x1, 1);
    const unsigned from23 = __shfl_xor_sync(0xffffffff, odd ? x2 : x3, 1);
    (odd ? x0 : x1) =
        from01; /* now x0, x1 are two words of row t % 2, and x2, x3 of row t % 2 + 2 */
    (odd ? x2 : x3) = from23;
    const unsigned first = __shfl_xor_sync(0xffffffff, high ? x0 : x2, 2);
    const unsigned second = __shfl_xor_sync(0xffffffff, high ? x1 : x3, 2);
    return high ? make_uint4(first, second, x2, x3) : make_uint4(x0, x1, first, second);
}

/* Writes row g (half 0) or g + 8 (half 1) of C fragments: the lanes of a quad hold 4 bytes each of
 * every 16-byte chunk of their row; transposed, each holds every fourth chunk whole, and a row is
 * written 64 contiguous bytes at a time. */
template <int FRAGS, int MAX_FRAGS>
__device__ __forceinline__ void store_row(element *row, const float (&C)[MAX_FRAGS][4], int half,
                                          float scale, bool exists, int frags = FRAGS)
{
#pragma unroll
    for (int n = 0; n < FRAGS; n += 4) {
        unsigned word[4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const float *x = C[min(n + c, FRAGS - 1)] + 2 * half;
            word[c] = pack(x[0] * scale, x[1] * scale);
        }
        const uint4 chunk = quad_transpose(word[0], word[1], word[2], word[3]);
        if (exists && n + quad_lane() < min(frags, FRAGS))
            *reinterpret_cast<uint4 *>(row + (n + quad_lane()) * 8) = chunk;
    }
}

#endif
