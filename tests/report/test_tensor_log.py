"""The table, the [GRAD] line and the picture of tensors against steps: every step is in them, the one that broke
too."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from ris_fast.report import tensor_log as tensors
from ris_fast.report.tensor_log import Heat, TensorLog, append_table, draw, grad_line
from ris_fast.training.telemetry.step_window import Window
from ris_fast.training.trainer import Trainer

NAMES = ["encoder, first", "head"]


def window(*numbers: int, bad: int = 0) -> Window:
    """Gradient norms of a step's number and one; weights of norm 2, updates of a tenth; one step's second tensor is
    broken."""
    table = torch.tensor([[[number, 2.0, 0.2, 0.0], [1.0, 2.0, 0.2, 0.0]] for number in numbers])
    if bad:
        table[numbers.index(bad), 1, [0, 3]] = torch.tensor([math.nan, 5.0])
    return Window(list(numbers), table, len(numbers))


def test_append_table_has_every_step_until_it_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "tensors.csv"
    append_table(path, NAMES, window(1, 2, 3, bad=2))
    append_table(path, NAMES, window(4))
    monkeypatch.setattr(tensors, "TABLE_BYTES", 100)
    append_table(path, NAMES, window(5, 6, 7))
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(int(row["step"]), row["tensor"]) for row in rows] == [(n, name) for n in (1, 2, 3, 4, 7) for name in NAMES]
    assert [float(row["grad_norm"]) for row in rows[::2]] == [1, 2, 3, 4, 7] and rows[3]["grad_norm"] == "nan"
    assert float(rows[3]["nonfinite"]) == 5 and float(rows[0]["update_norm"]) == pytest.approx(0.2)


def test_tensor_log_records_every_step_of_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the last ones, which no report follows, and of the one that was skipped."""
    from tests.training.capture_helpers import config_of

    trainer = Trainer(config_of("backprojection", "training.epochs=1"))
    trainer.callbacks.append(log := TensorLog(trainer, tmp_path, table=True))
    scale = trainer.optimizer.scale
    trainer.optimizer.scale = lambda loss: scale(loss) * (math.nan if trainer.step.telemetry.calls == 13 else 1.0)
    trainer.fit()
    rows = list(csv.DictReader((tmp_path / "tensors.csv").read_text().splitlines()))
    assert [(int(row["step"]), row["tensor"]) for row in rows] == [
        (n, name) for n in range(1, 15) for name in trainer.optimizer.tensor_names
    ]
    assert (
        {int(row["step"]) for row in rows if float(row["nonfinite"])}
        == {13}
        == {n for n, seen in log.heat.columns.items() if seen.isinf().any()}
    )
    assert (tmp_path / "plots" / "tensors.png").is_file()


def test_grad_line_covers_the_steps_since_the_last_one() -> None:
    row = {"step": 8, "grad_norm": 8.06, "clipped": 0.5, "skipped": 0.25, "health": {"raw_norm": 8.06}}
    line = grad_line(row, NAMES, Window([5, 9, 7, 8], window(5, 9, 7, 8, bad=7).table, 6))
    assert (
        "step 8: |g| 8.06 (from backward 8.06), clipped 50%, skipped 25%, largest encoder, first 8, smallest head 1"
        in line
    )
    assert line.endswith(
        "; of 4 steps: median |g| 8.062, largest 9.055 at step 9 (encoder, first 9)"
        "; 1 steps not finite, first head at step 7; 2 steps not recorded"
    )
    assert ";" not in grad_line(row, NAMES, window(8))


def test_heat_keeps_a_spike_however_long_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heat = Heat()
    for first in range(1, 41, 4):
        heat.add(window(*range(first, first + 4), bad=14 if first == 13 else 0))
    assert heat.width == 1 and heat.grid()[1].shape == (2, 40, 2)
    monkeypatch.setattr(tensors, "MOST_COLUMNS", 12)
    heat.add(window(49))
    first, grid = heat.grid()
    assert (heat.width, first, grid.shape) == (4, 0, (2, 13, 2)) and len(heat.columns) == 12
    assert (
        grid[0, :, 1].tolist()[:10] == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
        and grid[0, 11].isnan().all()
        and grid[0, 12, 1] == 49
    )
    assert grid[1, 3, 1] == math.inf and grid[1, 2, 1] == 1 and grid[0, 0, 0] == pytest.approx(0.1)
    draw(NAMES, heat, tmp_path / "tensors.png")
    assert (tmp_path / "tensors.png").stat().st_size > 5000


def test_heat_colours_of_non_finite_and_missing_values() -> None:
    image, colours, scale = tensors._colours(torch.tensor([[1e-3, 10.0, math.inf, math.nan]], dtype=torch.float64))
    assert (scale.vmin, scale.vmax) == (-3.0, 1.0) and image[0, 2] > scale.vmax and math.isnan(image[0, 3])
    assert colours(scale(image))[0, 2].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert tensors._colours(torch.full((1, 2), math.inf))[2].vmax > 0
