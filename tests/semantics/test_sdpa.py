"""The door into torch's attention: torch's operators, computed here.

torch has no FlashAttention for the CPU: there the operators are ours alone, and torch's dispatcher,
its autograd and its shapes without data meet them as they do on CUDA.
"""

import inspect
import math
import warnings
from collections import Counter

import pytest
import torch
from torch.nn import attention as registry
from torch.nn import functional as F
from torch.nn.attention import varlen

from flash_attn_sm120 import aten, flash_attn_func, flash_attn_varlen_func, sdpa
from helpers.checks import assert_all_equal
from helpers.children import run_python
from helpers.devices import CPU, CUDA, params_of

SDPA = "_scaled_dot_product_flash_attention"
FLASH = "_flash_attention_forward"
EFFICIENT = "_scaled_dot_product_efficient_attention"
ATEN = torch.ops.aten

needs_registry = pytest.mark.skipif(
    not hasattr(registry, "restore_flash_attention_impl"), reason="PyTorch before 2.11"
)


@pytest.fixture(params=params_of(CPU, CUDA))
def device(request):
    return request.param


@pytest.fixture
def door(device):
    """Open; torch's operators are ours."""
    handle = sdpa.activate() if device is CUDA else sdpa.override("CPU")
    yield handle
    handle.remove()


@pytest.fixture
def counted():
    """counted() -> what has been counted since the last call of it: taken, left."""
    before = sdpa.stats()

    def since():
        nonlocal before
        now, last = sdpa.stats(), before
        before = now
        return [dict(Counter(x) - Counter(y)) for x, y in zip(now, last, strict=True)]

    return since


@pytest.fixture
def tensors(device):
    """tensors(...) -> query, key, value (batch, heads, seqlen, head_dim), as leaves of a graph."""

    def make(seqlen_q=5, seqlen_k=7, heads=4, heads_kv=2, head_dim=16, *, layout="BHSD"):
        shapes = [(2, heads, seqlen_q, head_dim), *[(2, heads_kv, seqlen_k, head_dim)] * 2]
        made = [torch.randn(shape).to(device.torch_device, device.dtypes[0]) for shape in shapes]
        return [LAYOUTS[layout](x).requires_grad_() for x in made]

    return make


def _slice_of_more(x):
    """(batch, heads, seqlen, head_dim) of a projection to q, k and v together."""
    packed = torch.stack([x.transpose(1, 2)] * 3, dim=2)
    return packed[:, :, 1].detach().transpose(1, 2)


LAYOUTS = {
    "BHSD": torch.Tensor.contiguous,
    "BSHD": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "SBHD": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "sliced": _slice_of_more,
}


def directly(query, key, value, **options):
    """The same call of our own function, in torch's layout."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = flash_attn_func(q, k, v, return_lse=True, **options)
    return out.transpose(1, 2), lse


def gradients(out, inputs):
    """Of a sum with weights, reproducibly."""
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    with deterministic():
        return torch.autograd.grad(out, inputs, weights)


class deterministic:
    def __enter__(self):
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(self.before)


def packed(device, lengths, heads=4, head_dim=16, *, extra=0):
    """A tensor of packed sequences, and where they begin."""
    rows = sum(lengths) + extra
    x = torch.randn(rows, heads, head_dim).to(device.torch_device, device.dtypes[0])
    begins = torch.tensor([0, *lengths]).cumsum(0).to(device.torch_device, torch.int32)
    return x.requires_grad_(), begins


# ---- what torch expects of its operators ---------------------------------------------------------


@pytest.mark.parametrize("name", aten.OPERATORS)
def test_signatures_are_those_of_torch(name):
    """An argument that a newer PyTorch adds fails here; older ones may lack the last few."""
    if not hasattr(ATEN, name):
        pytest.skip("this PyTorch does not have the operator")
    theirs = getattr(ATEN, name).default._schema.arguments
    ours = inspect.signature(aten.OPERATORS[name]).parameters
    assert [x.name for x in theirs] == list(ours)[: len(theirs)]
    for argument in theirs:
        parameter = ours[argument.name]
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only
        assert (parameter.default is not parameter.empty) == argument.has_default_value()
        assert not argument.has_default_value() or parameter.default == argument.default_value
    for added in list(ours.values())[len(theirs) :]:
        assert added.default is None


def assert_as_without_data(operator, *args, **kwargs):
    """Sizes, strides and types are those that torch's own kernel for meta tensors tells; returns what is real."""
    on_meta = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: x.to("meta"), (args, kwargs)
    )
    told = torch.utils._pytree.tree_leaves(operator(*on_meta[0], **on_meta[1]))
    real = operator(*args, **kwargs)
    for x, y in zip(torch.utils._pytree.tree_leaves(real), told, strict=True):
        assert type(x) is type(y)
        if isinstance(x, torch.Tensor):
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        else:
            assert x == y
    return real


