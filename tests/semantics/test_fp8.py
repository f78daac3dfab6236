"""Q, K and V in e4m3: against the CPU, which rounds weights as kernels do, and that against fp64."""

import pytest
import torch

from emulator import emulator
from flash_attn_sm120 import (
    _C,
    explain,
    explain_backward,
    flash_attn_func,
    flash_attn_varlen_func,
)
from flash_attn_sm120.fa2 import flash_attn_with_kvcache
from flash_attn_sm120.tuned_tiles import KINDS
from helpers.devices import CPU, EMULATOR, writable
from helpers.reference import attention_reference
from helpers.tiles import tile_row, use_tiles

E4M3 = torch.float8_e4m3fn
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "all": {"window_size": (30, 3), "softcap": 5.0, "learnable_sink": True},
    "negative": {"softmax_scale": -0.1, "window_size": (None, 5)},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
DIMS = [(64, 64), (128, 128), (48, 80), (16, 32), (192, 128), (256, 256)]


def plain(x):
    return x.as_subclass(torch.Tensor)


def relative(x, expected):
    x, expected = (plain(a).detach().cpu().double() for a in (x, expected))
    assert torch.equal(x.isnan(), expected.isnan())
    return float((x - expected).nan_to_num().norm() / expected.nan_to_num().norm().clamp(min=1e-30))


