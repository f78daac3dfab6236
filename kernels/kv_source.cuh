/* Where the tiles of K and V are in memory, behind both rings: these, and all that follows, know
 * stages in shared memory alone.
 *
 *   PAGED    1: K and V are pages, see fa_pages in params.h */
#ifndef FA_KV_SOURCE_CUH
#define FA_KV_SOURCE_CUH

#include "block_list.cuh"
#include "tile.cuh"

/* The order of the tiles that a block goes through. */
template <bool IS_SPARSE = BLOCK_SPARSE> struct tile_order;

/* From tile end - 1 of the sequence downwards. */
template <> struct tile_order<false> {
    int end;

    /* The first key of the i-th tile. */
    __device__ __forceinline__ int key(int i) const { return (end - 1 - i) * TILE_N; }
};

/* Those listed, from number `begin` on. */
template <> struct tile_order<true> {
    listed_tiles tiles;
    int begin;

    __device__ __forceinline__ int key(int i) const { return tiles.tile(begin + i) * TILE_N; }
};

/* The tiles that a block goes through, of one KV head. */
struct tile_walk {
    int entry, first_row; /* of K and V: the entry of the batch, and the row in it that has key 0 */
    int head_kv;
    tile_order<> order;
    int tiles;

    __device__ __forceinline__ int key(int i) const { return order.key(i); }
};

/* ---- pages ----------------------------------------------------------------------------------- */

/* The pages of a sequence. */
struct page_list {
    const fa_pages &pages;
    const int *table; /* [per_sequence] */

    __device__ __forceinline__ void select(int batch)
    {
        table = pages.table + batch * pages.table_stride;
    }
    /* The entry of a key of the sequence: whatever the table holds, for page_of() to look at when
     * it has come. */
    __device__ __forceinline__ int read_entry(int key) const
    {
        return ld_global(table + divide(key, pages.page_size).quotient);
    }
    __device__ __forceinline__ int page_of(int entry) const
    {
        return clamp(entry, 0, pages.count - 1);
    }
    /* The row of a key in its page. */
    __device__ __forceinline__ int row_of(int key) const
    {
        return divide(key, pages.page_size).rest;
    }
};

/* ---- for cp.async ---------------------------------------------------------------------------- */

template <bool IS_PAGED = PAGED, bool IS_SPARSE = BLOCK_SPARSE> struct copied_source;

/* Strided tensors: pointers that each thread moves from tile to tile. */
template <> struct copied_source<false, false> {
    const fa_forward_params &params;
    const kv_element *K_gmem,
        *V_gmem;                 /* this thread's first chunks of the tile that is copied next */
    fa_int64 K_stride, V_stride; /* from row to row */

    __device__ __forceinline__ void start(const tile_walk &walk,
                                          const sequence<fa_forward_params> &)
    {
        const int row = walk.first_row + walk.key(0);
        K_stride = params.k_stride.seqlen;
        V_stride = params.v_stride.seqlen;
        K_gmem = K_place().first_chunk(params.k, params.k_stride, walk.entry, walk.head_kv, row);
        V_gmem = V_place().first_chunk(params.v, params.v_stride, walk.entry, walk.head_kv, row);
    }
    /* Start the copies of this thread's share of a tile; `keys` of its rows exist. */
    __device__ __forceinline__ void copy_K(unsigned smem, int keys) const
    {
        K_place().copy(smem, K_gmem, K_stride, keys);
    }
    __device__ __forceinline__ void copy_V(unsigned smem, int keys) const
    {
        V_place().copy(smem, V_gmem, V_stride, keys);
    }
    /* On to the tile before. */
    __device__ __forceinline__ void advance()
    {
        K_gmem -= TILE_N * K_stride;
        V_gmem -= TILE_N * V_stride;
    }
};

