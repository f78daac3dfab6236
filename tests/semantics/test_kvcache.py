"""flash_attn_with_kvcache against a reference that appends, rotates and attends row by row."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from flash_attn_sm120 import _C
from flash_attn_sm120.fa2 import flash_attn_with_kvcache
from helpers.checks import assert_all_equal
from helpers.devices import CPU, CUDA, writable
from helpers.reference import assert_close
from helpers.rotary import rotate
from helpers.varlen import on

SEQLEN, HEADS, HEADS_KV = 48, 4, 2
NOTHING = torch.empty(0)


# ---- the reference -------------------------------------------------------------------------------


@dataclass
class Call:
    """The tensors of a call, and where the rows of each sequence are in the caches."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    seqlens: list
    entries: list  # of each sequence: (entry or page, row in it) of each row
    arguments: dict = field(default_factory=dict)  # cache_seqlens, table, rotary
    options: dict = field(default_factory=dict)

    def run(self, **changes):
        return flash_attn_with_kvcache(
            self.q,
            writable(self.k_cache),
            writable(self.v_cache),
            self.k,
            self.v,
            return_softmax_lse=True,
            **{**self.arguments, **self.options, **changes},
        )

    def plain(self, x):
        return x.detach().as_subclass(torch.Tensor).cpu()

    def check(self, **changes):
        """Appends, attends, and compares out, lse and the caches, of which no other row changed."""
        caches = [self.plain(x).clone() for x in (self.k_cache, self.v_cache)]
        out, lse = self.run(**changes)
        arguments = {**self.arguments, **self.options, **changes}
        for number, held in enumerate(self.seqlens):
            q, k, v = self.sequence(number, held, caches, arguments)
            options = {
                name: arguments[name]
                for name in ("causal", "softcap", "softmax_scale")
                if name in arguments
            }
            left, right = arguments.get("window_size", (-1, -1))
            options["window_size"] = (None if left < 0 else left, None if right < 0 else right)
            found = self.plain(lse[number : number + 1]).clone()
            found[found == math.inf] = -math.inf
            assert_close(
                self.plain(out[number : number + 1]), found, q[None], k[None], v[None], **options
            )
        for cache, expected in zip((self.k_cache, self.v_cache), caches, strict=True):
            torch.testing.assert_close(
                self.plain(cache), expected, rtol=2**-7, atol=2**-9, equal_nan=True
            )
        return out, lse

    def sequence(self, number, held, caches, arguments):
        """q rotated, and all keys and values of a sequence; appends to `caches`."""
        q = self.plain(self.q[number])
        new = 0 if self.k is None else self.k.shape[1]
        cos, sin = (self.plain(arguments.get(f"rotary_{x}", NOTHING)) for x in ("cos", "sin"))
        interleaved = arguments.get("rotary_interleaved", True)
        if new:
            k, v = self.plain(self.k[number]), self.plain(self.v[number])
            if cos.numel():
                k = rotate(k, torch.arange(held, held + new), cos, sin, interleaved)
            for row in range(new):
                entry = self.entries[number][held + row]
                caches[0][entry], caches[1][entry] = k[row], v[row]
        if cos.numel():
            advances = arguments.get("causal") or arguments.get("window_size", (-1, -1)) != (-1, -1)
            steps = torch.arange(len(q)) * bool(advances)
            q = rotate(q, (held + steps).clamp(max=len(cos) - 1), cos, sin, interleaved)
        pads = arguments.get("cache_leftpad")
        rows = self.entries[number][0 if pads is None else int(pads[number]) : held + new]
        k, v = (
            torch.stack([cache[entry] for entry in rows])
            if rows
            else cache.new_empty(0, *cache.shape[2:])
            for cache in caches
        )
        return q, k, v


