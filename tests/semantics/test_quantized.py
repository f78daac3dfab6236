"""Quantised attention: formats against exact tables, errors against fp32, what is refused."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from flash_attn_sm120.quantized import (
    RECIPES,
    formats,
    quantize,
    quantize_kv,
    quantized_attention,
    reference,
)
from flash_attn_sm120.quantized.layout import v_tokens
from flash_attn_sm120.quantized.quantize import rotate
from helpers.reference import attention_reference

# Relative L2 and cosine of N(0, 1), as the docstring of quantized_attention has them, and a little
BOUNDS = {
    "int8_fp8": (0.045, 0.999),
    "fp8": (0.06, 0.998),
    "mxfp8": (0.06, 0.998),
    "nvfp4_bf16": (0.14, 0.990),
    "nvfp4_fp8": (0.15, 0.990),
    "int8_nvfp4": (0.15, 0.990),
    "nvfp4": (0.20, 0.980),
}
recipes = pytest.mark.parametrize("recipe", RECIPES)
E2M1 = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]


def make(seqlen_q=70, seqlen_k=90, heads_q=4, heads_kv=2, dim=64, dim_v=32, dtype=torch.bfloat16):
    torch.manual_seed(seqlen_q + seqlen_k + dim)
    return (
        torch.randn(2, seqlen_q, heads_q, dim).to(dtype),
        torch.randn(2, seqlen_k, heads_kv, dim).to(dtype),
        torch.randn(2, seqlen_k, heads_kv, dim_v).to(dtype),
    )


def quantized(q, k, v, recipe):
    return quantize(q, recipe, "q"), *quantize_kv(k, v, recipe)


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# ---- formats -------------------------------------------------------------------------------------


def e4m3_value(code):
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    size = fraction * 2.0**-9 if not exponent else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


@pytest.mark.quick
def test_all_e4m3_codes():
    codes = torch.arange(256, dtype=torch.uint8)
    values = torch.tensor([e4m3_value(c) for c in range(256)])
    assert torch.equal(codes.view(formats.E4M3).float().nan_to_num(99), values.nan_to_num(99))
    known = ~values.isnan()
    back = formats.to_e4m3(values[known]).view(torch.uint8)
    assert torch.equal(back, codes[known])


def test_e4m3_rounds_to_nearest_even():
    values = [e4m3_value(c) for c in range(127)]
    for code, (low, high) in enumerate(itertools.pairwise(values)):
        middle = torch.tensor((low + high) / 2)
        below, above = (middle.nextafter(torch.tensor(to)) for to in (0.0, 999.0))
        given = torch.stack([below, middle, above])
        expected = [code, code + code % 2, code + 1]
        assert formats.to_e4m3(given).view(torch.uint8).tolist() == expected
    beyond = formats.to_e4m3(torch.tensor([449.0, 1e30, math.inf, -math.inf, math.nan]))
    assert beyond.view(torch.uint8).tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0x7F]


@pytest.mark.quick
def test_all_e2m1_codes():
    codes = torch.arange(16, dtype=torch.uint8)
    values = torch.tensor([*E2M1, *(-x for x in E2M1)])
    assert torch.equal(formats.from_e2m1(codes), values)
    assert torch.equal(formats.to_e2m1(values), codes)
    assert torch.equal(formats.unpack(formats.pack(codes)), codes)
    assert formats.pack(codes)[0] == 0x10  # the first in the low nibble


def test_e2m1_rounds_to_nearest_even():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    rounded = [0, 1, 1, 2, 2, 4, 4]
    assert formats.from_e2m1(formats.to_e2m1(ties)).tolist() == rounded
    above = formats.from_e2m1(formats.to_e2m1(ties.nextafter(torch.tensor(9.0))))
    below = formats.from_e2m1(formats.to_e2m1(ties.nextafter(torch.tensor(0.0))))
    assert above.tolist() == E2M1[1:] and below.tolist() == E2M1[:-1]
    special = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    assert formats.to_e2m1(special).tolist() == [7, 15, 7, 8]


@pytest.mark.quick
def test_all_e8m0_codes():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(formats.E8M0)
    values = formats.from_e8m0(codes)
    assert values[:255].tolist() == [2.0 ** (c - 127) for c in range(255)]
    assert values[255].isnan()
    back = formats.to_e8m0(values[:255])
    assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8)[:255])
    above = formats.to_e8m0(values[:254].nextafter(torch.tensor(math.inf)))
    assert torch.equal(above.view(torch.uint8), codes.view(torch.uint8)[1:255])
    special = formats.to_e8m0(torch.tensor([0.0, math.inf, math.nan]))
    assert special.view(torch.uint8).tolist() == [0, 254, 255]


def test_tokens_of_v_are_permuted_within_32():
    tokens = v_tokens(64, torch.device("cpu"))
    assert tokens[:16].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27]
    assert tokens[:32].sort().values.tolist() == [*range(32)]
    assert torch.equal(tokens[32:], tokens[:32] + 32)


@pytest.mark.parametrize("size", [16, 32, 128])
def test_rotations_keep_products(size):
    x = torch.randn(3, 128)
    turned = rotate(x, size)
    torch.testing.assert_close(turned @ turned.T, x @ x.T)
    torch.testing.assert_close(rotate(turned, size), x)


@recipes
@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_dequantised_values_are_near(recipe, operand):
    """Means and rotations are undone here; the error is that of the format."""
    x = make(seqlen_q=75, seqlen_k=75, heads_q=2)["qkv".index(operand)]
    narrow = quantize(x, recipe, operand)
    wide = torch.stack([reference.dequantize(narrow, b, slice(0, 2)) for b in range(2)])
    if narrow.mean is not None:
        wide = wide + narrow.mean[:, :, None]
    wide = rotate(wide, narrow.rotation).transpose(1, 2)
    bound = {"16bit": 0, "int8": 0.012, "fp8": 0.04, "mxfp8": 0.04, "nvfp4": 0.1}
    assert relative(wide, x.float()) <= bound[narrow.format]


@recipes
@pytest.mark.parametrize("size", [1e-37, 0.0], ids=["tiny", "zero"])
def test_tiny_and_zero_tensors(recipe, size):
    q, k, v = (size * x for x in make())
    out, lse = quantized_attention(q, k, v, recipe, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(90)))
    if size:
        mean = v.double().mean(dim=1, keepdim=True).repeat_interleave(2, dim=2).expand(out.shape)
        assert relative(out, mean) < 0.15


# ---- attention -----------------------------------------------------------------------------------


@recipes
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.quick("full-int8_fp8", "causal-nvfp4")
def test_errors_are_within_the_bounds(recipe, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 512, 2, 128).bfloat16() for _ in range(3))
    out, lse = quantized_attention(q, k, v, recipe, causal=causal, return_lse=True)
    ref, ref_lse = attention_reference(q, k, v, causal=causal)
    largest, cosine = BOUNDS[recipe]
    assert relative(out, ref) <= largest
    assert torch.cosine_similarity(out.double().flatten(), ref.double().flatten(), dim=0) >= cosine
    assert (lse - ref_lse).abs().max() <= (0.6 if RECIPES[recipe].qk == "nvfp4" else 0.15)


MASKS = {
    "causal": {"causal": True},
    "window": {"window_size": (20, 5)},
    "left": {"window_size": (10, None), "causal": True},
    "scale": {"softmax_scale": 0.3},
    "softcap": {"softcap": 2.0},
    "sink": {"causal": True, "learnable_sink": torch.tensor([-1.0, 0.0, 2.0, 30.0])},
}
SHAPES = {
    "odd": {"seqlen_q": 37, "seqlen_k": 101},
    "short": {"seqlen_q": 90, "seqlen_k": 33},
    "one": {"seqlen_q": 1, "seqlen_k": 65},
    "wide": {"dim": 96, "dim_v": 256, "heads_q": 3, "heads_kv": 1},
    "fp16": {"dtype": torch.float16, "dim": 32, "dim_v": 48},
}


def exact(q, k, v, recipe, **options):
    """Attention in fp64 of the numbers that Q, K and V were rounded to; P is not rounded."""
    narrow = quantized(q, k, v, recipe)
    wide = []
    for x in narrow:
        values = torch.stack(
            [reference.dequantize(x, b, slice(0, x.heads)) for b in range(x.batch)]
        )
        values = values if x.mean is None else values + x.mean[:, :, None]
        wide.append(rotate(values, x.rotation).transpose(1, 2))
    return attention_reference(*(x.double() for x in wide), **options)


@recipes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_and_shapes(recipe, shape, mask):
    """Against attention of the rounded numbers: what remains is the rounding of P."""
    q, k, v = make(**shape)
    if "learnable_sink" in mask:
        mask = mask | {"learnable_sink": mask["learnable_sink"][: q.shape[2]]}
    out, lse = quantized_attention(
        q, k, v, recipe, return_lse=True, out_dtype=torch.float32, **mask
    )
    ref, ref_lse = exact(q, k, v, recipe, **mask)
    bound = {"16bit": 0.004, "fp8": 0.045, "nvfp4": 0.13}[RECIPES[recipe].pv]
    assert out.shape == ref.shape and relative(out, ref) <= bound
    empty = ref_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert (lse - ref_lse).masked_fill(empty, 0).abs().max() <= 1e-5 * max(
        1, float(ref_lse.masked_fill(empty, 0).abs().max())
    )
    assert (out.transpose(1, 2)[empty] == 0).all()


@recipes
def test_quantised_operands_give_the_same_bits(recipe):
    q, k, v = make()
    direct = quantized_attention(q, k, v, recipe, causal=True, return_lse=True)
    narrow = quantized(q, k, v, recipe)
    for kept in itertools.product((False, True), repeat=3):
        given = [n if keep else x for n, x, keep in zip(narrow, (q, k, v), kept, strict=True)]
        out, lse = quantized_attention(*given, recipe, causal=True, return_lse=True)
        assert out.dtype == q.dtype
        assert torch.equal(out, direct[0]) and torch.equal(lse, direct[1])


@recipes
def test_blocks_do_not_matter(recipe):
    operands = quantized(*make(seqlen_q=130), recipe)
    options = {"softmax_scale": 0.125, "causal": True, "window_size": (60, None), "softcap": 0.0}
    options["learnable_sink"] = None
    whole, whole_lse = reference.attend(*operands, options)
    blocks, blocks_lse = reference.attend(*operands, options, block_scores=2 * 90 * 7)
    assert relative(blocks, whole) <= 1e-3
    torch.testing.assert_close(blocks_lse, whole_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_the_largest_weight_is_not_cut(recipe):
    _, _, narrow = quantized(*make(), recipe)
    codes = reference.quantize_p(torch.ones(1, 1, 90), narrow)
    assert codes.unique().tolist() == [reference.P_SCALE[recipe]]


@recipes
def test_errors_are_those_of_the_table(recipe):
    """One number: of the recipe, of the docstring, and of the table that accuracy.py makes."""
    error = f"{RECIPES[recipe].error:.3f}"
    assert f'``"{recipe}"``: {error} and' in quantized_attention.__doc__
    docs = Path(__file__).parents[2] / "docs" / "quantized.md"
    if docs.is_file():  # in a checkout
        measured = re.search(rf"^\| `{recipe}` \| (0\.\d{{4}}) ", docs.read_text(), re.M)
        assert abs(float(measured[1]) - RECIPES[recipe].error) <= 0.0006


# ---- what lies beside ----------------------------------------------------------------------------


@recipes
def test_poison_around_the_inputs_reaches_nothing(recipe):
    q, k, v = make(dim=32)
    expected, _ = quantized_attention(q, k, v, recipe)
    poisoned = []
    for x in (q, k, v):
        b, s, h, d = x.shape
        around = torch.full((b, s + 9, h + 1, d + 16), math.nan, dtype=x.dtype)
        around[:, 4 : 4 + s, :h, :d] = x
        poisoned.append(around[:, 4 : 4 + s, :h, :d])
    assert torch.equal(quantized_attention(*poisoned, recipe)[0], expected)


def test_poison_behind_the_last_token_of_v_in_4_bits_reaches_nothing():
    q, k, v = make(seqlen_k=65)  # one token of the third 32
    narrow = quantize(v, "nvfp4", "v")
    expected, _ = quantized_attention(q, k, narrow, "nvfp4")
    codes = formats.unpack(narrow.data)
    codes[..., 65:] = 15  # token 64 lies at position 64
    scale = narrow.scale.clone()
    scale.view(torch.uint8)[..., -1] = 0x7F  # a group without a token
    poisoned = narrow._replace(data=formats.pack(codes), scale=scale)
    assert torch.equal(quantized_attention(q, k, poisoned, "nvfp4")[0], expected)


def test_nan_of_masked_keys_reaches_no_row_that_does_not_see_them():
    q, k, v = make(seqlen_q=60, seqlen_k=60)
    narrow_k, narrow_v = quantize_kv(k, v, "fp8")
    expected, _ = quantized_attention(q, narrow_k, narrow_v, "fp8", causal=True)
    for narrow in (narrow_k, narrow_v):
        narrow.data.view(torch.uint8)[:, 40:] = 0x7F
    out, _ = quantized_attention(q, narrow_k, narrow_v, "fp8", causal=True)
    assert torch.equal(out[:, :40], expected[:, :40])
    assert out[:, 40:].isnan().all()


@recipes
def test_empty_calls(recipe):
    q, k, v = make()
    out, lse = quantized_attention(q, k[:, :0], v[:, :0], recipe, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    assert quantized_attention(q[:, :0], k, v, recipe)[0].shape == (2, 0, 4, 32)
    assert quantized_attention(q[:0], k[:0], v[:0], recipe)[0].shape == (0, 70, 4, 32)


# ---- what is refused -----------------------------------------------------------------------------


def test_recipes_and_operands_have_names():
    q, k, v = make()
    with pytest.raises(ValueError, match=r"recipe must be one of 'int8_fp8'.*got 'int4'"):
        quantized_attention(q, k, v, "int4")
    with pytest.raises(ValueError, match="recipe must be one of"):
        quantize(q, "int4")
    with pytest.raises(ValueError, match="operand must be"):
        quantize(q, "fp8", "p")


BAD_INPUTS = {
    "float32": (lambda q, k, v: (q.float(), k, v), TypeError, "bfloat16 or float16"),
    "list": (lambda q, k, v: (q, [1], v), TypeError, "k must be a tensor"),
    "no tensor": (lambda q, k, v: (None, k, v), TypeError, "q must be a tensor"),
    "3 dimensions": (lambda q, k, v: (q[0], k, v), ValueError, "got 3 dimensions"),
    "dtypes": (lambda q, k, v: (q, k.half(), v), TypeError, "one dtype"),
    "batch": (lambda q, k, v: (q[:1], k, v), ValueError, "batch sizes differ"),
    "tokens": (lambda q, k, v: (q, k, v[:, :5]), ValueError, "same tokens and heads"),
    "heads": (lambda q, k, v: (q[:, :, :3], k, v), ValueError, "must divide"),
    "head dims": (lambda q, k, v: (q[..., :32], k, v), ValueError, "same head dim"),
    "head dim 24": (lambda q, k, v: (q[..., :24], k[..., :24], v), ValueError, "multiples of 16"),
    "gradient": (lambda q, k, v: (q, k.requires_grad_(), v), NotImplementedError, "forward only"),
    "meta": (lambda q, k, v: (q.to("meta"), k, v), ValueError, "on one device"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs(change, error, message):
    with pytest.raises(error, match=message):
        quantized_attention(*change(*make()))


def test_other_devices_have_no_kernels():
    given = [x.to("meta") for x in make()]
    with pytest.raises(RuntimeError, match="no kernels for meta devices"):
        quantized_attention(*given)


def test_head_dims_of_mxfp8_are_multiples_of_32():
    q, k, v = make(dim=48)
    with pytest.raises(ValueError, match="multiples of 32"):
        quantized_attention(q, k, v, "mxfp8")
    with pytest.raises(ValueError, match="multiples of 32"):
        quantize(q, "mxfp8", "q")


def test_gradients_are_refused_unless_off():
    q, k, v = make()
    q.requires_grad_()
    with pytest.raises(NotImplementedError, match="forward only"):
        quantize(q, "fp8", "q")
    with torch.no_grad():
        assert not quantized_attention(q, k, v)[0].requires_grad


def test_results_go_where_they_are_wanted():
    q, k, v = make()
    expected, logs = quantized_attention(q, k, v, causal=True, return_lse=True)
    out, lse = torch.full_like(expected, math.nan), torch.full_like(logs, math.nan)
    version = out._version
    given = quantized_attention(q, k, v, causal=True, out=out, lse=lse)
    assert given[0] is out and given[1] is lse and out._version > version
    assert torch.equal(out, expected) and torch.equal(lse, logs)
    wide = torch.empty(out.shape)  # its dtype counts
    assert quantized_attention(q, k, v, causal=True, out=wide)[0].to(out.dtype).equal(expected)


def test_what_flash_attn_func_takes_and_there_is_no_kernel_for_is_named():
    given = make()
    nothing = {"dropout_p": 0.0, "page_table": None, "pack_gqa": False, "deterministic": True}
    assert quantized_attention(*given, num_splits=3, **nothing)[0].isfinite().all()
    lengths = torch.tensor([0, 70], dtype=torch.int32)
    for asked in (
        {"pack_gqa": True},
        {"dropout_p": 0.5},
        {"cu_seqlens_q": lengths},
        {"page_table": lengths},
        {"mask_mod": max},
    ):
        with pytest.raises(NotImplementedError, match=f"does not support {next(iter(asked))}"):
            quantized_attention(*given, **asked)
    with pytest.raises(TypeError, match="unexpected keyword argument 'casual'"):
        quantized_attention(*given, casual=True)


BAD_OPTIONS = {
    "scale": ({"softmax_scale": math.nan}, ValueError, "softmax_scale"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap"),
    "window": ({"window_size": (1.5, None)}, ValueError, "window_size"),
    "splits": ({"num_splits": -1}, ValueError, "num_splits"),
    "out": ({"out_dtype": torch.int8}, TypeError, "out_dtype"),
    "out shape": ({"out": torch.empty(2, 70, 4, 16)}, ValueError, r"out must be \(2, 70, 4, 32\)"),
    "out strides": ({"out": torch.empty(2, 4, 70, 32).mT.mT.transpose(1, 2)}, ValueError, "contig"),
    "out dtypes": ({"out": torch.empty(0), "out_dtype": torch.half}, TypeError, "out must be"),
    "out int": ({"out": torch.empty(2, 70, 4, 32, dtype=torch.int8)}, TypeError, "out_dtype"),
    "lse": ({"lse": torch.empty(2, 4, 70).half()}, TypeError, "lse must be torch.float32"),
    "sink": ({"learnable_sink": torch.zeros(3)}, ValueError, r"learnable_sink must be \(4,\)"),
    "sink dtype": ({"learnable_sink": torch.zeros(4).int()}, TypeError, "learnable_sink"),
    "sink gradient": (
        {"learnable_sink": torch.zeros(4, requires_grad=True)},
        NotImplementedError,
        "forward only",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        quantized_attention(*make(), **options)


BAD_SCALES = {
    "shape": ("int8_fp8", "k", {"scale": torch.ones(2, 2, 3)}, ValueError, r"k.scale must be"),
    "dtype": ("int8_fp8", "k", {"scale": torch.ones(2, 2, 2).half()}, TypeError, "k.scale must"),
    "none": ("int8_fp8", "q", {"scale": None}, TypeError, "q.scale must be a tensor"),
    "zero": ("int8_fp8", "k", {"scale": torch.zeros(2, 2, 2)}, ValueError, "positive and finite"),
    "nan": ("fp8", "v", {"head_scale": torch.full((2, 2), math.nan)}, ValueError, "positive"),
    "more": ("fp8", "v", {"scale": torch.ones(2, 2)}, ValueError, "must be None"),
    "e8m0": ("mxfp8", "k", {"scale": torch.ones(2, 90, 2, 2)}, TypeError, "float8_e8m0fnu"),
    "fp4": ("nvfp4", "v", {"scale": torch.ones(2, 2)}, TypeError, "float8_e4m3fn"),
    "device": ("fp8", "k", {"head_scale": torch.ones(2, 2, device="meta")}, ValueError, "on cpu"),
    "mean": ("fp8", "q", {"mean": torch.ones(2, 4, 64)}, ValueError, "Q has no mean"),
    "mean shape": ("fp8", "k", {"mean": torch.ones(2, 64)}, ValueError, "k.mean must be"),
    "format": ("fp8", "k", {"format": "int8"}, ValueError, "must be in fp8"),
    "operand": ("fp8", "k", {"operand": "v"}, ValueError, "quantised as 'k'"),
    "rotation": ("nvfp4", "k", {"rotation": 1}, ValueError, "rotated alike"),
    "rotation 3": ("nvfp4", "k", {"rotation": 3}, ValueError, "power of two"),
    "length": ("nvfp4", "v", {"seqlen": 200}, ValueError, "v.data must be"),
}


@pytest.mark.parametrize("case", BAD_SCALES.values(), ids=BAD_SCALES)
def test_bad_scales(case):
    recipe, operand, changes, error, message = case
    given = dict(zip("qkv", quantized(*make(), recipe), strict=True))
    given[operand] = given[operand]._replace(**changes)
    with pytest.raises(error, match=message):
        quantized_attention(*given.values(), recipe)
