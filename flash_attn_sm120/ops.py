"""The operators flash_attn_sm120::forward and ::backward, which torch can follow; and of calls with
lengths on the device, ::varlen_forward and ::varlen_backward, the same with more arguments.

They compute what _C computes, by the same call, and add what torch asks of an operator: a schema,
shapes without data, rules for vmap and for DTensor, and FLOPs. autograd.py adds the derivatives.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from flash_attn_sm120 import _C
from flash_attn_sm120.imports import when_imported
from flash_attn_sm120.plan import ScalarOptions

if TYPE_CHECKING:
    from torch import Tensor

# ---- schemas -------------------------------------------------------------------------------------

# The tensors of lengths, in the operators' order; any of them may be None. After them, or alone in
# a call without lengths, come the slopes of ALiBi and the seed of dropout, which have no gradient
# either; and in a call without lengths a bias, which has one.
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table")
SLOPES, SEED, BIAS = _OTHERS = ("alibi_slopes", "dropout_seed", "attn_bias")

# The options of csrc/options.h in types that operators have; a window is two of them.
_OPTIONS = (
    "float? softmax_scale=None, bool causal=False, SymInt? window_left=None, "
    "SymInt? window_right=None, float softcap=0.0, float dropout_p=0.0, SymInt num_splits=0, "
    "bool? pack_gqa=None, bool deterministic=False"
)
_BOUNDS = "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? learnable_sink"

# The package's own name, so that another of this project may be loaded beside it.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])
LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def _define() -> None:
    dense = "".join(f", Tensor? {name}=None" for name in _OTHERS)
    with_bias = f", Tensor? {SLOPES}, Tensor? {SEED}, Tensor {BIAS}"
    varlen = "".join(f", Tensor? {name}" for name in LENGTHS) + dense.rpartition(",")[0]
    results = "Tensor dq, Tensor dk, Tensor dv, Tensor dsink"  # no elements where there is no sink
    for prefix, others, options in (("", dense, ""), ("varlen_", varlen, f"{_BOUNDS}, ")):
        LIBRARY.define(
            f"{prefix}forward({_INPUTS}{others}, *, {options}{_OPTIONS}) "
            "-> (Tensor out, Tensor lse)"
        )
    for prefix, others, options, dbias in (
        ("", dense, "", ""),
        ("varlen_", varlen, f"{_BOUNDS}, ", ""),
        ("bias_", with_bias, "", ", Tensor dbias"),
    ):
        LIBRARY.define(
            f"{prefix}backward(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse"
            f"{others}, *, {options}{_OPTIONS}) -> ({results}{dbias})"
        )


_define()
_OPS: Any = getattr(torch.ops, NAMESPACE)
FORWARD, VARLEN_FORWARD = FORWARDS = (_OPS.forward.default, _OPS.varlen_forward.default)
BACKWARD, VARLEN_BACKWARD, BIAS_BACKWARD = BACKWARDS = (
    _OPS.backward.default,
    _OPS.varlen_backward.default,
    _OPS.bias_backward.default,  # which has the gradient of the bias, too
)


def to_schema(window_size: Any = None, **options: Any) -> dict[str, Any]:
    """Options of _C as the operators take them.

    Raises:
        TypeError: a tensor where a number is wanted, or a window that is no pair.
    """
    if "key_blocks" in options:
        raise NotImplementedError(
            "block_sparse_tensors with attn_bias has no gradient that torch follows"
        )
    if window_size is None:
        window_size = (None, None)
    if len(window_size) != 2:
        raise TypeError(f"window_size must be (left, right), got {window_size}")
    options.update(window_left=window_size[0], window_right=window_size[1])
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a number, got a tensor: no gradient would reach it")
    for name in ("causal", "deterministic"):
        options[name] = bool(options.get(name))
    return options


def from_schema(
    window_left: int | None = None, window_right: int | None = None, **options: Any
) -> ScalarOptions:
    """Options of an operator as _C takes them."""
    return {"window_size": (window_left, window_right), **options}  # type: ignore[typeddict-item]


# ---- calls ---------------------------------------------------------------------------------------


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    lengths: dict[str, Any],
    options: ScalarOptions,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)`` by the operator; lse is None without ``return_lse``."""
    check_tensors("torch follows the call", q, k, v, learnable_sink, **lengths)
    forward = VARLEN_FORWARD if has_lengths(lengths) else FORWARD
    out, lse = forward(q, k, v, learnable_sink, *in_order(lengths), **to_schema(**options))
    return out, lse if return_lse else None