def make(
    device, seqlens, seqlen_q=1, new=1, dim=32, dim_v=32, layout="contiguous", rotary=0, dtype=None
):
    """`rotary`: dims; `layout`: contiguous, picked (by cache_batch_idx) or paged. All rows that no
    sequence holds are NaN."""
    dtype = dtype or device.dtypes[0]
    batch = len(seqlens)
    generator = torch.Generator().manual_seed(len(seqlens) + dim)
    arguments = {"cache_seqlens": on(device, seqlens)}
    if layout == "contiguous":
        entries = [[(b, row) for row in range(SEQLEN)] for b in range(batch)]
        shape = (batch, SEQLEN)
    elif layout == "picked":
        order = torch.randperm(batch + 2, generator=generator)[:batch]
        entries = [[(int(order[b]), row) for row in range(SEQLEN)] for b in range(batch)]
        shape = (batch + 2, SEQLEN)
        arguments["cache_batch_idx"] = on(device, order.tolist())
    else:
        size = 16
        pages = torch.randperm(batch * SEQLEN // size + 3, generator=generator)
        table = pages[: batch * SEQLEN // size].view(batch, -1)
        entries = [
            [(int(table[b, row // size]), row % size) for row in range(SEQLEN)]
            for b in range(batch)
        ]
        shape = (len(pages), size)
        arguments["block_table"] = on(device, table.tolist())

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    caches = []
    for x in (dim, dim_v):
        cache = torch.full((*shape, HEADS_KV, x), math.nan, dtype=dtype)
        for b, held in enumerate(seqlens):
            for entry in entries[b][:held]:
                cache[entry] = randn(HEADS_KV, x)
        caches.append(device.place(cache))
    if rotary:
        angles = torch.rand(SEQLEN, rotary // 2, generator=generator) * 2 * math.pi
        arguments["rotary_cos"] = device.place(angles.cos().to(dtype))
        arguments["rotary_sin"] = device.place(angles.sin().to(dtype))
    k, v = (
        (device.place(randn(batch, new, HEADS_KV, x)) for x in (dim, dim_v))
        if new
        else (None, None)
    )
    q = device.place(randn(batch, seqlen_q, HEADS, dim))
    return Call(q, *caches, k, v, seqlens, entries, arguments)


# ---- what it computes ----------------------------------------------------------------------------

LAYOUTS = ("contiguous", "picked", "paged")
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (7, 2)},
    "left": {"window_size": (9, -1)},
}


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_append(device, layout, mask):
    """New rows of one and more, caches that are empty and full; NaN behind what they hold."""
    turn = LAYOUTS.index(layout) + list(MASKS).index(mask)
    if not device.takes(turn) or (device != CPU and mask == "left"):
        pytest.skip("a sample")
    for seqlen_q, new in ((1, 1), (5, 5), (2, 3), (3, 0)):
        make(
            device, [0, 17, SEQLEN - new, 33], seqlen_q, new, layout=layout, dtype=device.dtypes[-1]
        ).check(**MASKS[mask])


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("dims", [(32, 32), (16, 32), (6, 40), (2, 8)], ids=str)
def test_rotary(device, dims, interleaved):
    """All dims, some, of numbers that fill no chunk; q advances where there is a mask."""
    rotary, dim = dims
    if not device.takes(rotary + interleaved) or (device != CPU and dim != 32):
        pytest.skip("a sample")
    for mask in ("full", "causal", "window"):
        for seqlen_q, new in ((1, 1), (4, 4), (3, 2)):
            make(device, [0, 9, 40], seqlen_q, new, dim, dim, rotary=rotary).check(
                rotary_interleaved=interleaved, **MASKS[mask]
            )


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_leftpad(device, layout):
    """Rows before it are not seen, whatever they hold, and positions count from row 0 on."""
    for i, mask in enumerate(MASKS):
        if not device.takes(i + LAYOUTS.index(layout)):
            continue
        call = make(device, [0, 17, 40], 3, 2, layout=layout, rotary=16)
        call.arguments["cache_leftpad"] = on(device, [0, 16, 21])
        for cache in (call.k_cache, call.v_cache):
            for entry in call.entries[2][:21]:
                cache[entry] = math.nan
        call.check(**MASKS[mask])


@pytest.mark.quick("cpu")
def test_everything_at_once(device):
    call = make(device, [0, 20, 44], 4, 4, 64, 32, layout="paged", rotary=32)
    call.check(causal=True, softcap=4.0, softmax_scale=0.2, window_size=(20, -1), num_splits=2)


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_as_a_number(device, layout):
    """Of all sequences: without new rows a contiguous cache is then a dense call."""
    if device != CPU and layout != "contiguous":
        pytest.skip("a sample")
    for new in (0, 2):
        for held in (0, 13, SEQLEN - new):
            call = make(device, [held] * 3, 2, new, layout=layout)
            expected = call.run(causal=True) if new == 0 else None
            results = call.check(cache_seqlens=held, causal=True)
            if expected and device == CPU:
                assert_all_equal(results, expected)


@pytest.mark.quick("cpu")
def test_all_rows_without_lengths(device):
    call = make(device, [SEQLEN] * 2, 3, 0)
    call.check(cache_seqlens=None, causal=True)


@pytest.mark.quick
def test_packed_queries():
    call = make(CPU, [5, 17, 30], 4, 4, rotary=16)
    call.options["causal"] = True
    again = make(CPU, [5, 17, 30], 4, 4, rotary=16)
    out, lse = call.run()
    q = again.q.flatten(0, 1)
    ends = {"cu_seqlens_q": on(CPU, [0, 4, 8, 12]), "max_seqlen_q": 4}
    packed = flash_attn_with_kvcache(
        q, again.k_cache, again.v_cache, again.k, again.v, causal=True, return_softmax_lse=True,
        **again.arguments, **ends,
    )  # fmt: skip
    assert_all_equal(packed, (out.flatten(0, 1), lse.transpose(0, 1).flatten(1)))


@pytest.mark.quick
def test_a_row_of_the_table_is_picked():
    call = make(CPU, [5, 17, 30], 2, 2, layout="paged")
    table = call.arguments["block_table"]
    expected = make(CPU, [5, 17, 30], 2, 2, layout="paged").run()
    picked = call.run(block_table=table.flip(0), cache_batch_idx=on(CPU, [2, 1, 0]))
    assert_all_equal(picked, expected)
    with pytest.raises(
        ValueError, match=r"cache_batch_idx must be from 0 to 2.*: sequence 1 has 3"
    ):
        call.run(cache_batch_idx=on(CPU, [0, 3, 1]))


@pytest.mark.quick
def test_returns():
    call = make(CPU, [0, 4], 3, 0)
    out, lse = call.run(causal=True)
    assert (lse[0] == math.inf).all() and lse[1].isfinite().all() and (out[0] == 0).all()
    alone = flash_attn_with_kvcache(
        call.q, call.k_cache, call.v_cache, causal=True, out=torch.empty_like(out), **call.arguments
    )
    assert_all_equal([alone], [out])


def test_other_lengths_need_no_other_plan(device):
    """Nor another kernel: a decoding loop, in tensors of one shape."""
    if device == CPU:
        pytest.skip("the CPU has no plans")
    counts = []
    for step in range(10):
        call = make(device, [step, 2 * step, 47 - step], 1, 1, layout="paged", rotary=32)
        call.run(causal=True)
        counts.append(_C.counts())
    assert counts[0] == counts[-1]


# ---- bad input -----------------------------------------------------------------------------------


def expanded(x):
    return x[:, :1].expand_as(x)


ROTARY = {"rotary_cos": torch.zeros(SEQLEN, 8), "rotary_sin": torch.zeros(SEQLEN, 8)}
BAD = {
    "k alone": ({"v": None}, ValueError, "k and v are appended together: got one of them"),
    "no lengths": ({"cache_seqlens": None}, ValueError, "k and v need cache_seqlens"),
    "cos alone": ({"rotary_cos": torch.zeros(SEQLEN, 8)}, ValueError, "rotary_cos and rotary_sin go together"),
    "cos without k": (ROTARY | {"k": None, "v": None}, ValueError, "rotary_cos and rotary_sin need k and v"),
    "wide cos": (dict.fromkeys(ROTARY, torch.zeros(SEQLEN, 17)), ValueError, "from 1 to head_dim / 2 = 16, got 17"),
    "short cos": (dict.fromkeys(ROTARY, torch.zeros(SEQLEN - 1, 8)), ValueError, "a row for each position in the caches, 48, got 47"),
    "double cos": (dict.fromkeys(ROTARY, torch.zeros(SEQLEN, 8).half()), TypeError, "rotary_cos must be float32 like q, got float16"),
    "sin": (ROTARY | {"rotary_sin": torch.zeros(SEQLEN, 4)}, ValueError, "rotary_sin must have rotary_cos' columns 8 in dimension 1, got 4"),
    "flat cos": (ROTARY | {"rotary_cos": torch.zeros(SEQLEN)}, ValueError, "rotary_cos must have 2 dimensions, got 1"),
    "strided sin": (ROTARY | {"rotary_sin": torch.zeros(8, SEQLEN).T}, ValueError, "rotary_sin must be contiguous in its last dimension, got stride 48"),
    "int64": ({"cache_seqlens": torch.zeros(3).long()}, TypeError, "cache_seqlens must be int32, got int64"),
    "batch of lengths": ({"cache_seqlens": torch.zeros(2).int()}, ValueError, "cache_seqlens must have q's batch 3 in dimension 0, got 2"),
    "negative length": ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be from 0 to the rows of the caches, 48, got -1"),
    "long length": ({"cache_seqlens": 49}, ValueError, "the rows of the caches, 48, got 49"),
    "no room": ({"cache_seqlens": 47}, ValueError, "k has 2 rows to append, each cache has room for 1 at most"),
    "no room in one": ({"cache_seqlens": torch.tensor([0, 47, 3]).int()}, ValueError, "cache_seqlens must be from 0 to what leaves room for new rows: sequence 1 has 46, got 47"),
    "negative in one": ({"cache_seqlens": torch.tensor([0, 4, -3]).int()}, ValueError, "sequence 2 has 46, got -3"),
    "many rows": ({"k": torch.zeros(3, 49, 2, 32), "v": torch.zeros(3, 49, 2, 32)}, ValueError, "k has 49 rows to append"),
    "heads of k": ({"k": torch.zeros(3, 2, 4, 32)}, ValueError, "k must have the caches' heads 2 in dimension 2, got 4"),
    "rows of v": ({"v": torch.zeros(3, 1, 2, 32)}, ValueError, "v must have k's seqlen 2 in dimension 1, got 1"),
    "dtype of v": ({"v": torch.zeros(3, 2, 2, 32).half()}, TypeError, "v must be float32 like q, got float16"),
    "batch of caches": ({"q": torch.zeros(2, 2, 4, 32)}, ValueError, "k_cache must have q's batch 2 in dimension 0, got 3"),
    "heads of caches": ({"q": torch.zeros(3, 2, 3, 32)}, ValueError, "must be a multiple of the heads of k and v, got 3 and 2"),
    "strided cache": ({"k_cache": torch.zeros(3, SEQLEN, 32, 2).transpose(2, 3)}, ValueError, "k_cache is read in place, never copied"),
    "expanded cache": ({"v_cache": expanded(torch.zeros(3, SEQLEN, 2, 32))}, ValueError, "v_cache has elements that share memory"),
    "entry": ({"cache_batch_idx": torch.tensor([0, 3, 1]).int()}, ValueError, "cache_batch_idx must have pages from 0 to 2 .*: .*of sequence 1 is 3"),
    "two tables": ({"block_table": torch.zeros(3, 1).int(), "page_table": torch.zeros(3, 1).int()}, ValueError, "two names of one table"),
    "leftpad": ({"cache_leftpad": torch.tensor([0, 12, 3]).int()}, ValueError, "cache_leftpad must be from 0 to the rows in use: sequence 1 has 11, got 12"),
    "batch of leftpad": ({"cache_leftpad": torch.zeros(2).int()}, ValueError, "cache_leftpad must have q's batch 3 in dimension 0, got 2"),
    "alibi": ({"alibi_slopes": torch.zeros(5)}, ValueError, "alibi_slopes must have q's heads"),
    "qv": ({"qv": torch.zeros(4)}, NotImplementedError, "does not support qv yet"),
    "packed k": ({"cu_seqlens_k_new": torch.zeros(4).int()}, NotImplementedError, "does not support cu_seqlens_k_new yet"),
    "unknown": ({"cache_leftpads": None}, TypeError, "got an unexpected keyword argument 'cache_leftpads'"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be 0"),
    "gradient": ({"q": torch.zeros(3, 2, 4, 32, requires_grad=True)}, NotImplementedError, "has no gradient: use torch.no_grad"),
    "out": ({"out": torch.zeros(3, 2, 4, 8)}, ValueError, "out must have v's head_dim 32 in dimension 3, got 8"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("case", BAD)
def test_bad_calls_append_nothing(case):
    changes, error, message = BAD[case]
    call = make(CPU, [0, 9, 46], 2, 2)
    before = call.k_cache.clone(), call.v_cache.clone()
    tensors = {name: getattr(call, name) for name in ("q", "k_cache", "v_cache", "k", "v")}
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(**{**tensors, **call.arguments, **changes})
    assert_all_equal((call.k_cache, call.v_cache), before, equal_nan=True)
    call.check()


def test_nothing_is_appended_where_attention_cannot_be(device):
    if device == CPU:
        pytest.skip("the CPU has no plans")
    call = make(device, [0, 9], 1, 1, dtype=torch.float32)
    before = call.plain(call.k_cache).clone()
    with pytest.raises(NotImplementedError, match="float32 is supported on the CPU alone"):
        call.run()
    assert_all_equal([call.plain(call.k_cache)], [before], equal_nan=True)


@pytest.mark.quick
def test_caches_stand_apart():
    call = make(CPU, [0, 9, 46], 2, 2)
    heads = torch.zeros(3, SEQLEN, HEADS, 32)
    cases = {
        "k_cache overlaps k": {"k": call.k_cache[:, 4:6]},
        "k_cache overlaps v_cache": {"v_cache": call.k_cache},
        "v_cache overlaps q": {"q": heads[:, :2], "v_cache": heads[:, :, :2]},
        "out overlaps v_cache": {"out": heads[:, :2], "v_cache": heads[:, :, :2]},
    }
    tensors = {name: getattr(call, name) for name in ("q", "k_cache", "v_cache", "k", "v")}
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            flash_attn_with_kvcache(**{**tensors, **call.arguments, **changes})
    kv = torch.zeros(3, SEQLEN, HEADS_KV, 64)  # K and V side by side, as in vLLM
    flash_attn_with_kvcache(call.q, kv[..., :32], kv[..., 32:], call.k, call.v, **call.arguments)
    assert torch.equal(kv[1, 9:11], torch.cat([call.k[1], call.v[1]], dim=-1))


@pytest.mark.quick
def test_read_only_caches_are_read_alone():
    call = make(CPU, [0, 9], 1, 1)
    cache = call.k_cache.numpy().copy()
    cache.flags.writeable = False
    tensors = {"q": call.q, "k_cache": cache, "v_cache": call.v_cache}
    expected = flash_attn_with_kvcache(**tensors | {"k_cache": call.k_cache}, **call.arguments)
    assert_all_equal([flash_attn_with_kvcache(**tensors, **call.arguments)], [expected])
    with pytest.raises(ValueError, match="k_cache is read-only"):
        flash_attn_with_kvcache(**tensors, k=call.k, v=call.v, **call.arguments)


@pytest.mark.quick
def test_torch_that_follows_is_refused():
    call = make(CPU, [0, 9], 1, 1)

    def run(q):
        return flash_attn_with_kvcache(q, call.k_cache, call.v_cache, cache_seqlens=3).sum()

    with pytest.raises(NotImplementedError, match="where torch follows a call"):
        torch.vmap(run)(call.q[None])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="where torch follows a call"):
        torch.compile(run, backend="eager", fullgraph=True)(call.q)


@pytest.mark.quick
def test_torch_counts_the_change_of_a_cache():
    call = make(CPU, [0, 9], 1, 1)
    version = call.k_cache._version
    call.run()
    assert call.k_cache._version > version


# ---- garbage on the device -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_garbage_stays_within_the_tensors(device, layout):
    """Lengths and tables that make no sense: the emulator watches every access."""
    if device == CPU:
        pytest.skip("the CPU checks lengths")
    for lengths in ([-5, 2**31 - 1, 47], [-(2**31), 48, 2**31 - 2]):
        call = make(device, [0, 9, 46], 3, 3, layout=layout, rotary=32)
        for name in ("cache_batch_idx", "block_table"):
            if name in call.arguments:
                call.arguments[name].fill_(2**31 - 1)
                call.arguments[name][0] = -7
        call.run(cache_seqlens=on(device, lengths), causal=True)
        call.run(cache_leftpad=on(device, [50, -1, 2**31 - 1]), causal=True)


def test_captured_graphs_replay_with_other_lengths(cuda):
    call = make(CUDA, [0, 9, 30], 1, 1, layout="paged", rotary=32)
    call.run(causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run(causal=True)
    lengths = call.arguments["cache_seqlens"]
    for _ in range(3):
        lengths += 1
        graph.replay()
        expected = call.run(causal=True)
        assert_all_equal(results, expected)
