"""The name flash_attn: the imports and calls of programs that look for it, by modules of our own."""

import importlib.util
import inspect
import math
import sys

import pytest
import torch
from packaging.version import Version

import flash_attn_sm120
from flash_attn_sm120 import fa2
from flash_attn_sm120.fa2 import private
from flash_attn_sm120.fa2.rotary import apply_rotary_emb
from helpers.checks import assert_all_equal
from helpers.children import run_python
from helpers.devices import CPU, CUDA
from helpers.varlen import on

pytestmark = pytest.mark.quick


@pytest.fixture
def alias():
    handle = fa2.install_as_flash_attn()
    yield handle
    handle.remove()


def make(device=CPU, seqlen_q=9, seqlen_k=9, heads=4, dim=16):
    """q, k, v (2, seqlen, heads, dim)."""
    return [
        device.place(torch.randn(2, n, heads, dim).to(device.dtypes[0]))
        for n in (seqlen_q, seqlen_k, seqlen_k)
    ]


# ---- the modules ---------------------------------------------------------------------------------

NAMES = ("", ".flash_attn_interface", ".bert_padding", ".layers", ".layers.rotary")


def test_nothing_is_installed_by_an_import():
    assert not any(name.split(".")[0] == "flash_attn" for name in sys.modules)
    assert importlib.util.find_spec("flash_attn") is None


def test_modules_are_complete(alias):
    for name in NAMES:
        module = importlib.import_module(f"flash_attn{name}")
        spec = importlib.util.find_spec(f"flash_attn{name}")
        assert spec is module.__spec__ and spec.name == module.__name__ == f"flash_attn{name}"
        assert "flash_attn_sm120" in repr(module)
    import flash_attn

    assert flash_attn.layers.rotary.apply_rotary_emb is apply_rotary_emb
    assert flash_attn.flash_attn_func is flash_attn.flash_attn_interface.flash_attn_func
    assert flash_attn.bert_padding.unpad_input is fa2.bert_padding.unpad_input
    assert not hasattr(flash_attn.flash_attn_interface, "flash_attn_gpu")
    # By number in Megatron-LM and Unsloth, by string in HunyuanVideo.
    assert Version("2.7.1") <= Version(flash_attn.__version__) <= Version("2.8.4")
    assert flash_attn.__version__ >= "2.7.0"


@pytest.mark.parametrize("name", ["flash_attn.cute", "flash_attn.ops.triton", "flash_attn_2_cuda"])
def test_what_is_not_given_is_not_found(alias, name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_removal():
    handle = fa2.install_as_flash_attn()
    assert fa2.install_as_flash_attn() is handle
    from flash_attn import flash_attn_func

    handle.remove()
    handle.remove()
    test_nothing_is_installed_by_an_import()
    assert flash_attn_func is fa2.flash_attn_func
    again = fa2.install_as_flash_attn()
    assert again is not handle
    handle.remove()  # not its own
    assert "flash_attn" in sys.modules
    again.remove()


def test_the_real_one_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").write_text("value = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"flash_attn is installed, at .*__init__.py"):
        fa2.install_as_flash_attn()
    module = importlib.import_module("flash_attn")
    try:
        with pytest.raises(RuntimeError, match=r"flash_attn is imported already, from .*__init__"):
            fa2.install_as_flash_attn()
        assert sys.modules["flash_attn"] is module and module.value == 1
    finally:
        del sys.modules["flash_attn"]


def test_transformers_imports_beside_it(tmp_path):
    """It looks for the distribution, too, and says that there is none."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    code = """
from flash_attn_sm120 import fa2
fa2.install_as_flash_attn()
from transformers.utils import is_flash_attn_2_available
import transformers.modeling_utils
assert not is_flash_attn_2_available()
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


# ---- programs ------------------------------------------------------------------------------------


