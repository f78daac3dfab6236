"""K and V in e4m3: the same as keys and values that are these numbers in the type of q.

Descales here are powers of two: then the product with an e4m3 number is exact in every type, and
the reference reads what the kernels have.
"""

from dataclasses import dataclass

import pytest
import torch

from emulator import emulator
from flash_attn_sm120 import (
    explain,
    explain_backward,
    flash_attn_func,
    flash_attn_varlen_func,
)
from flash_attn_sm120.fa2 import flash_attn_with_kvcache
from helpers.devices import CPU, EMULATOR, writable
from helpers.paged import PagedBatch, make_paged
from helpers.reference import assert_close
from helpers.tiles import tile_row, use_tiles
from helpers.varlen import Batch, check_forward, flat, make_batch, on

E4M3 = torch.float8_e4m3fn
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "all": {"window_size": (30, 3), "softcap": 5.0, "learnable_sink": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def plain(x):
    return x.as_subclass(torch.Tensor)


def with_sink(device, options, heads):
    """Options with a sink for each head in place of True."""
    if not options.get("learnable_sink"):
        return options
    return {**options, "learnable_sink": device.place(torch.linspace(-1, 2, heads))}


def powers(*shape):
    return torch.exp2(torch.randint(-2, 2, shape).float())


def in_e4m3(x, descale):
    """x / descale in e4m3, and what that is in the type of x."""
    narrow = (x.float() / descale).to(E4M3)
    return narrow, (narrow.float() * descale).to(x.dtype)


@dataclass
class Call:
    """Of sequences that have the same lengths; `k` and `v` are for the reference."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    arguments: tuple
    descales: dict

    def run(self, **options):
        return flash_attn_func(*self.arguments, **self.descales, return_lse=True, **options)

    def check(self, *, num_splits=0, pack_gqa=None, **options):
        out, lse = self.run(num_splits=num_splits, pack_gqa=pack_gqa, **options)
        plain_options = {name: plain(x) if torch.is_tensor(x) else x for name, x in options.items()}
        assert_close(plain(out), plain(lse), self.q, self.k, self.v, **plain_options)
        return out, lse


def make(device, seqlen_q, seqlen_k, heads=(4, 2), dims=(64, 64), dtype=None, batch=2, q=None):
    dtype = dtype or device.dtypes[-1]
    where = device.torch_device
    q = torch.randn(batch, seqlen_q, heads[0], dims[0]) if q is None else q
    q = q.to(dtype).to(where)
    pairs, descales = [], {}
    for name, dim in zip("kv", dims, strict=True):
        descale = powers(batch, heads[1]).to(where)
        x = torch.randn(batch, seqlen_k, heads[1], dim).to(dtype).to(where)
        pairs.append(in_e4m3(x, descale[:, None, :, None]))
        descales[f"{name}_descale"] = device.place(descale)
    (k8, k), (v8, v) = pairs
    arguments = tuple(map(device.place, (q, k8, v8)))
    return Call(q, k, v, arguments, descales)


class NarrowBatch(Batch):
    """Its k and v are what the e4m3 tensors of the call hold."""

    inputs = ()


class NarrowPagedBatch(PagedBatch):
    inputs = ()


def narrowed(device, batch):
    """The batch with K and V in e4m3, and its descales: a factor for each head."""
    descales = {}
    heads, sequences = batch.k.shape[-2], batch.sides[1].batch
    changed, inputs = dict(vars(batch)), [batch.q]
    for i, name in enumerate("kv"):
        descale = powers(heads).to(device.torch_device)
        x = plain(batch.inputs[1 + i])
        narrow, same = in_e4m3(x, descale[:, None])
        if isinstance(batch, PagedBatch):
            _, same = in_e4m3(plain(getattr(batch, name)), descale[:, None])
        changed[name] = device.place(same)
        inputs.append(device.place(narrow))
        descales[f"{name}_descale"] = device.place(descale.expand(sequences, heads))
    kind = NarrowPagedBatch if isinstance(batch, PagedBatch) else NarrowBatch
    result = kind(**changed)
    result.inputs = tuple(inputs)
    result.lengths = batch.lengths | descales
    return result


# ---- against the reference -----------------------------------------------------------------------

DIMS = [(64, 64), (128, 128), (48, 80), (16, 32), (192, 128), (256, 256)]


@pytest.mark.quick("cpu-*", "emulator-dims1-full")
@options
@pytest.mark.parametrize("dims", DIMS, ids=[f"dims{i}" for i in range(len(DIMS))])
def test_dense(device, options, dims):
    if not device.takes(DIMS.index(dims) + list(OPTIONS.values()).index(options)):
        pytest.skip("the other size of tiles has this case")
    make(device, 50, 150, dims=dims).check(**with_sink(device, options, 4))


@pytest.mark.quick("cpu-*")
@options
def test_varlen(device, options):
    batch = make_batch(device, [70, 1, 0, 33], [150, 40, 9, 0], dtype=device.dtypes[-1])
    check_forward(narrowed(device, batch), **with_sink(device, options, 4))


@pytest.mark.quick("cpu-*", "emulator-64")
@pytest.mark.parametrize("page_size", [5, 16, 64])
def test_paged(device, page_size):
    for options in ({"causal": True}, {"num_splits": 3}):
        batch = make_paged(
            device, [7, 1, 0, 2], [150, 40, 9, 260], page_size, dtype=device.dtypes[-1]
        )
        check_forward(narrowed(device, batch), **options)


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (48, 2)], ids=str)
def test_decode(device, heads):
    """Rows of a warp, of two, and of more; in parts and not."""
    for seqlen_q, num_splits in ((1, 3), (2, 1)):
        make(device, seqlen_q, 300, heads, dims=(128, 128)).check(num_splits=num_splits)


@pytest.mark.parametrize("producer", ["barrier", "thread", "warp", None])
@pytest.mark.parametrize("tile", [(64, 64, 1, 16, 2), (32, 16, 4, 32, 3)], ids=str)
def test_tiles(producer, tile):
    names = ("tile_n", "sub_n", "warps", "warp_m", "stages")
    kernel = {"kernel": "forward_tma", "producer": producer} if producer else {}
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    with use_tiles(tile_row(**kernel, **dict(zip(names, tile, strict=True)))):
        make(EMULATOR, 20, 150, dims=(64, 32)).check(causal=True)


def test_order_of_blocks_and_copies():
    """Nothing races: results are the same to the bit in another order, with copies that land late."""
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    call = make(EMULATOR, 3, 300, (8, 2), dims=(64, 64))
    expected = call.check(num_splits=3, causal=True)
    for seed in (1, 2):
        with emulator().settings(seed=seed, late_copies=seed == 1):
            again = call.run(num_splits=3, causal=True)
        for a, b in zip(expected, again, strict=True):
            assert torch.equal(plain(a), plain(b))


def test_scalar_descales(device):
    call = make(device, 5, 70, batch=1, heads=(2, 1))
    expected = call.run(causal=True)
    for shape in ((), (1,)):
        call.descales = {
            name: device.place(plain(x).reshape(shape)) for name, x in call.descales.items()
        }
        for a, b in zip(expected, call.run(causal=True), strict=True):
            assert torch.equal(plain(a), plain(b))


def test_without_descales(device):
    call = make(device, 5, 70)
    call.k, call.v = (plain(x).to(call.q.dtype) for x in call.arguments[1:])
    call.descales = {}
    call.check()


def test_every_byte(device):
    """Of one key out is v, whatever the score is."""
    for dtype in device.dtypes:
        call = make(device, 1, 1, (1, 1), (16, 256), dtype, batch=1)
        bytes_of_v = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 256).view(E4M3)
        q, k, _ = call.arguments
        call.arguments = (q, k, device.place(bytes_of_v.to(device.torch_device)))
        call.descales.pop("v_descale")
        out = plain(call.run()[0]).cpu()
        expected = bytes_of_v.float().to(dtype)
        finite = expected.isfinite()
        assert torch.equal(out[finite], expected[finite]) and out[~finite].isnan().all()


@pytest.mark.parametrize("tensor", ["k", "v"])
def test_nan_reaches_the_rows_that_see_it(device, tensor):
    call = make(device, 70, 70, dims=(64, 64))
    index = 1 + "kv".index(tensor)
    narrow = plain(call.arguments[index]).clone()
    narrow.view(torch.uint8)[0, 40, 1, 3] = 0xFF
    arguments = list(call.arguments)
    arguments[index] = device.place(narrow)
    call.arguments = tuple(arguments)
    getattr(call, tensor)[0, 40, 1, 3] = torch.nan
    call.check(causal=True)


def test_queries_of_any_size(device):
    """bf16 has exponents that fp16 has not."""
    if torch.bfloat16 not in device.dtypes:
        pytest.skip("of bf16 alone")
    sizes = torch.tensor([1e30, 1e6, 1.0, 1e-6, 1e-30, 0.0]).reshape(1, 6, 1, 1)
    q = torch.randn(1, 6, 4, 64) * sizes
    make(device, 6, 100, dtype=torch.bfloat16, batch=1, q=q).check(softmax_scale=0.1)


# ---- appending -----------------------------------------------------------------------------------


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("rotary", [0, 16])
@pytest.mark.parametrize("page_size", [None, 16])
def test_append(device, page_size, rotary):
    """Rows that a call appends are divided by the descales and saturate."""
    batch, heads, dim, seqlens, dtype = 2, 2, 64, [0, 17], device.dtypes[-1]
    where, rows = device.torch_device, 3
    descales = {f"{name}_descale": powers(batch, heads).to(where) for name in "kv"}
    new = [torch.randn(batch, rows, heads, dim).to(dtype).to(where) for _ in "kv"]
    new[1][0, 0, 0, :2] = torch.tensor([1e4, -1e4])
    shape = (4, 16) if page_size else (batch, 32)
    caches = [torch.randn(*shape, heads, dim).to(E4M3).to(where) for _ in "kv"]
    table = on(device, [[3, 0], [1, 2]]) if page_size else None
    q = torch.randn(batch, rows, 4, dim).to(dtype).to(where)
    arguments = {"cache_seqlens": on(device, seqlens), "page_table": table, "causal": True}
    arguments |= {name: device.place(x) for name, x in descales.items()}
    if rotary:
        angles = torch.rand(32, rotary // 2)
        arguments["rotary_cos"] = device.place(angles.cos().to(dtype).to(where))
        arguments["rotary_sin"] = device.place(angles.sin().to(dtype).to(where))
    placed = [writable(device.place(x.clone())) for x in caches]
    out = flash_attn_with_kvcache(device.place(q), *placed, *map(device.place, new), **arguments)

    expected = [x.float() for x in caches]
    for i, (cache, x) in enumerate(zip(expected, new, strict=True)):
        for b, held in enumerate(seqlens):
            for row in range(rows):
                at = held + row
                entry = (int(plain(table)[b, at // 16]), at % 16) if page_size else (b, at)
                wide = x[b, row].float()
                if rotary and i == 0:
                    cos, sin = (
                        angles.cos().to(dtype)[at].float(),
                        angles.sin().to(dtype)[at].float(),
                    )
                    cos, sin = cos.to(where), sin.to(where)
                    first, second = wide[:, 0:rotary:2].clone(), wide[:, 1:rotary:2].clone()
                    wide[:, 0:rotary:2] = first * cos - second * sin
                    wide[:, 1:rotary:2] = second * cos + first * sin
                descale = descales["kv"[i] + "_descale"][b, :, None]
                cache[entry] = (wide / descale).clamp(-448, 448).to(E4M3).float()
    for cache, x in zip(expected, placed, strict=True):
        tolerance = {"rtol": 2**-3, "atol": 2**-9} if rotary else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(plain(x).float(), cache, **tolerance)
    if rotary:
        return
    again = flash_attn_with_kvcache(
        device.place(q), *placed, **arguments | {"cache_seqlens": on(device, [3, 20])}
    )
    assert torch.equal(plain(out), plain(again))


# ---- plans and refusals --------------------------------------------------------------------------


def empty(*shape, dtype=E4M3):
    return torch.empty(shape, dtype=dtype)


def inputs(dim=64, dtype=torch.bfloat16):
    return empty(2, 1, 8, dim, dtype=dtype), empty(2, 512, 2, dim), empty(2, 512, 2, dim)


def test_plan():
    plan = explain(*inputs(), arch=90)
    assert plan.variant.endswith("_e4m3") and plan.warps == 1
    wide = explain(inputs()[0], *(x.bfloat16() for x in inputs()[1:]), arch=90)
    assert "e4m3" not in wide.variant
    with pytest.raises(NotImplementedError, match=r"8\.9"):
        explain(*inputs(), arch=80)
    with pytest.raises(NotImplementedError, match="no backward"):
        explain_backward(*inputs(), arch=90)


def test_refusals():
    q, k, v = inputs()
    one = torch.ones(())
    wide = empty(2, 512, 2, 64, dtype=torch.bfloat16)
    for exception, match, arguments, options in (
        (TypeError, "v must be float8_e4m3fn like k", (q, k, wide), {}),
        (TypeError, "v must be bfloat16 like q", (q, wide, v), {}),
        (NotImplementedError, "k is float8_e5m2", (q, k.to(torch.float8_e5m2), v), {}),
        (TypeError, "k must be float8_e4m3fn like q", (q.to(E4M3), wide, v), {}),
        (TypeError, "k must be .* got uint8", (q, k.view(torch.uint8), v), {}),
        (ValueError, "multiple of 16, got 24", inputs(24), {}),
        (ValueError, "k_descale is for k and v", (q, wide, wide), {"k_descale": one}),
        (TypeError, "k_descale must be float32", (q, k, v), {"k_descale": one.half()}),
        (ValueError, "q's batch 2", (q, k, v), {"v_descale": torch.ones(3, 2)}),
        (ValueError, "k's heads 2", (q, k, v), {"v_descale": torch.ones(2, 8)}),
        (ValueError, "size 1", (q, k, v), {"v_descale": torch.ones(2)}),
        (ValueError, "dimension", (q, k, v), {"v_descale": torch.ones(2, 2, 1)}),
        (ValueError, "positive and finite, got 0", (q, k, v), {"k_descale": 0 * one}),
        (ValueError, "positive and finite, got a neg", (q, k, v), {"v_descale": -one}),
        (ValueError, "positive and finite, got inf", (q, k, v), {"v_descale": one / 0}),
        (ValueError, "positive and finite, got NaN", (q, k, v), {"v_descale": one * torch.nan}),
    ):
        with pytest.raises(exception, match=match):
            flash_attn_func(*arguments, **options)


def test_no_gradient():
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="float8_e4m3fn has no gradient"):
        flash_attn_func(q.requires_grad_(), k, v)
    with torch.no_grad():
        flash_attn_func(q, k, v)
    with pytest.raises(NotImplementedError, match="flash_attn_varlen_func with k and v"):
        flash_attn_varlen_func(q, k, v, seqused_k=torch.tensor([3, 4], dtype=torch.int32))


def test_autocast_and_profiler():
    """Neither casts a cache, and a profiler does not make it an operator."""
    q, k, v = (torch.zeros_like(x) for x in inputs())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile():
        out, _ = flash_attn_func(q.float(), k, v)
    assert out.dtype == torch.bfloat16
    assert CPU.missing == "" and flat(out).shape == (2, 8, 64)