/* The same of listed tiles, which come in any order: any of them may have the last key. */
template <> struct copied_source<false, true> {
    copied_source<false, false> rows;
    listed_walk walk;
    int seqlen_k;

    __device__ __forceinline__ explicit copied_source(const fa_forward_params &params)
        : rows{params}
    {
    }
    template <class walk_t>
    __device__ __forceinline__ void start(const walk_t &first,
                                          const sequence<fa_forward_params> &seq)
    {
        rows.start(first, seq);
        walk = listed_walk(first.order.tiles, first.order.begin);
        seqlen_k = seq.seqlen_k();
    }
    __device__ __forceinline__ int keys() const { return seqlen_k - walk.tile * TILE_N; }
    __device__ __forceinline__ void copy_K(unsigned smem, int) const { rows.copy_K(smem, keys()); }
    __device__ __forceinline__ void copy_V(unsigned smem, int) const { rows.copy_V(smem, keys()); }
    __device__ __forceinline__ void advance()
    {
        const int from = walk.tile;
        walk.advance();
        if (walk.tile == from + 1) { /* in the same block: no product of 64 bits */
            rows.K_gmem += TILE_N * rows.K_stride;
            rows.V_gmem += TILE_N * rows.V_stride;
        } else {
            rows.K_gmem += (walk.tile - from) * TILE_N * rows.K_stride;
            rows.V_gmem += (walk.tile - from) * TILE_N * rows.V_stride;
        }
    }
};

/* The rows of a tile that a thread copies, see copy_place, which may lie in different pages. The
 * COLS threads that share these rows find one each, and pass it to the others: entries of the table
 * then take a register, and not one for each row. */
template <int COLS> struct paged_rows {
    enum {
        STEP = THREADS / COLS,
        ROWS = ceil_div(TILE_N, STEP),
        FOUND = ceil_div(ROWS, COLS) /* by this thread */
    };
    int entries[FOUND];
    unsigned pages[ROWS], rows[ROWS]; /* where row i * STEP, counted from this thread's first, is */

    static __device__ __forceinline__ int found_row(int i)
    {
        const unsigned thread = read_thread_index();
        return thread / COLS + (i * COLS + thread % COLS) * STEP;
    }
    /* Of the tile whose first key is `key`, of which `keys` exist. */
    __device__ __forceinline__ void read_entries(const page_list &list, int key, int keys)
    {
#pragma unroll
        for (int i = 0; i < FOUND; i++) {
            const int row = found_row(i);
            entries[i] = row < keys ? list.read_entry(key + row) : 0;
        }
    }
    /* Of that tile. All threads of a warp find rows together. */
    __device__ __forceinline__ void find(const page_list &list, int key)
    {
#pragma unroll
        for (int i = 0; i < FOUND; i++) {
            const int page = list.page_of(entries[i]), row = list.row_of(key + found_row(i));
#pragma unroll
            for (int r = i * COLS; r < min(ROWS, (i + 1) * COLS); r++) {
                pages[r] = __shfl_sync(0xffffffff, page, r % COLS, COLS);
                rows[r] = __shfl_sync(0xffffffff, row, r % COLS, COLS);
            }
        }
    }
    /* The same, where those of the other tensor have been found: they are the same if as many
     * threads share them. */
    __device__ __forceinline__ void find_beside(const paged_rows &other, const page_list &, int)
    {
        *this = other;
    }
    template <int OTHER_COLS>
    __device__ __forceinline__ void find_beside(const paged_rows<OTHER_COLS> &,
                                                const page_list &list, int key)
    {
        find(list, key);
    }
};

/* K or V in pages, as a thread copies it. */
template <class layout> struct paged_tensor {
    using place = copy_place<layout, THREADS>;
    const kv_element *gmem; /* its first chunk of row 0 of page 0 */
    paged_rows<layout::COLS> rows;

    __device__ __forceinline__ void start(const void *tensor, const fa_strides &stride, int head)
    {
        gmem = static_cast<const kv_element *>(tensor) + head * stride.head +
               place().col * layout::CHUNK_ELEMENTS;
    }
    __device__ __forceinline__ void copy(unsigned smem, const fa_strides &stride, int keys) const
    {
        const place at;
        at.each([&](int r, int c, unsigned offset) {
            const int i = r / place::STEP, bytes = at.exists(r, c, keys) ? FA_CHUNK_BYTES : 0;
            const kv_element *row_gmem =
                gmem + rows.pages[i] * stride.batch + rows.rows[i] * stride.seqlen;
            cp_async_16(smem + offset, row_gmem + c * layout::CHUNK_ELEMENTS, bytes);
        });
    }
};

/* Pages of any size. The table is read a tile ahead. Keys are counted from row 0 of the pages,
 * where key 0 of the sequence need not be. */
