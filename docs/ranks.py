"""The tables of docs/ranks.md, computed from its formula: `python docs/ranks.py`. Nothing here is measured on a GPU."""

from __future__ import annotations

import math
from typing import NamedTuple


class Preset(NamedTuple):
    """A training on one GPU: times in seconds, from counts (docs/ranks.md)."""

    gradient_bytes: int
    fixed: float  # of a step, whatever its scenes
    per_scene: float
    batch: int  # scenes a GPU
    scenes: int  # an epoch
    epochs: int


PRESETS = {
    "full": Preset(67_772_928, 0.52e-3, 1.06e-6, 2048, 160_000, 30),
    "original": Preset(65_359_104, 3.17e-3, 1.16e-6, 64, 160_000, 30),
}
IN_NODE = 8  # GPUs
NVLINK, NETWORK = 476e9, 8 * 47e9  # bytes/s
BASE, HOP, NET_HOP = 14e-6, 1.25e-6, 8.5e-6  # seconds
GPU_HOURS = 16_384 * 54 * 24 / 419  # of one GPU between two failures
COPY = 0.01  # seconds that a checkpoint holds up the training


def latency(gpus: int) -> float:
    """l(N): up and down a tree of the nodes, and along a chain within a node."""
    if gpus == 1:
        return 0.0
    nodes = -(-gpus // IN_NODE)
    return BASE + 2 * ((min(gpus, IN_NODE) - 1) * HOP + math.ceil(math.log2(nodes)) * NET_HOP)


def all_reduce(gpus: int, size: int) -> float:
    """r(N) in seconds."""
    wire = NVLINK if gpus <= IN_NODE else NETWORK
    return latency(gpus) + 2 * (1 - 1 / gpus) * size / wire


def step(preset: Preset, gpus: int, batch: float) -> float:
    """t(N) in seconds."""
    return preset.fixed + preset.per_scene * batch + all_reduce(gpus, preset.gradient_bytes)


def rows(name: str) -> list[str]:
    """A line of the table for 1, 8, 64 and 1,000 GPUs."""
    preset, found = PRESETS[name], []
    one = step(preset, 1, preset.batch)
    for gpus in (1, 8, 64, 1000):
        weak, strong = step(preset, gpus, preset.batch), step(preset, gpus, max(1, preset.batch / gpus))
        steps = -(-preset.scenes // (preset.batch * gpus))
        busy = min(gpus, preset.batch)
        found.append(
            f"| `{name}` | {gpus:,} | {latency(gpus) * 1e6:.0f} us"
            f" | {all_reduce(gpus, preset.gradient_bytes) * 1e3:.2f} ms | {weak * 1e3:.2f} ms | {one / weak:.0%}"
            f" | {gpus * preset.batch / weak / 1e6:.2f} M | {steps:,} | {strong * 1e3:.2f} ms"
            f" | {one / strong / gpus:.1%}{'' if busy == gpus else f' ({busy} busy)'} |"
        )
    return found


def failures(gpus: int) -> str:
    """Hours between failures of a job, the chance of one in an hour, and Young's interval between checkpoints."""
    hours = GPU_HOURS / gpus
    return (
        f"| {gpus:,} | {hours:,.0f} h | {1 - math.exp(-1 / hours):.2%} | {math.sqrt(2 * COPY * hours * 3600):,.0f} s |"
    )


def main() -> None:
    print(*(row for name in PRESETS for row in rows(name)), sep="\n")
    print(*(failures(gpus) for gpus in (8, 64, 1000)), sep="\n")


if __name__ == "__main__":
    main()
