"""Kernels of quantised attention on the emulator: one launch, or all of a call."""

from contextlib import ExitStack, nullcontext

import torch

from emulator import emulator
from flash_attn_sm120 import jit
from flash_attn_sm120.quantized import Quantized, device, kernel, quantize
from flash_attn_sm120.quantized.attention import checked_call


def run(launch, *written):
    """It may touch nothing but the bytes of its tensors."""
    code = jit.compile(kernel.KERNEL, *launch.variant[:2], 120, 13000, ptx=True)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    with ExitStack() as stack:
        for x in launch.tensors:
            array = x.view(integers[x.element_size()]).numpy()
            stack.enter_context(emulator().allowed(array, writable=any(x is y for y in written)))
        emulator().run(
            code.rstrip(b"\0").decode(),
            bytes(launch.parameters),
            grid=launch.blocks,
            block=launch.variant.threads,
            shared=launch.variant.shared_bytes,
        )


def emulate_device(monkeypatch, multiprocessors=170):
    """From now on device.attend computes CPU tensors as an RTX 5090 would; a list of launches."""
    launches = []

    def prepare(q, k, v, options, out, lse, target, tile, prepare=kernel.prepare):
        launch = prepare(q, k, v, options, out, lse, target, tile)
        launches.append(lambda: run(launch, out, lse))
        return launch

    monkeypatch.setattr(kernel, "prepare", prepare)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    card = device.card_of_arch(120)._replace(sms=multiprocessors)
    monkeypatch.setattr(device, "card_of", lambda index: card)
    monkeypatch.setattr(device, "_loaded", lambda variant, index: lambda *_: launches[-1]())
    return launches


def attend_there(*operands, recipe, **options):
    """quantized_attention of CPU tensors, after emulate_device()."""
    narrow = [
        x if isinstance(x, Quantized) else quantize(x, recipe, name)
        for x, name in zip(operands, "qkv", strict=True)
    ]
    call = checked_call(*narrow, recipe, **options)
    out = torch.full(call.out_shape, torch.nan, dtype=call.out_dtype)
    lse = torch.full(call.lse_shape, torch.nan) if call.returns_lse else None
    device.attend(*narrow, call.options, out, lse)
    return out, lse
