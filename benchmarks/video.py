"""How fast are the attention calls of video models?

    FA_SM120_LIMITS=120 python benchmarks/video.py --output video.jsonl

Self-attention of 30k to 120k tokens and cross attention with 512 keys, as Wan, HunyuanVideo,
LTX-Video and CogVideoX make them: no mask, as many KV heads as query heads. Beside SDPA's
FlashAttention-2 and cuDNN, in less than a minute.
"""

from __future__ import annotations

import argparse
import functools

import forward
import harness
import torch
from harness import FLASH, OURS, Cell, Preset, Problem

NAMES = forward.NAMES
ROUNDS = 5  # of calls that take up to half a second each

WAN_14B, HUNYUAN = Preset(40, 40, 128), Preset(24, 24, 128)
LTX, COGVIDEOX = Preset(32, 32, 64), Preset(48, 48, 64)

# Model, heads, batch (2: with and without the prompt at once), queries, and keys.
CALLS: list[tuple[str, Preset, int, int, int]] = [
    ("Wan 14B, 480p", WAN_14B, 1, 32760, 32760),
    ("Wan 14B, 720p", WAN_14B, 1, 75600, 75600),
    ("Wan 14B, 720p, text", WAN_14B, 1, 75600, 512),
    ("Wan 14B, 480p, text", WAN_14B, 2, 32760, 512),
    ("HunyuanVideo, 720p", HUNYUAN, 1, 119056, 119056),
    ("LTX-Video", LTX, 2, 30720, 30720),
    ("LTX-Video, text", LTX, 2, 30720, 512),
    ("CogVideoX 1.5", COGVIDEOX, 2, 45106, 45106),
]


def cells() -> list[Cell]:
    found = []
    for name, preset, batch, queries, keys in CALLS:
        fields = {
            "model": name,
            "heads_q": preset.heads_q,
            "head_dim": preset.head_dim,
            "batch": batch,
            "seqlen_q": queries,
            "seqlen_k": keys,
        }
        found.append(Cell(preset, keys, False, batch, torch.bfloat16, queries, fields))
    return found


def measure(problem: Problem, device: str, rounds: int) -> dict[str, dict]:
    return forward.measure(problem, device, rounds)


def table(measured: list[dict[str, dict]]) -> str:
    """TFLOPS of each contestant, and ours over FlashAttention-2."""

    def row(cell: dict[str, dict]) -> list[object]:
        call = cell[OURS]
        shape = [call[name] for name in ("heads_q", "head_dim", "batch", "seqlen_q", "seqlen_k")]
        tflops = [f"{cell[n]['tflops']:.1f}" if "ms" in cell[n] else "absent" for n in NAMES]
        timed = [cell[name] for name in (FLASH, OURS) if "ms" in cell[name]]
        last = ["", "", ""]
        if len(timed) == 2:
            ratio, spread = timed[0]["ms"] / timed[1]["ms"], max(x["spread"] for x in timed)
            last = [f"{timed[1]['ms']:.1f}", f"{ratio:.3f}", f"{spread:.1%}"]
        return [call["model"], *shape, *tflops, *last]

    head = ("call", "heads", "D", "B", "queries", "keys", *NAMES, "ours ms", "ours/flash", "spread")
    return harness.markdown(head, map(row, measured))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_arguments(parser, ROUNDS)
    return harness.parse(parser)


@torch.no_grad()
def main() -> None:
    args = parse_args()
    records = harness.Records(args.output, "video", args.device)
    measured = functools.partial(measure, device=args.device, rounds=args.rounds)
    found = harness.measure_cells(cells(), measured, NAMES, records, args.device)
    print(f"Attention of video models, forward, bf16, TFLOPS, {args.rounds} single calls")
    print(harness.headline(records.header))
    print(table(found), harness.why_absent(found), sep="\n\n")


if __name__ == "__main__":
    main()
