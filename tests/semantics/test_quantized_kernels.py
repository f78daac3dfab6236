"""The kernels of quantised attention, as NVRTC makes them for sm_120f, against the CPU, which replays
their roundings; and what ptxas makes of them."""

import math
import re

import pytest
import torch

from emulator import emulator, unavailable
from flash_attn_sm120.quantized import (
    RECIPES,
    device,
    kernel,
    quantize,
    quantized_attention,
    reference,
)
from flash_attn_sm120.quantized.device import why_not
from helpers import builds, spans
from helpers.devices import CPU
from helpers.recipes import attend_there, emulate_device, run
from helpers.structs import fields_of

pytest.importorskip("cuda.bindings.nvrtc")
emulated = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
recipes = pytest.mark.parametrize("recipe", RECIPES)

GEFORCE, PRO, HOPPER = (kernel.Target(*x) for x in ((True, True), (True, False), (False, False)))


def make(seqlen_q=70, seqlen_k=90, heads_q=4, heads_kv=2, dim=64, dim_v=32, dtype=torch.bfloat16):
    torch.manual_seed(seqlen_q + seqlen_k + dim)
    q = torch.randn(2, seqlen_q, heads_q, dim)
    k = torch.randn(2, seqlen_k, heads_kv, dim) + 1
    v = torch.randn(2, seqlen_k, heads_kv, dim_v) + 0.5
    return q.to(dtype), k.to(dtype), v.to(dtype)


def quantized(q, k, v, recipe):
    return [quantize(x, recipe, name) for x, name in ((q, "q"), (k, "k"), (v, "v"))]


def options_of(
    q, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, sink=None
):
    return {
        "softmax_scale": softmax_scale or 1 / math.sqrt(q.head_dim),
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "learnable_sink": sink,
        "num_splits": 0,
    }


def emulate(q, k, v, target=GEFORCE, out_dtype=torch.float32, tile=kernel.TILE, **options):
    """(out, lse) of the kernel."""
    out = torch.full((q.batch, q.seqlen, q.heads, v.head_dim), math.nan, dtype=out_dtype)
    lse = torch.full((q.batch, q.heads, q.seqlen), math.nan)
    run(kernel.prepare(q, k, v, options_of(q, **options), out, lse, target, tile), out, lse)
    return out, lse


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def check(q, k, v, **options):
    target, out_dtype = (options.pop(x, y) for x, y in (("target", GEFORCE), ("out_dtype", None)))
    out_dtype = out_dtype or torch.float32
    ref, ref_lse = reference.attend(q, k, v, options_of(q, **options))
    out, lse = emulate(q, k, v, target, out_dtype, **options)
    assert torch.equal(lse == -math.inf, ref_lse == -math.inf)
    empty = (ref == 0).all(dim=3)
    assert (out[empty] == 0).all()
    assert relative(out, ref) <= 2e-3
    torch.testing.assert_close(lse, ref_lse, rtol=1e-6, atol=1e-5)


CALLS = {
    "causal": ({}, {"causal": True}),
    "edges": ({"seqlen_q": 65, "seqlen_k": 128}, {"window_size": (40, 10)}),
    "short": ({"seqlen_q": 129, "seqlen_k": 33, "heads_kv": 1}, {"causal": True}),
    "scale": ({"seqlen_q": 16, "seqlen_k": 65}, {"softmax_scale": -0.3, "out_dtype": torch.half}),
    "softcap": ({"seqlen_q": 64, "seqlen_k": 193}, {"softcap": 2.0, "window_size": (70, None)}),
    "sink": (
        {"seqlen_q": 80, "seqlen_k": 70},  # ten rows see no key
        {"causal": True, "sink": torch.tensor([-math.inf, 0.5, 4.0, 200.0])},
    ),
}


@emulated
@recipes
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.quick("causal-int8_fp8", "softcap-nvfp4")
def test_against_the_cpu(recipe, call):
    shape, options = call
    check(*quantized(*make(**shape), recipe), **options)


