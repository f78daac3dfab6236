"""Mods and lists of blocks where torch follows a call: as in the same call that it does not follow."""

import functools
import io
from typing import NamedTuple

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flash_attn_sm120 import block_mask, flash_attn_func, flash_attn_varlen_func
from flash_attn_sm120.mods import headers, operators
from flash_attn_sm120.mods.attention import translate
from flash_attn_sm120.mods.program import graph_of, mod_of, program_of, translated
from flash_attn_sm120.mods.trace import trace
from helpers.children import run_python
from helpers.devices import CPU, CUDA, EMULATOR, params_of
from helpers.mods import mask_mods, score_mods, tensors_of

HEADS, SEQLEN = 4, 64


@pytest.fixture(params=params_of(CPU, CUDA))
def device(request):
    return request.param


@pytest.fixture
def leaves(device):
    """leaves(seqlen) -> q, k, v that require gradients."""

    def make(seqlen=SEQLEN, batch=2):
        shape = (batch, seqlen, HEADS, 16)
        drawn = [torch.randn(shape, dtype=device.dtypes[0]) for _ in range(3)]
        return [x.to(device.torch_device).requires_grad_() for x in drawn]

    return make


@pytest.fixture
def table(device):
    return torch.randn(HEADS, 2 * SEQLEN, device=device.torch_device, requires_grad=True)


@pytest.fixture
def documents(device):
    return lambda length, seqlen=SEQLEN: torch.arange(seqlen).to(device.torch_device) // length


def relative(q, k, v, table, *, middle=SEQLEN):
    def score_mod(s, b, h, i, j):
        return s + table[h, i - j + middle]

    return flash_attn_func(q, k, v, score_mod=score_mod)[0]


def packed(q, k, v, document):
    def mask_mod(b, h, i, j):
        return (document[i] == document[j]) & (i >= j)

    return flash_attn_func(q, k, v, mask_mod=mask_mod)[0]


def compiled(function, backend="aot_eager", **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def gradients(out, leaves):
    """Atomics add up in any order."""
    leaves = [x for x in leaves if getattr(x, "requires_grad", False)]
    return torch.autograd.grad(out.square().sum(), leaves)


def assert_same(followed, plain, *arguments):
    outs = [function(*arguments) for function in (followed, plain)]
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    near = 1e-5 if outs[0].dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*(gradients(out, arguments) for out in outs), rtol=near, atol=near)


# ---- compile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(leaves, table, backend):
    """Gradients of a captured table, too; another table is another input."""
    function = compiled(relative, backend)
    for factor in (1.0, 2.0):
        other = (table * factor).detach().requires_grad_()
        assert_same(function, relative, *leaves(), other)


def test_captured_tensors_are_inputs(leaves, documents):
    """Other document ids, in one graph."""
    count = CountingBackend()
    function = compiled(packed, count)
    q, k, v = leaves()
    for length in (9, 3, 40):
        assert_same(function, packed, q, k, v, documents(length))
    assert count.graphs == 1


class CountingBackend:
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


def test_lengths_are_dynamic(leaves, documents):
    """Also those of captured tensors, where no mod asks for one."""
    count = CountingBackend()
    function = compiled(packed, count, dynamic=True)
    for seqlen in (20, 23, 64):
        assert_same(function, packed, *leaves(seqlen), documents(5, seqlen))
    assert count.graphs == 1


@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
def test_sizes_that_a_mod_reads(leaves, table, dynamic):
    """They are constants of a kernel, and never stale."""

    def call(q, k, v, table):
        middle = table.shape[1] // 2
        by_shape = flash_attn_func(
            q, k, v, score_mod=lambda s, b, h, i, j: s + table[h, i - j + table.shape[1] // 2]
        )[0]
        return by_shape + relative(q, k, v, table, middle=middle)

    function = compiled(call, dynamic=dynamic)
    for width in (2 * SEQLEN, 100, 80):
        assert_same(function, call, *leaves(30), table[:, :width].detach().requires_grad_())


@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
def test_captured_numbers(leaves, table, dynamic):
    """Another number is another kernel."""

    def call(q, k, v, table, number, factor):
        def score_mod(s, b, h, i, j):
            return s * factor + table[h, i - j + number]

        return flash_attn_func(q, k, v, score_mod=score_mod)[0]

    function = compiled(call, dynamic=dynamic)
    for number, factor in ((40, 1.5), (41, 1.5), (42, 0.5)):
        given = *leaves(20), table, number, factor
        torch.testing.assert_close(function(*given), call(*given), rtol=0, atol=0)


class Layer(torch.nn.Module):
    """A table that is a parameter, a mod that is a method, and a number that changes."""

    def __init__(self, device):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(HEADS, 2 * SEQLEN, device=device))
        self.middle = SEQLEN

    def score_mod(self, s, b, h, i, j):
        return s + self.table[h, i - j + self.middle]

    def forward(self, q, k, v, document):
        return flash_attn_func(
            q,
            k,
            v,
            score_mod=self.score_mod,
            mask_mod=lambda b, h, i, j: document[i] == document[j],
        )[0]


