"""Every pair of features in one call: right, or refused by the name of one of them.

What is refused is in the tables below, so that a change of support is a change of them. The CPU runs
every pair alone; the emulator and GPUs few calls that have all pairs.
"""

import functools
import inspect
import itertools

import pytest
import torch

from flash_attn_sm120 import _C, flash_attn_func, flash_attn_varlen_func, ops
from flash_attn_sm120.fa2 import flash_attn_with_kvcache
from flash_attn_sm120.mods import attention
from helpers.call import Call
from helpers.devices import CPU, CUDA, EMULATOR
from helpers.features import FEATURES, FUNCTIONS, INTERNAL, takes

# ---- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "cu_seqlens_k": "page_table",
    "attn_bias": "seqused_k page_table score_mod mask_mod k_descale q_descale",
    "block_sparse_tensors": "seqused_k page_table k_descale q_descale",
    "score_mod": "k_descale q_descale",
    "mask_mod": "k_descale q_descale",
    "q_descale": "alibi_slopes dropout_p k rotary_cos",
}
# What has no gradient beside anything; one of the functions has none at all.
WITHOUT_GRADIENT = "k_descale q_descale page_table out"
NO_GRADIENT = {"alibi_slopes": "cu_seqlens_q cu_seqlens_k seqused_q seqused_k attn_bias"}
NO_GRADIENT_BUT_ON_THE_CPU = {"attn_bias": "softcap"}
# A function that refuses one of its parameters.
NOT_TAKEN = {flash_attn_varlen_func: "attn_bias block_sparse_tensors"}


def listed(table, pair):
    return any(other in table.get(name, "").split() for name, other in itertools.permutations(pair))


def is_refused(pair):
    return listed(REFUSED, pair)


def has_gradient(device, function, *names):
    if function is flash_attn_with_kvcache or set(names) & set(WITHOUT_GRADIENT.split()):
        return False
    tables = [NO_GRADIENT] + [NO_GRADIENT_BUT_ON_THE_CPU] * (device is not CPU)
    return not any(listed(t, pair) for t in tables for pair in itertools.combinations(names, 2))


def features_of(function):
    without = NOT_TAKEN.get(function, "").split()
    return [name for name in FEATURES if takes(function, name) and name not in without]


def pairs_of(names):
    return set(itertools.combinations(sorted(names, key=list(FEATURES).index), 2))


def fits(device, function, gradients, names):
    return not any(map(is_refused, pairs_of(names))) and (
        not gradients or has_gradient(device, function, *names)
    )


def cover(device, function, gradients):
    """Sets of features, few, that have all pairs of a function: those with gradients, or others."""
    features = features_of(function)
    left = {
        pair
        for pair in pairs_of(features)
        if fits(device, function, gradients, pair)
        and has_gradient(device, function, *pair) == gradients
    }
    while left:
        chosen, count = set(min(left)), 0
        while count < (count := len(pairs_of(chosen) & left)):
            larger = [chosen | {name} for name in features]
            larger = [names for names in larger if fits(device, function, gradients, names)]
            chosen = max(larger, key=lambda names: len(pairs_of(names) & left))
        yield chosen
        left -= pairs_of(chosen)


# ---- one call ------------------------------------------------------------------------------------


def call_of(device, function, names):
    """Its features are put in the order of the table."""
    call = Call(device, function)
    for name, feature in FEATURES.items():
        if name in names:
            feature.put(call)
    call.make()
    return call


def plain(x):
    return x.detach().cpu().as_subclass(torch.Tensor).double()


def assert_near(actual, expected, tolerance, what):
    actual, expected = plain(actual), plain(expected)
    assert actual.shape == expected.shape, what
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite]), what
    if finite.any():
        largest = max(1.0, expected[finite].abs().max().item())
        error = (actual - expected)[finite].abs().max().item() / largest
        assert error <= tolerance, f"{what} is off by {error:.1e} of the largest"


def check_forward(call):
    """Of q in 8 bits weights are rounded, too, by up to 2^-4."""
    out, lse = call.run()
    expected = call.reference()
    tolerance = 2**-3 if "q" in call.eight_bits else 1e-4 if call.device is CPU else 2**-6
    assert_near(out, expected[0], tolerance, "out")
    if lse is not None:
        assert_near(lse, expected[1], 1e-4 if call.device is CPU else 1e-3, "lse")