@pytest.mark.parametrize("layout", LAYOUTS)
def test_returns_are_those_of_torch(device, door, tensors, layout):
    q, k, v = (x.detach() for x in tensors(layout=layout))
    with torch.no_grad():
        out, lse, *rest = assert_as_without_data(ATEN._scaled_dot_product_flash_attention, q, k, v)
        backward = ATEN._scaled_dot_product_flash_attention_backward
        arguments = (*rest[:4], 0.0, False, *rest[4:6])
        dout = torch.randn_like(out)
        assert_as_without_data(backward, dout, q, k, v, out, lse, *arguments)

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        arguments = (None, None, q.shape[1], k.shape[1], 0.0, True)
        out, lse, *rest = assert_as_without_data(
            ATEN._flash_attention_forward, q, k, v, *arguments, False
        )
        dout = torch.randn_like(out)
        backward = ATEN._flash_attention_backward
        assert_as_without_data(backward, dout, q, k, v, out, lse, *arguments, *rest[:2])


def test_returns_of_packed_sequences_are_those_of_torch(device, door):
    q, begins_q = packed(device, [3, 0, 4])
    k, begins_k = packed(device, [5, 2, 4], heads=2)
    arguments = (begins_q, begins_k, 4, 5, 0.0, False)
    with torch.no_grad():
        out, lse, *rest = assert_as_without_data(
            ATEN._flash_attention_forward, q, k, k, *arguments, False
        )
        backward = ATEN._flash_attention_backward
        assert_as_without_data(backward, out, q, k, k, out, lse, *arguments, *rest[:2])


# ---- what is computed ----------------------------------------------------------------------------


@pytest.mark.quick("cpu-True-BSHD")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_results_and_gradients_are_ours(door, tensors, counted, layout, causal):
    q, k, v = tensors(layout=layout)
    out, lse, *_ = ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=0.3)
    expected, expected_lse = directly(q, k, v, causal=causal, softmax_scale=0.3)
    assert_all_equal([out, lse], [expected, expected_lse])
    assert_all_equal(gradients(out, (q, k, v)), gradients(expected, (q, k, v)))
    assert counted() == [{SDPA: 1, f"{SDPA}_backward": 1}, {}]


def as_torch_has_it(mask):
    """(2, 4, 5, 7), expanded, and in rows of multiples of 16 elements."""
    padded = F.pad(mask, (0, 16 - mask.shape[-1]))[..., : mask.shape[-1]]
    return padded.expand(2, 4, 5, 7)


@pytest.mark.quick("*True*None*")
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 4, 5, 7), (1, 1, 1, 7), None], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_calls_with_a_mask_are_ours(door, tensors, counted, shape, causal):
    q, k, v = inputs = tensors(heads_kv=4)
    bias = expected_bias = None
    if shape:
        mask = torch.randn(shape).to(q).detach().requires_grad_()
        bias, expected_bias = as_torch_has_it(mask), mask
        inputs = (*inputs, mask)
    out, lse, *_ = ATEN._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, causal, scale=0.3
    )
    window = (None, -2) if causal else None  # top left
    expected, expected_lse = directly(
        q, k, v, attn_bias=expected_bias, window_size=window, softmax_scale=0.3
    )
    assert lse.shape == (2, 4, 32)
    assert_all_equal([out, lse[..., :5]], [expected, expected_lse])
    if shape and shape != (2, 4, 5, 7):  # the sums are torch's
        pairs = zip(gradients(out, inputs), gradients(expected, inputs), strict=True)
        for x, y in pairs:
            rounding = {} if x.dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
            torch.testing.assert_close(x, y, **rounding)
    else:
        assert_all_equal(gradients(out, inputs), gradients(expected, inputs))
    assert counted() == [{EFFICIENT: 1, f"{EFFICIENT}_backward": 1}, {}]
    with torch.no_grad():
        given = None if bias is None else bias.detach()
        q, k, v = (x.detach() for x in (q, k, v))
        arguments = (q, k, v, given)
        for with_lse in (False, True):
            operator = ATEN._scaled_dot_product_efficient_attention
            out, *rest = assert_as_without_data(operator, *arguments, with_lse, 0.0, causal)
        wanted = [True, True, True, bias is not None]
        arguments = (*arguments, out, *rest, 0.0, wanted, causal)
        operator = ATEN._scaled_dot_product_efficient_attention_backward
        dout = torch.randn_like(out)
        if given is not None:
            assert_as_without_data(operator, dout, *arguments)


def test_dropout_of_calls_with_a_mask(door, tensors):
    q, k, v = tensors(heads_kv=4)
    bias = torch.randn(2, 4, 5, 7).to(q).detach()
    torch.manual_seed(0)
    out, _, *drawn = ATEN._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.3)
    options = {"dropout_p": 0.3, "dropout_seed": torch.stack(drawn)}
    expected, _ = directly(q, k, v, attn_bias=bias, **options)
    assert_all_equal([out], [expected])
    assert_all_equal(gradients(out, (q, k, v)), gradients(expected, (q, k, v)))


