"""Tensors come in from any DLPack producer, well made or not; none is leaked, none is freed twice."""

import ctypes
import gc
import itertools
import sys

import numpy as np
import pytest
import torch

from emulator import EmulatedTensor, _exported
from emulator.dlpack import Legacy, pointer_in
from flash_attn_sm120 import _C, flash_attn_func
from helpers.capsules import Capsule, Producer
from helpers.devices import EMULATOR
from helpers.reference import attention_reference

pytestmark = pytest.mark.quick

SHAPE = (2, 5, 4, 16)


def array(seed=0, shape=SHAPE, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def expected(q, k, v, **kwargs):
    q, k, v = (torch.from_numpy(np.ascontiguousarray(x)) for x in (q, k, v))
    return attention_reference(q, k, v, **kwargs)[0].numpy()


def attend(q, k=None, v=None, **kwargs):
    k, v = (array(1) if k is None else k), (array(2) if v is None else v)
    return np.asarray(flash_attn_func(q, k, v, **kwargs)[0])


def test_numpy_in_numpy_out():
    q, k, v = array(0), array(1), array(2)
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    assert type(out) is np.ndarray and type(lse) is np.ndarray
    np.testing.assert_allclose(out, expected(q, k, v), rtol=1e-5, atol=1e-6)
    assert lse.shape == (2, 4, 5) and lse.dtype == np.float32


def test_frameworks_may_be_mixed():
    q, k, v = array(0), array(1), array(2)
    out, _ = flash_attn_func(torch.from_numpy(q), k, Producer(Capsule(v)))
    assert type(out) is torch.Tensor
    np.testing.assert_allclose(out.numpy(), expected(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("wrap", [Producer, lambda made: made.capsule], ids=["producer", "bare"])
def test_capsules_are_read_and_given_back_once(versioned, wrap):
    q = array(0)
    made = Capsule(q, versioned=versioned)
    np.testing.assert_allclose(attend(wrap(made)), attend(q), rtol=0)
    assert made.deleted == 1


def test_capsule_without_strides_is_compact():
    made = Capsule(array(0), strides=None)
    np.testing.assert_array_equal(attend(made.capsule), attend(array(0)))


def test_byte_offset_is_honoured():
    store = array(0, (3, *SHAPE[1:]))
    made = Capsule(store[:2], byte_offset=store[0].nbytes)
    np.testing.assert_array_equal(attend(made.capsule), attend(store[1:]))


def test_producer_from_before_versions():
    class Old(Producer):
        def __dlpack__(self, stream=None):
            return self.made.capsule

    made = Capsule(array(0), versioned=False)
    np.testing.assert_array_equal(attend(Old(made)), attend(array(0)))


def test_old_torch_is_read_through_capsules(monkeypatch):
    """PyTorch before 2.10 has no exchange API; a subclass without one stands in for it."""

    class OldTensor(torch.Tensor):
        __dlpack_c_exchange_api__ = None

    q = torch.from_numpy(array(0))
    out, _ = flash_attn_func(q.as_subclass(OldTensor), array(1), array(2))
    np.testing.assert_array_equal(out.numpy(), attend(array(0)))


@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (0, 1, 2, 3), (2, 1, 0, 3)])
def test_any_outer_strides(axes):
    q = np.ascontiguousarray(array(0).transpose(axes)).transpose(np.argsort(axes))
    np.testing.assert_array_equal(attend(q), attend(array(0)))


@pytest.mark.parametrize("make", [torch.from_numpy, np.asarray, lambda x: Producer(Capsule(x))])
@pytest.mark.parametrize("axes", list(itertools.permutations(range(4))))
def test_heads_first(axes, make):
    """Of any strides; where rows are not innermost it is copied."""
    laid = [array(i).transpose(0, 2, 1, 3) for i in range(3)]
    laid = [np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes)) for x in laid]
    out, lse = _C.forward(*map(make, laid), heads_first=True, return_lse=True, causal=True)
    expected = flash_attn_func(array(0), array(1), array(2), return_lse=True, causal=True)
    np.testing.assert_array_equal(np.asarray(out).swapaxes(1, 2), expected[0])
    np.testing.assert_array_equal(np.asarray(lse), expected[1])
    inputs = [out, *map(make, laid), out, lse, None]
    gradients = _C.backward(*inputs, heads_first=True, causal=True)[:3]
    q, k, v = array(0), array(1), array(2)
    plain = _C.backward(expected[0], q, k, v, *expected, None, causal=True)[:3]
    for gradient, reference in zip(gradients, plain, strict=True):
        np.testing.assert_array_equal(np.asarray(gradient).swapaxes(1, 2), reference)
    if make is torch.from_numpy and axes[3] == 3:
        for x in (out, *gradients):
            assert x.stride() == torch.empty_like(make(laid[0])).stride()


