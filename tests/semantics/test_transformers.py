"""Models of Transformers by our attention, beside "eager": logits, gradients, tokens, refusals.

On the CPU, in fp32, with 2 layers and random weights.
"""

import inspect
import re
import warnings

import pytest
import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    masking_utils,
    modeling_flash_attention_utils,
)
from transformers.generation.continuous_batching import initialization as continuous_batching
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel as VisionTower,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionConfig

from flash_attn_sm120 import __main__ as command_line
from flash_attn_sm120 import fa2, interface
from flash_attn_sm120 import transformers as door
from flash_attn_sm120.transformers import ATTENTION, FLASH, Mask, Rows
from helpers.children import run_ranks
from helpers.language_models import (
    DECODERS,
    ENCODERS,
    VOCABULARY,
    WINDOW,
    configuration,
    make_model,
    make_pair,
)

KNOWN_AFTER_IMPORT = {ATTENTION, FLASH} & AttentionInterface._global_mapping.keys()


@pytest.fixture(scope="module", autouse=True)
def open_door():
    handles = [door.register(flash_path=True)]
    yield handles
    handles.pop().remove()
    assert door.registered() == ()


# ---- what comes in -------------------------------------------------------------------------------

LENGTHS = (9, 5, 7)  # of packed sequences: their sum is SEQLEN
SEQLEN = 21


def tokens(batch=2):
    return torch.randint(3, VOCABULARY, (batch, SEQLEN))


def padding(*ranges):
    """An attention_mask that is 1 from begin to end, sequence by sequence."""
    columns = torch.arange(SEQLEN)
    return torch.stack([(begin <= columns) & (columns < end) for begin, end in ranges]).long()


LEFT = padding((5, SEQLEN), (0, SEQLEN))


def positions(rows):
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


BATCHES = {
    "no mask": lambda: {"input_ids": tokens()},
    "ones": lambda: {"input_ids": tokens(), "attention_mask": padding((0, 21), (0, 21))},
    "left": lambda: {"input_ids": tokens(), "attention_mask": LEFT},
    "right": lambda: {"input_ids": tokens(), "attention_mask": padding((0, 16), (0, 20))},
    "both": lambda: {"input_ids": tokens(), "attention_mask": padding((5, 16), (1, 21))},
}
# Position ids by which sequences follow each other: the lengths in each row of the batch.
PACKED = {"one row": [LENGTHS], "rows": [LENGTHS, (SEQLEN,), (1, 1, 19)]}


def logits(model, **inputs):
    outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def real(rows, inputs):
    """The rows that are no padding."""
    kept = inputs.get("attention_mask")
    return rows.flatten(0, 1) if kept is None else rows[kept.bool()]


def assert_close(ours, expected, tolerance=1e-5):
    error = (ours - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.1e}"


def assert_same(eager, ours, inputs):
    """Logits, and the gradients of all weights."""
    assert_same_results(eager, ours, *(real(logits(x, **inputs), inputs) for x in (eager, ours)))


def assert_same_results(eager, ours, expected, out):
    assert_close(out, expected)
    weights = torch.randn_like(expected)
    of_eager, of_ours = (
        torch.autograd.grad((x * weights).sum(), list(model.parameters()), allow_unused=True)
        for x, model in ((expected, eager), (out, ours))
    )
    largest = max(x.norm() for x in of_eager if x is not None)
    for x, y in zip(of_eager, of_ours, strict=True):
        if x is None:
            assert y is None
        else:  # the gradient of a bias of keys is 0, up to rounding
            assert (x - y).norm() < 2e-5 * (x.norm() + largest)


def alone(model, input_ids, rows):
    """Logits of sequences that a model sees one by one."""
    parts = [
        logits(model, input_ids=part[None])[0]
        for row, lengths in zip(input_ids, rows, strict=True)
        for part in row.split(lengths)
    ]
    return torch.cat(parts)


# ---- logits and gradients ------------------------------------------------------------------------


@pytest.mark.quick("gpt_oss-left", "modernbert-right")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model_type", [*DECODERS, *ENCODERS])
def test_logits_and_gradients(model_type, batch):
    assert_same(*make_pair(model_type, ATTENTION), BATCHES[batch]())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "modernbert"])
def test_the_other_name_is_the_same_attention(model_type, batch):
    assert_same(*make_pair(model_type, FLASH), BATCHES[batch]())


@pytest.mark.parametrize("use_cache", [False, True], ids=["training", "prompt"])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("model_type", DECODERS)
def test_packed_positions(model_type, packed, use_cache):
    """Whether or not the model shows them to its mask function, which it does without a cache."""
    rows = PACKED[packed]
    eager, ours = make_pair(model_type, ATTENTION)
    inputs = tokens(len(rows))
    out = logits(ours, input_ids=inputs, position_ids=positions(rows), use_cache=use_cache)
    assert_same_results(eager, ours, alone(eager, inputs, rows), out.flatten(0, 1))


def test_positions_are_read_once(monkeypatch):
    """A forward waits for the GPU once, not in each layer."""
    _, ours = make_pair("mistral", ATTENTION)
    read = []
    monkeypatch.setattr(
        door, "_starts", lambda x, _starts=door._starts: read.append(x) or _starts(x)
    )
    for rows in ([(SEQLEN,)], [LENGTHS]):
        ours(tokens(1), position_ids=positions(rows))
    assert len(read) == 2


