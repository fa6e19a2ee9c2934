"""Per-tensor records of a run, step by step: a table on request, a [GRAD] line, and a picture of tensors against steps.

Legend: T tensors.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_fast.files import append_text, save_figure
from ris_fast.report.drawing import new_figure
from ris_fast.training.callback import Callback
from ris_fast.training.telemetry.step_window import Window
from ris_fast.training.trainer import Trainer

TABLE, PICTURE = "tensors.csv", "tensors.png"
COLUMNS = ("grad_norm", "weight_norm", "update_norm", "nonfinite")
TABLE_BYTES = 64 * 2**20  # of the table, after which it has the last step of a report only
MOST_COLUMNS = 400  # of the picture, fewer than its pixels; then two are put into one, so that it spans the run
DARKEST = 1e-12  # what is below is drawn as this


class TensorLog(Callback):
    """Takes the records of every step at each report and leaves a picture; with `table`, rows too.

    Args: folder: the run's; table: write tensors.csv, a row a tensor and step, and print a [GRAD] line at every report.
    """

    def __init__(self, trainer: Trainer, folder: Path, *, table: bool = False, picture: bool = True) -> None:
        self.trainer, self.folder, self.table, self.picture = trainer, folder, table, picture
        self.heat, self.last = Heat(), None

    def on_log(self, row: dict[str, Any]) -> None:
        window, names = self.trainer.step.telemetry.window, self.trainer.optimizer.tensor_names
        if window is None or window is self.last or not window.numbers:
            return
        self.last = window
        self._add(window)
        if self.table:
            print(grad_line(row, names, window))

    def _add(self, window: Window) -> None:
        if self.picture:
            self.heat.add(window)
        if self.table:
            append_table(self.folder / TABLE, self.trainer.optimizer.tensor_names, window)

    def on_train_end(self, summary: dict[str, Any]) -> None:
        failed = summary.get("verdict") == "stopped" and not summary.get(
            "findings"
        )  # a device that failed may not answer
        if not failed and (rest := self.trainer.step.telemetry.rest()).numbers:
            self._add(rest)
        if self.picture and len(self.heat.columns) > 1:
            draw(self.trainer.optimizer.tensor_names, self.heat, self.folder / "plots" / PICTURE)


def append_table(path: Path, names: Sequence[str], window: Window) -> None:
    """Adds a row a tensor and step; of the last step only once the file has TABLE_BYTES. Raises StorageError."""
    size = path.stat().st_size if path.exists() else 0
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not size:
        writer.writerow(("step", "tensor", *COLUMNS))
    for number, record in list(zip(window.numbers, window.table.tolist()))[-1 if size > TABLE_BYTES else 0 :]:
        writer.writerows((number, name, *(f"{value:.7g}" for value in values)) for name, values in zip(names, record))
    append_text(path, text.getvalue())


def grad_line(row: Mapping[str, Any], names: Sequence[str], window: Window) -> str:
    """The last step: gradient norm as backward left it and as the optimizer measured it, largest and smallest tensor;
    then the steps since the last line."""
    norms = window.table[-1, :, 0].tolist()
    largest, smallest = max(range(len(norms)), key=norms.__getitem__), min(range(len(norms)), key=norms.__getitem__)
    raw = (row.get("health") or {}).get("raw_norm")
    return (
        f"[GRAD] step {row['step']}: |g| {row['grad_norm']:.4g} (from backward"
        f" {raw if raw is None else format(raw, '.4g')}), clipped {row['clipped']:.0%}, skipped {row['skipped']:.0%},"
        f" largest {names[largest]} {norms[largest]:.3g}, smallest {names[smallest]}"
        f" {norms[smallest]:.3g}{_since(window.summary(names))}"
    )


def _since(seen: Mapping[str, Any]) -> str:
    """What the steps since the last line add to the last one; nothing where it is the only one."""
    parts = []
    if seen["recorded"] > 1 and seen["largest_step"] is not None:
        parts.append(
            f"of {seen['recorded']} steps: median |g| {seen['median_grad_norm']:.4g}, largest"
            f" {seen['largest_grad_norm']:.4g} at step {seen['largest_step']} ({seen['largest_tensor']}"
            f" {seen['largest_tensor_norm']:.3g})"
        )
    if seen["nonfinite_steps"]:
        parts.append(
            f"{seen['nonfinite_steps']} steps not finite, first {seen['first_nonfinite_tensor']} at step "
            f"{seen['first_nonfinite_step']}"
        )
    if seen["steps"] > seen["recorded"]:
        parts.append(f"{seen['steps'] - seen['recorded']} steps not recorded")
    return "".join(f"; {part}" for part in parts)


class Heat:
    """What the picture shows: columns of `width` steps each, with every tensor's largest update-to-weight ratio and
    gradient norm, (T, 2) float64; infinity where a gradient was not finite. At most MOST_COLUMNS, however long the
    run."""

    def __init__(self) -> None:
        self.width, self.columns = 1, dict[int, Tensor]()

    def add(self, window: Window) -> None:
        table = window.table.double()
        both = torch.stack([table[..., 2] / table[..., 1].clamp_min(1e-30), table[..., 0]], -1)
        both = both.nan_to_num(math.inf, math.inf)
        both[..., 1].masked_fill_(table[..., 3] > 0, math.inf)
        for number, values in zip(window.numbers, both):
            self._put(number // self.width, values)
        while len(self.columns) > MOST_COLUMNS:
            columns, self.columns, self.width = self.columns, {}, 2 * self.width
            for place, values in columns.items():
                self._put(place // 2, values)

    def _put(self, place: int, values: Tensor) -> None:
        there = self.columns.get(place)
        self.columns[place] = values if there is None else torch.maximum(there, values)

    def grid(self) -> tuple[int, Tensor]:
        """The first column's place and (T, columns, 2); not-a-number in columns without a record."""
        first, last = min(self.columns), max(self.columns)
        none = torch.full_like(self.columns[first], math.nan)
        return first, torch.stack([self.columns.get(place, none) for place in range(first, last + 1)], 1)