def test_like_wan(alias):
    """No FlashAttention-3; packed sequences by keyword, then a batch again."""
    with pytest.raises(ModuleNotFoundError):
        import flash_attn_interface  # noqa: F401
    import flash_attn

    q, k, v = make(seqlen_k=5)
    lengths_k = torch.tensor([5, 3])
    out = flash_attn.flash_attn_varlen_func(
        q=q.flatten(0, 1),
        k=torch.cat([x[:n] for x, n in zip(k, lengths_k, strict=True)]),
        v=torch.cat([x[:n] for x, n in zip(v, lengths_k, strict=True)]),
        cu_seqlens_q=torch.tensor([0, 9, 9]).cumsum(0, dtype=torch.int32),
        cu_seqlens_k=torch.cat([lengths_k.new_zeros([1]), lengths_k]).cumsum(0, dtype=torch.int32),
        max_seqlen_q=9,
        max_seqlen_k=5,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        deterministic=False,
    ).unflatten(0, (2, 9))
    expected, _ = flash_attn_sm120.flash_attn_varlen_func(
        q, k, v, seqused_k=lengths_k.to(torch.int32)
    )
    assert_all_equal([out], [expected])


def test_like_hunyuan_video(alias):
    """Image and text tokens as two sequences of one sample, and the private forward."""
    import flash_attn
    from flash_attn.flash_attn_interface import _flash_attn_forward, flash_attn_varlen_func

    q, k, v = (x.flatten(0, 1) for x in make())
    ends = torch.tensor([0, 7, 9, 15, 18], dtype=torch.int32)
    out = flash_attn_varlen_func(q, k, v, ends, ends, 9, 9)
    parts = [slice(a, b) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    expected = [fa2.flash_attn_func(q[None, p], k[None, p], v[None, p])[0] for p in parts]
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-6, rtol=0)
    assert flash_attn.__version__ >= "2.7.0"
    q, k, v = make()
    out, *_ = _flash_attn_forward(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=16**-0.5,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    assert_all_equal([out], [fa2.flash_attn_func(q, k, v)])


def test_like_comfyui(alias):
    """An operator of its own around the function, whose result must be one tensor."""
    from flash_attn import flash_attn_func

    @torch.library.custom_op("sm120_test::flash_attn", mutates_args=())
    def operator(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        causal: bool = False,
    ) -> torch.Tensor:
        return flash_attn_func(q, k, v, dropout_p=dropout_p, causal=causal)

    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make(seqlen_k=5))
    assert_all_equal([operator(q, k, v)], [fa2.flash_attn_func(q, k, v)])


def test_like_a_trainer(alias):
    """Causal with a window in training; then decoding into caches that the call appends to."""
    from flash_attn import flash_attn_func, flash_attn_with_kvcache

    q, k, v = (x.requires_grad_() for x in make())
    out = flash_attn_func(q, k, v, causal=True, window_size=(4, 0))
    out.sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, v))
    caches = [torch.zeros(2, 12, 4, 16) for _ in range(2)]
    used = torch.zeros(2, dtype=torch.int32)
    rows = []
    with torch.no_grad():
        for i in range(9):
            new = {"k": k[:, i : i + 1], "v": v[:, i : i + 1], "cache_seqlens": used}
            rows.append(
                flash_attn_with_kvcache(
                    q[:, i : i + 1], *caches, **new, causal=True, window_size=(4, 0)
                )
            )
            used += 1
    torch.testing.assert_close(torch.cat(rows, 1), out.detach(), atol=1e-6, rtol=0)


def arguments_of(function, **given):
    """As ring-flash-attention reads them, so that it works with several versions."""
    spec = inspect.getfullargspec(function)
    defaults = spec.defaults or ()
    found = dict.fromkeys(spec.args[: len(spec.args) - len(defaults)])
    found.update(zip(spec.args[len(spec.args) - len(defaults) :], defaults, strict=True))
    window = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0}
    found.update(window, dropout_p=0.0, softmax_scale=0.25, **given)
    assert found.keys() == set(spec.args)
    return found


