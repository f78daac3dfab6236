"""Whether results are right, of the calls that owners make: each is compared with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_sm120 import _C, _measure, flash_attn_func, flash_attn_varlen_func
from flash_attn_sm120.commands import inputs

Place = Callable[[Tensor], Tensor]  # a tensor to the device
GRADIENT_FACTOR = 3.0  # of plain PyTorch's error, as in FlashAttention-2's tests of gradients
LENGTHS, PAGE_SIZE = (128, 64, 256, 192), 64


class Case(NamedTuple):
    """A call of (batch, seqlen, heads, D), and what has to hold of it."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: tuple[int, int]  # of queries, of K and V
    head_dims: tuple[int, int]  # of Q and K, of V
    options: Mapping[str, Any] = MappingProxyType({})
    gradients: bool = False
    sink: bool = False


def cases() -> Iterator[Case]:
    """Those of the report."""
    for heads in ((32, 8), (28, 4)):
        for causal in (False, True):
            kind = f"{heads[0]}/{heads[1]} heads{' causal' * causal}"
            options = {"causal": causal}
            yield Case(f"{kind}, S 1024", 1, 1024, 1024, heads, (128, 128), options, True)
            yield Case(f"{kind}, S 4096", 1, 4096, 4096, heads, (128, 128), options)
    yield Case("one head of D 128, Dv 64", 1, 64, 64, (1, 1), (128, 64))
    yield Case("S 2048, D 128, Dv 64", 2, 2048, 2048, (4, 4), (128, 64), {"causal": True})
    of_features: dict[str, dict[str, Any]] = {
        "splits": {"num_splits": 4},
        "window": {"window_size": (100, 20)},
        "softcap": {"softcap": 20.0, "causal": True},
        "sink": {"causal": True},
        "deterministic": {"deterministic": True, "causal": True},
    }
    for name, options in of_features.items():
        queries = 4 if name == "splits" else 512
        gradients = name != "splits"
        shape = 2, queries, 512, (8, 2), (128, 128)
        yield Case(name, *shape, options, gradients, name == "sink")


def run(place: Place, every: Iterator[Case] | None = None) -> Iterator[dict[str, Any]]:
    """A record for each check: its name, whether it passed, and what it found."""
    for case in every or cases():
        yield guarded(case.name, partial(_check, case, place))
    small = Case("", 1, 256, 256, (8, 2), (64, 64), {"causal": True})
    yield guarded("pack_gqa changes no bit", lambda: _same_bits(small, place))
    yield guarded("cp.async and the TMA agree", lambda: _feeds(small, place))
    yield guarded(f"packed sequences of {LENGTHS}", lambda: _packed(place))
    yield guarded(f"pages of {PAGE_SIZE}, permuted", lambda: _pages(place))


def guarded(name: str, check: Callable[[], str]) -> dict[str, Any]:
    """A record of ``check``, which returns what is wrong, "" if nothing is."""
    try:
        wrong = check()
    except NotImplementedError as error:
        return {"check": name, "passed": None, "said": f"not supported: {error}"}
    except torch.cuda.OutOfMemoryError:
        return {"check": name, "passed": None, "said": "out of memory"}
    except Exception as error:  # a row, and the other checks still run
        wrong = next(iter(str(error).splitlines()), "") or repr(error)
    return {"check": name, "passed": not wrong, "said": wrong}


# ---- checks --------------------------------------------------------------------------------------