def test_heads_first_is_for_dense_tensors():
    q, lengths = array(0), np.array([0, 5], np.int32)
    for method, options in (
        (_C.forward, {"cu_seqlens_q": lengths}),
        (_C.forward, {"page_table": lengths[None]}),
        (_C.cache_forward, {}),
    ):
        with pytest.raises(ValueError, match="heads_first takes neither packed sequences nor"):
            method(q, q, q, heads_first=True, **options)


def test_negative_strides():
    q, k, v = array(0)[:, ::-1], array(1)[::-1], array(2)[:, :, ::-1]
    copies = [np.ascontiguousarray(x) for x in (q, k, v)]
    np.testing.assert_array_equal(attend(q, k, v), attend(*copies))


def test_negative_innermost_stride_is_copied():
    q = array(0)[..., ::-1]
    np.testing.assert_array_equal(attend(q), attend(np.ascontiguousarray(q)))


def test_zero_strides():
    k = np.broadcast_to(array(1)[:1, :, :1], SHAPE)
    np.testing.assert_array_equal(attend(array(0), k), attend(array(0), k.copy()))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_data_is_copied(offset):
    store = np.zeros(array(0).size + offset, np.float32)
    q = store[offset:].reshape(SHAPE)
    q[:] = array(0)
    np.testing.assert_array_equal(attend(q), attend(array(0)))


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("wrap", [Producer, lambda made: made.capsule], ids=["producer", "bare"])
def test_capsules_are_copied_where_they_cannot_be_read_in_place(wrap, versioned):
    store = np.zeros(array(0).size + 1, np.float32)
    misaligned = store[1:].reshape(SHAPE)
    misaligned[:] = array(0)
    strided = np.repeat(array(0), 2, axis=-1)[..., ::2]
    for x in (misaligned, strided):
        made = Capsule(x, versioned=versioned)
        np.testing.assert_array_equal(attend(wrap(made)), attend(array(0)))
        assert made.deleted == 1


def test_read_only_arrays_are_read():
    q = array(0)
    q.flags.writeable = False
    np.testing.assert_array_equal(attend(q), attend(array(0)))


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"code": 2, "bits": 64}, TypeError, "q must be float16, bfloat16 or float32, got float64"),
        ({"code": 0, "bits": 32}, TypeError, "got int32"),
        ({"code": 77}, TypeError, "got unknown32"),
        ({"lanes": 4}, TypeError, "got float32 in vectors"),
        (
            {"device_type": 8},
            ValueError,
            "q must be on the CPU or a CUDA device, got DLPack device type 8",
        ),
        ({"ndim": 3}, ValueError, "q must have 4 dimensions, got 3"),
        ({"ndim": -1}, ValueError, "q must have 4 dimensions, got -1"),
        ({"shape": None}, ValueError, "q has no shape"),
        ({"data": None}, ValueError, "q has no data"),
        ({"shape": (2, -5, 4, 16)}, ValueError, "negative size, -5, in dimension 1"),
        ({"strides": (2**62, 64, 16, 1)}, ValueError, "64-bit byte offsets"),
        ({"strides": (-(2**63), 64, 16, 1)}, ValueError, "64-bit byte offsets"),
        ({"shape": (2**40, 2**40, 4, 16), "strides": None}, ValueError, "64-bit byte offsets"),
        ({"shape": (2**31, 5, 4, 16), "strides": (0, 64, 16, 1)}, ValueError, "at most"),
    ],
)
def test_malformed_struct(fields, error, message):
    made = Capsule(array(0), **fields)
    with pytest.raises(error, match=message):
        attend(Producer(made))
    assert made.deleted == 1
    attend(array(0))  # and the next good call works


@pytest.mark.parametrize(
    "capsule, error, message",
    [
        (lambda: Capsule(array(0), name="used_dltensor"), ValueError, "consumed before"),
        (lambda: Capsule(array(0), name="used_dltensor_versioned"), ValueError, "consumed before"),
        (lambda: Capsule(array(0), name="something"), TypeError, 'one named "something"'),
        (lambda: Capsule(array(0), version=(2, 0)), TypeError, "DLPack 2.0"),
    ],
)
def test_wrong_capsule(capsule, error, message):
    made = capsule()
    with pytest.raises(error, match=message):
        attend(made.capsule)


def test_capsule_is_good_for_one_call():
    made = Capsule(array(0))
    attend(made.capsule)
    with pytest.raises(ValueError, match="consumed before"):
        attend(made.capsule)
    assert made.deleted == 1


def test_one_capsule_cannot_be_two_arguments():
    made = Capsule(array(0))
    with pytest.raises(ValueError, match="k is a DLPack capsule that was consumed before"):
        flash_attn_func(made.capsule, made.capsule, array(2))
    assert made.deleted == 1


def test_exception_of_the_producer_is_told():
    class Broken:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **kwargs):
            raise BufferError("the storage is gone")

    with pytest.raises(TypeError, match="q cannot be read through DLPack: the storage is gone"):
        attend(Broken())


