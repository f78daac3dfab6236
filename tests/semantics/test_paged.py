"""Keys in pages: the same as packed keys, wherever the pages are and whatever lies around them."""

import random
import sys

import pytest
import torch

import emulator
from flash_attn_sm120 import _C, explain, explain_backward, flash_attn_func, flash_attn_varlen_func
from helpers.checks import assert_all_equal
from helpers.children import run_python
from helpers.devices import CPU, CUDA, EMULATOR
from helpers.paged import LAYOUTS, make_paged
from helpers.tiles import tile_row, use_tiles
from helpers.varlen import attend, check_forward, make_batch, on

MIXED = ([70, 1, 0, 33, 5], [150, 40, 9, 0, 16])

OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "all": {"window_size": (30, 3), "softcap": 5.0, "learnable_sink": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def with_sink(device, options, heads):
    """Options with a sink for each head in place of True."""
    if not options.get("learnable_sink"):
        return options
    return {**options, "learnable_sink": device.place(torch.linspace(-1, 2, heads))}


def make(device, lengths_q=MIXED[0], lengths_k=MIXED[1], page_size=16, **kwargs):
    return make_paged(device, lengths_q, lengths_k, page_size, dtype=device.dtypes[0], **kwargs)


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.quick("cpu-*", "emulator-large-64", "emulator-3")
@pytest.mark.parametrize("page_size", [1, 3, 16, 24, 64, 128, 256, 1024])
def test_page_sizes(device, page_size):
    check_forward(make(device, page_size=page_size), causal=True)


@pytest.mark.quick("cpu-*")
@options
@pytest.mark.parametrize("page_size", [3, 16])
def test_options(device, options, page_size):
    if not device.takes(list(OPTIONS.values()).index(options) + page_size):
        pytest.skip("the other size of tiles has this case")
    check_forward(make(device, page_size=page_size), **with_sink(device, options, 4))


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize(
    "dims", [(64, 128), (128, 64), (192, 128), (256, 256), (40, 72), (96, 64)], ids=str
)
def test_head_dims(device, dims):
    if not device.takes(dims[0] > dims[1]):
        pytest.skip("the other size of tiles has this case")
    for page_size in (16, 7):
        batch = make(device, [30, 0, 5], [50, 3, 80], page_size, heads=(4, 1), dims=dims)
        check_forward(batch, causal=True)


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_are_read_in_place(device, layout):
    for page_size in (16, 5):
        batch = make(device, page_size=page_size, layout=layout)
        check_forward(batch, causal=True)


@pytest.mark.quick("cpu")
def test_entries_that_no_query_reaches(device):
    """Before a window, and of sequences without queries: serving engines free such pages."""
    for page_size in (16, 5):
        batch = make(device, [7, 1, 0], [150, 70, 40], page_size)
        expected = check_forward(batch, window_size=(20, 0))
        table = batch.lengths["page_table"]
        table[0, : (150 - 7 - 20) // page_size] = -1
        table[1, : (70 - 1 - 20) // page_size] = 2**31 - 1
        table[2] = 10**6
        assert_all_equal(expected, check_forward(batch, window_size=(20, 0)))


@pytest.mark.quick("cpu")
def test_pages_are_shared(device):
    for page_size in (4, 32):
        batch = make(device, [9, 1, 20, 3], [100, 64, 65, 70], page_size, shared=2)
        table = batch.lengths["page_table"]
        assert (table[:, :2] == table[0, :2]).all()
        check_forward(batch, causal=True)


def test_one_page_in_all_places(device):
    """The same keys again and again."""
    batch = make(device, [20, 3], [64, 64], 16)
    batch.lengths["page_table"][:] = batch.lengths["page_table"][0, 0]
    for x, packed in zip(batch.pages, (batch.k, batch.v), strict=True):
        packed[:128] = x[batch.lengths["page_table"][0, 0]].repeat(8, 1, 1)
    check_forward(batch, causal=True)


def test_num_splits(device):
    for page_size in (16, 5):
        batch = make(device, [1, 0, 3, 2], [300, 64, 0, 150], page_size)
        for options in ({}, OPTIONS["all"]):
            check_forward(batch, num_splits=3, **with_sink(device, options, 4))


def test_pack_gqa(device):
    batch = make(device, [5, 0, 70], [64, 9, 100], heads=(6, 2))
    packed = check_forward(batch, pack_gqa=True, causal=True)
    assert_all_equal(packed, check_forward(batch, pack_gqa=False, causal=True))


def test_random(device):
    draw = random.Random(17)
    for _ in range(3 if device == EMULATOR else 12):
        count = draw.randint(1, 6)
        some = [[draw.choice([0, 1, 16, draw.randint(2, 90)]) for _ in range(count)] for _ in "qk"]
        page_size = draw.choice([1, 2, 8, 11, 16, 32, 100])
        check_forward(make(device, *some, page_size), causal=True)


# ---- the arguments -------------------------------------------------------------------------------


@pytest.mark.quick("cpu")
def test_queries_may_have_a_batch(device):
    """Then flash_attn_func has the same call."""
    for lengths in (([33] * 4, [70, 40, 33, 150]), ([33, 1, 0, 20], [70, 40, 9, 0])):
        batch = make(device, *lengths, packed_q=False)
        results = check_forward(batch, causal=True)
        keys = {name: batch.lengths.get(name) for name in ("seqused_k", "page_table")}
        if "seqused_q" not in batch.lengths:
            same = flash_attn_func(*batch.inputs, **keys, causal=True, return_lse=True)
            assert_all_equal(results, same)
        same = flash_attn_varlen_func(
            *batch.inputs, **batch.lengths, causal=True, return_lse=True, max_seqlen_k=150
        )
        assert_all_equal(results, same)


@pytest.mark.quick("cpu")
def test_dense_keys_with_seqused(device):
    """flash_attn_func without pages."""
    batch = make_batch(device, [33] * 3, [70, 40, 9], packed=(False, False), dtype=device.dtypes[0])
    assert list(batch.lengths) == ["seqused_k"]
    results = check_forward(batch, causal=True)
    same = flash_attn_func(*batch.inputs, **batch.lengths, causal=True, return_lse=True)
    assert_all_equal(results, same)


@pytest.mark.quick("cpu")
def test_lengths_without_seqused(device):
    """All for which there are pages, or max_seqlen_k."""
    batch = make(device, [20, 3], [48, 48], 16)
    expected = check_forward(batch, causal=True)
    batch.lengths["page_table"] = batch.lengths["page_table"][:, :3]  # a view
    del batch.lengths["seqused_k"]
    assert_all_equal(expected, attend(batch, causal=True))
    batch = make(device, [20, 3], [39, 39], 16)
    expected = check_forward(batch, causal=True)
    del batch.lengths["seqused_k"]
    assert_all_equal(expected, attend(batch, causal=True, max_seqlen_k=39))


@pytest.mark.quick("cpu")
def test_no_keys(device):
    batch = make(device, [20, 3], [0, 0], 16)
    check_forward(batch, causal=True)
    batch.lengths["page_table"] = batch.lengths["page_table"][:, :0]
    check_forward(batch)
    del batch.lengths["seqused_k"]
    check_forward(batch)
    batch.pages = tuple(x[:0] for x in batch.pages)
    check_forward(batch)
    batch.lengths["page_table"] = on(device, [[0, 7], [1, 2]])
    out, lse = attend(batch, max_seqlen_k=20)
    assert (out == 0).all() and (lse == -torch.inf).all()
    if device != CPU:
        batch.lengths["seqused_k"] = on(device, [20, 3])
        check_forward(batch)


def test_lengths_beyond_the_bound(device):
    batch = make(device, [20, 3], [64, 30], 16)
    if device == CPU:
        message = "seqused_k must be from 0 to the length: sequence 0 has 40, got 64"
        with pytest.raises(ValueError, match=message):
            attend(batch, max_seqlen_k=40)
        return
    cut = attend(batch, causal=True, max_seqlen_k=40)
    batch.lengths["seqused_k"] = on(device, [40, 30])
    assert_all_equal(cut, attend(batch, causal=True, max_seqlen_k=40))


def test_table_in_a_wider_one(device):
    batch = make(device)
    expected = check_forward(batch, causal=True)
    table = batch.lengths["page_table"]
    wider = device.place(torch.full((table.shape[0], table.shape[1] + 9), -7, dtype=torch.int32))
    wider[:, 4 : 4 + table.shape[1]] = table
    batch.lengths["page_table"] = wider[:, 4 : 4 + table.shape[1]]
    assert_all_equal(expected, attend(batch, causal=True))


# ---- equal to the bit ----------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [3, 16, 64])
def test_equal_to_packed_calls_to_the_bit(device, page_size):
    batch = make(device, [70, 0, 33, 4], [150, 9, 64, 70], page_size)
    options = {"causal": True, "num_splits": 1, "pack_gqa": False}
    plan = explain(*batch.inputs, **batch.lengths, **options)
    rows = [tile_row(plan)] if plan.steps else []
    with use_tiles(*rows):
        results = attend(batch, **options)
        begins = [0, 150, 159, 223, 293]
        packed = _C.forward(
            batch.q,
            batch.k,
            batch.v,
            return_lse=True,
            cu_seqlens_q=batch.lengths["cu_seqlens_q"],
            cu_seqlens_k=on(device, begins),
            **options,
        )
    assert_all_equal(results, packed)


def test_other_tables_need_no_other_plan(device):
    if device == CPU:
        pytest.skip("the CPU has no plans")
    draw = random.Random(15)
    counts = []
    for _ in range(60):
        count = draw.randint(1, 5)
        some = [[draw.randint(0, 16) for _ in range(count)] for _ in "qk"]
        batch = make(device, *some, draw.choice([8, 16, 40]), heads=(1, 1))
        attend(batch, causal=True, max_seqlen_q=16, max_seqlen_k=16)
        counts.append(_C.counts())
    assert counts[0] == counts[-1]


def test_captured_graphs_replay_with_other_pages(cuda):
    batch = make(CUDA, [3, 1, 40], [100, 9, 64], 16)
    other = make(CUDA, [1, 20, 23], [20, 100, 50], 16)
    expected = [attend(batch, causal=True), attend(other, causal=True)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = attend(batch, causal=True)
    graph.replay()
    assert_all_equal(results, expected[0])
    batch.q.copy_(other.q)
    for x, y in zip(batch.pages, other.pages, strict=True):
        x[: len(y)].copy_(y[: len(x)])
    for name, x in batch.lengths.items():
        x.copy_(other.lengths[name])
    graph.replay()
    assert_all_equal(results, expected[1])


# ---- what is refused -----------------------------------------------------------------------------

BAD = {
    "int64": ({"page_table": lambda x: x.long()}, TypeError, "page_table must be int32, got int64"),
    "rank": ({"page_table": lambda x: x[0]}, ValueError, "page_table must have 2 dimensions, got 1"),
    "batch": ({"page_table": lambda x: x[:2]}, ValueError, "page_table must have q's batch 5 in dimension 0, got 2"),
    "strided": ({"page_table": lambda x: x[:, ::2]}, ValueError, "page_table must be contiguous in its last dimension, got stride 2"),
    "packed": ({"cu_seqlens_k": lambda x: on(CPU, [0] * 6)}, ValueError, "page_table takes no cu_seqlens_k"),
    "bound": ({"max_seqlen_k": lambda x: -1}, ValueError, "max_seqlen_k must be 0 or larger, got -1"),
    "used": ({"seqused_k": lambda x: x[:2]}, ValueError, "seqused_k must have q's batch 5 in dimension 0, got 2"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("case", BAD)
def test_bad_tables(device, case):
    changes, error, message = BAD[case]
    batch = make(device)
    changed = dict(batch.lengths)
    for name, change in changes.items():
        x = change(changed.get(name))
        changed[name] = device.place(x) if isinstance(x, torch.Tensor) else x
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(*batch.inputs, **changed)


BAD_CACHES = {
    "rank": (lambda k, v: (k[0], v[0]), "k must have 4 dimensions, got 3"),
    "pages": (lambda k, v: (k, v[1:]), "v must have k's pages .* in dimension 0"),
    "page size of v": (lambda k, v: (k, v[:, 1:]), "v must have k's page size 16 in dimension 1, got 15"),
    "no rows": (lambda k, v: (k[:, :0], v[:, :0]), r"pages must have from 1 to 1024 rows \(dimension 1 of k\), got 0"),
    "rows": (lambda k, v: (k[:1, :1].expand(1, 1025, -1, -1),) * 2, "pages must have from 1 to 1024 rows .* got 1025"),
    "dims apart": (lambda k, v: (k, torch.cat([v, v], -1)[..., ::2]), "v of a page_table is read in place, never copied: .* got strides"),
    "misaligned": (lambda k, v: (torch.cat([k, k], -1)[..., 1:65], v), "k of a page_table is read in place, never copied"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("case", BAD_CACHES)
def test_bad_caches(device, case):
    change, message = BAD_CACHES[case]
    batch = make(device)
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(batch.q, *change(*batch.pages), **batch.lengths)
    with pytest.raises(ValueError, match=message):
        explain(batch.q, *change(*batch.pages), **batch.lengths, arch=120)


def test_the_table_must_be_on_the_device(device):
    if device == CPU:
        pytest.skip("the CPU is one device")
    batch = make(device)
    table = batch.lengths["page_table"].cpu().as_subclass(torch.Tensor)
    with pytest.raises(ValueError, match="page_table must be on q's device, cuda:0, got cpu:0"):
        _C.forward(*batch.inputs, **batch.lengths | {"page_table": table})


WRONG = {
    "beyond": ([[0, 1], [2, 1000]], [16, 17], "page 1 of sequence 1 is 1000"),
    "negative": ([[-1, 1], [2, 0]], [1, 17], "page 0 of sequence 0 is -1"),
    "largest": ([[0, 2**31 - 1], [2, 0]], [32, 0], "page 1 of sequence 0 is 2147483647"),
    "least": ([[0, 1], [-(2**31), 0]], [32, 9], "page 0 of sequence 1 is -2147483648"),
    "longer": ([[0, 1], [2, 0]], [32, 33], "sequence 1 has 32, got 33"),
    "much longer": ([[0, 1], [2, 0]], [2**31 - 1, 3], "sequence 0 has 32, got 2147483647"),
    "negative length": ([[0, 1], [2, 0]], [3, -(2**31)], "sequence 1 has 32, got -2147483648"),
}  # fmt: skip


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_tables(device, case):
    """The CPU names the sequence. Kernels keep within the cache, which the emulator watches, and the
    next call is right."""
    table, used, message = WRONG[case]
    for page_size in (16, 5) if device != CPU else (16,):
        batch = make(device, [7, 30], [9, 20], page_size)
        wrong = batch.lengths | {"page_table": on(device, table), "seqused_k": on(device, used)}
        if device == CPU:
            with pytest.raises(ValueError, match=message):
                _C.forward(*batch.inputs, **wrong)
        else:
            _C.forward(*batch.inputs, **wrong)
            _C.forward(*batch.inputs, num_splits=2, causal=True, **wrong)
        check_forward(batch, causal=True)


@pytest.mark.quick
@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
def test_there_is_no_backward(device):
    batch = make(device, packed_q=False)
    q, (k, v) = batch.q.clone().requires_grad_(), batch.pages
    for function in (flash_attn_varlen_func, flash_attn_func):
        lengths = {name: batch.lengths[name] for name in ("seqused_k", "page_table")}
        with pytest.raises(NotImplementedError, match="has no gradient with page_table"):
            function(q, k, v, **lengths)
        with torch.no_grad():
            function(q, k, v, **lengths)
    out, lse = attend(batch)
    with pytest.raises(NotImplementedError, match="page_table has no backward"):
        _C.backward(out, *batch.inputs, out, lse, None, **batch.lengths)
    with pytest.raises(NotImplementedError, match="page_table has no backward"):
        explain_backward(*batch.inputs, **batch.lengths, arch=120)


@pytest.mark.quick
@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
def test_autocast_leaves_the_cache_alone(device):
    batch = make_paged(device, *MIXED, 16, dtype=torch.bfloat16)
    expected = attend(batch)
    with torch.autocast(device.torch_device, torch.bfloat16):
        q = batch.q.float()
        out = flash_attn_varlen_func(q, *batch.pages, **batch.lengths)[0]
        assert_all_equal([out], expected[:1])
        with pytest.raises(TypeError, match="k must be bfloat16 like q, got float32"):
            flash_attn_varlen_func(q, *(x.float() for x in batch.pages), **batch.lengths)


def test_torch_that_wants_a_gradient_is_refused():
    batch = make(CPU)

    def call(q):
        return flash_attn_varlen_func(q, *batch.pages, **batch.lengths)[0].sum()

    with pytest.raises(NotImplementedError, match="has no gradient with page_table"):
        torch.func.grad(call)(batch.q)


# ---- FA_SM120_CHECK ------------------------------------------------------------------------------

CHECKED = """
import sys
sys.path[:0] = {path!r}
import torch
from flash_attn_sm120 import _C
from helpers.devices import CUDA, EMULATOR
from helpers.paged import make_paged
from helpers.varlen import attend, check_forward, gradients_of, make_batch, on

def message(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)

device = {device}
batch = make_paged(device, [7, 30], [9, 20], 16, dims=(8, 8))
check_forward(batch)
wrong = batch.lengths | {{"page_table": on(device, [[0, 1], [2, 1000]])}}
message(lambda: _C.forward(*batch.inputs, **wrong))
batch = make_batch(device, [7, 30], [9, 20], dims=(8, 8))
out, lse = attend(batch)
wrong = batch.lengths | {{"cu_seqlens_q": on(device, [0, 20, 10])}}
message(lambda: _C.forward(*batch.inputs, **wrong))
message(lambda: _C.backward(batch.dout, *batch.inputs, out, lse, None, **wrong))
check_forward(batch)
if device is CUDA:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        message(lambda: attend(batch))
"""


@pytest.mark.parametrize("device", [EMULATOR, CUDA], ids=lambda device: device.name)
def test_metadata_is_checked_first(device, tmp_path):
    """FA_SM120_CHECK=1: as of CPU tensors."""
    driver = {"FA_SM120_DRIVER": str(emulator.library())} if device == EMULATOR else {}
    name = "EMULATOR" if device == EMULATOR else "CUDA"
    code = CHECKED.format(path=sys.path, device=name)
    done = run_python(code, tmp_path, FA_SM120_CHECK="1", **driver)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ValueError page_table must have pages from 0 to ")
    assert "page 1 of sequence 1 is 1000" in lines[0]
    falls = "ValueError cu_seqlens_q must rise from 0 on: sequence 1 begins at 20 and ends at 10"
    assert lines[1:3] == [falls, falls]
    if device == CUDA:
        assert "RuntimeError FA_SM120_CHECK=1 waits for lengths" in lines[3]