def test_like_ring_flash_attention(alias):
    """Blocks of keys, put together by lse, forward and backward, with buffers for the gradients."""
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    q, k, v = (x.requires_grad_() for x in make(seqlen_q=6, seqlen_k=12))
    expected = fa2.flash_attn_func(q, k, v, softmax_scale=0.25)
    dout = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), dout)
    q, k, v = (x.detach() for x in (q, k, v))
    blocks = [slice(0, 6), slice(6, 12)]
    out = lse = None
    for block in blocks:
        given = {"q": q, "k": k[:, block], "v": v[:, block], "causal": False}
        given |= {"alibi_slopes": None, "return_softmax": False}
        results = _flash_attn_forward(**arguments_of(_flash_attn_forward, **given))
        assert len(results) == 4
        block_out, block_lse = results[0], results[1].transpose(1, 2).unsqueeze(-1)
        if out is None:
            out, lse = block_out, block_lse
        else:
            out = out - torch.sigmoid(block_lse - lse) * (out - block_out)
            lse = lse - torch.nn.functional.logsigmoid(lse - block_lse)
    torch.testing.assert_close(out, expected.detach(), atol=1e-6, rtol=0)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    buffers = [torch.empty_like(q), *(torch.empty(2, 8, 4, 16) for _ in range(2))]
    for block in blocks:
        dq, dk, dv = buffers[0], *(x[:, :6] for x in buffers[1:])
        given = {"dout": dout, "q": q, "k": k[:, block], "v": v[:, block], "out": out}
        given |= {"softmax_lse": lse.squeeze(-1).transpose(1, 2).contiguous(), "causal": False}
        given |= {"dq": dq, "dk": dk, "dv": dv, "alibi_slopes": None, "deterministic": False}
        _flash_attn_backward(**arguments_of(_flash_attn_backward, **given, rng_state=None))
        grads[0] += dq
        grads[1][:, block], grads[2][:, block] = dk, dv
    for found, like in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, like, atol=1e-5, rtol=0)


# ---- private functions ---------------------------------------------------------------------------

TAIL = (0.0, 0.25, True, 4, -1, 5.0, None)  # dropout, scale, causal, window, softcap, slopes


@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
def test_private_functions_are_the_public_ones(device):
    """Rows without keys included: their lse is +inf, and they give and get no gradient."""
    q, k, v = (x.requires_grad_() for x in make(device, seqlen_q=12))
    options = {"softmax_scale": 0.25, "causal": True, "window_size": (4, -1), "softcap": 5.0}
    expected, lse, _ = fa2.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    dout = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), dout)
    out, found, mask, state = private._flash_attn_forward(q, k, v, *TAIL, False)
    assert_all_equal((out, found), (expected, lse))
    assert (found[:, :, 0] == math.inf).all() and mask.numel() == 0 and state.shape == (2,)
    assert not out.requires_grad
    inputs = (dout, q, k, v, out, found)
    into = [torch.full_like(x, math.nan) for x in (q, k, v)]
    private._flash_attn_backward(*inputs, *into, *TAIL, True)
    assert_all_equal(into, gradients)

    ends_q, ends_k = on(device, [0, 12, 24]), on(device, [0, 9, 18])
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    packed, found, _, _ = private._flash_attn_varlen_forward(
        *flat, ends_q, ends_k, 12, 9, *TAIL, zero_tensors=True
    )
    assert_all_equal([packed.view_as(out)], [out])
    into = [torch.full_like(x, math.nan) for x in flat]
    inputs = (dout.flatten(0, 1), *flat, packed, found)
    private._flash_attn_varlen_backward(*inputs, *into, ends_q, ends_k, 12, 9, *TAIL, True)
    for x, like in zip(into, gradients, strict=True):
        torch.testing.assert_close(x.view_as(like), like, atol=1e-2, rtol=1e-2)


def test_private_functions_are_followed():
    """As operators they would be: compiled in one graph, the writes of the backward included."""
    q, k, v = make()

    def call(q, k, v):
        out, lse, *_ = private._wrapped_flash_attn_forward(q, k, v, *TAIL, False)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        private._wrapped_flash_attn_backward(out, q, k, v, out, lse, *gradients, *TAIL, False)
        return out, lse, *gradients

    found = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    assert_all_equal(found, call(q, k, v))


def test_private_functions_refuse():
    q, k, v = make()
    with pytest.raises(NotImplementedError, match="do not support dropout_p, alibi_slopes yet"):
        private._flash_attn_forward(q, k, v, 0.1, None, False, -1, -1, 0.0, torch.ones(4), False)
    ends = torch.tensor([0, 9, 18], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="leftpad_k"):
        private._flash_attn_varlen_forward(
            *(x.flatten(0, 1) for x in (q, k, v)), ends, ends, 9, 9, *TAIL, leftpad_k=ends
        )