def test_positions_are_read_anew_where_they_changed():
    _, ours = make_pair("mistral", ATTENTION)
    inputs, turns = tokens(1), ([(SEQLEN,)], [LENGTHS], [(SEQLEN,)])
    for no_grad in (torch.no_grad(), torch.inference_mode()):
        with no_grad:
            buffer = torch.zeros(1, SEQLEN, dtype=torch.long)
            outs = [
                logits(ours, input_ids=inputs, position_ids=buffer.copy_(positions(rows)))[0]
                for rows in turns
            ]
            for out, rows in zip(outs, turns, strict=True):
                assert_close(out, alone(ours, inputs, rows))


@pytest.mark.parametrize("longest", [9, torch.tensor(9)], ids=["int", "tensor"])
@pytest.mark.parametrize("model_type", DECODERS)
def test_lengths_by_the_caller(model_type, longest):
    """Trap 6: Transformers makes the longest length a 0-d tensor where it finds it by itself."""
    eager, ours = make_pair(model_type, ATTENTION)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    lengths = {"cu_seq_lens_q": ends.to(torch.int32), "cu_seq_lens_k": ends}
    lengths |= {"max_length_q": longest, "max_length_k": longest, "use_cache": False}
    inputs = tokens(1)
    out = logits(ours, input_ids=inputs, position_ids=positions([LENGTHS]), **lengths)
    assert_same_results(eager, ours, alone(eager, inputs, [LENGTHS]), out[0])


@pytest.mark.parametrize("model_type", ["qwen2_moe", "phimoe"])
def test_windows_that_layers_do_not_mention(model_type):
    """The mask is where these models say their window: a layer's arguments are plain causal."""
    changes = {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": None if model_type == "phimoe" else ["sliding_attention"] * 2,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    eager, ours = make_pair(model_type, ATTENTION, **changes)
    for batch in ("no mask", "left"):
        assert_same(eager, ours, BATCHES[batch]())


@pytest.mark.parametrize("keys", [SEQLEN, 13])
def test_cross_attention(keys):
    """With as many queries as keys, too, the padding is that of the keys alone."""
    options = {"vocab_size": VOCABULARY, "d_model": 64, "max_position_embeddings": 64}
    options |= {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))
    }
    eager, ours = (
        transformers.BartForConditionalGeneration._from_config(
            transformers.BartConfig(**options, dropout=0.0), attn_implementation=name
        )
        for name in ("eager", ATTENTION)
    )
    assert eager.config._attn_implementation == "eager"
    ours.load_state_dict(eager.state_dict())
    kept = padding((0, 9), (0, keys))[:, :keys]
    inputs = {
        "input_ids": tokens()[:, :keys],
        "attention_mask": kept,
        "decoder_input_ids": tokens(),
    }
    assert_close(ours.eval()(**inputs).logits, eager.eval()(**inputs).logits)


