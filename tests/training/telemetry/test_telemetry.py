"""The ring of records: what `telemetry()` says after each step, kept for the report, in eager steps and captured
ones."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast import FusedAdamW
from ris_fast.kernels.native import loader
from ris_fast.training.telemetry.step_telemetry import count_invalid_rows, spread
from ris_fast.training.telemetry.step_window import RECORDS, Window, ring_size
from ris_fast.training.trainer import Trainer
from tests.training.capture_helpers import Rows, captured_trainer, config_of

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not loader.available(), reason=loader.why_not() or "built")),
]
R, POISONED = 4, 6
NAMES = ["a", "b", "c"]


def parameters(kinds: tuple[torch.dtype, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).to(kind)) for size, kind in zip((65, 7, 300), kinds)]


def step(params: list[nn.Parameter], optimizer: FusedAdamW, number: int) -> None:
    """Gradients of changing size; one step has a NaN, and one has none for the first tensor."""
    generator = torch.Generator().manual_seed(number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * number
    if number == POISONED:
        params[1].grad[2:4] = math.nan
    if number == POISONED + 2:
        params[0].grad = None
    optimizer.step()


def window(optimizer: FusedAdamW, told: int = 0, made: int = 0) -> Window:
    return Window.after(told, *optimizer.records(), made)


KINDS = {"one buffer": (torch.float32,) * 3, "two buffers": (torch.float32, torch.float64, torch.float32)}


@pytest.mark.parametrize("kinds", list(KINDS.values()), ids=list(KINDS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_records_hold_the_telemetry_of_each_step(backend: str, kinds: tuple[torch.dtype, ...]) -> None:
    params, by_hand = parameters(kinds), []
    optimizer = FusedAdamW(
        params, lr=0.1, max_grad_norm=1.0, backend=backend if len(set(kinds)) == 1 else "auto", records=R
    )
    assert window(optimizer).numbers == []
    for number in range(1, 2 * R + 4):
        step(params, optimizer, number)
        by_hand.append(optimizer.telemetry())
        kept = window(optimizer)
        assert kept.numbers == list(range(max(1, number - R + 1), number + 1))
        torch.testing.assert_close(kept.table, torch.stack(by_hand[-R:]), rtol=0, atol=0, equal_nan=True)
    poisoned = by_hand[POISONED - 1]
    assert poisoned[:, 3].tolist() == [0, 2, 0] and not poisoned[:, 2].any() and poisoned[0, 0] > 0
    assert optimizer.counters()["skipped"] == 1


def test_records_size_is_checked_and_survives_a_copy() -> None:
    for options in (dict(records=-1), dict(records=2, telemetry=False)):
        with pytest.raises(ValueError, match="records is"):
            FusedAdamW(parameters(KINDS["one buffer"]), **options)
    params = parameters(KINDS["one buffer"])
    optimizer = copy.deepcopy(FusedAdamW(params, records=R))
    assert [len(each) for each in optimizer.records()] == [R, R]
    alone = FusedAdamW(params)
    step(params, alone, 1)
    assert [len(each) for each in alone.records()] == [0, 0] and alone.telemetry().shape == (3, 4)


def test_records_of_another_history_are_dropped() -> None:
    params = parameters(KINDS["one buffer"])
    optimizer = FusedAdamW(params, records=R)
    for number in range(1, 6):
        step(params, optimizer, number)
    saved = optimizer.state_dict()
    step(params, optimizer, 6)
    optimizer.load_state_dict(saved)
    assert window(optimizer).numbers == []
    step(params, optimizer, 7)
    assert window(optimizer).numbers == [7]  # the counters of a state_dict are views, which step six has moved on
    groups, other = optimizer.checkpoint_tensors(), parameters(KINDS["one buffer"])
    plain = FusedAdamW(other)  # a checkpoint is the same with and without records
    plain.load_checkpoint_tensors(groups)
    step(other, plain, 8)
    assert (
        plain.checkpoint_tensors()["optimizer"].keys() == groups["optimizer"].keys()
        and plain.counters()["attempted"] == 8
    )


def table(*steps: tuple[float, ...]) -> Tensor:
    """(n, T, 4) of gradient norms."""
    norms = torch.tensor(steps)
    bad = ~norms.isfinite()
    return torch.stack([norms, torch.ones_like(norms), torch.full_like(norms, 0.1), bad.float()], -1)


def test_window_summary_of_norms_and_nonfinite_steps() -> None:
    seen = Window(
        [5, 6, 7, 8], table((3.0, 4.0, 0.0), (0.0, 6.0, 8.0), (1.0, math.nan, math.inf), (0.0, 0.0, 1.0)), 6
    ).summary(NAMES)
    assert seen == {
        "steps": 6,
        "recorded": 4,
        "nonfinite_steps": 1,
        "first_nonfinite_step": 7,
        "first_nonfinite_tensor": "b",
        "median_grad_norm": 5.0,
        "largest_grad_norm": 10.0,
        "largest_step": 6,
        "largest_tensor": "c",
        "largest_tensor_norm": 8.0,
        "partly_zero": {"tensors": 3, "names": ["a", "b", "c"]},
        "partly_zero_steps": {"steps": 2, "first": 6, "every": None},
    }
    count_invalid_rows = Window([1], table((math.inf, 1.0, 1.0)), 1).summary(NAMES)
    assert (
        count_invalid_rows["first_nonfinite_tensor"] == "a"
        and count_invalid_rows["largest_step"] is count_invalid_rows["median_grad_norm"] is None
    )
    overflow = table((1.0, 1e30, 1.0))
    overflow[0, 1, 0] = math.inf  # a sum of squares beyond the format, of finite gradients
    overflow[..., 3] = 0
    assert Window([1], overflow, 1).summary(NAMES)["first_nonfinite_tensor"] == "b"
    empty = Window([], table((1.0, 1.0, 1.0))[:0], 0).summary(NAMES)
    assert empty["recorded"] == 0 and empty["largest_step"] is None


def test_window_after_begins_behind_the_last_one() -> None:
    records, numbers = torch.arange(4.0)[:, None, None].expand(4, 3, 4), torch.tensor([8.0, 5.0, 6.0, 7.0])
    after = Window.after(6, records, numbers, 2)
    assert after.numbers == [7, 8] and after.table[:, 0, 0].tolist() == [3, 0]
    assert Window.after(8, records, numbers, 0).numbers == [] and Window.after(9, records, numbers, 0).numbers == [
        5,
        6,
        7,
        8,
    ]


def test_spread_and_count_invalid_rows_are_as_defined() -> None:
    answer = torch.randn(5, 7, 2, generator=torch.Generator().manual_seed(0)) + 3.0
    torch.testing.assert_close(spread(answer), answer.var(0).mean() / answer.square().mean())
    assert spread(torch.zeros(2, 3)) == 0 == spread(answer[:1].expand(4, 7, 2))
    scenes = torch.ones(4, 3, 2)
    scenes[1], scenes[2, 0, 0], scenes[3, 1, 1] = 0.0, math.nan, -math.inf
    assert count_invalid_rows(scenes).tolist() == [1, 2]


class Kept(Rows):
    """Rows, and the window that came with each."""

    def on_log(self, row: Any) -> None:
        super().on_log(row)
        telemetry = self.trainer.step.telemetry
        self.windows = [*getattr(self, "windows", []), (telemetry.window.numbers, telemetry.window.table)]


def test_report_window_has_every_step_since_the_last_one() -> None:
    """Also one that was poisoned where nobody looked: it would be lost with the last step's table alone."""
    trainer = Trainer(config_of("backprojection", "training.epochs=1"), callbacks=[kept := Kept()])
    kept.trainer, optimizer = trainer, trainer.optimizer
    scale, by_hand = optimizer.scale, []
    optimizer.scale = lambda loss: scale(loss) * (math.nan if len(by_hand) == 9 else 1.0)
    updated = trainer.step.telemetry.updated
    trainer.step.telemetry.updated = lambda: (updated(), by_hand.append(optimizer.telemetry()))
    trainer.fit()
    assert [numbers for numbers, _ in kept.windows] == [[1], [2], [3], [4], [5], [6], [7], [8], [9, 10, 11, 12]]
    assert torch.equal(
        torch.cat([each for _, each in kept.windows]).nan_to_num(-1), torch.stack(by_hand[:12]).nan_to_num(-1)
    )
    seen = kept.rows[8]["health"]["window"]
    assert (seen["steps"], seen["recorded"], seen["nonfinite_steps"], seen["first_nonfinite_step"]) == (4, 4, 1, 10)
    assert seen["first_nonfinite_tensor"] == optimizer.tensor_names[0]
    assert seen["largest_step"] in (9, 11, 12) and seen["largest_tensor"] in optimizer.tensor_names


