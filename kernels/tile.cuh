/* Tiles of keys and values: the ring in shared memory, and the two products that read it.
 *
 *     dynamic shared memory = STAGES * TILE_N * (D_PADDED + DV_PADDED) * 2 bytes
 *
 * where D_PADDED and DV_PADDED are the head dims rounded up to a multiple of 16: a stage is a K
 * tile and a V tile. forward_smem() in csrc/plan.c computes the same. */
#ifndef FA_TILE_CUH
#define FA_TILE_CUH

#include "ptx.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int TILE_M = WARPS * WARP_M;  /* queries per block */
constexpr int M_FRAGS = WARP_M / 16;    /* 16-row fragments per warp */
constexpr int S_FRAGS = SUB_N / 8;      /* 8-key columns of a sub-tile of scores */
constexpr int O_FRAGS = HEAD_DIM_V / 8; /* 8-dim columns of the output */
constexpr int D_STEPS = (HEAD_DIM + 15) / 16;

/* t of the fragment layouts in ptx.cuh: this lane's column pair. */
__device__ __forceinline__ int quad_lane() { return threadIdx.x % 4; }

using element = unsigned short; /* of either data type: only the mma knows which */
constexpr int CHUNK = 16;       /* bytes of one cp.async, and of one ldmatrix row */

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* Unrolled sub-tiles overlap, which takes registers; wide rows leave none to spare, nor does the
 * tanh of a cap. */
constexpr bool WIDE = WARP_M == 32 && (HEAD_DIM > 96 || HEAD_DIM_V > 96);
constexpr int SUB_UNROLL = WIDE || SOFTCAP ? 1 : TILE_N / SUB_N;

static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM_V % 8 == 0, "a row is whole 16-byte chunks");
static_assert(TILE_N % SUB_N == 0 && SUB_N % 16 == 0, "sub-tiles are whole mma steps");
static_assert(WARP_M == 16 || WARP_M == 32, "one or two row fragments per warp");
static_assert(STAGES >= 2, "one stage is computed on while another is loaded");

/* A [TILE_N, DIM] tile in shared memory: [segment][key][chunk], with segments of COLS chunks, as
 * wide as DIM allows, 128 bytes at best. 128 bytes hold 8 / COLS keys, and the chunks of a key are
 * permuted by an XOR with the number of its 128 bytes. Then one chunk of 8 keys, which an ldmatrix
 * reads, takes every bank once, and so do the 128 bytes that 8 threads copy. Those must be
 * contiguous, conflicts or not: see "columns of chunks" in benchmarks/NOTES.md. */
template <int DIM> struct tile_layout {
    static constexpr int CHUNKS = DIM / 8;
    static constexpr int PADDED = (CHUNKS + 1) / 2 * 2;
    static constexpr int COLS = PADDED % 8 == 0 ? 8 : PADDED % 4 == 0 ? 4 : 2;
    static constexpr int ROW_BYTES = COLS * CHUNK;
    static constexpr int SEGMENT_BYTES = TILE_N * ROW_BYTES;
    static constexpr int BYTES = TILE_N * PADDED * CHUNK;

    /* Of a chunk of the first segment. */
    static __device__ __forceinline__ unsigned offset(int key, int chunk)
    {
        return key * ROW_BYTES + (chunk ^ key / (8 / COLS) % COLS) * CHUNK;
    }
    /* From the address of chunk 0 or 1 of a key, `key` (a multiple of 8) and `chunk` (even) on. */
    static __device__ __forceinline__ unsigned moved(unsigned address, int key, int chunk)
    {
        return (address ^ chunk % COLS * CHUNK) + chunk / COLS * SEGMENT_BYTES + key * ROW_BYTES;
    }
};
using K_layout = tile_layout<HEAD_DIM>;
using V_layout = tile_layout<HEAD_DIM_V>;
constexpr int STAGE_BYTES = K_layout::BYTES + V_layout::BYTES;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;

/* The share of a tile that one thread copies, or looks at: chunk `col` (then col + COLS, ...) of
 * key `row` (then row + ROWS, ...). */
template <int DIM> struct copy_place : tile_layout<DIM> {
    using layout = tile_layout<DIM>;
    static constexpr int ROWS = THREADS / layout::COLS;
    static_assert(TILE_N % ROWS == 0 || ROWS % TILE_N == 0, "no thread copies beyond the tile");
    int row, col;

    __device__ __forceinline__ copy_place()
    {
        row = read_thread_index() / layout::COLS;
        col = read_thread_index() % layout::COLS;
    }

    /* Calls f(r, c, offset in the tile) for each chunk, r keys and c chunks from the first. */
    template <class F> __device__ __forceinline__ void each(F f) const
    {
        const unsigned first = layout::offset(row, col);
        if (ROWS > TILE_N && row >= TILE_N)
            return; /* more threads than chunks */
#pragma unroll
        for (int r = 0; r < TILE_N; r += ROWS) {
            /* Steps of 8 keys find the same permutation; a single warp may step by 4. */
            const unsigned key =
                (first ^ layout::offset(r, 0) % layout::ROW_BYTES) + r * layout::ROW_BYTES;
#pragma unroll
            for (int c = 0; c < layout::PADDED; c += layout::COLS)
                f(r, c, key + c / layout::COLS * layout::SEGMENT_BYTES);
        }
    }
};

