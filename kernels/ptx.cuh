/* Every PTX instruction of the kernels that CUDA C cannot say, one wrapper each.
 *
 * Fragment layouts, for lane = 4g + t:
 *   A [16 rows, 16 k]     rows g, g + 8; k 2t, 2t + 1, and k + 8
 *   B [16 k, 8 columns]   k 2t, 2t + 1, and k + 8; column g
 *   C [16 rows, 8 cols]   rows g, g + 8; columns 2t, 2t + 1 */
#ifndef FA_PTX_CUH
#define FA_PTX_CUH

#include "element.cuh"

/* blockIdx.x and threadIdx.x, read anew at every call: what is computed from them can then be
 * computed again where it is needed, instead of occupying registers in between. */
__device__ __forceinline__ unsigned read_block_index()
{
    unsigned x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}

__device__ __forceinline__ unsigned read_thread_index()
{
    unsigned x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/* x, but nothing that follows from it can be computed before this point, and kept in registers
 * until then. */
__device__ __forceinline__ int not_before(int x)
{
    asm volatile("" : "+r"(x));
    return x;
}

/* What lies in global memory, said to the compiler where it cannot tell. */
__device__ __forceinline__ float ld_global(const float *gmem)
{
    float x;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(gmem));
    return x;
}
/* Of what no kernel writes meanwhile: read when it is needed, and not if it is not. */
__device__ __forceinline__ int ld_global(const int *gmem)
{
    int x;
    asm("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(gmem));
    return x;
}
__device__ __forceinline__ unsigned short ld_global(const unsigned short *gmem)
{
    unsigned short x;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(gmem));
    return x;
}

/* Two neighbours, at a multiple of their size. */
__device__ __forceinline__ unsigned ld_global_pair(const unsigned short *gmem)
{
    unsigned x;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(gmem));
    return x;
}
__device__ __forceinline__ float2 ld_global_pair(const float *gmem)
{
    float2 x;
    asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(gmem));
    return x;
}

/* Shared memory is addressed with 32 bits: one register, and constant offsets cost nothing. */
__device__ __forceinline__ unsigned smem_address(const void *pointer)
{
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

/* Copies `bytes` (16 or 0) from global to shared memory without registers, and fills up to 16
 * with zeros. */
__device__ __forceinline__ void cp_async_16(unsigned smem, const void *gmem, int bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(bytes)
                 : "memory");
}

/* The same of 8 bytes, or 0. */
__device__ __forceinline__ void cp_async_8(unsigned smem, const void *gmem, int bytes)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem), "l"(gmem), "r"(bytes)
                 : "memory");
}

/* Closes this thread's group of copies. */
__device__ __forceinline__ void cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most PENDING of this thread's newest groups are still on their way. */
template <int PENDING> __device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Waits for all of this thread's copies, in a group or in none. */
__device__ __forceinline__ void cp_async_wait_all()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* ---- mbarriers and the TMA: from 9.0 on ------------------------------------------------------ */

/* An mbarrier is eight bytes of shared memory. A phase of it ends when `arrivals` have come, and
 * all bytes that were expected. */
__device__ __forceinline__ void mbarrier_init(unsigned mbarrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals)
                 : "memory");
}

/* The TMA sees the mbarriers that this thread has initialised. */
__device__ __forceinline__ void fence_mbarrier_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(unsigned mbarrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}

/* Arrives, and `bytes` more have to come. */
__device__ __forceinline__ void mbarrier_expect(unsigned mbarrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier),
                 "r"(bytes)
                 : "memory");
}

/* Waits for the end of the phase of this parity: the first phase has parity 0. */
__device__ __forceinline__ void mbarrier_wait(unsigned mbarrier, unsigned parity)
{
    unsigned done;
    do {
        asm volatile("{\n"
                     "    .reg .pred done;\n"
                     "    mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "    selp.u32 %0, 1, 0, done;\n"
                     "}"
                     : "=r"(done)
                     : "r"(mbarrier), "r"(parity)
                     : "memory");
    } while (!done);
}