def test_producer_that_returns_no_capsule():
    class Broken(Producer):
        def __dlpack__(self, **kwargs):
            return 42

    with pytest.raises(TypeError, match="must return a capsule"):
        attend(Broken(None))


def test_no_references_are_leaked():
    q, k, v = (torch.from_numpy(array(i)) for i in range(3))
    numpy_q, made = array(0), []

    def call():
        flash_attn_func(q, k, v, return_lse=True)
        flash_attn_func(numpy_q, k, v)
        made.append(Capsule(numpy_q))
        flash_attn_func(Producer(made[-1]), k, v)
        with pytest.raises(ValueError):
            flash_attn_func(q, k, v[:, :, :, :4])

    call()
    made.clear()
    gc.collect()
    before = [sys.getrefcount(x) for x in (q, k, v, numpy_q)]
    for _ in range(50):
        call()
    assert [c.deleted for c in made] == [1] * 50
    made.clear()
    gc.collect()
    after = [sys.getrefcount(x) for x in (q, k, v, numpy_q)]
    assert after == before


@pytest.mark.parametrize("like", [lambda x: x, torch.from_numpy], ids=["numpy", "torch"])
def test_the_backward_leaks_no_references(like):
    """Nor does it where it has to copy, or fails at any of its arguments."""
    q, k, v = (like(array(i)) for i in range(3))
    sink = like(np.ones(q.shape[2], np.float32))
    out, lse = _C.forward(q, k, v, causal=True, learnable_sink=sink, return_lse=True)
    dlse = like(np.ones((*lse.shape[:2], 2 * lse.shape[2]), np.float32))[..., ::2]
    arguments = [out, q, k, v, out, lse, dlse]

    def call(arguments):
        return _C.backward(*arguments, causal=True, learnable_sink=sink, deterministic=True)

    def calls():
        assert all(type(x) is type(q) for x in call(arguments))
        for i in range(len(arguments)):
            with pytest.raises((ValueError, TypeError)):
                call([*arguments[:i], arguments[i][..., :4], *arguments[i + 1 :]])

    calls()
    gc.collect()
    before = [sys.getrefcount(x) for x in (*arguments, sink)]
    for _ in range(20):
        calls()
    gc.collect()
    assert [sys.getrefcount(x) for x in (*arguments, sink)] == before


def test_more_types_than_the_table_of_types_holds():
    """Beyond the table a type is looked up at every call, and stays right."""
    for i in range(40):
        made = Capsule(array(0))
        kind = type(f"Producer{i}", (Producer,), {})
        np.testing.assert_array_equal(attend(kind(made)), attend(array(0)))
        assert made.deleted == 1


# ---- what the emulator's device is made of -------------------------------------------------------


@pytest.fixture
def emulated():
    """A tensor that says it is on the emulated device, a slice of a larger one."""
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    return torch.randn(2, 5, 4, 24).half().as_subclass(EmulatedTensor)[..., 8:]


def test_emulated_tensor_is_on_a_gpu_as_far_as_dlpack_knows(emulated):
    assert emulated.device == torch.device("cpu") and emulated.__dlpack_device__() == (2, 0)
    capsule = emulated.__dlpack__()
    tensor = Legacy.from_address(pointer_in(capsule, b"dltensor")).tensor
    assert (tensor.device_type, tensor.device_id) == (2, 0)
    assert tensor.data + tensor.byte_offset == emulated.data_ptr()
    assert tensor.shape[:4] == [*SHAPE] and tensor.strides[:4] == [*emulated.stride()]


def test_emulated_memory_lives_as_long_as_its_capsule():
    """And so does the right of launches to touch it."""
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    capsule = torch.full((3,), 7.0).as_subclass(EmulatedTensor).__dlpack__()
    gc.collect()
    tensor = Legacy.from_address(pointer_in(capsule, b"dltensor")).tensor
    assert list((ctypes.c_float * 3).from_address(tensor.data)) == [7.0] * 3
    assert len(_exported) == 1
    del tensor, capsule
    assert not _exported


def test_emulated_memory_is_given_back_after_a_call(emulated):
    flash_attn_func(emulated, emulated, emulated)
    assert not _exported
    with pytest.raises(ValueError, match=r"multiple of 8 from 8 to 256, got 4|head_dim"):
        flash_attn_func(emulated, emulated[..., :4], emulated)
    assert not _exported


def test_emulated_outputs_are_nan_and_alone_writable(emulated):
    """With their views: a cache is written to through some."""
    out = emulated.new_empty((2, 3))
    assert out.isnan().all() and out.dtype == torch.float16
    assert out.writable and out.detach().writable
    assert out[:1].writable and not emulated.writable and not emulated[:1].writable
    assert type(emulated.clone()) is type(emulated.transpose(1, 2)) is EmulatedTensor
