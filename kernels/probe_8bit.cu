/* What the matrix instructions of 8 and 4 bits do with known operands: kernels count on where their
 * fragments and factors are, and on their sums. Only 12.x has all of them.
 *
 * One warp per block. Block (i, y) does probe y, a row of PROBES in probe_8bit.py, on its own
 * words: of each lane 4 of A, 2 of B, 4 of C, factors of A and of B; results are 4.
 *
 * Constants:
 *   DTYPE   enum fa_dtype in params.h: any, no operand here has it */
#include "params.h"

#include "ptx.cuh"

constexpr int OPERANDS = 12, RESULTS = 4;

enum probe { E4M3, MXF8, MXF8_SELECTED, NVF4, NVF4_SELECTED, LDMATRIX };

extern "C" __global__ void __launch_bounds__(32)
    probe_8bit(const unsigned *operands, unsigned *results)
{
    __shared__ uint4 rows[32];
    const unsigned lane = threadIdx.x, block = blockIdx.y * gridDim.x + blockIdx.x;
    unsigned x[OPERANDS], words[RESULTS], a[4];
    float c[4];
    for (int i = 0; i < OPERANDS; i++)
        x[i] = operands[(block * OPERANDS + i) * 32 + lane];
    for (int i = 0; i < 4; i++) {
        a[i] = x[i];
        c[i] = __uint_as_float(x[6 + i]);
    }
    const unsigned smem = smem_address(rows);
    switch (blockIdx.y) {
    case E4M3: mma_m16n8k32_e4m3(c, a, x[4], x[5]); break;
    case MXF8: mma_mxf8<0, 0, 0, 0>(c, a, x[4], x[5], x[10], x[11]); break;
    case MXF8_SELECTED: mma_mxf8<2, 1, 1, 3>(c, a, x[4], x[5], x[10], x[11]); break;
    case NVF4: mma_nvf4<0, 0>(c, a, x[4], x[5], x[10], x[11]); break;
    case NVF4_SELECTED: mma_nvf4<1, 2>(c, a, x[4], x[5], x[10], x[11]); break;
    }
    for (int i = 0; i < RESULTS; i++)
        words[i] = __float_as_uint(c[i]);
    if (blockIdx.y == LDMATRIX) { /* a lane writes its words of A as a row, and names another row */
        st_shared_16(smem + 16 * lane, make_uint4(a[0], a[1], a[2], a[3]));
        __syncwarp();
        ldmatrix_x2_trans_bytes(words, smem + 16 * ((5 * lane + 3) % 32));
    }
    for (int i = 0; i < RESULTS; i++)
        results[(block * RESULTS + i) * 32 + lane] = words[i];
}
