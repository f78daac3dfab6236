"""explain_quantized: the launches are those of a call, and it says where bf16 is faster."""

import re
from types import SimpleNamespace

import pytest
import torch

from flash_attn_sm120.quantized import (
    RECIPES,
    device,
    explain_quantized,
    kernel,
    quantize,
    quantize_kv,
    quantized_attention,
)

recipes = pytest.mark.parametrize("recipe", RECIPES)


def make(seqlen_q, seqlen_k, dim, heads=16, batch=1):
    shapes = ((seqlen_q, heads), (seqlen_k, heads), (seqlen_k, heads))
    return [torch.randn(batch, *shape, dim).bfloat16() for shape in shapes]


@recipes
@pytest.mark.parametrize("arch", [120, 121])
def test_a_short_call_is_not_slower_or_explain_says_so(recipe, arch):
    """Of B 1, S 512, D 64. By the model quantising takes longer than what it saves."""
    q, k, v = make(512, 512, 64)
    said = explain_quantized(q, k, v, recipe, arch=arch).reasons["speed"]
    ours, before, plain = (float(x) for x in re.findall(r"([\d.]+) us", said))
    assert ("SLOWER" in said) == (ours + before > plain) and "not measured" in said
    narrow = quantize(q, recipe, "q"), *quantize_kv(k, v, recipe)
    plan = explain_quantized(*narrow, recipe, arch=arch)
    said = plan.reasons["speed"]
    ours, plain = (float(x) for x in re.findall(r"([\d.]+) us", said))
    assert ("SLOWER" in said) == (ours > plain) and len(plan.steps) == 1
    if arch == 120:  # the cards that the recipes are for: not DGX Spark
        assert "SLOWER" not in said


@recipes
def test_a_long_call_is_faster(recipe):
    q = torch.empty(1, 16384, 16, 128, dtype=torch.bfloat16)
    for arch in (120, 121):
        plan = explain_quantized(q, q, q, recipe, arch=arch, causal=True)
        assert len(plan.steps) <= 4 and plan.steps[plan.main_step].kernel == kernel.KERNEL
        speed = re.search(r"([\d.]+) times as fast", plan.reasons["speed"])
        assert float(speed[1]) > (1.3 if arch == 120 else 1.0)
        assert re.match(r"q, k.*: \d launches, [\d.e+]+ MB", plan.reasons["quantise"])


@recipes
def test_the_plan_is_that_of_the_launch(recipe):
    q, k, v = make(80, 300, 64, heads=2)
    options = {"causal": True, "softcap": 5.0, "learnable_sink": torch.zeros(2)}
    plan = explain_quantized(q, k, v, recipe, arch=120, num_splits=2, **options)
    narrow = [quantize(x, recipe, name) for x, name in zip((q, k, v), "qkv", strict=True)]
    out, lse = torch.empty(2, 1, 80, 2, 64), torch.empty(2, 1, 2, 80)
    options |= {"softmax_scale": 1.0, "window_size": (None, None), "num_splits": 2}
    launch = kernel.prepare(*narrow, options, out, lse, device.card_of_arch(120).target)
    assert (plan.variant, plan.blocks) == (launch.variant.name, launch.blocks)
    assert plan.options == launch.variant.options and plan.num_splits == 2
    assert plan.workspace_bytes == 4 * (out.numel() + lse.numel())


def test_what_is_not_predicted():
    q, k, v = make(70, 90, 64)
    assert explain_quantized(q, k, v).kernel == "cpu"
    assert "speed" not in explain_quantized(q, k, v, arch=90).reasons
    windowed = explain_quantized(q, k, v, arch=120, window_size=(5, 5))
    assert "not predicted" in windowed.reasons["speed"]
    assert not explain_quantized(q[:, :0], k, v, arch=120).steps
    with pytest.raises(RuntimeError, match="block-scaled products"):
        explain_quantized(q, k, v, "nvfp4", arch=90)
    with pytest.raises(RuntimeError, match=r"8\.9 or newer"):
        explain_quantized(q, k, v, arch=75)
    with pytest.raises(NotImplementedError, match="pack_gqa"):
        explain_quantized(q, k, v, arch=120, pack_gqa=True)


def test_options_are_those_of_the_call():
    """What one refuses the other refuses."""
    given = make(5, 6, 32)
    for function in (quantized_attention, explain_quantized):
        with pytest.raises(ValueError, match="softcap"):
            function(*given, softcap=-1.0)


@pytest.mark.parametrize(
    "name, arch, sms, rows",
    [
        ("NVIDIA GeForce RTX 5070 Ti", 120, 70, 120),
        ("NVIDIA RTX PRO 6000 Blackwell", 120, 188, 121),
        ("NVIDIA GB10", 121, 48, 121),
        ("NVIDIA H100 80GB HBM3", 90, 132, None),
    ],
)
def test_a_device_is_what_its_name_says(name, arch, sms, rows, monkeypatch):
    facts = {"name": name, "arch": arch, "sms": sms, "smem_per_sm": 100 << 10}
    driver = SimpleNamespace(devices=lambda: (13000, [facts]), card_kind=device._C.card_kind)
    monkeypatch.setattr(device, "_C", driver)
    card = device.card_of.__wrapped__(0)
    assert (card.arch, card.sms, card.smem_per_sm) == (arch, sms, 100 << 10)
    assert card.target.mx_e4m3 == (rows == 120) and card.target.transposes_bytes == (arch >= 120)
    assert (card.model and card.model.rows) == rows
    assert not card.model or card.model.sms == sms
