#include "arguments.h"

#include <float.h>
#include <math.h>

#include "arithmetic.h"

/* ---- parts of an argument -------------------------------------------------------------------- */

/* How often the main kernel issues an mma: its products are so many times too large, see
 * kernels/product.cuh. A power of two, so nothing is rounded. */
static float tensor_repeat(const struct fa_plan *plan)
{
    return (float)plan->steps[plan->main].variant.tensor_repeat;
}

/* The numbers that take a score s to the exponent of 2, as kernels/params.h has them. They keep
 * away from the ends of fp32: 0 times the infinite value of a masked score is NaN, the smallest
 * number times any other score rounds away; and no score is near a cap of 2^100, which then
 * changes none. */
struct scales {
    float scale_log2, masked_score, scale_in_cap;
};
/* A kernel whose mma are repeated has scores that are so many times too large. */
static struct scales scales_of(const struct fa_shape *shape, const struct fa_plan *plan)
{
    const float softmax_scale = shape->softmax_scale / tensor_repeat(plan);
    const double log2_e = 1.4426950408889634;
    struct scales scales = {0};
    float factor = softmax_scale;
    if (shape->softcap != 0) {
        factor = fminf(shape->softcap, 0x1p100f);
        scales.scale_in_cap = fmaxf(fminf(softmax_scale / factor, FLT_MAX), -FLT_MAX);
    }
    const float scale_log2 = (float)(factor * log2_e);
    scales.scale_log2 = scale_log2 != 0 ? scale_log2 : FLT_TRUE_MIN;
    /* Q in e4m3 takes the sign of its scale. */
    scales.masked_score = scales.scale_log2 > 0 || shape->is_q_e4m3 ? -INFINITY : INFINITY;
    return scales;
}

/* `number`, which is not negative, for kernels to divide by; 0 is allowed and never divided by. */
static struct fa_divisor divisor_of(int number)
{
    int shift = 0;
    while (INT64_C(1) << shift < number)
        shift++;
    const int64_t multiplier = CEIL_DIV(INT64_C(1) << (31 + shift), MAX(number, 1));
    return (struct fa_divisor){number, (unsigned)multiplier, shift};
}

/* A tensor as the TMA sees it: sizes and, in bytes, strides, from the innermost on. */
struct map_shape {
    char *data;
    uint64_t sizes[4], strides[4];
};

/* In boxes of `rows` of its second dimension and as many dims of a head as tile_layout in
 * kernels/layout.cuh puts in a row of a segment. 0 or -1. */
static int encode_boxes(struct fa_driver *driver, const struct map_shape *shape,
                        enum fa_dtype dtype, int rows, struct fa_tensor_map *map)
{
    const int chunk = fa_chunk_elements(dtype); /* in elements */
    const int padded = fa_padded_dim((int)shape->sizes[0], fa_mma_k(dtype));
    const int cols = fa_segment_chunks(padded / chunk);
    const int swizzle = cols == 8   ? CU_TENSOR_MAP_SWIZZLE_128B
                        : cols == 4 ? CU_TENSOR_MAP_SWIZZLE_64B
                                    : CU_TENSOR_MAP_SWIZZLE_32B;
    const uint32_t box[] = {(uint32_t)(cols * chunk), (uint32_t)rows, 1, 1};
    static const uint32_t ones[] = {1, 1, 1, 1};
    return FA_DRIVER_CALL(driver, cuTensorMapEncodeTiled,
                          (map,
                           dtype == FA_FLOAT8_E4M3 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                           : dtype == FA_BFLOAT16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                           4, shape->data, shape->sizes, shape->strides + 1, box, ones,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_128B,
                           CU_TENSOR_MAP_OOB_FILL_ZEROS));
}

/* The dimensions of a tensor [batch, seqlen, heads, head_dim], or packed [total, heads, head_dim],
 * where `batch` has the size 1. */