def test_report_windows_of_a_resumed_run_are_the_same(tmp_path: Path) -> None:
    """Reports follow the steps of the whole run, so the steps that are looked at must do so too."""
    config = config_of("backprojection", "data.train_scenes=80", "training.epochs=3")
    whole = Trainer(config, callbacks=[kept := Kept()])
    kept.trainer = whole
    whole.fit()
    begun = Trainer(config, tmp_path)
    begun._advance = lambda scenes, advance=begun._advance: (advance(scenes), _interrupt(begun.state.step == 10))
    with pytest.raises(KeyboardInterrupt):
        begun.fit()
    resumed = Trainer(config, tmp_path, callbacks=[rest := Kept()], resume=True)
    rest.trainer = resumed
    resumed.fit()
    assert [numbers for numbers, _ in rest.windows] == [
        [11, 12],
        [13, 14, 15, 16],
        [17, 18, 19, 20],
        [21, 22, 23, 24],
        [25, 26, 27, 28],
    ]
    ours, theirs = (
        {row["step"]: row["health"] for row in each.rows if "grad_norm" in row and "val_loss" not in row}
        for each in (rest, kept)
    )
    assert all(ours[step]["window"] == theirs[step]["window"] for step in (16, 20, 24, 28))
    assert all(ours[step]["raw_norm"] == theirs[step]["raw_norm"] for step in ours)


def _interrupt(now: bool) -> None:
    if now:
        raise KeyboardInterrupt


def test_captured_steps_fill_records_as_eager_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("backprojection", "report.every_steps=6")
    plain = Trainer(config, callbacks=[eager := Kept()])
    eager.trainer = plain
    trainer = captured_trainer(config, monkeypatch, replayed := Kept())
    replayed.trainer = trainer
    plain.fit(), trainer.fit()
    assert trainer.capture.recording.replays > 5 and [numbers for numbers, _ in replayed.windows][-2:] == [
        [*range(13, 19)],
        [*range(19, 25)],
    ]
    for (one, ours), (other, theirs) in zip(replayed.windows, eager.windows, strict=True):
        assert one == other and torch.equal(ours, theirs)


def test_window_counts_steps_the_records_had_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ris_fast.training.telemetry.step_window.RECORDS", 3)
    trainer = Trainer(config_of("backprojection", "training.epochs=1"), callbacks=[kept := Kept()])
    kept.trainer = trainer
    trainer.fit()
    assert kept.windows[-1][0] == [10, 11, 12]
    assert (kept.rows[8]["health"]["window"]["steps"], kept.rows[8]["health"]["window"]["recorded"]) == (4, 3)
    monkeypatch.undo()
    assert ring_size(10) == 10 and ring_size(1000) == RECORDS