@pytest.mark.parametrize("name", [ATTENTION, FLASH])
def test_a_vision_tower(name, monkeypatch):
    """Trap 9: by a name without "flash", a layer calls attention once per image."""
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 4}
    towers = []
    for attention in ("eager", name):
        torch.manual_seed(0)
        config = Qwen2VLVisionConfig(**options)
        towers.append(VisionTower._from_config(config, attn_implementation=attention).eval())
    sizes = torch.tensor([[1, 4, 6], [1, 8, 4]])  # frames, rows and columns of patches
    pixels = torch.randn(int(sizes.prod(1).sum()), 3 * 2 * 4 * 4)
    expected = towers[0](pixels, grid_thw=sizes).last_hidden_state
    calls = []
    for function in ("flash_attn_func", "flash_attn_varlen_func"):
        original = getattr(interface, function)
        counted = lambda *args, _f=original, **kwargs: calls.append(1) or _f(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(interface, function, counted)
    assert_close(towers[1](pixels, grid_thw=sizes).last_hidden_state, expected)
    assert len(calls) == (2 if name == FLASH else 4)


def test_packed_training_step():
    """As trainers do it: Transformers' own collator, checkpointing, a loss; the lengths are given."""
    eager, ours = make_pair("mistral", ATTENTION)
    samples = [{"input_ids": tokens(1)[0, :n].tolist()} for n in LENGTHS]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = {
        name: torch.as_tensor(x) if name.startswith("cu_") else x
        for name, x in collate(samples).items()
    }
    ours.train().gradient_checkpointing_enable()
    ours(**batch, use_cache=False).loss.backward()
    count = sum(len(x["input_ids"]) - 1 for x in samples)
    for sample in samples:
        inputs = torch.tensor([sample["input_ids"]])
        share = (inputs.shape[1] - 1) / count
        (eager(inputs, labels=inputs).loss * share).backward()
    for x, y in zip(eager.parameters(), ours.parameters(), strict=True):
        assert_close(y.grad, x.grad, 2e-5)


def test_trainer_with_lora(tmp_path):
    """Packed by Transformers' collator, as the same samples with padding by "eager"."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    samples = [{"input_ids": tokens(1)[0, :n].tolist()} for n in (9, 5, 7, 12, 6, 4)]

    def padded(samples):
        parts = [torch.tensor(x["input_ids"]) for x in samples]
        inputs = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        kept = (inputs != 0).long()
        labels = inputs.masked_fill(kept == 0, -100)
        return {"input_ids": inputs, "attention_mask": kept, "labels": labels}

    options = {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 0.05}
    options |= {"use_cpu": True, "logging_steps": 1, "report_to": [], "save_strategy": "no"}
    packed = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    losses = []
    for model, collate in zip(make_pair("mistral", ATTENTION), (padded, packed), strict=True):
        torch.manual_seed(0)
        trainer = transformers.Trainer(
            model=peft.get_peft_model(
                model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
            ),
            args=transformers.TrainingArguments(output_dir=str(tmp_path), **options),
            train_dataset=samples,
            data_collator=collate,
        )
        trainer.train()
        losses.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
    assert losses[0][0] != losses[0][1]
    assert_close(*map(torch.tensor, losses[::-1]))


@pytest.mark.parametrize("packed", [{"padding_free": True}, {"packing": True}], ids="-".join)
@pytest.mark.parametrize("is_lora", [False, True], ids=["whole", "lora"])
def test_trl(tmp_path, is_lora, packed):
    """Each step has all samples, in whatever order packing puts them, as "eager" has with padding."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets, peft, tokenizers = map(pytest.importorskip, ("datasets", "peft", "tokenizers"))
    words = {f"w{i}": i for i in range(64)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2")),
        **{"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w2"},
    )
    samples = [{"input_ids": tokens(1)[0, :n].tolist()} for n in (9, 5, 7, 12, 6, 4)]
    options = {"max_steps": 2, "per_device_train_batch_size": 6, "learning_rate": 0.05}
    options |= {"use_cpu": True, "bf16": False, "logging_steps": 1, "report_to": []}
    options |= {"save_strategy": "no", "gradient_checkpointing": False}
    losses = []
    for model, how in zip(make_pair("mistral", ATTENTION), ({}, packed), strict=True):
        torch.manual_seed(0)
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=str(tmp_path),
                max_length=16 if "packing" in how else None,
                **options,
                **how,
            ),
            train_dataset=datasets.Dataset.from_list(samples),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
            if is_lora
            else None,
        )
        trainer.train()
        losses.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
    assert len(losses[0]) == 2 and losses[0][0] != losses[0][1]
    assert_close(*map(torch.tensor, losses[::-1]))


ULYSSES = """
import os
import torch
import torch.distributed as dist

torch.set_num_threads(1)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=os.environ["INIT"], rank=rank, world_size=size)

import deepspeed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from flash_attn_sm120 import transformers as door
from helpers.language_models import VOCABULARY, make_pair

deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
door.register()
eager, ours = make_pair("llama", door.ATTENTION)
torch.manual_seed(0)
tokens = torch.randint(3, VOCABULARY, (1, 24))
expected = eager(tokens, use_cache=False).logits
(expected * expected.sin()).sum().backward()
UlyssesSPAttentionHF.register_with_transformers(
    model_name_or_path=ours,
    core_attn_implementation=door.ATTENTION,
    sequence_parallel_size=size,
    micro_batch_size=1,
)
places = torch.arange(24)[None].chunk(size, 1)[rank]
own = tokens.chunk(size, 1)[rank]
logits = ours(own, position_ids=places, use_cache=False).logits
torch.testing.assert_close(logits, expected.chunk(size, 1)[rank], rtol=1e-4, atol=1e-4)
(logits * logits.sin()).sum().backward()
for x, y in zip(ours.parameters(), eager.parameters()):
    dist.all_reduce(x.grad)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-3)
dist.barrier()
dist.destroy_process_group()
"""


