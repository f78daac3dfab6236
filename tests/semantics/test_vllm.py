"""vLLM's steps through a paged cache, by its interface, each sequence held against the reference.

Where vLLM is not installed its interface is a stub, helpers/vllm_interface.py. Its own modules can
be had without its kernels: unpack a wheel, and put the folder and its dependencies on PYTHONPATH.
"""

import importlib
import inspect
import math
import random
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from flash_attn_sm120 import _C
from flash_attn_sm120 import vllm as door
from flash_attn_sm120.vllm import cache
from helpers import vllm_interface
from helpers.checks import assert_all_equal
from helpers.children import run_python
from helpers.devices import CPU, CUDA, EMULATOR, params_of, writable
from helpers.reference import assert_close
from helpers.varlen import on

IS_REAL = find_spec("vllm") is not None
UNTOUCHED = 7.0  # in rows that nothing may write to


@pytest.fixture(scope="module", autouse=True)
def interface():
    with nullcontext() if IS_REAL else vllm_interface.installed():
        yield


@pytest.fixture
def backend():
    return importlib.import_module("flash_attn_sm120.vllm.backend")


cpu_and_cuda = pytest.mark.parametrize("device", params_of(CPU, CUDA), indirect=True)


# ---- vLLM's side ---------------------------------------------------------------------------------

# Orders in memory of [layers, pages, heads, rows of a page, K and V of a row].
LAYOUTS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}


def make_cache(device, layout, pages, heads, page_size, dim, dtype):
    """(pages, heads, rows, 2 * dim) of the second of three layers, full of NaN."""
    order = LAYOUTS[layout]
    sizes = (3, pages, heads, page_size, 2 * dim)
    memory = torch.full([sizes[i] for i in order], math.nan, dtype=dtype)
    memory = memory.permute([order.index(i) for i in range(5)])
    return writable(device.place(memory)[1])


