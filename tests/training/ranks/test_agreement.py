"""What one rank decides all do after the same step: the end of the time, a signal, a finding; and a rank that ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ris_fast.training.callback import Callback
from ris_fast.training.checkpoint import load_checkpoint
from ris_fast.training.ranks.group import ALONE
from ris_fast.training.ranks.lost import AllInterrupted, RankLost
from ris_fast.training.state import RunStopped
from ris_fast.training.trainer import Trainer
from tests.training.ranks.processes import run_ranks, values
from tests.training.ranks.test_equal_ranks import flat
from tests.training.test_trainer import small


class OnOneRank(Callback):
    """Does something on one rank, after a step or at a report."""

    def __init__(self, rank: int, step: int, what: str) -> None:
        self.rank, self.at, self.what = rank, step, what
        self.trainer: Any = None

    def on_step_end(self) -> None:
        if (self.trainer.ranks.rank, self.trainer.state.step, self.what) == (2, self.at, "SIGKILL"):
            time.sleep(3.0)  # it lives, and is busy when the others hear of the end
        if (self.trainer.ranks.rank, self.trainer.state.step) == (self.rank, self.at):
            match self.what:
                case "SIGTERM":
                    os.kill(os.getpid(), signal.SIGTERM)
                case "SIGKILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "bug":
                    raise ZeroDivisionError("a bug of rank 1")

    def on_log(self, row: dict[str, Any]) -> None:
        if (self.trainer.ranks.rank, row["step"], self.what) == (self.rank, self.at, "stop"):
            raise RunStopped("seen here", "a_finding")


def ended_at(folder: str, rank: int, step: int, what: str, *overrides: str) -> tuple[str, str, int]:
    """What ended the run on this rank, and after how many steps."""
    callback = OnOneRank(rank, step, what)
    trainer = Trainer(small("data.val_limit=4", *overrides, scenes=640, batch=4, epochs=400), folder, [callback])
    callback.trainer = trainer
    try:
        trainer.fit()
        return "time", "", trainer.state.step
    except (AllInterrupted, RunStopped) as error:
        return type(error).__name__, str(error), trainer.state.step
    except RankLost as error:
        return type(error).__name__, str(error), trainer.state.step


def test_the_time_of_rank_0_ends_all(tmp_path: Path) -> None:
    found = values(2, ended_at, str(tmp_path), -1, 0, "", "training.max_seconds=1.5", "report.every_steps=50")
    assert found[0] == found[1] and found[0][0] == "time" and found[0][2] > 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_all_after_the_same_step(rank: int, tmp_path: Path) -> None:
    found = values(2, ended_at, str(tmp_path), rank, 20, "SIGTERM", "report.every_steps=50")
    assert found[0] == found[1] and found[0][0] == "AllInterrupted"
    assert load_checkpoint(tmp_path / "checkpoints", "last")[1]["state"]["step"] == found[0][2] > 20


def test_a_finding_of_rank_0_stops_all(tmp_path: Path) -> None:
    found = values(2, ended_at, str(tmp_path), 0, 12, "stop", "report.every_steps=4")
    assert found[0] == found[1] == ("RunStopped", "seen here", 12)


@pytest.mark.parametrize("what", ["SIGKILL", "bug"])
def test_a_rank_that_ends_ends_the_others(what: str, tmp_path: Path) -> None:
    """At once, with its name; rank 0 has saved where it was."""
    ended = run_ranks(3, ended_at, str(tmp_path), 1, 12, what, "report.every_steps=50")
    assert ended[1].error.startswith("killed" if what == "SIGKILL" else "ZeroDivisionError: a bug of rank 1")
    for each in (ended[0], ended[2]):
        assert each.value[0] == "RankLost" and each.value[1].startswith("rank 1 ended; its own message"), each
        assert each.seconds - ended[1].seconds < 60.0  # not the half hour for a rank that lives
    assert load_checkpoint(tmp_path / "checkpoints", "last")[1]["state"]["step"] == ended[0].value[2] == 13


def test_resume_with_other_numbers_of_ranks_shows_each_scene_once(tmp_path: Path) -> None:
    """2 ranks, then 1, then 3, each stopped in the middle of the epoch, equal one rank that was not stopped."""
    stopped = [values(size, part, str(tmp_path), size, *rest) for size, *rest in ((2, 3, 3), (1, 3, 7), (3, 6, 99))]
    scenes = [each for run in stopped for rank in run for each in rank["scenes"]]
    assert sorted(scenes) == sorted(range(100))
    assert [run[0]["accumulate"] for run in stopped] == [3, 6, 2]
    whole = part(str(tmp_path / "whole"), 1, 6, 99)
    last = stopped[-1]
    assert all(rank["weights"].equal(last[0]["weights"]) for rank in last)
    assert (last[0]["weights"] - whole["weights"]).norm() < 1e-6 * whole["weights"].norm()


def part(folder: str, size: int, accumulate: int, until: int) -> dict[str, Any]:
    """A run of 9 steps of 12 scenes, the last of 4, continued where there is a checkpoint, until a step."""
    overrides = (f"training.accumulate={accumulate}", "data.fixed=true", "data.val_limit=4")
    config = small(*overrides, scenes=100, batch=2)
    resumed = (Path(folder) / "checkpoints").exists()
    trainer = Trainer(config, folder, resume=resumed, ranks=ALONE if size == 1 else None)
    seen, accumulate = [], trainer.step._accumulate

    def noted(scenes: Any, share: float) -> Any:
        seen.extend(scenes.index.tolist())
        return accumulate(scenes, share)

    class Until(Callback):
        def on_log(self, row: dict[str, Any]) -> None:
            if row["step"] == until:
                raise KeyboardInterrupt

    trainer.step._accumulate = noted
    trainer.callbacks.append(Until())
    try:
        trainer.fit()
    except KeyboardInterrupt:
        pass
    return {"scenes": seen, "weights": flat(trainer.model), "accumulate": trainer.config.training.accumulate}


def test_reports_after_a_resumption_count_what_the_optimizer_counts(tmp_path: Path) -> None:
    """Two ranks end between two reports; the next report of a resumed run is of the steps since, in both counts."""
    values(2, counted, str(tmp_path), 13, False)
    for size in (2, 1):
        again = (
            values(size, counted, str(tmp_path), 15, True) if size > 1 else [counted(str(tmp_path), 22, True, ALONE)]
        )
        assert all(steps == attempted for rank in again for steps, attempted in rank), again
    assert again[0][-1] == (5, 5)


def counted(folder: str, until: int, resume: bool, ranks: Any = None) -> list[tuple[int, int]]:
    """Steps and attempted steps of each report of a run until a step."""
    trainer = Trainer(
        small("data.val_limit=4", "report.every_steps=10", scenes=160, batch=4), folder, resume=resume, ranks=ranks
    )
    reports: list[tuple[int, int]] = []

    class Until(Callback):
        def on_log(self, row: dict[str, Any]) -> None:
            reports.append((row["health"]["steps"], row["health"]["attempted"]))

        def on_step_end(self) -> None:
            if trainer.state.step + 1 == until:
                raise KeyboardInterrupt

    trainer.callbacks.append(Until())
    try:
        trainer.fit()
    except KeyboardInterrupt:
        pass
    return reports
