"""Every feature with all others at once: calls drawn at random, forward and gradients.

Each run draws the same calls. `pytest tests/semantics/test_together.py --examples 500` draws as many others.
"""

import warnings

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from flash_attn_sm120 import _C, flash_attn_func
from helpers.checks import assert_all_equal, dlse_for
from helpers.devices import CPU
from helpers.dropout import factors
from helpers.inputs import LAYOUTS, random_tensor
from helpers.reference import assert_close, assert_gradients_close

# Each call on the emulator compiles some four kernels.
EXAMPLES = {"cpu": 60, "cuda": 30, "cuda-large": 30, "emulator": 10, "emulator-large": 10}

# Around the edges of tiles, and anywhere.
LENGTHS = st.sampled_from((0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129)) | st.integers(0, 300)
HEAD_DIMS = st.sampled_from((64, 128)) | st.integers(1, 32).map(lambda eighth: 8 * eighth)
EDGE_OF_WINDOW = st.none() | st.integers(-150, 150)

SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "seqlen_q": LENGTHS,
        "seqlen_k": LENGTHS,
        "heads_kv": st.integers(1, 2),
        "heads_per_kv": st.sampled_from((1, 2, 3, 4, 7)),
        "head_dim": HEAD_DIMS,
        "head_dim_v": st.none() | HEAD_DIMS,  # None: head_dim
        "mean": st.sampled_from((0.0, 0.0, 1.0)),
    }
)
OPTIONS = st.fixed_dictionaries(
    {
        "softmax_scale": st.sampled_from((None, None, 0.0, -0.2, 0.5)),
        "causal": st.booleans(),
        "window_size": st.just((None, None)) | st.tuples(EDGE_OF_WINDOW, EDGE_OF_WINDOW),
        "softcap": st.sampled_from((0.0, 0.0, 0.7, 20.0)),
    }
)
# What a result means, in the order of _C; with the sink, which is drawn for the heads of the call.
MEANING = ("softmax_scale", "causal", "window_size", "softcap", "learnable_sink")
CHOICES = st.fixed_dictionaries(  # that change how a result is computed, and not what it is
    {
        "num_splits": st.sampled_from((0, 1, 2, 3, 9)),
        "pack_gqa": st.sampled_from((None, False, True)),
        "deterministic": st.booleans(),
    }
)
LAYOUTS_OF_EACH = st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 4)
# Of a bias: which of batch, heads and queries have their own, its type, and how large it is.
BIASES = st.none() | st.tuples(
    st.tuples(*[st.booleans()] * 3), st.booleans(), st.sampled_from((1.0, 10.0, 100.0))
)
SINKS = st.none() | st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


def explored(device, examples):
    """A decorator that calls a test with a device's number of random calls, or with `examples` others."""

    def decorate(test):
        settings = hypothesis.settings(
            max_examples=examples or EXAMPLES[device.name],
            derandomize=not examples,
            deadline=None,  # some calls compile
            database=None,
        )
        return settings(hypothesis.given(st.data())(test))

    return decorate


def random_tensors(device, dtype, shape, layouts):
    """q, k, v and dout, each in a layout of its own."""
    batch, head_dim, heads_kv = shape["batch"], shape["head_dim"], shape["heads_kv"]
    head_dim_v = shape["head_dim_v"] or head_dim
    queries = (batch, shape["seqlen_q"], heads_kv * shape["heads_per_kv"])
    keys = (batch, shape["seqlen_k"], heads_kv)
    shapes = ((*queries, head_dim), (*keys, head_dim), (*keys, head_dim_v), (*queries, head_dim_v))
    return [
        random_tensor(device, x, dtype, shape["mean"], layout)
        for x, layout in zip(shapes, layouts, strict=True)
    ]


@pytest.mark.quick("cpu")
def test_everything_together(device, request, outputs_full_of_nan):
    @explored(device, request.config.getoption("--examples"))
    def check(data):
        dtype = data.draw(st.sampled_from(device.dtypes), "dtype")
        shape, options, choices = (data.draw(each) for each in (SHAPES, OPTIONS, CHOICES))
        layouts = data.draw(LAYOUTS_OF_EACH, "layouts")
        sink_dtype = data.draw(SINKS, "sink")
        torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
        q, k, v, dout = random_tensors(device, dtype, shape, layouts)
        sink = None if sink_dtype is None else device.place(torch.randn(q.shape[2]).to(sink_dtype))
        dlse = dlse_for(device, q) if data.draw(st.booleans(), "dlse") else None
        dropout_p = data.draw(st.sampled_from((0.0, 0.0, 0.2, 0.6)), "dropout_p")
        bias = bias_of(device, q, k, data.draw(BIASES, "bias"))
        options = {**options, "learnable_sink": sink, "attn_bias": bias}
        right(device, q, k, v, dout, dlse, options, dropout(device, q, k, dropout_p), **choices)

    check()


def bias_of(device, q, k, drawn):
    """A bias with a tenth of its elements -inf, in one of the sizes that broadcast."""
    if drawn is None:
        return None
    own, is_fp32, factor = drawn
    sizes = [
        n if has else 1 for n, has in zip((q.shape[0], q.shape[2], q.shape[1]), own, strict=True)
    ]
    bias = factor * torch.randn(*sizes, k.shape[1])
    bias[torch.rand(bias.shape) < 0.1] = -torch.inf
    return device.place(bias if is_fp32 else bias.to(q.dtype))


def has_bias_gradient(device, q, options, deterministic):
    """Whether kernels compute it, too."""
    bias = options["attn_bias"]
    if bias is None or device is CPU:
        return bias is not None
    shared = bias.shape[:3] != (q.shape[0], q.shape[2], q.shape[1])
    return not options["softcap"] and not (deterministic and shared)


def dropout(device, q, k, dropout_p):
    """Options of the call, and what the reference multiplies weights by."""
    seed, (batch, queries, heads, _) = (2**62 + 5, 17), q.shape
    weights = factors(seed, dropout_p, range(batch), heads, queries, k.shape[1])
    given = {"dropout_p": dropout_p, "dropout_seed": device.place(torch.tensor(seed))}
    return given, {"dropout": device.place(weights) if dropout_p else None}


def right(device, q, k, v, dout, dlse, options, dropout, num_splits, pack_gqa, deterministic):
    """One call and its gradients, held against the reference; what must be is the same twice."""
    options, meant = ({**options, **more} for more in dropout)

    def forward():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "pack_gqa was asked for and is dropped")
            return flash_attn_func(
                q, k, v, **options, num_splits=num_splits, pack_gqa=pack_gqa, return_lse=True
            )

    def backward():
        gradients = _C.backward(
            *(dout, q, k, v, out, lse, dlse),
            **options,
            deterministic=deterministic,
            bias_gradient=bias_gradient,
        )
        return [x for x in gradients if x is not None]

    bias_gradient = has_bias_gradient(device, q, options, deterministic)
    out, lse = forward()
    assert_close(out, lse, q, k, v, **meant)
    assert_all_equal(forward(), (out, lse))
    gradients = backward()
    assert_gradients_close(gradients, q, k, v, dout, dlse, **meant, of_bias=bias_gradient)
    if deterministic:
        assert_all_equal(backward(), gradients)
