"""What torch follows a call by: tracing, compiling, exporting, transforming, counting, sharding.

Every way is held against the same call of scaled_dot_product_attention, or against the direct call.
"""

import contextlib
import functools
import inspect
import io
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from flash_attn_sm120 import _C, explain_backward, flash_attn_func, flash_attn_varlen_func, ops
from flash_attn_sm120.following import is_followed
from flash_attn_sm120.plan import ScalarOptions
from helpers.checks import assert_all_equal
from helpers.children import run_python
from helpers.devices import CPU, CUDA, params_of
from helpers.models import Transformer

NAMES = {"flash_attn_sm120.forward.default", "flash_attn_sm120.backward.default"}


@pytest.fixture(params=params_of(CPU, CUDA))
def device(request):
    return request.param


@pytest.fixture
def tensors(device):
    """tensors() -> q, k, v with two query heads per KV head."""

    def make(seqlen_q=5, seqlen_k=7, heads=4, heads_kv=2, head_dim=16, *, batch=2):
        shapes = [(batch, seqlen_q, heads, head_dim), *[(batch, seqlen_k, heads_kv, head_dim)] * 2]
        return [torch.randn(s).to(device.torch_device, device.dtypes[0]) for s in shapes]

    return make


@pytest.fixture
def qkv(tensors):
    return tensors()


def attend(q, k, v, **options):
    return flash_attn_func(q, k, v, **options)[0]


def sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def compiled(function, **options):
    """Without a graph break, and without what earlier tests have compiled."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def assert_near(ours, theirs):
    """Within some roundings of the largest number: transforms are tested here, not how exact a call is."""
    leaves = torch.utils._pytree.tree_leaves(theirs)
    near = 1e-4 if leaves[0].dtype == torch.float32 else 3e-2
    largest = max(x.abs().max().item() for x in leaves if x.numel())
    torch.testing.assert_close(ours, theirs, rtol=near, atol=near * max(1, largest))


def plain(q, k, v):
    """Attention by products and a softmax, with two query heads per KV head."""
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v)


def names_in(graph):
    return {str(node.target) for node in graph.nodes} & NAMES


class Names(TorchDispatchMode):
    """The operators that torch saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def runs(monkeypatch):
    """How often C computed a forward and a backward."""
    counts = {"forward": 0, "backward": 0}

    class Counting:
        def __getattr__(self, name):
            counts[name] += 1
            return getattr(_C, name)

    monkeypatch.setattr(ops, "_C", Counting())
    return counts


# ---- the schema ----------------------------------------------------------------------------------


def test_schemas_have_every_option():
    """A row of csrc/options.h that a dense call has, but for its tensors, is an argument of both
    operators, with the same default. Lists of blocks are those of mods/operators.py, and
    heads_first is of torch's own operators."""
    parameters = inspect.signature(_C.backward).parameters
    names = ScalarOptions.__annotations__.keys() - {"key_blocks", "query_blocks", "heads_first"}
    options = {name: parameters[name].default for name in names}
    left, right = options.pop("window_size")
    options.update(window_left=left, window_right=right)
    for op in (ops.FORWARD, ops.BACKWARD):
        arguments = [x for x in op._schema.arguments if x.kwarg_only]
        assert {x.name: x.default_value for x in arguments} == options


def test_options_go_there_and_back():
    options = {"softmax_scale": 0.3, "causal": True, "window_size": (3, None), "softcap": 2.0}
    options |= {"num_splits": 2, "pack_gqa": False, "deterministic": True}
    assert ops.from_schema(**ops.to_schema(**options)) == options
    assert ops.to_schema(window_size=None) == ops.to_schema(window_size=(None, None))