static struct map_shape map_shape_of(const struct fa_tensor *tensor)
{
    const int last = tensor->ndim - 1;
    const int order[] = {last, last - 2, last - 1, last - 3}; /* head_dim, seqlen, heads, batch */
    struct map_shape shape = {.data = tensor->data};
    for (int i = 0; i < 4; i++) {
        shape.sizes[i] = order[i] < 0 ? 1 : (uint64_t)tensor->shape[order[i]];
        shape.strides[i] =
            (uint64_t)fa_element_bytes(tensor->dtype) *
            (shape.sizes[i] > 1 ? (uint64_t)tensor->stride[order[i]] : shape.sizes[0]);
    }
    return shape;
}

/* A tensor in boxes of `rows` of the sequence. 0 or -1. */
static int encode_tensor_map(struct fa_driver *driver, const struct fa_tensor *tensor, int rows,
                             struct fa_tensor_map *map)
{
    const struct map_shape shape = map_shape_of(tensor);
    return encode_boxes(driver, &shape, tensor->dtype, rows, map);
}

/* The same of Q or dO. A packed one, whose sequences begin and end at any row, becomes [ends,
 * heads, rows, head_dim]: entry e has the `rows` rows before row e. So a box that begins at row
 * `rows` - n of it has n rows of a sequence and then, outside of the tensor, zeros. */
static int encode_queries_map(struct fa_driver *driver, const struct fa_tensor *tensor, int rows,
                              struct fa_tensor_map *map)
{
    struct map_shape shape = map_shape_of(tensor);
    if (tensor->ndim == 3) {
        shape.sizes[3] = shape.sizes[1] + 1;
        shape.strides[3] = shape.strides[1];
        shape.sizes[1] = (uint64_t)rows;
        shape.data -= shape.sizes[1] * shape.strides[1];
    }
    return encode_boxes(driver, &shape, tensor->dtype, rows, map);
}

/* A tensor's memory; NULL where there is none. */
static void *data_of(const struct fa_tensor *tensor)
{
    return tensor->object ? tensor->data : NULL;
}

static struct fa_lengths lengths_of(const struct fa_problem *problem)
{
    return (struct fa_lengths){
        .cu_seqlens_q = data_of(&problem->cu_seqlens_q),
        .cu_seqlens_k = data_of(&problem->cu_seqlens_k),
        .seqused_q = data_of(&problem->seqused_q),
        .seqused_k = data_of(&problem->seqused_k),
        .leftpad_k = data_of(&problem->leftpad_k),
        .total_q = problem->shape.total_q,
        .total_k = problem->shape.total_k,
    };
}

static struct fa_pages pages_of(const struct fa_problem *problem)
{
    const struct fa_tensor *table = &problem->page_table;
    if (!table->object)
        return (struct fa_pages){0};
    return (struct fa_pages){
        .table = table->data,
        .table_stride = table->stride[0],
        .per_sequence = (int)table->shape[1],
        .count = (int)problem->k.shape[0],
        .page_size = divisor_of(problem->shape.page_size),
    };
}

static struct fa_dropout dropout_of(const struct fa_problem *problem)
{
    const float keep = fa_keep_probability(&problem->shape);
    return (struct fa_dropout){
        .seed = data_of(&problem->dropout_seed),
        .threshold = (unsigned)problem->shape.dropout << 16,
        .keep = keep,
        .scale = 1 / keep,
    };
}

static struct fa_alibi alibi_of(const struct fa_problem *problem)
{
    const struct fa_tensor *slopes = &problem->alibi_slopes;
    if (!slopes->object)
        return (struct fa_alibi){0};
    return (struct fa_alibi){
        .slopes = slopes->data,
        .batch_stride = slopes->ndim == 2 ? slopes->stride[0] : 0,
        .head_stride = slopes->stride[slopes->ndim - 1],
    };
}

