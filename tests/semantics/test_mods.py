"""score_mod and mask_mod: right in both directions, refused by name, and compiled once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flash_attn_sm120 import _C, explain, flash_attn_func, flash_attn_varlen_func
from flash_attn_sm120.mods import attention
from flash_attn_sm120.mods.capture import captured_by
from helpers.devices import CPU, CUDA, EMULATOR, params_of
from helpers.dropout import factors
from helpers.mods import mask_mods, oracle, score_mods, tensors_of

EVERY_MOD = [("score_mod", name) for name in score_mods({**tensors_of(CPU)})]
EVERY_MOD += [("mask_mod", name) for name in mask_mods(tensors_of(CPU))]
EMULATED = {"alibi", "t5", "gelu", "cap", "grows", "rises", "late_low", "late_high"}
EMULATED |= {"document", "natten", "nothing"}
DEVICES = (CPU, EMULATOR, CUDA)

on_each_device = pytest.mark.parametrize("device", params_of(*DEVICES))
every_mod = pytest.mark.parametrize("mod", EVERY_MOD, ids="-".join)


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
    """What the options of a call are to the oracle."""
    named = {"window": options.get("window_size"), "softcap": options.get("softcap")}
    if options.get("learnable_sink") is not None:
        named["sink"] = plain(options["learnable_sink"])
    if "dropout_p" in options:
        seed, (batch, queries, heads, _) = options["dropout_seed"], q.shape
        numbers = (plain(seed), options["dropout_p"], range(batch), heads, queries, k.shape[1])
        named["dropout"] = factors(*numbers).float()
    return named


def check(device, q, k, v, mod, cpu_mod, **options):
    named = meant_by(q, k, options)
    out, lse = flash_attn_func(q, k, v, return_lse=True, **mod, **options)
    expected = oracle(*(plain(x) for x in (q, k, v)), **named, **cpu_mod)
    assert_near(out, expected[0], "out", None if device is CPU else 2**-6)
    assert_near(lse, expected[1], "lse", 1e-4)
    return out


def gradients(q, k, v, dout, mod, wanted=(), **options):
    """By _C, on any device but the CPU."""
    found = {name: captured_by(f, None) for name, f in mod.items()}
    forward = {name: attention.translate(name, f, *found[name]) for name, f in mod.items()}
    joint = {name: attention.translate(name, f, *found[name], True) for name, f in mod.items()}
    out, lse = _C.forward(q, k, v, return_lse=True, **forward, **options)
    captured = joint["score_mod"][1] if "score_mod" in joint else ()
    wants = [any(x is w for w in wanted) for x in captured]
    others = {name: x for name, x in options.items() if name != "learnable_sink"}
    dqkv, of_captured = attention.run_backward(
        dout, None, q, k, v, options.get("learnable_sink"), out, lse, others, joint, wants
    )
    by_id = {id(x): g for x, g in zip(captured, of_captured, strict=True)}
    return [*dqkv[:3], *(by_id[id(x)] for x in wanted)]


def check_gradients(device, q, k, v, mod, cpu_mod, wanted=(), cpu_wanted=(), **options):
    leaves = [plain(x).requires_grad_() for x in (q, k, v)]
    dout = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype)
    named = meant_by(q, k, options)
    expected = torch.autograd.grad(
        oracle(*leaves, **named, **cpu_mod)[0], [*leaves, *cpu_wanted], dout.float()
    )
    if device is CPU:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out, _ = flash_attn_func(*inputs, **mod, **options)
        actual = torch.autograd.grad(out, [*inputs, *wanted], dout)
    else:
        actual = gradients(q, k, v, device.place(dout), mod, wanted, **options)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        # What is captured gets sums over all scores of a head: these cancel, their roundings do not.
        rounding = 0.03 if i < 3 else 0.1
        assert_near(x / y.abs().max(), y / y.abs().max(), i, 1e-4 if device is CPU else rounding)


# ---- the mods ------------------------------------------------------------------------------------


@pytest.mark.quick("cpu-*", "emulator-mask_mod-document")
@every_mod
@on_each_device
def test_forward(device, mod):
    if device is EMULATOR and mod[1] not in EMULATED:
        return
    check(device, *qkv(device), *both(*mod, device))


@every_mod
@on_each_device
def test_backward(device, mod):
    if device is EMULATOR and mod[1] not in ("gelu", "document", "alibi", "minimum"):
        return
    check_gradients(device, *qkv(device), *both(*mod, device))


LEARNED = {"relative": "table", "alibi": "slopes", "temperature": "temperature", "bias": "bias"}


@pytest.mark.parametrize("name", LEARNED)
@on_each_device
def test_gradients_of_captured_tensors(device, name):
    if device is EMULATOR and name == "bias":
        return
    tensors = tensors_of(device)
    cpu = {n: plain(x) for n, x in tensors.items()}
    learned = [x[LEARNED[name]].requires_grad_() for x in (tensors, cpu)]
    mods = (made("score_mod", name, x) for x in (tensors, cpu))
    check_gradients(device, *qkv(device), *mods, learned[:1], learned[1:])


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


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("dims", [(64, 64), (128, 72)], ids=str)
@pytest.mark.parametrize("case", BESIDE_DROPOUT)
@on_each_device
def test_with_dropout(device, case, dims):
    """Weights that the derivative of a score makes negative are dropped as others are."""
    if device is EMULATOR and dims[0] != (64, 128)[list(BESIDE_DROPOUT).index(case) % 2]:
        return
    mod, options = BESIDE_DROPOUT[case]
    options = with_dropout(device, options)
    if "learnable_sink" in options:
        options["learnable_sink"] = device.place(torch.tensor(options["learnable_sink"]))
    inputs = qkv(device, 2, 70, 90, dims=dims)
    check(device, *inputs, *both(*mod, device), **options)
    check_gradients(device, *inputs, *both(*mod, device), **options)


@pytest.mark.parametrize("name", LEARNED)
@on_each_device
def test_gradients_of_captured_tensors_with_dropout(device, name):
    if device is EMULATOR and name != "alibi":
        return
    tensors = tensors_of(device)
    cpu = {n: plain(x) for n, x in tensors.items()}
    learned = [x[LEARNED[name]].requires_grad_() for x in (tensors, cpu)]
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
            named["dropout"] = factors(SEED, dropout_p, [number], heads, length, length).float()
        expected = oracle(*(plain(x)[None, rows] for x in (q, k, v)), **named)
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


def test_threads_trace_mods_at_the_same_time():
    def gradient_with(number):
        q = torch.ones(1, 3, 1, 8, requires_grad=True)
        out, _ = flash_attn_func(
            q, q, q, score_mod=lambda score, b, h, q_idx, kv_idx: score * number + kv_idx * number
        )
        return torch.autograd.grad(out.sum(), q)[0]

    with ThreadPoolExecutor(8) as pool:
        gradients = list(pool.map(gradient_with, range(32)))
    for number, gradient in enumerate(gradients):
        assert torch.equal(gradient, gradient_with(number))


def test_explain_says_what_was_traced():
    q = torch.empty(1, 256, 2, 64, dtype=torch.bfloat16)
    plan = explain(q, q, q, arch=120, mask_mod=lambda b, h, i, j: i >= j)
    assert "at.query >= at.key" in plan.reasons["mask_mod"]


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
