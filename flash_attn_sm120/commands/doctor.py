"""Show which programs can use this attention here, which do, and what their models would get.

Each is a door that one call opens, for the process that calls it. A model is named by what
Transformers calls its kind, or by a folder with its config.json; nothing is downloaded:

    python -m flash_attn_sm120 doctor llama gpt_oss ./my-model
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Door(NamedTuple):
    """A program that this attention can be used in."""

    program: str
    package: str  # its distribution
    module: str  # of ours
    call: str  # that opens the door
    is_open: Callable[[Any], bool]  # of our module


def _sdpa_is_open(sdpa: Any) -> bool:
    if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        raise NotImplementedError("PyTorch has had such a door since 2.11")
    return bool(torch.nn.attention.current_flash_attention_impl() == sdpa.NAME)


def _transformers_is_open(transformers: Any) -> bool:
    return bool(transformers.registered())


def _vllm_is_open(vllm: Any) -> bool:
    """vLLM opens it in each of its processes, where this package is installed."""
    found = metadata.entry_points(group="vllm.general_plugins")
    return any(entry.value == f"{vllm.__name__}:register" for entry in found)


def _flash_attn_is_open(fa2: Any) -> bool:
    return bool(fa2.alias.installed())


DOORS = (
    Door("PyTorch's attention", "torch", "sdpa", "activate()", _sdpa_is_open),
    Door(
        "Programs that import flash_attn",
        "torch",
        "fa2",
        "install_as_flash_attn()",
        _flash_attn_is_open,
    ),
    Door("Transformers", "transformers", "transformers", "register()", _transformers_is_open),
    Door("vLLM", "vllm", "vllm", "register()", _vllm_is_open),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="such as llama, or a folder")


def run(arguments: argparse.Namespace) -> int:
    for door in DOORS:
        print(f"{door.program}: {state(door)}")
    if arguments.models and not util.find_spec("transformers"):
        raise RuntimeError("models are those of Transformers, which is not installed")
    for model in arguments.models:
        print(f"\n{model}:")
        for line in what_it_gets(_configuration(model)):
            print(f"  {line}")
    return 0


def state(door: Door) -> str:
    """Whether a door can be opened here, and is open in this process."""
    try:
        version = metadata.version(door.package)
    except metadata.PackageNotFoundError:
        return f"not possible, {door.package} is not installed"
    try:
        module = importlib.import_module(f"flash_attn_sm120.{door.module}")
        is_open = door.is_open(module)
    except (ImportError, RuntimeError) as error:  # NotImplementedError is one
        return f"not possible with {door.package} {version}: {error}"
    number = tuple(int(x) for x in version.split(".")[:2])
    oldest, newest = (getattr(module, f"_{x}_TRIED", number) for x in ("OLDEST", "NEWEST"))
    is_tried = oldest <= number <= newest
    how = "open" if is_open else f"closed; flash_attn_sm120.{door.module}.{door.call} opens it"
    untried = "" if is_tried else ", which has not been tried"
    return f"possible with {door.package} {version}{untried}; {how}"


# ---- models --------------------------------------------------------------------------------------


def _configuration(model: str) -> Any:
    from transformers import AutoConfig

    try:
        if Path(model).is_dir():
            return AutoConfig.from_pretrained(model, local_files_only=True)
        return AutoConfig.for_model(model)
    except (ValueError, KeyError, OSError) as error:
        raise RuntimeError(f"{model}: {str(error).splitlines()[0]:.200}") from error


def what_it_gets(config: Any) -> Iterator[str]:
    """Lines about a model of Transformers: its layers, and each of the names."""
    from flash_attn_sm120.transformers import ATTENTION, FLASH

    made = _class_of(config)
    source = inspect.getsource(inspect.getmodule(made) or made)
    if "attention_interface" not in source:
        yield "its layers do not ask for an attention by name: none of the names has an effect"
        return
    layers, refusals = _layers(config.get_text_config(), source)
    yield f"layers: {', '.join(layers)}"
    if refusals:
        yield f"{ATTENTION}, {FLASH}: refused, {', '.join(refusals)}"
        return
    yield f"{ATTENTION}: taken"
    compatible = getattr(made, "_compatible_flash_implementations", None)
    if compatible and FLASH not in compatible:
        yield f"{FLASH}: replaced by Transformers, which wants one of {', '.join(compatible)}"
    else:
        yield f"{FLASH}: taken"


def _class_of(config: Any) -> Any:
    """The model's class, with a head for text where it has one."""
    from transformers import AutoModel, AutoModelForCausalLM

    for auto in (AutoModelForCausalLM, AutoModel):
        found = auto._model_mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    raise RuntimeError(f"Transformers has no model for {type(config).__name__}")


def _layers(config: Any, source: str) -> tuple[list[str], list[str]]:
    """What the attention of a text model's layers is, and what of it is refused."""
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    kinds = Counter(getattr(config, "layer_types", None) or ["attention"])
    found = [kind if kinds == {"attention": 1} else f"{n} {kind}" for kind, n in kinds.items()]
    if window and not kinds.keys() - {"attention", "sliding_attention", "full_attention"}:
        found.append(f"window {window}")
    softcap = getattr(config, "attn_logit_softcapping", None)
    found += [f"softcap {softcap:g}"] if softcap else []
    found += ["sinks"] if "s_aux=" in source else []
    head_dims = _head_dims(config)
    found += [f"head dims {' and '.join(map(str, head_dims))}"] if head_dims else []
    refused = [f"head dim {d}" for d in head_dims if d % 8 or d > 256]
    refused += ["position biases"] if "position_bias=" in source else []
    if "chunked_attention" in kinds:
        refused += [f"chunks of {chunk} tokens, in longer sequences"]
    return found, refused


def _head_dims(config: Any) -> list[int]:
    """Of q and k; also of v, or of layers of full attention, where those have another."""
    nope, rope = (getattr(config, f"qk_{part}_head_dim", None) for part in ("nope", "rope"))
    if nope and rope:
        return [nope + rope, config.v_head_dim]
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
    return [dim for dim in (head_dim, getattr(config, "global_head_dim", None)) if dim]
