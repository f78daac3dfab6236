"""The public functions: FlashAttention-4's names, layouts and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch

from flash_attn_sm120 import _C, autograd

Tensor = Any  # torch.Tensor, numpy.ndarray, or any other object with __dlpack__
Window = tuple[int | None, int | None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: list[float] | None = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention: ``softmax(softmax_scale * q @ k.T) @ v`` per head, in one pass over the keys.

    Args:
        q: ``(batch, seqlen_q, heads_q, head_dim)``. float16 or bfloat16; on the CPU float32
            too.
        k: ``(batch, seqlen_k, heads_kv, head_dim)``, dtype and device of ``q``. ``heads_kv``
            divides ``heads_q``: query head ``h`` reads KV head ``h * heads_kv // heads_q`` (GQA,
            MQA).
        v: ``(batch, seqlen_k, heads_kv, head_dim_v)``.
            ``head_dim`` and ``head_dim_v`` are multiples of 8 from 8 to 256 and need not be equal.
            Any strides with a contiguous, 16-byte-aligned last dimension are read in place; other
            layouts are copied first.
        softmax_scale: factor of the scores; default ``1 / sqrt(head_dim)``.
        causal: query ``i`` sees the keys ``j <= i + seqlen_k - seqlen_q`` (aligned bottom right).
        window_size: ``(left, right)``: query ``i`` sees ``i + seqlen_k - seqlen_q - left <= j`` and
            ``j <= i + seqlen_k - seqlen_q + right``. None is unbounded, negative values are legal,
            ``causal`` makes ``right`` 0.
        learnable_sink: ``(heads_q,)``: one more logit per head that takes part in the softmax and
            has no value (Xiao et al. 2023, https://arxiv.org/abs/2309.17453). float32, float16 or
            bfloat16; -inf is none.
        softcap: scores become ``softcap * tanh(score / softcap)``, before masks; 0 is none.
        num_splits: into how many parts the keys are divided, for calls with too few queries to fill
            a GPU: decoding, above all. Parts are computed beside each other and put together by a
            second kernel, from a workspace that is the call's own. 0: as many as pay, which
            :func:`explain` tells; 1: never split; more: as many, but no more than there are tiles
            of keys. Results of different numbers differ by rounding; those of 0 may then depend on
            batch size and GPU, too. FlashAttention-4's default is 1. The CPU splits nothing.
        pack_gqa: the query heads of one KV head share the blocks of query rows, which then are full
            where queries are few, as in decoding; never changes a bit of the result. None: where
            that takes fewer blocks. True asks for it, and warns once where it cannot be; False
            forbids it.
        deterministic: the backward is bitwise reproducible too, as the forward always is. On an
            H200 that takes 3 to 30% of its speed, most with few heads and short sequences.
        return_lse: also return the log-sum-exp of the scores, through which gradients flow, too.
        qv, gather_kv_indices, score_mod, score_mod_bwd, mask_mod,
            aux_tensors, aux_scalars, block_sparse_tensors, block_sparse_tensors_bwd: as in
            FlashAttention-4, not supported yet: all but the default raise NotImplementedError.

    Returns:
        ``(out, lse)``: ``out (batch, seqlen_q, heads_q, head_dim_v)`` in the dtype of ``q``; ``lse
        (batch, heads_q, seqlen_q)`` float32, natural logarithm, or None without ``return_lse``. A
        query without any visible key gets out 0 and lse -inf (the sink's value where there is one).
        numpy arrays give numpy arrays; producers other than torch and numpy give torch tensors.

    Gradients of torch tensors reach ``q``, ``k``, ``v`` and ``learnable_sink``; the backward keeps
    those, ``out`` and the log-sum-exp, and has no derivative of its own. Under
    ``torch.autocast``, ``q``, ``k`` and ``v`` are cast to its dtype, as for
    ``torch.nn.functional.scaled_dot_product_attention``.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: shapes, sizes, devices or scalars out of range.
        NotImplementedError: valid, but not supported yet; the message says what.
        RuntimeError: the driver or the compiler.
    """
    if (
        qv is not None
        or gather_kv_indices is not None
        or score_mod is not None
        or score_mod_bwd is not None
        or mask_mod is not None
        or aux_tensors is not None
        or aux_scalars is not None
        or block_sparse_tensors is not None
        or block_sparse_tensors_bwd is not None
    ):
        _reject_unsupported(
            qv=qv,
            gather_kv_indices=gather_kv_indices,
            score_mod=score_mod,
            score_mod_bwd=score_mod_bwd,
            mask_mod=mask_mod,
            aux_tensors=aux_tensors,
            aux_scalars=aux_scalars,
            block_sparse_tensors=block_sparse_tensors,
            block_sparse_tensors_bwd=block_sparse_tensors_bwd,
        )
    if torch._C._is_any_autocast_enabled():
        q, k, v = autograd.autocast(q, k, v)
    if torch.is_grad_enabled() and (
        getattr(q, "requires_grad", None) is True
        or getattr(k, "requires_grad", None) is True
        or getattr(v, "requires_grad", None) is True
        or getattr(learnable_sink, "requires_grad", None) is True
    ):
        options = autograd.Options(softmax_scale, causal, window_size, softcap)
        choices = autograd.Choices(num_splits, pack_gqa, deterministic)
        return autograd.attend(q, k, v, learnable_sink, options, choices, return_lse)
    return _C.forward(
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_size,
        softcap,
        learnable_sink,
        num_splits,
        pack_gqa,
        return_lse,
    )


