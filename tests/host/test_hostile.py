"""Arguments that change while a call reads them, lie, call back or raise: nothing is read or written
that is not there, exceptions of others pass, and the next good call works."""

import contextlib
import gc
import operator
import random
import sys

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_sm120 import _C, explain, flash_attn_func, frameworks
from helpers.capsules import READ_ONLY, Answers, Capsule, Producer, exchanged
from helpers.devices import EMULATOR

SHAPE = (2, 5, 4, 16)


def array(seed=0, shape=SHAPE, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def strided(seed=0, shape=SHAPE):
    """What has to be copied: rows are not contiguous."""
    return array(seed, (*shape[:-1], 2 * shape[-1]))[..., ::2]


def tensor(seed=0):
    return torch.from_numpy(array(seed))


@pytest.fixture(autouse=True)
def next_good_call_works():
    yield
    q, k, v = (tensor(i) for i in range(3))
    out, _ = flash_attn_func(q, k, v[:, :1].expand_as(v))
    torch.testing.assert_close(out, v[:, :1].expand_as(v), atol=1e-5, rtol=1e-5)


# ---- what is read again is validated again -------------------------------------------------------

OTHER_COPIES = {
    "smaller": lambda: array(0, (2, 3, 4, 16)),
    "larger": lambda: array(0, (2, 50, 4, 16)),
    "fewer dimensions": lambda: array(0, SHAPE[1:]),
    "narrower": lambda: array(0).astype(np.float16),
    "empty": lambda: array(0, (2, 0, 4, 16)),
    "transposed": lambda: array(0, (2, 4, 5, 16)),
}
other_copies = pytest.mark.parametrize("other", OTHER_COPIES.values(), ids=OTHER_COPIES)


@other_copies
def test_producer_with_a_second_answer(other):
    """Its first cannot be read in place: the copy is made of that, and it is not asked again."""
    x = Answers(strided, other)
    out, _ = flash_attn_func(tensor(), x, tensor())
    assert torch.equal(out, flash_attn_func(tensor(), strided(), tensor())[0])
    assert [made.deleted for made in x.made] == [1]


@other_copies
def test_numpy_array_that_copies_to_another(other):
    class Array(np.ndarray):
        def copy(self, order="C"):
            return other()

    with pytest.raises(ValueError, match=r"the copy of v is of another kind|v must have 4 dim"):
        flash_attn_func(array(), array(), strided().view(Array))


@other_copies
def test_torch_tensor_that_clones_to_another(other):
    class Tensor(torch.Tensor):
        def clone(self, **kwargs):
            return torch.from_numpy(other())

    x = torch.from_numpy(strided()).as_subclass(Tensor)
    with pytest.raises(ValueError, match=r"the copy of q is of another kind|q must have 4 dim"):
        flash_attn_func(x, tensor(), tensor())


def test_copy_that_is_not_contiguous():
    class Tensor(torch.Tensor):
        def clone(self, **kwargs):
            return torch.from_numpy(strided(3))

    x = torch.from_numpy(strided()).as_subclass(Tensor)
    with pytest.raises(ValueError, match="the copy of q is not contiguous"):
        flash_attn_func(x, tensor(), tensor())


def test_copy_of_the_lse_of_a_backward():
    class Tensor(torch.Tensor):
        def clone(self, **kwargs):
            return torch.zeros(2, 4, 1)

    q = tensor()
    out, _ = flash_attn_func(q, q, q)
    lse = torch.zeros(2, 4, 10)[..., ::2].as_subclass(Tensor)
    with pytest.raises(ValueError, match="the copy of lse is of another kind: expected float32"):
        _C.backward(out, q, q, q, out, lse, None)


def read_only(shape, dtype):
    return Producer(Capsule(np.zeros(shape, dtype), flags=READ_ONLY))


OTHER_MEMORY = {
    "smaller": (lambda like, shape: torch.empty(*shape[:-1], shape[-1] // 2), "of another kind"),
    "strided": (lambda like, shape: torch.empty(*shape, 2)[..., 0], "not contiguous"),
    "one for all": (lambda like, shape: torch.empty(shape[-1]).expand(shape), "not contiguous"),
    "double": (lambda like, shape: torch.empty(shape).double(), "must be float16, bfloat16"),
    "half": (lambda like, shape: torch.empty(shape).half(), "of another kind"),
    "read-only": (lambda like, shape: read_only(shape, np.float32), "read-only"),
    "None": (lambda like, shape: None, "must be a tensor"),
    "an input": (lambda like, shape: like.as_subclass(torch.Tensor), "out overlaps q|another kind"),
}
other_memory = pytest.mark.parametrize("case", OTHER_MEMORY)


def with_memory(make):
    class Tensor(torch.Tensor):
        def new_empty(self, shape, **kwargs):
            return make(self, tuple(shape))

    return tensor().as_subclass(Tensor)


@other_memory
def test_memory_for_out(case):
    make, message = OTHER_MEMORY[case]
    with pytest.raises((ValueError, TypeError), match=message):
        flash_attn_func(with_memory(make), tensor(), tensor())


@other_memory
def test_memory_for_gradients(case):
    make, message = OTHER_MEMORY[case]
    q = tensor()
    out, lse = flash_attn_func(q, q, q, return_lse=True)
    with pytest.raises(
        (ValueError, TypeError), match=message.replace("out", "dk").replace("q", "")
    ):
        _C.backward(out, q, with_memory(make), q, out, lse, None)


def test_memory_for_one_gradient_is_not_anothers():
    shared = torch.empty(SHAPE)
    q = with_memory(lambda like, shape: shared)
    out, lse = flash_attn_func(tensor(), tensor(), tensor(), return_lse=True)
    with pytest.raises(ValueError, match="dk overlaps dq"):
        _C.backward(out, q, q, q, out, lse, None)


def test_memory_for_gradients_of_an_empty_problem():
    """They are zeroed by Python, and final."""

    class Tensor(torch.Tensor):
        def new_empty(self, shape, **kwargs):
            return torch.empty(3)

    q = torch.zeros(2, 0, 4, 16).as_subclass(Tensor)
    out, lse = flash_attn_func(torch.zeros(2, 0, 4, 16), tensor(), tensor(), return_lse=True)
    with pytest.raises(ValueError, match="dq must have 4 dimensions, got 1"):
        _C.backward(out, q, tensor(), tensor(), out, lse, None)


@pytest.mark.parametrize("case", ["smaller", "strided", "misaligned", "an input"])
def test_memory_for_the_workspace(case, monkeypatch):
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    q = EMULATOR.place(torch.randn(1, 64, 2, 64).bfloat16())
    k = EMULATOR.place(torch.randn(1, 2048, 2, 64).bfloat16())
    empty = frameworks.empty

    def other(like, shape, *rest):
        if len(shape) != 1:
            return empty(like, shape, *rest)
        (size,) = shape
        if case == "smaller":
            return empty(like, (size - 1,), *rest)
        if case == "strided":
            return empty(like, (2 * size,), *rest)[::2]
        if case == "misaligned":
            return empty(like, (size + 1,), *rest)[1:]
        return k.view(-1).view(torch.float32)[:size]

    monkeypatch.setattr(frameworks, "empty", other)
    with pytest.raises(ValueError, match="the workspace"):
        flash_attn_func(q, k, k, num_splits=4)


# ---- nothing that is borrowed outlives Python code -----------------------------------------------


def free(x):
    x.untyped_storage().resize_(0)


def replace(x):
    x.data = torch.empty_like(x)


CHANGES = {
    "freed": free,
    "replaced": replace,
    "reshaped": lambda x: x.squeeze_(0) if x.shape[0] == 1 else x.transpose_(0, 1),
    "shrunk": lambda x: x.resize_(1, 1, 1, 16),
    "restrided": lambda x: x.as_strided_(x.shape, (0, 0, 0, 1)),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def doing(action, seed=1):
    """A producer that does something before it answers."""

    def answer():
        action()
        return array(seed)

    return Answers(answer)


@changes
def test_producer_changes_an_argument_read_before(change):
    q = tensor().clone()
    with pytest.raises(ValueError, match="q was changed while the call prepared its other tensors"):
        flash_attn_func(q, doing(lambda: change(q)), tensor())


@changes
def test_copy_changes_an_argument(change):
    q = tensor().clone()

    class Tensor(torch.Tensor):
        def clone(self, **kwargs):
            change(q)
            return torch.from_numpy(array(1))

    with pytest.raises(ValueError, match="q was changed"):
        flash_attn_func(q, tensor(), torch.from_numpy(strided()).as_subclass(Tensor))


@changes
def test_allocation_changes_an_argument(change):
    k = tensor().clone()

    def allocate(like, shape):
        change(k)
        return torch.empty(shape)

    with pytest.raises(ValueError, match="k was changed"):
        flash_attn_func(with_memory(allocate), k, tensor())


@pytest.mark.parametrize("kind", [TorchFunctionMode, TorchDispatchMode])
def test_mode_changes_an_argument(kind):
    v = tensor().clone()

    class Mode(kind):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.empty_like, torch.Tensor.new_empty):
                free(v)
            return function(*args, **(kwargs or {}))

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default):
                free(v)
            return function(*args, **(kwargs or {}))

    with Mode(), pytest.raises(ValueError, match="v was changed"):
        _C.forward(tensor(), tensor(), v)


def test_producer_changes_a_result():
    out, lse = torch.empty(SHAPE), np.empty((2, 4, 5), np.float32)

    def answer():
        free(out)
        return lse

    with pytest.raises(ValueError, match="out was changed"):
        flash_attn_func(tensor(), tensor(), tensor(), out=out, lse=Answers(answer))


def test_producer_changes_an_argument_of_the_backward():
    q = tensor()
    out, lse = flash_attn_func(q, q, q, return_lse=True)
    dout = torch.ones(SHAPE)

    def answer():
        free(dout)
        return np.ones((2, 4, 5), np.float32)

    with pytest.raises(ValueError, match="dout was changed"):
        _C.backward(dout, q, q, q, out, lse, Answers(answer))


def test_finalizer_changes_an_argument():
    """Python code that no argument names: an object dies while the call makes its own."""
    q = tensor().clone()

    class Dying:
        def __del__(self):
            free(q)

    def answer():
        cycle = [Dying()]
        cycle.append(cycle)
        del cycle
        gc.collect()
        return array(1)

    with pytest.raises(ValueError, match="q was changed"):
        flash_attn_func(q, Answers(answer), tensor())


@pytest.mark.parametrize(
    "second",
    [
        lambda: array(0, (2, 3, 4, 16)),
        lambda: array(1),
        lambda: array(0).astype(np.float16),
        lambda: (array(0), {"data": None}),
        lambda: (array(0), {"shape": None}),
        lambda: (array(0), {"ndim": 2}),
        lambda: (array(0), {"device_type": 2}),
        lambda: (array(0), {"code": 1}),
        lambda: (array(0), {"strides": None}),
    ],
    ids=["smaller", "elsewhere", "dtype", "data", "shape", "ndim", "device", "code", "same"],
)
def test_exchange_api_with_a_second_answer(request, second):
    fixed, calls = array(0), []

    def answer():
        calls.append(1)
        made = second() if len(calls) > 1 else fixed
        same = isinstance(made, tuple) and made[1] == {"strides": None}
        return (fixed, made[1]) if same else made

    x = exchanged(answer)
    if request.node.callspec.id == "same":
        out, _ = flash_attn_func(x, array(1), array(2))
        np.testing.assert_array_equal(out, flash_attn_func(fixed, array(1), array(2))[0])
        return
    with pytest.raises(ValueError, match="q was changed"):
        flash_attn_func(x, array(1), array(2))


def test_subclasses_that_run_python_are_read_through_capsules():
    """torch may ask their __torch_dispatch__ for sizes: that is no borrowed read."""
    seen = []

    class Tensor(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_dispatch__(function, types, args, kwargs or {})

    out, _ = _C.forward(tensor().as_subclass(Tensor), tensor(1), tensor(2))
    torch.testing.assert_close(out, flash_attn_func(tensor(), tensor(1), tensor(2))[0])
    assert torch.ops.aten.detach.default in seen


# ---- narrowing, and structures without an end ----------------------------------------------------


@pytest.mark.parametrize("arch", [2**32 + 120, 2**63, -(2**31) + 120, 10**30, 0, -1])
def test_arch_is_not_narrowed(arch):
    with pytest.raises(ValueError, match="arch must be a compute capability such as 120, got"):
        explain(tensor(), tensor(), tensor(), arch=arch)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"byte_offset": 2**64 - 16}, "byte offset beyond its address space"),
        ({"strides": (-(2**57), 64, 16, 1)}, "64-bit byte offsets"),
        ({"strides": (64, 64, -(2**57), 1)}, "64-bit byte offsets"),
        ({"ndim": 2**31 - 1}, "4 dimensions, got 2147483647"),
        ({"ndim": -(2**31)}, "4 dimensions, got -2147483648"),
        ({"lanes": 257}, "got float32 in vectors"),
        ({"device_type": 2, "device_id": 2**31 - 1}, "q's device, cuda:2147483647"),
        ({"device_type": 257}, "device type 257"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_fields_beyond_their_range(fields, message):
    made = Capsule(array(), **fields)
    with pytest.raises((ValueError, TypeError), match=message):
        flash_attn_func(made.capsule, tensor(), tensor())
    assert made.deleted == 1


def test_chain_of_exchange_apis_without_an_end():
    with pytest.raises(TypeError, match=r"q must be a tensor .*, got Exchanged"):
        flash_attn_func(exchanged(array, major=2, endless=True), tensor(), tensor())


def test_producer_that_calls_back_is_asked_once_a_level():
    calls = []

    class Recursive:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **kwargs):
            calls.append(kwargs)
            if len(calls) < 12:
                flash_attn_func(self, tensor(), tensor())
            raise TypeError("no max_version, no keywords")

    with pytest.raises(TypeError, match="q cannot be read through DLPack"):
        flash_attn_func(Recursive(), tensor(), tensor())
    assert len(calls) == 12


def test_producer_that_calls_back_without_an_end():
    class Recursive(Producer):
        def __dlpack__(self, **kwargs):
            return flash_attn_func(self, tensor(), tensor())

    with pytest.raises(RecursionError):
        flash_attn_func(Recursive(None), tensor(), tensor())


# ---- exceptions of others ------------------------------------------------------------------------


class Fatal(BaseException):
    pass


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


def meta_raising(error):
    class Meta(type):
        def __getattribute__(cls, name):
            if name.startswith("__dlpack"):
                raise error
            return super().__getattribute__(name)

    return Meta("Odd", (), {})()


class Odd:
    """What a call asks of its arguments, each ready to raise."""

    def __init__(self, error, *which):
        self.error, self.which = error, which

    def at(self, name, otherwise):
        if name in self.which:
            raise self.error
        return otherwise

    def __dlpack_device__(self):
        return self.at("device", (1, 0))

    def __dlpack__(self, **kwargs):
        return self.at("export", 42)

    def __getattr__(self, name):
        return self.at("attribute", None)


class Number:
    def __init__(self, error):
        self.error = error

    def __float__(self):
        raise self.error

    __index__ = __bool__ = __len__ = __float__

    def __getitem__(self, i):
        raise self.error


def cloning(error):
    kind = type("Tensor", (torch.Tensor,), {"clone": raising(error)})
    return torch.from_numpy(strided()).as_subclass(kind)


PLACES = {
    "device": lambda e: {"k": Odd(e, "device")},
    "export": lambda e: {"v": Odd(e, "export")},
    "type": lambda e: {"q": meta_raising(e)},
    "type of a number": lambda e: {"softmax_scale": meta_raising(e)},
    "clone": lambda e: {"q": cloning(e)},
    "allocation": lambda e: {"q": with_memory(raising(e))},
    "sink": lambda e: {"learnable_sink": Odd(e, "export")},
    "out": lambda e: {"out": Odd(e, "device")},
    "lse": lambda e: {"lse": Odd(e, "export")},
    "float": lambda e: {"softmax_scale": Number(e)},
    "softcap": lambda e: {"softcap": Number(e)},
    "index": lambda e: {"num_splits": Number(e)},
    "bool": lambda e: {"causal": Number(e)},
    "length": lambda e: {"window_size": Number(e)},
    "side": lambda e: {"window_size": (Number(e), None)},
}
places = pytest.mark.parametrize("place", PLACES)


def call(**changed):
    arguments = {"q": tensor(), "k": tensor(), "v": tensor()} | changed
    q, k, v = (arguments.pop(name) for name in "qkv")
    return _C.forward(q, k, v, **arguments)


@places
@pytest.mark.parametrize(
    "kind", [KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit, Fatal, RecursionError]
)
def test_exceptions_that_concern_no_argument_pass(place, kind):
    error = kind("pass me on")
    with pytest.raises(kind) as caught:
        call(**PLACES[place](error))
    assert caught.value is error


# The framework's own exception of a copy or an allocation is the best to catch.
@pytest.mark.parametrize("place", [p for p in PLACES if p not in ("clone", "allocation")])
@pytest.mark.parametrize("kind", [ZeroDivisionError, OverflowError, OSError, TypeError, Warning])
def test_other_exceptions_are_the_cause_of_ours(place, kind):
    error = kind("why it failed")
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**PLACES[place](error))
    chain = [caught.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    assert error in chain[1:], chain
    assert len(str(caught.value)) <= 200 and "\n" not in str(caught.value)


def test_a_type_error_of_its_own_is_not_tried_again():
    calls = []

    class Broken(Producer):
        def __dlpack__(self, *, stream=None, max_version=None):
            calls.append(max_version)
            raise TypeError("its own max_version keyword")

    with pytest.raises(TypeError, match="q cannot be read through DLPack: its own"):
        call(q=Broken(None))
    assert calls == [(1, 3)]


def test_producers_without_versions():
    """In Python, by signature; in C, where there is none, by what the error says."""
    made = [Capsule(array(), versioned=False) for _ in range(2)]

    class Old(Producer):
        def __dlpack__(self, stream=None):
            return self.made.capsule

    class InC(Producer):
        __dlpack__ = property(operator.attrgetter("function"))

        def function(self, *args):
            raise AssertionError

    class Function:
        """As a function in C: no signature."""

        __signature__ = "none"

        def __init__(self, made):
            self.made = made

        def __call__(self, **kwargs):
            if kwargs:
                raise TypeError("__dlpack__() takes no keyword arguments")
            return self.made.capsule

    in_c = InC(None)
    in_c.function = Function(made[1])
    out = [call(q=Old(made[0]))[0], call(q=in_c)[0]]
    assert torch.equal(*out) and [x.deleted for x in made] == [1, 1]


# ---- a fuzzer ------------------------------------------------------------------------------------


class Fickle:
    """A producer that changes its answer at every call; what it says of memory is true, or malformed."""

    FIELDS = (
        {"data": None},
        {"shape": None},
        {"strides": None},
        {"ndim": 3},
        {"ndim": -1},
        {"code": 5},
        {"bits": 8},
        {"lanes": 2},
        {"device_type": 2, "device_id": 7},
        {"device_type": 9},
        {"shape": (2, -5, 4, 16)},
        {"strides": (2**61, 2**61, 16, 1)},
        {"byte_offset": 2**64 - 1},
    )

    def __init__(self, rng, shape, others, made, depth):
        self.rng, self.shape, self.others, self.made = rng, shape, others, made
        self.depth = depth

    def array(self):
        rng, shape = self.rng, list(self.shape)
        if rng.random() < 0.2:
            shape[rng.randrange(len(shape))] = rng.choice((0, 1, 3, 16, 40))
        if rng.random() < 0.1:
            shape.pop()
        kind = rng.choice((np.float32,) * 6 + (np.float16, np.float64, np.int32))
        x = np.zeros((*shape[:-1], shape[-1] * 2), kind) if shape else np.zeros(shape, kind)
        layout = rng.randrange(5)
        if shape and layout == 0:
            return x[..., ::2]
        if shape and layout == 1:
            return x[..., : shape[-1]][::-1]
        return np.ascontiguousarray(x[..., : shape[-1]]) if shape else x

    def answer(self):
        rng = self.rng
        if rng.random() < 0.15:
            raise rng.choice((KeyboardInterrupt, ValueError, TypeError, MemoryError, Fatal))("fuzz")
        if rng.random() < 0.15 and self.others:
            rng.choice(tuple(CHANGES.values()))(rng.choice(self.others))
        if rng.random() < 0.1 and self.depth < 3:
            attempt(rng, self.made, self.depth + 1)
        fields = rng.choice(self.FIELDS) if rng.random() < 0.2 else {}
        return self.array(), fields

    def __dlpack_device__(self):
        return self.rng.choice(((1, 0),) * 12 + ((2, 7), (1, 3), (13, -1), (99, 0)))

    def __dlpack__(self, **kwargs):
        array, fields = self.answer()
        if self.rng.random() < 0.05:
            return self.rng.choice((None, 42, array))
        flags = self.rng.choice((0, 0, READ_ONLY, 2**63))
        made = Capsule(array, versioned=self.rng.random() < 0.8, flags=flags, **fields)
        self.made.append(made)
        return made.capsule


class FickleTensor(torch.Tensor):
    """Copies and memory of a torch tensor that is as fickle."""

    def clone(self, **kwargs):
        return self.fickle.rng.choice((self.fickle, torch.from_numpy(self.fickle.answer()[0])))

    def new_empty(self, shape, **kwargs):
        self.fickle.shape = tuple(shape)
        return self.clone()


def argument(rng, shape, others, made, depth):
    fickle = Fickle(rng, shape, others, made, depth)
    kind = rng.randrange(8)
    if kind < 3:
        return fickle
    if kind == 3:
        return np.zeros(shape, np.float32)
    if kind == 4:
        x = torch.zeros(*shape[:-1], shape[-1] * 2)[..., ::2].as_subclass(FickleTensor)
        x.fickle = fickle
        return x
    x = torch.zeros(shape)
    others.append(x)
    return x


def attempt(rng, made, depth=0):
    others = []
    shape, sizes = (2, 5, 4, 16), {"learnable_sink": (4,), "out": (2, 5, 4, 16), "lse": (2, 4, 5)}
    shapes = [shape] * 3
    method = rng.choice((_C.forward, _C.forward, _C.backward, _C.explain))
    options = {"learnable_sink": sizes["learnable_sink"]}
    if method is _C.backward:
        shapes = [shape, *shapes, shape, sizes["lse"], sizes["lse"]]
    elif method is _C.forward:
        options = sizes
    positional = [argument(rng, x, others, made, depth) for x in shapes]
    named = {
        name: argument(rng, x, others, made, depth)
        for name, x in options.items()
        if rng.random() < 0.4
    }
    with contextlib.suppress(Exception, KeyboardInterrupt, Fatal):
        method(*positional, **named)


@pytest.mark.parametrize("seed", range(20))
def test_fickle_producers(seed):
    """Under AddressSanitizer this says whether anything was read, written or freed that should not be."""
    rng, made = random.Random(seed), []
    for _ in range(40):
        attempt(rng, made)
    gc.collect()
    assert [x.deleted for x in made] == [int(x.is_consumed) for x in made]
    assert len(made) > 20


def test_fickle_producers_leak_nothing():
    def run():
        rng = random.Random(7)
        for _ in range(20):
            attempt(rng, [])
        gc.collect()

    run()
    frees = []
    for _ in range(3):
        before = sys.getallocatedblocks()
        run()
        frees.append(sys.getallocatedblocks() - before)
    assert min(frees) < 100, frees
