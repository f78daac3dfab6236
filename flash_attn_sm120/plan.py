"""Plans: how a call is carried out, with the reason for every choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch

from flash_attn_sm120 import _C, block_mask

if TYPE_CHECKING:
    from typing_extensions import Unpack

Tensor = Any  # torch.Tensor, numpy.ndarray, or any other object with __dlpack__
Window = Sequence[int | None] | None


class ScalarOptions(TypedDict, total=False):
    """The options of a call in both directions that are no tensors."""

    softmax_scale: float | None
    causal: bool
    window_size: Window
    softcap: float
    dropout_p: float
    num_splits: int
    pack_gqa: bool | None
    deterministic: bool
    key_blocks: tuple[Any, ...] | None
    query_blocks: tuple[Any, ...] | None
    heads_first: bool


class VarlenOptions(ScalarOptions, total=False):
    """Those and the bounds of lengths that are on the device."""

    max_seqlen_q: int | None
    max_seqlen_k: int | None


class CallOptions(VarlenOptions, total=False):
    """The options of a call in both directions: see :func:`flash_attn_func` and
    :func:`flash_attn_varlen_func`."""

    learnable_sink: Tensor | None
    dropout_seed: Tensor | None
    alibi_slopes: Tensor | None
    attn_bias: Tensor | None
    score_mod: Any
    mask_mod: Any
    k_descale: Tensor | None
    v_descale: Tensor | None
    q_descale: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    page_table: Tensor | None
    bias_gradient: bool  # of the backward alone


class ExplainOptions(CallOptions, total=False):
    """Those, and what Python makes some of them of."""

    aux_tensors: list[Tensor] | None
    block_sparse_tensors: Any
    block_sparse_tensors_bwd: Any


class Kernel(NamedTuple):
    """What the compiler makes a kernel of."""

    kernel: str  # the source of that name
    variant: str  # canonical name
    options: tuple[str, ...]  # compile-time constants


class Step(NamedTuple):
    """One launch."""

    kernel: str
    variant: str
    options: tuple[str, ...]
    blocks: int  # the grid; 0: nothing is launched
    threads: int  # per block


@dataclass(frozen=True)
class Plan:
    """How a call is carried out in one direction. Bytes and counts; None where of no concern."""

    direction: str  # "forward" or "backward"
    steps: tuple[Step, ...] = ()  # in the order of their launches; none on the CPU
    main_step: int = 0  # the one that multiplies matrices
    threads: int | None = None  # CPU: cores used
    tile_m: int | None = None  # query rows of a tile
    tile_n: int | None = None  # keys of a tile
    warps: int | None = None
    stages: int | None = None  # of K and V; in the backward of Q
    tma: bool | None = None  # the TMA brings tiles; else cp.async
    group_heads: int | None = None  # (batch, head) pairs that run together
    num_splits: int | None = None  # forward: parts of the keys, a block for each
    q_splits: int | None = None  # backward: blocks that share a tile of keys
    pack_gqa: bool | None = None  # forward: the query heads of one KV head share blocks
    smem_bytes: int | None = None  # shared memory that a block of the main kernel uses
    smem_request: int | None = None  # and asks for: more where FA_SM120_LIMITS pads it
    blocks_per_sm: int | None = None
    workspace_bytes: int | None = None
    reasons: dict[str, str] = field(default_factory=dict)  # choice -> why

    @property
    def kernel(self) -> str:
        """The main kernel's source; "cpu" for the reference implementation; "" for nothing."""
        if self.steps:
            return self.steps[self.main_step].kernel
        return "" if self.threads is None else "cpu"

    @property
    def variant(self) -> str | None:
        """The main kernel's canonical name."""
        return self.steps[self.main_step].variant if self.steps else None

    @property
    def options(self) -> tuple[str, ...]:
        """The main kernel's compile-time constants."""
        return self.steps[self.main_step].options if self.steps else ()

    @property
    def blocks(self) -> int | None:
        """The main kernel's grid."""
        return self.steps[self.main_step].blocks if self.steps else None

    @property
    def main(self) -> Kernel | None:
        """The main kernel; None where nothing is launched."""
        return Kernel(*self.steps[self.main_step][:3]) if self.steps else None

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All that the compiler has to make, in the order of launches."""
        return tuple(Kernel(*step[:3]) for step in self.steps)

    def __str__(self) -> str:
        lines = [f"{self.direction} by {self.kernel or 'no kernel'}"]
        lines += [f"  {s.variant}: {s.blocks} blocks of {s.threads} threads" for s in self.steps]
        skipped = ("direction", "steps", "main_step", "reasons")
        facts = {k: v for k, v in vars(self).items() if v is not None and k not in skipped}
        lines += [f"{name:16} {value}" for name, value in facts.items()]
        return "\n".join(lines + [f"  {choice}: {why}" for choice, why in self.reasons.items()])


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    arch: int | None = None,
    costs: bool = False,
    **options: Unpack[ExplainOptions],
) -> Plan:
    """The plan of ``flash_attn_func(q, k, v, **options)``, with the reason for every choice; with
    lengths among the options, that of ``flash_attn_varlen_func(q, k, v, **options)``.

    Nothing is computed or copied: tensors that a call would copy first are taken to lie as their
    copies would.

    Args:
        q, k, v: as in :func:`flash_attn_func`.
        arch: plan for this compute capability (120, 90, ...) instead of the device of ``q``, which
            needs no GPU.
        costs: also say in the reasons what mods and lists of blocks cost: registers of the main
            kernel with and without them, and instructions per score. That compiles: seconds.
        options: ``softmax_scale``, ``causal``, ``window_size``, ``learnable_sink``,
            ``alibi_slopes``, ``attn_bias``, ``k_descale``, ``v_descale``, ``q_descale``,
            ``softcap``, ``dropout_p``, ``dropout_seed``, ``num_splits``, ``pack_gqa``,
            ``deterministic``, ``score_mod``, ``mask_mod``, ``aux_tensors``,
            ``block_sparse_tensors``, ``block_sparse_tensors_bwd``, as in :func:`flash_attn_func`;
            ``cu_seqlens_q``, ``cu_seqlens_k``, ``max_seqlen_q``, ``max_seqlen_k``,
            ``seqused_q``, ``seqused_k``, ``page_table``, as in
            :func:`flash_attn_varlen_func`: their contents are not read.

    Raises:
        The exceptions of :func:`flash_attn_func`.
    """
    return _explained("forward", q, k, v, arch, costs, options)


def explain_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    arch: int | None = None,
    costs: bool = False,
    **options: Unpack[ExplainOptions],
) -> Plan:
    """The plan of the backward of ``flash_attn_func(q, k, v, **options)``, of a dense gradient.

    Args:
        q, k, v, arch, costs, options: as in :func:`explain`; ``num_splits`` and ``pack_gqa``
            concern the forward alone. ``bias_gradient``: whether the gradient of ``attn_bias`` is
            wanted, too.

    Raises:
        The exceptions of :func:`flash_attn_func`.
    """
    by_switch = torch.are_deterministic_algorithms_enabled() and not options.get("deterministic")
    if by_switch:
        options["deterministic"] = True
    plan = _explained("backward", q, k, v, arch, costs, options)
    if by_switch and plan.steps:
        plan.reasons["deterministic"] += ", as torch.use_deterministic_algorithms(True) asks"
    return plan


def _explained(
    direction: str, q: Tensor, k: Tensor, v: Tensor, arch: int | None, costs: bool, options: Any
) -> Plan:
    explain = _C.explain if direction == "forward" else _C.explain_backward
    translated, traced = _translated(q, k, options, direction == "backward")
    plan = _plan(direction, explain(q, k, v, arch=arch, **translated))
    plan.reasons.update(traced)
    if costs:
        if not plan.steps:
            raise ValueError("costs=True is for kernels: pass arch=120, or tensors of a GPU")
        from flash_attn_sm120.mods.costs import costs_of

        others = {name: x for name, x in translated.items() if name not in _COSTLY}
        without = _plan(direction, explain(q, k, v, arch=arch, **others))
        major, minor = torch.cuda.get_device_capability(q.device) if arch is None else (0, arch)
        plan.reasons["costs"] = costs_of(plan, without, translated, 10 * major + minor)
    return plan


_COSTLY = ("score_mod", "mask_mod", "key_blocks", "query_blocks")


def _translated(
    q: Tensor, k: Tensor, options: Any, gradient: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """The options with mods and lists as _C takes them, and what these were traced to."""
    options, reasons = dict(options), {}
    mods = {name: options.pop(name, None) for name in ("score_mod", "mask_mod")}
    aux_tensors = options.pop("aux_tensors", None)
    tensors, backward = (options.pop(f"block_sparse_tensors{x}", None) for x in ("", "_bwd"))
    if tensors is not None:
        blocks = block_mask.read(tensors, backward, q.shape[1], k.shape[1])
        options |= blocks.options(k.shape[1], gradient)
        if mods["mask_mod"] is None:
            mods["mask_mod"] = blocks.mask_mod
        reasons["block_sparse_tensors"] = blocks.description
    for name, mod in mods.items():
        if mod is not None:
            from flash_attn_sm120.mods.attention import explain_mod

            options[name], reasons[name] = explain_mod(name, mod, aux_tensors, gradient)
    return options, reasons


def _plan(direction: str, plan: dict[str, Any]) -> Plan:
    steps = tuple(Step(*step) for step in plan.pop("steps", ()))
    return Plan(direction, steps, **plan)