static struct fa_block_list block_list_of(const struct fa_tensor *counts,
                                          const struct fa_tensor *indices)
{
    if (!counts->object)
        return (struct fa_block_list){0};
    return (struct fa_block_list){
        .counts = counts->data,
        .indices = indices->data,
        .count = fa_block_list_strides(counts),
        .index = fa_block_list_strides(indices),
        .most = (int)indices->shape[3],
    };
}

/* `row_tiles`, `tiles`: tiles of the kernel in a block that is a row of the lists, and in one that
 * is listed. */
static struct fa_block_lists block_lists_of(const struct fa_block_lists_read *lists, int row_tiles,
                                            int tiles)
{
    return (struct fa_block_lists){
        .partial = block_list_of(&lists->counts, &lists->indices),
        .full = block_list_of(&lists->full_counts, &lists->full_indices),
        .blocks = lists->blocks,
        .row_tiles = divisor_of(row_tiles),
        .tiles = divisor_of(tiles),
    };
}

static struct fa_bias bias_of(const struct fa_problem *problem)
{
    if (!problem->bias.object)
        return (struct fa_bias){0};
    return (struct fa_bias){problem->bias.data, fa_bias_strides(&problem->bias)};
}

/* The captured tensors of a mod. */
static void set_captured(const struct fa_mod *mod, struct fa_captured captured[FA_MAX_CAPTURED])
{
    for (int i = 0; i < mod->count; i++) {
        const struct fa_tensor *tensor = &mod->captured[i].tensor;
        captured[i].data = tensor->data;
        for (int d = 0; d < tensor->ndim; d++) {
            captured[i].stride[d] = tensor->stride[d];
            captured[i].size[d] = (int)tensor->shape[d];
        }
    }
}

static void set_mods(const struct fa_problem *problem, struct fa_mods *mods)
{
    set_captured(&problem->score_mod, mods->score);
    set_captured(&problem->mask_mod, mods->mask);
    for (int i = 0; i < problem->score_mod.count; i++)
        mods->gradients[i] = data_of(&problem->score_mod.captured[i].gradient);
}

/* Where the tiles of all sequences are listed; NULL: they are not. */
static struct fa_listed_tile *list_of(const struct fa_plan *plan, float *workspace)
{
    return plan->list_places ? (struct fa_listed_tile *)(workspace + plan->workspace.list) : NULL;
}

/* ---- forward --------------------------------------------------------------------------------- */

static struct fa_forward_params forward_params(const struct fa_problem *problem,
                                               const struct fa_plan *plan, float *workspace)
{
    const struct fa_shape *shape = &problem->shape;
    const struct scales scales = scales_of(shape, plan);
    const struct fa_variant *variant = &plan->steps[plan->main].variant;
    const bool is_split = plan->splits > 1;
    return (struct fa_forward_params){
        .q = problem->q.data,
        .k = problem->k.data,
        .v = problem->v.data,
        .out = is_split ? workspace + plan->workspace.out_parts : problem->out.data,
        .lse = is_split ? workspace + plan->workspace.lse_parts : data_of(&problem->lse),
        .sink = data_of(&problem->sink),
        .q_stride = fa_tensor_strides(&problem->q),
        .k_stride = fa_tensor_strides(&problem->k),
        .v_stride = fa_tensor_strides(&problem->v),
        .out_stride = fa_tensor_strides(&problem->out),
        .batch = shape->batch,
        .seqlen_q = shape->seqlen_q,
        .seqlen_k = shape->seqlen_k,
        .window_left = shape->window_left,
        .window_right = shape->window_right,
        .scale_log2 = scales.scale_log2,
        .masked_score = scales.masked_score,
        .scale_in_cap = scales.scale_in_cap,
        .sink_dtype = (int)problem->sink.dtype,
        .heads = divisor_of(variant->pack_gqa ? shape->heads_kv : shape->heads_q),
        .heads_per_kv = divisor_of(fa_heads_per_kv(shape)),
        .m_blocks = divisor_of(plan->m_blocks),
        .group_heads = divisor_of(plan->group_heads),
        .parts = divisor_of(plan->splits),
        .lengths = lengths_of(problem),
        .pages = pages_of(problem),
        .list = list_of(plan, workspace),
        .dropout = dropout_of(problem),
        .alibi = alibi_of(problem),
        .bias = bias_of(problem),
        .k_descale = fa_tensor_descale(&problem->k_descale),
        .v_descale = fa_tensor_descale(&problem->v_descale),
        .q_descale = fa_tensor_descale(&problem->q_descale),
    };
}

