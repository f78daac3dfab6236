"""A Transformers model by this attention: decoding, with both kinds of cache.

    python examples/transformers_inference.py

Needs Transformers (`pip install flash_attn_sm120[hf]`). The model is a small Llama with random
weights, so that nothing is downloaded; with AutoModelForCausalLM.from_pretrained(...,
attn_implementation=...) it is the same. Runs on the GPU where there is one, else on the CPU.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flash_attn_sm120.transformers import ATTENTION, FLASH, register

NEW_TOKENS = 12


def make_model(attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.to(device).eval()


def main() -> None:
    handle = register(flash_path=True)  # the two names, until handle.remove()
    model, eager = make_model(ATTENTION), make_model("eager")
    prompts = torch.randint(3, 128, (2, 20), device=model.device)
    padding = torch.ones_like(prompts)
    padding[0, :7] = 0  # the first prompt is shorter

    for cache in ("dynamic", "static"):
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "cache_implementation": cache}
        options |= {"attention_mask": padding, "disable_compile": True}
        ours, theirs = (x.generate(prompts, **options)[:, 20:] for x in (model, eager))
        print(f"{cache} cache: {ours[0].tolist()}")
        equal = (ours == theirs).float().mean().item()
        print(f"  tokens as by eager attention: {equal:.0%}")
        assert equal == 1 or model.dtype != torch.float32

    # Continuous batching looks for "flash" in the name.
    model.set_attn_implementation(FLASH)
    logits = model(prompts[1:]).logits
    error = (logits - eager(prompts[1:]).logits).abs().max().item()
    print(f"{FLASH}: logits differ from eager ones by {error:.1e} at most")
    handle.remove()


if __name__ == "__main__":
    main()
