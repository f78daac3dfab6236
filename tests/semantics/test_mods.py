"""score_mod and mask_mod: right in both directions, refused by name, and compiled once."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from flash_attn_sm120 import explain, flash_attn_func, flash_attn_varlen_func
from flash_attn_sm120.block_mask import create_block_mask
from flash_attn_sm120.mods import attention, costs
from flash_attn_sm120.mods.call import Call
from flash_attn_sm120.mods.capture import captured_by
from flash_attn_sm120.mods.translate import MAX_ADDITIONS
from helpers.checks import assert_all_equal
from helpers.devices import CPU, CUDA, EMULATOR, each_on, params_of, reordered
from helpers.dropout import factors
from helpers.mods import gradients, mask_mods, score_mods, tensors_of
from helpers.reference import attention_reference

EVERY_MOD = {f"score_mod-{name}": ("score_mod", name) for name in score_mods(tensors_of(CPU))}
EVERY_MOD |= {f"mask_mod-{name}": ("mask_mod", name) for name in mask_mods(tensors_of(CPU))}
DEVICES = (CPU, EMULATOR, CUDA)

on_each_device = pytest.mark.parametrize("device", params_of(*DEVICES))


def every_mod(emulated):
    names = [name for name in EVERY_MOD if name.split("-")[1] in emulated.split()]
    return pytest.mark.parametrize("device, mod", each_on(DEVICES, EVERY_MOD, names))


def qkv(device, batch=2, seqlen_q=150, seqlen_k=150, heads=4, heads_kv=2, dims=(64, 64)):
    dtype = torch.float32 if device is CPU else torch.bfloat16
    shapes = (
        (seqlen_q, heads, dims[0]),
        (seqlen_k, heads_kv, dims[0]),
        (seqlen_k, heads_kv, dims[1]),
    )
    return [device.place(torch.randn(batch, *shape).to(dtype)) for shape in shapes]


def plain(x):
    return x.detach().cpu().as_subclass(torch.Tensor)


def made(kind, name, tensors):
    mod = (score_mods if kind == "score_mod" else mask_mods)(tensors)[name]
    return {kind: mod}


def both(kind, name, device):
    """The mod over tensors of the device, and over the same on the CPU."""
    tensors = tensors_of(device)
    return made(kind, name, tensors), made(kind, name, {n: plain(x) for n, x in tensors.items()})


def assert_near(actual, expected, name, tolerance=None):
    actual, expected = plain(actual).float(), plain(expected).float()
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), name
    if not finite.any():
        return
    bound = (1e-4 if tolerance is None else tolerance) * max(1.0, expected[finite].abs().max())
    assert (actual - expected)[finite].abs().max() <= bound, name


def meant_by(q, k, options):
    """What the options of a call are to the reference."""
    named = {n: x for n, x in options.items() if n in ("window_size", "softcap")}
    if options.get("learnable_sink") is not None:
        named["learnable_sink"] = plain(options["learnable_sink"])
    if "dropout_p" in options:
        seed, (batch, queries, heads, _) = options["dropout_seed"], q.shape
        numbers = (plain(seed), options["dropout_p"], range(batch), heads, queries, k.shape[1])
        named["dropout"] = factors(*numbers)
    return named


def check(device, q, k, v, mod, cpu_mod, **options):
    named = meant_by(q, k, options)
    out, lse = flash_attn_func(q, k, v, return_lse=True, **mod, **options)
    expected = attention_reference(*(plain(x) for x in (q, k, v)), **named, **cpu_mod)
    assert_near(out, expected[0], "out", None if device is CPU else 2**-6)
    assert_near(lse, expected[1], "lse", 1e-4)
    return out


def check_gradients(device, q, k, v, mod, cpu_mod, wanted=(), cpu_wanted=(), **options):
    leaves = [plain(x).requires_grad_() for x in (q, k, v)]
    dout = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype)
    named = meant_by(q, k, options)
    expected = torch.autograd.grad(
        attention_reference(*leaves, **named, **cpu_mod)[0], [*leaves, *cpu_wanted], dout.float()
    )
    if device is CPU:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out, _ = flash_attn_func(*inputs, **mod, **options)
        actual = torch.autograd.grad(out, [*inputs, *wanted], dout)
    else:
        dout = device.place(dout)
        actual = gradients(q, k, v, dout, mod, wanted, **options)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        # What is captured gets sums over all scores of a head: these cancel, their roundings do not.
        rounding = 0.03 if i < 3 else 0.1
        assert_near(x / y.abs().max(), y / y.abs().max(), i, 1e-4 if device is CPU else rounding)
    return dout, actual


# ---- the mods ------------------------------------------------------------------------------------


@pytest.mark.quick("cpu-*", "emulator-mask_mod-document")
@every_mod("alibi t5 gelu cap grows rises late_low late_high document natten nothing")
def test_forward(device, mod):
    check(device, *qkv(device), *both(*mod, device))


@every_mod("gelu document alibi minimum")
def test_backward(device, mod):
    check_gradients(device, *qkv(device), *both(*mod, device))


# score_mod -> what it captures.
LEARNED = {"relative": "table", "alibi": "slopes", "temperature": "temperature", "bias": "bias"}


def every_learning(emulated):
    cases = {name: (name, tensor) for name, tensor in LEARNED.items()}
    return pytest.mark.parametrize("device, case", each_on(DEVICES, cases, emulated.split()))


@every_learning("relative alibi temperature")
def test_gradients_of_captured_tensors(device, case):
    name, tensor = case
    tensors = tensors_of(device)
    cpu = {n: plain(x) for n, x in tensors.items()}
    learned = [x[tensor].requires_grad_() for x in (tensors, cpu)]
    mods = (made("score_mod", name, x) for x in (tensors, cpu))
    check_gradients(device, *qkv(device), *mods, learned[:1], learned[1:])


# In fixed point: what is learned, the head dims, and one option more.
IN_FIXED_POINT = {
    "gqa": ("relative", (64, 64), {}),
    "window": ("bias", (128, 72), {"window_size": (40, 3)}),
    "softcap": ("alibi", (64, 64), {"softcap": 1.5}),
    "wide": ("temperature", (192, 128), {}),
    "dropout": ("relative", (64, 64), {"dropout_p": 0.3}),
}


@pytest.mark.quick("cpu-gqa", "emulator-gqa")
@pytest.mark.parametrize("case", IN_FIXED_POINT)
@on_each_device
def test_deterministic_gradients_of_captured_tensors(device, case):
    """Right, and the same bits in any order of blocks and warps."""
    name, dims, options = IN_FIXED_POINT[case]
    if "dropout_p" in options:
        options = with_dropout(device)
    tensors = tensors_of(device)
    cpu = {n: plain(x) for n, x in tensors.items()}
    learned = [x[LEARNED[name]].requires_grad_() for x in (tensors, cpu)]
    mod, cpu_mod = (made("score_mod", name, x) for x in (tensors, cpu))
    inputs = qkv(device, 2, 90, 110, dims=dims)
    options = {**options, "deterministic": True}
    dout, first = check_gradients(
        device, *inputs, mod, cpu_mod, learned[:1], learned[1:], **options
    )
    if device is CPU:
        return
    for seed in range(1, 10 if device is CUDA else 3):
        with reordered(device, seed):
            assert_all_equal(gradients(*inputs, dout, mod, learned[:1], **options), first)
    options["deterministic"] = False
    default = gradients(*inputs, dout, mod, learned[:1], **options)[3]
    assert_near(first[3] / default.abs().max(), default / default.abs().max(), name, 1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("device", params_of(EMULATOR, CUDA))
def test_packed_gradients_of_captured_tensors(device, deterministic):
    ends = [0, 37, 38, 118]
    q, k, v = (x[0] for x in qkv(device, 1, 118, 118, 2, 1))
    dout = torch.randn(q.shape).to(q.dtype)
    table = torch.randn(2, 160)
    learned = [table.clone().requires_grad_(), device.place(table).requires_grad_()]

    def mod_of(table):
        return {"score_mod": lambda s, b, h, i, j: s + table[h, i - j + 80]}

    expected = 0
    for rows in map(slice, ends, ends[1:]):
        sequence = (plain(x)[None, rows] for x in (q, k, v))
        out, _ = attention_reference(*sequence, **mod_of(learned[0]))
        expected += torch.autograd.grad(out[0], learned[0], dout[rows].float())[0]
    cu_seqlens = device.place(torch.tensor(ends, dtype=torch.int32))
    options = {name: cu_seqlens for name in ("cu_seqlens_q", "cu_seqlens_k")}
    given = q, k, v, device.place(dout), mod_of(learned[1]), learned[1:]
    (actual,) = gradients(*given, deterministic=deterministic, **options)[3:]
    assert_near(actual / expected.abs().max(), expected / expected.abs().max(), "table", 0.03)


@pytest.mark.parametrize("device", params_of(EMULATOR, CUDA))
def test_deterministic_gradients_of_any_size(device):
    """Elements whose gradients differ by more than a fixed-point number holds keep all their bits;
    what is not finite stays so."""
    q, k, v = qkv(device, 1, 70, 70)
    # Not so small that the default's additions flush what counts: atomics know no subnormals.
    factors = 2.0 ** torch.linspace(-90, 110, 70).round()
    table = device.place(torch.zeros(4, 70)).requires_grad_()
    factors = device.place(factors)
    mod = {"score_mod": lambda s, b, h, i, j: s + table[h, j] * factors[j]}
    dout = device.place(torch.randn(q.shape).to(q.dtype))
    in_order, default = (
        plain(gradients(q, k, v, dout, mod, [table], deterministic=x)[3]).cpu()
        for x in (True, False)
    )
    # Of all that the sum of a key has: 70 numbers, which may cancel.
    largest = plain(factors).cpu() * (default / plain(factors).cpu()).abs().max()
    assert ((in_order - default).abs() <= 1e-6 * largest).all()
    assert in_order.count_nonzero() == default.count_nonzero()
    dout[:, 3] = torch.inf
    (got,) = gradients(q, k, v, dout, mod, [table], deterministic=True)[3:]
    assert plain(got).isnan().any()


@pytest.mark.parametrize("device", params_of(EMULATOR, CUDA))
def test_deterministic_gradients_of_too_many_scores(device):
    """2^43 of them could overflow a sum; tensors without so many elements."""
    slopes = device.place(torch.ones(1)).requires_grad_()

    def score_mod(s, b, h, i, j):
        return s * slopes[h]

    joint = attention.translate("score_mod", score_mod, *captured_by(score_mod, None), True)
    q, k, v = (
        x.expand(-1, 2**22, -1, -1).as_subclass(device.tensor_class)
        for x in qkv(device, 1, 1, 1, 1, 1)
    )
    call = Call(q, k, v, None, {}, {"deterministic": True})
    with pytest.raises(NotImplementedError, match=r"2\^43 scores"):
        attention.run_backward({"score_mod": joint}, call, q, None, q, q, [True])


@on_each_device
def test_the_gradient_of_one_of_two_captured_tensors(device):
    """The other one requires a gradient, too, but none is asked for."""
    tensors = tensors_of(device)
    slopes, table = (tensors[name].requires_grad_() for name in ("slopes", "table"))
    q, k, v = qkv(device, 1, 40, 40)
    dout = device.place(torch.randn(q.shape).to(q.dtype))
    mod = {"score_mod": lambda s, b, h, i, j: s * slopes[h] + table[h, i - j + 70]}
    for options in ({}, {"deterministic": True}):
        if device is CPU:
            both, one = (
                torch.autograd.grad(flash_attn_func(q, k, v, **mod, **options)[0], x, dout)
                for x in ([slopes, table], [slopes])
            )
        else:
            both, one = (
                gradients(q, k, v, dout, mod, x, **options)[3:] for x in ([slopes, table], [slopes])
            )
        assert_near(one[0], both[0], "slopes")


@on_each_device
def test_what_captures_a_tensor_in_an_object(device):
    """Only its trace tells that something requires a gradient."""
    tables = {"slopes": device.place(torch.rand(4)).requires_grad_()}
    out, _ = flash_attn_func(
        *qkv(device, 1, 20, 20), score_mod=lambda s, b, h, i, j: s * tables["slopes"][h]
    )
    assert out.requires_grad


def test_what_a_score_may_add():
    """In fixed point a sum has room for so many additions of each score."""
    params = (Path(__file__).parents[2] / "kernels/params.h").read_text()
    assert f"FA_MAX_ADDITIONS = {MAX_ADDITIONS} " in params
    table = torch.zeros(MAX_ADDITIONS + 1, requires_grad=True)

    def reading(count):
        return lambda s, b, h, i, j: s + sum(table[i + n] for n in range(count))

    attention.translate("score_mod", reading(MAX_ADDITIONS), None, [table], True)
    with pytest.raises(NotImplementedError, match="65 times, at most 64"):
        attention.translate("score_mod", reading(MAX_ADDITIONS + 1), None, [table], True)


# ---- beside other options ------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize(
    "mod",
    [("mask_mod", "document"), ("score_mod", "alibi"), ("score_mod", "relative")],
    ids=lambda mod: mod[1],
)
def test_behind_a_softcap(device, mod):
    """Both directions: what the derivative of the cap is taken of is the score before the mod."""
    inputs = qkv(device, 1, 70, 70, 2, 1)
    check(device, *inputs, *both(*mod, device), softcap=1.5)
    check_gradients(device, *inputs, *both(*mod, device), softcap=1.5)


# Mods beside dropout, and one option more.
SEED = (2**62 + 5, 17)
BESIDE_DROPOUT = {
    "gqa": (("score_mod", "alibi"), {}),
    "score that falls": (("score_mod", "gelu"), {}),
    "mask": (("mask_mod", "document"), {}),
    "window": (("score_mod", "relative"), {"window_size": (40, 3)}),
    "softcap": (("score_mod", "alibi"), {"softcap": 1.5}),
    "sink": (("score_mod", "squared"), {"learnable_sink": (0.5, -1.0, 0.0, 2.0)}),
}


def with_dropout(device, options=()):
    return {**dict(options), "dropout_p": 0.3, "dropout_seed": device.place(torch.tensor(SEED))}


CASES = {
    f"{name}-{dims}": (*beside, dims)
    for name, beside in BESIDE_DROPOUT.items()
    for dims in ((64, 64), (128, 72))
}


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("device, case", each_on(DEVICES, CASES, [*CASES][::4] + [*CASES][3::4]))
def test_with_dropout(device, case):
    """Weights that the derivative of a score makes negative are dropped as others are."""
    mod, options, dims = case
    options = with_dropout(device, options)
    if "learnable_sink" in options:
        options["learnable_sink"] = device.place(torch.tensor(options["learnable_sink"]))
    inputs = qkv(device, 2, 70, 90, dims=dims)
    check(device, *inputs, *both(*mod, device), **options)
    check_gradients(device, *inputs, *both(*mod, device), **options)


@every_learning("alibi")
def test_gradients_of_captured_tensors_with_dropout(device, case):
    name, tensor = case
    tensors = tensors_of(device)
    cpu = {n: plain(x) for n, x in tensors.items()}
    learned = [x[tensor].requires_grad_() for x in (tensors, cpu)]
    mods = (made("score_mod", name, x) for x in (tensors, cpu))
    inputs = qkv(device, 1, 90, 90)
    check_gradients(device, *inputs, *mods, learned[:1], learned[1:], **with_dropout(device))


@on_each_device
@pytest.mark.parametrize("dims", [(128, 128), (72, 40)], ids=str)
def test_with_a_window_in_parts_and_packed(device, dims):
    mod, cpu_mod = both("score_mod", "alibi", device)
    mask, cpu_mask = both("mask_mod", "document", device)
    q, k, v = qkv(device, seqlen_q=5, seqlen_k=150, dims=dims)
    for options in ({"num_splits": 1}, {"num_splits": 3, "pack_gqa": True}):
        both_mods = {**mod, **mask}, {**cpu_mod, **cpu_mask}
        check(device, q, k, v, *both_mods, window_size=(100, 3), **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@on_each_device
def test_packed_sequences_have_indices_of_their_own(device, dropout_p):
    lengths, heads = (37, 1, 80), 2
    dropout = with_dropout(device) if dropout_p else {}
    ends = device.place(torch.tensor([0, 37, 38, 118], dtype=torch.int32))
    score, cpu_score = both("score_mod", "relative", device)
    mask, cpu_mask = both("mask_mod", "sliding", device)
    mods, cpu_mods = {**score, **mask}, {**cpu_score, **cpu_mask}
    q, k, v = (x[0] for x in qkv(device, 1, 118, 118, heads, heads))
    out, lse = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, return_lse=True, **dropout, **mods
    )
    first = 0
    for number, length in enumerate(lengths):
        rows = slice(first, first + length)
        named = dict(cpu_mods)
        if dropout:
            named["dropout"] = factors(SEED, dropout_p, [number], heads, length, length)
        expected = attention_reference(*(plain(x)[None, rows] for x in (q, k, v)), **named)
        assert_near(out[rows], expected[0][0], length, 1e-4 if device is CPU else 2**-6)
        assert_near(lse[:, rows], expected[1][0], length)
        first += length


@on_each_device
def test_aux_tensors_come_last(device):
    tensors = tensors_of(device)
    q, k, v = qkv(device, 1)
    out, _ = flash_attn_func(
        q, k, v, score_mod=lambda s, b, h, i, j, aux: s + aux[0][h] * (j - i),
        mask_mod=lambda b, h, i, j: i >= j, aux_tensors=[tensors["slopes"]],
    )  # fmt: skip
    expected, _ = flash_attn_func(
        q, k, v, score_mod=score_mods(tensors)["alibi"], mask_mod=mask_mods(tensors)["causal"]
    )
    assert torch.equal(plain(out), plain(expected))


# ---- compiled once -------------------------------------------------------------------------------


def test_equal_mods_share_a_kernel(monkeypatch):
    q = torch.empty(1, 256, 2, 64, dtype=torch.bfloat16)

    def variant(mod):
        return explain(q, q, q, arch=120, score_mod=mod).variant

    first = variant(lambda s, b, h, i, j: s + (i - j) * 0.5)
    assert variant(lambda score, b, h, q, k: score + (q - k) * 0.5) == first
    assert variant(lambda s, b, h, i, j: s + (i - j) * 0.25) != first
    assert "_score" in first

    def capturing(slopes):
        return lambda s, b, h, i, j: s + slopes[h]

    first = variant(capturing(torch.rand(2)))
    monkeypatch.setattr(attention, "trace", None)  # another tensor: not even traced
    assert variant(capturing(torch.rand(2))) == first


@pytest.mark.parametrize("device", params_of(CPU, CUDA))
def test_threads_trace_mods_at_the_same_time(device):
    def gradient_with(number):
        q = device.place(torch.ones(1, 3, 1, 16, dtype=torch.bfloat16)).requires_grad_()
        out, _ = flash_attn_func(
            q, q, q, score_mod=lambda score, b, h, q_idx, kv_idx: score * number + kv_idx * number
        )
        return torch.autograd.grad(out.sum(), q)[0]

    with ThreadPoolExecutor(8) as pool:
        gradients = list(pool.map(gradient_with, range(8)))
    for number, gradient in enumerate(gradients):
        assert torch.equal(gradient, gradient_with(number))


def test_explain_says_what_was_traced():
    q = torch.empty(1, 256, 2, 64, dtype=torch.bfloat16)
    plan = explain(q, q, q, arch=120, mask_mod=lambda b, h, i, j: i >= j)
    assert "at.query >= at.key" in plan.reasons["mask_mod"]


def test_explain_says_what_mods_and_lists_cost():
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    q = torch.empty(1, 256, 2, 64, dtype=torch.bfloat16)
    blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, 128, "cpu")
    call = {"score_mod": lambda s, b, h, i, j: s * 2.0, "block_sparse_tensors": blocks}
    reasons = explain(q, q, q, arch=120, costs=True, **call).reasons
    assert "at.query >= at.key" in reasons["mask_mod"]
    assert "partial and full blocks of 128 queries and 128" in reasons["block_sparse_tensors"]
    cost = (
        r"(\d+) registers per thread, 0 bytes spilled; without mods and lists (\d+) and 0; "
        r"score_mod \d PTX instructions per score; mask_mod \d PTX instructions per score"
    )
    found = re.fullmatch(cost, reasons["costs"])
    assert found and all(64 < int(x) < 255 for x in found.groups()), reasons["costs"]
    assert "costs" not in explain(q, q, q, arch=120, **call).reasons
    with pytest.raises(ValueError, match="costs=True is for kernels"):
        explain(*qkv(CPU), costs=True, **call | {"block_sparse_tensors": None})


@pytest.mark.parametrize("backward", [False, True])
def test_more_operations_are_more_instructions(backward):
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)

    def count(mod):
        number, *_ = attention.translate("score_mod", mod, None, [], backward)
        return costs.instructions("score_mod", number, backward)

    mods = score_mods(tensors_of(CPU))
    counts = [count(mod) for mod in (lambda s, *_: s, mods["squared"], mods["gelu"])]
    assert counts == sorted(counts) and counts[0] <= 1 < counts[1] < 30 < counts[2], counts


# ---- bad input -----------------------------------------------------------------------------------


def changed(x):
    def score_mod(s, b, h, q, k):
        x.add_(1)
        return s

    return score_mod


NINE = [torch.ones(2) for _ in range(9)]

BAD = {
    "no tensor": (TypeError, "score_mod", lambda s, b, h, q, k: 1.0),
    "not bool": (TypeError, "mask_mod", lambda b, h, q, k: q - k),
    "integer": (TypeError, "score_mod", lambda s, b, h, q, k: q - k),
    "shape": (ValueError, "score_mod", lambda s, b, h, q, k: s + torch.zeros(3)),
    "branch": (TypeError, "score_mod", lambda s, b, h, q, k: s if q > k else -s),
    "item": (TypeError, "score_mod", lambda s, b, h, q, k: s * q.item()),
    "changes": (ValueError, "score_mod", changed(torch.zeros(3))),
    "op": (NotImplementedError, "score_mod", lambda s, b, h, q, k: torch.lgamma(s)),
    "no callable": (TypeError, "score_mod", 3),
    "too many": (
        NotImplementedError,
        "score_mod",
        lambda s, b, h, q, k: s + sum(x[h] for x in NINE),
    ),
}


@pytest.mark.quick("cpu*")
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("device", params_of(CPU, CUDA))
def test_bad_mods(device, bad):
    error, kind, mod = bad
    q, k, v = qkv(device, 1, 20, 20)
    with pytest.raises(error, match=kind):
        flash_attn_func(q, k, v, **{kind: mod})
    check(device, q, k, v, *both("mask_mod", "causal", device))


def test_a_tensor_of_another_device():
    meta = torch.empty(4, device="meta")
    q, k, v = qkv(CPU, 1, 20, 20)
    with pytest.raises(ValueError, match="score_mod captures must be on q's device"):
        flash_attn_func(q, k, v, score_mod=lambda s, b, h, i, j: s + meta[h])


@pytest.mark.parametrize(
    "name, option",
    [
        ("a mod", {"score_mod": lambda s, *_: s}),
        ("a mod", {"mask_mod": lambda b, h, i, j: i >= j}),
        ("alibi_slopes that require a gradient", {"alibi_slopes": torch.ones(4).requires_grad_()}),
    ],
)
def test_keys_in_8_bits_are_refused_by_name(name, option):
    q, k, v = qkv(CPU, 1, 20, 20)
    k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
    with pytest.raises(NotImplementedError, match=f"{name} takes no k and v in float8_e4m3fn"):
        flash_attn_func(q, k, v, **option)


@pytest.mark.parametrize("name", ["score_mod_bwd", "aux_scalars"])
def test_what_is_refused_by_name(name):
    q, k, v = qkv(CPU, 1, 20, 20)
    with pytest.raises(NotImplementedError, match=name):
        flash_attn_func(q, k, v, score_mod=lambda s, *_: s, **{name: [1.0]})


@pytest.mark.parametrize("device", params_of(EMULATOR, CUDA))
def test_alibi_as_a_mod_that_learns(device):
    """What a call makes of slopes that require a gradient."""
    q, k, v = (device.place(torch.randn(1, n, 2, 32).to(device.dtypes[0])) for n in (20, 40, 40))
    pair = []
    for place, of in (
        (device.place, (q, k) if device is CUDA else (plain(q), plain(k))),
        (lambda x: x, (plain(q), plain(k))),
    ):
        slopes = place(torch.tensor([0.3, -0.1])).requires_grad_()
        mod = attention._with_learned_alibi(None, *of, {"alibi_slopes": slopes})
        pair.append((slopes, {"score_mod": mod}))
    (slopes, mod), (cpu_slopes, cpu_mod) = pair
    check_gradients(device, q, k, v, mod, cpu_mod, [slopes], [cpu_slopes])