def draw(names: Sequence[str], heat: Heat, path: Path) -> None:
    """Tensors down, steps across; left the ratio of update to weight, right the gradient norm, as powers of ten."""
    first, grid = heat.grid()
    figure = new_figure(11.0, 1.6 + 0.16 * len(names))
    both = figure.subplots(1, 2, sharey=True)
    pooled = f", largest of {heat.width} steps" if heat.width > 1 else ""
    extent = (first * heat.width - 0.5, (first + grid.shape[1]) * heat.width - 0.5, len(names) - 0.5, -0.5)
    for axes, values, title in zip(both, grid.unbind(-1), ("update / weight", "gradient norm")):
        image = axes.imshow(*_colours(values), aspect="auto", interpolation="nearest", extent=extent)
        figure.colorbar(image, ax=axes, fraction=0.05)
        broken = "; red: not finite" if bool(values.isinf().any()) else ""
        axes.set_title(f"{title}, log10{pooled}{broken}", loc="left", fontsize=10)
        axes.set_xlabel("optimizer step")
    both[0].set_yticks(range(len(names)), names, fontsize=6)
    save_figure(path, figure, 130)


def _colours(values: Tensor) -> tuple[Any, Any, Any]:
    """Image, colours and scale for imshow: powers of ten; what is infinite lies above the scale, which imshow would
    mask."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    shown = values.clamp_min(DARKEST).log10()
    sound = shown[shown.isfinite()]
    low, high = (float(sound.min()), float(sound.max())) if sound.numel() else (0.0, 0.0)
    scale = Normalize(low, max(high, low + 1e-3))
    return shown.nan_to_num(math.nan, scale.vmax + 1.0).numpy(), colormaps["viridis"].with_extremes(over="red"), scale
