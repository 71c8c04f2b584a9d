"""Measures what one pass over a trajectory and all its labels saves: time and memory, as ratios within one run.

    python benchmarks/training.py [--shapes "100 turns,50 turns"] [--turns 4,8,16,32] [--acted 0,0.5] [--widths narrow,wide] [--blocks 5]

Students of a few million parameters, in FP32 on this machine's CPU (or in BF16 on its GPU), learn from conversations in which only the
student acts (`--acted 0`: every label branches off, which saves least), and in which the teacher acts in a share of turns, whose labels
lie on the trunk. *Per label* is `training.packing: Labels`: the same code, one causal sequence per label. Blocks of both alternate; ratios
are medians of the blocks' ratios. Peak memory is measured in separate processes. The exit code is 1 if a goal is missed
(`training_goals.py`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from training_goals import missed
from training_load import (
    FOR_MEMORY,
    FOR_MEMORY_SHAPE,
    SIZES,
    TURNS,
    VARIANTS,
    Load,
    Measured,
    matmul_rate,
    measure,
    measure_memory,
    measure_resume,
)


def times(shape: str, turns: list[int], acted: float, blocks: int, width: str) -> list[dict[str, float]]:
    measure(Load(max(turns), shape), "trees", width), measure(Load(4, shape), "labels", width)  # caches, threads and kernels
    found = []
    for count in turns:
        load = Load(count, shape, acted)
        pairs = [(measure(load, "trees", width), measure(load, "labels", width)) for _ in range(blocks)]
        ratio = statistics.median(apart.seconds / together.seconds for together, apart in pairs)
        fast: Measured = min((together for together, _ in pairs), key=lambda one: one.seconds)
        found.append(
            {
                "turns": count,
                "tokens per label": load.tokens("labels"),
                "tokens as a tree": load.tokens("trees"),
                "token ratio": load.tokens("labels") / load.tokens("trees"),
                "FLOP ratio": load.flops("labels", width) / load.flops("trees", width),
                "time ratio": ratio,
                "share of the token ratio": ratio * load.tokens("trees") / load.tokens("labels"),
                "least": min(apart.seconds / together.seconds for together, apart in pairs),
                "most": max(apart.seconds / together.seconds for together, apart in pairs),
                "share of the FLOP ratio": ratio * load.flops("trees", width) / load.flops("labels", width),
                "labels/s": load.labels / fast.seconds,
                "tokens/s": load.tokens("trees") / fast.seconds,
                "model FLOP utilisation": load.flops("trees", width) / fast.seconds / matmul_rate(),
            }
        )
    return found


def memory(blocks: int) -> list[dict[str, float | str]]:
    """Measure a step's peak memory above what the process held before it."""
    peaks: dict[str, list[Measured]] = {name: [] for name in VARIANTS}
    for _ in range(blocks):
        for name in VARIANTS:
            told = subprocess.run([sys.executable, __file__, "--variant", name], check=True, capture_output=True, text=True)
            peaks[name].append(Measured(**json.loads(told.stdout.splitlines()[-1])))
    own = {name: statistics.median(one.peak for one in all_of_it) for name, all_of_it in peaks.items()}
    return [
        {
            "variant": name,
            "step MiB": own[name] / 2**20,
            "by all logits": own[name] / own[ALL_LOGITS[name]] if name in ALL_LOGITS else "",
            "by no checkpointing": own[name] / own["trees"] if name == "checkpointing" else "",
            "whole process MiB": statistics.median(one.whole for one in peaks[name]) / 2**20,
            "seconds": statistics.median(one.seconds for one in peaks[name]),
        }
        for name in VARIANTS
    ]


ALL_LOGITS = {"trees": "all logits", "checkpointing": "all logits, checkpointing", "head": "head, all logits"}
"""For each variant the one to compare it with, which computes logits of every token."""


def table(rows: list[dict[str, float]] | list[dict[str, float | str]]) -> str:
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else f"{cell}" for cell in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="100 turns,50 turns", help="conversations, by how many turns end at 64K tokens")
    parser.add_argument("--turns", default="4,8,16,32", help="turns of a conversation, each with a label")
    parser.add_argument("--acted", default="0,0.5", help="shares of turns on which the teacher acts")
    parser.add_argument("--widths", default="narrow,wide", help=f"students: of {'; '.join(SIZES)}")
    parser.add_argument("--blocks", type=int, default=5, help="how often each pair is measured")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--variant", choices=VARIANTS, help="measure the memory of this one alone, in this process")
    asked = parser.parse_args()
    if asked.variant:
        print(json.dumps(vars(measure_memory(Load(TURNS, FOR_MEMORY_SHAPE), asked.variant, FOR_MEMORY))))
        return
    print(f"load average {os.getloadavg()[0]:.2f}\n")
    widths, turns = asked.widths.split(","), [int(count) for count in asked.turns.split(",")]
    figures = {
        f"time, {shape}, {width}, the teacher acts on {float(acted):.0%} of turns": times(shape, turns, float(acted), asked.blocks, width)
        for shape in asked.shapes.split(",")
        for width in widths
        for acted in asked.acted.split(",")
    }
    figures |= {f"memory, {FOR_MEMORY}": memory(3), f"resume, {FOR_MEMORY}": [measure_resume(FOR_MEMORY)]}
    for what, rows in figures.items():
        print(what, table(rows), sep="\n\n", end="\n\n")
    print(f"load average {os.getloadavg()[0]:.2f}")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1))
    if lines := missed(figures):
        sys.exit("\n".join(lines))
    print("all goals are met")


if __name__ == "__main__":
    main()