def test_ulysses_of_deepspeed(tmp_path):
    """Each of two ranks has half of the rows, and within attention half of the heads."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    for done in run_ranks(ULYSSES, 2, tmp_path, DS_ACCELERATOR="cpu"):
        assert done.returncode == 0, done.stderr


# ---- generate ------------------------------------------------------------------------------------

STATIC = {"cache_implementation": "static", "disable_compile": True}
GENERATE = {
    "dynamic": {},
    "left": {"attention_mask": LEFT},
    "beam": {"num_beams": 3, "attention_mask": LEFT},
    "static": STATIC,
    "static, left": {**STATIC, "attention_mask": LEFT},
    "static, beam": {**STATIC, "num_beams": 2},
}


def assert_same_tokens(eager, ours, options, compiled=None):
    inputs = tokens()
    greedy = {"max_new_tokens": 12, "do_sample": False, **options}
    expected = eager.generate(inputs, **greedy)
    if compiled is not None:
        greedy = {**greedy, "disable_compile": False, "compile_config": compiled}
    assert torch.equal(ours.generate(inputs, **greedy), expected)


@pytest.mark.quick("gemma2-static")
@pytest.mark.parametrize("way", GENERATE)
@pytest.mark.parametrize("model_type", DECODERS)
def test_generate(model_type, way):
    """Trap 1: without a mask, generate() says nothing of the rows that a static cache has left.

    12 tokens after 21 lead a window of 8 through its cache.
    """
    assert_same_tokens(*make_pair(model_type, ATTENTION), GENERATE[way])


@pytest.mark.parametrize("way", GENERATE)
def test_generate_by_the_other_name(way):
    """Here generate() keeps a mask of ones."""
    assert_same_tokens(*make_pair("gemma2", FLASH), GENERATE[way])


@pytest.fixture
def compiled():
    """How generate() compiles its decoding steps: in one graph, on the CPU as well."""
    torch._dynamo.reset()
    config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    yield config
    torch._dynamo.reset()


@pytest.mark.parametrize("model_type, way", [("llama", "static, left"), ("gpt_oss", "static")])
def test_generate_compiled(model_type, way, compiled):
    assert_same_tokens(*make_pair(model_type, ATTENTION), GENERATE[way], compiled)


def test_caches_are_continued():
    """A second turn of several tokens, behind keys that a window has dropped."""
    for model_type in ("mistral", "gemma2"):
        eager, ours = make_pair(model_type, ATTENTION)
        inputs = tokens()
        for make in (
            lambda config: transformers.DynamicCache(config=config),
            lambda config: transformers.StaticCache(config=config, max_cache_len=40),
        ):
            results = []
            for model in (eager, ours):
                cache = make(model.config)
                with torch.no_grad():
                    turns = [
                        model(inputs[:, a:b], cache=cache).logits
                        for a, b in ((0, 5), (5, 15), (15, 16), (16, 21))
                    ]
                results.append(torch.cat(turns, 1))
            assert_close(results[1], results[0])


def assert_same_batch(model_type):
    """generate_batch() against prompts that "eager" continues one by one."""
    eager, ours = make_pair(model_type, FLASH)
    prompts = [tokens(1)[0, :n].tolist() for n in (5, 17, 11)]
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64)
    results = ours.generate_batch(
        prompts, generation_config=greedy, continuous_batching_config=pages
    )
    for prompt, result in zip(prompts, results.values(), strict=True):
        expected = eager.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert prompt + result.generated_tokens == expected[0].tolist()


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_continuous_batching(model_type):
    assert_same_batch(model_type)


def test_continuous_batching_decodes_from_pages(monkeypatch):
    """By one call a layer, which appends: where there is CUDA, Transformers asks for it itself."""
    config, calls = configuration("llama"), []
    config._attn_implementation = FLASH
    pages = ContinuousBatchingConfig(max_blocks_per_request=4)
    with monkeypatch.context() as with_cuda:
        with_cuda.setattr(torch.cuda, "is_available", lambda: True)
        continuous_batching.ensure_decode_fast_path_is_available(config, pages, True)
    assert pages.max_blocks_per_request == 4

    def ask(_, pages, __):
        pages.max_blocks_per_request = 4

    def counted(*args, _function=fa2.flash_attn_with_kvcache, **kwargs):
        calls.append(args[0].shape[0])
        return _function(*args, **kwargs)

    monkeypatch.setattr(continuous_batching, "ensure_decode_fast_path_is_available", ask)
    monkeypatch.setattr(fa2, "flash_attn_with_kvcache", counted)
    assert_same_batch("llama")
    assert calls.count(3) >= 2 * 6  # layers and steps


def test_continuous_batching_wants_the_other_name():
    """Trap 8."""
    _, ours = make_pair("llama", ATTENTION)
    with pytest.raises(ValueError, match=f"{ATTENTION} is not supported for continuous batching"):
        ours.generate_batch([[3, 4, 5]])


# ---- compile -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, batch", [("llama", "no mask"), ("gemma2", "no mask"), ("mistral", "left")]
)
def test_compiled_training_in_one_graph(model_type, batch, compiled):
    eager, ours = make_pair(model_type, ATTENTION)
    follow = torch.compile(ours, backend="aot_eager", fullgraph=True)
    inputs = {**BATCHES[batch](), "use_cache": False}
    out = real(follow(**inputs).logits, inputs)
    assert_same_results(eager, ours, real(logits(eager, **inputs), inputs), out)


def test_compiled_packed_training_in_one_graph(compiled):
    """Lengths are the caller's; without them, the graph asserts that there is one sequence."""
    eager, ours = make_pair("mistral", ATTENTION)
    follow = torch.compile(ours, backend="aot_eager", fullgraph=True)
    inputs = {"position_ids": positions([LENGTHS]), "use_cache": False}
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    ids = tokens(1)
    out = follow(ids, **inputs, **lengths).logits[0]
    assert_same_results(eager, ours, alone(eager, ids, [LENGTHS]), out)
    with pytest.raises(RuntimeError, match="pass cu_seq_lens_q"):
        follow(ids, **inputs)


@pytest.mark.parametrize("size", [4, SEQLEN])
def test_other_masks_in_one_graph_are_refused(size, compiled):
    """What a mask function holds is not seen there: the graph asserts what it shows."""
    config = configuration("llama", attention_chunk_size=size)
    config._attn_implementation = ATTENTION
    embedded = torch.empty(2, SEQLEN, 0)
    block = torch.zeros(2, SEQLEN, dtype=torch.long)

    def causal(embedded, **options):
        return masking_utils.create_causal_mask(config, embedded, None, None, **options)

    def chunked(embedded):
        return masking_utils.create_chunked_causal_mask(config, embedded, None, None)

    def follow(create):
        return torch.compile(create, backend="aot_eager", fullgraph=True)

    with pytest.raises(RuntimeError, match="in one graph, not unions"):
        follow(causal)(embedded, block_sequence_ids=block)
    if size < SEQLEN:
        with pytest.raises(Exception, match="in one graph, not chunks"):
            follow(chunked)(embedded)
    else:
        assert follow(chunked)(embedded)[:2] == ((SEQLEN - 1, 0), (SEQLEN, SEQLEN))