CALLS = {
    "dense": {},
    "causal": {"causal": True},
    "window": {"window_left": 3, "window_right": 1},
    "softcap": {"softcap": 2.0},
    "scale": {"softmax_scale": 0.3, "num_splits": 1, "pack_gqa": False, "deterministic": True},
}


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("heads_kv", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_opcheck(device, tensors, options, heads_kv, sink):
    """Schema, derivatives, shapes without data and compiled training agree with the kernel."""
    q, k, v = tensors(heads_kv=heads_kv)
    sink = torch.randn(4, device=q.device) if sink else None
    leaves = [x if x is None else x.clone().requires_grad_() for x in (q, k, v, sink)]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(ops.FORWARD, (*leaves,), options, test_utils=checks)
    out, lse = ops.FORWARD(q, k, v, sink, **options)
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), dlse, q, k, v, sink, out, lse)
        torch.library.opcheck(ops.BACKWARD, arguments, options, test_utils=checks)


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
def test_opcheck_compiled(device, qkv, sink):
    sink = torch.randn(4, device=qkv[0].device) if sink else None
    leaves = [x if x is None else x.clone().requires_grad_() for x in (*qkv, sink)]
    checks = "test_aot_dispatch_dynamic"
    torch.library.opcheck(ops.FORWARD, (*leaves,), {"causal": True}, test_utils=checks)


# ---- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operator(qkv, mode):
    q, k, v = qkv
    graph = make_fx(lambda q, k, v: attend(q, k, v), tracing_mode=mode)(q, k, v)
    assert names_in(graph.graph) == {"flash_attn_sm120.forward.default"}
    assert_near(graph(q * 2, k, v), sdpa(q * 2, k, v))


def test_make_fx_before_dispatch(qkv):
    q, k, v = qkv
    graph = make_fx(lambda q, k, v: attend(q, k, v), pre_dispatch=True)(q, k, v)
    leaf = (q * 2).requires_grad_()
    assert_near(*(torch.autograd.grad(f(leaf, k, v).sum(), leaf) for f in (graph, sdpa)))