def _reject_unsupported(**arguments: Any) -> NoReturn:
    names = ", ".join(name for name, value in arguments.items() if value is not None)
    raise NotImplementedError(f"flash_attn_func does not support {names} yet")


class Kernel(NamedTuple):
    """What the compiler makes a kernel of."""

    kernel: str  # the source of that name
    variant: str  # canonical name
    options: tuple[str, ...]  # compile-time constants


@dataclass(frozen=True)
class Plan:
    """How a call is carried out. Bytes and counts; None where a CPU call has no use for it."""

    kernel: str  # "cpu", or the kernel source of that name
    threads: int | None = None  # CPU: cores used
    variant: str | None = None  # canonical name of the compiled kernel
    options: tuple[str, ...] = ()  # its compile-time constants
    tile_m: int | None = None  # query rows per block
    tile_n: int | None = None  # keys per stage
    warps: int | None = None
    stages: int | None = None
    blocks: int | None = None  # the grid
    group_heads: int | None = None  # (batch, head) pairs that run together
    smem_bytes: int | None = None  # shared memory that a block uses
    smem_request: int | None = None  # and asks for: more where FA_SM120_LIMITS pads it
    blocks_per_sm: int | None = None
    num_splits: int | None = None  # parts of the keys, a block for each
    workspace_bytes: int | None = None  # for the parts
    combine: Kernel | None = None  # puts them together
    pack_gqa: bool | None = None  # the query heads of one KV head share blocks
    reasons: dict[str, str] = field(default_factory=dict)  # choice -> why

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All that the call launches, in order; none on the CPU."""
        if self.variant is None:
            return ()
        first = Kernel(self.kernel, self.variant, self.options)
        return (first, self.combine) if self.combine else (first,)

    def __str__(self) -> str:
        skipped = ("reasons", "options")
        facts = {k: v for k, v in vars(self).items() if v is not None and k not in skipped}
        if self.combine:
            facts["combine"] = self.combine.variant
        lines = [f"{name:14} {value}" for name, value in facts.items()]
        return "\n".join(lines + [f"  {choice}: {why}" for choice, why in self.reasons.items()])


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    arch: int | None = None,
) -> Plan:
    """The plan of ``flash_attn_func(q, k, v, ...)``, with the reason for every choice.

    Args:
        q, k, v, softmax_scale, causal, window_size, learnable_sink, softcap, num_splits, pack_gqa:
            as in :func:`flash_attn_func`.
        arch: plan for this compute capability (120, 90, ...) instead of the device of ``q``, which
            needs no GPU.

    Raises:
        The exceptions of :func:`flash_attn_func`.
    """
    plan = _C.explain(
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_size,
        softcap,
        learnable_sink,
        num_splits,
        pack_gqa,
        arch or 0,
    )
    combine = plan.pop("combine", None)
    return Plan(**plan, combine=combine and Kernel(*combine))


@dataclass(frozen=True)
class BackwardPlan:
    """How the gradients of a call are computed. Counts, and bytes; None on the CPU."""

    kernels: tuple[Kernel, ...]  # all that it launches, in order; none on the CPU
    tile_m: int | None = None  # queries at a time
    tile_n: int | None = None  # keys per block
    warps: int | None = None
    blocks: int | None = None  # the grid of the main kernel
    parts: int | None = None  # blocks that share a tile of keys
    smem_bytes: int | None = None  # shared memory that a block uses
    smem_request: int | None = None  # and asks for: more where FA_SM120_LIMITS pads it
    blocks_per_sm: int | None = None
    workspace_bytes: int | None = None
    tma: bool | None = None  # the TMA brings queries; else cp.async

    @property
    def main(self) -> Kernel | None:
        """The kernel that multiplies matrices; None where nothing is launched."""
        return next((kernel for kernel in self.kernels if kernel.kernel == "backward"), None)


def explain_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    arch: int | None = None,
) -> BackwardPlan:
    """The plan of the backward of ``flash_attn_func(q, k, v, ...)``, of a dense gradient.

    Args:
        q, k, v, softmax_scale, causal, window_size, learnable_sink, softcap, deterministic: as in
            :func:`flash_attn_func`.
        arch: as in :func:`explain`.

    Raises:
        The exceptions of :func:`flash_attn_func`.
    """
    plan = _C.explain_backward(
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_size,
        softcap,
        learnable_sink,
        deterministic,
        arch or 0,
    )
    kernels = tuple(Kernel(*kernel) for kernel in plan.pop("kernels"))
    return BackwardPlan(kernels, **plan)