@pytest.mark.parametrize("window", [(None, None), (-1, -1), (2, 1), (-1, 0), (3, 0)])
def test_packed_sequences_are_ours(device, door, counted, window):
    q, begins_q = packed(device, [3, 0, 4])
    k, begins_k = packed(device, [5, 2, 4], heads=2)
    v, _ = packed(device, [5, 2, 4], heads=2)
    causal = window == (-1, 0)
    arguments = (begins_q, begins_k, 4, 5, 0.0, causal, False)
    left, right = window
    out, lse, *_ = ATEN._flash_attention_forward(
        q, k, v, *arguments, scale=0.3, window_size_left=left, window_size_right=right
    )
    options = {"cu_seqlens_q": begins_q, "cu_seqlens_k": begins_k, "softmax_scale": 0.3}
    ours = tuple(None if x == -1 else x for x in window)
    expected, expected_lse = flash_attn_varlen_func(
        q, k, v, causal=causal, window_size=ours, return_lse=True, **options
    )
    assert_all_equal([out, lse], [expected, expected_lse])
    assert_all_equal(gradients(out, (q, k, v)), gradients(expected, (q, k, v)))
    assert counted() == [{FLASH: 1, "_flash_attention_backward": 1}, {}]


@pytest.mark.parametrize("splits", [None, 1])
def test_only_the_first_keys_are_used_where_torch_says_so(device, door, splits):
    q, begins_q = packed(device, [1, 2])
    k, begins_k = packed(device, [5, 4])
    used = torch.tensor([3, 4], dtype=torch.int32, device=q.device)
    if "num_splits" not in str(ATEN._flash_attention_forward.default._schema):
        pytest.skip("this PyTorch has no num_splits")
    with torch.no_grad():
        out, *_ = ATEN._flash_attention_forward(
            *(q, k, k, begins_q, begins_k, 2, 5, 0.0, True, False),
            seqused_k=used,
            num_splits=splits,
        )
        options = {"cu_seqlens_q": begins_q, "cu_seqlens_k": begins_k, "seqused_k": used}
        expected, _ = flash_attn_varlen_func(q, k, k, causal=True, **options)
    assert_all_equal([out], [expected])


def test_keys_in_pages(device, door, counted):
    """Whether or not torch says also where packed keys begin, of which there are none."""
    if "block_table" not in str(ATEN._flash_attention_forward.default._schema):
        pytest.skip("this PyTorch has no block_table")
    q, begins = packed(device, [1, 2])
    pages, _ = packed(device, [6 * 16], heads=2)
    pages = pages.view(6, 16, 2, 16)
    table = torch.tensor([[4, 0], [5, 2]], dtype=torch.int32, device=q.device)
    used = torch.tensor([20, 7], dtype=torch.int32, device=q.device)
    options = {"seqused_k": used, "block_table": table, "enable_gqa": True}
    with torch.no_grad():
        outs = [
            varlen.varlen_attn(q, pages, pages, begins, x, 2, 32, window_size=(-1, 0), **options)
            for x in (None, begins)
        ]
        expected, _ = flash_attn_varlen_func(
            *(q, pages, pages), cu_seqlens_q=begins, seqused_k=used, page_table=table, causal=True
        )
    assert_all_equal(outs, [expected, expected])
    assert counted() == [{FLASH: 2}, {}]


def test_output_in_place(device, door, counted):
    name = f"{FLASH}_no_dropout_inplace"
    if not hasattr(ATEN, name):
        pytest.skip("this PyTorch does not have the operator")
    q, begins = packed(device, [3, 4])
    out = torch.empty_like(q).detach()
    version = out._version
    with torch.no_grad():
        arguments = (q, q, q, begins, begins, 4, 4, 0.0, True, False)
        lse = getattr(ATEN, name)(out, *arguments)
        expected, expected_lse, *_ = ATEN._flash_attention_forward(*arguments)
    assert_all_equal([out, lse], [expected, expected_lse])
    assert out._version > version
    assert counted() == [{name: 1, FLASH: 1}, {}]


def test_varlen_attn(device, door, counted):
    if "window_size" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("this PyTorch has no window_size there")
    q, begins_q = packed(device, [3, 0, 4])
    k, begins_k = packed(device, [5, 2, 4])
    out = varlen.varlen_attn(q, k, k, begins_q, begins_k, 4, 5, window_size=(-1, 0))
    options = {"cu_seqlens_q": begins_q, "cu_seqlens_k": begins_k}
    expected, _ = flash_attn_varlen_func(q, k, k, causal=True, **options)
    assert_all_equal([out], [expected])
    assert_all_equal(gradients(out, (q, k)), gradients(expected, (q, k)))
    assert counted()[0] == {FLASH: 1, "_flash_attention_backward": 1}


def test_jagged_tensors(device, door, counted, monkeypatch):
    if device is CPU:  # where torch would not choose FlashAttention
        from torch.nested._internal import sdpa as nested

        choice = registry.SDPBackend.FLASH_ATTENTION
        monkeypatch.setattr(nested, "_select_sdp_backend", lambda *_, **__: choice)
    rows, begins = packed(device, [3, 1, 4])
    with torch.no_grad():
        x = torch.nested.nested_tensor_from_jagged(rows, begins.long()).transpose(1, 2)
        out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        options = {"cu_seqlens_q": begins, "cu_seqlens_k": begins, "causal": True}
        expected, _ = flash_attn_varlen_func(rows, rows, rows, **options)
    assert_all_equal([out.transpose(1, 2).values()], [expected])
    assert counted()[0] == {FLASH: 1}


