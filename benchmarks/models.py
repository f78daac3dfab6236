"""How fast is a whole model of Transformers, by our attention and by PyTorch's?

    FA_SM120_LIMITS=120 python benchmarks/models.py --output models.jsonl   # a few minutes

A llama of 1.2 billion parameters with random weights: a prompt of 8192 tokens, decoding behind 8192
tokens with a static cache in CUDA graphs, and training steps of 4096 tokens. The same weights run
by each attention in turn; without any, too, which says what share of the time attention has.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import harness
import torch
import torch.nn.functional as F
from harness import Contestant, WrongResult
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, StaticCache
from transformers import AutoModelForCausalLM as Models
from transformers.masking_utils import sdpa_mask

from flash_attn_sm120 import _measure, sdpa
from flash_attn_sm120 import transformers as door

SDPA, FLASH_FIRST, DOOR, OURS, NONE = (
    "sdpa",  # as torch chooses on this card
    "sdpa, flash first",  # as torch chooses on 12.x
    "sdpa.activate()",
    door.ATTENTION,
    "no attention",
)
ALL = (SDPA, FLASH_FIRST, DOOR, OURS, NONE)
ORDER_ON_12X = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
EXACT = "exact"  # of the model in float32

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
TINY = LLAMA_1B | {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
KEPT = 16  # tokens of a prompt whose logits are compared
T = TypeVar("T")

GREEDY = 64  # tokens that are decoded and compared
ROUNDS = 20


@dataclass(frozen=True)
class Size:
    """Tokens of a prompt, before a decoded one, and of a training step."""

    prompt: int
    context: int
    batches: tuple[int, ...]  # decoded at once
    training: int


SIZES = {"cuda": Size(8192, 8192, (1, 16), 4096), "cpu": Size(48, 24, (1,), 32)}


# ---- the model -----------------------------------------------------------------------------------


def make_model(device: str) -> Any:
    """In bfloat16, without a token that ends a text."""
    torch.manual_seed(0)
    options = LLAMA_1B if device == "cuda" else TINY
    config = AutoConfig.for_model("llama", **options, eos_token_id=None, pad_token_id=0)
    with torch.device(device):
        return Models.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)


def random_tokens(model: Any, batch: int, count: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(count)
    shape = (batch, count)
    tokens = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    return tokens.to(model.device)


@contextmanager
def register() -> Iterator[None]:
    """All names of this benchmark, in Transformers."""
    handle = door.register()
    names = {EXACT: exact, NONE: no_attention}
    for name, function in names.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask if name == EXACT else no_mask)
    try:
        yield
    finally:
        handle.remove()
        for name in names:
            AttentionInterface._global_mapping.pop(name)
            AttentionMaskInterface._global_mapping.pop(name)


def exact(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """K and V repeated, so that no backend of SDPA needs memory for all scores of a layer."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    causal = mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scaling)
    return out.transpose(1, 2), None