@emulated
@pytest.mark.parametrize("recipe", ["int8_fp8", "nvfp4"])
def test_order_and_late_copies_do_not_matter(recipe):
    operands = quantized(*make(seqlen_k=200), recipe)
    expected = emulate(*operands, causal=True)
    for seed, late_copies in ((1, True), (2, False)):
        with emulator().settings(seed=seed, late_copies=late_copies):
            changed = emulate(*operands, causal=True)
        assert all(torch.equal(x, y) for x, y in zip(changed, expected, strict=True))


@emulated
@recipes
def test_sharp_softmaxes(recipe):
    """Row maxima that rise from tile to tile, by far. Where one key has most of the weight, a code
    that lies between two falls either way: in few rows."""
    q, k, v = make(seqlen_q=20, seqlen_k=300)
    k = k * torch.linspace(0.1, 3, 300)[:, None, None].bfloat16()
    q, k, v = quantized(3 * q, k, v, recipe)
    ref, ref_lse = reference.attend(q, k, v, options_of(q))
    out, lse = emulate(q, k, v)
    errors = (out - ref).norm(dim=3) / ref.norm(dim=3)
    assert errors.quantile(0.97) <= 2e-3 and errors.max() <= 0.2
    torch.testing.assert_close(lse, ref_lse, rtol=1e-6, atol=1e-5)


@emulated
@recipes
def test_parts_of_the_keys(recipe):
    """Put together they are the whole, a part without keys included."""
    q, k, v = quantized(*make(seqlen_k=200), recipe)
    options = {"causal": True, "window_size": (120, None), "sink": torch.tensor([-1, 0, 1.5, 40])}
    whole, whole_lse = emulate(q, k, v, **options)
    for parts in (2, 5, 16):
        out = torch.full((parts, *whole.shape), math.nan)
        lse = torch.full((parts, *whole_lse.shape), math.nan)
        run(kernel.prepare(q, k, v, options_of(q, **options), out, lse, GEFORCE), out, lse)
        merged = lse.logsumexp(dim=0)
        weight = (lse - merged).exp().transpose(2, 3)[..., None]
        assert relative((weight * out).sum(dim=0), whole) <= 1e-5
        torch.testing.assert_close(merged, whole_lse, rtol=1e-6, atol=1e-5)


@emulated
@pytest.mark.parametrize("recipe", ["fp8", "int8_nvfp4"])
def test_the_order_of_heads_does_not_matter(recipe):
    """To the bit."""
    q, k, v = make(heads_q=6, heads_kv=3)
    order = torch.tensor([2, 0, 1])
    of_queries = (2 * order[:, None] + torch.arange(2)).flatten()
    out, lse = emulate(*quantized(q, k, v, recipe), causal=True)
    moved = quantized(q[:, :, of_queries], k[:, :, order], v[:, :, order], recipe)
    moved_out, moved_lse = emulate(*moved, causal=True)
    assert torch.equal(moved_out, out[:, :, of_queries])
    assert torch.equal(moved_lse, lse[:, of_queries])


@emulated
@recipes
def test_tiles_of_rows_and_keys_do_not_matter(recipe):
    """64 and 128 of each: P has the same codes, and the sums the same order."""
    operands = quantized(*make(seqlen_q=150, seqlen_k=330), recipe)
    options = {"causal": True, "window_size": (250, None)}
    ref, ref_lse = emulate(*operands, **options)
    for tile in (kernel.Tile(4, 2), kernel.Tile(8, 1), kernel.Tile(8, 2)):
        out, lse = emulate(*operands, **options, tile=tile)
        assert relative(out, ref) <= 1e-3 and relative(lse, ref_lse) <= 1e-6