@dataclass
class Engine:
    """A layer of attention, its cache, and the sequences that it serves."""

    backend: object  # our module
    device: object
    sequences: int = 3
    heads: tuple = (4, 2)
    dim: int = 64
    page_size: int = 16
    layout: str = "LBNHC"
    room: int = 160  # tokens of a sequence
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    options: dict = field(default_factory=dict)  # of the layer

    def __post_init__(self):
        pages = -(-self.room // self.page_size)
        self.cache = make_cache(
            self.device,
            self.layout,
            self.sequences * pages + 2,
            self.heads[1],
            self.page_size,
            self.dim,
            self.dtype,
        )
        order = random.Random(3).sample(range(len(self.cache)), self.sequences * pages)
        self.table = torch.tensor(order).view(self.sequences, pages)
        self.held = [torch.empty(2, 0, self.heads[1], self.dim) for _ in range(self.sequences)]
        shape = self.heads[0], self.dim, self.dim**-0.5, self.heads[1]
        with torch.device(self.device.torch_device):  # as vLLM builds models
            self.layer = self.backend.Backend.get_impl_cls()(*shape, **self.options)
        self.builder = self.backend.Backend.get_builder_cls()(None, ["layer"], None, None)

    def slots(self, counts):
        """Of `counts` new tokens of each sequence."""
        found = []
        for table, held, count in zip(self.table, self.held, counts, strict=True):
            position = torch.arange(held.shape[1], held.shape[1] + count)
            row = position % self.page_size
            found.append(table[position // self.page_size] * self.page_size + row)
        return torch.cat(found)

    def inputs(self, counts, padding=0, as_graph=False):
        """A step's tensors and metadata. Padded by rows of NaN behind the tokens that there are;
        in a graph these count as tokens, with a sequence of no token and no key."""
        tokens = sum(counts)
        rows = torch.full((tokens + padding, sum(self.heads) + self.heads[1], self.dim), math.nan)
        rows[:tokens] = torch.randn(rows[:tokens].shape)
        q, k, v = (
            self.device.place(x)
            for x in rows.to(self.dtype).split((self.heads[0], self.heads[1], self.heads[1]), dim=1)
        )
        lengths = [x.shape[1] + count for x, count in zip(self.held, counts, strict=True)]
        begins = torch.tensor([0, *counts]).cumsum(0).tolist()
        slots, table = self.slots(counts), self.table
        if as_graph:
            slots = torch.cat([slots, torch.full((padding,), -1)])
            table = torch.cat([table, torch.full_like(table[:1], -1)])
            begins.append(begins[-1])
            lengths.append(0)
        common = self.backend.CommonAttentionMetadata(
            query_start_loc=on(self.device, begins),
            query_start_loc_cpu=torch.tensor(begins),
            seq_lens=on(self.device, lengths),
            num_reqs=len(lengths),
            num_actual_tokens=len(slots),
            max_query_len=max(counts),
            max_seq_len=self.room,
            block_table_tensor=on(self.device, table.tolist()),
            slot_mapping=self.device.place(slots),
            causal=self.causal,
        )
        return (q, k, v), self.builder.build(0, common)

    def run(self, qkv, metadata, out=None):
        if out is None:
            out = writable(torch.full_like(qkv[0], UNTOUCHED))
        self.layer.do_kv_cache_update(None, *qkv[1:], self.cache, metadata.slot_mapping)
        assert self.layer.forward(None, *qkv, self.cache, metadata, out) is out
        return out

    def hold(self, qkv, counts):
        """Notes the tokens of a step: (q, k, v) of each sequence, the latter of all tokens."""
        q, k, v = (x.cpu().as_subclass(torch.Tensor)[: sum(counts)].split(counts) for x in qkv)
        for i, new in enumerate(zip(k, v, strict=True)):
            self.held[i] = torch.cat([self.held[i].to(self.dtype), torch.stack(new)], dim=1)
        return zip(q, *zip(*self.held, strict=True), strict=True)

    def check(self, qkv, counts, out):
        """Holds the outputs of a step, and the rows of its padding, against what they must be."""
        window = self.options.get("sliding_window")
        before = None if window is None else window - 1
        options = {
            "causal": self.causal,
            "window_size": (before, before),
            "softcap": self.options.get("logits_soft_cap") or 0.0,
            "learnable_sink": self.options.get("sinks"),
            "alibi_slopes": self.options.get("alibi_slopes"),
        }
        if options["alibi_slopes"] is not None:
            options["alibi_slopes"] = torch.tensor(options["alibi_slopes"])
        if options["learnable_sink"] is not None:
            options["learnable_sink"] = options["learnable_sink"].cpu()
        out = out.cpu().as_subclass(torch.Tensor)
        for rows, (q, k, v) in zip(
            out[: sum(counts)].split(counts), self.hold(qkv, counts), strict=True
        ):
            if len(q):
                assert_close(rows[None], None, q[None], k[None], v[None], **options)
        return out[sum(counts) :]

    def step(self, *counts, padding=0, as_graph=False):
        qkv, metadata = self.inputs(counts, padding, as_graph)
        rest = self.check(qkv, counts, self.run(qkv, metadata))
        assert (rest == (0 if as_graph else UNTOUCHED)).all()


@dataclass
class NarrowEngine(Engine):
    """Its cache is bytes, which are e4m3."""

    scales = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(0.25))

    def __post_init__(self):
        self.options = {"kv_cache_dtype": "fp8"}
        super().__post_init__()
        self.cache = self.cache.to(torch.float8_e4m3fn).view(torch.uint8)
        names = vars(self.scales)
        self.scales = SimpleNamespace(**{x: self.device.place(names[x]) for x in names})

    def run(self, qkv, metadata, out=None):
        out = writable(torch.full_like(qkv[0], UNTOUCHED))
        self.layer.do_kv_cache_update(self.scales, *qkv[1:], self.cache, metadata.slot_mapping)
        return self.layer.forward(self.scales, *qkv, self.cache, metadata, out)

    def hold(self, qkv, counts):
        narrow = [
            (x.float() / scale).to(torch.float8_e4m3fn).float().mul(scale).to(x.dtype)
            for x, scale in zip(qkv[1:], (0.5, 0.25), strict=True)
        ]
        return super().hold((qkv[0], *narrow), counts)


# Prefill, of one in chunks; then decoding beside the rest; a sequence waits; drafts of 3 tokens.
STEPS = ((60, 7, 1), (35, 1, 1), (1, 1, 0), (3, 1, 3))


def serve(engine, **options):
    for counts in STEPS:
        engine.step(*counts, **options)


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.quick("cpu", "emulator")
def test_steps(device, backend):
    engine = Engine(backend, device, dtype=device.dtypes[-1])
    serve(engine, padding=3)


@cpu_and_cuda
def test_a_cache_of_fp8(device, backend):
    serve(NarrowEngine(backend, device))


@cpu_and_cuda
@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_of_every_layout(device, backend, layout):
    for page_size in (16, 48):
        serve(Engine(backend, device, layout=layout, page_size=page_size))


@cpu_and_cuda
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("dim", [40, 64, 128, 192, 256])
def test_heads_and_dims(device, backend, heads, dim):
    serve(Engine(backend, device, heads=heads, dim=dim, dtype=torch.float16))


OPTIONS = {
    "window": {"sliding_window": 20},
    "softcap": {"logits_soft_cap": 5.0},
    "alibi": {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]},
    "sinks": {"sinks": torch.linspace(-1, 2, 4)},
    "sinks of bf16": {"sinks": torch.linspace(-1, 2, 4).bfloat16(), "sliding_window": 20},
}


@cpu_and_cuda
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(device, backend, options, causal):
    options = {name: device.place(x) if torch.is_tensor(x) else x for name, x in options.items()}
    serve(Engine(backend, device, options=options, causal=causal))


@pytest.mark.quick("cpu")
def test_padded_as_in_graphs(device, backend):
    """The tokens of padding have no slot, and no sequence: their outputs are 0."""
    serve(Engine(backend, device, dtype=device.dtypes[-1]), padding=5, as_graph=True)


@cpu_and_cuda
def test_one_head_with_any_stride(device, backend):
    """The stride of a dimension of size 1 means nothing."""
    engine = Engine(backend, device, heads=(4, 1))
    shape, strides = engine.cache.shape, list(engine.cache.stride())
    strides[1] = 1
    engine.cache = engine.cache.as_strided(shape, strides, engine.cache.storage_offset())
    serve(engine)


@cpu_and_cuda
@pytest.mark.parametrize("window", [None, 6])
def test_encoders(device, backend, window):
    """Both ways, without a cache, whatever the metadata says of causal."""
    options = {"attn_type": "encoder_only", "sliding_window": window}
    engine = Engine(backend, device, options=options)
    qkv, metadata = engine.inputs((30, 1, 17))
    out = engine.run(qkv, metadata)
    engine.causal = False
    engine.check(qkv, (30, 1, 17), out)
    assert engine.cache.isnan().all()


@cpu_and_cuda
def test_cross_attention(device, backend):
    """A decoder's queries and an encoder's keys: the cache holds more than the queries' rows."""
    engine = Engine(backend, device, causal=False, options={"attn_type": "encoder_decoder"})
    serve(engine)


@cpu_and_cuda
def test_inference_mode(device, backend):
    """As vLLM runs: the tensors then have no version counters."""
    with torch.inference_mode():
        serve(Engine(backend, device))


def test_measuring_memory(backend):
    """vLLM measures memory without metadata."""
    out = torch.ones(5, 4, 64)
    layer = Engine(backend, CPU).layer
    assert layer.forward(None, out, None, None, None, None, out) is out and (out == 0).all()


def test_another_table(backend):
    """Layers of another group of caches have the same metadata with tables of their own."""
    engine = Engine(backend, CPU)
    _, metadata = engine.inputs((5, 1, 0))
    table, slots = torch.zeros(3, 4), torch.zeros(6)
    changed = engine.builder.update_block_table(metadata, table, slots)
    assert changed.block_table is table and changed.slot_mapping is slots
    assert changed.seq_lens is metadata.seq_lens and metadata.block_table is not table


def test_graph_of_a_step(cuda, backend):
    """A graph of a mixed batch replays with other lengths, pages and tokens."""
    engine = Engine(backend, CUDA)
    engine.step(60, 7, 1)
    qkv, metadata = engine.inputs((1, 4, 20), padding=15, as_graph=True)
    metadata.max_query_len = 30
    out = torch.full_like(qkv[0], UNTOUCHED)
    engine.run(qkv, metadata, out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.run(qkv, metadata, out)
    for counts in ((1, 4, 20), (30, 1, 1), (1, 1, 1)):
        others, changed = engine.inputs(counts, padding=40 - sum(counts), as_graph=True)
        for x, y in zip(qkv, others, strict=True):
            x.copy_(y)
        for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping"):
            getattr(metadata, name).copy_(getattr(changed, name))
        graph.replay()
        assert (engine.check(qkv, counts, out) == 0).all()


# ---- the cache -----------------------------------------------------------------------------------


@pytest.mark.quick("cpu")
def test_rows_go_to_their_slots(device):
    """And nothing else changes. Negative slots are none; tokens behind the slots are padding."""
    pages = make_cache(device, "BHLNC", 6, 2, 16, 64, torch.bfloat16)
    pages.fill_(UNTOUCHED)
    expected = pages.cpu().as_subclass(torch.Tensor).clone()
    slots = [95, 3, -1, 16, -1, 40]
    key, value = torch.randn(2, 8, 2, 64).bfloat16()
    for i, slot in enumerate(slots):
        if slot >= 0:
            expected[slot // 16, :, slot % 16] = torch.cat([key[i], value[i]], dim=-1)
    places = device.place(torch.tensor(slots))
    cache.write(device.place(key), device.place(value), pages, places)
    assert_all_equal([pages.cpu().as_subclass(torch.Tensor)], [expected])
    with pytest.raises(ValueError, match="slots must be below 96, got 96 for token 1"):
        cache.write(key, value, pages.cpu().as_subclass(torch.Tensor), torch.tensor([1, 96]))
    for none in (places[:0], device.place(torch.tensor([-1, -1]))):
        cache.write(device.place(key), device.place(value), pages, none)
    assert_all_equal([pages.cpu().as_subclass(torch.Tensor)], [expected])


SIZES = {"k": (4, 2, 64), "v": (4, 2, 32), "k_cache": (3, 16, 2, 64), "v_cache": (3, 16, 2, 32)}
BAD = {
    "rank": ({"k": lambda x: x[0]}, ValueError, "k must have 3 dimensions, got 2"),
    "dtype": ({"v_cache": lambda x: x.half()}, TypeError, "v_cache must be bfloat16 like k, got float16"),
    "int64": ({"slots": lambda x: x.long()}, TypeError, "slots must be int32, got int64"),
    "rows": ({"v": lambda x: x[:3]}, ValueError, "v has 3 rows, slots are for 4"),
    "heads": ({"v": lambda x: x[:, :1]}, ValueError, "v must have k's heads 2 in dimension 1, got 1"),
    "cache's heads": ({"k_cache": lambda x: x[:, :, :1]}, ValueError, "k_cache must have k's heads 2 in dimension 2, got 1"),
    "pages": ({"v_cache": lambda x: x[:2]}, ValueError, "v_cache must have k_cache's pages 3 in dimension 0, got 2"),
    "page_size": ({"v_cache": lambda x: x[:, :8]}, ValueError, "v_cache must have k_cache's page_size 16 in dimension 1, got 8"),
    "head_dim": ({"k_cache": lambda x: x[..., :32]}, ValueError, "k_cache must have the head_dim 64 in dimension 3, got 32"),
    "multiple": ({"k": lambda x: x[..., :60], "k_cache": lambda x: x[..., :60]}, ValueError, "the head_dim of k must be a multiple of 8, got 60"),
    "alignment": ({"k_cache": lambda x: torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)}, ValueError, "k_cache must have contiguous rows at multiples of 16 bytes"),
    "itself": ({"v_cache": lambda x: x[:1].expand(3, -1, -1, -1)}, ValueError, "v_cache has elements that share memory"),
    "overlap": ({"k_cache": lambda x: x.new_zeros(4, 16, 2, 64)[:3], "v_cache": None}, ValueError, "k_cache overlaps v_cache"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors(case):
    """Nothing is written."""
    changes, error, message = BAD[case]
    tensors = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in SIZES.items()}
    tensors["k"] += 1
    tensors["slots"] = torch.arange(4, dtype=torch.int32)
    for name, change in changes.items():
        tensors[name] = change(tensors[name]) if change else tensors["k_cache"][..., :32]
    before = [tensors[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(error, match=re.escape(message)):
        _C.scatter(*tensors.values())
    assert_all_equal([tensors[name] for name in ("k_cache", "v_cache")], before)


def test_scatter_takes_five_or_seven():
    with pytest.raises(TypeError, match=r"scatter\(\) takes 5 or 7 positional arguments, got 0"):
        _C.scatter()


def test_strided_rows_and_other_dims(device):
    """K and V of different head dims, without a layout that belongs to vLLM."""
    k, v = torch.randn(4, 3, 64).bfloat16(), torch.randn(4, 3, 2, 40).bfloat16()[:, 1:].flip(0)
    k = device.place(k)[:, 1:]
    v = device.place(v)[:, :, 0]
    k_cache, v_cache = (
        writable(device.place(torch.zeros(3, 5, 2, x.shape[-1]).bfloat16())) for x in (k, v)
    )
    _C.scatter(k, v, k_cache, v_cache, on(device, [14, -(2**31), 0, 7]))
    for x, pages in ((k, k_cache), (v, v_cache)):
        expected = torch.zeros(15, 2, x.shape[-1]).bfloat16()
        expected[[14, 0, 7]] = x.cpu().as_subclass(torch.Tensor)[[0, 2, 3]]
        assert_all_equal([pages.cpu().as_subclass(torch.Tensor).flatten(0, 1)], [expected])


def test_scatter_to_e4m3(device):
    """Rows are divided by the descales, rounded once, and saturate."""
    dtype = device.dtypes[-1]
    k, v = (torch.randn(4, 2, dim).mul(100).to(dtype) for dim in (64, 32))
    k[0, 0, :3] = torch.tensor([3e4, -3e4, math.nan]).to(dtype)
    caches = [torch.zeros(3, 5, 2, x.shape[-1]).to(torch.float8_e4m3fn) for x in (k, v)]
    caches = [writable(device.place(x)) for x in caches]
    descales = [torch.tensor(x) for x in (4.0, 0.5)]
    slots = on(device, [14, -1, 0, 7])
    _C.scatter(*map(device.place, (k, v)), *caches, slots, *map(device.place, descales))
    for x, pages, descale in zip((k, v), caches, descales, strict=True):
        expected = torch.zeros(15, 2, x.shape[-1])
        expected[[14, 0, 7]] = (x[[0, 2, 3]].float() / descale).clamp(-448, 448)
        found = pages.cpu().as_subclass(torch.Tensor).flatten(0, 1).float()
        expected = expected.to(torch.float8_e4m3fn).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_bad_descales_of_scatter():
    wide = [torch.zeros(size, dtype=torch.bfloat16) for size in SIZES.values()]
    narrow = [*wide[:2], *(x.to(torch.float8_e4m3fn) for x in wide[2:])]
    slots, one = torch.arange(4, dtype=torch.int32), torch.ones(())
    for tensors, descale, error, message in (
        (wide, one, ValueError, "k_descale is for caches in float8_e4m3fn"),
        (narrow, one.half(), TypeError, "k_descale must be float32, got float16"),
        (narrow, torch.ones(2), ValueError, "k_descale must be one number"),
        ([*narrow[:3], wide[3]], one, TypeError, "v_cache must be float8_e4m3fn like k_cache"),
    ):
        with pytest.raises(error, match=message):
            _C.scatter(*tensors, slots, descale, None)


@pytest.mark.parametrize("device", params_of(EMULATOR, CUDA), indirect=True)
def test_slots_out_of_range_are_dropped(device):
    """The host never waits for slots that are on a GPU."""
    k_cache, v_cache = (
        writable(device.place(torch.zeros(3, 16, 2, 64, dtype=torch.bfloat16))) for _ in "kv"
    )
    rows = device.place(torch.ones(3, 2, 64, dtype=torch.bfloat16))
    _C.scatter(rows, rows, k_cache, v_cache, on(device, [2**31 - 1, 48, -5]))
    assert (k_cache == 0).all() and (v_cache == 0).all()


# ---- the door ------------------------------------------------------------------------------------


def test_nothing_of_vllm_is_imported_before(tmp_path):
    code = """
import sys
import flash_attn_sm120.vllm
print([name for name in sys.modules if name.split(".")[0] == "vllm"])
"""
    assert run_python(code, tmp_path).stdout.strip() == "[]"


def test_register(backend):
    """Again and again, as vLLM calls it in each of its processes."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for _ in range(2):
        door.register()
        assert door.registered()
    assert AttentionBackendEnum[door.NAME].get_class() is backend.Backend


def test_an_interface_without_names(monkeypatch):
    from vllm.v1.attention.backends import registry

    monkeypatch.setattr(registry, "AttentionBackendEnum", object)
    with pytest.raises(NotImplementedError, match="no attention backends by a name"):
        door.register()


def test_untried_versions_warn(backend, monkeypatch):
    monkeypatch.setattr(backend.vllm, "__version_tuple__", (0, 34, 1))
    monkeypatch.setattr(backend.vllm, "__version__", "0.34.1")
    with pytest.warns(RuntimeWarning, match=r"tried with vLLM 0\.33, not with 0\.34\.1"):
        backend._warn_of_untried_version()


def test_what_it_says_it_can(backend):
    ours = backend.Backend
    assert [d for d in (7, 8, 72, 256, 264) if ours.supports_head_size(d)] == [8, 72, 256]
    assert not ours.forward_includes_kv_cache_update
    assert all(size % 16 == 0 for size in ours.get_supported_kernel_block_sizes())
    assert [ours.get_preferred_block_size(size) for size in (16, 256)] == [64, 256]
    assert ours.get_builder_cls().get_cudagraph_support(None, None).name == "ALWAYS"


@pytest.mark.skipif(not IS_REAL, reason="vLLM is not installed: its own checks are not tested")
def test_what_vllm_makes_of_it(backend):
    from vllm.platforms.interface import DeviceCapability

    taken = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 1040,
        "use_mla": False,
        "has_sink": True,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(12, 0),
        "attn_type": "decoder",
        "has_sliding_window": True,
        "use_non_causal": True,
        "use_kv_connector": True,
        "use_adaptive_verification": True,
    }
    reasons = backend.Backend.validate_configuration
    assert reasons(**taken) == []
    for changes, reason in (
        ({"head_size": 100}, "head_size not supported"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        ({"kv_cache_dtype": "fp8", "head_size": 72}, "a KV cache of fp8 with head dims of 72"),
        ({"kv_cache_dtype": "float16"}, "a KV cache of float16 with a model of torch.bfloat16"),
        ({"device_capability": DeviceCapability(7, 5)}, "compute capability not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_dcp": True}, "DCP not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        ({"use_mm_prefix": True}, "partial multimodal token full attention not supported"),
    ):
        assert [r[: len(reason)] for r in reasons(**taken | changes)] == [reason]


@pytest.mark.skipif(not IS_REAL, reason="vLLM is not installed: its signatures are not compared")
def test_signatures_are_those_of_vllm(backend):
    """What vLLM renames or adds shows here."""
    for ours, base in (
        (backend.Backend, backend.AttentionBackend),
        (backend.Builder, backend.AttentionMetadataBuilder),
        (backend.Attention, backend.AttentionImpl),
    ):
        for name in vars(ours).keys() - {"do_kv_cache_update", "supports_combination"}:
            if name == "__init__" or not name.startswith("_"):
                theirs = getattr(base, name)
                if callable(theirs):
                    expected = list(inspect.signature(theirs).parameters)
                    found = list(inspect.signature(getattr(ours, name)).parameters)
                    assert found[: len(expected)] == expected, name
    stub = vllm_interface.CommonAttentionMetadata.__dataclass_fields__
    assert stub.keys() <= backend.CommonAttentionMetadata.__dataclass_fields__.keys()


# ---- what is refused -----------------------------------------------------------------------------

LAYERS = {
    "fp8": (
        {"kv_cache_dtype": "fp8_e5m2"},
        "does not support a KV cache of fp8_e5m2 yet, only of auto",
    ),
    "unknown": ({"chunk_lookback": 1}, "does not support chunk_lookback yet"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_bad_layers(backend, case):
    changes, message = LAYERS[case]
    arguments = {"num_kv_heads": 2, "alibi_slopes": None, "sliding_window": None} | changes
    with pytest.raises(NotImplementedError, match=message):
        backend.Attention(4, 64, 0.125, **arguments)


BATCHES = {
    "causal_per_sequence": {"causal": torch.ones(3, dtype=torch.int32)},
    "mm_req_doc_ranges": {"mm_req_doc_ranges": {0: [(0, 5)]}},
    "rswa_prefix_lens": {"rswa_prefix_lens": torch.ones(3, dtype=torch.int32)},
}


@pytest.mark.parametrize("case", BATCHES)
def test_bad_batches(backend, case):
    engine = Engine(backend, CPU)
    _, metadata = engine.inputs((1, 1, 1))
    common = {
        "query_start_loc_cpu": None,
        "num_reqs": 3,
        "block_table_tensor": metadata.block_table,
        **{name: x for name, x in vars(metadata).items() if name != "block_table"},
    }
    with pytest.raises(NotImplementedError, match=f"does not support {case} yet"):
        engine.builder.build(0, backend.CommonAttentionMetadata(**common | BATCHES[case]))


@pytest.mark.parametrize("name", ["output_scale", "output_block_scale"])
def test_quantised_outputs(backend, name):
    engine = Engine(backend, CPU)
    qkv, metadata = engine.inputs((1, 1, 1))
    with pytest.raises(NotImplementedError, match=f"does not support {name} yet"):
        engine.layer.forward(
            None, *qkv, engine.cache, metadata, torch.empty_like(qkv[0]), **{name: torch.ones(1)}
        )