def no_attention(module: Any, query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    return query.transpose(1, 2), None


def no_mask(*_: Any, **__: Any) -> None:
    return None


# ---- contestants ---------------------------------------------------------------------------------


def by(model: Any, name: str) -> Callable[[], AbstractContextManager[None]]:
    """The context in which a model has one of the attentions."""

    @contextmanager
    def context() -> Iterator[None]:
        with ExitStack() as stack:
            if name in (FLASH_FIRST, DOOR):
                stack.enter_context(sdpa_kernel(ORDER_ON_12X, set_priority=True))
            if name == DOOR:
                stack.callback(sdpa.activate().remove)
            model.set_attn_implementation("sdpa" if name in (SDPA, FLASH_FIRST, DOOR) else name)
            yield

    return context


def in_turn(model: Any, names: Sequence[str], call: Callable[[], Any]) -> list[Contestant]:
    return [Contestant(name, call, by(model, name)) for name in names]


def in_float32(model: Any, call: Callable[[Any], T]) -> T:
    """What `call` returns of a copy of the model that computes as exactly as torch does."""
    made = copy.deepcopy(model).float()
    made.set_attn_implementation(EXACT)
    try:
        return call(made)
    finally:
        del made
        harness.release_memory()


Tensors = Sequence[torch.Tensor]


def check_near(references: Tensors, plain: Tensors) -> Callable[[str, Tensors], None]:
    """As near to float32 as the rule wants, `plain` being SDPA's, tensor by tensor."""
    allowed = [_measure.allowed_error(*x) for x in zip(references, plain, strict=True)]

    def check(name: str, results: Tensors) -> None:
        if name == NONE:  # is right as it is
            return
        for i, (result, reference) in enumerate(zip(results, references, strict=True)):
            error = _measure.max_error(result, reference)
            if not error <= allowed[i]:
                raise WrongResult(
                    f"{name}: tensor {i}, largest error {error:.3g}, allowed {allowed[i]:.3g}"
                )

    return check


# ---- a prompt ------------------------------------------------------------------------------------


@torch.no_grad()
def prefill(model: Any, size: Size, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The first token behind a prompt, with a cache that grows."""
    tokens = random_tokens(model, 1, size.prompt)

    def call(model: Any = model) -> Tensors:
        return (model(tokens, use_cache=True, logits_to_keep=KEPT).logits,)

    references = in_float32(model, call)
    with by(model, SDPA)():
        check = check_near(references, call())
    entrants, absent = harness.admit(in_turn(model, ALL, call), check, references)
    yield timed("prompt", entrants, absent, size.prompt, 1, device, rounds)


# ---- decoding ------------------------------------------------------------------------------------


class Decoder:
    """A static cache, and steps whose tensors stay where they are, as CUDA graphs want it."""

    def __init__(self, model: Any, batch: int, context: int) -> None:
        self.model = model
        self.tokens = random_tokens(model, batch, 1)
        self.cache = StaticCache(config=model.config, max_cache_len=context + GREEDY + 64)
        parameters = inspect.signature(type(model).forward).parameters
        self.name = "cache" if "cache" in parameters else "past_key_values"  # before 5.24

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends tokens; the logits behind the last."""
        return self.model(tokens, logits_to_keep=1, **{self.name: self.cache}).logits[:, -1]

    def step(self) -> torch.Tensor:
        return self.read(self.tokens)

    def again(self) -> Tensors:
        """A step that leaves the cache as long as it was."""
        logits = self.step()
        torch._foreach_sub_([layer.cumulative_length for layer in self.cache.layers], 1)
        return (logits,)

    def fill(self, context: int) -> None:
        """With random rows: a prompt of many sequences would need more memory than their cache."""
        self.step()
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)

    def as_exactly(self, model: Any) -> Tensors:
        """A step of a model in float32, with the same rows."""
        made = copy.copy(self)
        made.model, made.cache = model, copy.deepcopy(self.cache)
        for layer in made.cache.layers:
            layer.keys, layer.values = layer.keys.float(), layer.values.float()
        return made.again()


@torch.no_grad()
def decode(model: Any, size: Size, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One token of each sequence behind so many; with a mask, SDPA has no FlashAttention."""
    for batch in size.batches:
        decoder = Decoder(model, batch, size.context)
        with by(model, SDPA)():
            decoder.fill(size.context)
            plain = decoder.again()
        check = check_near(in_float32(model, decoder.as_exactly), plain)
        contestants = in_turn(model, (SDPA, OURS, NONE), decoder.again)
        entrants, absent = harness.admit(contestants, check, plain)
        what = f"decoding, batch {batch}"
        yield timed(what, entrants, absent, batch, batch, device, rounds, graph=True)


@torch.no_grad()
def greedy(model: Any, size: Size, device: str) -> str:
    """What came of as many tokens as GREEDY, by a graph whose cache grows.

    Each attention is given the tokens that SDPA decodes, so that all logits are comparable, and
    ours are held against the model in float32. A token is decided where the best is ahead of the
    second by more than what two attentions may differ by: there it must be the same.
    """
    found: dict[str, list[torch.Tensor]] = {SDPA: [], OURS: []}
    prompt = random_tokens(model, 1, size.context)
    for name, logits in found.items():
        decoder = Decoder(model, 1, size.context)
        with by(model, name)():
            logits.append(decoder.read(prompt).clone())
            step = replayed(decoder, device)
            for i in range(GREEDY):
                decoder.tokens.copy_(found[SDPA][i].argmax(-1, keepdim=True))
                logits.append(step().clone())
    theirs, ours = (torch.cat(logits) for logits in found.values())
    text = torch.cat([prompt, theirs[:-1].argmax(-1)[None]], dim=1)
    exact = in_float32(model, lambda made: made(text, logits_to_keep=GREEDY + 1).logits[0])
    check_near([exact], [theirs])(OURS, [ours])
    ahead = exact.topk(2).values.diff().abs().squeeze(1)
    decided = ahead > 2 * _measure.allowed_error(exact, theirs)
    same = theirs.argmax(1) == ours.argmax(1)
    if (decided & ~same).any():
        raise WrongResult(
            f"{OURS}: other tokens than SDPA's, of step {(decided & ~same).nonzero()}"
        )
    return f"greedy tokens as by SDPA: {same.sum()} of {len(same)}; {decided.sum()} are decided"


def replayed(decoder: Decoder, device: str) -> Callable[[], torch.Tensor]:
    """The decoder's step as a CUDA graph."""
    if device == "cpu":
        return decoder.step
    decoder.again()  # compiles what a call needs when it first comes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decoder.step()

    def step() -> torch.Tensor:
        graph.replay()
        return logits

    return step


# ---- training ------------------------------------------------------------------------------------


def train(model: Any, size: Size, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Forward, backward and AdamW, whose rate is 0: every step is the same."""
    tokens = random_tokens(model, 1, size.training)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, weight_decay=0.0, fused=device == "cuda"
    )

    def step(model: Any = model) -> None:
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()

    def gradients(model: Any = model) -> Tensors:
        """Those of the weights before and behind attention; without it, some have none."""
        step(model)
        return [w.grad for name, w in model.named_parameters() if "self_attn" in name]

    def whole_step() -> None:
        step()
        optimizer.step()

    model.train()
    references = in_float32(model, gradients)
    with by(model, SDPA)():
        check = check_near(references, gradients())
    admitted, absent = harness.admit(in_turn(model, ALL, gradients), check, [])
    del references, check
    entrants = in_turn(model, [c.name for c in admitted], whole_step)
    yield timed("training step", entrants, absent, size.training, 1, device, rounds)
    model.zero_grad()
    model.eval()


# ---- figures -------------------------------------------------------------------------------------


def timed(
    what: str,
    entrants: list[Contestant],
    absent: dict[str, str],
    tokens: int,
    batch: int,
    device: str,
    rounds: int,
    graph: bool = False,
) -> dict[str, Any]:
    """What the records of a workload say of each contestant."""
    graph = graph and device == "cuda"
    timings, exhausted = harness.time_interleaved(
        entrants, device, rounds, graph, graph_calls=int(graph)
    )
    fields: dict[str, dict[str, Any]] = {
        name: {
            "ms": timing.ms,
            "spread": timing.spread,
            "tokens_per_s": tokens / timing.ms * 1e3,
            "graph": graph,
        }
        for name, timing in timings.items()
    } | harness.absent_fields(absent | exhausted)
    common = {"what": what, "tokens": tokens, "batch": batch}
    return {name: {**common, "contestant": name, **own} for name, own in fields.items()}


def table(workloads: list[dict[str, Any]]) -> str:
    """Tokens per second, and the speed beside SDPA's."""
    rows = []
    for records in workloads:
        ms = {name: record["ms"] for name, record in records.items() if "ms" in record}
        for name, record in records.items():
            if name not in ms:
                rows.append((record["what"], name, "absent", *[""] * 4))
                continue
            figures = [f"{ms[peer] / ms[name]:.3f}" if peer in ms else "" for peer in PEERS]
            rate, spread = f"{record['tokens_per_s']:.0f}", f"{record['spread']:.1%}"
            rows.append((record["what"], name, f"{ms[name]:.3f}", rate, *figures, spread))
    head = ("workload", "attention", "ms", "tokens/s", *(f"beside {x}" for x in PEERS), "spread")
    return harness.markdown(head, rows)


PEERS = (SDPA, FLASH_FIRST)


def shares(records: dict[str, Any]) -> str:
    """What share of a workload each attention has: the rest is the time without any."""
    if "ms" not in records.get(NONE, {}):
        return ""
    rest = records[NONE]["ms"]
    said = [
        f"{name} {1 - rest / record['ms']:.1%}"
        for name, record in records.items()
        if name != NONE and "ms" in record
    ]
    return f"attention's share, {records[NONE]['what']}: {'; '.join(said)}"


WORKLOADS = {"prefill": prefill, "decode": decode, "train": train}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    harness.add_arguments(parser, ROUNDS)
    return harness.parse(parser)


def main() -> None:
    args = parse_args()
    records = harness.Records(args.output, "models", args.device)
    print(harness.headline(records.header))
    size, found = SIZES[args.device], []
    with register():
        model = make_model(args.device).eval()
        print(f"{sum(x.numel() for x in model.parameters()) / 1e9:.2f} billion parameters, bf16")
        for name in args.only:
            if name == "decode":
                print(greedy(model, size, args.device))
            for workload in WORKLOADS[name](model, size, args.device, args.rounds):
                found.append({name: records.add(**own) for name, own in workload.items()})
                print(shares(found[-1]), flush=True)
    print("", table(found), harness.why_absent(found), sdpa.stats(), sep="\n")


if __name__ == "__main__":
    main()