def test_few_blocks_share_keys():
    assert kernel.parts_of(blocks=1, seqlen_k=1 << 20, multiprocessors=170) == 16
    assert kernel.parts_of(blocks=100, seqlen_k=1 << 20, multiprocessors=170) == 3
    assert kernel.parts_of(blocks=171, seqlen_k=1 << 20, multiprocessors=170) == 1
    assert kernel.parts_of(blocks=8, seqlen_k=1500, multiprocessors=170) == 6
    assert kernel.parts_of(blocks=8, seqlen_k=512, multiprocessors=170) == 1
    assert kernel.parts_of(blocks=8, seqlen_k=64, multiprocessors=170) == 1
    assert kernel.parts_of(blocks=1, seqlen_k=1 << 20, multiprocessors=170, asked=1) == 1
    assert kernel.parts_of(blocks=500, seqlen_k=130, multiprocessors=170, asked=16) == 3


@emulated
@pytest.mark.parametrize("recipe", ["int8_fp8", "nvfp4"])
def test_many_keys(recipe):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, seqlen, 1, 64).bfloat16() for seqlen in (4, 200_000, 200_000))
    check(*quantized(q, k, v, recipe))


# Every format with padded rows, several words of scales, and a head dim of V of its own.
HEAD_DIMS = {
    "int8_fp8": [(16, 112), (80, 48)],
    "fp8": [(256, 16)],
    "mxfp8": [(96, 64), (160, 240)],
    "nvfp4_fp8": [(48, 80)],
    "nvfp4_bf16": [(112, 48), (256, 64)],
    "int8_nvfp4": [(64, 208)],
    "nvfp4": [(80, 16), (176, 128)],
}


@emulated
@recipes
def test_head_dims(recipe):
    for dim, dim_v in HEAD_DIMS[recipe]:
        q, k, v = make(seqlen_q=20, dim=dim, dim_v=dim_v, dtype=torch.float16)
        check(*quantized(q, k, v, recipe), causal=True)


@emulated
@pytest.mark.parametrize("recipe", ["int8_fp8", "fp8"])
def test_other_devices(recipe):
    """What PRO-like cards and 9.0 run, where bytes are transposed in pairs."""
    operands = quantized(*make(), recipe)
    for target in (PRO, HOPPER):
        check(*operands, target=target, causal=True)


# ---- what lies beside ----------------------------------------------------------------------------


@emulated
@recipes
def test_rows_are_read_in_place(recipe):
    """Strided rows among NaN: what lies between is not read."""
    q, k, v = quantized(*make(dim=96, heads_q=2, heads_kv=1), recipe)
    expected = emulate(q, k, v, causal=True)
    given = []
    for x in (q, k, v):
        size = list(x.data.shape)
        size[1], size[2] = size[1] + 3, size[2] + 1
        around = torch.full(size, 0x7F, dtype=torch.uint8)
        if x.data.element_size() == 2:
            around = torch.full(size, math.nan, dtype=x.data.dtype)
        around = around.view(x.data.dtype)
        inside = around[:, 2 : 2 + x.data.shape[1], : x.data.shape[2]]
        inside.view(torch.uint8).copy_(x.data.view(torch.uint8))
        given.append(x._replace(data=inside))
    for before, after in zip(expected, emulate(*given, causal=True), strict=True):
        assert torch.equal(before, after)