def check_gradients(call):
    """Of q, k and v but in 8 bits, and all that features learn; through the lse, if it is returned."""
    names, ours, theirs = zip(*call.learned, strict=True)
    expected = call.reference()[: 1 + call.returns_lse]
    through = [torch.randn(x.shape) for x in expected]
    flows = [torch.where(x.isfinite(), y, 0.0) for x, y in zip(expected, through, strict=True)]

    def gradients():
        results = [x for x in call.run() if x is not None]
        given = [call.device.place(y.to(x.dtype)) for x, y in zip(results, flows, strict=True)]
        return torch.autograd.grad(results, ours, given)

    found = gradients()
    for name, x, y in zip(names, found, torch.autograd.grad(expected, theirs, flows), strict=True):
        y = call.stored(name, y) if name in "qkv" else y
        # What is summed over all scores of a head cancels, its roundings do not.
        rounding = 0.03 if name in "qkv" else 0.1
        largest = y.abs().max()
        tolerance = 1e-4 if call.device is CPU else rounding
        assert_near(x / largest, y / largest, tolerance, f"gradient of {name}")
    if "deterministic" in call.named:
        assert all(map(torch.equal, map(plain, found), map(plain, gradients())))


REFUSALS = (NotImplementedError, TypeError, ValueError, RuntimeError)


def check_refusal(run, function, names):
    """Its error has the name of an option of a feature; of the function, if that has no gradients."""
    says = "|".join(rf"\b(?:{FEATURES[name].says})" for name in names)
    if function is flash_attn_with_kvcache:
        says += f"|{function.__name__} has no gradient"
    with pytest.raises(REFUSALS, match=says):
        run()


def placed(device, x):
    """Arguments with the tensors in them on the device."""
    if isinstance(x, torch.Tensor):
        return device.place(x.detach())
    if isinstance(x, dict):
        return {name: placed(device, y) for name, y in x.items()}
    if isinstance(x, (tuple, list)):
        made = [placed(device, y) for y in x]
        return type(x)(*made) if hasattr(x, "_fields") else type(x)(made)
    return x


@pytest.fixture
def backward_on(device, monkeypatch):
    """Autograd takes the tensors of the emulator for those of the CPU that they are, and so would
    the backward."""

    def on_the_emulator(run, *arguments, **options):
        with torch._C._EnableTorchFunction():
            return run(*placed(device, arguments), **options)

    for module in (ops, attention) if device is EMULATOR else ():
        run = functools.partial(on_the_emulator, module.run_backward)
        monkeypatch.setattr(module, "run_backward", run)


# ---- the tests -----------------------------------------------------------------------------------


def test_every_option_is_a_feature():
    """A new row of csrc/options.h is one here, too."""
    signatures = [inspect.signature(method).parameters for method in (_C.cache_forward, _C.explain)]
    table = {*signatures[0]} - {"q", "k_cache", "v_cache"} | {*signatures[1]} - {"q", "k", "v"}
    options = [name for feature in FEATURES.values() for name in feature.options]
    assert sorted([*options, *INTERNAL]) == sorted(table)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_a_function_does_not_take(function):
    taken = features_of(function)
    assert taken
    for name in set(FEATURES) - set(taken):
        check_refusal(call_of(CPU, function, [name]).run, function, [name])


PAIRS = [(f, pair) for f in FUNCTIONS for pair in sorted(pairs_of(features_of(f)))]


@pytest.mark.parametrize(
    "function, pair", PAIRS, ids=[f"{f.__name__[11:]}-{'-'.join(pair)}" for f, pair in PAIRS]
)
def test_pair(function, pair):
    call = call_of(CPU, function, pair)
    if is_refused(pair):
        with torch.no_grad():
            check_refusal(call.run, function, pair)
        return
    with torch.no_grad():
        check_forward(call)
    if has_gradient(CPU, function, *pair):
        check_gradients(call)
    elif call.learned:
        check_refusal(lambda: check_gradients(call), function, pair)


COVERING = [
    pytest.param(d, f, names, gradients, id=f"{d.name}-{f.__name__[11:]}-{gradients:d}-{number}")
    for d, f, gradients in itertools.product((CPU, EMULATOR, CUDA), FUNCTIONS, (False, True))
    for number, names in enumerate(cover(d, f, gradients))
]


@pytest.mark.quick("cpu-*")
@pytest.mark.filterwarnings("ignore:pack_gqa was asked for and is dropped")
@pytest.mark.parametrize("device, function, names, gradients", COVERING)
def test_all_pairs_in_few_calls(device, function, names, gradients, backward_on):
    call = call_of(device, function, names)
    if gradients:
        check_gradients(call)
    with torch.no_grad():
        check_forward(call)


ON_THE_CPU_ALONE = [
    pytest.param(device, (name, other), id=f"{device.name}-{name}-{other}")
    for name, others in NO_GRADIENT_BUT_ON_THE_CPU.items()
    for device, other in itertools.product((EMULATOR, CUDA), others.split())
]


@pytest.mark.parametrize("device, pair", ON_THE_CPU_ALONE)
def test_no_gradient_on_a_device(device, pair, backward_on):
    call = call_of(device, flash_attn_func, pair)
    check_refusal(lambda: check_gradients(call), flash_attn_func, pair)
