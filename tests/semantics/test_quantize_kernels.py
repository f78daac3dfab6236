"""The quantisers' kernels on the emulator, beside the torch operations of the CPU."""

from contextlib import ExitStack

import pytest
import torch

from emulator import emulator, unavailable
from flash_attn_sm120 import jit
from flash_attn_sm120.quantized import device_quantize
from flash_attn_sm120.quantized.quantize import _ENCODERS
from helpers.structs import fields_of

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def emulate(x, format, operand, subtracts_mean):
    narrow, launches = device_quantize.prepare(x, format, operand, subtracts_mean)
    for launch in launches:
        code = jit.compile(launch.kernel, launch.kernel, launch.options, 120, 13000, ptx=True)
        with ExitStack() as stack:
            for tensor in launch.tensors:
                array = tensor.view(INTEGERS[tensor.element_size()]).numpy()
                stack.enter_context(emulator().allowed(array, writable=tensor is not x))
            emulator().run(
                code.rstrip(b"\0").decode(),
                bytes(launch.parameters),
                grid=launch.blocks,
                block=device_quantize.THREADS,
            )
    return narrow


def check(x, format, operand, subtracts_mean):
    """Codes and scales have the CPU's bits, given the mean."""
    narrow = emulate(x, format, operand, subtracts_mean)
    values = x.float()
    if subtracts_mean:
        error = (narrow.mean.double() - x.double().mean(dim=1)).abs()
        assert (error <= 1e-5 * x.double().abs().mean(dim=1)).all()
        values = values - narrow.mean[:, None]
    data, *scales = _ENCODERS[format](values, operand)
    assert torch.equal(narrow.data.view(torch.uint8), data.view(torch.uint8))
    for got, wanted in zip((narrow.scale, narrow.head_scale), scales, strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or torch.equal(got, wanted)


def make(seqlen, dim, dtype=torch.bfloat16):
    torch.manual_seed(seqlen)
    x = torch.randn(2, seqlen, 2, dim)
    x[:, :40, 1] = 0
    return x.to(dtype)


CASES = {
    "int8 q": (make(75, 64), "int8", "q", False),
    "int8 k": (make(300, 48), "int8", "k", True),
    "int8 k fp16": (make(65, 128, torch.float16), "int8", "k", True),
    "fp8 v": (make(77, 96), "fp8", "v", False),
    "fp8 k": (make(33, 256), "fp8", "k", True),
    "zeros": (torch.zeros(1, 5, 1, 16, dtype=torch.bfloat16), "fp8", "v", False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bits_are_those_of_the_cpu(case):
    check(*case)


def test_strides():
    check(make(70, 64).transpose(1, 2).contiguous().transpose(1, 2), "int8", "k", True)


def test_nan_and_infinity_reach_what_shares_their_scale():
    x = make(70, 32)
    x[0, 3, 0, 1], x[1, 66, 1, 2] = float("nan"), float("inf")
    k = emulate(x, "int8", "k", False)
    assert k.scale[0, 0].isnan().tolist() == [True, False]
    assert k.scale[1, 1].isinf().tolist() == [False, True]
    v = emulate(x, "fp8", "v", False)
    assert v.head_scale[0, 0].isnan() and v.data[0, :, 0].float().isnan().all()
    assert v.data[1, 66, 1, 2].float().isnan() and v.data[0, :, 1].float().isfinite().all()


def test_host_and_device_agree_on_the_parameters():
    names = fields_of("quantize.cuh", "fa_quantize_params")
    assert names == [name for name, *_ in device_quantize.Parameters._fields_]
