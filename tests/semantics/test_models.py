"""Whole models: trained over ranks that share the weights, and decoded in CUDA graphs."""

import pytest
import torch

from flash_attn_sm120 import flash_attn_func
from flash_attn_sm120.fa2 import flash_attn_with_kvcache
from helpers.children import BEGIN_RANK, run_ranks
from helpers.devices import CPU, CUDA, params_of
from helpers.models import GPT2_SMALL


@pytest.fixture(params=params_of(CPU, CUDA))
def device(request):
    return request.param


# ---- training ------------------------------------------------------------------------------------

TRAINING = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from helpers.models import Transformer, causal, causal_of_torch

HALF = DEVICE == "cuda"


def make(attention):
    torch.manual_seed(0)
    return Transformer(attention, **MODEL).to(DEVICE)


def train(model, tokens, reduce):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 if MODEL else 1e-2)
    losses = []
    for _ in range(2 if MODEL else 4):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=HALF and reduce is None):
            logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole = loss.detach()
        if reduce:
            dist.all_reduce(whole)
            whole /= size
        losses.append(whole.item())
    return losses


generator = torch.Generator().manual_seed(1)
words = MODEL.get("vocabulary", 16)
tokens = torch.randint(words, (2 * size, 33), generator=generator).to(DEVICE)
alone = make(causal_of_torch)
expected = train(alone, tokens, None)

model = make(causal)
mesh = init_device_mesh(DEVICE, (size,))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if HALF else MixedPrecisionPolicy()
for block in model.blocks:
    block.compile(backend="aot_eager", fullgraph=True)
    fully_shard(block, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)
assert all(isinstance(x, DTensor) for x in model.parameters())
losses = train(model, tokens.chunk(size)[rank], True)
near = 3e-2 if HALF else 1e-4
torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=near, atol=near)
assert losses[-1] < losses[0]
for x, y in zip(model.parameters(), alone.parameters()):
    if not HALF and not MODEL:  # of many weights some have gradients of noise
        torch.testing.assert_close(x.full_tensor(), y, rtol=1e-3, atol=1e-3)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("model", [{}, GPT2_SMALL], ids=["small", "125M"])
def test_compiled_training_of_sharded_weights(device, model, tmp_path, request):
    """FSDP2 on two ranks: losses and weights are those of one process with all sequences, whose
    attention is torch's."""
    if model and device is CPU and not request.config.getoption("--large"):
        pytest.skip("125M parameters on the CPU take --large")
    if device is CUDA and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    code = f"DEVICE = {device.torch_device!r}\nMODEL = {model}\n{BEGIN_RANK}\n{TRAINING}"
    for done in run_ranks(code, 2, tmp_path, timeout=500):
        assert done.returncode == 0, done.stderr


# ---- decoding ------------------------------------------------------------------------------------


def test_decoding_in_a_graph_whose_cache_grows(cuda):
    """Several layers, whose one length is counted by the graph itself, beside plain attention."""
    batch, room, heads, heads_kv, dim, layers = 2, 300, 8, 2, 64, 3
    with torch.device("cuda"):
        new = torch.randn(layers, batch, 1, heads + 2 * heads_kv, dim, dtype=torch.bfloat16)
        caches = torch.zeros(layers, 2, batch, room, heads_kv, dim, dtype=torch.bfloat16)
        lengths = torch.tensor([0, 250], dtype=torch.int32)
    caches[:, :, 1, :250].normal_()
    held = caches.clone()

    def step():
        outs = []
        for rows, (k_cache, v_cache) in zip(new, caches, strict=True):
            q, k, v = rows.split((heads, heads_kv, heads_kv), dim=2)
            outs.append(
                flash_attn_with_kvcache(
                    q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True
                )
            )
        lengths.add_(1)
        return outs

    step()  # compiles
    torch.cuda.synchronize()
    caches.copy_(held)
    lengths.copy_(torch.tensor([0, 250]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    for i in range(40):
        new.normal_()
        graph.replay()
        for layer, out in enumerate(outs):
            q, k, v = new[layer].split((heads, heads_kv, heads_kv), dim=2)
            for b, length in enumerate((i, 250 + i)):
                held[layer, 0, b, length], held[layer, 1, b, length] = k[b, 0], v[b, 0]
                keys = held[layer, :, b : b + 1, : length + 1]
                expected = flash_attn_func(q[b : b + 1], *keys, causal=True)[0]
                torch.testing.assert_close(out[b : b + 1], expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(caches, held) and lengths.tolist() == [40, 290]
