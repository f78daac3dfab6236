"""Options: numbers are numbers of any kind, tensors are not, and what is wrong is said in one line."""

import decimal
import fractions
import itertools
import warnings

import numpy as np
import pytest
import torch

from flash_attn_sm120 import explain, flash_attn_func


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 6, 2, 16, generator=generator) for _ in range(3)]


def attend(**options):
    return flash_attn_func(*qkv(), **options)[0]


class Index:
    """A number of somebody else's."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value

    __float__ = None


class Float:
    def __float__(self):
        return 0.5


NUMBERS = [
    0.5,
    fractions.Fraction(1, 2),
    decimal.Decimal("0.5"),
    np.float64(0.5),
    np.float32(0.5),
    np.float16(0.5),
    Float(),
    type("Half", (float,), {})(0.5),
]
ONES = [1, True, np.int64(1), np.int8(1), np.uint64(1), np.float32(1), fractions.Fraction(1)]


@pytest.mark.parametrize("option", ["softmax_scale", "softcap"])
def test_any_real_number(option):
    for value in NUMBERS:
        assert torch.equal(attend(**{option: value}), attend(**{option: 0.5})), repr(value)
    for value in ONES:
        assert torch.equal(attend(**{option: value}), attend(**{option: 1.0})), repr(value)


INTEGERS = [lambda x: x, np.int64, np.int32, np.int8, Index, type("Whole", (int,), {})]


@pytest.mark.parametrize("kind", INTEGERS, ids=lambda kind: getattr(kind, "__name__", "int"))
def test_any_integer(kind):
    expected = attend(window_size=(2, 1))
    assert torch.equal(attend(window_size=(kind(2), kind(1))), expected)
    assert torch.equal(attend(num_splits=kind(1)), attend())
    plan = explain(*(x.half() for x in qkv()), arch=kind(90), num_splits=kind(1))
    assert plan.num_splits == 1 and plan.kernel.startswith("forward")


@pytest.mark.parametrize(
    "window, same",
    [
        (None, (None, None)),
        ([2, 1], (2, 1)),
        (np.array([2, 1]), (2, 1)),
        (range(2, 0, -1), (2, 1)),
        ((True, False), (1, 0)),
        ((np.int64(2), None), (2, None)),
        ([None, np.uint8(0)], (None, 0)),
        ((2**31, 2**63), (None, None)),
        ((10**30, 0), (None, 0)),
        ((np.uint64(2**64 - 1), 1), (None, 1)),
    ],
    ids=str,
)
def test_any_pair_is_a_window(window, same):
    assert torch.equal(attend(window_size=window), attend(window_size=same))


@pytest.mark.parametrize("value", [True, 1, "yes", np.True_, np.bool_(True), [0]], ids=repr)
def test_truth_is_pythons(value):
    assert torch.equal(attend(causal=value), attend(causal=True))


TENSORS = {
    "Parameter": lambda: torch.nn.Parameter(torch.tensor(0.5)),
    "tensor": lambda: torch.tensor(1.0),
    "integer": lambda: torch.tensor(1),
    "boolean": lambda: torch.tensor(True),
    "one of one": lambda: torch.ones(1, 1),
    "meta": lambda: torch.ones((), device="meta"),
    "subclass": lambda: torch.ones(()).as_subclass(type("Tensor", (torch.Tensor,), {})),
    "numpy": lambda: np.array(1.0),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("option", ["softmax_scale", "softcap", "num_splits", "causal", "window"])
def test_tensors_are_no_numbers(kind, option):
    """A gradient would not reach them, and to read one is to wait for its device."""
    value = TENSORS[kind]()
    options = {"window_size": (value, None)} if option == "window" else {option: value}
    with pytest.raises(TypeError, match="got a tensor: no gradient would reach it"):
        attend(**options)


class Hostile:
    """What no message can show."""

    def __repr__(self):
        raise ZeroDivisionError


class Endless:
    """Says that it has two items, and has more."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return "x"