/* What this thread has written to shared memory comes before what the TMA writes there. */
__device__ __forceinline__ void fence_before_tma()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const fa_tensor_map *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Copies a box of a tensor, the one at these coordinates, to shared memory. */
__device__ __forceinline__ void tma_load_4d(unsigned smem, const fa_tensor_map *map,
                                            unsigned mbarrier, int x0, int x1, int x2, int x3)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cta.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem),
                 "l"(map), "r"(mbarrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
                 : "memory");
}

/* Copies contiguous bytes to shared memory. */
__device__ __forceinline__ void bulk_load(unsigned smem, const void *gmem, int bytes,
                                          unsigned mbarrier)
{
    asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(smem),
                 "l"(gmem), "r"(bytes), "r"(mbarrier)
                 : "memory");
}

/* True in one lane of the warp. */
__device__ __forceinline__ bool elect_one()
{
    unsigned elected;
    asm volatile("{\n"
                 "    .reg .pred elected;\n"
                 "    elect.sync _|elected, 0xffffffff;\n"
                 "    selp.u32 %0, 1, 0, elected;\n"
                 "}"
                 : "=r"(elected));
    return elected;
}

/* __syncthreads_or() of COUNT threads of the block, which meet at the barrier ID. */
template <int ID, int COUNT> __device__ __forceinline__ bool barrier_or(bool x)
{
    unsigned any;
    asm volatile("{\n"
                 "    .reg .pred x, any;\n"
                 "    setp.ne.u32 x, %1, 0;\n"
                 "    bar.red.or.pred any, %2, %3, x;\n"
                 "    selp.u32 %0, 1, 0, any;\n"
                 "}"
                 : "=r"(any)
                 : "r"(static_cast<unsigned>(x)), "n"(ID), "n"(COUNT)
                 : "memory");
    return any;
}

/* ---- between blocks ------------------------------------------------------------------------- */

/* Adds to global memory: atomic, and unordered among blocks. */
__device__ __forceinline__ void red_add(float *sum, float x)
{
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(sum), "f"(x) : "memory");
}

/* Adds four floats to global memory: atomic, and unordered among blocks. */
__device__ __forceinline__ void red_add_4(float *sums, const float (&x)[4])
{
    if (__CUDA_ARCH__ >= 900)
        asm volatile("red.global.v4.f32.add [%0], {%1, %2, %3, %4};" ::"l"(sums), "f"(x[0]),
                     "f"(x[1]), "f"(x[2]), "f"(x[3])
                     : "memory");
    else
        for (int i = 0; i < 4; i++)
            red_add(sums + i, x[i]);
}

__device__ __forceinline__ int atomic_add(int *counter, int x)
{
    int before;
    asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(x)
                 : "memory");
    return before;
}

/* The value of a semaphore that other blocks increment. */
__device__ __forceinline__ int semaphore_load(const int *semaphore)
{
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(semaphore) : "memory");
    return value;
}

/* Increments a semaphore. Additions to global memory that this thread has made, or that a barrier
 * orders before this, come before those of a block that has loaded the new value. */
__device__ __forceinline__ void semaphore_release(int *semaphore)
{
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(semaphore) : "memory");
}

/* ---- between kernels ------------------------------------------------------------------------ */

/* Once all blocks have come here or ended, the next kernel may start that was launched to overlap
 * this one: see overlaps_previous in csrc/plan.h. Before 9.0 there are none. */
__device__ __forceinline__ void let_next_kernel_start()
{
    if constexpr (__CUDA_ARCH__ >= 900)
        asm volatile("griddepcontrol.launch_dependents;");
}

/* Waits until the kernel before this one has ended and what it wrote can be read. */
__device__ __forceinline__ void wait_for_previous_kernel()
{
    if constexpr (__CUDA_ARCH__ >= 900)
        asm volatile("griddepcontrol.wait;" ::: "memory");
}

/* ---- between groups of warps ---------------------------------------------------------------- */

/* The barrier `id` of COUNT threads of the block, of which some only announce that they have come
 * this far, and others wait for them. */
template <int COUNT> __device__ __forceinline__ void barrier_arrive(int id)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(COUNT) : "memory");
}
template <int COUNT> __device__ __forceinline__ void barrier_sync(int id)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(COUNT) : "memory");
}

/* ---- matrices ------------------------------------------------------------------------------- */

__device__ __forceinline__ uint4 ld_shared_16(unsigned smem)
{
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(smem)
                 : "memory");
    return x;
}

