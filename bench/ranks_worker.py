"""What `bench.ranks` starts, on its own or as the ranks of torchrun: one measurement, as JSON in a file.

python -m bench.ranks_worker train '{"preset": "laptop", "batch": 64, "steps": 40}' found.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ris_fast import Callback, load_config
from ris_fast.training.ranks.group import join
from ris_fast.training.ranks.reduction import GradientReduction
from ris_fast.training.trainer import Trainer

WARM = 10  # steps before the first that counts: telemetry reads the first eight


class StepTimes(Callback):
    """Seconds between the ends of two steps; the processor time of this process in the steps that count."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.processor = 0.0

    def on_step_end(self) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) == WARM:
            self.processor = -time.process_time()

    def on_train_end(self, summary: dict[str, Any]) -> None:
        self.processor += time.process_time()

    def seconds(self) -> list[float]:
        return [end - begin for begin, end in zip(self.ends[WARM - 1 :], self.ends[WARM:])]


def train(given: dict[str, Any]) -> dict[str, Any]:
    """Steps of a trainer. preset, batch (a rank's), steps; ranks, threads and accumulate: 1; ragged: scenes of a last
    group in each of `epochs`; weights: file to write at the end; lockstep: whether ranks only meet where they would
    sum."""
    if given.get("lockstep"):
        GradientReduction.sum_ = lambda self, gradients: self.ranks.wait()
    torch.set_num_threads(given.get("threads", 1))
    accumulate, epochs = given.get("accumulate", 1), given.get("epochs", 1)
    group, ragged = given["batch"] * given.get("ranks", 1) * accumulate, given.get("ragged", 0)
    scenes = (given["steps"] // epochs - (ragged > 0)) * group + ragged
    settings = {
        "data.train_scenes": scenes, "data.val_scenes": 32, "data.val_limit": 32,
        "training.batch_size": given["batch"], "training.accumulate": accumulate, "training.epochs": epochs,
        "training.max_seconds": 0, "training.compile": "false", "training.precision": "fp32",
        "training.device": "cpu", "report.every_steps": 10_000,
        "health.stop": str(not given.get("lockstep")).lower(),
    }  # fmt: skip
    times = StepTimes()
    config = load_config(preset=given["preset"], overrides=[f"{key}={value}" for key, value in settings.items()])
    trainer = Trainer(config, callbacks=[times])
    trainer.fit()
    if given.get("weights") and join(trainer.device).first:
        save_file({name: value.detach().clone() for name, value in trainer.model.named_parameters()}, given["weights"])
    seconds = times.seconds()
    return {
        "steps": trainer.state.step,
        "scenes": trainer.state.scenes_seen,
        "step_s": statistics.median(seconds),
        "step_s_20_80": [statistics.quantiles(seconds, n=5)[at] for at in (0, 3)],
        "processor_s": times.processor / len(seconds),
        "bytes": sum(bucket.grad.numel() * bucket.grad.element_size() for bucket in trainer.optimizer.buckets),
        "tensors": len(trainer.optimizer.tensor_names),
    }


def all_reduce(given: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of an all-reduce of float32 of each of `bytes`."""
    torch.set_num_threads(1)
    ranks, found = join(torch.device("cpu")), []
    for size in given["bytes"]:
        buffer, taken = torch.zeros(size // 4), []
        for _ in range(max(5, min(40, 2 * 10**8 // size))):
            ranks.wait()
            begin = time.perf_counter()
            ranks.sum_(buffer)
            taken.append(time.perf_counter() - begin)
        found.append(statistics.median(taken[1:]))
    return {"ranks": ranks.size, "bytes": given["bytes"], "seconds": found}


def main() -> None:
    """Rank 0 writes what was found."""
    kind, given, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    found = {"train": train, "all_reduce": all_reduce}[kind](given)
    ranks = join(torch.device("cpu"))
    if ranks.first:
        out.write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main()