def test_compiled_packed_training(compiled):
    """Positions are found where the graph breaks anyhow, at the mask; elsewhere that is said."""
    eager, ours = make_pair("llama", ATTENTION)
    inputs, place = tokens(1), positions([LENGTHS])
    follow = torch.compile(ours, backend="aot_eager")
    out = follow(inputs, position_ids=place, use_cache=False).logits[0]
    assert_close(out, alone(eager, inputs, [LENGTHS]))
    with pytest.raises(RuntimeError, match="pass cu_seq_lens_q"):
        follow(inputs, position_ids=place)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    out = follow(inputs, position_ids=place, **lengths).logits[0]
    assert_close(out, alone(eager, inputs, [LENGTHS]))


def test_a_compiled_mask_with_gaps_is_found(compiled):
    """What cannot be read while torch follows is asserted by the graph."""
    _, ours = make_pair("llama", ATTENTION)
    follow = torch.compile(ours, backend="aot_eager", fullgraph=True)
    gaps = LEFT.clone()
    gaps[1, 7] = 0
    with pytest.raises(RuntimeError, match="not within it"):
        follow(input_ids=tokens(), attention_mask=gaps, use_cache=False)


# ---- masks that are no windows --------------------------------------------------------------------


@pytest.mark.parametrize("name", [ATTENTION, FLASH])
def test_chunks(name):
    """Within one chunk they are causal; beyond, Transformers refuses them for FlashAttention."""
    options = {"attention_chunk_size": 32, "layer_types": ["chunked_attention", "full_attention"]}
    options |= {"num_local_experts": 2, "intermediate_size_mlp": 96, "moe_layers": []}
    eager, ours = make_pair("llama4_text", name, **options, attn_temperature_tuning=False)
    for chunk_size in (32, 8):
        for model in (eager, ours):
            model.config.attention_chunk_size = chunk_size
        for batch in ("no mask", "left"):
            inputs = BATCHES[batch]()
            if name == FLASH and chunk_size == 8:
                with pytest.raises(ValueError, match="chunked"):
                    logits(ours, **inputs)
            else:
                assert_close(*(real(logits(x, **inputs), inputs) for x in (ours, eager)))


UNIONS = {
    "or_mask_function": lambda: {"or_mask_function": lambda b, h, q, k: q >= k},
    "and_mask_function": lambda: {"and_mask_function": lambda b, h, q, k: q - k < 3},
    "block_sequence_ids": lambda: {"block_sequence_ids": torch.arange(2 * SEQLEN).view(2, -1) // 4},
}


@pytest.mark.parametrize("union", UNIONS)
@pytest.mark.parametrize("name", [ATTENTION, FLASH])
def test_unions_of_masks(name, union):
    """Images that see their later tokens, and masks by the caller."""
    config = configuration("llama")
    config.attention_chunk_size = 8 if name == ATTENTION else 64
    for create in (masking_utils.create_causal_mask, masking_utils.create_chunked_causal_mask):
        for attention_mask in (None, LEFT):
            shown = []
            for implementation in (name, "sdpa"):
                config._attn_implementation = implementation
                inputs = torch.empty(2, SEQLEN, 0), attention_mask, None
                shown.append(create(config, *inputs, **UNIONS[union]()))
            assert torch.equal(shown[0].seen, shown[1]) and shown[0].window_size == (None, None)


def sliding_window_overlay(sliding_window):
    """Not the one of Transformers."""
    return lambda b, h, q, k: k > q + sliding_window


def test_a_stranger_by_a_known_name_is_asked_for_every_pair():
    shown = door.mask(1, 5, 5, mask_function=sliding_window_overlay(2))
    assert torch.equal(shown.seen[0, 0], torch.ones(5, 5).triu(3).bool())


@pytest.mark.parametrize("kind", ["bool", "float", "longer"])
def test_masks_of_4_dimensions(kind):
    """The mask function never sees them."""
    eager, ours = make_pair("llama", ATTENTION)
    seen = torch.ones(2, 1, SEQLEN, SEQLEN).tril().bool()
    seen[1, :, :, 3] = seen[1, :, 4, 5] = False
    lowest = torch.finfo(torch.float32).min
    added = torch.zeros(seen.shape).masked_fill(~seen, lowest)
    given = seen if kind == "bool" else added
    if kind == "longer":
        given = torch.nn.functional.pad(added, (0, 3), value=lowest)
    ids = tokens()
    expected, out = eager(ids, attention_mask=added), ours(ids, attention_mask=given)
    assert_same_results(eager, ours, expected.logits, out.logits)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "bert"])
def test_gaps(model_type):
    eager, ours = make_pair(model_type, ATTENTION)
    gaps = LEFT.clone()
    gaps[1, 7] = 0
    assert_same(eager, ours, {"input_ids": tokens(), "attention_mask": gaps})