__device__ __forceinline__ float2 ld_shared_2(unsigned smem)
{
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(smem) : "memory");
    return x;
}

__device__ __forceinline__ unsigned ld_shared(unsigned smem)
{
    unsigned x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(smem) : "memory");
    return x;
}

__device__ __forceinline__ void st_shared(unsigned smem, unsigned x)
{
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(smem), "r"(x) : "memory");
}

__device__ __forceinline__ void st_shared_16(unsigned smem, uint4 x)
{
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
}

/* Two 16x16 matrices of bytes, transposed; lane i passes the address of row i % 16 of matrix i / 16
 * and receives, of matrix m in words 2m and 2m + 1, bytes of rows 4t to 4t + 3: of column g, and of
 * column 8 + g. The words in order are an operand A of 16 columns. 12.x alone, as what follows. */
__device__ __forceinline__ void ldmatrix_x2_trans_bytes(unsigned (&x)[4], unsigned smem)
{
    asm volatile("ldmatrix.sync.aligned.m16n16.x2.trans.shared.b8 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(smem)
                 : "memory");
}

/* C [16, 8] += A [16, K] * B [K, 8], blocks of K times powers of two (K = 32, e4m3), or of 16 along
 * K times numbers of e4m3 without sign (K = 64, e2m1). The factors of row m of A are in lane
 * 4(m % 8) + 2 THREAD_A + m / 8, those of column n of B in lane 4n + THREAD_B: the one byte BYTE_A
 * or BYTE_B, or all four. */
#define FA_SCALED_MMA(kind)                                                                        \
    asm("mma.sync.aligned." kind                                                                   \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, "                        \
        "%10, {%11, %12}, %13, {%14, %15};"                                                        \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(factors_a),            \
          "n"(BYTE_A), "n"(THREAD_A), "r"(factors_b), "n"(BYTE_B), "n"(THREAD_B))
template <int BYTE_A, int THREAD_A, int BYTE_B, int THREAD_B>
__device__ __forceinline__ void mma_mxf8(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1, unsigned factors_a, unsigned factors_b)
{
    FA_SCALED_MMA("m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X"
                  ".f32.e4m3.e4m3.f32.ue8m0");
}
template <int THREAD_A, int THREAD_B>
__device__ __forceinline__ void mma_nvf4(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1, unsigned factors_a, unsigned factors_b)
{
    constexpr int BYTE_A = 0, BYTE_B = 0;
    FA_SCALED_MMA("m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X"
                  ".f32.e2m1.e2m1.f32.ue4m3");
}
#undef FA_SCALED_MMA

/* Four 8x8 matrices; lane i passes the address of row i % 8 of matrix i / 8 and receives, from
 * matrix m in word m, the elements 2t, 2t+1 of row g. */
__device__ __forceinline__ void ldmatrix_x4(unsigned (&x)[4], unsigned smem)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(smem)
                 : "memory");
}

/* The same, transposed: the elements g of the rows 2t, 2t+1. */
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&x)[4], unsigned smem)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(smem)
                 : "memory");
}

/* C [16, 8] += A [16, 16] * B [16, 8], accumulated in fp32; of A and B fp16 where that is the type,
 * else bf16. */
template <int TYPE = DTYPE>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1)
{
#define FA_MMA(type)                                                                               \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                             \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if (TYPE == FA_FLOAT16)
        FA_MMA("f16");
    else
        FA_MMA("bf16");
#undef FA_MMA
}