template <> struct copied_source<true, false> {
    enum { SAME_ROWS = K_layout::COLS == V_layout::COLS };
    const fa_forward_params &params;
    page_list list{params.pages};
    int key; /* the first of the tile that is copied next */
    paged_tensor<K_layout> K;
    paged_tensor<V_layout> V;

    __device__ __forceinline__ void start(const tile_walk &walk,
                                          const sequence<fa_forward_params> &seq)
    {
        list.select(walk.entry);
        key = walk.first_row + walk.key(0);
        K.start(params.k, params.k_stride, walk.head_kv);
        V.start(params.v, params.v_stride, walk.head_kv);
        read_entries(min(seq.seqlen_k() - walk.key(0), TILE_N));
    }
    __device__ __forceinline__ void copy_K(unsigned smem, int keys)
    {
        K.rows.find(list, key);
        K.copy(smem, params.k_stride, keys);
    }
    __device__ __forceinline__ void copy_V(unsigned smem, int keys)
    {
        V.rows.find_beside(K.rows, list, key);
        V.copy(smem, params.v_stride, keys);
    }
    __device__ __forceinline__ void advance()
    {
        key -= TILE_N;
        read_entries(TILE_N);
    }
    __device__ __forceinline__ void read_entries(int keys)
    {
        keys = key < 0 ? 0 : keys; /* no tile is before that of key 0 of the sequence */
        K.rows.read_entries(list, key, keys);
        if (!SAME_ROWS)
            V.rows.read_entries(list, key, keys);
    }
};

/* ---- for the TMA ----------------------------------------------------------------------------- */

/* Starts the loads of some rows of a tile: a box is a segment of the layout, or whole rows of it
 * where it has fewer than the tile. Rows beyond the tensor become zeros, and so do the chunks that
 * pad a row. */
template <class layout>
__device__ __forceinline__ void load_boxes(unsigned smem, const fa_tensor_map &map,
                                           unsigned mbarrier, int row, int head, int entry)
{
#pragma unroll
    for (int c = 0; c < layout::PADDED; c += layout::COLS)
        tma_load_4d(smem + c / layout::COLS * layout::SEGMENT_BYTES, &map, mbarrier,
                    c * layout::CHUNK_ELEMENTS, row, head, entry);
}

template <bool IS_PAGED = PAGED> struct mapped_source;

/* Strided tensors: a tile is a box. */
template <> struct mapped_source<false> {
    const fa_forward_tma_params &params;

    __device__ __forceinline__ void start(const tile_walk &, const sequence<fa_forward_params> &) {}

    /* Starts the loads of the tile whose first key is `key`. */
    __device__ __forceinline__ void load(unsigned stage_smem, unsigned mbarrier,
                                         const tile_walk &walk, int key) const
    {
        const int row = walk.first_row + key;
        load_boxes<K_layout>(stage_smem, params.k_map, mbarrier, row, walk.head_kv, walk.entry);
        load_boxes<V_layout>(stage_smem + K_layout::BYTES, params.v_map, mbarrier, row,
                             walk.head_kv, walk.entry);
    }
};

/* Pages: a box lies in one page. Boxes come from the last key to the first, and the table is read a
 * box ahead. */
template <> struct mapped_source<true> {
    const fa_forward_tma_params &params;
    page_list list{params.forward.pages};
    int seqlen_k, entry; /* of the box that is loaded next */

    __device__ __forceinline__ int box_rows() const
    {
        return fa_page_box_rows(TILE_N, list.pages.page_size.number);
    }
    /* Of boxes that have no key any page will do: there is one, else there were no tile. */
    __device__ __forceinline__ void read_entry(int key)
    {
        entry = key >= 0 && key < seqlen_k ? list.read_entry(key) : 0;
    }
    __device__ __forceinline__ void start(const tile_walk &walk,
                                          const sequence<fa_forward_params> &seq)
    {
        list.select(walk.entry);
        seqlen_k = seq.seqlen_k();
        read_entry(walk.key(0) + TILE_N - box_rows());
    }
    __device__ __forceinline__ void load(unsigned stage_smem, unsigned mbarrier,
                                         const tile_walk &walk, int key)
    {
        const int box = box_rows();
#pragma unroll 1
        for (int n = TILE_N - box; n >= 0; n -= box) {
            const int page = list.page_of(entry), row = list.row_of(key + n);
            read_entry(key + n - box);
            load_boxes<K_layout>(stage_smem + n * K_layout::ROW_BYTES, params.k_map, mbarrier, row,
                                 walk.head_kv, page);
            load_boxes<V_layout>(stage_smem + K_layout::BYTES + n * V_layout::ROW_BYTES,
                                 params.v_map, mbarrier, row, walk.head_kv, page);
        }
    }
};

#endif