static struct fa_combine_params combine_params(const struct fa_problem *problem,
                                               const struct fa_plan *plan, const float *workspace)
{
    const struct fa_shape *shape = &problem->shape;
    const int64_t rows = shape->heads_q * fa_shape_rows_q(shape), dims = shape->head_dim_v;
    const int64_t seqlen = shape->is_packed_q ? shape->total_q : shape->seqlen_q;
    return (struct fa_combine_params){
        .out_parts = workspace + plan->workspace.out_parts,
        .lse_parts = workspace + plan->workspace.lse_parts,
        .out = problem->out.data,
        .lse = data_of(&problem->lse),
        .sink = data_of(&problem->sink),
        .out_stride = fa_tensor_strides(&problem->out),
        .out_parts_stride = {shape->heads_q * seqlen * dims, dims, seqlen * dims},
        .lse_parts_stride = {shape->heads_q * seqlen, 1, seqlen},
        .out_parts_step = rows * dims,
        .lse_parts_step = rows,
        .rows = (unsigned)rows,
        .parts = plan->splits,
        .sink_dtype = (int)problem->sink.dtype,
        .lse_parts_log2 = 1,
        .heads_q = divisor_of(shape->heads_q),
        .seqlen_q = divisor_of((int)seqlen),
        .slices = divisor_of(plan->combine_slices),
    };
}

struct fa_combine_params fa_arguments_of_parts(const struct fa_parts *parts, int slices)
{
    const int64_t *step = parts->out_parts.stride, *lse_step = parts->lse_parts.stride;
    return (struct fa_combine_params){
        .out_parts = parts->out_parts.data,
        .lse_parts = parts->lse_parts.data,
        .out = parts->out.data,
        .lse = data_of(&parts->lse),
        .out_stride = fa_tensor_strides(&parts->out),
        .out_parts_stride = {step[1], step[2], step[3]},
        .lse_parts_stride = {lse_step[1], lse_step[2], lse_step[3]},
        .out_parts_step = step[0],
        .lse_parts_step = lse_step[0],
        .rows = (unsigned)fa_parts_rows(parts),
        .parts = (int)parts->out_parts.shape[0],
        .lse_parts_log2 = 1.44269504f,
        .heads_q = divisor_of((int)parts->out.shape[2]),
        .seqlen_q = divisor_of((int)parts->out.shape[1]),
        .slices = divisor_of(slices),
        .lengths = {.cu_seqlens_q = data_of(&parts->cu_seqlens),
                    .seqused_q = data_of(&parts->seqused),
                    .total_q = (int)parts->out.shape[1]},
        .sequences = parts->sequences,
    };
}

struct fa_scatter_params fa_arguments_of_scatter(const struct fa_scatter *scatter)
{
    const struct fa_tensor *tensors = scatter->tensors;
    const struct fa_tensor *k = &tensors[FA_SCATTER_K], *v = &tensors[FA_SCATTER_V];
    const int chunk = fa_chunk_elements(k->dtype);
    return (struct fa_scatter_params){
        .k = k->data,
        .v = v->data,
        .k_cache = tensors[FA_SCATTER_K_CACHE].data,
        .v_cache = tensors[FA_SCATTER_V_CACHE].data,
        .slots = tensors[FA_SCATTER_SLOTS].data,
        .slot_stride = tensors[FA_SCATTER_SLOTS].stride[0],
        .k_stride = fa_tensor_strides(k),
        .v_stride = fa_tensor_strides(v),
        .k_cache_stride = fa_tensor_strides(&tensors[FA_SCATTER_K_CACHE]),
        .v_cache_stride = fa_tensor_strides(&tensors[FA_SCATTER_V_CACHE]),
        .heads = scatter->heads,
        .slot_count = scatter->slots,
        .page_size = divisor_of(scatter->page_size),
        .chunks = divisor_of((int)k->shape[2] / chunk),
        .chunks_v = divisor_of((int)v->shape[2] / chunk),
        .k_descale = fa_tensor_descale(&tensors[FA_SCATTER_K_DESCALE]),
        .v_descale = fa_tensor_descale(&tensors[FA_SCATTER_V_DESCALE]),
    };
}

