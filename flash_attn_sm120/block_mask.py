"""Block sparsity: which blocks of queries and keys a call computes, as torch's ``BlockMask`` and
FlashAttention-4's ``BlockSparseTensorsTorch`` have it, and a ``create_block_mask`` without a dense
mask in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from flash_attn_sm120.masks import in_rows


class BlockLists(NamedTuple):
    """For each block of the one side the blocks of the other, as csrc/block_lists.h has them."""

    block_q: int
    block_k: int
    counts: torch.Tensor  # (batch, heads_q, rows) int32; batch and heads may be 1
    indices: torch.Tensor  # (batch, heads_q, rows, most) int32: the first counts of a row
    full_counts: torch.Tensor | None = None
    full_indices: torch.Tensor | None = None


class Blocks(NamedTuple):
    """What a call makes of its ``block_sparse_tensors``."""

    of_keys: BlockLists  # those that each block of queries sees
    of_queries: BlockLists | None  # those that see each block of keys
    mask_mod: Callable[..., Any] | None  # of partial blocks; None: all of them is seen

    @property
    def description(self) -> str:
        """What is known without a look at the lists."""
        lists = self.of_keys
        kinds = "partial blocks" if lists.full_counts is None else "partial and full blocks"
        asked = "" if self.mask_mod is None else ", of which mask_mod is asked in partial ones"
        batch, heads, rows, most = lists.indices.shape
        return (
            f"{kinds} of {lists.block_q} queries and {lists.block_k} keys{asked}: lists of at most "
            f"{most} for each of {rows} rows, {heads} heads and {batch} sequences"
        )

    def options(self, seqlen_k: int, wants_gradients: bool) -> dict[str, BlockLists]:
        """Those of _C: lists of queries, which the backward needs, are made if there are none."""
        options = {"key_blocks": self.of_keys}
        if wants_gradients:
            options["query_blocks"] = self.of_queries or transposed(self.of_keys, seqlen_k)
        return options


def read(tensors: Any, backward: Any, seqlen_q: int, seqlen_k: int) -> Blocks:
    """The lists of a call of so many queries and keys.

    Args:
        tensors: a torch ``BlockMask``, or any object with the fields ``mask_block_cnt``,
            ``mask_block_idx``, ``full_block_cnt``, ``full_block_idx`` and ``block_size`` of
            FlashAttention-4's ``BlockSparseTensorsTorch``.
        backward: the same fields, of the blocks of queries of each block of keys; None: those of
            ``tensors``, or made of it.
        seqlen_q, seqlen_k: of the call.

    Raises:
        TypeError: neither.
        ValueError: of another shape.
    """
    if hasattr(tensors, "kv_num_blocks"):
        blocks = _of_block_mask(tensors, seqlen_q, seqlen_k)
    else:
        blocks = Blocks(_of_fields("block_sparse_tensors", tensors, seqlen_q, seqlen_k), None, None)
    if backward is None:
        return blocks
    lists = _of_fields("block_sparse_tensors_bwd", backward, seqlen_q, seqlen_k)
    return blocks._replace(of_queries=lists)


def _of_block_mask(mask: Any, seqlen_q: int, seqlen_k: int) -> Blocks:
    lengths = tuple(mask.seq_lengths)
    if lengths != (seqlen_q, seqlen_k):
        raise ValueError(
            f"block_sparse_tensors is a BlockMask of (queries, keys) {lengths}, the call has "
            f"{(seqlen_q, seqlen_k)}"
        )
    size = mask.BLOCK_SIZE

    def lists(*tensors: Any) -> BlockLists:
        return BlockLists(*size, *(_in_rows(x) for x in tensors))

    of_keys = lists(
        mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
    )
    of_queries = None
    if mask.q_num_blocks is not None:
        of_queries = lists(
            mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices
        )
    return Blocks(of_keys, of_queries, None if _sees_all(mask.mask_mod) else mask.mask_mod)


def _sees_all(mask_mod: Any) -> bool:
    """Whether it is the one of a BlockMask that was made without."""
    return mask_mod is None or getattr(mask_mod, "__name__", "") == "noop_mask"


def _of_fields(name: str, tensors: Any, seqlen_q: int, seqlen_k: int) -> BlockLists:
    counts, indices = (getattr(tensors, f"mask_block_{x}", None) for x in ("cnt", "idx"))
    if counts is None or indices is None:
        raise TypeError(
            f"{name} must be a torch BlockMask, or have the fields mask_block_cnt and "
            f"mask_block_idx, got {type(tensors).__name__}"
        )
    size = getattr(tensors, "block_size", None) or (128, 128)
    full = (getattr(tensors, f"full_block_{x}", None) for x in ("cnt", "idx"))
    return BlockLists(*size, *(_in_rows(x) for x in (counts, indices, *full)))


def _in_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """As kernels read it, where there is a list."""
    return x if x is None or x.dim() == 0 else in_rows(x)


# ---- the transpose -------------------------------------------------------------------------------


def transposed(lists: BlockLists, seqlen_k: int) -> BlockLists:
    """The blocks of queries that list each block of the keys, without a wait for the device."""
    columns = -(-seqlen_k // lists.block_k)
    counts, indices = _transpose(lists.counts, lists.indices, columns)
    if lists.full_counts is None or lists.full_indices is None:
        return BlockLists(lists.block_q, lists.block_k, counts, indices)
    full = _transpose(lists.full_counts, lists.full_indices, columns)
    return BlockLists(lists.block_q, lists.block_k, counts, indices, *full)


def _transpose(
    counts: torch.Tensor, indices: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _lists_of(_map_of(counts, indices, columns).transpose(-2, -1))


def _map_of(counts: torch.Tensor, indices: torch.Tensor, columns: int) -> torch.Tensor:
    """(batch, heads, rows, columns) uint8: 1 for what is listed."""
    is_listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # Behind the last column goes what is not listed; whatever the indices are, they stay within.
    column = torch.where(is_listed, indices.clamp(0, max(columns - 1, 0)), columns).long()
    dense = torch.zeros((*column.shape[:-1], columns + 1), dtype=torch.uint8, device=indices.device)
    return dense.scatter_(-1, column, 1)[..., :columns]


def pairs_of(
    lists: BlockLists, batch: int, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pairs partial and full blocks have: ``(heads or 1, queries, keys)`` each."""
    columns = -(-(int(key.numel())) // lists.block_k)
    rows, keys = query.long() // lists.block_q, key.long() // lists.block_k
    found = []
    for counts, indices in (
        (lists.counts, lists.indices),
        (lists.full_counts, lists.full_indices),
    ):
        if counts is None or indices is None:
            found.append(torch.zeros((), dtype=torch.bool, device=key.device))
            continue
        dense = _map_of(counts, indices, columns).bool()
        found.append(dense[min(batch, dense.shape[0] - 1)][:, rows][:, :, keys])
    return found[0], found[1]


def _lists_of(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and indices of a map of blocks (..., rows, columns), those that it has first."""
    counts = dense.sum(dim=-1, dtype=torch.int32)
    indices = dense.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts, indices.contiguous()


# ---- creation ------------------------------------------------------------------------------------

# So many pairs of a query and a key are evaluated at a time: a bound of the memory that it takes.
CHUNK_PAIRS = 1 << 24


def create_block_mask(
    mask_mod: Callable[..., torch.Tensor],
    B: int | None,
    H: int | None,
    Q: int,
    K: int,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str | None = None,
) -> Any:
    """torch's ``BlockMask`` of a ``mask_mod``, equal to that of torch's function of this name.

    That one holds all pairs of queries and keys at a time, 1 GB at 32k tokens; this one evaluates
    blocks of them, chunk by chunk, and keeps a byte per block.

    Args:
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx)``, True where the query sees the key.
        B, H: batch and query heads; None where the mask is the same for all.
        Q, K: queries and keys.
        block_size: of queries and keys; CUDA takes multiples of 16, the backward of 64 or 128.
        device: of the lists and of ``mask_mod``'s indices; None: CUDA's where there is one.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = (block_size, block_size) if isinstance(block_size, int) else block_size
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    partial, full = _maps_of(mask_mod, (B or 1, H or 1, Q, K), size, torch.device(device))
    return BlockMask.from_kv_blocks(
        *_lists_of(partial),
        *_lists_of(full),
        BLOCK_SIZE=size,
        mask_mod=mask_mod,
        seq_lengths=(Q, K),
    )


def _maps_of(
    mask_mod: Any, sizes: tuple[int, int, int, int], block: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks (batch, heads, rows, columns) are partial, and which full; tails are partial."""
    batch, heads, queries, keys = sizes
    rows, columns = -(-queries // block[0]), -(-keys // block[1])
    partial = torch.zeros((batch, heads, rows, columns), dtype=torch.uint8, device=device)
    full = torch.zeros_like(partial)
    columns_at_a_time = max(1, min(columns, CHUNK_PAIRS // (block[0] * block[1])))
    rows_at_a_time = max(1, CHUNK_PAIRS // (block[0] * block[1] * columns_at_a_time))
    sees = _over_indices(mask_mod)
    for pair in range(batch * heads):
        b, h = divmod(pair, heads)
        number = [torch.tensor(x, device=device) for x in (b, h)]
        for m in range(0, rows, rows_at_a_time):
            m_end = min(m + rows_at_a_time, rows)
            for n in range(0, columns, columns_at_a_time):
                n_end = min(n + columns_at_a_time, columns)
                q = torch.arange(m * block[0], m_end * block[0], device=device)
                k = torch.arange(n * block[1], n_end * block[1], device=device)
                seen = sees(*number, q.clamp(max=queries - 1), k.clamp(max=keys - 1))
                seen = seen & (q < queries)[:, None] & (k < keys)
                counts = seen.view(m_end - m, block[0], n_end - n, block[1]).sum((1, 3))
                is_full = counts == block[0] * block[1]
                full[b, h, m:m_end, n:n_end] = is_full
                partial[b, h, m:m_end, n:n_end] = (counts > 0) & ~is_full
    return partial, full


def _over_indices(mask_mod: Any) -> Callable[..., torch.Tensor]:
    """``mask_mod`` of a batch and a head, for queries (n) and keys (m): (n, m)."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_both = torch.vmap(over_keys, in_dims=(None, None, 0, None))

    def evaluate(*indices: torch.Tensor) -> torch.Tensor:
        with TransformGetItemToIndex():
            seen: torch.Tensor = over_both(*indices)
        return seen

    return evaluate
