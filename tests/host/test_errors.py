"""Bad input gets the error of the design before anything runs, and the next good call works."""

import numpy as np
import pytest
import torch

from flash_attn_sm120 import _C, explain, flash_attn_func
from helpers.capsules import Producer
from helpers.children import run_python
from helpers.devices import CPU

pytestmark = pytest.mark.quick


def qkv(
    device=CPU, dtype=torch.float16, batch=1, seqlen_q=4, seqlen_k=4, heads=(4, 2), dims=(16, 16)
):
    def make(*shape):
        return device.place(torch.randn(*shape, dtype=torch.float32).to(dtype))

    return (
        make(batch, seqlen_q, heads[0], dims[0]),
        make(batch, seqlen_k, heads[1], dims[0]),
        make(batch, seqlen_k, heads[1], dims[1]),
    )


@pytest.fixture(autouse=True)
def next_good_call_works(request):
    """Whatever a test did, a good call afterwards is right."""
    device = request.getfixturevalue("device") if "device" in request.fixturenames else CPU
    yield
    q, k, v = qkv(device)
    out, _ = flash_attn_func(q, k, v[:, :1].expand_as(v))
    torch.testing.assert_close(
        out, v[:, :1].repeat_interleave(2, 2).expand_as(out), atol=1e-3, rtol=1e-3
    )


def replaced(position, value):
    return lambda q, k, v: [value if i == position else x for i, x in enumerate((q, k, v))]