# ---- rotary embedding ----------------------------------------------------------------------------


def tables(positions, rotary_dim):
    angles = torch.arange(positions)[:, None] / 10 ** torch.linspace(0, 2, rotary_dim // 2)
    return angles.cos(), angles.sin()


def by_complex_numbers(x, cos, sin, positions, interleaved):
    """(rows, heads, head_dim): pairs of dims as complex numbers, turned."""
    half = cos.shape[1]
    turned = x.double().clone()
    pairs = [slice(0, 2 * half, 2), slice(1, 2 * half, 2)]
    if not interleaved:
        pairs = [slice(0, half), slice(half, 2 * half)]
    z = torch.complex(turned[..., pairs[0]], turned[..., pairs[1]])
    z = z * torch.complex(cos.double(), sin.double())[positions][:, None]
    turned[..., pairs[0]], turned[..., pairs[1]] = z.real, z.imag
    return turned.to(x.dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offsets", ["none", "number", "tensor"])
def test_rotary(interleaved, rotary_dim, dtype, offsets):
    x = torch.randn(2, 5, 3, 16).to(dtype)
    cos, sin = (t.to(dtype) for t in tables(32, rotary_dim))
    offset = {"none": 0, "number": 7, "tensor": torch.tensor([3, 20])}[offsets]
    first = offset.tolist() if offsets == "tensor" else [offset] * 2
    expected = torch.stack(
        [
            by_complex_numbers(row, cos, sin, torch.arange(n, n + 5), interleaved)
            for row, n in zip(x, first, strict=True)
        ]
    )
    ends = torch.tensor([0, 5, 5, 10], dtype=torch.int32)
    packed_offset = torch.tensor([first[0], 9, first[1]]) if offsets == "tensor" else offset
    for inplace in (False, True):
        given = x.clone()
        found = apply_rotary_emb(
            given, cos, sin, interleaved=interleaved, inplace=inplace, seqlen_offsets=offset
        )
        assert (found is given) == inplace and (torch.equal(given, x) != inplace)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-2)
        packed = apply_rotary_emb(
            x.flatten(0, 1).clone(), cos, sin, interleaved, inplace, packed_offset, ends, 5
        )
        torch.testing.assert_close(packed.view_as(x), found, atol=0, rtol=0)


def test_rotary_gradients():
    x = torch.randn(1, 3, 2, 8, requires_grad=True)
    cos, sin = tables(3, 6)
    out = apply_rotary_emb(x, cos, sin)
    dout = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, dout)
    torch.testing.assert_close(grad, apply_rotary_emb(dout, cos, -sin))  # it turns back


def test_rotary_is_followed():
    """One graph, with offsets on the host or on the device, packed or not."""
    cos, sin = tables(32, 8)
    ends = torch.tensor([0, 4, 10], dtype=torch.int32)
    compiled = torch.compile(apply_rotary_emb, fullgraph=True, backend="aot_eager")
    for x, options in (
        (torch.randn(2, 5, 3, 16), {"seqlen_offsets": 3}),
        (torch.randn(2, 5, 3, 16), {"seqlen_offsets": torch.tensor([3, 9])}),
        (torch.randn(10, 3, 16), {"cu_seqlens": ends, "max_seqlen": 6}),
    ):
        assert_all_equal(
            [compiled(x, cos, sin, **options)], [apply_rotary_emb(x, cos, sin, **options)]
        )


def test_rotary_without_positions():
    """Known on the host: refused. On the device: rows stay as they are."""
    x = torch.randn(2, 4, 2, 8)
    cos, sin = tables(5, 8)
    with pytest.raises(ValueError, match=r"have 5 positions, x has 2 to 5"):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=2)
    with pytest.raises(ValueError, match="rotary_dim of at most 8"):
        apply_rotary_emb(x, *tables(5, 16))
    with pytest.raises(ValueError, match="3 dimensions"):
        apply_rotary_emb(x, cos, sin, cu_seqlens=torch.tensor([0, 4, 8]))
    found = apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([4, 9]))
    assert torch.equal(found[1], x[1]) and torch.equal(found[0, 1:], x[0, 1:])
    assert not torch.equal(found[0, 0], x[0, 0])