def test_deterministic_gradients_are_asked_for_as_torch_does(door, tensors, monkeypatch):
    asked = []
    backward = aten._C.backward

    class Recording:
        forward = aten._C.forward

        def backward(self, *tensors, deterministic, **options):
            asked.append(deterministic)
            return backward(*tensors, deterministic=deterministic, **options)

    monkeypatch.setattr(aten, "_C", Recording())
    q, k, v = tensors()
    out = ATEN._scaled_dot_product_flash_attention(q, k, v)[0]
    out.sum().backward(retain_graph=True)
    with deterministic():
        out.sum().backward()
    assert asked == [False, True]


# ---- what follows the operators ------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled(device, door, tensors, counted, layout):
    def attend(q, k, v):
        out = ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        return out.transpose(1, 2).flatten(2).sin()

    torch.compiler.reset()
    backend = "inductor" if device is CUDA else "aot_eager"
    q, k, v = tensors(layout=layout)
    expected = attend(q, k, v)
    counted()
    with deterministic():  # in both directions, or torch refuses
        out = torch.compile(attend, fullgraph=True, backend=backend)(q, k, v)
    got = [out, *gradients(out, (q, k, v))]
    assert counted() == [{SDPA: 1, f"{SDPA}_backward": 1}, {}]
    rounding = {} if device is CPU else {"rtol": 2e-2, "atol": 2e-2}
    wanted = [expected, *gradients(expected, (q, k, v))]
    torch.testing.assert_close(got, wanted, **rounding)


def test_exported(door, tensors, counted):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]

    inputs = tuple(x.detach() for x in tensors())
    program = torch.export.export(Model(), inputs)
    counted()
    assert_all_equal([program.module()(*inputs)], [Model()(*inputs)])
    assert counted() == [{SDPA: 2}, {}]


# ---- what is left to torch -----------------------------------------------------------------------


@pytest.fixture
def original():
    """What torch had before: operators for the CPU that record their calls, and return the query."""
    calls = []
    library = torch.library.Library("aten", "IMPL")

    def forward(query, *args, **kwargs):
        calls.append((args, kwargs))
        return query.detach().clone(), *[torch.zeros(0)] * 3, 0, 0, *[torch.zeros(0)] * 3

    def backward(dout, query, key, value, *args, **kwargs):
        calls.append((args, kwargs))
        return dout, torch.zeros_like(key), torch.zeros_like(value)

    library.impl(SDPA, forward, "CPU")
    library.impl(f"{SDPA}_backward", backward, "CPU")
    handle = sdpa.override("CPU")
    yield calls
    handle.remove()
    library._destroy()