def test_gaps_with_a_cache():
    """Queries that stand before keys which are not filled yet, and the steps after a gap."""
    eager, ours = make_pair("llama", ATTENTION)
    gaps = LEFT.clone()
    gaps[1, 7] = 0
    inputs = {"attention_mask": gaps, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = tokens()
    for cache in ("dynamic", "static"):
        options = {**inputs, "cache_implementation": cache}
        assert torch.equal(*(x.generate(ids, **options) for x in (eager, ours)))


# ---- what is refused -----------------------------------------------------------------------------


def test_dropout_in_training():
    """In evaluation none; in training other weights at each step, by torch's generator."""
    _, ours = make_pair("llama", ATTENTION, attention_dropout=0.1)
    ids = tokens()
    assert torch.equal(ours(ids).logits, ours(ids).logits)
    ours.train()
    torch.manual_seed(0)
    first, second = (ours(ids).logits for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(ours(ids).logits, first) and not torch.equal(first, second)


def call(attention_mask=None, queries=4, keys=4, **options):
    """The attention function, as a layer calls it."""
    q, k = torch.randn(1, 2, queries, 16), torch.randn(1, 2, keys, 16)
    return door.attention(torch.nn.Module(), q, k, k, attention_mask, **options)


@pytest.mark.parametrize("name", ["position_bias", "block_indices", "sinks"])
def test_arguments_that_would_be_dropped_are_refused(name):
    with pytest.raises(NotImplementedError, match=name):
        call(**{name: torch.zeros(1)})
    call(**{name: None})


def test_models_that_work_on_their_masks_are_refused():
    _, ours = make_pair("xglm", ATTENTION, d_model=64, attention_heads=4, num_layers=2, ffn_dim=96)
    with pytest.raises(NotImplementedError, match="wants size of one"):
        ours(tokens())
    with pytest.raises(NotImplementedError, match="wants add of one"):
        torch.ones(4, 4) + Mask((None, 0), (4, 4))


def test_float32_that_norms_left():
    """As QLoRA makes it: q and k in float32, v in the dtype of the weights."""
    layer = torch.nn.Module()
    layer.config, layer.to_q = configuration("llama"), torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    out, _ = door.attention(layer, q, k, v.bfloat16(), None)
    expected, _ = door.attention(layer, q.bfloat16(), k.bfloat16(), v.bfloat16(), None)
    assert torch.equal(out, expected)
    assert door.attention(layer, q, k, v, None)[0].dtype == torch.float32


def test_without_data():
    """Nothing is read of tensors that have none."""
    with torch.device("meta"):
        ours = make_model(configuration("mistral"), ATTENTION)
        inputs = torch.zeros(2, SEQLEN, dtype=torch.long)
        assert ours(inputs).logits.shape == (2, SEQLEN, VOCABULARY)
        assert ours(inputs, attention_mask=torch.ones_like(inputs)).logits.is_meta


def test_a_table_of_a_window_is_refused():
    with pytest.raises(NotImplementedError, match=r"block_table .* no window"):
        call(block_table=torch.zeros(4, 1, dtype=torch.int32), sliding_window=2)


def test_attention_weights_are_refused():
    with pytest.raises(NotImplementedError, match="output_attentions"):
        call(output_attentions=True)
    call(output_attentions=False)


def test_a_mask_of_other_lengths_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 5\), and the layer has \(4, 4\)"):
        call(Mask((None, 0), (4, 5)))


def test_causal_layers_without_a_mask():
    """With more keys than queries, top left and bottom right differ: a layer has to say which."""
    call(queries=1, keys=4)
    call(queries=4, keys=6, is_causal=False)
    with pytest.raises(NotImplementedError, match="4 queries, 6 keys"):
        call(queries=4, keys=6)


# ---- masks, one by one ---------------------------------------------------------------------------


def dense(shown, batch):
    """The keys that each query sees, ``(batch, queries, keys)``, by the rules of our functions."""
    queries, keys = shown.lengths
    left, right = shown.window_size
    seen = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        begin, used = zip(
            *(
                (
                    0 if rows.cu_seqlens is None else int(rows.cu_seqlens[b]) - b * length,
                    length if rows.seqused is None else int(rows.seqused[b]),
                )
                for rows, length in ((shown.q, queries), (shown.k, keys))
            ),
            strict=True,
        )
        i = torch.arange(used[0])[:, None] + used[1] - used[0]
        j = torch.arange(used[1])
        window = torch.ones(used, dtype=torch.bool)
        window &= j >= i - left if left is not None else True
        window &= j <= i + right if right is not None else True
        seen[b, begin[0] : begin[0] + used[0], begin[1] : begin[1] + used[1]] = window
    return seen


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(4),
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_bidirectional_mask_function(3),
}
# q_length, kv_length, q_offset, kv_offset: prompts, steps, static caches, and windows that moved.
PLACES = {
    "prompt": (9, 9, 0, 0),
    "step": (1, 9, 8, 0),
    "turn": (3, 9, 6, 0),
    "static prompt": (5, 9, torch.tensor(0), 0),
    "static step": (1, 9, torch.tensor(4), 0),
    "static turn": (3, 9, torch.tensor(4), 0),
    "window moved": (3, 7, 8, 4),
    "static window": (1, 6, 3, 0),
}


