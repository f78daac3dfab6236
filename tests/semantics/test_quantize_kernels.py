"""The quantisers' kernels on the emulator, beside the torch operations of the CPU."""

from contextlib import ExitStack

import pytest
import torch

from emulator import emulator, unavailable
from flash_attn_sm120 import jit
from flash_attn_sm120.quantized import RECIPES, device_quantize, quantize, quantize_kv
from flash_attn_sm120.quantized.device import card_of_arch
from flash_attn_sm120.quantized.quantize import quantize_together
from helpers import spans
from helpers.devices import CPU
from helpers.structs import fields_of

emulated = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
recipes = pytest.mark.parametrize("recipe", RECIPES)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def emulate(operands, recipe, arch=120, multiprocessors=1):
    """Of the quantised Q, K and V that kernels write: nothing else may be touched."""
    treatments = {name: RECIPES[recipe].treatment(name) for name in operands}
    wide = {name: x for name, x in operands.items() if treatments[name].format != "16bit"}
    plan = device_quantize.prepare(wide, RECIPES[recipe], multiprocessors)
    kernel = device_quantize.KERNEL
    code = jit.compile(kernel, kernel, plan.options, arch, 13000, ptx=True)
    tensors = [pair for work in plan.works.values() for pair in work.tensors().items()]
    if plan.counters is not None:
        tensors.append(("counters", plan.counters))
    with ExitStack() as stack:
        for name, x in tensors:
            array = x.view(INTEGERS[x.element_size()]).numpy()
            stack.enter_context(emulator().allowed(array, writable=name != "x"))
        emulator().run(
            code.rstrip(b"\0").decode(),
            bytes(plan.parameters),
            grid=plan.blocks,
            block=device_quantize.THREADS,
        )
    return {name: work.narrow for name, work in plan.works.items()}


def same(x, y):
    """The same bits, or both are NaN."""
    assert x.shape == y.shape and x.dtype == y.dtype
    is_nan = torch.isnan(x.float())
    equal = x.view(torch.uint8) == y.view(torch.uint8)
    per_number = equal.unflatten(-1, (-1, x.element_size())).all(dim=-1)
    return bool(torch.where(is_nan, torch.isnan(y.float()), per_number).all())


def check(operands, recipe, arch=120):
    """Every field has the CPU's bits."""
    got = emulate(operands, recipe, arch)
    wanted = quantize_together(operands, recipe)
    for name, x in got.items():
        for field, tensor in x._asdict().items():
            expected = getattr(wanted[name], field)
            is_tensor = isinstance(tensor, torch.Tensor)
            assert same(tensor, expected) if is_tensor else tensor == expected, f"{name}.{field}"


def make(seqlen_q=70, seqlen_k=75, heads_q=2, heads_kv=1, dim=64, dim_v=48, dtype=torch.bfloat16):
    torch.manual_seed(seqlen_k + dim)
    q = torch.randn(1, seqlen_q, heads_q, dim)
    k = torch.randn(1, seqlen_k, heads_kv, dim) + 2
    v = torch.randn(1, seqlen_k, heads_kv, dim_v) * torch.linspace(0.01, 3, dim_v)
    k[:, :20, 0, :32], q[:, 3:4] = 0, 0
    return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}


CASES = {
    "edges": ({"seqlen_q": 64, "seqlen_k": 64, "dim": 128, "dim_v": 128}, RECIPES),
    "chunks": (
        {"seqlen_q": 1, "seqlen_k": 300, "dim": 32, "dim_v": 16},
        ("int8_fp8", "mxfp8", "nvfp4"),
    ),
    "odd": (
        {"seqlen_q": 33, "seqlen_k": 97, "dim": 96, "dim_v": 80, "heads_kv": 2},
        ("fp8", "mxfp8", "int8_nvfp4", "nvfp4"),
    ),
    "wide": (
        {"seqlen_q": 5, "seqlen_k": 66, "dim": 256, "dim_v": 256, "dtype": torch.float16},
        ("int8_fp8", "fp8", "nvfp4"),
    ),
}
CALLS = [(name, recipe) for name, (_, recipes) in CASES.items() for recipe in recipes]


@emulated
@pytest.mark.parametrize("case, recipe", CALLS)
@pytest.mark.quick("odd-nvfp4", "edges-int8_fp8")
def test_bits_are_those_of_the_cpu(case, recipe):
    check(make(**CASES[case][0]), recipe)


@emulated
@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp8"])
def test_devices_without_conversions_to_e2m1(recipe):
    check(make(), recipe, arch=90)


@emulated
@pytest.mark.parametrize("recipe, operand", [("int8_fp8", "q"), ("mxfp8", "k"), ("nvfp4", "v")])
def test_one_operand_alone(recipe, operand):
    check({operand: make(seqlen_q=40, seqlen_k=35)[operand]}, recipe)


@emulated
@pytest.mark.parametrize("recipe", ["nvfp4", "int8_fp8"])
def test_strides_and_poison_around(recipe):
    """Heads before tokens, batches far apart, NaN behind the rows and the tokens; and rows that
    begin at odd addresses, which are copied."""

    def spread(x, behind):
        batch, seqlen, heads, dim = x.shape
        memory = x.new_full((batch + 1, heads, seqlen + 3, dim + behind), float("nan"))
        view = memory.transpose(1, 2)[:batch, :seqlen, :, behind:]
        return view.copy_(x)

    operands = make(heads_q=2, heads_kv=2)
    for behind in (8, 3):
        check({name: spread(x, behind) for name, x in operands.items()}, recipe)


@emulated
@pytest.mark.parametrize("recipe", ["nvfp4", "int8_fp8"])
def test_tokens_beyond_32_bit_offsets(recipe):
    near = make(seqlen_q=40, seqlen_k=40)
    far = spans.apart(CPU, list(near.values()), 1)
    check(dict(zip(near, far, strict=True)), recipe)