def _tensors(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    (heads_q, heads_kv), (dim, dim_v) = case.heads, case.head_dims
    shapes = (case.queries, heads_q, dim), (case.keys, heads_kv, dim), (case.keys, heads_kv, dim_v)
    q, k, v = (
        torch.randn(case.batch, *shape, generator=generator, dtype=torch.float32).bfloat16()
        for shape in shapes
    )
    return q, k, v


def _check(case: Case, place: Place) -> str:
    generator = torch.Generator().manual_seed(0)
    q, k, v = qkv = [place(x) for x in _tensors(case, generator)]
    options = dict(case.options)
    if case.sink:
        options["learnable_sink"] = place(torch.randn(case.heads[0], generator=generator))
    out, lse = flash_attn_func(q, k, v, return_lse=True, **options)
    got = [out]
    dout = torch.randn(out.shape, generator=generator).bfloat16()
    if case.gradients:
        gradients = partial(_C.backward, place(dout), q, k, v, out, lse, None, **options)
        got += gradients()[:3]
        if case.options.get("deterministic"):
            again = gradients()[:3]
            if not all(torch.equal(a, b) for a, b in zip(got[1:], again, strict=True)):
                return "two calls differ"
    wanted = dout.to(out.device) if case.gradients else None
    plainly = [_plain(qkv, dtype, wanted, options) for dtype in (torch.float32, torch.bfloat16)]
    for name, own, exact, rounded in zip(("out", "dq", "dk", "dv"), got, *plainly, strict=False):
        factor = 2.0 if name == "out" and not case.options.get("softcap") else GRADIENT_FACTOR
        error = _measure.max_error(own, exact).item()
        allowed = _measure.allowed_error(exact, rounded, factor=factor).item()
        if not error <= allowed:  # NaN is wrong
            return f"{name}: largest error {error:.3g}, allowed {allowed:.3g}"
    return ""


def _plain(
    qkv: list[Tensor], dtype: torch.dtype, dout: Tensor | None, options: dict[str, Any]
) -> list[Tensor]:
    """out, and with dout its gradients, in a dtype; a KV head at a time."""
    q, k, v = (x.detach().as_subclass(Tensor).to(dtype).requires_grad_() for x in qkv)
    group = q.shape[2] // k.shape[2]
    outs, gradients = [], [torch.zeros_like(x) for x in (q, k, v)]
    for head in range(k.shape[2]):
        heads = slice(head * group, (head + 1) * group)
        own = [q[:, :, heads], k[:, :, head : head + 1], v[:, :, head : head + 1]]
        leaves = [x.detach().requires_grad_() for x in own]
        out = _plain_heads(leaves[0], leaves[1], leaves[2], heads, options)
        outs.append(out.detach())
        if dout is not None:
            of_head = torch.autograd.grad(out, leaves, dout[:, :, heads].to(dtype))
            for gradient, part, where in zip(
                gradients, of_head, (heads, *[slice(head, head + 1)] * 2), strict=True
            ):
                gradient[:, :, where] = part
    return [torch.cat(outs, 2), *gradients]


def _plain_heads(q: Tensor, k: Tensor, v: Tensor, heads: slice, options: dict[str, Any]) -> Tensor:
    """Attention of some query heads over one KV head, every step in the type of the inputs."""
    queries, keys = q.shape[1], k.shape[1]
    distance = torch.arange(keys, device=q.device) - torch.arange(queries, device=q.device)[:, None]
    distance = distance - (keys - queries)  # of the key after the query's diagonal
    left, right = options.get("window_size", (None, None))
    right = 0 if options.get("causal") else right
    visible = torch.ones_like(distance, dtype=torch.bool)
    if right is not None:
        visible &= distance <= right
    if left is not None:
        visible &= distance >= -left
    sink = options.get("learnable_sink")
    out = _measure.plain_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        visible,
        softcap=options.get("softcap", 0.0),
        sink=None if sink is None else sink.as_subclass(Tensor)[heads, None],
    )
    return out.transpose(1, 2)


def _same_bits(case: Case, place: Place) -> str:
    q, k, v = (place(x) for x in _tensors(case, torch.Generator().manual_seed(1)))
    packed, apart = (flash_attn_func(q, k, v, causal=True, pack_gqa=on)[0] for on in (True, False))
    return "" if torch.equal(packed, apart) else "results differ"


def _feeds(case: Case, place: Place) -> str:
    """One tile, with K and V brought in each way; cp.async everywhere before 9.0."""
    from flash_attn_sm120 import tuned_tiles
    from flash_attn_sm120.tune.candidates import FEEDS

    q, k, v = (place(x) for x in _tensors(case, torch.Generator().manual_seed(2)))
    any_call = dict.fromkeys(_C.tile_fields(), tuned_tiles.ANY)
    tile = {"tile_n": 64, "sub_n": 32, "warps": 4, "warp_m": 16, "stages": 2}
    results = []
    for feed in FEEDS.values():
        with tuned_tiles.using([tuned_tiles.as_tuple(any_call | tile | feed)]):
            results.append(flash_attn_func(q, k, v, causal=True)[0])
    return "" if all(torch.equal(results[0], other) for other in results) else "results differ"


def _packed(place: Place) -> str:
    """Each sequence is what it is alone."""
    case = Case("", 1, sum(LENGTHS), sum(LENGTHS), (8, 2), (128, 128))
    q, k, v = (x[0] for x in _tensors(case, torch.Generator().manual_seed(3)))
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    lengths = place(ends)
    out = flash_attn_varlen_func(
        place(q), place(k), place(v), cu_seqlens_q=lengths, cu_seqlens_k=lengths, causal=True
    )[0]
    begin = 0
    for length in LENGTHS:
        rows = slice(begin, begin + length)
        alone = [place(x[None, rows].contiguous()) for x in (q, k, v)]
        if wrong := _differs(out[rows][None], alone, {"causal": True}):
            return f"the sequence of {length}: {wrong}"
        begin += length
    return ""


def _pages(place: Place) -> str:
    keys = 300
    case = Case("", 1, 40, keys, (8, 2), (128, 128))
    generator = torch.Generator().manual_seed(4)
    q, k, v = _tensors(case, generator)
    table = torch.randperm(-(-keys // PAGE_SIZE), generator=generator).to(torch.int32)
    pages = [place(inputs.in_pages(x, table, PAGE_SIZE)) for x in (k, v)]
    used = place(torch.tensor([keys], dtype=torch.int32))
    out = flash_attn_varlen_func(
        place(q),
        pages[0],
        pages[1],
        page_table=place(table[None]),
        seqused_k=used,
        causal=True,
    )[0]
    return _differs(out, [place(x) for x in (q, k, v)], {"causal": True})


def _differs(out: Tensor, qkv: list[Tensor], options: dict[str, Any]) -> str:
    exact, rounded = (_plain(qkv, t, None, options)[0] for t in (torch.float32, torch.bfloat16))
    error = _measure.max_error(out.as_subclass(Tensor), exact).item()
    allowed = _measure.allowed_error(exact, rounded).item()
    return "" if error <= allowed else f"largest error {error:.3g}, allowed {allowed:.3g}"