def test_make_fx_of_a_training_step(qkv):
    q, k, v = qkv

    def step(attention, q):
        leaf = q.detach().requires_grad_()
        return torch.autograd.grad(attention(leaf, k, v).square().sum(), leaf)[0]

    graph = make_fx(functools.partial(step, attend))(q)
    assert names_in(graph.graph) == NAMES
    assert_near(graph(q * 2), step(sdpa, q * 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace(qkv):
    """Values, gradients, and a saved graph."""
    q, k, v = qkv
    traced = torch.jit.trace(lambda q, k, v: attend(q, k, v), (q, k, v))
    assert_near(traced(q * 2, k, v), sdpa(q * 2, k, v))
    leaf = q.clone().requires_grad_()
    assert_near(*(torch.autograd.grad(f(leaf, k, v).sum(), leaf) for f in (traced, sdpa)))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert_near(torch.jit.load(file)(q, k, v), sdpa(q, k, v))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_of_a_module(qkv):
    class Module(torch.nn.Module):
        def forward(self, x):
            return attend(x, x, x, causal=True)

    q = qkv[0]
    traced = torch.jit.trace(Module(), q)
    assert_all_equal([traced(q + 1)], [attend(q + 1, q + 1, q + 1, causal=True)])


def test_symbolic_trace(qkv):
    """Of torch.fx: what stands for a tensor is not one."""

    class Module(torch.nn.Module):
        def forward(self, x):
            out, lse = flash_attn_func(x, x, x, causal=True, return_lse=True)
            return out * 2, lse

    traced = torch.fx.symbolic_trace(Module())
    assert names_in(traced.graph) == {"flash_attn_sm120.forward.default"}
    assert_all_equal(traced(qkv[0]), Module()(qkv[0]))


@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
def test_compile(tensors, dynamic):
    """No graph break, other lengths, forward and backward."""
    function = compiled(attend, dynamic=dynamic)
    for seqlen in (5, 9, 6):
        leaves = [x.requires_grad_() for x in tensors(seqlen, seqlen + 1)]
        ours, theirs = function(*leaves), sdpa(*leaves)
        assert_near(ours, theirs)
        assert_near(*(torch.autograd.grad(out.square().sum(), leaves) for out in (ours, theirs)))


def test_compile_with_sizes_as_options(tensors):
    """A window and a scale that depend on a length which is unknown while compiling."""

    def call(q, width):
        options = {"window_size": (width, q.shape[1] // 2), "softmax_scale": q.shape[1] ** -0.5}
        return flash_attn_func(q, q, q, return_lse=True, **options)

    function = compiled(call, dynamic=True)
    for seqlen in (6, 9):
        q = tensors(seqlen)[0]
        assert_all_equal(function(q, seqlen - 4), call(q, seqlen - 4))


def test_compile_under_autocast(device, tensors):
    def inside(q, k, v):
        with torch.autocast(device.torch_device, torch.bfloat16):
            return attend(q, k, v)

    leaves = [x.float().requires_grad_() for x in tensors()]
    expected = inside(*leaves)
    for function in (attend, inside):
        with torch.autocast(device.torch_device, torch.bfloat16):
            out = compiled(function)(*leaves)
        assert out.dtype == torch.bfloat16
        assert_near(out, expected)
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert_near(gradients, torch.autograd.grad(expected.sum(), leaves, retain_graph=True))


def test_compile_of_a_training_step(device):
    """A small transformer learns in one graph what it learns eagerly."""

    def curve(compile):
        torch.manual_seed(0)
        model = Transformer(lambda q, k, v: attend(q, k, v, causal=True)).to(device.torch_device)
        step = compile(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            tokens = torch.randint(16, (4, 21)).to(device.torch_device)
            with torch.autocast(device.torch_device, torch.bfloat16, device == CUDA):
                predicted = step(tokens[:, :-1])
            loss = F.cross_entropy(predicted.flatten(0, 1).float(), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses), [p.grad for p in model.parameters()]

    torch._dynamo.utils.counters.clear()
    near = {"rtol": 1e-4, "atol": 1e-5} if device == CPU else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(curve(compiled), curve(lambda model: model), **near)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export_round_trip(qkv, strict):
    """Saved and loaded, it computes other lengths, and gradients."""

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, softmax_scale=q.shape[-1] ** -0.5)

    q, k, v = qkv
    seqlen = torch.export.Dim("seqlen", min=2, max=64)
    program = torch.export.export(
        Module(), (q, k, v), dynamic_shapes=({1: seqlen}, None, None), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert names_in(loaded.graph) == {"flash_attn_sm120.forward.default"}
    leaf = torch.cat([q, q], 1).requires_grad_()
    outs = [f(leaf, k, v) for f in (loaded.module(), loaded.run_decompositions().module(), sdpa)]
    assert_near(outs[0], outs[2])
    assert_near(outs[1], outs[2])
    assert_near(*(torch.autograd.grad(out.sum(), leaf) for out in (outs[0], outs[2])))


# ---- tensors without data ------------------------------------------------------------------------


def without_data(kind, tensors):
    return (
        [x.to("meta") for x in tensors]
        if kind == "meta"
        else map(FakeTensorMode().from_tensor, tensors)
    )


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_without_data(tensors, kind):
    """Those of the call: sizes, strides, types, and gradients' as well."""
    q, k, v = tensors(5, 7)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # outputs are contiguous all the same
    v = torch.cat([v, v], 3)
    real = [x.requires_grad_() for x in (q, k, v, torch.randn(4, device=q.device))]
    bare = [x.detach().requires_grad_() for x in without_data(kind, real)]
    results = []
    for leaves in (real, bare):
        out, lse = flash_attn_func(*leaves[:3], learnable_sink=leaves[3], return_lse=True)
        results.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), leaves)])
    for x, expected in zip(*results[::-1], strict=True):
        assert (x.shape, x.stride(), x.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert type(x) is type(bare[0]) and x.device == bare[0].device


def test_fake_mode_makes_no_data():
    with FakeTensorMode():
        q = torch.empty(64, 8192, 64, 128, dtype=torch.bfloat16, device="cuda")
        out, lse = flash_attn_func(q, q, q, causal=True, return_lse=True)
    assert out.shape == q.shape and out.device == q.device and lse.shape == (64, 64, 8192)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[..., :12], k[..., :12], v), "head_dim .* multiple of 8 .* got 12"),
        (lambda q, k, v: (q[:, :, :3], k, v), "multiple of the heads of k and v, got 3 and 2"),
        (lambda q, k, v: (q, k, v[:, :-1]), "v must have k's seqlen 7 in dimension 1, got 6"),
        (lambda q, k, v: (q, k[0], v), "k must have 4 dimensions, got 3"),
        (lambda q, k, v: (q, torch.empty(k.shape, dtype=k.dtype), v), "k must be on q's device"),
    ],
)
def test_shapes_are_checked_without_data(qkv, change, message):
    with pytest.raises(ValueError, match=message):
        attend(*change(*(x.to("meta") for x in qkv)))