def on_the_cpu(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


NOT_TAKEN = {
    "dropout_p": lambda x: ((x, x, x, 1.0), {}),
    "return_debug_mask": lambda x: ((x, x, x), {"return_debug_mask": True}),
    "dtype": lambda x: ((x.double(), x.double(), x.double()), {}),
    "head_dim": lambda x: ((x, x, F.pad(x, (0, 8))), {}),
    "stride of the last dimension": lambda x: ((x[..., ::2], x[..., ::2], x[..., ::2]), {}),
}


@pytest.mark.parametrize("why", NOT_TAKEN)
def test_calls_that_are_not_taken_reach_what_was_there(original, counted, why):
    x = on_the_cpu(1, 2, 3, 16)
    args, kwargs = NOT_TAKEN[why](x)
    out = ATEN._scaled_dot_product_flash_attention(*args, **kwargs, scale=0.5)[0]
    torch.testing.assert_close(out, args[0])
    assert len(original) == 1 and original[0][1]["scale"] == 0.5
    assert counted() == [{}, {f"{SDPA}: {why}": 1}]
    if why == "dropout_p":
        out.sum().backward()
        assert counted() == [{}, {f"{SDPA}_backward: {why}": 1}]


def test_dropout_behind_the_door(original, counted):
    """The seed is what torch keeps as the state of its generator, and hands to the backward."""
    inputs = [on_the_cpu(2, 4, 40, 16) for _ in range(3)]
    torch.manual_seed(0)
    out, *_, state, _, mask = ATEN._scaled_dot_product_flash_attention(*inputs, 0.3)
    assert state.shape == (2,) and state.dtype == torch.uint64 and mask.numel() == 0
    q, k, v = (x.transpose(1, 2) for x in inputs)
    expected, _ = flash_attn_func(q, k, v, dropout_p=0.3, dropout_seed=state)
    assert_all_equal([out], [expected.transpose(1, 2)])
    assert_all_equal(gradients(out, inputs), gradients(expected.transpose(1, 2), inputs))
    assert counted() == [{SDPA: 1, f"{SDPA}_backward": 1}, {}] and not original


def test_dropout_whose_numbers_would_be_torchs_is_refused(original):
    """What torch drops is known to its kernels alone, and the backward would come here."""
    x = on_the_cpu(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match="dropout_p with return_debug_mask"):
        ATEN._scaled_dot_product_flash_attention(x, x, x, 0.5, return_debug_mask=True)


def test_what_a_newer_torch_adds_is_left_to_it(counted):
    def original(keyset, *args, **kwargs):
        return kwargs

    operator = sdpa._or_else(original, SDPA, aten.OPERATORS[SDPA])
    x = on_the_cpu(1, 2, 3, 16)
    assert operator(None, x, x, x, learnable_sink=x)["learnable_sink"] is x
    assert counted() == [{}, {f"{SDPA}: learnable_sink": 1}]


def test_gpus_that_are_too_old_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(aten, "_DTYPES", {})
    assert aten.dtypes_on(0) == ()
    monkeypatch.setattr(aten, "_DTYPES", {-1: ()})
    x = on_the_cpu(1, 2, 3, 16)
    with pytest.raises(aten.NotTaken, match="compute capability"):
        aten._check(x, x, 0.0)


def test_without_an_original_what_is_not_taken_is_an_error(counted):
    handle = sdpa.override("CPU")
    try:
        x, begins = packed(CPU, [3, 4])
        table = torch.zeros(2, 1, dtype=torch.int32)  # without seqused_k
        schema = str(ATEN._flash_attention_forward.default._schema)
        for option in ({"block_table": table}, {"alibi_slopes": torch.zeros(4)}):
            if next(iter(option)) not in schema:
                continue
            with pytest.raises(NotImplementedError, match=next(iter(option))):
                ATEN._flash_attention_forward(
                    *(x, x, x, begins, begins, 4, 4, 0.0, False, False), **option
                )
    finally:
        handle.remove()
    assert counted() == [{}, {}]


# ---- opened and closed ---------------------------------------------------------------------------


def is_ours(key="CPU"):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{SDPA}", key)


def test_importing_opens_nothing():
    if hasattr(registry, "current_flash_attention_impl"):
        assert registry.current_flash_attention_impl() is None
        assert sdpa.NAME in registry.list_flash_attention_impls()
    assert not is_ours()


def test_removing_brings_back_what_was_there(original, counted):
    x = on_the_cpu(1, 2, 3, 16)
    second = sdpa.override("CPU")  # over the first
    second.remove()
    second.remove()
    ATEN._scaled_dot_product_flash_attention(x, x, x)
    assert counted() == [{SDPA: 1}, {}]


@needs_registry
def test_activation_is_known_to_torch():
    handle = sdpa.activate()
    assert registry.current_flash_attention_impl() == sdpa.NAME
    again = sdpa.activate()
    handle.remove()  # is none any more
    assert registry.current_flash_attention_impl() == sdpa.NAME
    again.remove()
    assert registry.current_flash_attention_impl() is None
    registry.activate_flash_attention_impl(sdpa.NAME)
    assert registry.current_flash_attention_impl() == sdpa.NAME
    registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None
    assert torch.backends.cuda.is_built() or not is_ours("CUDA")


class Other:
    """An implementation of FlashAttention by others."""

    active = 0

    def __init__(self):
        type(self).active += 1

    def remove(self):
        type(self).active -= 1


@needs_registry
def test_an_activation_that_fails_leaves_torch_as_it_was(monkeypatch):
    monkeypatch.setitem(aten.OPERATORS, "_no_such_operator", None)
    monkeypatch.setattr(ATEN, "_no_such_operator", None, raising=False)
    registry.register_flash_attention_impl("OTHER", register_fn=Other)
    registry.activate_flash_attention_impl("OTHER")
    try:
        with pytest.raises(RuntimeError, match="_no_such_operator"):
            sdpa.activate()
        assert registry.current_flash_attention_impl() == "OTHER" and Other.active == 1
        assert torch.backends.cuda.is_built() or not is_ours("CUDA")
    finally:
        registry.restore_flash_attention_impl()
        del registry._registry._FLASH_ATTENTION_IMPLS["OTHER"]


@needs_registry
def test_an_untried_version_of_torch_is_said_once(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    sdpa._warn_of_untried_version.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"2\.11 to 2\.14, not with 9\.9\.0") as caught:
            sdpa.activate().remove()
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sdpa.activate().remove()
    finally:
        sdpa._warn_of_untried_version.cache_clear()


# ---- the function --------------------------------------------------------------------------------

FUNCTION = "scaled_dot_product_attention"


def test_the_signature_is_that_of_torch():
    theirs = ATEN.scaled_dot_product_attention.default._schema.arguments
    ours = inspect.signature(sdpa.scaled_dot_product_attention).parameters.values()
    assert [(x.name, x.kwarg_only) for x in theirs] == [
        (x.name, x.kind is x.KEYWORD_ONLY) for x in ours
    ]
    for x, parameter in zip(theirs[3:], list(ours)[3:], strict=True):
        assert x.default_value == parameter.default


def assert_near(ours, theirs, dtype):
    """Within some roundings of the largest number."""
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape and x.dtype == dtype
        largest = max(1.0, y.abs().max().item())
        bound = 200 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 3e-2
        assert (x.cpu().double() - y).abs().max() <= bound * largest


SHAPES = {  # of query, key, value
    "2D": ((5, 12), (7, 12), (7, 20)),
    "more queries": ((9, 12), (7, 12), (7, 20)),
    "3D": ((4, 5, 16), (4, 7, 16), (4, 7, 16)),
    "4D": ((2, 4, 5, 24), (2, 4, 7, 24), (2, 4, 7, 24)),
    "5D": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8)),
    "one head of v": ((4, 5, 12), (7, 12), (1, 7, 20)),
    "a batch of k alone": ((4, 5, 8), (3, 4, 7, 8), (4, 7, 8)),
    "one batch of q": ((1, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)),
    "all of them": ((2, 3, 4, 9, 12), (4, 7, 12), (3, 1, 7, 20)),
}
SHAPES_GQA = {
    "3D": ((4, 5, 12), (2, 7, 12), (2, 7, 20)),
    "4D": ((2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 16)),
    "5D, broadcast": ((2, 3, 4, 9, 12), (2, 7, 12), (3, 2, 7, 20)),
    "unequal": ((2, 4, 9, 12), (2, 2, 7, 12), (2, 4, 7, 20)),
}
CALLS = [
    pytest.param(shapes, {"enable_gqa": True} if gqa else {}, id=f"{'gqa ' * gqa}{name}")
    for gqa, table in enumerate((SHAPES, SHAPES_GQA))
    for name, shapes in table.items()
]