@emulated
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("recipe", ["int8_fp8", "nvfp4"])
def test_offsets_beyond_32_bits(recipe, axis):
    near = quantized(*make(seqlen_q=40, seqlen_k=90), recipe)
    far = [x._replace(data=spans.apart(CPU, [x.data.view(torch.uint8)], axis)[0]) for x in near]
    far = [x._replace(data=x.data.view(y.data.dtype)) for x, y in zip(far, near, strict=True)]
    results = [emulate(*x, causal=True) for x in (near, far)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@emulated
@recipes
def test_misaligned_tensors_are_copied(recipe):
    q, k, v = quantized(*make(seqlen_q=5), recipe)
    expected = emulate(q, k, v)
    given = []
    for x in (q, k, v):
        moved = {}
        for field in ("data", "scale"):
            kept = getattr(x, field)
            if kept is not None and kept.element_size() == 1:
                buffer = torch.empty(kept.numel() + 1, dtype=torch.uint8)
                buffer[1:] = kept.view(torch.uint8).flatten()
                moved[field] = buffer[1:].view(kept.dtype).view(kept.shape)
        given.append(x._replace(**moved))
    for before, after in zip(expected, emulate(*given), strict=True):
        assert torch.equal(before, after)


@emulated
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4_bf16", "nvfp4_fp8"])
def test_nan_of_masked_keys_reaches_no_row_that_does_not_see_them(recipe):
    q, k, v = quantized(*make(seqlen_q=60, seqlen_k=60), recipe)
    expected, _ = emulate(q, k, v, causal=True)
    v.data[:, 40:].view(torch.uint8)[:] = 0x7F
    v.data[:, 40:].view(torch.uint8)[..., ::2] |= 0xC0  # of 16 bits, too
    out, _ = emulate(q, k, v, causal=True)
    # Subnormal sums are cut where a key of weight 0 adds a term, and not where it adds none.
    torch.testing.assert_close(out[:, :40], expected[:, :40], rtol=1e-6, atol=1e-40)
    assert out[:, 40:].isnan().all()


@emulated
@pytest.mark.parametrize("recipe", ["int8_nvfp4", "nvfp4"])
def test_nan_of_a_scale_of_v_reaches_the_rows_that_see_a_token_of_its_group(recipe):
    q, k, v = quantized(*make(seqlen_q=140, seqlen_k=140), recipe)
    v.scale.view(torch.uint8)[:, 0, :9, 3] = 0x7F  # of tokens from 36 on
    v.scale.view(torch.uint8)[:, 0, 20:, 6] = 0xFF  # from 96 on
    ref, _ = reference.attend(q, k, v, options_of(q, causal=True))
    out, _ = emulate(q, k, v, causal=True)
    assert torch.equal(out.isnan(), ref.isnan())
    assert relative(out.nan_to_num(0), ref.nan_to_num(0)) <= 2e-3


@emulated
def test_nan_of_a_block_of_k_reaches_no_row_that_does_not_see_it():
    q, k, v = quantized(*make(seqlen_q=130, seqlen_k=130), "int8_fp8")
    k.scale[:, :, 1] = math.nan  # keys 64 to 127
    out, lse = emulate(q, k, v, causal=True)
    assert out[:, :64].isfinite().all() and lse[:, :, :64].isfinite().all()
    assert out[:, 64:].isnan().all() and lse[:, :, 64:].isnan().all()


@emulated
def test_poison_behind_the_last_token_of_v_in_4_bits_reaches_nothing():
    q, k, v = quantized(*make(seqlen_k=65), "nvfp4")  # one token of the third 32
    expected, _ = emulate(q, k, v)
    v.data[..., 33:] = 0xFF
    v.data[..., 32] |= 0xF0
    v.scale.view(torch.uint8)[..., -1] = 0x7F  # a group without a token
    assert torch.equal(emulate(q, k, v)[0], expected)


# ---- the host ------------------------------------------------------------------------------------


def test_host_and_device_agree_on_the_parameters():
    names = fields_of("quantized_block.cuh", "fa_quantized_params")
    assert names == [name for name, *_ in kernel.Parameters._fields_]


def test_devices_that_cannot_run_a_recipe_are_named():
    assert not any(why_not(recipe, arch) for recipe in RECIPES for arch in (120, 121))
    assert not why_not("int8_fp8", 90) and not why_not("fp8", 89)
    assert "needs compute capability 8.9" in why_not("fp8", 86)
    for recipe in RECIPES.keys() - {"int8_fp8", "fp8"}:
        assert re.search(r"12\.x.*'int8_fp8', 'fp8'", why_not(recipe, 90))


@emulated
def test_calls_of_a_device(monkeypatch):
    """All but the driver: what is allocated, and which calls launch nothing."""
    launches = emulate_device(monkeypatch, multiprocessors=1)
    operands, causal = quantized(*make(), "int8_fp8"), {"recipe": "int8_fp8", "causal": True}
    options = options_of(operands[0], causal=True)
    ref, ref_lse = reference.attend(*operands, options)
    for returns_lse in (True, False):
        out, lse = attend_there(*operands, **causal, return_lse=returns_lse)
        assert out.dtype == torch.bfloat16 and relative(out, ref) <= 2e-3
        assert (lse is not None) == returns_lse
        assert lse is None or relative(lse, ref_lse) <= 1e-5
    assert len(launches) == 2
    monkeypatch.setattr(device, "card_of", lambda index: device.card_of_arch(120)._replace(sms=100))
    operands = quantized(*make(seqlen_k=1100), "int8_fp8")
    ref, ref_lse = reference.attend(*operands, options)
    for returns_lse in (True, False):
        out, lse = attend_there(*operands, **causal, return_lse=returns_lse, out_dtype=torch.float)
        assert relative(out, ref) <= 2e-3
        assert lse is None or relative(lse, ref_lse) <= 1e-5
    assert len(launches) == 4
    operands = quantized(*make(seqlen_k=0), "int8_fp8")
    out, lse = attend_there(*operands, **causal, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    sink = torch.arange(4.0)
    _, lse = attend_there(*operands, **causal, return_lse=True, learnable_sink=sink)
    assert torch.equal(lse[0, :, 0], sink)
    operands = quantized(*make(seqlen_q=0), "int8_fp8")
    assert attend_there(*operands, **causal)[0].shape == (2, 0, 4, 32)
    assert len(launches) == 4


@recipes
def test_on_a_gpu(recipe, cuda):
    """Of operands that were quantised on the CPU; and a call that quantises on the device."""
    major, minor = torch.cuda.get_device_capability()
    given = [x.cuda() for x in make()]
    if why_not(recipe, 10 * major + minor):
        with pytest.raises(RuntimeError, match=f"recipe '{recipe}' needs"):
            quantized_attention(*given, recipe)
        return
    assert quantized_attention(*given, recipe)[0].isfinite().all()
    here = quantized(*make(seqlen_q=200, seqlen_k=300, dim=128, dim_v=128), recipe)
    there = [
        x._replace(**{name: y.cuda() for name, y in x._asdict().items() if torch.is_tensor(y)})
        for x in here
    ]
    how = {"recipe": recipe, "return_lse": True, "out_dtype": torch.float32}
    sink = torch.tensor([-1.0, 0.0, 2.0, 30.0])
    for options in ({"num_splits": 3}, {"causal": True}, {"softcap": 5.0, "window_size": (70, 3)}):
        out, lse = quantized_attention(*there, **how, **options, learnable_sink=sink.cuda())
        ref, ref_lse = quantized_attention(*here, **how, **options, learnable_sink=sink)
        assert relative(out.cpu(), ref) <= 2e-3
        torch.testing.assert_close(lse.cpu(), ref_lse, rtol=1e-5, atol=1e-5)


@recipes
def test_no_spills(recipe):
    """Nor with a softcap; shared memory leaves room for two blocks or three."""
    chosen = RECIPES[recipe]
    for dim, target, softcap in ((64, GEFORCE, False), (128, PRO, False), (128, GEFORCE, True)):
        dtype = torch.bfloat16
        steps = kernel.Steps(softcap, sink=softcap)
        variant = kernel.variant_of(chosen.qk, chosen.pv, (dim, dim), dtype, dtype, steps, target)
        build = builds.build(kernel.KERNEL, *variant[:2], "sm_120f")
        assert build.spill_bytes == 0, variant.name
        assert variant.shared_bytes <= 48 << 10
