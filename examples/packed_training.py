"""Training a Transformers model on packed samples: no padding, and no sample sees another.

    python examples/packed_training.py

Needs Transformers (`pip install flash_attn_sm120[hf]`). The model is a small Llama with random
weights, so that nothing is downloaded. Runs on the GPU where there is one, else on the CPU.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

from flash_attn_sm120.transformers import ATTENTION, register

VOCABULARY, SAMPLES, STEPS = 64, 6, 8


def make_sample(generator: torch.Generator) -> dict[str, list[int]]:
    """A few tokens, and the same once more: what follows can be learned from the sample alone."""
    count = int(torch.randint(3, 10, (), generator=generator))
    tokens = torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()
    return {"input_ids": tokens + tokens}


def main() -> None:
    handle = register()  # the name, until handle.remove()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    # One row holds all samples; where each begins travels with it, as cu_seq_lens_q and the rest.
    generator = torch.Generator().manual_seed(0)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([make_sample(generator) for _ in range(SAMPLES)])
    batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}
    print(
        f"tokens {batch['input_ids'].numel()}, sequences begin at {batch['cu_seq_lens_q'].tolist()}"
    )

    losses = []
    for step in range(STEPS):
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")
    assert losses[-1] < losses[0], "the loss must fall"
    handle.remove()


if __name__ == "__main__":
    main()