@pytest.mark.parametrize(
    "function, place",
    [
        (function, place)
        for function in FUNCTIONS
        for place in (PLACES if function in ("causal", "sliding") else ["prompt"])
    ],
)
def test_masks_are_those_of_eager(function, place):
    """Traps 1, 4, 7: each query that is no padding sees what Transformers' own mask shows it."""
    q_length, kv_length, q_offset, kv_offset = PLACES[place]
    arguments = {
        "batch_size": 3,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": FUNCTIONS[function],
    }
    end = int(q_offset) + q_length
    columns = torch.arange(end)
    left = torch.stack([columns >= 0, columns >= 2, columns >= end - 1])
    right = torch.stack([columns < end, columns < end - 1, columns < end])
    for kept in (None, left, right, left & right, torch.ones_like(left)):
        shown = door.mask(**arguments, attention_mask=kept)
        expected = masking_utils.sdpa_mask(
            **arguments, attention_mask=kept, allow_is_causal_skip=False
        )[:, 0]
        rows = torch.ones(3, q_length, dtype=torch.bool)
        if kept is not None:
            rows = kept[:, int(q_offset) : end]
        assert torch.equal(dense(shown, 3)[rows], expected[rows])


def test_masks_without_padding_ask_for_nothing():
    """Dense calls need no lengths; a static cache needs one number per sequence, and no copy."""
    ones = torch.ones(2, 9, dtype=torch.bool)
    for kept in (None, ones):
        assert door.mask(2, 9, 9, attention_mask=kept) == Mask((None, 0), (9, 9))
        shown = door.mask(2, 1, 16, torch.tensor(8), attention_mask=kept)
        assert shown.q.cu_seqlens is None and shown.k.cu_seqlens is None
        assert shown.k.seqused.tolist() == [9, 9]
    assert door.mask(1, 9, 9, attention_mask=Mask((3, 0), (9, 9))) == Mask((3, 0), (9, 9))