def inputs(seqlen_q, seqlen_k, dims=(64, 64), heads=(4, 2), batch=2, seed=0):
    """q, k, v, and a descale of each, of which some are scalars and some have strides of 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, seqlen_q, heads[0], dims[0]),
        (batch, seqlen_k, heads[1], dims[0]),
        (batch, seqlen_k, heads[1], dims[1]),
    )
    tensors = [torch.randn(shape, generator=generator).to(E4M3) for shape in shapes]
    per_head = torch.rand(batch, heads[1], generator=generator) + 0.5
    descales = {
        "q_descale": per_head,
        "k_descale": torch.tensor(0.9).expand(batch, heads[1]),
        "v_descale": torch.tensor(1.7),
    }
    return tensors, descales


def run(device, tensors, descales, function=flash_attn_func, **options):
    place = {name: x for name, x in options.items() if torch.is_tensor(x) and name != "out"}
    if options.get("learnable_sink") is True:
        place["learnable_sink"] = torch.linspace(-1, 2, tensors[0].shape[-2])
    options |= {name: placed(device, x) for name, x in (place | descales).items()}
    return function(*(placed(device, x) for x in tensors), return_lse=True, **options)


def placed(device, x):
    return device.place(x.to(device.torch_device))


def check(device, tensors, descales, function=flash_attn_func, **options):
    """Of the device against the CPU, whose out is fp32 or as asked."""
    out, lse = run(device, tensors, descales, function, **options)
    on_cpu = {name: x for name, x in options.items() if name not in ("num_splits", "pack_gqa")}
    expected, expected_lse = run(CPU, tensors, descales, function, **on_cpu)
    assert out.dtype == torch.bfloat16
    assert relative(out, expected) <= 2e-3
    torch.testing.assert_close(
        plain(lse).cpu(), plain(expected_lse), rtol=1e-5, atol=1e-5, equal_nan=True
    )
    return out, lse


# ---- the reference -------------------------------------------------------------------------------


def dequantised(tensors, descales):
    heads_kv = tensors[1].shape[-2]
    result = []
    for x, descale in zip(tensors, descales.values(), strict=True):
        factor = descale.expand(x.shape[0], heads_kv).double()[:, None, :, None]
        result.append(x.double() * factor.repeat_interleave(x.shape[-2] // heads_kv, 2))
    return result


@options
@pytest.mark.parametrize("seed", [0, 1])
def test_cpu_against_fp64(options, seed):
    tensors, descales = inputs(70, 200, (128, 128), seed=seed)
    out = torch.empty(*tensors[0].shape[:-1], 128)
    _, lse = run(CPU, tensors, descales, out=out, **options)
    if options.get("learnable_sink"):
        options = options | {"learnable_sink": torch.linspace(-1, 2, 4).double()}
    expected, expected_lse = attention_reference(*dequantised(tensors, descales), **options)
    assert relative(out, expected) <= 0.06
    assert torch.cosine_similarity(out.double().flatten(), expected.flatten(), 0) >= 0.998
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["full", "causal"])
def test_rounded_inputs(options):
    """Of N(0, 1) in full, the rounding to e4m3 included."""
    generator = torch.Generator().manual_seed(3)
    wide = [
        torch.randn(1, rows, 1, 128, generator=generator).double() for rows in (256, 1024, 1024)
    ]
    out = torch.empty(1, 256, 1, 128)
    flash_attn_func(*(x.to(E4M3) for x in wide), out=out, **options)
    expected, _ = attention_reference(*wide, **options)
    assert relative(out, expected) <= 0.06
    assert torch.cosine_similarity(out.double().flatten(), expected.flatten(), 0) >= 0.998


def test_types_of_out():
    tensors, descales = inputs(9, 40)
    wide = torch.empty(2, 9, 4, 64)
    run(CPU, tensors, descales, out=wide)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(2, 9, 4, 64, dtype=dtype)
        run(CPU, tensors, descales, out=out)
        assert torch.equal(out, wide.to(dtype))
    assert torch.equal(run(CPU, tensors, descales)[0], wide.bfloat16())


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.quick("cpu-*", "emulator-dims1-full")
@options
@pytest.mark.parametrize("dims", DIMS, ids=[f"dims{i}" for i in range(len(DIMS))])
def test_dense(device, options, dims):
    turn = DIMS.index(dims) + list(OPTIONS.values()).index(options)
    if not device.takes(turn):
        pytest.skip("the other size of tiles has this case")
    check(device, *inputs(50, 150, dims, seed=turn), **options)


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("seqlen_k", [1, 31, 32, 33, 63, 64, 65, 129])
def test_edges_of_tiles(device, seqlen_k):
    for seqlen_q in (17, 64):
        check(device, *inputs(seqlen_q, seqlen_k, batch=1, seed=seqlen_k), causal=True)


@pytest.mark.quick("cpu")
def test_types(device):
    tensors, descales = inputs(33, 70, (128, 64))
    out = writable(placed(device, torch.empty(2, 33, 4, 64, dtype=torch.float16)))
    run(device, tensors, descales, out=out)
    expected = torch.empty(2, 33, 4, 64)
    run(CPU, tensors, descales, out=expected)
    assert relative(out, expected) <= 5e-4


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (48, 2)], ids=str)
def test_decode(device, heads):
    tensors, descales = inputs(2, 300, (128, 128), heads)
    for num_splits, pack_gqa in ((1, False), (3, None)):
        check(device, tensors, descales, num_splits=num_splits, pack_gqa=pack_gqa, causal=True)


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("options", list(OPTIONS.values())[:3], ids=list(OPTIONS)[:3])
def test_varlen(device, options):
    tensors, descales = inputs(1, 1, batch=4)
    starts = {"cu_seqlens_q": [0, 70, 71, 71, 104], "cu_seqlens_k": [0, 150, 190, 199, 199]}
    generator = torch.Generator().manual_seed(5)
    tensors = [
        torch.randn(rows, heads, 64, generator=generator).to(E4M3)
        for rows, heads in ((110, 4), (205, 2), (205, 2))
    ]
    for x in tensors[1:]:
        x.view(torch.uint8)[199:] = 0x7F  # NaN behind the last sequence
    starts = {name: torch.tensor(x, dtype=torch.int32) for name, x in starts.items()}
    check(device, tensors, descales, flash_attn_varlen_func, **starts, **options)


@pytest.mark.quick("cpu-*", "emulator-16")
@pytest.mark.parametrize("page_size", [5, 16, 64])
def test_paged(device, page_size):
    """Rows that no sequence has, in the last pages and in unused ones, are NaN."""
    seqlens, queries, width = [150, 40, 9, 0], 7, -(-150 // page_size)
    tensors, descales = inputs(queries, 1, batch=4)
    generator = torch.Generator().manual_seed(6)
    table = torch.randperm(4 * width + 2, generator=generator)[: 4 * width].reshape(4, width)
    caches = [torch.full((4 * width + 2, page_size, 2, 64), 0x7F, dtype=torch.uint8) for _ in "kv"]
    for cache in caches:
        for sequence, seqlen in enumerate(seqlens):
            rows = torch.randn(seqlen, 2, 64, generator=generator).to(E4M3).view(torch.uint8)
            for row in range(seqlen):
                cache[table[sequence, row // page_size], row % page_size] = rows[row]
    tensors = [tensors[0], *(cache.view(E4M3) for cache in caches)]
    lengths = {
        "page_table": table.to(torch.int32),
        "seqused_k": torch.tensor(seqlens, dtype=torch.int32),
    }
    for options in ({"causal": True}, {"num_splits": 3}):
        check(device, tensors, descales, flash_attn_varlen_func, **lengths, **options)


def test_kvcache(device):
    tensors, descales = inputs(3, 100)
    lengths = torch.tensor([70, 100], dtype=torch.int32)
    caches = [placed(device, x) for x in tensors]
    named = {name: placed(device, x) for name, x in descales.items()}
    out = flash_attn_with_kvcache(*caches, cache_seqlens=placed(device, lengths), **named)
    expected, _ = run(CPU, tensors, descales, flash_attn_varlen_func, seqused_k=lengths)
    assert relative(out, expected) <= 2e-3


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_nan_reaches_the_rows_that_see_it(device, tensor):
    tensors, descales = inputs(70, 70)
    tensors["qkv".index(tensor)].view(torch.uint8)[0, 40, 1, 3] = 0xFF
    out, _ = check(device, tensors, descales, causal=True)
    nan = plain(out).isnan()
    assert nan[0, 40].any() and not nan[0, :40].any() and not nan[1].any()


def test_both_products():
    """GeForce-like cards multiply with block scales, others without: the sums are the same."""
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    call = inputs(40, 100, (64, 64))
    card = _C.devices()[1][0]["name"]
    results = []
    try:
        for kind in ("GeForce-like", "PRO-like"):
            _C.use_card(card, KINDS.index(kind))
            variant = explain(*(EMULATOR.place(x) for x in call[0])).variant
            assert variant.endswith("_mx") == (kind == "GeForce-like")
            results.append(check(EMULATOR, *call, causal=True))
    finally:
        _C.use_card(card, 0)
    for a, b in zip(*results, strict=True):
        assert torch.equal(plain(a), plain(b))


# ---- what results do not depend on ---------------------------------------------------------------


def test_tiles_and_splits_agree():
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    tensors, descales = inputs(20, 600, (64, 64), (2, 1), batch=1)
    tensors[0] = (tensors[0].float() * 4).to(E4M3)  # sharp, so that the row max moves
    results = []
    names = ("tile_n", "sub_n", "warps", "warp_m", "stages")
    for tile in ((64, 64, 1, 16, 2), (128, 64, 2, 16, 2), (32, 32, 4, 32, 3)):
        with use_tiles(tile_row(**dict(zip(names, tile, strict=True)))):
            for num_splits in (1, 5):
                results.append(check(EMULATOR, tensors, descales, num_splits=num_splits))
    for out, lse in results[1:]:
        assert relative(out, results[0][0]) <= 1e-3
        torch.testing.assert_close(plain(lse), plain(results[0][1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("producer", ["barrier", "thread", "warp"])
def test_producers(producer):
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    tile = {"tile_n": 64, "sub_n": 64, "warps": 2, "warp_m": 16, "stages": 2}
    with use_tiles(tile_row(kernel="forward_tma", producer=producer, **tile)):
        tensors, descales = inputs(20, 300, (64, 32))
        expected = check(EMULATOR, tensors, descales, causal=True)
        for seed in (1, 2):
            with emulator().settings(seed=seed, late_copies=seed == 1):
                again = run(EMULATOR, tensors, descales, causal=True)
            for a, b in zip(expected, again, strict=True):
                assert torch.equal(plain(a), plain(b))


@pytest.mark.quick("cpu")
def test_growing_scores(device):
    """Each key has a higher score than the last one by more than e4m3 has room for."""
    tensors, descales = inputs(16, 200, batch=1)
    q = torch.full((1, 16, 4, 64), 4.0)
    k = torch.linspace(-200, 200, 200).reshape(1, 200, 1, 1).expand(1, 200, 2, 64)
    tensors[:2] = q.to(E4M3), k.to(E4M3)
    check(device, tensors, descales)
    tensors[1] = k.flip(1).to(E4M3)
    check(device, tensors, descales)


# ---- plans and refusals --------------------------------------------------------------------------


def test_plan():
    tensors, _ = inputs(512, 512, (128, 128))
    for arch, code in ((89, "_q"), (90, "_q"), (120, "_q_mx"), (121, "_q")):
        plan = explain(*tensors, arch=arch)
        assert plan.variant.endswith("_e4m3" + code) and "bf16" in plan.variant
        assert ("block scales" in plan.reasons["products"]) == (arch == 120)
    with pytest.raises(NotImplementedError, match=r"8\.9"):
        explain(*tensors, arch=80)
    with pytest.raises(NotImplementedError, match="no backward"):
        explain_backward(*tensors, arch=90)


def test_refusals():
    tensors, _ = inputs(8, 16)
    q, k, v = tensors
    one = torch.ones(())
    table = {"alibi_slopes": torch.ones(4)}
    seed = torch.zeros(2, dtype=torch.int64)
    for exception, match, arguments, options in (
        (NotImplementedError, "q is float8_e5m2", (q.to(torch.float8_e5m2), k, v), {}),
        (NotImplementedError, "v is float8_e5m2", (q, k, v.to(torch.float8_e5m2)), {}),
        (TypeError, "k must be float8_e4m3fn like q", (q, k.bfloat16(), v), {}),
        (TypeError, "v must be float8_e4m3fn like k", (q, k, v.bfloat16()), {}),
        (ValueError, "multiple of 16, got 24", inputs(8, 16, (24, 64))[0], {}),
        (ValueError, "q_descale is for q", (q.bfloat16(), k, v), {"q_descale": one}),
        (TypeError, "q_descale must be float32", (q, k, v), {"q_descale": one.half()}),
        (ValueError, "q's batch 2", (q, k, v), {"q_descale": torch.ones(3, 2)}),
        (ValueError, "k's heads 2", (q, k, v), {"q_descale": torch.ones(2, 4)}),
        (ValueError, "positive and finite, got 0", (q, k, v), {"q_descale": 0 * one}),
        (ValueError, "positive and finite, got NaN", (q, k, v), {"q_descale": one * torch.nan}),
        (NotImplementedError, "alibi_slopes, dropout_p", (q, k, v), table),
        (NotImplementedError, "alibi_slopes, dropout_p", (q, k, v),
         {"dropout_p": 0.5, "dropout_seed": seed}),
        (NotImplementedError, "attn_bias", (q, k, v), {"attn_bias": torch.zeros(1, 1, 1, 16)}),
        (NotImplementedError, "out is float8_e4m3fn", (q, k, v), {"out": torch.empty_like(q)}),
    ):  # fmt: skip
        with pytest.raises(exception, match=match):
            flash_attn_func(*arguments, **options)


def test_float32_out_on_cuda():
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    tensors, descales = inputs(8, 16)
    out = writable(EMULATOR.place(torch.empty(2, 8, 4, 64)))
    with pytest.raises(NotImplementedError, match="out in float32 is supported on the CPU alone"):
        run(EMULATOR, tensors, descales, out=out)


def test_no_gradient():
    tensors, _ = inputs(8, 16)
    with pytest.raises(NotImplementedError, match="float8_e4m3fn has no gradient"):
        flash_attn_func(*tensors, learnable_sink=torch.zeros(4, requires_grad=True))
