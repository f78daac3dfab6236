"""Context parallelism: every rank has some rows, and what all have together is what one would have."""

import math

import pytest
import torch

from flash_attn_sm120 import flash_attn_func, parallel
from helpers.children import BEGIN_RANK, run_ranks
from helpers.devices import CPU, CUDA, params_of


@pytest.fixture(params=params_of(CPU, CUDA))
def device(request):
    return request.param


# ---- merging -------------------------------------------------------------------------------------


def random_qkv(device, seqlen_q, seqlen_k):
    shapes = [(2, seqlen_q, 4, 16), *[(2, seqlen_k, 2, 16)] * 2]
    made = [torch.randn(x).to(device.torch_device, device.dtypes[0]) for x in shapes]
    return [x.requires_grad_() for x in made]


def weighted_sum(out, lse):
    """Of both; rows without keys have an lse that says nothing."""
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return (out * weights).sum() + lse.where(lse > -math.inf, 0.0).square().sum()


@pytest.mark.parametrize("split", [0, 3, 7])
def test_two_sets_of_keys_are_as_one(device, split):
    """Causal: the last rows of keys are seen by few queries, and the first rows of queries see none."""
    q, k, v = random_qkv(device, 9, 7)
    whole = flash_attn_func(q, k, v, causal=True, return_lse=True)
    parts = []
    for begin, end in ((0, split), (split, 7)):
        window = (None, 7 - end)  # what is bottom right of a part is not that of the whole
        keys = k[:, begin:end], v[:, begin:end]
        parts += flash_attn_func(q, *keys, window_size=window, return_lse=True)
    merged = parallel.merge(*parts)
    near = {} if device is CPU else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(merged, whole, **near)
    assert not merged[0][:, :2].any() and (merged[1][:, :, :2] == -math.inf).all()
    gradients = [torch.autograd.grad(weighted_sum(*x), (q, k, v)) for x in (merged, whole)]
    torch.testing.assert_close(*gradients, **near)


def test_rows_without_keys_are_merged_without_nan():
    """In a, in b, in both: lse is -inf; and so are those of packed sequences."""
    out_a, out_b = (
        torch.randn(4, 3, 8, requires_grad=True) for _ in range(2)
    )  # (rows, heads, dim)
    lse_a, lse_b = (torch.randn(3, 4) for _ in range(2))
    lse_a[:, [0, 2]] = lse_b[:, [1, 2]] = -math.inf
    lse_a.requires_grad_()
    lse_b.requires_grad_()
    out, lse = parallel.merge(out_a, lse_a, out_b * 1, lse_b)
    torch.testing.assert_close(out[0], out_b[0])
    torch.testing.assert_close(out[1], out_a[1])
    assert not out[2].any()
    torch.testing.assert_close(lse, torch.logaddexp(lse_a, lse_b))
    weighted_sum(out, lse).backward()
    for x in (out_a, out_b, lse_a, lse_b):
        assert x.grad.isfinite().all()
    assert not out_a.grad[[0, 2]].any() and not lse_a.grad[:, [0, 2]].any()


def test_scores_of_infinity_stay_seen():
    out, lse = torch.full((1, 1, 8), math.nan), torch.full((1, 1), math.inf)
    merged, merged_lse = parallel.merge(out, lse, torch.ones(1, 1, 8), torch.zeros(1, 1))
    assert merged.isnan().all() and (merged_lse == math.inf).all()


def test_the_wider_type_is_kept():
    lse = torch.zeros(3, 4)
    out = torch.ones(4, 3, 8, dtype=torch.bfloat16)
    assert parallel.merge(out, lse, out, lse)[0].dtype == torch.bfloat16
    assert parallel.merge(out.float(), lse, out, lse)[0].dtype == torch.float32


# ---- ranks ---------------------------------------------------------------------------------------


def test_parts_of_ranks():
    x = torch.arange(8).view(1, 8)
    parts = [parallel.shard(x, rank, 2).tolist() for rank in range(2)]
    assert parts == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    parts = [parallel.shard(x, rank, 2, zigzag=True).tolist() for rank in range(2)]
    assert parts == [[[0, 1, 6, 7]], [[2, 3, 4, 5]]]
    with pytest.raises(ValueError, match="8 rows cannot be divided into 6 equal parts"):
        parallel.shard(x, 0, 3, zigzag=True)