/* The tiles that a block goes through: of one KV head, from tile_end - 1 downwards. */
struct tile_walk {
    int batch, head_kv, tile_end, tiles;
};

/* Whether this thread's share of the V tile at `smem` holds an inf or NaN. */
__device__ __forceinline__ bool holds_nonfinite(unsigned smem)
{
    /* Adding one to a full exponent carries into the (cleared) sign bit of its half word. */
    constexpr unsigned EXPONENT = DTYPE_BF16 ? 0x7f807f80 : 0x7c007c00;
    constexpr unsigned ONE = DTYPE_BF16 ? 0x00800080 : 0x04000400;
    unsigned carries = 0;
    copy_place<HEAD_DIM_V>().each([&](int, int, unsigned offset) {
        const uint4 x = ld_shared_16(smem + offset);
        carries |= ((x.x & EXPONENT) + ONE) | ((x.y & EXPONENT) + ONE);
        carries |= ((x.z & EXPONENT) + ONE) | ((x.w & EXPONENT) + ONE);
    });
    return carries & 0x80008000;
}

/* This lane's row for an ldmatrix of 16 keys x 16 dims, whose matrices 0 and 1, then 2 and 3, are
 * the B operand of one mma: of K two chunks of 8 keys, of V two times 8 keys of one chunk. */
__device__ __forceinline__ unsigned K_lane_offset()
{
    const int lane = threadIdx.x % 32;
    return K_layout::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
__device__ __forceinline__ unsigned V_lane_offset()
{
    const int lane = threadIdx.x % 32;
    return V_layout::offset(lane % 16, lane / 16);
}

/* The stage of the ring that is computed on, and this lane's rows for ldmatrix in it. */
struct ring_place {
    unsigned smem, stage, K_smem, V_smem; /* addresses; `stage` is an offset */

    __device__ __forceinline__ explicit ring_place(unsigned smem) : smem(smem) {}

    __device__ __forceinline__ void rewind()
    {
        stage = 0;
        K_smem = smem + K_lane_offset();
        V_smem = smem + K_layout::BYTES + V_lane_offset();
    }
    __device__ __forceinline__ void advance()
    {
        const int step = is_last() ? STAGE_BYTES - RING_BYTES : STAGE_BYTES;
        stage += step;
        K_smem += step;
        V_smem += step;
    }
    __device__ __forceinline__ bool is_last() const { return stage == RING_BYTES - STAGE_BYTES; }
    __device__ __forceinline__ unsigned before() const
    {
        return stage == 0 ? RING_BYTES - STAGE_BYTES : stage - STAGE_BYTES;
    }
    __device__ __forceinline__ unsigned V_tile() const { return smem + stage + K_layout::BYTES; }
};

/* S [WARP_M, SUB_N] = Q [WARP_M, HEAD_DIM] * K [SUB_N, HEAD_DIM]^T */
__device__ __forceinline__ void scores(float (&S_rmem)[M_FRAGS][S_FRAGS][4],
                                       const unsigned (&Q_rmem)[M_FRAGS][D_STEPS][4],
                                       unsigned K_smem)
{
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                S_rmem[m][n][e] = 0.0f;

#pragma unroll
    for (int d = 0; d < D_STEPS; d++)
#pragma unroll
        for (int n = 0; n < S_FRAGS; n += 2) {
            unsigned K_rmem[4]; /* [2 key columns][2 halves of the 16 dims] */
            ldmatrix_x4(K_rmem, K_layout::moved(K_smem, 8 * n, 2 * d));
#pragma unroll
            for (int m = 0; m < M_FRAGS; m++) {
                mma_m16n8k16(S_rmem[m][n], Q_rmem[m][d], K_rmem[0], K_rmem[1]);
                mma_m16n8k16(S_rmem[m][n + 1], Q_rmem[m][d], K_rmem[2], K_rmem[3]);
            }
        }
}

/* O [WARP_M, HEAD_DIM_V] += P [WARP_M, SUB_N] * V [SUB_N, HEAD_DIM_V] */
__device__ __forceinline__ void add_values(float (&O_rmem)[M_FRAGS][O_FRAGS][4],
                                           const unsigned (&P_rmem)[M_FRAGS][S_FRAGS / 2][4],
                                           unsigned V_smem)
{
#pragma unroll
    for (int k = 0; k < S_FRAGS / 2; k++)
#pragma unroll
        for (int n = 0; n < O_FRAGS; n += 2) {
            unsigned V_rmem[4]; /* [2 dim columns][2 halves of the 16 keys] */
            ldmatrix_x4_trans(V_rmem, V_layout::moved(V_smem, 16 * k, n));
#pragma unroll
            for (int m = 0; m < M_FRAGS; m++) {
                mma_m16n8k16(O_rmem[m][n], P_rmem[m][k], V_rmem[0], V_rmem[1]);
                if (n + 1 < O_FRAGS)
                    mma_m16n8k16(O_rmem[m][n + 1], P_rmem[m][k], V_rmem[2], V_rmem[3]);
            }
        }
}

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

#endif
