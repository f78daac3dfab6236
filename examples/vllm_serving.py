"""A model in vLLM by this attention.

    python examples/vllm_serving.py [MODEL]

Needs vLLM and a GPU. vLLM finds the backend by itself; `vllm serve MODEL --attention-backend
FLASH_ATTN_SM120` does the same behind HTTP.
"""

import sys
from importlib.util import find_spec

import torch

from flash_attn_sm120.vllm import NAME


def main(model: str = "Qwen/Qwen3-0.6B") -> None:
    if not find_spec("vllm") or not torch.cuda.is_available():
        print("left out: needs vLLM and a GPU")
        return
    from vllm import LLM, SamplingParams

    llm = LLM(model, attention_backend=NAME)
    for result in llm.generate(["The capital of France is"], SamplingParams(temperature=0)):
        print(result.outputs[0].text)


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