BAD_TENSORS = {
    "None": (replaced(0, None), TypeError, "q must be a tensor .*, got NoneType"),
    "list": (replaced(1, [1.0]), TypeError, "k must be a tensor .*, got list"),
    "string": (replaced(2, "v"), TypeError, "v must be a tensor .*, got str"),
    "type": (replaced(0, torch.Tensor), TypeError, "q"),
    "numpy strings": (replaced(1, np.array(["a"])), TypeError, "k cannot be read through DLPack"),
    "numpy objects": (replaced(1, np.array([None])), TypeError, "k cannot be read through DLPack"),
    "rank 3": (lambda q, k, v: (q[0], k, v), ValueError, "q must have 4 dimensions, got 3"),
    "rank 5": (lambda q, k, v: (q, k[None], v), ValueError, "k must have 4 dimensions, got 5"),
    "rank 0": (lambda q, k, v: (q, k, v.sum()), ValueError, "v must have 4 dimensions, got 0"),
    "fp64": (lambda q, k, v: (q.double(), k, v), TypeError, "q must be float16, .*, got float64"),
    "int": (lambda q, k, v: (q, k.int(), v), TypeError, "k must be float16, .*, got int32"),
    "bool": (lambda q, k, v: (q, k, v.bool()), TypeError, "v must be float16, .*, got bool8"),
    "complex": (lambda q, k, v: (q.to(torch.complex64), k, v), TypeError, "got complex64"),
    "e5m2": (lambda q, k, v: (q.to(torch.float8_e5m2), k, v), NotImplementedError, "q is float8_e5m2, which is not supported yet"),
    "e4m3 alone": (lambda q, k, v: (q.to(torch.float8_e4m3fn), k, v), TypeError, "k must be float8_e4m3fn like q, got float16"),
    "mixed dtypes": (lambda q, k, v: (q, k.bfloat16(), v), TypeError, "k must be float16 like q, got bfloat16"),
    "head counts": (lambda q, k, v: (q[:, :, :3], k, v), ValueError, "multiple of the heads of k and v, got 3 and 2"),
    "no heads": (lambda q, k, v: (q[:, :, :0], k, v), ValueError, "got 0 and 2"),
    "no kv heads": (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), ValueError, "got 4 and 0"),
    "k and v heads": (lambda q, k, v: (q, k, v[:, :, :1]), ValueError, "v must have k's heads 2 in dimension 2, got 1"),
    "k and v seqlen": (lambda q, k, v: (q, k, v[:, :3]), ValueError, "v must have k's seqlen 4 in dimension 1, got 3"),
    "batch": (lambda q, k, v: (q, k.expand(2, -1, -1, -1), v), ValueError, "k must have q's batch 1 .*, got 2"),
    "head_dim of k": (lambda q, k, v: (q, k[..., :8], v), ValueError, "k must have q's head_dim 16 .*, got 8"),
    "head_dim 12": (lambda q, k, v: (q[..., :12], k[..., :12], v), ValueError, "multiple of 8 from 8 to 256, got 12"),
    "head_dim 0": (lambda q, k, v: (q[..., :0], k[..., :0], v), ValueError, "multiple of 8 from 8 to 256, got 0"),
    "head_dim_v 4": (lambda q, k, v: (q, k, v[..., :4]), ValueError, "head_dim_v .* multiple of 8 .*, got 4"),
    "head_dim 264": (
        lambda q, k, v: (q.repeat(1, 1, 1, 17)[..., :264], k.repeat(1, 1, 1, 17)[..., :264], v),
        ValueError,
        "multiple of 8 from 8 to 256, got 264",
    ),
    "sparse": (lambda q, k, v: (torch.zeros(q.shape, dtype=q.dtype, device=q.device).to_sparse(), k, v), TypeError, r"q is of layout torch.sparse_coo: pass q.to_dense\(\)"),
    "meta": (lambda q, k, v: (q.to("meta"), k, v), ValueError, "k must be on q's device, meta, got cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(device, case):
    make, error, message = BAD_TENSORS[case]
    with pytest.raises(error, match=message):
        flash_attn_func(*make(*qkv(device)))


# ---- tensors without memory, and arrays that are more than their numbers -------------------------


def fake(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


def freed(x):
    """As FSDP leaves a parameter between two uses."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def two(x):
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(x, x)


class Distributed(torch.Tensor):
    """What a DTensor is to a reader of memory, without processes."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    def to_local(self):
        raise AssertionError("nothing is gathered behind the caller's back")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return args[0] if function is torch.ops.aten.detach.default else NotImplemented


class Quantity(np.ndarray):
    """An array with units, as of astropy."""

    def __array_ufunc__(self, *args, **kwargs):
        return NotImplemented


class Bfloat16(np.ndarray):
    """An array of ml_dtypes.bfloat16, as far as numpy's DLPack knows."""

    name = "bfloat16"

    @property
    def dtype(self):
        return type("dtype", (), {"name": self.name})


class Float8(Bfloat16):
    name = "float8_e4m3fn"


def as_subclass(kind):
    return lambda x: np.zeros(x.shape, "V2").view(kind)


def verbose(x):
    """An error as C++ makes them: frames, far beyond the first line."""

    class Verbose(Producer):
        def __dlpack__(self, **kwargs):
            raise RuntimeError("no way\nException raised from here\n" + "frame #0: at\n" * 99)

    return Verbose(None)


def long_name(x):
    return type("T" * 44_000, (), {})()


WITHOUT_MEMORY = {
    "FakeTensor": (fake, TypeError, r"q is a torch.Tensor \(FakeTensor\) without memory of its own"),
    "TwoTensor": (two, TypeError, r"q is a torch.Tensor \(TwoTensor\) without memory of its own"),
    "DTensor": (Distributed, TypeError, r"q is a Distributed, .*: pass q.to_local\(\) or .full_tensor\(\)"),
    "functional": (torch._to_functional_tensor, TypeError, r"q is a torch.Tensor \(Tensor\) without memory"),
    "vmap": (lambda x: torch._C._functorch._add_batch_dim(x[None], 0, 1), TypeError, "q is wrapped by a transform of torch.func"),
    "meta": (lambda x: x.to("meta"), TypeError, "q is on the meta device, which has no data"),
    "freed": (freed, ValueError, "q has no data: its storage was freed, as FSDP"),
    "freed parameter": (lambda x: torch.nn.Parameter(freed(x), False), ValueError, "its storage was freed"),
    "lazy zeros": (lambda x: torch._efficientzerotensor(x.shape), TypeError, r"q is zeros without memory.*: pass q.clone\(\)"),
    "sparse": (lambda x: x.to_sparse(), TypeError, r"of layout torch.sparse_coo: pass q.to_dense\(\)"),
    "mkldnn": (lambda x: x.float().to_mkldnn(), TypeError, r"of layout torch._mkldnn: pass q.to_dense\(\)"),
    "nested": (lambda x: torch.nested.nested_tensor([x[0]], layout=torch.jagged), TypeError, "q is a nested tensor: pass"),
    "masked array": (lambda x: np.ma.array(x.numpy(), mask=True), TypeError, "q is a numpy.ma.MaskedArray, whose mask would be ignored"),
    "quantity": (lambda x: x.numpy().view(Quantity), TypeError, "q is a Quantity, a numpy.ndarray with arithmetic of its own"),
    "ml_dtypes bfloat16": (as_subclass(Bfloat16), TypeError, "q is bfloat16 of ml_dtypes, .* pass torch.from_numpy"),
    "ml_dtypes float8": (as_subclass(Float8), NotImplementedError, "q is float8_e4m3fn, which is not supported yet"),
    "big endian": (lambda x: x.numpy().astype(">f2"), TypeError, "only supports native byte order"),
    "C++ frames": (verbose, TypeError, "q cannot be read through DLPack: no way$"),
    "long name": (long_name, TypeError, r"q must be a tensor .*, got TTT.*TTT\.\.\.$"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WITHOUT_MEMORY)
def test_what_cannot_be_read_is_called_what_it_is(case):
    make, error, message = WITHOUT_MEMORY[case]
    q, k, v = qkv()
    with pytest.raises(error, match=message) as caught:
        _C.forward(make(q), k, v)
    assert type(caught.value) is error
    assert len(str(caught.value)) <= 200 and "\n" not in str(caught.value)


def test_real_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.zeros((1, 4, 2, 16), ml_dtypes.bfloat16)
    with pytest.raises(TypeError, match="q is bfloat16 of ml_dtypes"):
        flash_attn_func(x, x, x)


def test_numpy_subclasses_that_are_their_numbers_are_read(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(1, 4, 2, 16))
    x[:] = 1
    assert (flash_attn_func(x, x, x.view(type("Array", (np.ndarray,), {})))[0] == 1).all()


BAD_SCALARS = {
    "scale nan": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite in float32, got nan"),
    "scale inf": ({"softmax_scale": float("inf")}, ValueError, "softmax_scale must be finite in float32, got inf"),
    "scale beyond fp32": ({"softmax_scale": 1e300}, ValueError, "softmax_scale must be finite"),
    "scale string": ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number, got '1'"),
    "softcap negative": ({"softcap": -1.0}, ValueError, "softcap must be 0 .none. or positive, got -1.0"),
    "softcap nan": ({"softcap": float("nan")}, ValueError, "softcap must be finite"),
    "window int": ({"window_size": 3}, TypeError, r"window_size must be \(left, right\), got"),
    "window triple": ({"window_size": (1, 2, 3)}, TypeError, r"window_size must be \(left, right\), got"),
    "window float": ({"window_size": (1.5, None)}, TypeError, r"window_size must be \(left, right\) of integers or None, got 1.5"),
    "pack_gqa": ({"pack_gqa": 1}, TypeError, "pack_gqa must be True, False or None, got 1"),
    "sink rank": ({"learnable_sink": torch.zeros(1, 4)}, ValueError, "learnable_sink must have 1 dimension, got 2"),
    "sink size": ({"learnable_sink": torch.zeros(3)}, ValueError, "learnable_sink must have q's heads 4 .*, got 3"),
    "sink dtype": ({"learnable_sink": torch.zeros(4).int()}, TypeError, "learnable_sink must be float16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SCALARS)
def test_bad_scalars(device, case):
    arguments, error, message = BAD_SCALARS[case]
    arguments = {
        k: device.place(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    with pytest.raises(error, match=message):
        flash_attn_func(*qkv(device), **arguments)


@pytest.mark.parametrize(
    "name, value",
    [
        ("qv", torch.zeros(1)),
        ("gather_kv_indices", torch.zeros(1)),
        ("score_mod_bwd", lambda *a: a[0]),
        ("aux_scalars", [1.0]),
        ("block_sparse_tensors_bwd", ()),
    ],
)
def test_features_to_come_are_named(name, value):
    with pytest.raises(NotImplementedError, match=name):
        flash_attn_func(*qkv(), **{name: value})


def test_float32_is_for_the_cpu_alone():
    with pytest.raises(NotImplementedError, match="float32 is supported on the CPU alone"):
        explain(*qkv(dtype=torch.float32), arch=120)


def test_too_old_a_device():
    with pytest.raises(NotImplementedError, match=r"before compute capability 8\.0"):
        explain(*qkv(), arch=75)


def backward(device=CPU, **changed):
    """The extension's backward of a small call, with some of its arguments changed."""
    q, k, v = qkv(device, dims=(16, 24))
    out, lse = _C.forward(q, k, v, return_lse=True)
    arguments = {"dout": out, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": None}
    changes = {name: change(arguments[name]) for name, change in changed.items()}
    return _C.backward(*(arguments | changes).values())


BAD_GRADIENTS = {
    "dout None": ("dout", lambda x: None, TypeError, "dout must be a tensor .*, got NoneType"),
    "dout rank": ("dout", lambda x: x[0], ValueError, "dout must have 4 dimensions, got 3"),
    "dout dtype": ("dout", lambda x: x.bfloat16(), TypeError, "dout must be float16 like q, got bfloat16"),
    "dout batch": ("dout", lambda x: x.expand(2, -1, -1, -1), ValueError, "dout must have q's batch 1 in dimension 0, got 2"),
    "dout seqlen": ("dout", lambda x: x[:, :3], ValueError, "dout must have q's seqlen 4 in dimension 1, got 3"),
    "dout heads": ("dout", lambda x: x[:, :, :2], ValueError, "dout must have q's heads 4 in dimension 2, got 2"),
    "dout head_dim": ("dout", lambda x: x[..., :16], ValueError, "dout must have v's head_dim 24 in dimension 3, got 16"),
    "out dtype": ("out", lambda x: x.float(), TypeError, "out must be float16 like q, got float32"),
    "out shape": ("out", lambda x: x.transpose(1, 3), ValueError, "out must have q's seqlen 4 in dimension 1, got 24"),
    "lse None": ("lse", lambda x: None, TypeError, "lse must be a tensor .*, got NoneType"),
    "lse rank": ("lse", lambda x: x[..., None], ValueError, "lse must have 3 dimensions, got 4"),
    "lse dtype": ("lse", lambda x: x.half(), TypeError, "lse must be float32, got float16"),
    "lse batch": ("lse", lambda x: x[:0], ValueError, "lse must have q's batch 1 in dimension 0, got 0"),
    "lse heads": ("lse", lambda x: x[:, :3], ValueError, "lse must have q's heads 4 in dimension 1, got 3"),
    "lse seqlen": ("lse", lambda x: x[..., :3], ValueError, "lse must have q's seqlen 4 in dimension 2, got 3"),
    "dlse": ("dlse", lambda x: torch.zeros(1, 4, 5), ValueError, "dlse must have q's seqlen 4 in dimension 2, got 5"),
    "dlse dtype": ("dlse", lambda x: torch.zeros(1, 4, 4).double(), TypeError, "dlse must be float16, .*, got float64"),
    "q": ("q", lambda x: x[..., :8], ValueError, "k must have q's head_dim 8 .*, got 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_bad_gradients(device, case):
    name, change, error, message = BAD_GRADIENTS[case]

    def changed(x):
        x = change(x)
        return device.place(x) if isinstance(x, torch.Tensor) else x

    with pytest.raises(error, match=message):
        backward(device, **{name: changed})
    assert all(x.isfinite().all() for x in backward()[:3])


def test_gradients_must_be_on_the_device(device):
    if device == CPU:
        pytest.skip("the CPU is one device")
    for name in ("dout", "lse"):
        with pytest.raises(ValueError, match=f"{name} must be on q's device, cuda:0, got cpu:0"):
            backward(device, **{name: lambda x: x.cpu().as_subclass(torch.Tensor)})


def test_devices_must_agree(device):
    if device == CPU:
        pytest.skip("the CPU is one device")
    q, k, v = qkv(device)
    with pytest.raises(ValueError, match="k must be on q's device, cuda:0, got cpu:0"):
        flash_attn_func(q, qkv(CPU)[1], v)
    with pytest.raises(ValueError, match="learnable_sink must be on q's device"):
        flash_attn_func(q, k, v, learnable_sink=torch.zeros(4))


@pytest.mark.parametrize(
    ("variable", "known"),
    [
        ("FA_SM120_LIMITS", "120"),
        ("FA_SM120_PLAN_AS", "120|120-geforce|120-pro"),
        ("FA_SM120_TENSOR_REPEAT", "1|2|4"),
        ("FA_SM120_CHECK", "1"),
    ],
)
def test_unknown_environment_value(variable, known, tmp_path):
    """The error names the variable; put right, the next call works in the same process."""
    code = f"""
import os, torch
from flash_attn_sm120 import explain
q = torch.zeros(1, 4, 1, 64, dtype=torch.float16)
try:
    explain(q, q, q, arch=120)
except ValueError as error:
    print(error)
os.environ["{variable}"] = "{known.split("|")[0]}"
print(explain(q, q, q, arch=120).tile_m)
"""
    done = run_python(code, tmp_path, **{variable: "sm_120"})
    assert done.stdout.splitlines() == [
        f'{variable} must be {known} or unset, got "sm_120"',
        "64",
    ], done.stderr


def test_function_arguments_are_counted():
    with pytest.raises(TypeError, match=r"forward\(\) takes 3 to \d+ positional arguments, got 2"):
        _C.forward(1, 2)
    with pytest.raises(TypeError, match=r"backward\(\) takes 7 to \d+ positional arguments, got 1"):
        _C.backward(1)
    with pytest.raises(TypeError, match=r"explain\(\) takes 3 to \d+ positional arguments, got 0"):
        _C.explain()
