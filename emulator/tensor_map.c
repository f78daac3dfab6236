/* Tensor maps: cuTensorMapEncodeTiled, and the boxes that bulk tensor copies move by them.
 *
 * A box lies in shared memory row after row, without gaps. A swizzle of 32, 64 or 128 bytes spreads
 * its 16-byte chunks: bits 4 ... of the address are XORed with bits 7 ..., the number of the
 * 128-byte row, as many bits as it takes to number the chunks of the span. */
#include "bulk.h"

#include <string.h>

#define TENSOR_MAP_MAGIC 0x70616d726f736e74u

enum {
    TENSOR_MAP_BYTES = 128,
    TENSOR_MAP_ALIGNMENT = 64,
    MAX_BOX = 256,
    MAX_ELEMENT_STRIDE = 8,
    BANKS_BYTES = 128, /* a row through all banks, which the swizzles count */
};

_Static_assert(sizeof(struct tensor_map) <= TENSOR_MAP_BYTES, "a tensor map has 128 bytes");

/* ---- cuTensorMapEncodeTiled ----------------------------------------------------------------- */

/* CUresults */
enum { SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 801 };

/* By CUtensorMapDataType. The others round or unpack what they copy. */
static const struct {
    uint8_t bytes;
    bool is_float;
} DATA_TYPES[] = {
    {1, false}, /* UINT8 */
    {2, false}, /* UINT16 */
    {4, false}, /* UINT32 */
    {4, false}, /* INT32 */
    {8, false}, /* UINT64 */
    {8, false}, /* INT64 */
    {2, true},  /* FLOAT16 */
    {4, true},  /* FLOAT32 */
    {8, true},  /* FLOAT64 */
    {2, true},  /* BFLOAT16 */
};

enum {
    KNOWN_DATA_TYPES = sizeof DATA_TYPES / sizeof *DATA_TYPES,
    LAST_DATA_TYPE = 15,
    LAST_INTERLEAVE = 2,
    LAST_SWIZZLE = 6,
    LAST_L2_PROMOTION = 3,
};

/* By CUtensorMapSwizzle. The others swizzle larger chunks. */
static const uint8_t SPANS[] = {CHUNK, 32, 64, 128};

static int check_modes(int data_type, uint32_t rank, int interleave, int swizzle, int l2_promotion,
                       int oob_fill)
{
    const uint32_t least_rank = interleave ? 3 : 1;
    if (data_type < 0 || data_type > LAST_DATA_TYPE || interleave < 0 ||
        interleave > LAST_INTERLEAVE || swizzle < 0 || swizzle > LAST_SWIZZLE || l2_promotion < 0 ||
        l2_promotion > LAST_L2_PROMOTION || oob_fill < 0 || oob_fill > 1)
        return INVALID_VALUE;
    if (rank < least_rank || rank > MAX_RANK)
        return INVALID_VALUE;
    if (data_type >= KNOWN_DATA_TYPES || swizzle >= (int)sizeof SPANS || interleave)
        return NOT_SUPPORTED;
    return oob_fill && !DATA_TYPES[data_type].is_float ? INVALID_VALUE : SUCCESS;
}

/* The innermost dimension has no stride of elements: the driver ignores that one. */
static int check_dimension(int d, uint64_t size, uint32_t box, uint32_t element_stride)
{
    if (size == 0 || size > 1ull << 32 || box == 0 || box > MAX_BOX || element_stride == 0 ||
        element_stride > MAX_ELEMENT_STRIDE)
        return INVALID_VALUE;
    return d > 0 && element_stride > 1 ? NOT_SUPPORTED : SUCCESS;
}

static bool is_stride(uint64_t stride) { return stride % CHUNK == 0 && stride < 1ull << 40; }

int encode_tensor_map(void *map, int data_type, uint32_t rank, void *address,
                      const uint64_t *global_dim, const uint64_t *global_strides,
                      const uint32_t *box_dim, const uint32_t *element_strides, int interleave,
                      int swizzle, int l2_promotion, int oob_fill)
{
    int result = check_modes(data_type, rank, interleave, swizzle, l2_promotion, oob_fill);
    if (result != SUCCESS)
        return result;
    if (!map || (uintptr_t)map % TENSOR_MAP_ALIGNMENT || !address || (uintptr_t)address % CHUNK ||
        !global_dim || !box_dim || !element_strides || (rank > 1 && !global_strides))
        return INVALID_VALUE;
    struct tensor_map made = {.magic = TENSOR_MAP_MAGIC,
                              .address = (uintptr_t)address,
                              .rank = (uint8_t)rank,
                              .element = DATA_TYPES[data_type].bytes,
                              .span = SPANS[swizzle],
                              .fills_nan = oob_fill == 1};
    for (int d = 0; d < (int)rank; d++) {
        result = check_dimension(d, global_dim[d], box_dim[d], element_strides[d]);
        if (result != SUCCESS)
            return result;
        if (d > 0 && !is_stride(global_strides[d - 1]))
            return INVALID_VALUE;
        made.size[d] = global_dim[d];
        made.box[d] = box_dim[d];
        made.stride[d] = d > 0 ? (int64_t)global_strides[d - 1] : made.element;
    }
    const uint32_t row = made.box[0] * made.element;
    if (row % CHUNK || (made.span > CHUNK && row > made.span))
        return INVALID_VALUE;
    memset(map, 0, TENSOR_MAP_BYTES);
    memcpy(map, &made, sizeof made);
    return SUCCESS;
}

/* ---- use ------------------------------------------------------------------------------------ */