@pytest.mark.parametrize("zigzag", [False, True])
def test_blocks_cover_what_is_visible_once(zigzag):
    """Causal over four ranks; with zigzag all of them have as much to do."""
    size, local = 4, 6
    counts = torch.zeros(size * local, size * local, dtype=torch.int)
    work = []
    positions = torch.arange(size * local)[:, None]
    places = [parallel.shard(positions, r, size, dim=0, zigzag=zigzag)[:, 0] for r in range(size)]
    for rank in range(size):
        ring = parallel._Ring(None, rank, size, zigzag, local, local, None, 0)
        assert sorted(ring.source(step) for step in range(size)) == list(range(size))
        before = counts.sum()
        for source in range(size):
            for rows, keys, (left, right) in ring.blocks(source):
                i, j = places[rank][rows], places[source][keys]
                distance = torch.arange(len(j))[None] - torch.arange(len(i))[:, None]
                visible = distance <= (len(j) if right is None else right)
                assert left is None and visible.any()
                counts[i[:, None], j[None]] += visible.int()
        work.append((counts.sum() - before).item())
    assert torch.equal(counts, torch.ones_like(counts).tril())
    assert (len(set(work)) == 1) == zigzag


RANKS = """
from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func, parallel

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NEAR = {"rtol": 2e-2, "atol": 2e-2} if DEVICE == "cuda" else {"rtol": 1e-5, "atol": 1e-5}


def make(*shape):
    return torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_()


def loss(out, lse):
    return (out.float() * out.float().sin()).sum() + lse.where(lse.isfinite(), 0).square().sum()


def compare(what, local, whole, inputs, take):
    \"\"\"Results and gradients of the local rows with those of the whole.\"\"\"
    local_inputs, (out, lse) = local
    gradients = torch.autograd.grad(loss(out, lse), local_inputs)
    expected = torch.autograd.grad(loss(*whole), inputs)
    rows = -1 if lse.dim() == 2 else 2
    torch.testing.assert_close(out, take(whole[0], 0 if rows < 0 else 1), **NEAR, msg=f"out, {what}")
    torch.testing.assert_close(lse, take(whole[1], rows), **NEAR, msg=f"lse, {what}")
    for x, y in zip(gradients, expected):
        y = take(y, 0 if rows < 0 else 1)
        largest = y.abs().max().item()
        error = (x - y).abs().max().item()
        assert error <= NEAR["rtol"] * max(1, largest), (what, error, largest)
"""

RING = """
torch.manual_seed(0)
cases = [
    dict(causal=causal, zigzag=zigzag, window_size=window, keys=keys, softcap=softcap)
    for zigzag in (False, True)
    for causal, window, keys, softcap in (
        (False, (None, None), 16, 0.0),
        (True, (None, None), 16, 0.0),
        (True, (None, None), 32, 5.0),   # more keys than queries
        (True, (None, None), 8, 0.0),    # the first queries see none
        (True, (3, None), 16, 0.0),
        (False, (5, 2), 16, 0.0),
        (False, (-2, 6), 24, 0.0),
        (False, (-3, 1), 16, 0.0),       # hides all keys: none
    )
]
for case in cases:
    keys, zigzag = case["keys"], case["zigzag"]
    options = {x: case[x] for x in ("causal", "window_size", "softcap")}
    inputs = make(2, 16, 4, 16), make(2, keys, 2, 16), make(2, keys, 2, 24)
    take = lambda x, dim: parallel.shard(x, rank, size, dim=dim, zigzag=zigzag)
    local = [take(x.detach(), 1).requires_grad_() for x in inputs]
    results = parallel.ring_flash_attn_func(*local, zigzag=zigzag, return_lse=True, **options)
    whole = flash_attn_func(*inputs, return_lse=True, **options)
    compare(case, (local, results), whole, inputs, take)

# of a group that is not all ranks, and only lse
half = dist.new_group(list(range(size // 2, size)))
if rank >= size // 2:
    inputs = [make(1, 8, 2, 16) for _ in range(3)]
    take = lambda x: parallel.shard(x, rank - size // 2, size - size // 2)
    local = [take(x.detach()).requires_grad_() for x in inputs]
    torch.manual_seed(0)
    out, lse = parallel.ring_flash_attn_func(*local, group=half, causal=True)
    assert lse is None
    torch.testing.assert_close(out, take(flash_attn_func(*inputs, causal=True)[0]), **NEAR)
    lse = parallel.ring_flash_attn_func(*local, group=half, return_lse=True)[1]
    lse.sum().backward()
    assert not local[2].grad.any() and local[0].grad.any()
"""

