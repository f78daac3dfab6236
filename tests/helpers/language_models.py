"""Small models of Transformers with random weights, the same ones by any attention."""

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

VOCABULARY = 64
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOW = 8

# model_type -> what its configuration has besides. Windows are shorter than the tests' sequences.
DECODERS = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3_text": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_oss": {
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v3": {
        "first_k_dense_replace": 2,
        "num_key_value_heads": 4,
        "head_dim": None,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}
ENCODERS = {
    "bert": {"num_key_value_heads": None, "head_dim": None},
    "modernbert": {
        "num_key_value_heads": None,
        "head_dim": None,
        "local_attention": 2 * WINDOW,
        "global_attn_every_n_layers": 2,
        "embedding_dropout": 0.0,
        "sep_token_id": 2,
        "cls_token_id": 1,
    },
}


def configuration(model_type, **changes):
    """The small configuration of a kind of model, without any dropout."""
    options = {**SMALL, **DECODERS.get(model_type, {}), **ENCODERS.get(model_type, {}), **changes}
    options = {name: value for name, value in options.items() if value is not None or "eos" in name}
    options |= {"attention_dropout": 0.0, **changes}
    if model_type == "bert":
        options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.AutoConfig.for_model(model_type, **options)


def make_model(config, attention, seed=0):
    """A model of a configuration; weights are large, so that attention is far from uniform."""
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if is_decoder(config) else AutoModel
    made = auto.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.normal_(0, 0.2) if weight.ndim > 1 or "sinks" in name else None
    return made.eval()


def is_decoder(config):
    return config.model_type not in ENCODERS


def make_pair(model_type, attention, **changes):
    """The same model by "eager" and by another attention."""
    return tuple(
        make_model(configuration(model_type, **changes), name) for name in ("eager", attention)
    )
