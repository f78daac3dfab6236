"""The features of a call, a function each: what it puts into a call, and what that means.

A feature has the name of the parameter that asks for it, and the options of csrc/options.h that it
stands for; `head_dim_v` has none. They are put into a call in the order of this file.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func
from flash_attn_sm120.fa2 import flash_attn_with_kvcache
from helpers.block_lists import lists_of, random_map, seen_by
from helpers.call import BATCH, HEADS, HEADS_KV, KEYS, QUERIES, SEED

FUNCTIONS = (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)
E4M3 = torch.float8_e4m3fn


class Feature(NamedTuple):
    put: Callable  # into a Call
    options: tuple[str, ...]
    says: str  # what errors call it: a regular expression


FEATURES: dict[str, Feature] = {}

# Options of the table that are none of a public function.
INTERNAL = {"heads_first": "of torch.ops.aten's doors", "arch": "of what explains"}


def feature(*options, says=""):
    def register(put):
        names = [put.__name__, *options, *([says] if says else [])]
        FEATURES[put.__name__] = Feature(put, options, "|".join(names))
        return put

    return register


# What a parameter is called by the function that has caches.
OF_CACHES = {"seqused_k": "cache_seqlens", "return_lse": "return_softmax_lse"}


def takes(function, name):
    """Whether a function has the parameter of a feature. What has no options is a shape."""
    if not FEATURES[name].options:
        return True
    is_cache = function is flash_attn_with_kvcache
    if name == "k" and not is_cache:  # there it is the keys, not rows that are appended to them
        return False
    parameter = OF_CACHES.get(name, name) if is_cache else name
    return parameter in inspect.signature(function).parameters


# ---- shapes and types ----------------------------------------------------------------------------


@feature(says="head_dim_v")
def head_dim_v(call):
    call.dims = 32, 48


@feature("k_descale", "v_descale", says="float8_e4m3fn")
def k_descale(call):
    call.eight_bits |= {"k", "v"}
    call.scale_by("k", torch.rand(BATCH, HEADS_KV) + 0.5)
    call.scale_by("v", torch.tensor(1.7))


@feature("q_descale", says="float8_e4m3fn")
def q_descale(call):
    call.eight_bits |= {"q", "k", "v"}
    call.scale_by("q", torch.rand(BATCH, HEADS_KV) + 0.5)


# ---- which rows there are, and where -------------------------------------------------------------


@feature("cu_seqlens_q", "max_seqlen_q")
def cu_seqlens_q(call):
    call.pack("q", [QUERIES, 33])


@feature("cu_seqlens_k", "max_seqlen_k")
def cu_seqlens_k(call):
    call.pack("k", [KEYS, 90])


@feature("seqused_q")
def seqused_q(call):
    call.used["q"] = [64, 9]


@feature("seqused_k", "cache_seqlens", says="cache_seqlens")
def seqused_k(call):
    call.used["k"] = [130, 77]


@feature("page_table")
def page_table(call):
    call.page_size = 20


@feature("k", "v")
def k(call):
    call.new_rows = 5


@feature("rotary_cos", "rotary_sin", "rotary_interleaved", says="k")
def rotary_cos(call):
    k(call)
    angles = torch.rand(KEYS, 8) * 6
    call.rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}


@feature("cache_batch_idx")
def cache_batch_idx(call):
    call.entries = [2, 0]


@feature("cache_leftpad")
def cache_leftpad(call):
    call.left_pad = [5, 30]


# ---- scores --------------------------------------------------------------------------------------


@feature("softmax_scale")
def softmax_scale(call):
    call.say(softmax_scale=0.3)


@feature("causal")
def causal(call):
    call.say(causal=True)


@feature("window_size")
def window_size(call):
    call.say(window_size=(60, 3))


@feature("learnable_sink")
def learnable_sink(call):
    call.learn("learnable_sink", torch.randn(HEADS) + 3)


@feature("softcap")
def softcap(call):
    call.say(softcap=1.5)


@feature("alibi_slopes")
def alibi_slopes(call):
    call.learn("alibi_slopes", torch.rand(HEADS) / 8)


@feature("attn_bias", "bias_gradient")
def attn_bias(call):
    """One for all sequences, so that its gradient is a sum."""
    call.learn("attn_bias", torch.randn(1, HEADS, QUERIES, KEYS))


@feature("score_mod")
def score_mod(call):
    """Of every index, with a derivative of its own for each key, and a table that learns."""

    def over(table):
        return lambda s, b, h, i, j: s * (1 + (j + b) % 3 * 0.25) + table[h, i - j + KEYS]

    ours, theirs = call.learn(None, torch.randn(HEADS, QUERIES + KEYS))
    call.named["score_mod"], call.meant["score_mod"] = over(ours), over(theirs)


@feature("mask_mod")
def mask_mod(call):
    def over(seen):
        return lambda b, h, i, j: seen[j] | ((i + b + h) % 2 == 0)

    seen = torch.arange(KEYS) % 7 != 3
    call.named["mask_mod"] = over(call.device.place(seen))
    call.masks["mask_mod"] = over(seen)


@feature("key_blocks", "query_blocks", says="listed blocks|block sparsity")
def block_sparse_tensors(call):
    """Partial blocks and full ones, of which a mask_mod is not asked; some rows have none."""
    partial, full = random_map(BATCH, HEADS, -(-QUERIES // 64), -(-KEYS // 64))
    call.named["block_sparse_tensors"] = lists_of(call.device, partial, full, (64, 64))
    pairs = (seen_by(x, x, (64, 64), QUERIES, KEYS) for x in (partial, full))
    call.masks["partial"], call.masks["full"] = ((lambda *at, x=x: x[at]) for x in pairs)


@feature("dropout_p", "dropout_seed")
def dropout_p(call):
    call.named["dropout_p"] = call.dropout_p = 0.3
    call.named["dropout_seed"] = call.device.place(torch.tensor(SEED))


# ---- how it is computed, and what is returned ----------------------------------------------------


@feature("num_splits")
def num_splits(call):
    call.named["num_splits"] = 3


@feature("pack_gqa")
def pack_gqa(call):
    call.named["pack_gqa"] = True


@feature("deterministic")
def deterministic(call):
    call.named["deterministic"] = True


@feature("return_lse")
def return_lse(call):
    call.returns_lse = True


@feature("out", "lse", says="out=")
def out(call):
    call.writes_out = True