def backward(
    options: ScalarOptions,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *lengths: Tensor | None,
    bias_gradient: bool = False,
) -> tuple[Tensor, ...]:
    """``(dq, dk, dv, dsink)`` by the operator, and dbias; dsink has no elements without a sink."""
    if "key_blocks" in options and not bias_gradient:
        from flash_attn_sm120.mods import operators
        from flash_attn_sm120.mods.call import Call

        call = Call(q, k, v, learnable_sink, by_name(lengths), {**options})
        return tuple(operators.backward({}, call, dout, dlse, out, lse)[0])
    op = VARLEN_BACKWARD if len(lengths) >= len(LENGTHS) else BACKWARD
    if bias_gradient:
        op = BIAS_BACKWARD
    gradients: tuple[Tensor, ...] = op(
        dout, dlse, q, k, v, learnable_sink, out, lse, *lengths, **to_schema(**options)
    )
    return gradients


def has_lengths(lengths: dict[str, Any]) -> bool:
    """Whether a call has lengths, not slopes, a seed or a bias alone."""
    return any(name not in _OTHERS for name in lengths)


def learns_slopes(tensors: dict[str, Any]) -> bool:
    """Whether the slopes of a call are to have a gradient."""
    return getattr(tensors.get(SLOPES), "requires_grad", None) is True


def in_order(lengths: dict[str, Any]) -> tuple[Any, ...]:
    """Lengths, slopes, a seed and a bias as the operators take them; none where a call has none."""
    others = tuple(map(lengths.get, _OTHERS))
    count = 2 if others[1] is not None else int(SLOPES in lengths)
    if others[2] is not None:
        count = 3
    return (*(map(lengths.get, LENGTHS) if has_lengths(lengths) else ()), *others[:count])


def by_name(lengths: tuple[Any, ...]) -> dict[str, Any]:
    """Lengths, slopes, a seed and a bias as _C takes them: the inverse of :func:`in_order`."""
    names = (*(LENGTHS if len(lengths) >= len(LENGTHS) else ()), *_OTHERS)
    return dict(zip(names, lengths, strict=False))


def check_tensors(where: str, q: Any, k: Any, v: Any, learnable_sink: Any, **lengths: Any) -> None:
    """What torch follows is torch's: tensors, or what stands for them, as torch.fx.Proxy.

    Raises:
        TypeError: an argument is something else.
        NotImplementedError: a nested tensor.
    """
    tensors = {"q": q, "k": k, "v": v, "learnable_sink": learnable_sink, **lengths}
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor):
            if x.is_nested:
                raise NotImplementedError(f"{name} is a nested tensor, which is not supported yet")
        elif not hasattr(x, "__torch_function__") and (x is not None or name in ("q", "k", "v")):
            raise TypeError(f"{name} must be a torch.Tensor where {where}, got {type(x).__name__}")