static struct fa_fill_params fill_params(const struct fa_problem *problem,
                                         const struct fa_plan *plan, float *workspace)
{
    const struct fa_shape *shape = &problem->shape;
    const struct fa_variant *main = &plan->steps[plan->main].variant;
    return (struct fa_fill_params){
        .out = problem->out.data,
        .lse = data_of(&problem->lse),
        .out_stride = fa_tensor_strides(&problem->out),
        .batch = shape->batch,
        .seqlen_q = shape->seqlen_q,
        .seqlen_k = shape->seqlen_k,
        .heads_q = shape->heads_q,
        .head_dim_v = shape->head_dim_v,
        .lengths = lengths_of(problem),
        .list = list_of(plan, workspace),
        .places = plan->list_places,
        .tile_m = plan->tile_m,
        .rows_per_query = main->pack_gqa ? fa_heads_per_kv(shape) : 1,
        .is_reversed = main->mask_right,
    };
}

/* Of a row of q. */
static struct fa_strides contiguous_strides(const struct fa_shape *shape)
{
    const fa_int64 row = (fa_int64)shape->heads_q * shape->head_dim;
    return (struct fa_strides){shape->is_packed_q ? 0 : shape->seqlen_q * row, row,
                               shape->head_dim};
}

static struct fa_append_params append_params(const struct fa_problem *problem,
                                             const struct fa_plan *plan, float *workspace)
{
    const struct fa_shape *shape = &problem->shape;
    const struct fa_append *append = &problem->append;
    const int chunk = fa_chunk_elements(shape->dtype);
    const bool is_rotated = append->cos.object != NULL;
    return (struct fa_append_params){
        .k = append->k.data,
        .v = append->v.data,
        .k_cache = problem->k.data,
        .v_cache = problem->v.data,
        .q = problem->q.data,
        .rotated_q = is_rotated ? workspace + plan->workspace.rotated_q : NULL,
        .cos = data_of(&append->cos),
        .sin = data_of(&append->sin),
        .cache_seqlens = data_of(&problem->seqused_k),
        .seqused_k = (int *)(workspace + plan->workspace.seqused_k),
        .k_stride = fa_tensor_strides(&append->k),
        .v_stride = fa_tensor_strides(&append->v),
        .k_cache_stride = fa_tensor_strides(&problem->k),
        .v_cache_stride = fa_tensor_strides(&problem->v),
        .q_stride = fa_tensor_strides(&problem->q),
        .rotated_q_stride = contiguous_strides(shape),
        .cos_stride = is_rotated ? append->cos.stride[0] : 0,
        .sin_stride = is_rotated ? append->sin.stride[0] : 0,
        .batch = shape->batch,
        .seqlen_q = shape->seqlen_q,
        .seqlen_k = shape->seqlen_k,
        .heads_q = shape->heads_q,
        .heads_kv = shape->heads_kv,
        .cache_seqlen = append->cache_seqlen,
        .new_rows = (int)append->k.shape[1],
        .positions = is_rotated ? (int)append->cos.shape[0] : 0,
        .rotary_dim = fa_rotary_dim(append),
        .interleaved = problem->options.rotary_interleaved,
        .q_advances = fa_queries_advance(shape),
        .new_blocks = divisor_of(fa_append_blocks(append)),
        .q_blocks = divisor_of(shape->seqlen_q),
        .chunks = divisor_of(shape->head_dim / chunk),
        .chunks_v = divisor_of(shape->head_dim_v / chunk),
        .lengths = lengths_of(problem),
        .pages = pages_of(problem),
        .k_descale = fa_tensor_descale(&problem->k_descale),
        .v_descale = fa_tensor_descale(&problem->v_descale),
    };
}