def test_types_are_checked_without_data(qkv):
    q, k, v = (x.to("meta") for x in qkv)
    with pytest.raises(
        TypeError, match=r"q must be float16, bfloat16 or float32, got torch\.float64"
    ):
        attend(q.double(), k.double(), v.double())
    with pytest.raises(TypeError, match=r"v must be .* like q"):
        attend(q.bfloat16(), k.bfloat16(), v.half())


# ---- functorch -----------------------------------------------------------------------------------


@pytest.fixture
def many(qkv):
    """Three q."""
    return torch.stack([qkv[0], 2 * qkv[0], qkv[0] + 1])


TRANSFORMS = {
    "grad": lambda f, q, qs: torch.func.grad(lambda x: f(x).square().sum())(q),
    "vjp": lambda f, q, qs: torch.func.vjp(f, q)[1](torch.ones_like(q)),
    "vmap": lambda f, q, qs: torch.vmap(f)(qs),
    "vmap, other dims": lambda f, q, qs: torch.vmap(f, 2, 1)(qs.movedim(0, 2)),
    "vmap of vmap": lambda f, q, qs: torch.vmap(torch.vmap(f))(torch.stack([qs, 2 * qs])),
    "vmap of grad": lambda f, q, qs: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(qs),
    "grad of vmap": lambda f, q, qs: torch.func.grad(lambda x: torch.vmap(f)(x).square().sum())(qs),
    "jacrev": lambda f, q, qs: torch.func.jacrev(lambda x: f(x).sum((1, 3)))(q),
    "grad of a value": lambda f, q, qs: torch.func.grad(
        lambda y: torch.func.grad_and_value(lambda x: f(x * y).sum())(q)[1]
    )(torch.ones_like(q)),
    "make_fx of grad": lambda f, q, qs: make_fx(torch.func.grad(lambda x: f(x).square().sum()))(qs[1])(q),
    "make_fx of vmap": lambda f, q, qs: make_fx(torch.vmap(f))(2 * qs)(qs),
    "jacobian": lambda f, q, qs: torch.autograd.functional.jacobian(lambda x: f(x).sum((1, 3)), q),
    "jacobian, vectorized": lambda f, q, qs: torch.autograd.functional.jacobian(
        lambda x: f(x).sum((1, 3)), q, vectorize=True
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(qkv, many, transform):
    """Beside products and a softmax: SDPA of torch 2.11 on CUDA is wrong in the gradient of a vmap."""
    q, k, v = qkv
    ours = transform(lambda x: attend(x, k, v), q, many)
    assert_near(ours, transform(lambda x: plain(x, k, v), q, many))


def test_vmap_of_everything(tensors, many):
    """Over keys and values, and over the sink, forward and gradients: as one call after another."""
    _, k, v = tensors(batch=6)
    k, v = (x.unflatten(0, (3, 2)) for x in (k, v))
    sinks = torch.randn(3, 4, device=k.device)

    def loss(q, k, v, sink):
        out, lse = flash_attn_func(q, k, v, learnable_sink=sink, causal=True, return_lse=True)
        return out.float().square().sum() + lse.sum()

    step = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    for in_dims in ((0, 0, 0, 0), (0, None, None, 0), (None, 0, 0, None), (0, None, 0, None)):
        arguments = [
            x if d == 0 else x[0] for x, d in zip((many, k, v, sinks), in_dims, strict=True)
        ]
        ours = torch.vmap(step, in_dims)(*arguments)
        rows = [
            [x[i] if d == 0 else x for x, d in zip(arguments, in_dims, strict=True)]
            for i in range(3)
        ]
        theirs = [torch.stack(x) for x in zip(*(step(*row) for row in rows), strict=True)]
        assert_near(list(ours), theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_gradients(qkv):
    """is_grads_batched, with a graph that was recorded directly."""
    leaves = [x.requires_grad_() for x in qkv]
    outs = [attend(*leaves), sdpa(*leaves)]
    dout = torch.randn(3, *outs[0].shape).to(outs[0])
    assert_near(*(torch.autograd.grad(out, leaves, dout, is_grads_batched=True) for out in outs))


def of_a_dual_number(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x)))


FORWARD_DERIVATIVES = {
    "dual": of_a_dual_number,
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(lambda x: f(x).sum()), (x,), (x,)),
    "vmap of jvp": lambda f, x: torch.vmap(lambda t: torch.func.jvp(f, (x,), (t,)))(x[None]),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(
        f, x, strategy="forward-mode", vectorize=True
    ),
}