@emulated
@recipes
def test_nan_and_infinity_reach_what_shares_their_scale(recipe):
    for where, value in (("q", "nan"), ("k", "inf"), ("v", "-inf"), ("v", "nan")):
        operands = make(seqlen_q=37, seqlen_k=37, heads_q=2, heads_kv=2, dim=32, dim_v=32)
        operands[where][0, 3, 1, 5] = float(value)
        check(operands, recipe)


@emulated
@recipes
@pytest.mark.parametrize("size", [0, 1e-38, 3e38], ids=["zeros", "tiny", "huge"])
def test_sizes(recipe, size):
    operands = make(seqlen_q=20, seqlen_k=20, dim=32, dim_v=32)
    check({name: (x * size).clamp(-3e38, 3e38) for name, x in operands.items()}, recipe)


@emulated
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
@pytest.mark.parametrize("ahead", [1, 3 << 16, 1 << 30], ids=["one", "two", "all"])
def test_order_of_blocks(recipe, ahead, monkeypatch):
    """Statistics may be ahead by one head, by two, or by all, and blocks start in any order."""
    monkeypatch.setattr(device_quantize, "AHEAD_BYTES", ahead)
    operands = {
        name: torch.cat([x, 3 * x])
        for name, x in make(seqlen_q=300, seqlen_k=513, heads_q=4, heads_kv=2).items()
    }
    with emulator().settings(seed=ahead % 7):
        check(operands, recipe)


@recipes
def test_on_a_gpu(recipe, cuda):
    """More heads than are ahead, many chunks, and again while the device is busy."""
    wide = make(seqlen_q=3000, seqlen_k=20000, heads_q=16, heads_kv=8, dim=128, dim_v=128)
    wanted = quantize_together(wide, recipe)
    on_device = {name: x.cuda() for name, x in wide.items()}
    for _ in range(5):
        for name, x in quantize_together(on_device, recipe).items():
            for field, tensor in x._asdict().items():
                if isinstance(tensor, torch.Tensor):
                    assert same(tensor.cpu(), getattr(wanted[name], field)), f"{name}.{field}"


# ---- launches and bytes --------------------------------------------------------------------------

CARDS = {"5060 Ti": 36, "GB10": 48, "5090": 170, "PRO 6000": 188}  # multiprocessors
# Bytes moved over those of reading Q, K and V once and writing them quantised once, where nothing
# is found in L2.
WITHOUT_CACHE = {  # 32/8 heads, 32/32
    "int8_fp8": (1.24, 1.48),
    "fp8": (1.71, 1.71),
    "mxfp8": (1.24, 1.47),
    "nvfp4_bf16": (1.83, 1.83),
    "nvfp4_fp8": (1.80, 1.79),
    "int8_nvfp4": (1.25, 1.51),
    "nvfp4": (1.83, 1.84),
}


def plan_of(recipe, heads_kv, seqlen=8192, multiprocessors=170):
    """Of tensors that have no memory."""
    heads = {"q": 32, "k": heads_kv, "v": heads_kv}
    wide = {
        name: torch.empty(1, seqlen, heads[name], 128, dtype=torch.bfloat16, device="meta")
        for name in heads
        if RECIPES[recipe].treatment(name).format != "16bit"
    }
    return device_quantize.prepare(wide, RECIPES[recipe], multiprocessors)


@recipes
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("heads_kv", [8, 32])
def test_launches_and_bytes(recipe, card, heads_kv):
    for seqlen in (512, 2048, 8192):
        plan = plan_of(recipe, heads_kv, seqlen, CARDS[card])
        assert plan.launches <= 2
        assert plan.bytes_moved() <= 1.06 * plan.bytes_needed()


@recipes
def test_bytes_without_a_cache(recipe):
    for heads_kv, most in zip((8, 32), WITHOUT_CACHE[recipe], strict=True):
        plan = plan_of(recipe, heads_kv)
        assert most - 0.02 < plan.bytes_moved(0) / plan.bytes_needed() <= most


def test_heads_beyond_the_cache_are_read_twice():
    plan = plan_of("fp8", 8, seqlen=1 << 18)
    assert plan.bytes_moved() == plan.bytes_moved(0) > 1.6 * plan.bytes_needed()


def test_int8_of_q_has_no_statistics():
    plan = device_quantize.prepare({"q": make()["q"]}, RECIPES["int8_fp8"], 170)
    assert plan.launches == 1 and plan.counters is None
    assert plan.bytes_moved() == plan.bytes_needed()


def test_calls_launch_one_kernel(monkeypatch):
    launched = []
    monkeypatch.setattr(device_quantize, "has_kernel", lambda x, format: format != "16bit")
    monkeypatch.setattr(device_quantize, "card_of", lambda index: card_of_arch(120))
    monkeypatch.setattr(device_quantize, "_loaded", lambda *_: lambda *x: launched.append(x[0][0]))
    monkeypatch.setattr(torch.cuda, "device", lambda index: ExitStack())
    operands = make()
    assert list(quantize_together(operands, "nvfp4")) == ["q", "k", "v"]
    # of Q 2 heads, of K and V 1: a chunk and two parts of each
    assert launched == [4 * 3]
    quantize(operands["q"], "int8_fp8", "q")
    quantize_kv(operands["k"], operands["v"])
    assert launched[1:] == [2 * 3, 2 * 3]


def test_host_and_device_agree_on_the_parameters():
    for name, struct in (("params", "Parameters"), ("operand", "Operand")):
        names = fields_of("quantize.cuh", f"fa_quantize_{name}")
        fields = getattr(device_quantize, struct)._fields_
        assert names == [field for field, *_ in fields]
