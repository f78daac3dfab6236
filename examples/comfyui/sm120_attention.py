"""A ComfyUI node: a model whose attention is computed by flash_attn_sm120.

Copy this file to ComfyUI's custom_nodes/, and put the node "SM120 attention" between a model and
its sampler. The function is also registered as "sm120", for nodes that choose one by name. Calls
with a mask, in float32 or with head dims of more than 256 are left to ComfyUI's own attention.
"""

from functools import partial

import torch
from comfy.ldm.modules.attention import attention_pytorch, register_attention_function

from flash_attn_sm120.fa2 import flash_attn_func


def attention(otherwise, q, k, v, heads, mask=None, attn_precision=None, **options):
    """ComfyUI's call: q, k, v are (batch, rows, heads * dim), or (batch, heads, rows, dim)."""
    in_heads = options.get("skip_reshape", False)
    head_dim = q.shape[-1] if in_heads else q.shape[-1] // heads
    if mask is not None or q.dtype == torch.float32 or head_dim > 256:
        return otherwise(q, k, v, heads, mask=mask, attn_precision=attn_precision, **options)
    rows = [x.transpose(1, 2) if in_heads else x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
    out = flash_attn_func(*rows, softmax_scale=options.get("scale"))
    return out.transpose(1, 2) if options.get("skip_output_reshape") else out.flatten(2)


class SM120Attention:
    CATEGORY, FUNCTION, RETURN_TYPES = "model_patches", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        patched = model.clone()
        options = patched.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = attention
        return (patched,)


register_attention_function("sm120", partial(attention, attention_pytorch))
NODE_CLASS_MAPPINGS = {"SM120Attention": SM120Attention}
NODE_DISPLAY_NAME_MAPPINGS = {"SM120Attention": "SM120 attention"}