@pytest.mark.parametrize("derive", FORWARD_DERIVATIVES.values(), ids=FORWARD_DERIVATIVES)
@pytest.mark.parametrize("of", ["q", "k", "learnable_sink"])
def test_forward_derivatives_are_refused(qkv, derive, of):
    q, k, v = qkv
    arguments = {"q": q, "k": k, "v": v, "learnable_sink": torch.randn(4, device=q.device)}

    def call(x):
        return attend(**(arguments | {of: x}))

    with pytest.raises(NotImplementedError, match="no forward derivative"):
        derive(call, arguments[of])


def test_a_level_without_duals_is_no_error(qkv):
    with forward_ad.dual_level():
        assert_near(attend(*qkv), sdpa(*qkv))


SECOND_DERIVATIVES = {
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x),
    "vmap of hvp": lambda f, x: torch.vmap(
        lambda t: torch.func.vjp(torch.func.grad(f), x)[1](t)
    )(x[None]),
    "functional.hessian": lambda f, x: torch.autograd.functional.hessian(f, x),
}  # fmt: skip


@pytest.mark.parametrize("derive", SECOND_DERIVATIVES.values(), ids=SECOND_DERIVATIVES)
def test_second_derivatives_are_refused(qkv, derive):
    q, k, v = qkv
    with pytest.raises(RuntimeError, match="flash_attn_sm120 has no second derivative"):
        derive(lambda x: attend(x, k, v).square().sum(), q)


# ---- modes, subclasses, observers ----------------------------------------------------------------


def test_a_dispatch_mode_sees_both_directions(qkv):
    leaves = [x.requires_grad_() for x in qkv]
    with Names() as names:
        attend(*leaves).sum().backward()
    assert set(names.seen) >= NAMES


def test_a_mode_that_begins_before_the_backward(qkv):
    """The forward was recorded directly."""
    out = attend(*(x.requires_grad_() for x in qkv))
    with Names() as names:
        out.sum().backward()
    assert set(names.seen) & NAMES == {"flash_attn_sm120.backward.default"}


