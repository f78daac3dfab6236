"""What torch follows a packed call by: each way is held against the direct call, which
test_varlen.py holds against a reference, or against the dense calls of its sequences."""

import functools
import inspect
import io

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from flash_attn_sm120 import _C, flash_attn_func, flash_attn_varlen_func, ops
from flash_attn_sm120.plan import VarlenOptions
from helpers.checks import assert_all_equal
from helpers.children import run_python
from helpers.devices import CPU, CUDA, params_of
from helpers.models import Transformer
from helpers.varlen import flat, make_batch, on

FORWARD, BACKWARD = "flash_attn_sm120.varlen_forward.default", "flash_attn_sm120.varlen_backward.default"  # fmt: skip


@pytest.fixture(params=params_of(CPU, CUDA))
def device(request):
    return request.param


@pytest.fixture
def batch(device):
    return packed(device)


def packed(device, lengths=(7, 0, 3), lengths_k=(9, 4, 4), **options):
    """Two query heads per KV head, of plain tensors."""
    batch = make_batch(
        device, lengths, lengths_k, (4, 2), (16, 24), device.dtypes[0], slack=0, **options
    )
    for name in ("q", "k", "v", "dout", "dlse"):  # NaN beyond seqused is of another test
        setattr(batch, name, getattr(batch, name).as_subclass(torch.Tensor).nan_to_num())
    batch.lengths = {n: x.as_subclass(torch.Tensor) for n, x in batch.lengths.items()}
    return batch