@pytest.mark.quick("cpu-all of them-True")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes, options", CALLS)
def test_every_shape_that_torch_takes(device, counted, shapes, options, causal):
    dtype = device.dtypes[0]
    inputs = [torch.randn(x).to(device.torch_device, dtype).requires_grad_() for x in shapes]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    ours = sdpa.scaled_dot_product_attention(*inputs, is_causal=causal, **options)
    theirs = F.scaled_dot_product_attention(*exact, is_causal=causal, **options)
    assert_near([ours, *gradients(ours, inputs)], [theirs, *gradients(theirs, exact)], dtype)
    assert counted() == [{FUNCTION: 1}, {}]


def test_scale(device):
    x = torch.randn(2, 3, 5, 12).to(device.torch_device, device.dtypes[0])
    for scale in (0.5, -0.25):
        ours = sdpa.scaled_dot_product_attention(x, x, x, scale=scale)
        exact = x.cpu().double()
        theirs = F.scaled_dot_product_attention(exact, exact, exact, scale=scale)
        assert_near([ours], [theirs], x.dtype)


MASK_SHAPES = {  # for (2, 3, 4, 5, 8) and (2, 3, 4, 7, 8), and without their first dimensions
    5: [(2, 3, 4, 5, 7), (2, 1, 1, 5, 7), (1, 1, 4, 1, 7), (3, 1, 5, 1), (5, 7)],
    4: [(3, 4, 5, 7), (1, 4, 5, 7), (3, 1, 1, 7), (4, 5, 1), (1, 1)],
    3: [(4, 5, 7), (1, 5, 1), (5, 7)],
    2: [(5, 7), (1, 7), (5, 1)],
}
MASKS = [(n, shape) for n, shapes in MASK_SHAPES.items() for shape in shapes]


@pytest.mark.quick("cpu*")
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("ndim, shape", MASKS, ids=str)
def test_masks(device, counted, ndim, shape, kind):
    dtype = device.dtypes[0]
    inputs = [torch.randn((2, 3, 4, n, 8)[-ndim:]) for n in (5, 7, 7)]
    inputs = [x.to(device.torch_device, dtype).requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    mask = torch.randn(shape)
    if kind == "float":
        mask.view(-1)[::3] = -torch.inf
        inputs.append(mask.to(device.torch_device, dtype).requires_grad_())
        exact.append(inputs[3].detach().cpu().double().requires_grad_())
        masks = inputs[3], exact[3]
    else:
        masks = (mask > 0).to(device.torch_device), mask > 0
    ours = sdpa.scaled_dot_product_attention(*inputs[:3], attn_mask=masks[0])
    theirs = F.scaled_dot_product_attention(*exact[:3], attn_mask=masks[1])
    expected = [x.nan_to_num(0) for x in (theirs, *gradients(theirs, exact))]
    assert_near([ours, *gradients(ours, inputs)], expected, dtype)
    assert counted() == [{FUNCTION: 1}, {}]


def test_masks_that_hide_all_keys_and_others(device):
    """Transposed, and shared by all queries, with heads that share keys."""
    dtype = device.dtypes[0]
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    q, k = (x.to(device.torch_device, dtype) for x in (q, k))
    hidden = torch.ones(5, 5, device=q.device).tril(-1).bool()  # row 0 sees none
    out = sdpa.scaled_dot_product_attention(q, k, k, hidden, enable_gqa=True)
    assert not out[:, :, 0].any()
    for mask in (torch.randn(2, 1, 5, 5).mT, torch.randn(5, 1).expand(5, 5)):
        ours = sdpa.scaled_dot_product_attention(q, k, k, mask.to(q), enable_gqa=True)
        exact = (x.cpu().double() for x in (q, k, k, mask.to(q)))
        assert_near([ours], [F.scaled_dot_product_attention(*exact, enable_gqa=True)], dtype)


@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_compiled(device, dynamic):
    torch.compiler.reset()
    attend = torch.compile(
        sdpa.scaled_dot_product_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for seqlen in (5, 9):
        q = torch.randn(2, 4, seqlen, 8).to(device.torch_device, device.dtypes[0])
        q.requires_grad_()
        for mask in (torch.ones(seqlen, seqlen).tril().bool(), torch.randn(2, 1, 1, seqlen)):
            mask = mask.to(q.device)
            expected, out = sdpa.scaled_dot_product_attention(q, q, q, mask), attend(q, q, q, mask)
            assert_all_equal([out], [expected])
            pair = (torch.autograd.grad(x.square().sum(), q) for x in (out, expected))
            assert_all_equal(*pair)
    torch.compiler.reset()


LEFT = {
    "dropout_p": ((2, 4, 5, 8), {"dropout_p": 1.0}),
    "head_dim": ((2, 4, 5, 264), {}),
    "no elements": ((2, 4, 0, 8), {}),
    "dtype": ((2, 4, 5, 8), {}),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_to_torch(device, counted, why):
    shape, options = LEFT[why]
    dtype = torch.float64 if why == "dtype" else device.dtypes[0]
    x = torch.randn(shape).to(device.torch_device, dtype).requires_grad_()
    options = {
        name: value.to(x.device) if torch.is_tensor(value) else value
        for name, value in options.items()
    }
    outs = []
    for module in (sdpa, F):
        torch.manual_seed(0)
        with registry.sdpa_kernel(registry.SDPBackend.MATH):  # cuDNN raises where dropout_p is 1
            outs.append(module.scaled_dot_product_attention(x, x, x, **options))
    assert_all_equal(outs[:1], outs[1:])
    assert counted() == [{}, {f"{FUNCTION}: {why}": 1}]


def test_nested_tensors_and_tensors_without_data_are_left_to_torch(counted):
    rows = torch.randn(8, 4, 16)
    x = torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, 3, 8])).transpose(1, 2)
    assert sdpa.scaled_dot_product_attention(x, x, x).is_nested
    meta = torch.empty(2, 4, 5, 16, device="meta")
    assert sdpa.scaled_dot_product_attention(meta, meta, meta).shape == meta.shape
    assert counted() == [{}, {f"{FUNCTION}: nested tensor": 1, f"{FUNCTION}: device": 1}]