WRONG = {
    "scale beyond float": ({"softmax_scale": 10**400}, ValueError, "softmax_scale must be finite"),
    "scale too long to show": ({"softmax_scale": 10**5000}, ValueError, "finite in float32, got"),
    "scale nan": ({"softmax_scale": np.float32("nan")}, ValueError, "finite in float32, got np.float32"),
    "decimal": ({"softmax_scale": decimal.Decimal("1e999")}, ValueError, "finite in float32, got Dec"),
    "complex": ({"softmax_scale": 1j}, TypeError, "softmax_scale must be a number, got 1j"),
    "softcap inf": ({"softcap": float("-inf")}, ValueError, "softcap must be finite"),
    "softcap None": ({"softcap": None}, TypeError, "softcap must be a number, got None"),
    "splits negative": ({"num_splits": -(2**70)}, ValueError, "num_splits must be 0"),
    "splits float": ({"num_splits": 2.0}, TypeError, "num_splits must be an integer, got 2.0"),
    "splits fraction": ({"num_splits": fractions.Fraction(2)}, TypeError, "must be an integer"),
    "window of floats": ({"window_size": (np.float64(1), 0)}, TypeError, "integers or None"),
    "window string": ({"window_size": "12"}, TypeError, "of integers or None, got '1'"),
    "window set": ({"window_size": {1, 2}}, TypeError, "must be .left, right., got"),
    "window without end": ({"window_size": itertools.count()}, TypeError, "got count.0."),
    "window that goes on": ({"window_size": Endless()}, TypeError, "of integers or None, got 'x'"),
    "window tensor": ({"window_size": torch.ones(2)}, TypeError, "window_size must be .left, right., got tensor"),
    "no repr": ({"num_splits": Hostile()}, TypeError, "an integer, got <class '.*Hostile'>"),
    "long repr": ({"pack_gqa": ["x" * 44_000]}, TypeError, r"None, got \['xxx.*xxx\.\.\."),
    "lines": ({"pack_gqa": type("L", (), {"__repr__": lambda _: "a\nb\n\nc"})()}, TypeError, "got a b c$"),
    "array": ({"causal": np.ones(3)}, TypeError, "causal must be True or False, got a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case):
    options, error, message = WRONG[case]
    with pytest.raises(error, match=message) as caught:
        attend(**options)
    assert type(caught.value) is error
    assert len(str(caught.value)) <= 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize("arch", [2**63, 2**32 + 120, -120, 0, 10**400])
def test_wrong_arch(arch):
    with pytest.raises(ValueError, match="arch must be a compute capability such as 120, got"):
        explain(*qkv(), arch=arch)


class OddIndex:
    """Python deprecates what it returns."""

    def __index__(self):
        return True


class OddFloat:
    def __float__(self):
        return np.float64(0.5)


@pytest.mark.parametrize("options", [{"num_splits": OddIndex()}, {"softmax_scale": OddFloat()}])
def test_warnings_that_are_errors(options):
    """Where the user says so, they are errors of the contract, with the warning as their cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((TypeError, ValueError)) as caught:
            attend(**options)
    assert isinstance(caught.value.__cause__, DeprecationWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attend(**options)


# ---- the order of other versions -----------------------------------------------------------------


@pytest.mark.parametrize(
    "positional, name",
    [
        ((0.0,), "qv"),
        ((0.0, None, True), "qv"),
        ((0.1, 0.125, True, (-1, -1)), "qv"),
        ((0.125, True), "qv"),  # FlashAttention-3
        ((None, True), "gather_kv_indices"),
        ((None, 0.125), "gather_kv_indices"),
    ],
)
def test_positional_order_of_other_versions(positional, name):
    with pytest.raises(TypeError, match=f"for {name}: FlashAttention-2's and -3's .* by keyword"):
        flash_attn_func(*qkv(), *positional)