GATHERED = """
torch.manual_seed(0)
cuts = [0, 3, 3, 9, 20, 24]  # of 24 rows: sequences that begin, end and go through a rank's
begins = torch.tensor(cuts, dtype=torch.int32, device=DEVICE)
for options in ({}, {"causal": True}, {"causal": True, "window_size": (4, None)}, {"softcap": 5.0}):
    inputs = make(24, 4, 16), make(24, 2, 16), make(24, 2, 24)
    take = lambda x, dim: parallel.shard(x, rank, size, dim=dim)
    local = [take(x.detach(), 0).requires_grad_() for x in inputs]
    results = parallel.gathered_flash_attn_varlen_func(
        *local, begins, max_seqlen=11, return_lse=True, **options
    )
    lengths = {"cu_seqlens_q": begins, "cu_seqlens_k": begins}
    whole = flash_attn_varlen_func(*inputs, **lengths, return_lse=True, **options)
    compare(options, (local, results), whole, inputs, take)
try:
    parallel.gathered_flash_attn_varlen_func(*local, begins, window_size=(4, 1))
except NotImplementedError:
    pass
else:
    raise AssertionError("a window without causal")
"""

CONTEXT_PARALLEL = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional as F

from flash_attn_sm120 import sdpa


def scaled_dot_product_attention(q, k, v, is_causal):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


if DEVICE == "cpu":  # for which torch itself has no FlashAttention
    handle = sdpa.override("CPU")
    F.scaled_dot_product_attention = scaled_dot_product_attention
else:
    handle = sdpa.activate()
torch.manual_seed(0)
inputs = [make(2, 4, 16 * size, 16) for _ in range(3)]
whole = flash_attn_func(*(x.transpose(1, 2) for x in inputs), causal=True)[0].transpose(1, 2)
expected = torch.autograd.grad((whole.float() * whole.float().sin()).sum(), inputs)
local = [x.detach().clone() for x in (*inputs, whole, *expected)]
with (
    torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
    context_parallel(init_device_mesh(DEVICE, (size,)), buffers=local, buffer_seq_dims=[2] * 7),
):
    q, k, v = (x.clone().requires_grad_() for x in local[:3])
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    (out.float() * out.float().sin()).sum().backward()
    got = [out, q.grad, k.grad, v.grad]
    torch.testing.assert_close(got, local[3:], **NEAR)
for name in ("", "_backward"):
    assert sdpa.stats().taken[f"_scaled_dot_product_flash_attention{name}"] == size
"""


def run_on(device, size, code, directory):
    if device is CUDA and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    end = "dist.barrier()\ndist.destroy_process_group()\n"
    whole = f"DEVICE = {device.torch_device!r}\n{BEGIN_RANK}\n{RANKS}\n{code}\n{end}"
    for done in run_ranks(whole, size, directory, timeout=120):
        assert done.returncode == 0, done.stderr


def test_ring_and_gathered_keys_of_four_ranks(device, tmp_path):
    run_on(device, 4, RING + GATHERED, tmp_path)


def test_two_ranks(device, tmp_path):
    """torch's own context parallelism, too, whose steps come through the door of sdpa.py."""
    run_on(device, 2, RING + GATHERED + CONTEXT_PARALLEL, tmp_path)


def test_one_rank(device, tmp_path):
    run_on(device, 1, RING + GATHERED, tmp_path)
