"""Per-tensor records of a run: a table on request, a [GRAD] line, and a picture of tensors against steps."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor

from ris_fast.training.loop import Trainer

TABLE, PICTURE = "tensors.csv", "tensors.png"
COLUMNS = ("grad_norm", "weight_norm", "update_norm", "nonfinite")
MOST_RECORDS = 512         # then every second one is dropped, so that a picture spans the whole run


class TensorLog:
    """Observer that keeps the (T, 4) record of every report and leaves a picture; with `table`, a row a tensor too.

    Args: folder: the run's; table: write tensors.csv and print a [GRAD] line at every report.
    """

    def __init__(self, trainer: Trainer, folder: Path, *, table: bool = False, picture: bool = True) -> None:
        self.trainer, self.folder, self.table, self.picture = trainer, folder, table, picture
        self.records: list[tuple[int, Tensor]] = []

    def start(self, info: Mapping[str, Any]) -> None:
        """Nothing is known yet."""

    def step(self, row: Mapping[str, Any]) -> None:
        record = self.trainer.step.telemetry.table
        if record is None:
            return
        self.records.append((int(row["step"]), record))
        if len(self.records) > MOST_RECORDS:
            self.records = self.records[::2]
        if self.table:
            self._append(int(row["step"]), record)
            print(grad_line(row, self.trainer.optimizer.tensor_names, record))

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch has no record of its own."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self.picture and len(self.records) > 1:
            draw(self.trainer.optimizer.tensor_names, self.records, self.folder / "plots" / PICTURE)

    def _append(self, step: int, record: Tensor) -> None:
        path = self.folder / TABLE
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(("step", "tensor", *COLUMNS))
            writer.writerows((step, name, *values) for name, values in
                             zip(self.trainer.optimizer.tensor_names, record.tolist()))


def grad_line(row: Mapping[str, Any], names: Sequence[str], record: Tensor) -> str:
    """Step, gradient norm as backward left it and as the optimizer measured it, largest and smallest tensor."""
    norms = record[:, 0].tolist()
    largest, smallest = max(range(len(norms)), key=norms.__getitem__), min(range(len(norms)), key=norms.__getitem__)
    raw = (row.get("health") or {}).get("raw_norm")
    return (f"[GRAD] step {row['step']}: |g| {row['grad_norm']:.4g} (from backward {raw if raw is None else format(raw, '.4g')}), "
            f"clipped {row['clipped']:.0%}, skipped {row['skipped']:.0%}, largest {names[largest]} {norms[largest]:.3g}, "
            f"smallest {names[smallest]} {norms[smallest]:.3g}")


def draw(names: Sequence[str], records: Sequence[tuple[int, Tensor]], path: Path) -> None:
    """Tensors down, steps across; left the ratio of update to weight, right the gradient norm, as powers of ten."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = torch.stack([record for _, record in records]).double()
    ratio = (table[..., 2] / table[..., 1].clamp_min(1e-30)).clamp_min(1e-12).log10().T
    norm = table[..., 0].clamp_min(1e-12).nan_to_num(math.nan, math.nan, math.nan).log10().T
    figure = Figure(figsize=(11.0, 1.6 + 0.16 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    steps = [step for step, _ in records]
    for axes, values, title in ((left, ratio, "update / weight, log10"), (right, norm, "gradient norm, log10")):
        image = axes.imshow(values.numpy(), aspect="auto", cmap="viridis", interpolation="nearest",
                            extent=(steps[0], steps[-1], len(names) - 0.5, -0.5))
        figure.colorbar(image, ax=axes, fraction=0.05)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("optimizer step")
    left.set_yticks(range(len(names)), names, fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