def test_module(device, leaves, documents):
    layer = Layer(device.torch_device)
    function = compiled(layer)
    for layer.middle in (SEQLEN, SEQLEN - 1):
        given = *leaves(), documents(11)
        outs = [f(*given) for f in (function, layer)]
        torch.testing.assert_close(*outs, rtol=0, atol=0)
        ours, theirs = (torch.autograd.grad(x.square().sum(), layer.table)[0] for x in outs)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_packed_sequences(device, table):
    def call(q, k, v, table, lengths):
        return flash_attn_varlen_func(
            *(q, k, v),
            **{"cu_seqlens_q": lengths, "cu_seqlens_k": lengths},
            score_mod=lambda s, b, h, i, j: s + table[h, i - j + SEQLEN],
        )[0]

    q, k, v = (
        torch.randn(30, HEADS, 16, dtype=device.dtypes[0], device=device.torch_device)
        .requires_grad_()
        for _ in range(3)
    )  # fmt: skip
    function = compiled(call)
    for lengths in ([0, 7, 30], [0, 29, 30]):
        cu_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device.torch_device)
        assert_same(function, call, q, k, v, table, cu_seqlens)


def test_beside_other_options(device, leaves, table):
    def call(q, k, v, sink, table, width):
        return flash_attn_func(
            *(q, k, v),
            learnable_sink=sink,
            softcap=3.0,
            window_size=(width, q.shape[1] // 2),
            mask_mod=lambda b, h, i, j: (i + j) % 3 != 1,
            score_mod=lambda s, b, h, i, j, aux: s + aux[0][h][i],
            aux_tensors=[table],
        )[0]

    sink = torch.randn(HEADS, device=device.torch_device, requires_grad=True)
    assert_same(compiled(call, dynamic=True), call, *leaves(30), sink, table, 9)


def test_learned_slopes(device, leaves):
    slopes = torch.rand(HEADS, device=device.torch_device, requires_grad=True)

    def call(q, k, v, slopes):
        return flash_attn_func(q, k, v, alibi_slopes=slopes, causal=True)[0]

    assert_same(compiled(call), call, *leaves(), slopes)


def test_under_autocast(device, leaves, table):
    def call(q, k, v, table):
        with torch.autocast(device.torch_device, torch.bfloat16):
            return relative(q, k, v, table)

    given = [x.detach().float().requires_grad_() for x in leaves()]
    assert compiled(call)(*given, table).dtype == torch.bfloat16
    assert_same(compiled(call), call, *given, table)


def test_checkpoint(leaves, table):
    def call(*given):
        return checkpoint(relative, *given, use_reentrant=False)

    for function in (call, compiled(call)):
        assert_same(function, relative, *leaves(), table)


def test_tracing_saves_nothing_for_a_checkpoint():
    """A mod is traced in the first call, and not again when a checkpoint repeats it."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(seen.append, lambda x: x):
        trace("score_mod", lambda s, b, h, i, j: s * s.abs() + s**3, gradient=True)
    assert not seen


def test_graph_break_in_a_mod(leaves):
    """Where a graph may break, the call is an eager one."""

    def call(q, k, v):
        return flash_attn_func(q, k, v, score_mod=lambda s, b, h, i, j: (print(end=""), s * 2)[1])[
            0
        ]

    torch.compiler.reset()
    assert_same(torch.compile(call, backend="aot_eager"), call, *leaves())


# ---- lists of blocks -----------------------------------------------------------------------------


class Lists(NamedTuple):
    """FlashAttention-4's BlockSparseTensorsTorch."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


@pytest.mark.parametrize("with_score", [False, True], ids=["", "score_mod"])
def test_block_masks(device, leaves, documents, table, with_score):
    def call(q, k, v, table, mask):
        more = {"score_mod": lambda s, b, h, i, j: s + table[h, j]} if with_score else {}
        return flash_attn_func(q, k, v, block_sparse_tensors=mask, **more)[0] + table.sum() * 0

    function = compiled(call)
    wide = table[:, :1].expand(-1, 256)
    for length in (9, 3, 40):
        document = documents(length, 256)

        def mask_mod(b, h, i, j, document=document):
            return document[i] == document[j]

        mask = block_mask.create_block_mask(
            mask_mod, None, None, 256, 256, 128, device.torch_device
        )
        assert_same(function, call, *leaves(256), wide, mask)


@pytest.mark.parametrize("follow", [compiled, lambda f: make_fx_of(f)], ids=["compile", "make_fx"])
def test_lists_without_a_mod(device, leaves, follow):
    def call(q, k, v, counts, indices):
        lists = Lists(counts, indices, block_size=(128, 128))
        return flash_attn_func(q, k, v, block_sparse_tensors=lists)[0]

    function = follow(call)
    for listed in ([[0, 1, 2], [1, 2, 0], [2, 0, 1]], [[2, 1, 0], [0, 1, 2], [0, 2, 1]]):
        counts = torch.tensor([[[2, 1, 2]]], dtype=torch.int32, device=device.torch_device)
        indices = torch.tensor(listed, dtype=torch.int32, device=device.torch_device)[None, None]
        assert_same(function, call, *leaves(384), counts, indices)


# ---- graphs --------------------------------------------------------------------------------------


def make_fx_of(function, mode="real"):
    """Traced at the first call."""
    graphs = []

    def call(*arguments):
        if not graphs:
            graphs.append(make_fx(lambda *x: function(*x), tracing_mode=mode)(*arguments))
        return graphs[0](*arguments)

    return call


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(leaves, documents, mode):
    function = make_fx_of(packed, mode)
    for length in (9, 3):
        assert_same(function, packed, *leaves(), documents(length))
    if mode == "symbolic":
        assert_same(function, packed, *leaves(30), documents(4, 30))


def test_make_fx_of_a_training_step(leaves, table):
    def step(q, k, v, table):
        given = [x.detach().requires_grad_() for x in (q, k, v, table)]
        return gradients(relative(*given), given)

    given = *leaves(), table
    graph = make_fx(step)(*given)
    names = {str(node.target) for node in graph.graph.nodes}
    assert {str(operators.FORWARD), str(operators.BACKWARD)} <= names
    torch.testing.assert_close(graph(*given), step(*given), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export(device, leaves, documents, strict):
    layer = Layer(device.torch_device)
    seqlen = torch.export.Dim("seqlen", min=2, max=SEQLEN)
    shapes = *[{1: seqlen}] * 3, {0: seqlen}
    given = *leaves(), documents(9)
    exported = torch.export.export(layer, given, strict=strict, dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert_same(loaded, layer, *leaves(31), documents(5, 31))


def test_exported_to_another_process(tmp_path, leaves, documents):
    """The operator has all of a mod: the other process has never seen the callable."""

    class Packed(torch.nn.Module):
        def forward(self, q, k, v, document):
            return packed(q, k, v, document)

    given = *(x.detach().cpu() for x in leaves(10)), documents(3, 10).cpu()
    torch.export.save(torch.export.export(Packed(), given), tmp_path / "packed.pt2")
    torch.save([*given, packed(*given)], tmp_path / "given.pt")
    done = run_python(
        "import torch, flash_attn_sm120\n"
        f"*given, out = torch.load({str(tmp_path / 'given.pt')!r})\n"
        f"loaded = torch.export.load({str(tmp_path / 'packed.pt2')!r}).module()\n"
        "assert torch.equal(loaded(*given), out)\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_fake_and_meta():
    def shapes(device):
        q, table = (
            torch.empty(2, 9, HEADS, 16, device=device),
            torch.empty(HEADS, 20, device=device),
        )
        call = flash_attn_func(
            q, q, q[..., :8], score_mod=lambda s, b, h, i, j: s + table[h, i - j], return_lse=True
        )
        return [(x.shape, x.device.type) for x in call]

    sizes = [(2, 9, HEADS, 8), (2, HEADS, 9)]
    with FakeTensorMode():
        assert shapes("cpu") == [(size, "cpu") for size in sizes]
    assert shapes("meta") == [(size, "meta") for size in sizes]


def test_flops(leaves):
    """As SDPA's."""
    counts = []
    for options in ({}, {"score_mod": lambda s, b, h, i, j: s * 2}):
        with FlopCounterMode(display=False) as counter:
            flash_attn_func(*leaves(), **options)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---- transforms ----------------------------------------------------------------------------------


def test_vmap(leaves, table):
    q, k, v = (torch.stack([x.detach(), x.detach() * 2]) for x in leaves(20))
    tables = torch.stack([table.detach(), -table.detach()])
    expected = [relative(*x) for x in zip(q, k, v, tables, strict=True)]
    got = torch.vmap(relative)(q, k, v, tables)
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=0)
    shared = torch.vmap(relative, in_dims=(0, 0, 0, None))(q, k, v, tables[0])
    torch.testing.assert_close(shared[0], expected[0], rtol=0, atol=0)


def test_gradients_of_each(leaves, table):
    q, k, v = (torch.stack([x.detach(), x.detach() * 2]) for x in leaves(20))

    def loss(table, *tensors):
        return relative(*tensors, table).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(table.detach(), q, k, v)
    for i, tensors in enumerate(zip(q, k, v, strict=True)):
        (expected,) = torch.autograd.grad(loss(table, *tensors), table)
        torch.testing.assert_close(got[i], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wants_lse", [False, True], ids=["", "lse"])
def test_opcheck(device, leaves, table, documents, wants_lse):
    q, k, v = leaves()
    score, of_score = program_of("score_mod", lambda s, b, h, i, j: s + table[h, i - j + SEQLEN])
    document = documents(9)
    mask, of_mask = program_of("mask_mod", lambda b, h, i, j: document[i] == document[j])
    none = [None] * 7
    options = {"score_mod": score, "mask_mod": mask, "causal": True}
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    given = (q, k, v, None, of_score, of_mask, [], [], *none)
    forward_checks = [*checks, "test_aot_dispatch_dynamic"]
    near = {"atol": 1e-2, "rtol": 1e-2}  # atomics add up in any order
    torch.library.opcheck(operators.FORWARD, given, options, test_utils=forward_checks, **near)
    out, lse = (x.detach() for x in operators.FORWARD(*given, **options))
    dlse = torch.randn_like(lse) if wants_lse else None
    arguments = (torch.randn_like(out), dlse, *given[:4], out, lse, *given[4:])
    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
    options["wanted"] = [wants_lse]
    torch.library.opcheck(operators.BACKWARD, arguments, options, test_utils=checks)


def test_second_derivatives_are_refused(leaves, table):
    given = *leaves(), table
    out = make_fx(lambda *x: relative(*x))(*given)(*given)
    (gradient,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", params_of(EMULATOR, CUDA))
@pytest.mark.parametrize("with_lists", [False, True], ids=["", "lists"])
def test_kernels(device, with_lists):
    """What the operators call on CUDA, held against the CPU; the dispatcher has no emulated GPU."""
    q, k, v, dout = (torch.randn(1, 150, 2, 64).to(device.dtypes[0]) for _ in range(4))
    table, document = torch.randn(2, 320), torch.arange(150) // 40
    score, _ = program_of("score_mod", lambda s, b, h, i, j: s + table[h, i - j + 160])
    mask, _ = program_of("mask_mod", lambda b, h, i, j: document[i] == document[j])
    blocks = block_mask._lists_of(torch.ones(3, 3, dtype=torch.uint8).triu()[None, None])
    given = [q, k, v, None, [table], [document], list(blocks) if with_lists else [], []]
    options = {"score_mod": score, "mask_mod": mask}
    options["block_sizes"] = [64, 64] if with_lists else []

    def both_directions(place):
        tensors = torch.utils._pytree.tree_map_only(torch.Tensor, place, given)
        out, lse = operators._forward(*tensors, *[None] * 7, **options)
        arguments = (place(dout), None, *tensors[:4], out, lse, *tensors[4:])
        dq, dk, dv, _, of_captured = operators._backward(*arguments, wanted=[True], **options)
        return [plain(x).float().cpu() for x in (out, lse, dq, dk, dv, *of_captured)]

    pairs = zip(both_directions(device.place), both_directions(lambda x: x), strict=True)
    for i, (got, expected) in enumerate(pairs):
        shown = expected != -torch.inf
        assert torch.equal(got[~shown], expected[~shown]), i
        largest = expected[shown].abs().max()
        assert (got - expected)[shown].abs().max() <= 2e-2 * largest, i


def plain(x):
    return x.as_subclass(torch.Tensor)


# ---- the text of a mod ---------------------------------------------------------------------------


ALL = [
    *(("score_mod", name) for name in score_mods(dict.fromkeys(tensors_of(CPU), torch.zeros(1)))),
    *(("mask_mod", name) for name in mask_mods(dict.fromkeys(tensors_of(CPU), torch.zeros(1)))),
]


@pytest.mark.parametrize("kind,name", ALL)
def test_texts_make_the_kernels_of_their_callables(kind, name):
    tensors = tensors_of(CPU)
    tensors["table"].requires_grad_()
    mod = (score_mods if kind == "score_mod" else mask_mods)(tensors)[name]
    text, captured = program_of(kind, mod)
    for gradient in (False, True):
        expected = translate(kind, mod, None, [], gradient)
        got = translated(kind, text, captured, gradient)
        assert headers.text(got[0]) == headers.text(expected[0])
    assert program_of(kind, mod_of(kind, text, captured)) == (text, captured)


def test_one_tensor_captured_twice():
    """By one call of the operator, and not by the next."""
    text = "v0 = index.Tensor(captured0, [h])\nv1 = index.Tensor(captured1, [h])\n"
    text += "v2 = mul.Tensor(v0, v1)\nv3 = add.Tensor(score, v2)\nreturn v3"
    one, two = torch.rand(4), torch.rand(4)
    translated("score_mod", text, [one, one], False)
    assert [x.tolist() for x in translated("score_mod", text, [one, two], False)[1]] == [
        one.tolist(), two.tolist()
    ]  # fmt: skip
    assert graph_of("score_mod", text, [one, two]).captured == [one, two]


@pytest.mark.parametrize(
    "text",
    ["", "1 +", "return", "v0 = system.default('ls')\nreturn v0", "import os\nreturn os",
     "v0 = index.nothing(score)\nreturn v0", "v0 = add.Tensor(score, open('x'))\nreturn v0"],
)  # fmt: skip
def test_other_texts(text):
    with pytest.raises(ValueError, match=r"not .* of a mod"):
        mod_of("score_mod", text, [])(*(torch.zeros(()) for _ in range(5)))


# ---- refused -------------------------------------------------------------------------------------

REFUSED = {
    "operation": (lambda s, b, h, i, j: torch.erfinv(s), "aten.erfinv"),
    "type": (lambda s, b, h, i, j: i - j, "must return a floating-point tensor"),
    "branch": (lambda s, b, h, i, j: s if i > j else s * 2, "(?i)data-dependent branching"),
}


@pytest.mark.parametrize("mod,message", REFUSED.values(), ids=REFUSED)
def test_refused(leaves, mod, message):
    with pytest.raises(Exception, match=message):
        compiled(lambda *x: flash_attn_func(*x, score_mod=mod)[0])(*leaves())
    q, k, v = leaves()
    assert_same(compiled(packed), packed, q, k, v, torch.zeros(SEQLEN, device=q.device))


def test_out_is_refused(leaves):
    q, k, v = (x.detach() for x in leaves())
    call = functools.partial(flash_attn_func, score_mod=lambda s, b, h, i, j: s * 2)
    with pytest.raises(RuntimeError, match="out=, lse="), FlopCounterMode(display=False):
        call(q, k, v, out=torch.empty_like(q))


def test_views_of_captured_tensors(leaves, table):
    """An index into one would be one into the tensor itself."""
    with pytest.raises(NotImplementedError, match=r"aten\.view"):
        flash_attn_func(*leaves(), score_mod=lambda s, b, h, i, j: s + table.view(-1)[h * 8 + i])


def test_transforms_that_are_refused(device, leaves):
    """Each by name: the same dropout in every element, gradients of a batch, forward derivatives."""
    q, k, v = leaves(20)
    seed = torch.tensor([1, 2], device=q.device)
    call = functools.partial(flash_attn_func, score_mod=lambda s, b, h, i, j: s * 2)
    with pytest.raises(NotImplementedError, match="vmap with dropout_p"):
        torch.vmap(lambda x: call(x, x, x, dropout_p=0.5, dropout_seed=seed)[0])(q[None])
    with pytest.raises(NotImplementedError, match="no forward derivative"):
        torch.func.jvp(lambda x: call(x, x, x)[0], (q.detach(),), (q.detach(),))
    counts, indices = torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 1)
    lists = Lists(*(x.to(q.device, torch.int32) for x in (counts, indices)))
    out = flash_attn_func(q, k, v, block_sparse_tensors=lists)[0]
    with pytest.raises(NotImplementedError, match="no is_grads_batched"):
        torch.autograd.grad(out, q, torch.stack([out, out]), is_grads_batched=True)
