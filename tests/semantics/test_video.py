"""Calls of video models: long sequences without a mask, and cross attention to a prompt."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from flash_attn_sm120 import explain, sdpa
from helpers.checks import check_forward
from helpers.devices import CPU, CUDA
from helpers.shapes import SM120_SMEM, shapes

pytestmark = pytest.mark.quick

NODE = Path(__file__).parents[2] / "examples/comfyui/sm120_attention.py"
on_devices = pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)

# Heads, head dim, batch, queries, keys, as in benchmarks/video.py.
FULL = {
    "wan-480p": (40, 128, 1, 32760, 32760),
    "wan-720p-text": (40, 128, 1, 75600, 512),
    "hunyuan": (24, 128, 1, 119056, 119056),
    "ltx": (32, 64, 2, 30720, 30720),
    "ltx-text": (32, 64, 2, 30720, 512),
    "cogvideox": (48, 64, 2, 45106, 45106),
}
named = pytest.mark.parametrize("call", FULL)


def reduced(call):
    """A few heads, and a part of the tokens that ends in the same part of a tile; 512 keys stay."""
    heads, head_dim, batch, *seqlens = FULL[call]
    queries, keys = (512 + n % 512 if n > 512 else n for n in seqlens)
    return batch, queries, keys, heads // 16, head_dim


@pytest.fixture
def inputs(device, call):
    """q, k, v (batch, seqlen, heads, head_dim): views of (batch, heads, seqlen, head_dim)."""
    batch, queries, keys, heads, head_dim = reduced(call)
    return [
        device.place(torch.randn(batch, heads, n, head_dim).bfloat16()).transpose(1, 2)
        for n in (queries, keys, keys)
    ]


@on_devices
@named
def test_reduced(device, call, inputs):
    check_forward(*inputs)


@on_devices
@named
def test_reduced_as_sdpa(device, call, inputs):
    call = [x.transpose(1, 2) for x in inputs]
    out = sdpa.scaled_dot_product_attention(*call)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*call), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("arch", [86, 89, 90, 120, 121])
@named
def test_plan_at_full_size(call, arch):
    """One launch that holds all rows, without a workspace: no scores, no parts of keys."""
    heads, head_dim, batch, queries, keys = FULL[call]
    call = shapes(head_dim, None, queries, keys, (heads, heads), batch)
    plan = explain(*call, arch=arch)
    assert len(plan.steps) == 1 and plan.workspace_bytes == 0 and plan.num_splits == 1
    assert plan.blocks == -(-queries // plan.tile_m) * heads * batch
    assert plan.smem_bytes <= SM120_SMEM


# ---- the node for ComfyUI, with a stand-in for its registry --------------------------------------


def attention_pytorch(q, k, v, heads, mask=None, attn_precision=None, **options):
    """What ComfyUI does where nothing else is chosen."""
    if not options.get("skip_reshape"):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.get("scale"))
    return out if options.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


class Model:
    """ComfyUI's ModelPatcher, as far as a node that patches attention sees it."""

    def __init__(self, options):
        self.model_options = options

    def clone(self):
        return Model({name: dict(x) for name, x in self.model_options.items()})


@pytest.fixture
def comfyui(monkeypatch):
    """The node's module, and what it has registered."""
    registered = {}
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = sys.modules["comfy.ldm.modules.attention"]
    module.attention_pytorch = attention_pytorch
    module.register_attention_function = registered.__setitem__
    spec = importlib.util.spec_from_file_location("sm120_attention", NODE)
    node = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(node)
    return node, registered


@pytest.mark.skipif(not NODE.exists(), reason="runs in a checkout alone")
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_comfyui_node(comfyui, skip_reshape, skip_output_reshape):
    node, registered = comfyui
    assert list(registered) == ["sm120"]
    model = Model({"transformer_options": {"block_index": 3}})
    patcher = node.NODE_CLASS_MAPPINGS["SM120Attention"]
    assert patcher.INPUT_TYPES() == {"required": {"model": ("MODEL",)}}
    (patched,) = getattr(patcher(), patcher.FUNCTION)(model)
    options = patched.model_options["transformer_options"]
    assert model.model_options == {"transformer_options": {"block_index": 3}}
    assert options.keys() == {"block_index", "optimized_attention_override"}
    override = options["optimized_attention_override"]

    def otherwise(*args, **kwargs):
        raise AssertionError("ours was not called")

    shape = (2, 3, 40, 24) if skip_reshape else (2, 40, 72)
    q, k, v = (torch.randn(shape).bfloat16() for _ in range(3))
    given = {"transformer_options": options, "scale": 0.3, "low_precision_attention": False}
    given |= {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    expected = attention_pytorch(q, k, v, 3, **given)
    for call in (lambda *x, **y: override(otherwise, *x, **y), registered["sm120"]):
        torch.testing.assert_close(call(q, k, v, 3, **given), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not NODE.exists(), reason="runs in a checkout alone")
def test_comfyui_keeps_what_the_node_does_not_take(comfyui):
    node, registered = comfyui
    calls = []

    def otherwise(q, k, v, heads, **options):
        calls.append(options)
        return attention_pytorch(q, k, v, heads, **options)

    def make(dim, dtype):
        return [torch.randn(1, 5, 2 * dim).to(dtype) for _ in range(3)]

    mask = torch.zeros(5, 5, dtype=torch.bfloat16)
    cases = [
        (make(8, torch.bfloat16), mask),
        (make(8, torch.float32), None),
        (make(264, torch.bfloat16), None),
    ]
    for tensors, given in cases:
        out = node.attention(otherwise, *tensors, 2, mask=given, skip_output_reshape=True)
        again = registered["sm120"](*tensors, 2, mask=given, skip_output_reshape=True)
        assert torch.equal(out, again) and out.shape[1:3] == (2, 5)
        assert calls[-1]["mask"] is given and calls[-1]["skip_output_reshape"]
    assert len(calls) == len(cases)