/* The forward reads what the append makes. */
static void read_appended(const struct fa_append_params *append, struct fa_forward_params *forward)
{
    forward->lengths.seqused_k = append->seqused_k;
    if (!append->rotated_q)
        return;
    forward->q = append->rotated_q;
    forward->q_stride = append->rotated_q_stride;
}

/* K or V without the rows of a cache that no sequence has: boxes have zeros in their place. */
static struct fa_tensor used_rows(const struct fa_problem *problem, const struct fa_tensor *tensor)
{
    const struct fa_shape *shape = &problem->shape;
    struct fa_tensor used = *tensor;
    if (!shape->is_packed_k && !shape->page_size)
        used.shape[1] = shape->seqlen_k;
    return used;
}

static int make_forward(struct fa_driver *driver, const struct fa_problem *problem,
                        const struct fa_plan *plan, float *workspace,
                        struct fa_forward_arguments *arguments)
{
    const int page_size = problem->shape.page_size;
    const int box_rows = page_size ? fa_page_box_rows(plan->tile_n, page_size) : plan->tile_n;
    const struct fa_variant *variant = &plan->steps[plan->main].variant;
    struct fa_forward_tma_params *main = &arguments->main.dense;
    main->forward = forward_params(problem, plan, workspace);
    if (variant->block_sparse) {
        const struct fa_block_lists_read *lists = &problem->key_blocks;
        const int rows = variant->pack_gqa ? fa_heads_per_kv(&problem->shape) : 1;
        arguments->main.lists = block_lists_of(lists, lists->block_q * rows / plan->tile_m,
                                               lists->block_k / plan->tile_n);
    }
    set_mods(problem, &arguments->main.mods);
    if (plan->splits > 1)
        arguments->combine = combine_params(problem, plan, workspace);
    if (problem->shape.is_varlen)
        arguments->fill = fill_params(problem, plan, workspace);
    if (problem->append.k.object) {
        arguments->append = append_params(problem, plan, workspace);
        read_appended(&arguments->append, &main->forward);
    }
    if (variant->kernel != FA_KERNEL_FORWARD_TMA)
        return 0;
    const struct fa_tensor k = used_rows(problem, &problem->k);
    const struct fa_tensor v = used_rows(problem, &problem->v);
    if (encode_tensor_map(driver, &k, box_rows, &main->k_map) < 0)
        return -1;
    return encode_tensor_map(driver, &v, box_rows, &main->v_map);
}

/* ---- backward -------------------------------------------------------------------------------- */

/* What products of dS have to be multiplied by to be dQ and dK. Where mma are repeated dS is itself
 * one of their products. */
static float scale_of_dS(const struct fa_shape *shape, const struct fa_plan *plan)
{
    const float repeat = tensor_repeat(plan);
    return shape->softmax_scale / (fa_keep_probability(shape) * repeat * repeat);
}