bool fetch_tensor_map(struct warp *warp, const struct instruction *in, int lane, int operand,
                      struct tensor_map *map)
{
    const struct launch *launch = warp->block->launch;
    const uint64_t address = address_of(warp, in, operand, lane);
    uint8_t bytes[TENSOR_MAP_BYTES];
    if (address % TENSOR_MAP_ALIGNMENT) {
        fault(warp, in, 1u << lane, "a tensor map at address %#llx, which is not aligned to %d",
              (unsigned long long)address, TENSOR_MAP_ALIGNMENT);
        return false;
    }
    const uint64_t params = launch->program->param_bytes;
    const bool is_param = address < params && params - address >= TENSOR_MAP_BYTES;
    for (uint32_t at = 0; at < TENSOR_MAP_BYTES; at += CHUNK) {
        const void *chunk = is_param ? launch->params + address + at
                                     : read_global(warp, in, lane, address + at, CHUNK);
        if (!chunk)
            return false;
        memcpy(bytes + at, chunk, CHUNK);
    }
    memcpy(map, bytes, sizeof *map);
    if (map->magic != TENSOR_MAP_MAGIC)
        fault(warp, in, 1u << lane, "no tensor map is at address %#llx",
              (unsigned long long)address);
    return map->magic == TENSOR_MAP_MAGIC;
}

struct tensor_map map_bytes(uint64_t address, uint32_t bytes)
{
    return (struct tensor_map){.address = address,
                               .size = {bytes},
                               .stride = {1},
                               .box = {bytes},
                               .rank = 1,
                               .element = 1,
                               .span = CHUNK};
}

static uint32_t row_bytes(const struct tensor_map *map) { return map->box[0] * map->element; }

static uint64_t row_count(const struct tensor_map *map)
{
    uint64_t count = 1;
    for (int d = 1; d < map->rank; d++)
        count *= map->box[d];
    return count;
}

uint32_t box_bytes(const struct tensor_map *map)
{
    return row_bytes(map) * (uint32_t)row_count(map);
}

/* Where the pattern of the box's swizzle begins anew. */
static uint32_t box_alignment(const struct tensor_map *map)
{
    if (map->rank == 1) /* plain bytes */
        return CHUNK;
    return map->span > CHUNK ? map->span / CHUNK * BANKS_BYTES : BANKS_BYTES;
}

bool check_box(const struct transfer *transfer)
{
    const struct tensor_map *map = &transfer->map;
    const struct block *block = transfer->warp->block;
    const uint32_t alignment = box_alignment(map);
    const uint64_t end = transfer->shared + row_count(map) * row_bytes(map);
    const lanes where = 1u << transfer->lane;
    if (map->span > CHUNK && row_bytes(map) != map->span)
        fault(transfer->warp, transfer->in, where,
              "rows of %u bytes with a swizzle of %u: where they go is not documented",
              row_bytes(map), map->span);
    else if (transfer->shared % alignment)
        fault(transfer->warp, transfer->in, where,
              "shared address %u is not aligned to %u, as this box must be", transfer->shared,
              alignment);
    else if (transfer->shared < SHARED_BASE || end > SHARED_BASE + block->shared_bytes)
        fault(transfer->warp, transfer->in, where,
              "a box at the shared addresses %u to %llu, and the block has %u to %u",
              transfer->shared, (unsigned long long)end, SHARED_BASE,
              SHARED_BASE + block->shared_bytes);
    else
        return true;
    return false;
}

/* Offset in shared memory of a byte of the box. */
static uint32_t place(const struct transfer *transfer, uint32_t byte)
{
    const uint32_t address = transfer->shared + byte;
    const uint32_t chunks = transfer->map.span / CHUNK;
    return (address ^ (address / BANKS_BYTES & (chunks - 1)) * CHUNK) - SHARED_BASE;
}

/* Where row `row` of the box starts in global memory, were it all in the tensor; false: it is not
 * in it at all. */
static bool find_row(const struct transfer *transfer, uint32_t row, uint64_t *address)
{
    const struct tensor_map *map = &transfer->map;
    *address = map->address + (uint64_t)(transfer->corner[0] * map->stride[0]);
    for (int d = 1; d < map->rank; d++) {
        const int64_t at = (int64_t)transfer->corner[d] + row % map->box[d];
        if (at < 0 || at >= (int64_t)map->size[d])
            return false;
        *address += (uint64_t)(at * map->stride[d]);
        row /= map->box[d];
    }
    return true;
}

/* Bytes at `address` that can go as one: a power of two that divides it, at most `bytes`. */
static uint32_t piece_bytes(uint64_t address, int64_t bytes)
{
    uint32_t size = CHUNK;
    while (address % size || size > bytes)
        size /= 2;
    return size;
}

bool each_piece(const struct transfer *transfer, piece *visit)
{
    const struct tensor_map *map = &transfer->map;
    const uint32_t rows = (uint32_t)row_count(map), bytes = row_bytes(map);
    const int64_t left = (int64_t)transfer->corner[0] * map->element;
    const int64_t right = (int64_t)map->size[0] * map->element - left; /* edges, from the corner */
    const int64_t end = right < bytes ? right : bytes;
    for (uint32_t row = 0; row < rows; row++) {
        uint64_t address;
        if (!find_row(transfer, row, &address))
            continue;
        uint32_t size;
        for (int64_t at = left < 0 ? -left : 0; at < end; at += size) {
            const int64_t chunk_end = (at / CHUNK + 1) * CHUNK;
            size = piece_bytes(address + (uint64_t)at, (chunk_end < end ? chunk_end : end) - at);
            if (!visit(transfer, address + (uint64_t)at,
                       place(transfer, row * bytes + (uint32_t)at), size))
                return false;
        }
    }
    return true;
}