class FunctionNames(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_function_mode_sees_the_operator(qkv):
    with FunctionNames() as names:
        attend(*qkv)
    assert "flash_attn_sm120.forward.default" in names.seen


def test_modes_leave_numpy_alone():
    q, cu_seqlens = np.zeros((1, 4, 2, 16), np.float32), np.array([0, 1, 4], np.int32)
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    cpu = torch.profiler.ProfilerActivity.CPU
    for modes in ((FunctionNames(), Names()), (torch.profiler.profile(activities=[cpu]),)):
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            assert type(attend(q, q, q)) is np.ndarray
            assert type(flash_attn_varlen_func(q[0], q[0], q[0], **lengths)[0]) is np.ndarray


def test_a_default_device_is_no_reason(qkv):
    with torch.device(qkv[0].device):
        assert not is_followed(*qkv)
        with FunctionNames():
            assert is_followed(*qkv)


class Overriding(torch.Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


class Plain(torch.Tensor):
    """Overrides nothing."""


def test_subclasses(qkv):
    q, k, v = qkv
    assert isinstance(attend(q.as_subclass(Overriding), k, v), Overriding)
    assert "flash_attn_sm120.forward.default" in Overriding.seen
    out = attend(*(TwoTensor(x, x * 2) for x in qkv))  # has no memory itself
    assert type(out) is TwoTensor
    assert_near(out.b, sdpa(q * 2, k * 2, v * 2))


def test_subclasses_that_override_nothing_go_straight(qkv):
    q, k, v = qkv
    assert not is_followed(q.as_subclass(Plain), torch.nn.Parameter(k), v)
    assert_near(attend(q.as_subclass(Plain), k, v).as_subclass(torch.Tensor), sdpa(q, k, v))


def test_plain_calls_go_straight(qkv, monkeypatch):
    monkeypatch.setattr(ops, "FORWARD", None)
    attend(*qkv)
    attend(*(x.requires_grad_() for x in qkv)).sum().backward()


def test_flops(qkv):
    """As torch counts SDPA's: 2 products of the forward, 5 of the backward, masked or not."""
    q, k, v = (x.requires_grad_() for x in qkv)
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v, causal=True).sum().backward()
    product = 2 * 2 * 4 * 5 * 7 * 16
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts == {
        "flash_attn_sm120.forward": 2 * product,
        "flash_attn_sm120.backward": 5 * product,
    }


def test_flops_in_any_order_of_imports(tmp_path):
    """torch's counter is not imported for programs that count nothing."""
    code = """
import sys, torch
from flash_attn_sm120 import flash_attn_func
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(1, 4, 1, 8)
with FlopCounterMode(display=False) as counter:
    flash_attn_func(q, q, q)
print(counter.get_total_flops())
"""
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == str(2 * 2 * 4 * 4 * 8), done.stderr


def test_profiler(qkv):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(*(x.requires_grad_() for x in qkv)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert names >= {"flash_attn_sm120::forward", "flash_attn_sm120::backward"}


@pytest.mark.parametrize("is_saved", [False, True], ids=["recomputed", "saved"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_selective_checkpointing(qkv, runs, is_saved, is_compiled):
    """The policy names the operator, and decides whether it runs again."""
    q, k, v = (x.requires_grad_() for x in qkv)

    def policy(context, op, *args, **kwargs):
        saved = is_saved and op is torch.ops.flash_attn_sm120.forward.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q):
        return attend(q * 2, k, v, deterministic=True).square()

    def checkpointed(q):
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, q, use_reentrant=False, context_fn=contexts)

    expected = torch.autograd.grad(block(q).sum(), q)
    if is_compiled:
        checkpointed = compiled(checkpointed)
    runs.update(forward=0, backward=0)
    assert_near(torch.autograd.grad(checkpointed(q).sum(), q), expected)
    assert runs == {"forward": 1 if is_saved else 2, "backward": 1}


# ---- lazy negation -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v", "learnable_sink"])
def test_lazy_negation_of_inputs(qkv, name):
    inputs = dict(zip("qkv", qkv, strict=True)) | {"learnable_sink": torch.randn(4).to(qkv[0])}
    lazy, eager = inputs | {name: torch._neg_view(inputs[name])}, inputs | {name: -inputs[name]}
    assert lazy[name].is_neg()
    assert_all_equal(*(flash_attn_func(**x, return_lse=True) for x in (lazy, eager)))


def test_lazy_negation_of_a_lone_sink(qkv):
    """One number has every stride: no copy resolves it."""
    q, k, v = (x[:, :, :1] for x in qkv)
    sink = torch.tensor([1 + 2j], device=q.device).conj().imag
    assert sink.is_neg()
    assert_all_equal(*([attend(q, k, v, learnable_sink=x)] for x in (sink, sink.clone())))


@pytest.mark.parametrize("lazy", [(True, False), (False, True), (True, True)], ids=str)
def test_lazy_negation_of_gradients(qkv, lazy):
    leaves = [x.requires_grad_() for x in qkv]
    results = flash_attn_func(*leaves, deterministic=True, return_lse=True)
    douts = [torch.randn_like(x) for x in results]
    lazily = [torch._neg_view(x) if is_lazy else -x for x, is_lazy in zip(douts, lazy, strict=True)]
    gradients = torch.autograd.grad(results, leaves, lazily, retain_graph=True)
    assert_all_equal(gradients, torch.autograd.grad(results, leaves, [-x for x in douts]))


def test_complex_conjugates(qkv):
    """The imaginary part of a conjugate is a lazy negation, and its gradient may be, too."""
    q, k, v = qkv
    leaf = torch.complex(q.float(), q.float()).requires_grad_()

    def loss(attention):
        return attention(leaf.conj().imag.contiguous(), k.float(), v.float()).square().sum()

    if q.device.type == "cpu":  # fp32
        assert_near(*(torch.autograd.grad(loss(f), leaf) for f in (attend, sdpa)))


def test_results_are_not_written_to_lazy_negations(qkv):
    q, k, v = qkv
    out = torch._neg_view(torch.empty_like(q))
    with pytest.raises(RuntimeError, match="lazy negation"):
        flash_attn_func(q, k, v, out=out)


# ---- in place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "lse"])
def test_results_in_place_are_refused_where_torch_follows(qkv, name):
    q, k, v = qkv
    result = torch.empty_like(q) if name == "out" else torch.empty(2, 4, 5, device=q.device)
    call = functools.partial(flash_attn_func, **{name: result})
    for follow in (
        lambda: make_fx(call)(q, k, v),
        lambda: torch.vmap(call)(*(x[None] for x in qkv)),
        lambda: call(*(x.to("meta") for x in qkv)),
    ):
        with pytest.raises(RuntimeError, match=r"\(\.\.\., out=, lse=\) does not support"):
            follow()


def test_results_in_place_under_the_profiler(qkv):
    out = torch.empty_like(qkv[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        flash_attn_func(*qkv, out=out)
    assert_near(out, sdpa(*qkv))


# ---- arguments -----------------------------------------------------------------------------------


def test_numbers_are_numbers_where_torch_follows(qkv):
    """numpy's and Python's of any kind; a tensor's gradient would be lost."""
    expected = attend(*qkv, softmax_scale=0.5, window_size=(2, 1), causal=True, softcap=1.0)
    with Names() as names:
        options = {"softmax_scale": np.float32(0.5), "softcap": np.float64(1), "causal": 1}
        out = attend(*qkv, window_size=np.array([2, 1]), **options)
        with pytest.raises(TypeError, match="softmax_scale must be a number, got a tensor"):
            attend(*qkv, softmax_scale=torch.tensor(0.5))
    assert_all_equal([out], [expected])
    assert set(names.seen) & NAMES


def test_arguments_of_other_frameworks(qkv):
    q = qkv[0]
    with Names(), pytest.raises(TypeError, match=r"k must be a torch\.Tensor where torch follows"):
        attend(q, np.zeros((2, 7, 2, 16), np.float32), q)


def test_nested_tensors_are_refused():
    q = torch.nested.nested_tensor([torch.randn(n, 2, 16) for n in (3, 4)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="q is a nested tensor, which is not supported"):
        attend(q, q, q)


# ---- global switches -----------------------------------------------------------------------------


@pytest.fixture
def deterministic_backwards(monkeypatch):
    """What the backward is asked for."""
    asked = []

    class Watching:
        forward = staticmethod(_C.forward)

        @staticmethod
        def backward(*args, deterministic=False, **options):
            asked.append(deterministic)
            return _C.backward(*args, deterministic=deterministic, **options)

    monkeypatch.setattr(ops, "_C", Watching())
    return asked


@pytest.mark.parametrize(
    "switch",
    [
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        lambda: torch.set_deterministic_debug_mode("error"),
    ],
    ids=["on", "warnings", "debug mode"],
)
def test_deterministic_algorithms(qkv, deterministic_backwards, switch):
    """Whether they are wanted is asked at the backward: directly, by the operator, and compiled."""
    leaves = [x.requires_grad_() for x in qkv]
    outs = [attend(*leaves), ops.FORWARD(*leaves, None)[0]]
    for out in outs:
        out.sum().backward(retain_graph=True)
    assert deterministic_backwards == [False, False]
    try:
        switch()
        outs.append(compiled(attend)(*leaves))
        for out in outs:
            out.sum().backward()
        plan = explain_backward(*(x.detach().half() for x in leaves), arch=120)
    finally:
        torch.use_deterministic_algorithms(False)
    assert deterministic_backwards[2:] == [True, True, True]
    assert "torch.use_deterministic_algorithms" in plan.reasons["deterministic"]


# ---- DTensor -------------------------------------------------------------------------------------

TWO_RANKS = """
import os
import torch
import torch.distributed as dist
from flash_attn_sm120 import flash_attn_func  # learns of DTensor when that is imported
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

torch.set_num_threads(1)
child = os.fork()
rank = int(child != 0)
dist.init_process_group("gloo", init_method="file://" + FILE, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
q, k, v, sink = torch.randn(4, 6, 4, 8), torch.randn(4, 6, 2, 8), torch.randn(4, 6, 2, 8), torch.randn(4)

def step(*leaves):
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = flash_attn_func(*leaves[:3], learnable_sink=leaves[3], causal=True, return_lse=True)
    gradients = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
    return [out, lse, *gradients]

def shards(placement, sink_placement):
    placements = [placement] * 3 + [sink_placement]
    return [distribute_tensor(x.detach(), mesh, [p]) for x, p in zip((q, k, v, sink), placements)]

a, b, c, _ = shards(Shard(2), Shard(0))
compiled = torch.compile(lambda *x: flash_attn_func(*x)[0], fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(a, b, c).full_tensor(), flash_attn_func(q, k, v)[0])

expected = step(q, k, v, sink)
for placement, of_sink in ((Shard(0), Replicate()), (Shard(2), Shard(0)), (Replicate(), Replicate())):
    results = step(*shards(placement, of_sink))
    assert [x.placements for x in (results[0], *results[2:5])] == [(placement,)] * 4
    for x, y in zip(results, expected):
        torch.testing.assert_close(x.full_tensor(), y.detach())

with CommDebugMode() as communication, torch.no_grad():  # K and V are cut where they lie
    a, b, c, _ = shards(Shard(2), Shard(0))
    whole = [distribute_tensor(x.detach(), mesh, [Replicate()]) for x in (k, v)]
    communication.comm_counts.clear()
    out = flash_attn_func(a, *whole)[0]
    assert out.placements == (Shard(2),) and not communication.get_comm_counts()
    local = flash_attn_func(a, b, c)[0]
    assert not communication.get_comm_counts()
torch.testing.assert_close(local.full_tensor(), flash_attn_func(q, k, v)[0])

slopes = torch.rand(4, 4)  # of each sequence and head
for placement, of_slopes in ((Shard(0), Shard(0)), (Shard(2), Shard(1)), (Replicate(), Replicate())):
    parts = shards(placement, Replicate())[:3]
    own = distribute_tensor(slopes, mesh, [of_slopes])
    with CommDebugMode() as communication, torch.no_grad():
        out = flash_attn_func(*parts, alibi_slopes=own)[0]
    assert out.placements == (placement,) and not communication.get_comm_counts()
    torch.testing.assert_close(out.full_tensor(), flash_attn_func(q, k, v, alibi_slopes=slopes)[0])

def refused(words, *arguments, **options):
    try:
        flash_attn_func(*arguments, **options)
    except RuntimeError as error:  # NotImplementedError, too
        assert words in str(error), error
    else:
        raise AssertionError(words)

for placement in (Shard(1), Shard(3)):
    refused("redistribute() q to Shard(2) (heads), Shard(0)", *shards(placement, Replicate())[:3])
mqa = [distribute_tensor(x[:, :, :1].detach(), mesh, [Replicate()]) for x in (k, v)]
of_heads = distribute_tensor(torch.rand(4), mesh, [Replicate()])
for called in ((a, b, c), (q, b, c), (q.detach(), k.detach(), v.detach())):
    refused("take no DTensor", *called, score_mod=lambda s, b, h, i, j: s + of_heads[h])
refused("take no DTensor", a, b, c, mask_mod=lambda b, h, i, j: i >= j)
refused("take no DTensor", a, b, c, alibi_slopes=of_heads.detach().requires_grad_())
refused("part query heads from their 1 KV heads", a, *mqa)
dist.destroy_process_group()
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print("both ranks are done")
"""


def test_dtensor(tmp_path):
    """Batch or heads: each rank by itself, with the same placement; the rest is refused."""
    code = f"FILE = {str(tmp_path / 'store')!r}\n" + TWO_RANKS
    done = run_python(code, tmp_path)
    assert "both ranks are done" in done.stdout, done.stdout + done.stderr