def test_positions_without_a_mask_function():
    """DeepSpeed's sequence parallelism drops the mask and hands the positions on."""
    options = {"is_causal": True, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    out, _ = door.attention(torch.nn.Module(), q, k, v, None, **options)
    for begin, end in ((0, 3), (3, 5)):
        alone = door.attention(
            torch.nn.Module(), *(x[:, :, begin:end] for x in (q, k, v)), None, is_causal=True
        )[0]
        assert torch.equal(out[:, begin:end], alone)


def test_padding_without_a_mask_function():
    """Models that know FlashAttention by name hand the padding on as it came."""
    q, k, v = torch.randn(3, 2, 2, SEQLEN, 16)
    shown = door.mask(2, SEQLEN, SEQLEN, attention_mask=LEFT)
    expected = door.attention(torch.nn.Module(), q, k, v, shown)
    out = door.attention(torch.nn.Module(), q, k, v, LEFT, is_causal=True)
    assert torch.equal(out[0], expected[0])


@pytest.mark.parametrize("is_causal", [True, False])
def test_windows_of_layers(is_causal):
    """Trap 7: a window of w counts the query itself, on either side."""
    q, k, v = torch.randn(3, 1, 2, 9, 16)
    out, _ = door.attention(torch.nn.Module(), q, k, v, None, sliding_window=3, is_causal=is_causal)
    i, j = torch.arange(9)[:, None], torch.arange(9)
    seen = (i - j < 3) & ((j <= i) if is_causal else (j - i < 3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert_close(out, expected.transpose(1, 2))


# ---- the door ------------------------------------------------------------------------------------


@pytest.fixture
def closed_door(open_door):
    """For tests that open it themselves."""
    open_door.pop().remove()
    yield
    open_door.append(door.register(flash_path=True))


def test_an_import_registers_nothing():
    assert not KNOWN_AFTER_IMPORT


def test_the_door_closes(closed_door):
    """Trap 5: a name is one of both interfaces, or of none."""
    before = modeling_flash_attention_utils._lazy_imports
    handle = door.register()
    assert door.registered() == (ATTENTION,)
    more = door.register(flash_path=True)
    assert door.registered() == (ATTENTION, FLASH)
    make_model(configuration("llama"), FLASH)
    more.remove()
    more.remove()
    assert door.registered() == (ATTENTION,)
    assert modeling_flash_attention_utils._lazy_imports is before
    assert modeling_flash_attention_utils._loaded_implementation != FLASH
    handle.remove()
    assert door.registered() == ()
    for name in (ATTENTION, FLASH):  # trap 3
        with pytest.raises(ValueError, match=name):
            make_model(configuration("llama"), name)


@pytest.mark.parametrize("kind", [AttentionInterface, AttentionMaskInterface])
def test_a_name_that_is_taken_is_refused(kind, closed_door):
    kind.register(FLASH, print)
    with pytest.raises(ValueError, match=f"'{FLASH}' already"):
        door.register(flash_path=True)
    assert ATTENTION not in AttentionInterface._global_mapping
    assert kind._global_mapping.pop(FLASH) is print


def test_another_private_function_is_refused(closed_door, monkeypatch):
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda implementation: 0)
    with pytest.raises(NotImplementedError, match=r"which Transformers .* has with parameters"):
        door.register(flash_path=True)
    assert not AttentionInterface._global_mapping.keys() & {ATTENTION, FLASH}
    door.register().remove()


def test_untried_versions_warn_once(closed_door, monkeypatch):
    monkeypatch.setattr(door.transformers, "__version__", "6.0.1")
    door._warn_of_untried_version.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"5\.17 to 5\.24, not with 6\.0\.1") as caught:
        door.register().remove()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        door.register().remove()


def test_models_with_kernels_of_their_own_keep_our_name():
    """Trap 2: by a name with "flash" gpt-oss would take a kernel from the hub."""
    assert make_model(configuration("gpt_oss"), ATTENTION).config._attn_implementation == ATTENTION
    with pytest.raises(ImportError, match="kernels"):
        make_model(configuration("gpt_oss"), FLASH)


# ---- what the doctor says of models --------------------------------------------------------------

SAYS = {
    "llama": r"head dims 128\n.*attention: taken\n  flash_sm120: taken$",
    "bert": r"sm120_attention: taken",
    "gpt_oss": r"window 128, sinks.*\n  sm120_attention: taken\n  flash_sm120: replaced by",
    "gemma2": r"13 sliding_attention, 13 full_attention, window 4096, softcap 50",
    "deepseek_v3": r"head dims 192 and 128",
    "llama4": r"refused, chunks of 8192 tokens",
    "t5": r"refused, position biases",
    "bloom": r"none of the names has an effect",
}


@pytest.mark.parametrize("model_type", SAYS)
def test_doctor_of_a_model(model_type, capsys):
    assert command_line.main(["doctor", model_type]) == 0
    said = capsys.readouterr().out
    assert "Transformers: possible" in said
    assert re.search(SAYS[model_type], said, re.M), said


def test_doctor_of_a_folder(tmp_path, capsys):
    configuration("mistral", head_dim=20, attention_dropout=0.1).save_pretrained(tmp_path)
    assert command_line.main(["doctor", str(tmp_path)]) == 0
    assert "refused, head dim 20" in capsys.readouterr().out
    configuration("mistral", attention_dropout=0.1).save_pretrained(tmp_path)
    assert command_line.main(["doctor", str(tmp_path)]) == 0
    assert "sm120_attention: taken" in capsys.readouterr().out
    assert command_line.main(["doctor", "no_such_model"]) == 1
    assert capsys.readouterr().err.startswith("doctor: no_such_model: ")


# ---- Transformers' own flash path ----------------------------------------------------------------


def test_transformers_own_flash_path_finds_our_functions():
    """Trap 10: what a function can do is read from its signature, and else left out."""
    q, k, v = torch.randn(3, 1, 9, 2, 16)
    sinks = torch.tensor([1.0, -0.5])
    options = {"query_length": 9, "is_causal": True, "attn_implementation": FLASH}
    options |= {"softcap": 5.0, "sliding_window": 4, "s_aux": sinks}
    forward = modeling_flash_attention_utils._flash_attention_forward
    expected, _ = interface.flash_attn_func(
        q, k, v, causal=True, window_size=(3, 0), softcap=5.0, learnable_sink=sinks
    )
    assert torch.equal(forward(q, k, v, None, **options), expected)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2]])
    out = forward(q, k, v, None, **options, position_ids=positions)
    assert torch.equal(out[:, :6], expected[:, :6])
    assert not torch.equal(out[:, 6:], expected[:, 6:])
    torch.manual_seed(0)
    out = forward(q, k, v, None, **options, dropout=0.1)
    torch.manual_seed(0)
    assert torch.equal(out, forward(q, k, v, None, **options, dropout=0.1))
    assert not torch.equal(out, expected)


def test_other_names_go_to_transformers():
    parameters = inspect.signature(modeling_flash_attention_utils._lazy_imports).parameters
    assert tuple(parameters) == door._LAZY_IMPORTS
    with pytest.raises((ImportError, ValueError)):
        modeling_flash_attention_utils._lazy_imports("flash_attention_3")


def test_rows_are_named():
    assert Rows() == (None, None, None)


# ---- in CUDA graphs ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_decoding_in_a_graph_whose_cache_grows(cuda, model_type):
    """A static cache is as long at each step as its own counter says, on the device."""
    eager, ours = (x.to("cuda", torch.bfloat16) for x in make_pair(model_type, ATTENTION))
    text = torch.randint(3, VOCABULARY, (2, 48), device="cuda")
    named = inspect.signature(type(ours).forward).parameters
    name = "cache" if "cache" in named else "past_key_values"  # before Transformers 5.24
    cache = transformers.StaticCache(config=ours.config, max_cache_len=64)
    token = text[:, :1].clone()

    def step():
        return ours(token, **{name: cache}).logits[:, 0]

    with torch.no_grad():
        expected = eager(text).logits
        ours(text[:, :16], **{name: cache})
        step()  # compiles
        cache.reset()
        ours(text[:, :16], **{name: cache})
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        for i in range(16, 48):
            token.copy_(text[:, i : i + 1])
            graph.replay()
            error = (logits - expected[:, i]).float().norm() / expected[:, i].float().norm()
            assert error < 0.1, i