/* C [16, 8] += A [16, 32] * B [32, 8] of e4m3, accumulated in fp32. From 8.9 on. */
__device__ __forceinline__ void mma_m16n8k32_e4m3(float (&c)[4], const unsigned (&a)[4],
                                                  unsigned b0, unsigned b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* C [16, 8] += A [16, 32] * B [32, 8] of int8, accumulated in int32: C holds the bits of those. */
__device__ __forceinline__ void mma_m16n8k32_s8(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                unsigned b1)
{
    int sum[4];
    for (int i = 0; i < 4; i++)
        sum[i] = __float_as_int(c[i]);
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    for (int i = 0; i < 4; i++)
        c[i] = __int_as_float(sum[i]);
}

/* The e4m3 product with a scale of 1 for each 32 numbers: of 12.x alone, whose GeForce cards take
 * half as long for it. */
__device__ __forceinline__ void mma_m16n8k32_mxfp8(float (&c)[4], const unsigned (&a)[4],
                                                   unsigned b0, unsigned b1)
{
    constexpr unsigned ONES = 0x7f7f7f7f; /* 2^0, four times */
    constexpr unsigned short FIRST = 0;   /* the byte, and the threads, that have them */
    asm("mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X"
        ".f32.e4m3.e4m3.f32.ue8m0 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, "
        "{%10}, {%11, %11}, {%10}, {%11, %11};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(ONES), "n"(FIRST));
}

/* C [16, 8] += A [16, 16] * B [16, 8] of fp16, accumulated in fp16: GeForce cards take half as long
 * for it. */
__device__ __forceinline__ void mma_m16n8k16_fp16(unsigned (&c)[2], const unsigned (&a)[4],
                                                  unsigned b0, unsigned b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
        "{%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Rounds two floats to fp16 where that is the type, else to bf16; `low` goes to the lower half,
 * which is the lower address. */
template <int TYPE = DTYPE> __device__ __forceinline__ unsigned pack(float low, float high)
{
    unsigned x;
    if (TYPE == FA_FLOAT16)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

/* Two halves of ones or zeros: the upper bit of byte `i` of `low`, and of byte `j` of `high`. */
__device__ __forceinline__ unsigned byte_signs(unsigned low, unsigned high, int i, int j)
{
    unsigned x;
    const int of_low = 8 + i, of_high = 12 + j; /* + 8: the sign of a byte, for all of its bits */
    asm("prmt.b32 %0, %1, %2, %3;"
        : "=r"(x)
        : "r"(low), "r"(high), "r"(of_low * 0x11 + of_high * 0x1100));
    return x;
}

__device__ __forceinline__ float from_fp16(unsigned short x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

/* The two numbers of a pair, the lower half first. */
template <int TYPE = DTYPE> __device__ __forceinline__ float2 unpack(unsigned x)
{
    if (TYPE == FA_BFLOAT16) /* the upper half of a float */
        return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
    return make_float2(from_fp16(static_cast<unsigned short>(x)),
                       from_fp16(static_cast<unsigned short>(x >> 16)));
}

/* Four e4m3 numbers, exactly, as pairs of fp16: the lower two, then the upper two. From 8.9 on, as
 * what follows. */
__device__ __forceinline__ void widen_e4m3(unsigned (&x)[2], unsigned bytes)
{
    asm("{\n"
        "    .reg .b16 low, high;\n"
        "    mov.b32 {low, high}, %2;\n"
        "    cvt.rn.f16x2.e4m3x2 %0, low;\n"
        "    cvt.rn.f16x2.e4m3x2 %1, high;\n"
        "}"
        : "=r"(x[0]), "=r"(x[1])
        : "r"(bytes));
}

/* Rounds four floats to e4m3, x[0] to the lowest address: what is beyond 448, inf included, becomes
 * that. */
__device__ __forceinline__ unsigned pack_e4m3(const float (&x)[4])
{
    unsigned bytes;
    asm("{\n"
        "    .reg .b16 low, high;\n"
        "    cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "    cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "    mov.b32 %0, {low, high};\n"
        "}"
        : "=r"(bytes)
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
    return bytes;
}

/* Rounds eight floats to e2m1, x[0] to the lowest four bits: what is beyond 6 becomes that. 12.x
 * alone. */
__device__ __forceinline__ unsigned pack_e2m1(const float (&x)[8])
{
    unsigned nibbles;
    asm("{\n"
        "    .reg .b8 b0, b1, b2, b3;\n"
        "    cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\n"
        "    cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n"
        "    cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\n"
        "    cvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n"
        "    mov.b32 %0, {b0, b1, b2, b3};\n"
        "}"
        : "=r"(nibbles)
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
    return nibbles;
}

__device__ __forceinline__ float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* NaN where either is. */
__device__ __forceinline__ float min_or_nan(float a, float b)
{
    float x;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
}
__device__ __forceinline__ float max_or_nan(float a, float b)
{
    float x;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
}

#endif