KINDS = {
    "packed": {},
    "packed q": {"packed": (True, False)},
    "packed k": {"packed": (False, True)},
    "seqused": {"packed": (False, False)},
    "packed, seqused": {"used": ([5, 0, 3], [9, 2, 1])},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def any_batch(device, request):
    return packed(device, **request.param)


def attend(batch, q=None, **options):
    q = batch.q if q is None else q
    return flash_attn_varlen_func(q, batch.k, batch.v, **batch.lengths, **options)[0]


def results_of(batch, *leaves, sink=None, **options):
    """out, lse and all gradients."""
    out, lse = flash_attn_varlen_func(
        *leaves, **batch.lengths, learnable_sink=sink, return_lse=True, **options
    )
    wanted = [*leaves, *([] if sink is None else [sink])]
    gradients = torch.autograd.grad((out, lse), wanted, (batch.dout, batch.dlse))
    return [out.detach(), lse.detach(), *gradients]


def leaves_of(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def compiled(function, **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def names_in(graph):
    return {str(node.target) for node in graph.nodes} & {FORWARD, BACKWARD}


# ---- the schema ----------------------------------------------------------------------------------


def test_schemas_have_every_option():
    """A row of csrc/options.h is an argument of both operators, a number with the same default; but
    for what is refused where torch follows a call, or is of dense calls alone."""
    parameters = inspect.signature(_C.backward).parameters
    inputs = {*ops.LENGTHS, ops.SLOPES, ops.SEED, "learnable_sink"}
    numbers = {name: p.default for name, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY}
    assert inputs <= numbers.keys() and VarlenOptions.__annotations__.keys() <= numbers.keys()
    refused = {
        "key_blocks",
        "query_blocks",
        "score_mod",
        "mask_mod",
        "k_descale",
        "v_descale",
        "q_descale",
    }
    for name in inputs | refused | {"attn_bias", "bias_gradient", "heads_first"}:
        del numbers[name]
    numbers["window_left"], numbers["window_right"] = numbers.pop("window_size")
    for op in (ops.VARLEN_FORWARD, ops.VARLEN_BACKWARD):
        arguments = [x for x in op._schema.arguments if x.kwarg_only]
        assert {x.name: x.default_value for x in arguments} == numbers
        assert {x.name for x in op._schema.arguments} >= inputs


CALLS = {
    "full": {},
    "bounds": {"max_seqlen_q": 7, "max_seqlen_k": 9, "causal": True},
    "window": {"window_left": 3, "window_right": 1, "softcap": 2.0, "deterministic": True},
}


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_opcheck(any_batch, options, sink):
    """Schema, derivatives and shapes without data agree with the kernel."""
    batch = any_batch
    lengths = ops.in_order(batch.lengths)
    sink = torch.randn(4, device=batch.q.device) if sink else None
    leaves = [*leaves_of(*batch.inputs), sink if sink is None else sink.requires_grad_()]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(ops.VARLEN_FORWARD, (*leaves, *lengths), options, test_utils=checks)
    with torch.no_grad():
        inputs = (*batch.inputs, sink)
        out, lse = ops.VARLEN_FORWARD(*inputs, *lengths, **options)
        for dlse in (None, batch.dlse):
            arguments = (batch.dout, dlse, *inputs, out, lse, *lengths)
            torch.library.opcheck(ops.VARLEN_BACKWARD, arguments, options, test_utils=checks)


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
def test_opcheck_compiled(batch, sink):
    sink = torch.randn(4, device=batch.q.device, requires_grad=True) if sink else None
    arguments = (*leaves_of(*batch.inputs), sink, *ops.in_order(batch.lengths))
    options = {"causal": True, "max_seqlen_q": 7}
    torch.library.opcheck(
        ops.VARLEN_FORWARD, arguments, options, test_utils="test_aot_dispatch_dynamic"
    )


# ---- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operator(any_batch, mode):
    q, k, v = any_batch.inputs

    def call(q, k, v, lengths):
        return flash_attn_varlen_func(q, k, v, **lengths, causal=True, return_lse=True)

    graph = make_fx(call, tracing_mode=mode)(q, k, v, any_batch.lengths)
    assert names_in(graph.graph) == {FORWARD}
    arguments = (q * 2, k, v, any_batch.lengths)
    assert_all_equal(graph(*arguments), call(*arguments))


def test_make_fx_of_a_training_step(batch):
    def step(q):
        (leaf,) = leaves_of(q)
        return torch.autograd.grad(attend(batch, leaf).square().sum(), leaf)[0]

    graph = make_fx(step)(batch.q)
    assert names_in(graph.graph) == {FORWARD, BACKWARD}
    assert_all_equal([graph(batch.q * 2)], [step(batch.q * 2)])


@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
def test_compile(device, dynamic):
    """No graph break with other lengths, totals and batch sizes, forward and backward."""

    def call(q, k, v, lengths, bound):
        return flash_attn_varlen_func(
            q, k, v, **lengths, causal=True, return_lse=True, max_seqlen_q=bound, deterministic=True
        )

    torch._dynamo.utils.counters.clear()
    function = compiled(call, dynamic=dynamic)
    for lengths in ((7, 0, 3), (2, 8), (1, 9, 4, 6)):
        batch = packed(device, lengths, lengths)
        results = []
        for attention in (function, call):
            leaves = leaves_of(*batch.inputs)
            outs = attention(*leaves, batch.lengths, max(lengths))
            results.append([*outs, *torch.autograd.grad(outs, leaves, (batch.dout, batch.dlse))])
        assert_all_equal(*results)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compile_once_for_all_totals(device):
    """Sizes are no reason to compile again, where those of the first call are all different:
    torch takes equal ones for one."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch.compiler.reset()
    function = torch.compile(attend_packed, fullgraph=True, backend=backend, dynamic=True)
    for lengths in ((7, 0, 3, 1, 2), (2, 8, 9), (12, 9, 4, 6), (5, 5)):
        batch = packed(device, lengths, lengths)
        cu_seqlens = batch.lengths["cu_seqlens_q"]
        arguments = (*batch.inputs, cu_seqlens, max(lengths))
        assert_all_equal([function(*arguments)], [attend_packed(*arguments)])
    assert len(compilations) == 1


def attend_packed(q, k, v, cu_seqlens, longest):
    bounds = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    return flash_attn_varlen_func(q, k, v, **lengths, **bounds, causal=True)[0]


class PackedTransformer(Transformer):
    """Of sequences that lie one after the other in one row of tokens."""

    def forward(self, tokens, positions, cu_seqlens):
        def attention(q, k, v):
            return attend_packed(q[0], k[0], v[0], cu_seqlens, 21)[None]

        x = self.tokens(tokens) + self.positions[positions]
        for block in self.blocks:
            block.attention = attention
            x = block(x)
        return self.head(x)


def test_compile_of_a_packed_training_step(device):
    """A small transformer learns in one graph what it learns eagerly; lengths are inputs."""
    packs = [(21, 4, 1, 14), (13, 21, 6), (5, 5, 5, 5, 5, 5, 5)]

    def curve(compile):
        torch.manual_seed(0)
        model = PackedTransformer(None).to(device.torch_device)
        step = compile(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for lengths in packs:
            tokens = torch.randint(16, (1, sum(lengths)))
            positions = torch.cat([torch.arange(n) for n in lengths])
            cu_seqlens = on(device, [sum(lengths[:i]) for i in range(len(lengths) + 1)])
            inputs = [x.to(device.torch_device) for x in (tokens, positions, cu_seqlens)]
            with torch.autocast(device.torch_device, torch.bfloat16, device == CUDA):
                predicted = step(*inputs)
            loss = F.cross_entropy(predicted[0].float(), inputs[0][0].roll(-1))
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
def test_export_round_trip(device, strict):
    """Saved and loaded, it computes other totals and batch sizes, and gradients."""

    class Module(torch.nn.Module):
        def forward(self, q, k, v, cu_seqlens):
            return attend_packed(q, k, v, cu_seqlens, None)

    batch, other = (packed(device, n, n) for n in ((7, 0, 3), (3, 9, 1, 4)))
    arguments, others = ((*leaves_of(*x.inputs), x.lengths["cu_seqlens_q"]) for x in (batch, other))
    total, ends = torch.export.Dim("total", min=2, max=64), torch.export.Dim("ends", min=2, max=64)
    shapes = ({0: total}, {0: total}, {0: total}, {0: ends})
    program = torch.export.export(Module(), arguments, dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert names_in(loaded.graph) == {FORWARD}
    outs = [f(*others) for f in (loaded.module(), Module())]
    gradients = [torch.autograd.grad(out.square().sum(), others[:3]) for out in outs]
    assert_all_equal([outs[0], *gradients[0]], [outs[1], *gradients[1]])


# ---- tensors without data ------------------------------------------------------------------------


def without_data(kind, batch):
    """The inputs and the lengths, on no memory."""
    place = (lambda x: x.to("meta")) if kind == "meta" else FakeTensorMode().from_tensor
    lengths = {name: place(x) for name, x in batch.lengths.items()}
    return [place(x) for x in batch.inputs], lengths


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_without_data(any_batch, kind):
    """Sizes, strides and types of the call and its gradients."""
    bare, lengths = without_data(kind, any_batch)
    results = []
    for inputs, of_call in ((any_batch.inputs, any_batch.lengths), (bare, lengths)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = flash_attn_varlen_func(*leaves, **of_call, return_lse=True)
        results.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), leaves)])
    for x, expected in zip(*results[::-1], strict=True):
        assert (x.shape, x.stride(), x.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert type(x) is type(bare[0]) and x.device == bare[0].device


@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
def test_shapes_of_pages_without_data(is_packed):
    shape = (12, 4, 16) if is_packed else (3, 4, 4, 16)
    q = torch.empty(shape, device="meta")
    k, v = (torch.empty(50, 8, 2, d, device="meta") for d in (16, 24))
    lengths = {"page_table": torch.empty(3, 6, dtype=torch.int32, device="meta")}
    lengths["seqused_k"] = torch.empty(3, dtype=torch.int32, device="meta")
    if is_packed:
        lengths["cu_seqlens_q"] = torch.empty(4, dtype=torch.int32, device="meta")
    out, lse = flash_attn_varlen_func(q, k, v, **lengths, return_lse=True)
    assert out.shape == (*shape[:-1], 24) and lse.shape == ((4, 12) if is_packed else (3, 4, 4))
    with pytest.raises(NotImplementedError, match="no gradient with page_table"):
        flash_attn_varlen_func(q.requires_grad_(), k, v, **lengths)
    with torch.no_grad():
        flash_attn_varlen_func(q, k, v, **lengths)


def test_pages_are_checked_without_data():
    q, table = torch.empty(3, 4, 4, 16, device="meta"), torch.empty(3, 6, device="meta").int()
    for rows in (0, 1025):
        k = torch.empty(50, rows, 2, 16, device="meta")
        with pytest.raises(ValueError, match=f"from 1 to 1024 rows .*, got {rows}"):
            flash_attn_varlen_func(q, k, k, page_table=table)
    k = torch.empty(50, 16, 2, 16, device="meta")
    for v, pages, message in (
        (k[:49], table, "v must have k's pages 50 in dimension 0, got 49"),
        (k[:, :8], table, "v must have k's page size 16 in dimension 1, got 8"),
        (k, table[:2], "page_table must have q's batch 3 in dimension 0, got 2"),
        (k, table[0], "page_table must have 2 dimensions, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_attn_varlen_func(q, k, v, page_table=pages)


BAD = {
    "rank": ({"cu_seqlens_k": None}, ValueError, "k must have 4 dimensions, got 3"),
    "type": ({"cu_seqlens_q": torch.zeros(4).long()}, TypeError, "cu_seqlens_q must be int32, got torch.int64"),
    "batch": ({"cu_seqlens_k": torch.zeros(3).int()}, ValueError, r"cu_seqlens_k must have batch \+ 1 = 4 in dimension 0, got 3"),
    "no batch": ({"cu_seqlens_q": torch.zeros(0).int()}, ValueError, r"cu_seqlens_q must have batch \+ 1 elements, got 0"),
    "used": ({"seqused_q": torch.zeros(4).int()}, ValueError, "seqused_q must have q's batch 3 in dimension 0, got 4"),
    "pages": ({"page_table": torch.zeros(3, 2).int()}, ValueError, "page_table takes no cu_seqlens_k"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_lengths_are_checked_without_data(case):
    """By the messages of calls with data."""
    change, error, message = BAD[case]
    batch = packed(CPU)
    inputs, lengths = without_data("meta", batch)
    change = {name: x if x is None else x.to("meta") for name, x in change.items()}
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(*inputs, **lengths | change)


def test_lengths_must_be_on_the_device_without_data(batch):
    inputs, lengths = without_data("meta", batch)
    lengths["cu_seqlens_q"] = batch.lengths["cu_seqlens_q"]
    with pytest.raises(ValueError, match="cu_seqlens_q must be on q's device, meta, got"):
        flash_attn_varlen_func(*inputs, **lengths)


# ---- pages ---------------------------------------------------------------------------------------


@pytest.fixture
def paged(device):
    """q (3, 4, 4, 16), pages of 8 rows, and lengths."""
    place = device.place
    q, k, v = (place(torch.randn(s).to(device.dtypes[0])) for s in ((3, 4, 4, 16), (50, 8, 2, 16), (50, 8, 2, 24)))  # fmt: skip
    table = place(torch.randperm(50)[:18].view(3, 6).to(torch.int32))
    return (q, k, v), {"page_table": table, "seqused_k": on(device, [5, 48, 0])}


def test_pages_where_torch_follows(paged):
    """opcheck, one graph for all sizes, export, make_fx; of both functions."""
    inputs, lengths = paged
    torch.library.opcheck(
        ops.VARLEN_FORWARD, (*inputs, None, *ops.in_order(lengths)), {"causal": True}
    )

    def call(q, k, v, lengths):
        return flash_attn_func(q, k, v, **lengths, causal=True, return_lse=True)

    expected = flash_attn_varlen_func(*inputs, **lengths, causal=True, return_lse=True)
    assert_all_equal(compiled(call, dynamic=True)(*inputs, lengths), expected)
    graph = make_fx(call, tracing_mode="symbolic")(*inputs, lengths)
    assert names_in(graph.graph) == {FORWARD}
    assert_all_equal(graph(*inputs, lengths), expected)
    mapped = torch.vmap(lambda q: call(q, *inputs[1:], lengths)[0])(torch.stack([inputs[0]] * 2))
    assert_all_equal(mapped, [expected[0]] * 2)


def test_autocast_leaves_pages_alone(device, paged):
    (q, k, v), lengths = paged
    inputs = (q.float(), k.bfloat16(), v.bfloat16())
    expected = flash_attn_func(q.bfloat16(), *inputs[1:], **lengths)[0]

    def call(*inputs):
        return flash_attn_func(*inputs, **lengths)[0]

    with torch.autocast(device.torch_device, torch.bfloat16):
        for function in (call, compiled(call)):
            assert_all_equal([function(*inputs)], [expected])


# ---- functorch -----------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f, qs: torch.func.grad(lambda x: f(x).square().sum())(qs[0]),
    "vjp": lambda f, qs: torch.func.vjp(f, qs[0])[1](f(qs[1]))[0],
    "vmap": lambda f, qs: torch.vmap(f)(qs),
    "vmap, other dims": lambda f, qs: torch.vmap(f, 1, 2)(qs.movedim(0, 1)),
    "vmap of grad": lambda f, qs: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(qs),
    "grad of vmap": lambda f, qs: torch.func.grad(lambda x: torch.vmap(f)(x).square().sum())(qs),
    "jacrev": lambda f, qs: torch.func.jacrev(lambda x: f(x).sum((-1, -3)))(qs[0]),
    "make_fx of grad": lambda f, qs: make_fx(torch.func.grad(lambda x: f(x).square().sum()))(qs[1])(qs[0]),
}  # fmt: skip


def by_sequences(batch, q, sink=None):
    """The dense call of each sequence."""
    rows = [
        flash_attn_func(flat(q)[None, a], flat(batch.k)[None, b], flat(batch.v)[None, b], learnable_sink=sink, causal=True)[0][0]
        for a, b in zip(*(side.slices() for side in batch.sides), strict=True)
    ]  # fmt: skip
    return torch.cat(rows).reshape(*q.shape[:-1], -1)


@pytest.mark.parametrize("kind", ["packed", "packed k"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(device, transform, kind):
    batch = packed(device, (7, 7) if kind == "packed k" else (7, 3), (9, 4), **KINDS[kind])
    qs = torch.stack([batch.q, 2 * batch.q, batch.q + 1])
    ours = transform(functools.partial(attend, batch, causal=True), qs)
    theirs = transform(functools.partial(by_sequences, batch), qs)
    near = 1e-4 if device == CPU else 3e-2
    torch.testing.assert_close(ours, theirs, rtol=near, atol=near * max(1, theirs.abs().max()))


def test_vmap_of_everything(batch):
    """Keys, values and sinks, too, and every gradient: as one call after another."""
    inputs = [torch.stack([x, 2 * x, x - 1]) for x in batch.inputs]
    inputs.append(torch.randn(3, 4, device=batch.q.device))

    def loss(q, k, v, sink):
        out, lse = flash_attn_varlen_func(
            q, k, v, **batch.lengths, learnable_sink=sink, causal=True, return_lse=True
        )
        return out.float().square().sum() + lse.nan_to_num(0, 0, 0).sum()

    step = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    for in_dims in ((0, 0, 0, 0), (0, None, None, 0), (None, 0, 0, None)):
        arguments = [x if d == 0 else x[0] for x, d in zip(inputs, in_dims, strict=True)]
        ours = torch.vmap(step, in_dims)(*arguments)
        each = [
            step(*(x[i] if d == 0 else x for x, d in zip(arguments, in_dims, strict=True)))
            for i in range(3)
        ]
        theirs = tuple(torch.stack(x) for x in zip(*each, strict=True))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 if batch.q.device.type == "cpu" else 3e-2)  # fmt: skip


def test_vmap_over_lengths_is_refused(batch):
    lengths = batch.lengths["cu_seqlens_q"].expand(3, -1)

    def call(cu_seqlens_q):
        return attend_packed(batch.q, batch.k[:10], batch.v[:10], cu_seqlens_q, 7)

    with pytest.raises(NotImplementedError, match="vmap over lengths or pages is not supported"):
        torch.vmap(call)(lengths)


def test_further_derivatives_are_refused(batch):
    (q,) = leaves_of(batch.q)
    with pytest.raises(NotImplementedError, match="flash_attn_sm120 has no forward derivative"):
        torch.func.jvp(functools.partial(attend, batch), (batch.q,), (batch.q,))
    (first,) = torch.autograd.grad(attend(batch, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attn_sm120 has no second derivative"):
        first.sum().backward()


# ---- modes, subclasses, observers ----------------------------------------------------------------


def test_subclasses(batch):
    out = attend(batch, TwoTensor(batch.q, batch.q * 2))
    assert type(out) is TwoTensor
    assert_all_equal([out.a, out.b], [attend(batch), attend(batch, batch.q * 2)])


@pytest.mark.parametrize("name", ["q", "k", "v", "learnable_sink"])
def test_lazy_negation(batch, name):
    inputs = dict(zip("qkv", batch.inputs, strict=True))
    inputs |= {"learnable_sink": torch.randn(4, device=batch.q.device), **batch.lengths}
    changed = [inputs | {name: f(inputs[name])} for f in (torch._neg_view, torch.neg)]
    assert_all_equal(*(flash_attn_varlen_func(**x, return_lse=True) for x in changed))


def test_plain_calls_go_straight(batch, monkeypatch):
    monkeypatch.setattr(ops, "VARLEN_FORWARD", None)
    monkeypatch.setattr(ops, "VARLEN_BACKWARD", None)
    attend(batch)
    results_of(batch, *leaves_of(*batch.inputs))


def test_direct_gradients_are_those_of_the_operator(any_batch):
    sinks = [torch.linspace(-1, 1, 4, device=any_batch.q.device).requires_grad_() for _ in "ab"]
    options = {"causal": True, "deterministic": True}
    direct = results_of(any_batch, *leaves_of(*any_batch.inputs), sink=sinks[0], **options)
    leaves = [*leaves_of(*any_batch.inputs), sinks[1]]
    results = ops.VARLEN_FORWARD(*leaves, *ops.in_order(any_batch.lengths), **options)
    gradients = torch.autograd.grad(results, leaves, (any_batch.dout, any_batch.dlse))
    assert_all_equal(direct, [*results, *gradients])


@pytest.mark.parametrize("is_saved", [False, True], ids=["recomputed", "saved"])
def test_selective_checkpointing(batch, is_saved):
    save = [torch.ops.flash_attn_sm120.varlen_forward.default] if is_saved else []
    contexts = functools.partial(create_selective_checkpoint_contexts, save)
    block = functools.partial(attend, batch, deterministic=True)
    (q,) = leaves_of(batch.q)
    out = checkpoint(block, q, use_reentrant=False, context_fn=contexts)
    ours, theirs = (torch.autograd.grad(x.square().sum(), q)[0] for x in (out, block(q)))
    assert_all_equal([ours], [theirs])


def test_profiler(batch):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(batch, *leaves_of(batch.q)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert names >= {"flash_attn_sm120::varlen_forward", "flash_attn_sm120::varlen_backward"}


def test_autocast(device):
    batch = packed(device)
    q = batch.q.float()
    batch.k, batch.v = batch.k.float(), batch.v.float()
    expected = flash_attn_varlen_func(*(x.bfloat16() for x in (q, batch.k, batch.v)), **batch.lengths)[0]  # fmt: skip
    with torch.autocast(device.torch_device, torch.bfloat16):
        for function in (attend, compiled(attend)):
            assert_all_equal([function(batch, q)], [expected])


FLOPS = {  # sequences of 7, 0, 3 queries and 9, 4, 4 keys
    "packed": ({}, {}, 10 * 17),
    "bounds": ({}, {"max_seqlen_q": 7, "max_seqlen_k": 9}, 10 * 9),
    "bound of queries": ({}, {"max_seqlen_q": 7}, 7 * 17),
    "packed q": ({"packed": (True, False)}, {}, 10 * 9),
    "packed k": ({"packed": (False, True)}, {"max_seqlen_k": 9}, 7 * 17),
    "seqused": ({"packed": (False, False)}, {"max_seqlen_q": 1}, 3 * 7 * 9),
}


@pytest.mark.parametrize("case", FLOPS)
def test_flops(device, case):
    """Bounds by shapes: no length is read. 2 products of the forward, 5 of the backward."""
    kind, options, pairs = FLOPS[case]
    batch = packed(device, **kind)
    with FlopCounterMode(display=False) as counter:
        attend(batch, *leaves_of(batch.q), **options).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts == {
        "flash_attn_sm120.varlen_forward": 2 * 4 * pairs * (16 + 24),
        "flash_attn_sm120.varlen_backward": 2 * 4 * pairs * (3 * 16 + 2 * 24),
    }


def test_flops_of_pages():
    q = torch.empty(3, 1, 4, 16, device="meta")
    k = torch.empty(50, 8, 2, 16, device="meta")
    pages = torch.empty(3, 6, dtype=torch.int32, device="meta")
    for bound, keys in ((None, 48), (20, 20)):
        with FlopCounterMode(display=False) as counter:
            flash_attn_varlen_func(q, k, k, page_table=pages, max_seqlen_k=bound)
        assert counter.get_total_flops() == 2 * 4 * 3 * keys * 32


# ---- arguments -----------------------------------------------------------------------------------


def test_results_in_place_are_refused_where_torch_follows(batch):
    with pytest.raises(
        RuntimeError, match=r"flash_attn_varlen_func\(\.\.\., out=, lse=\) does not"
    ):
        make_fx(lambda q: attend(batch, q, out=torch.empty_like(batch.dout)))(batch.q)


def test_lengths_are_tensors_where_torch_follows(batch):
    batch.lengths["cu_seqlens_q"] = [0, 7, 7, 10]
    with pytest.raises(
        TypeError, match=r"cu_seqlens_q must be a torch\.Tensor where torch follows"
    ):
        torch.func.grad(lambda q: attend(batch, q).sum())(batch.q)


# ---- DTensor -------------------------------------------------------------------------------------

TWO_RANKS = """
import os
import torch
import torch.distributed as dist
from flash_attn_sm120 import flash_attn_varlen_func
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

torch.set_num_threads(1)
child = os.fork()
rank = int(child != 0)
dist.init_process_group("gloo", init_method="file://" + FILE, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
q, k, v, sink = torch.randn(9, 4, 8), torch.randn(11, 2, 8), torch.randn(11, 2, 8), torch.randn(4)
cu_q, cu_k = torch.tensor([0, 2, 9]).int(), torch.tensor([0, 5, 11]).int()

def step(lengths, *leaves):
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = flash_attn_varlen_func(
        *leaves[:3], *[None, *lengths], learnable_sink=leaves[3], causal=True, return_lse=True
    )
    gradients = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
    return [out, lse, *gradients]

def shards(placement, sink_placement):
    placements = [placement] * 3 + [sink_placement]
    return [distribute_tensor(x.detach(), mesh, [p]) for x, p in zip((q, k, v, sink), placements)]

lengths = [distribute_tensor(x, mesh, [Replicate()]) for x in (cu_q, cu_k)]
expected = step((cu_q, cu_k), q, k, v, sink)
for placement, of_sink in ((Shard(1), Shard(0)), (Replicate(), Replicate())):
    results = step(lengths, *shards(placement, of_sink))
    assert [x.placements for x in (results[0], *results[2:5])] == [(placement,)] * 4
    for x, y in zip(results, expected):
        torch.testing.assert_close(x.full_tensor(), y.detach())

try:
    flash_attn_varlen_func(*shards(Shard(0), Replicate())[:3], None, *lengths)
except RuntimeError as error:
    assert "redistribute() q to Shard(1) (heads), Replicate()" in str(error), error
else:
    raise AssertionError("packed rows were sharded")
dist.destroy_process_group()
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print("both ranks are done")
"""


def test_dtensor(tmp_path):
    """Heads: each rank by itself, with the same placement; packed rows belong together."""
    code = f"FILE = {str(tmp_path / 'store')!r}\n" + TWO_RANKS
    done = run_python(code, tmp_path)
    assert "both ranks are done" in done.stdout, done.stdout + done.stderr