static struct fa_backward_params backward_params(const struct fa_problem *problem,
                                                 const struct fa_gradients *gradients,
                                                 const struct fa_plan *plan)
{
    const struct fa_shape *shape = &problem->shape;
    const struct scales scales = scales_of(shape, plan);
    return (struct fa_backward_params){
        .q = problem->q.data,
        .k = problem->k.data,
        .v = problem->v.data,
        .out = problem->out.data,
        .dout = gradients->dout.data,
        .lse = problem->lse.data,
        .dlse = data_of(&gradients->dlse),
        .sink = data_of(&problem->sink),
        .dk = gradients->dk.data,
        .dv = gradients->dv.data,
        .dsink = data_of(&gradients->dsink),
        .q_stride = fa_tensor_strides(&problem->q),
        .k_stride = fa_tensor_strides(&problem->k),
        .v_stride = fa_tensor_strides(&problem->v),
        .out_stride = fa_tensor_strides(&problem->out),
        .dout_stride = fa_tensor_strides(&gradients->dout),
        .dk_stride = fa_tensor_strides(&gradients->dk),
        .dv_stride = fa_tensor_strides(&gradients->dv),
        .batch = shape->batch,
        .heads_q = shape->heads_q,
        .heads_kv = shape->heads_kv,
        .heads_per_kv = fa_heads_per_kv(shape),
        .seqlen_q = shape->seqlen_q,
        .seqlen_k = shape->seqlen_k,
        .m_blocks = plan->m_blocks,
        .n_blocks = plan->n_blocks,
        .q_splits = plan->splits,
        .window_left = shape->window_left,
        .window_right = shape->window_right,
        .sink_dtype = (int)problem->sink.dtype,
        .scale_log2 = scales.scale_log2,
        .masked_score = scales.masked_score,
        .scale_in_cap = scales.scale_in_cap,
        .softmax_scale = scale_of_dS(shape, plan),
        .dq = gradients->dq.data,
        .dq_stride = fa_tensor_strides(&gradients->dq),
        .lengths = lengths_of(problem),
        .group_heads = plan->group_heads,
        .query_tiles = plan->query_tiles,
        .head_dim = shape->head_dim,
        .tile_n = plan->tile_n,
        .alibi = alibi_of(problem),
    };
}

/* What lies in the workspace. */
static void set_workspace(const struct fa_plan *plan, float *workspace,
                          struct fa_backward_params *params)
{
    const struct fa_workspace *at = &plan->workspace;
    params->lse_delta = workspace;
    params->dq_accum = workspace + at->dq_accum;
    params->dk_accum = workspace + at->dk_accum;
    params->dv_accum = workspace + at->dv_accum;
    params->dq_semaphores = (int *)(workspace + at->dq_semaphores);
    params->dkv_semaphores = (int *)(workspace + at->dkv_semaphores);
    params->block_counter = (int *)(workspace + at->block_counter);
    params->list = list_of(plan, workspace);
    params->zeros = workspace + at->zeros;
    params->zero_chunks = (at->size - at->zeros) / 4;
    params->zero_share = CEIL_DIV(params->zero_chunks, MAX(plan->steps[0].blocks, 1));
}

/* What the gradients of captured tensors are summed up in, where that is in fixed point. */
static void set_captured_sums(const struct fa_problem *problem, struct fa_captured_params *params)
{
    const struct fa_mod *mod = &problem->score_mod;
    for (int i = 0; i < FA_MAX_CAPTURED; i++) {
        const struct fa_tensor *sums = i < mod->count ? &mod->captured[i].sums : NULL;
        const bool is_wanted = sums && sums->object;
        params->elements[i] = is_wanted ? fa_mod_elements(&mod->captured[i]) : 0;
        params->sums[i] = is_wanted ? sums->data : NULL;
    }
    params->bits = fa_shape_sum_bits(&problem->shape);
}

/* An accumulator, or several added up, to a gradient of `rows` rows per head in it. */
static struct fa_postprocess_params postprocess_params(const float *accum, int buffers, int rows,
                                                       float scale,
                                                       const struct fa_tensor *gradient)
{
    return (struct fa_postprocess_params){
        .accum = accum,
        .tensor = gradient->data,
        .stride = fa_tensor_strides(gradient),
        .batch = (int)gradient->shape[0],
        .seqlen = (int)gradient->shape[gradient->ndim - 3],
        .buffers = buffers,
        .scale = scale,
        .heads = divisor_of((int)gradient->shape[gradient->ndim - 2]),
        .row_frags = divisor_of(rows / 16),
    };
}