def test_what_torch_refuses_is_refused():
    x = torch.randn(2, 4, 5, 16)
    masks = torch.ones(2, 2, 4, 5, 5), torch.ones(5, 5).double(), torch.ones(5), torch.ones(2, 5)
    for mask in masks:
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            sdpa.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    for other in (x[:, :2], x[:, :3], x[..., :8], x[:1].expand(3, -1, -1, -1)):
        with pytest.raises((ValueError, RuntimeError)):
            sdpa.scaled_dot_product_attention(x, other, other)
    with pytest.raises(ValueError, match="multiple of the heads"):
        sdpa.scaled_dot_product_attention(x, x[:, :3], x[:, :3], enable_gqa=True)
    with pytest.raises(RuntimeError, match="at least 2 dim"):
        sdpa.scaled_dot_product_attention(x[0, 0, 0], x, x)


def test_the_function_compiled(device):
    torch.compiler.reset()
    attend = torch.compile(
        lambda q, k, v: sdpa.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for seqlen in (5, 9):
        shapes = ((2, 4, seqlen, 12), (2, 2, 7, 12), (2, 2, 7, 12))
        inputs = [torch.randn(x).to(device.torch_device, device.dtypes[0]) for x in shapes]
        options = {"is_causal": True, "enable_gqa": True}
        expected = sdpa.scaled_dot_product_attention(*inputs, **options)
        assert_all_equal([attend(*inputs)], [expected])


def test_the_function_under_autocast(device, counted):
    x = torch.randn(2, 4, 5, 16, device=device.torch_device)
    with torch.autocast(device.torch_device, torch.bfloat16):
        out = sdpa.scaled_dot_product_attention(x, x, x)
    expected = sdpa.scaled_dot_product_attention(*[x.bfloat16()] * 3)
    assert_all_equal([out], [expected])
    assert counted() == [{FUNCTION: 2}, {}]


SAMPLES = """
import sys, types, unittest

# torch's own tests import it for texts that are compared, of which there are none here
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))

import torch
from torch.testing._internal.common_methods_invocations import op_db

from flash_attn_sm120 import sdpa

op = next(x for x in op_db if x.name == "nn.functional.scaled_dot_product_attention")
bounds = {torch.float64: 0, torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def run(function, sample):
    torch.manual_seed(0)
    inputs = (sample.input, *sample.args)
    out = function(*inputs, **sample.kwargs)
    return [out, *torch.autograd.grad(out.sum(), inputs)]


def in_double(x):
    is_real = torch.is_tensor(x) and x.is_floating_point()
    return x.detach().double().requires_grad_(x.requires_grad) if is_real else x


for dtype, bound in bounds.items():
    for sample in op.sample_inputs(DEVICE, dtype, requires_grad=True):
        theirs = run(torch.nn.functional.scaled_dot_product_attention, sample)
        if sample.kwargs.get("dropout_p", 0) > 0:  # other elements than torch drops
            continue
        exact = run(torch.nn.functional.scaled_dot_product_attention, sample.transform(in_double))
        ours = run(sdpa.scaled_dot_product_attention, sample)
        for x, y, z in zip(ours, theirs, exact, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            allowed = bound * z.abs().max().clamp(min=1) + 2 * (y - z).abs().max()
            assert (x - z).abs().max() <= allowed, (sample, x, z)
print(sdpa.stats().taken["scaled_dot_product_attention"])
"""


def test_samples_of_torch(device, tmp_path):
    """In another process: importing torch's tests changes settings of torch."""
    done = run_python(f"DEVICE = {device.torch_device!r}\n{SAMPLES}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= (26 if device is CUDA else 39)


# ---- CUDA: torch's functions ---------------------------------------------------------------------


@pytest.fixture
def flash(cuda):
    """Lets torch choose FlashAttention; on compute capability 9.0 it may prefer cuDNN."""
    with registry.sdpa_kernel([registry.SDPBackend.FLASH_ATTENTION, registry.SDPBackend.MATH]):
        yield


@pytest.fixture
def on_cuda(flash):
    """on_cuda(...) -> query, key, value in bf16."""

    def make(batch=2, heads=8, heads_kv=8, seqlen=300, head_dim=64):
        shapes = [(batch, heads, seqlen, head_dim), *[(batch, heads_kv, seqlen, head_dim)] * 2]
        made = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        return [x.requires_grad_() for x in made]

    return make


@pytest.fixture
def opened(flash):
    handle = sdpa.activate()
    yield handle
    handle.remove()


@pytest.mark.parametrize("heads_kv", [8, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_on_cuda_is_ours(opened, on_cuda, counted, heads_kv, causal):
    q, k, v = on_cuda(heads_kv=heads_kv)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads_kv < 8)
    expected, _ = directly(q, k, v, causal=causal)
    assert_all_equal([out], [expected])
    assert_all_equal(gradients(out, (q, k, v)), gradients(expected, (q, k, v)))
    assert counted() == [{SDPA: 1, f"{SDPA}_backward": 1}, {}]


def test_sdpa_on_cuda_pads_head_dims(opened, on_cuda, counted):
    q, k, v = on_cuda(head_dim=60)
    out = F.scaled_dot_product_attention(q, k, v)
    padded = [F.pad(x, (0, 4)) for x in (q, k, v)]
    expected, _ = directly(*padded, softmax_scale=1 / math.sqrt(60))
    assert_all_equal([out], [expected[..., :60]])
    assert counted()[0] == {SDPA: 1}


def test_dropout_on_cuda_is_ours(opened, on_cuda, counted):
    q, k, v = on_cuda()

    def attend():
        torch.manual_seed(0)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        return [out, *gradients(out, (q, k, v))]

    for x, y in zip(attend(), attend(), strict=True):
        torch.testing.assert_close(x, y)
    assert counted() == [{SDPA: 2, f"{SDPA}_backward": 2}, {}]


def test_removing_on_cuda_brings_back_torch(on_cuda, counted):
    q, k, v = on_cuda()
    before = F.scaled_dot_product_attention(q, k, v)
    sdpa.activate().remove()
    assert_all_equal([F.scaled_dot_product_attention(q, k, v)], [before])
    assert counted() == [{}, {}]


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_on_cuda_are_ours(opened, on_cuda, counted, kind):
    inputs = on_cuda()
    mask = torch.randn(2, 1, 300, 300, device="cuda", dtype=inputs[0].dtype)
    mask = mask > 0 if kind == "bool" else mask.requires_grad_()
    wanted = inputs if kind == "bool" else (*inputs, mask)
    with registry.sdpa_kernel(registry.SDPBackend.EFFICIENT_ATTENTION):  # 9.0 has cuDNN first
        out = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    ours = sdpa.scaled_dot_product_attention(*inputs, attn_mask=mask)
    # Not to the bit: torch hands over a mask in the type of q, and rows that it has padded.
    pairs = ([out, *gradients(out, wanted)], [ours, *gradients(ours, wanted)])
    assert_near(*([x.cpu() for x in side] for side in pairs), out.dtype)
    assert counted() == [{EFFICIENT: 1, FUNCTION: 1, f"{EFFICIENT}_backward": 1}, {}]


def test_multihead_attention_in_training(opened, counted):
    layer = torch.nn.MultiheadAttention(128, 2, batch_first=True).to("cuda", torch.bfloat16)
    x = torch.randn(2, 33, 128, device="cuda", dtype=torch.bfloat16)
    layer(x, x, x, need_weights=False)[0].sum().backward()
    assert counted() == [{SDPA: 1, f"{SDPA}_backward": 1}, {}]


def test_autocast(opened, on_cuda, counted):
    q, k, v = (x.float() for x in on_cuda())
    with torch.autocast("cuda", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert counted()[0] == {SDPA: 1}


def test_compiled_sdpa_on_cuda(opened, on_cuda, counted):
    torch.compiler.reset()
    q, k, v = on_cuda()
    attend = torch.compile(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), fullgraph=True
    )
    with deterministic():
        out = attend(q, k, v)
    got = gradients(out, (q, k, v))
    assert counted() == [{SDPA: 1, f"{SDPA}_backward": 1}, {}]
    expected, _ = directly(q, k, v, causal=True)
    assert_all_equal([out, *got], [expected, *gradients(expected, (q, k, v))])


def test_cuda_graph(opened, on_cuda):
    q, k, v = (x.detach() for x in on_cuda())
    F.scaled_dot_product_attention(q, k, v)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = F.scaled_dot_product_attention(q, k, v)
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    assert_all_equal([out], [directly(q, k, v)[0]])