def run_forward(
    options: ScalarOptions,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    *lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, straight from C."""
    named = by_name(lengths)
    return _C.forward(q, k, v, learnable_sink=learnable_sink, return_lse=True, **named, **options)  # type: ignore[return-value]


def run_backward(
    options: ScalarOptions,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *lengths: Tensor | None,
    bias_gradient: bool = False,
) -> tuple[Any, ...]:
    """``(dq, dk, dv, dsink)``, straight from C, and dbias; dsink is None without a sink.

    torch.use_deterministic_algorithms(True) asks for reproducible gradients of every operation.
    """
    if torch.are_deterministic_algorithms_enabled():
        options = {**options, "deterministic": True}
    named = by_name(lengths)
    bias = named.get(BIAS)
    if bias_gradient:
        named["bias_gradient"] = True
        if options.get("deterministic"):  # of all scores first, and then summed up in order
            assert bias is not None
            named[BIAS] = bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    gradients = _C.backward(
        dout, q, k, v, out, lse, dlse, learnable_sink=learnable_sink, **named, **options
    )
    if bias is None or named[BIAS] is bias:
        return gradients
    return *gradients[:-1], gradients[-1].sum_to_size(bias.shape)


# ---- what computes them --------------------------------------------------------------------------


def _forward(*tensors: Any, **options: Any) -> Any:
    return run_forward(from_schema(**options), *tensors)


def _backward(bias_gradient: bool, dout: Tensor, *tensors: Any, **options: Any) -> Any:
    dq, dk, dv, dsink, *dbias = run_backward(
        from_schema(**options), dout, *tensors, bias_gradient=bias_gradient
    )
    return dq, dk, dv, _no_sink(dout) if dsink is None else dsink, *dbias


def _no_sink(like: Tensor) -> Tensor:
    return like.new_empty((0,), dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    for _op in FORWARDS:
        LIBRARY.impl(_op, _forward, _device)
    for _op in BACKWARDS:
        LIBRARY.impl(_op, partial(_backward, _op is BIAS_BACKWARD), _device)


# ---- shapes without data -------------------------------------------------------------------------


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    *lengths: Any,
    dropout_p: float = 0.0,
    **_: Any,
) -> Any:
    named = by_name(lengths)
    _check_dropout(q, dropout_p, named.pop(SEED, None))
    _check_bias(named.pop(BIAS, None), q, k)
    _check(q, k, v, sink, named)
    *batch, rows, heads, _head_dim = q.shape
    out = q.new_empty((*batch, rows, heads, v.shape[-1]))
    return out, q.new_empty((*batch, heads, rows), dtype=torch.float32)


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    *_: Any,
    **__: Any,
) -> Any:
    dsink = _no_sink(q) if sink is None else sink.new_empty(sink.shape, dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dsink


def _fake_bias_backward(*tensors: Any, **options: Any) -> Any:
    dbias = tensors[-1].new_empty(tensors[-1].shape, dtype=torch.float32)
    return *_fake_backward(*tensors, **options), dbias


for _op in FORWARDS:
    torch.library.register_fake(_op, _fake_forward, lib=LIBRARY)
for _op, _fake in zip(
    BACKWARDS, (_fake_backward, _fake_backward, _fake_bias_backward), strict=True
):
    torch.library.register_fake(_op, _fake, lib=LIBRARY)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _check(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, lengths: dict[str, Tensor | None]
) -> None:
    """What csrc/problem.c asks of shapes, types and devices, before there is data."""
    cu_seqlens_q, cu_seqlens_k = lengths.get("cu_seqlens_q"), lengths.get("cu_seqlens_k")
    is_paged = lengths.get("page_table") is not None
    _require(
        not is_paged or cu_seqlens_k is None,
        "page_table takes no cu_seqlens_k: the keys of pages are not packed, their lengths are "
        "seqused_k",
    )
    ndim_q, ndim_k = (4 if x is None else 3 for x in (cu_seqlens_q, cu_seqlens_k))
    for name, x, ndim in (
        *(("q", q, ndim_q), ("k", k, ndim_k), ("v", v, ndim_k), ("learnable_sink", sink, 1)),
        *(
            (name, x, 2 if name == "page_table" else 1)
            for name, x in lengths.items()
            if name != SLOPES
        ),
    ):
        if x is None:
            continue
        _require(x.dim() == ndim, f"{name} must have {ndim} dimensions, got {x.dim()}")
        _require(x.device == q.device, f"{name} must be on q's device, {q.device}, got {x.device}")
        if name in lengths:
            if x.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {x.dtype}")
        elif x.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got {x.dtype}")
        elif x is not sink and x.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} like q, got {x.dtype}")
    for what, x in (("head_dim (of q and k)", q), ("head_dim_v (of v)", v)):
        good = (x.shape[-1] % 8 == 0, x.shape[-1] >= 8, x.shape[-1] <= 256)
        _require(all(good), f"{what} must be a multiple of 8 from 8 to 256, got {x.shape[-1]}")
    _check_sizes(q, k, v, sink, lengths)
    _check_slopes(lengths.get(SLOPES), q, lengths)
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    _require(
        heads_q > 0 and heads_kv > 0 and heads_q % heads_kv == 0,
        f"the heads of q must be a multiple of the heads of k and v, got {heads_q} and {heads_kv}",
    )


def _check_dropout(q: Tensor, dropout_p: float, seed: Tensor | None) -> None:
    _require(0 <= dropout_p < 1, f"dropout_p must be in [0, 1), got {dropout_p}")
    _require(not dropout_p or seed is not None, "dropout_p above 0 needs a dropout_seed")
    if not dropout_p or seed is None:
        return
    if seed.dtype not in (torch.int64, torch.uint64):
        raise TypeError(f"dropout_seed must be int64 or uint64, got {seed.dtype}")
    _require(seed.shape == (2,), f"dropout_seed must be two numbers, got {tuple(seed.shape)}")
    _require(seed.device == q.device, f"dropout_seed must be on q's device, got {seed.device}")


def _check_sizes(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, lengths: dict[str, Tensor | None]
) -> None:
    """Whether the sizes that belong together are equal."""
    cu_seqlens_q, batch = lengths.get("cu_seqlens_q"), q.shape[0]
    if cu_seqlens_q is not None:
        batch = cu_seqlens_q.shape[0] - 1
        _require(batch >= 0, "cu_seqlens_q must have batch + 1 elements, got 0")
    is_paged, is_packed = (lengths.get(name) is not None for name in ("page_table", "cu_seqlens_k"))
    rows = "k's page size" if is_paged else "k's total" if is_packed else "k's seqlen"
    sizes: list[tuple[str, Tensor | None, str, int, int]] = [
        ("k", k, "q's head_dim", k.dim() - 1, q.shape[-1])
    ]
    if is_paged:
        size = k.shape[1]
        _require(
            size >= 1 and size <= 1024,
            f"pages must have from 1 to 1024 rows (dimension 1 of k), got {size}",
        )
        sizes.append(("v", v, "k's pages", 0, k.shape[0]))
    elif not is_packed:
        sizes += [(name, x, "q's batch", 0, batch) for name, x in (("k", k), ("v", v))]
    sizes += [
        ("v", v, rows, v.dim() - 3, k.shape[-3]),
        ("v", v, "k's heads", v.dim() - 2, k.shape[-2]),
        ("learnable_sink", sink, "q's heads", 0, q.shape[-2]),
        ("cu_seqlens_k", lengths.get("cu_seqlens_k"), "batch + 1 =", 0, batch + 1),
    ]
    for name in ("seqused_q", "seqused_k", "page_table"):
        sizes.append((name, lengths.get(name), "q's batch", 0, batch))
    for name, x, meaning, dim, like in sizes:
        got = like if x is None else x.shape[dim]
        _require(got == like, f"{name} must have {meaning} {like} in dimension {dim}, got {got}")


def _check_slopes(slopes: Tensor | None, q: Tensor, lengths: dict[str, Tensor | None]) -> None:
    if slopes is None:
        return
    ndim, cu_seqlens_q = slopes.dim(), lengths.get("cu_seqlens_q")
    _require(ndim in (1, 2), f"{SLOPES} must have 1 or 2 dimensions, got {ndim}")
    if slopes.dtype != torch.float32:
        raise TypeError(f"{SLOPES} must be float32, got {slopes.dtype}")
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    for meaning, dim, like in (("q's batch", 0, batch), ("q's heads", 1, q.shape[-2]))[2 - ndim :]:
        got = slopes.shape[dim - 2]
        _require(
            got == like,
            f"{SLOPES} must have {meaning} {like} in dimension {dim + ndim - 2}, got {got}",
        )
    _require(
        slopes.device == q.device,
        f"{SLOPES} must be on q's device, {q.device}, got {slopes.device}",
    )


def _check_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    if bias is None:
        return
    _require(bias.dim() == 4, f"{BIAS} must have 4 dimensions, got {bias.dim()}")
    if bias.dtype not in (torch.float32, q.dtype):
        raise TypeError(f"{BIAS} must be float32, or {q.dtype} like q, got {bias.dtype}")
    _require(bias.device == q.device, f"{BIAS} must be on q's device, got {bias.device}")
    for dim, (meaning, like) in enumerate(
        (("batch", q.shape[0]), ("heads", q.shape[2]), ("seqlen", q.shape[1]))
    ):
        got = bias.shape[dim]
        _require(
            got in (1, like),
            f"{BIAS} must have size 1 or q's {meaning} {like} in dimension {dim}, got {got}",
        )
    got, keys = bias.shape[3], k.shape[1]
    _require(got == keys, f"{BIAS} must have k's seqlen {keys} in dimension 3, got {got}")


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---- vmap: one more dimension is folded into the batch, or into the heads ------------------------

# The dimensions of batch and heads. Heads are folded where there are a sink or slopes, numbers per
# head, and where a call has lengths, which all heads share.
_QKV, _LSE, _SINK, _DSINK = (0, -2), (0, -2), (None, -1), (0, -1)


def _fold(x: Any, in_dim: int | None, dim: int, size: int) -> Any:
    """The tensor with the mapped dimension in front of dimension ``dim``, as one."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
    dim %= x.dim() - 1
    return x.movedim(0, dim).flatten(dim, dim + 1)


def _unfold(x: Any, dim: int, size: int) -> tuple[Any, int]:
    """The inverse, and where the mapped dimension is then."""
    dim %= x.dim()
    return x.unflatten(dim, (size, x.shape[dim] // size)), dim


def _vmap(
    op: Any, kinds: Any, result_kinds: Any, info: Any, in_dims: Any, *tensors: Any, **options: Any
) -> Any:
    """One call for all that is mapped; ``kinds`` are those of the tensors before the lengths."""
    if options.get("dropout_p"):
        raise NotImplementedError(
            "vmap with dropout_p is not supported yet: make the mapped dimension part of the batch"
        )
    count, size = len(kinds), info.batch_size
    named = by_name(tensors[count:])
    if named.get(BIAS) is not None:
        raise NotImplementedError(
            "vmap with attn_bias is not supported yet: make the mapped dimension part of the batch"
        )
    slopes, slopes_dim = named.get(SLOPES), by_name(in_dims[count:]).get(SLOPES)
    lengths = in_order({name: x for name, x in named.items() if name != SLOPES})
    if any(in_dim is not None for in_dim in in_dims[count : count + len(lengths)]):
        raise NotImplementedError(
            "vmap over lengths or pages is not supported yet: map q, k and v of sequences that "
            "have the same lengths, or pack all sequences into one call"
        )
    has_sink = tensors[kinds.index(_SINK)] is not None
    by_heads = bool(lengths) or has_sink or slopes is not None
    folded = [
        _fold(x, in_dim, kind[by_heads], size)
        for x, in_dim, kind in zip(tensors[:count], in_dims[:count], kinds, strict=True)
    ]
    if slopes is not None:
        lengths = (*lengths, _fold(slopes, slopes_dim, -1, size))
    results = zip(op(*folded, *lengths, **options), result_kinds, strict=True)
    unfolded, dims = zip(*(_unfold(x, kind[by_heads], size) for x, kind in results), strict=True)
    return unfolded, dims


def _register_vmap() -> None:
    inputs = (_QKV, _QKV, _QKV, _SINK)
    for ops, kinds, results in (
        (FORWARDS, inputs, (_QKV, _LSE)),
        (BACKWARDS, (_QKV, _LSE, *inputs, _QKV, _LSE), (_QKV, _QKV, _QKV, _DSINK)),
    ):
        for op in ops:
            torch.library.register_vmap(op, partial(_vmap, op, kinds, results), lib=LIBRARY)


if hasattr(torch.library, "register_vmap"):  # PyTorch 2.5; before, vmap calls once per element
    _register_vmap()


# ---- FLOPs: those of SDPA, which count masked scores, too ----------------------------------------


def forward_flops(q: Any, k: Any, v: Any, sink: Any, *lengths: Any, **options: Any) -> Any:
    from torch.utils.flop_counter import sdpa_flop_count

    rows, keys = _rows_and_keys(q, k, by_name(lengths), **options)
    shapes = ((1, q[-2], n, x[-1]) for n, x in ((rows, q), (keys, k), (keys, v)))
    return sdpa_flop_count(*shapes)  # type: ignore[no-untyped-call]


def backward_flops(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, sink: Any, out: Any, lse: Any, *lengths: Any,
    **options: Any,
) -> Any:  # fmt: skip
    from torch.utils.flop_counter import sdpa_backward_flop_count

    rows, keys = _rows_and_keys(q, k, by_name(lengths), **options)
    sides = ((rows, dout), (rows, q), (keys, k), (keys, v))
    shapes = ((1, q[-2], n, x[-1]) for n, x in sides)
    return sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]


def _rows_and_keys(
    q: Any,
    k: Any,
    lengths: dict[str, Any],
    *,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    **_: Any,
) -> tuple[Any, Any]:
    """Query rows and keys of one sequence with the work of all, from shapes.

    Of packed sides it is a bound, as lengths stay on the device: all rows of one side, each with as
    many rows of the other as the longest sequence may have. Equal lengths with their max_seqlen
    are exact.
    """
    cu_seqlens_q, cu_seqlens_k = lengths.get("cu_seqlens_q"), lengths.get("cu_seqlens_k")
    batch = q[0] if cu_seqlens_q is None else cu_seqlens_q[0] - 1
    pages = lengths.get("page_table")
    all_of, longest = [], []
    rows_k = k[-3] if pages is None else pages[1] * k[-3]
    for rows, is_packed, is_paged, bound in (
        (q[-3], cu_seqlens_q is not None, False, max_seqlen_q),
        (rows_k, cu_seqlens_k is not None, pages is not None, max_seqlen_k),
    ):
        is_bounded = (is_packed or is_paged) and bound is not None
        longest.append(min(rows, bound) if is_bounded else rows)
        all_of.append(rows if is_packed else batch * longest[-1])
    by_rows, by_keys = (all_of[0], longest[1]), (longest[0], all_of[1])
    return by_rows if by_rows[0] * by_rows[1] <= by_keys[0] * by_keys[1] else by_keys


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for op in FORWARDS:
        register_flop_formula(op.overloadpacket)(forward_flops)
    for op in BACKWARDS:
        register_flop_formula(op.overloadpacket)(backward_flops)


when_imported("torch.utils.flop_counter", _register_flops)


# ---- DTensor -------------------------------------------------------------------------------------


def _register_sharding() -> None:
    try:
        from flash_attn_sm120 import sharding
    except ImportError:  # PyTorch before 2.5, where DTensor says that the operator has no rule
        return
    sharding.register()


when_imported("torch.distributed.tensor", _register_sharding)