static int make_backward(struct fa_driver *driver, const struct fa_problem *problem,
                         const struct fa_gradients *gradients, const struct fa_plan *plan,
                         float *workspace, struct fa_backward_arguments *arguments)
{
    const struct fa_variant *variant = &plan->steps[plan->main].variant;
    const struct fa_workspace *at = &plan->workspace;
    const struct fa_shape *shape = &problem->shape;
    const int queries = (shape->is_varlen ? plan->query_tiles : plan->m_blocks) * plan->tile_m;
    const int keys = plan->n_blocks * plan->tile_n;
    const float scale = scale_of_dS(shape, plan);
    const float scale_of_P = 1 / (fa_keep_probability(shape) * tensor_repeat(plan));
    struct fa_extended_backward_params *extended = &arguments->main.backward;
    struct fa_backward_params *main = &extended->dense;
    *main = backward_params(problem, gradients, plan);
    set_workspace(plan, workspace, main);
    main->dropout = dropout_of(problem);
    main->bias = bias_of(problem);
    if (gradients->dbias.object) {
        main->dbias = gradients->dbias.data;
        main->dbias_stride = fa_bias_strides(&gradients->dbias);
    }
    if (variant->block_sparse) {
        const struct fa_block_lists_read *lists = &problem->query_blocks;
        extended->lists =
            block_lists_of(lists, lists->block_k / plan->tile_n, lists->block_q / plan->tile_m);
        extended->order = (struct fa_addition_order){
            .before = (int *)(workspace + at->added_before),
            .heads = fa_block_lists_are_own(lists) ? shape->heads_q : 1,
            .rows = lists->rows,
        };
    }
    set_mods(problem, &extended->mods);
    if (fa_mod_has_gradients(&problem->score_mod))
        set_captured_sums(problem, &arguments->main);
    arguments->dq = postprocess_params(workspace + at->dq_accum, variant->dq_buffers, queries,
                                       scale, &gradients->dq);
    arguments->dq.batch = shape->batch;
    arguments->dq.seqlen = shape->seqlen_q;
    arguments->dq.tile_m = plan->tile_m;
    arguments->dq.lengths = lengths_of(problem);
    arguments->dk = postprocess_params(workspace + at->dk_accum, 1, keys, scale, &gradients->dk);
    arguments->dv =
        postprocess_params(workspace + at->dv_accum, 1, keys, scale_of_P, &gradients->dv);
    if (!variant->tma)
        return 0;
    if (encode_queries_map(driver, &problem->q, plan->tile_m, &main->q_map) < 0)
        return -1;
    return encode_queries_map(driver, &gradients->dout, plan->tile_m, &main->dout_map);
}

/* ---- the interface --------------------------------------------------------------------------- */

int fa_arguments_make(struct fa_driver *driver, const struct fa_problem *problem,
                      const struct fa_gradients *gradients, const struct fa_plan *plan,
                      float *workspace, union fa_arguments *arguments)
{
    return gradients
               ? make_backward(driver, problem, gradients, plan, workspace, &arguments->backward)
               : make_forward(driver, problem, plan, workspace, &arguments->forward);
}

void *fa_arguments_of(union fa_arguments *arguments, enum fa_job job)
{
    switch (job) {
    case FA_JOB_APPEND: return &arguments->forward.append;
    case FA_JOB_FORWARD: return &arguments->forward.main;
    case FA_JOB_COMBINE: return &arguments->forward.combine;
    case FA_JOB_FILL: return &arguments->forward.fill;
    case FA_JOB_DQ: return &arguments->backward.dq;
    case FA_JOB_DK: return &arguments->backward.dk;
    case FA_JOB_DV: return &arguments->backward.dv;
    case FA_JOB_PREPROCESS:
    case FA_JOB_ORDER:
    case FA_JOB_BACKWARD:
    case FA_JOB_CAPTURED:
    case FA_JOB_CAPTURED_SUMS:
    case FA_JOB_DSINK: break;
    }
    return &arguments->backward.main;
}
