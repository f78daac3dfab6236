"""How do the contestants compare over sequence length? Draws what a benchmark of a grid recorded.

    python benchmarks/plot.py forward.jsonl --output forward.png

TFLOPS per shape, a row of panels for full and one for causal attention; needs no GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import harness
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# Colours that stay apart for colour-blind readers and in grey (Okabe and Ito); ours stands out.
STYLES = {
    harness.OURS: {"color": "#D55E00", "marker": "o", "linewidth": 2.2, "zorder": 3},
    "ours-deterministic": {"color": "#E69F00", "marker": "o", "linewidth": 1.4, "zorder": 2.5},
    harness.FLASH: {"color": "#0072B2", "marker": "s", "linewidth": 1.4},
    harness.CUDNN: {"color": "#7F7F7F", "marker": "^", "linewidth": 1.4, "linestyle": "--"},
}
LABELS = {
    harness.OURS: "flash_attn_sm120",
    "ours-deterministic": "flash_attn_sm120, deterministic",
    harness.FLASH: "SDPA flash (FlashAttention-2)",
    harness.CUDNN: "SDPA cuDNN",
}


def shape_of(record: dict) -> tuple:
    """The column of a record: its heads and head dim, and the presets of that shape."""
    return record["heads_q"], record["heads_kv"], record["head_dim"], tuple(record["presets"])


def draw_panel(axes: Axes, records: list[dict]) -> None:
    """One line per contestant, with the interquartile range as a band."""
    for name, style in STYLES.items():
        if not any(r["contestant"] == name for r in records):
            continue
        points = sorted(
            (r for r in records if r["contestant"] == name and "ms" in r),
            key=lambda r: r["seqlen"],
        )
        seqlens, tflops = [r["seqlen"] for r in points], [r["tflops"] for r in points]
        work = [r["tflops"] * r["ms"] for r in points]  # the same FLOPs at the quartiles' times
        low = [w / r["ms_q3"] for w, r in zip(work, points, strict=True)]
        high = [w / r["ms_q1"] for w, r in zip(work, points, strict=True)]
        axes.fill_between(seqlens, low, high, color=style["color"], alpha=0.2, linewidth=0)
        axes.plot(seqlens, tflops, label=LABELS[name], markersize=4, **style)
    ticks = sorted({r["seqlen"] for r in records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{s // 1024}K" if s % 1024 == 0 else str(s) for s in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def title(header: dict, record: dict) -> str:
    """What was measured, on what, under which limits: a picture travels without its text."""
    kind = "CUDA graphs" if record.get("graph_calls") else "single calls, L2 flushed"
    versions = f"torch {header['torch']}, CUDA {header['cuda']}, cuDNN {header['cudnn']}"
    commit = (header["commit"] or "unknown commit")[:12]
    return (
        f"Attention {header['benchmark']}, {record['dtype']}, batch {record['batch']}, {kind}\n"
        f"{harness.headline(header).split(';')[0]}; {versions}; {header['date'][:10]}, {commit}"
    )


def draw(header: dict, records: list[dict], output: Path) -> None:
    """A row of panels for full and one for causal attention, a column per shape."""
    shapes = list(dict.fromkeys(map(shape_of, records)))
    kinds = sorted({r["causal"] for r in records})
    figure, grid = plt.subplots(
        len(kinds),
        len(shapes),
        figsize=(max(7.0, 3.1 * len(shapes)), 1.3 + 2.9 * len(kinds)),
        sharex=True,
        sharey=True,  # from 0, one scale: panels compare at a glance
        squeeze=False,
        layout="constrained",
    )
    for row, causal in zip(grid, kinds, strict=True):
        for axes, shape in zip(row, shapes, strict=True):
            draw_panel(axes, [r for r in records if shape_of(r) == shape and r["causal"] == causal])
        row[0].set_ylabel(f"{'causal' if causal else 'full'}\nTFLOPS")
        row[0].set_ylim(bottom=0)
    for axes, (heads_q, heads_kv, head_dim, presets) in zip(grid[0], shapes, strict=True):
        names = "\n".join(presets)
        axes.set_title(f"{names}\n{heads_q}/{heads_kv} heads, D {head_dim}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("sequence length")
    figure.suptitle(title(header, next(r for r in records if "ms" in r)), fontsize=10)
    lines, names = grid[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, metavar="RECORDS.jsonl")
    parser.add_argument("--output", type=Path, help="default: beside the records, .png")
    args = parser.parse_args()
    header, records = harness.read_records(args.records)
    if not any("tflops" in record for record in records):
        sys.exit(
            f"{args.records} has no TFLOPS to draw: it takes a file of forward.py, backward.py"
        )
    output = args.output or args.records.with_suffix(".png")
    draw(header, records, output)
    print(output)


if __name__ == "__main__":
    main()
