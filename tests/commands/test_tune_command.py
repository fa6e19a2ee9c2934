"""`ris-fast tune`: trials are run folders, what ends one does not end the study, and several processes share one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="Optuna comes with the test extra")

from ris_fast.commands import tune  # noqa: E402
from ris_fast.commands.cli import main  # noqa: E402
from ris_fast.config.load import load_config  # noqa: E402
from ris_fast.config.schema import Config, ConfigError  # noqa: E402
from ris_fast.report.eventlog import write_json  # noqa: E402
from ris_fast.training.state import RunStopped  # noqa: E402
from tests.command_line import FEW_SCENES, SMALL_TASK, settings  # noqa: E402

ROOT = Path(__file__).parents[2]
SPACE = '[tune]\n"optimizer.backbone_lr" = {low = 1e-4, high = 1e-1, log = true}\n"training.batch_size" = [16, 32]\n'
COMMAND = ["tune", "mine.toml", "--preset", "laptop", "--device", "cpu", "--seconds-per-trial", "20", "--out", "t"]


def scored(config: Config, folder: Path, console: Any, *, preflight: bool, callbacks: list[Any]) -> dict[str, Any]:
    """In place of a training: the larger the learning rate, the worse the network becomes."""
    (folder / "config.toml").write_text("")
    summary, worst = {"verdict": "learned", "best_val_nmse": 1.0}, config.optimizer.backbone_lr * 10.0
    print("what train prints")
    try:
        for epoch in range(1, 21):
            summary["best_val_nmse"] = nmse = 1.0 + (worst - 1.0) * epoch / 20
            for each in callbacks:
                each.on_epoch_end({"epoch": epoch, "seconds": float(epoch), "val_nmse_raw": nmse})
        return summary
    finally:
        for each in callbacks:
            each.on_summary(summary)
        write_json(folder / "summary.json", summary)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "fit_in_folder", scored)
    (tmp_path / "mine.toml").write_text(SPACE)
    return tmp_path


def trials(folder: Path) -> list[dict[str, str]]:
    head, *rows = (line.split(",") for line in (folder / "trials.csv").read_text().splitlines())
    return [dict(zip(head, row)) for row in rows]


def test_tune_prunes_goes_on_and_leaves_the_best_settings(place: Path, capsys) -> None:
    assert main([*COMMAND, "--trials", "9"]) == 0
    assert main([*COMMAND, "--trials", "2"]) == 0
    found = trials(place / "t")
    states = {each["state"] for each in found}
    assert len(found) == 11 and states == {"complete", "pruned"}
    for each in found:
        summary = json.loads((place / "t" / f"tune-{int(each['trial']):04d}" / "summary.json").read_text())
        assert (summary["verdict"] == "pruned") == (each["state"] == "pruned")
    whole = [each for each in found if each["state"] == "complete"]
    best = min(whole, key=lambda each: float(each["nmse"]))
    pruned = [float(each["optimizer.backbone_lr"]) for each in found if each["state"] == "pruned"]
    assert float(best["optimizer.backbone_lr"]) < min(pruned)
    config = load_config(place / "t" / "best.toml")
    assert config.optimizer.backbone_lr == float(best["optimizer.backbone_lr"])
    assert config.training.max_seconds == 20.0 and f"# trial {best['trial']}" in (place / "t" / "best.toml").read_text()
    said = capsys.readouterr().out
    assert "importance of the settings: " in said and "what train prints" not in said
    assert (place / "t" / "tune-0000" / "output.txt").read_text() == "what train prints\n"


@pytest.mark.parametrize(
    "error, state, ended",
    [
        (RunStopped("the loop does not step", "steps_skipped"), "pruned", "steps_skipped"),
        (RuntimeError("you tried to allocate memory, 9 GiB"), "pruned", "out of memory"),
        (ConfigError("hybrid: width = 448 must be a multiple of heads"), "fail", "hybrid: width"),
    ],
)
def test_trial_that_cannot_be_trained_is_recorded_and_the_study_goes_on(
    error: Exception, state: str, ended: str, place: Path, monkeypatch
) -> None:
    calls: list[int] = []

    def sometimes(*given: Any, **more: Any) -> dict[str, Any]:
        calls.append(len(calls))
        if calls[-1] == 1:
            raise error
        return scored(*given, **more)

    monkeypatch.setattr(tune, "fit_in_folder", sometimes)
    assert main([*COMMAND, "--trials", "3"]) == 0
    found = trials(place / "t")
    assert [each["state"] for each in found] == ["complete", state, "complete"] and found[1]["ended"].startswith(ended)


def raising(error: BaseException) -> Callable[..., Any]:
    def fit(*_: Any, **__: Any) -> None:
        raise error

    return fit


def test_space_of_which_no_trial_can_be_built_ends_with_the_reason(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tune, "fit_in_folder", raising(ConfigError("model has no option 'depht'")))
    assert main([*COMMAND, "--trials", "9"]) == 2
    assert "no option 'depht'" in capsys.readouterr().err and len(trials(place / "t")) == tune.HOPELESS


def test_interrupt_marks_the_trial_and_the_study_goes_on(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tune, "fit_in_folder", raising(KeyboardInterrupt()))
    assert main([*COMMAND, "--trials", "9"]) == 130
    assert "The same command with --out t goes on with the study" in capsys.readouterr().err
    monkeypatch.setattr(tune, "fit_in_folder", scored)
    assert main([*COMMAND, "--trials", "1"]) == 0
    found = trials(place / "t")
    assert [(each["state"], each["ended"]) for each in found] == [("fail", "interrupted"), ("complete", "")]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--set", "task.snapshots=8"], "trials of other settings (task.snapshots = 8, not 16)"),
        (["--trials", "0"], "Give --trials 1 or more"),
        (["--storage", "nosuch://place"], "--storage nosuch://place cannot be opened"),
    ],
)
def test_tune_refuses_what_cannot_be_compared_or_opened(more: list[str], said: str, place: Path, capsys) -> None:
    assert main([*COMMAND, "--trials", "1"]) == 0
    assert main([*COMMAND, *more]) == 2
    assert said in capsys.readouterr().err and len(trials(place / "t")) == 1


@pytest.mark.slow
def test_two_processes_share_a_study_and_a_killed_one_is_noticed(place: Path) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.commands.test_tune_command import main, scored, tune
calls = []
def fit(*given, **more):
    calls.append(1)
    if sys.argv[1] == "dies" and len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return scored(*given, **more)
tune.fit_in_folder = fit
sys.exit(main([*{COMMAND!r}, "--storage", "shared/study.log", "--trials", sys.argv[2]]))
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code, how, "6"], stdout=subprocess.DEVNULL) for how in ("lives", "dies")
    ]
    assert [each.wait() for each in both] == [0, -signal.SIGKILL]
    done = subprocess.run([sys.executable, "-c", code, "lives", "1"], capture_output=True, text=True)
    found = trials(place / "t")
    (dead,) = [each["trial"] for each in found if each["state"] == "fail"]
    assert f"trial {dead} was under way when its process was killed" in done.stdout
    assert [int(each["trial"]) for each in found] == list(range(11)) and (place / "t" / "tune-0010").is_dir()
    assert len({each["optimizer.backbone_lr"] for each in found}) == 11  # no two drew the same


@pytest.mark.slow
def test_tune_trains_trials_that_other_commands_take(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(SPACE)
    small = settings(*SMALL_TASK, *FEW_SCENES, "health.preflight=false", "report.plots=false", "model.options.width=16")
    command = ["tune", "mine.toml", "--preset", "laptop", "--device", "cpu", *small, "--epochs", "3", "--out", "t"]
    assert main([*command, "--seconds-per-trial", "0", "--trials", "2"]) == 0
    found = trials(tmp_path / "t")
    assert [each["epochs"] for each in found] == ["3", "3"]
    assert main(["compare", "t/tune-0000", "t/tune-0001"]) == 0
    assert "optimizer.backbone_lr" in capsys.readouterr().out
    assert main(["why", "t/tune-0000"]) == 0
    assert main(["train", "t/best.toml", "--out", "again", *small]) in (0, 4)
    value = json.loads((tmp_path / "again" / "summary.json").read_text())["best_val_nmse"]
    assert value == min(float(each["nmse"]) for each in found)
