"""What a hostile tester did at the command line: output that nobody takes, another's environment, advice, links, typos,
two writers."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ris_fast.commands import train as launch
from ris_fast.commands.cli import app, main
from ris_fast.config.load import load_config
from ris_fast.config.schema import SECTIONS, ConfigError
from ris_fast.data import write
from ris_fast.files import locked
from ris_fast.health import watch
from ris_fast.training.trainer import Trainer
from tests.command_line import SMALL_TASK, settings
from tests.commands.test_runs import SMALL

ROOT = Path(__file__).parent.parent.parent
QUICK = [*SMALL, "--set", "health.preflight=false"]
TASK = settings(*SMALL_TASK)
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def shell(command: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, env=QUIET | variables)


def program(*arguments: object) -> str:
    return shlex.join([sys.executable, "-m", "ris_fast", *map(str, arguments)])


# ---- 4: output that nobody takes ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["| sed '/Epoch 001/q' >&2; exit ${PIPESTATUS[0]}", "> /dev/full 2>&- <&-"])
def test_train_survives_a_closed_or_full_output(ending: str, tmp_path: Path) -> None:
    done = shell(f"{program('train', *QUICK, '--epochs', 2, '--out', tmp_path / 'run')} {ending}")
    assert done.returncode == 4 and "Traceback" not in done.stderr  # stalled: the run's own code
    assert "Exception ignored" not in done.stderr and (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.parametrize(
    "ending, code",
    [("| true; exit ${PIPESTATUS[0]}", 0), ("> /dev/full", 3), (">&-", 0), ("2>&-", 0), ("2> /dev/full", 0)],
)
def test_why_fails_on_a_full_disk_and_not_on_a_closed_pipe(ending: str, code: int) -> None:
    done = shell(f"{program('why', '--explain', 'stalled_at_baseline')} {ending}")
    assert (
        done.returncode == code and "Traceback" not in done.stderr and ("No space left" in done.stderr) == (code == 3)
    )


# ---- 5: Jupyter's environment ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such backend", "agg"])
def test_figures_are_drawn_under_any_mplbackend(backend: str, tmp_path: Path) -> None:
    code = (
        "import sys, os; sys.modules['matplotlib_inline'] = None\n"
        "from ris_fast.report.plots import loss_figure, save\n"
        f"save(loss_figure([], {{'zero': 1.0}}), {str(tmp_path / 'loss.png')!r}); print(os.environ['MPLBACKEND'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=QUIET | {"MPLBACKEND": backend}
    )
    assert done.returncode == 0 and done.stdout.strip() == backend and (tmp_path / "loss.png").stat().st_size > 1000


# ---- 6: advice that fails -------------------------------------------------------------------------------------------


def written(folder: Path, capsys: Any, *settings: str) -> list[str]:
    """A data set, and the command that is printed to train on it."""
    assert (
        main(
            [
                "simulate",
                "--out",
                str(folder),
                "--scenes",
                "40",
                "--device",
                "cpu",
                "--preset",
                "original",
                *TASK,
                *settings,
            ]
        )
        == 0
    )
    return shlex.split(re.search(r"train on it: ris-fast (.*)", capsys.readouterr().out)[1])


@pytest.mark.parametrize(
    "settings", [("--set", "task.snapshots=8"), ("--set", "task.symbols=per_snapshot", "--set", "task.snr_max_db=30")]
)
def test_simulate_prints_a_command_that_trains_on_its_task(
    settings: tuple[str, ...], tmp_path, monkeypatch, capsys
) -> None:
    command, opened = written(tmp_path / "my scenes", capsys, *settings), []
    monkeypatch.setattr(launch, "run_training", lambda config, *_, **__: opened.append(Trainer(config)) or 0)
    assert main(command) == 0
    (trainer,) = opened
    assert all(
        str(getattr(trainer.config.task, key)) in (value, f"{value}.0")
        for key, value in (text.removeprefix("task.").split("=") for text in settings[1::2])
    )
    assert trainer.config.provenance["task.snapshots"] == "data set"


def test_train_lists_all_settings_that_contradict_the_data(tmp_path, capsys) -> None:
    command = written(tmp_path / "scenes", capsys, "--set", "task.snapshots=8")
    assert (
        main([*command, "--set", "task.snapshots=4", "--set", "task.max_sources=3", "--out", str(tmp_path / "run")])
        == 3
    )
    said = capsys.readouterr().err
    assert (
        "found snapshots 8, max_sources 5; expected snapshots 4, max_sources 3" in said
        and "brings its own task" in said
    )


@pytest.mark.slow
def test_evaluate_on_another_task_advises_a_working_command(tmp_path, capsys) -> None:
    run = tmp_path / "a run"
    assert main(["train", *QUICK, "--epochs", "1", "--out", str(run)]) == 4
    written(tmp_path / "other", capsys, "--set", "task.snapshots=8")
    assert main(["evaluate", str(run), "--data", str(tmp_path / "other"), "--device", "cpu"]) == 3
    said = capsys.readouterr().err
    assert "--set" not in said
    advised = shlex.split(
        re.search(r"ris-fast (simulate .*? --scenes \d+)", said)[1].replace("DIR", shlex.quote(str(tmp_path / "new")))
    )
    assert (
        main([*advised[:-1], "40"]) == 0
        and main(["evaluate", str(run), "--data", str(tmp_path / "new"), "--device", "cpu"]) == 0
    )


def texts() -> dict[str, str]:
    """Every text in the program's source, f-strings with X where a value goes, and the pages on causes; name ->
    text."""
    found = {str(path): path.read_text() for path in (ROOT / "ris_fast").rglob("*.md")}
    for path in (ROOT / "ris_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found[f"{path}:{node.lineno}"] = "".join(
                    part.value if isinstance(part, ast.Constant) else "X" for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.setdefault(f"{path}:{node.lineno}", node.value)
    return found


def test_messages_name_existing_commands_and_flags() -> None:
    commands = {name: app[name] for name in app if not name.startswith("-")}
    flags = {
        name: {flag for argument in command.assemble_argument_collection() for flag in argument.names}
        for name, command in commands.items()
    }
    seen = 0
    for where, text in texts().items():
        for name, rest in re.findall(r"ris-fast ([a-z]+(?:-[a-z]+)*)((?: (?:--?[\w-]+|[A-Z]+|\S+\.toml))*)", text):
            if name in ("and", "is", "with", "scenes"):  # of a sentence or of the format, not commands
                continue
            assert name in commands, f"{where}: ris-fast {name}"
            wrong = set(re.findall(r"--[\w-]+", rest)) - flags[name] - {"--help"}
            assert not wrong, f"{where}: ris-fast {name} has no {wrong}"
            seen += 1
    assert seen > 15


def test_messages_name_existing_settings() -> None:
    known = {f"{section}.{item}" for section, kind in SECTIONS.items() for item in kind.__dataclass_fields__}
    advised = [
        (where, key)
        for where, text in texts().items()
        for key in re.findall(r"--set ([a-z]+\.[a-z_]+)(?:\.\w+)?=", text)
    ]
    assert len(advised) > 3 and not [each for each in advised if each[1] not in known | {"section.key", "a.b"}]


# ---- 7: tracebacks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out, code, words",
    [
        ("loop", 3, "a link that leads in a circle"),
        ("n" * 300, 3, "File name too long"),
        ("n" * 300 + "/x", 3, "File name too long"),
        ("n" * 250, 3, "File name too long"),
        ("", 2, "is empty"),
        ("dangling", 0, ""),
    ],
)
def test_simulate_names_an_impossible_out_folder(
    out: str, code: int, words: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    os.symlink("there/below", "dangling")
    assert main(["simulate", "--out", out, "--scenes", "4", "--preset", "original", "--device", "cpu", *TASK]) == code
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and said.count("\n") == (code != 0)
    assert (tmp_path / "there" / "below" / "manifest.json").is_file() == (code == 0)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "--set", "training.seed=1", "training.epochs=2"], "Write: --set training.epochs=2"),
        (
            ["train", "a.toml", "--set", "training.seed=1", "training.epochs=2", "task.snapshots=4"],
            "--set training.epochs=2 --set task.snapshots=4",
        ),
        (["check", "training.seed=1"], "Write: --set training.seed=1"),
    ],
)
def test_usage_error_asks_to_repeat_set_for_each_setting(arguments: list[str], words: str, capsys) -> None:
    assert main(arguments) == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_train_names_torchinductor_cache_dir_that_is_a_file(tmp_path) -> None:
    (tmp_path / "cache").touch()
    done = shell(program("train", *QUICK, "--out", tmp_path / "run"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert (
        done.returncode == 3
        and "Traceback" not in done.stderr
        and "environment variable TORCHINDUCTOR_CACHE_DIR" in done.stderr
    )


# ---- 8: typos -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, words",
    [
        ("health.mute=clip_too_smal", "Did you mean 'clip_too_small'?"),
        ("health.mute=plateau,nonsense", "there is no cause"),
        ("health.frozen=nonsense", "no parameter's name begins with 'nonsense'"),
        ("health.frozen='blocks,rang_head'", "Did you mean 'range_head'?"),
        ("model.options.width=abc", "expected a whole number"),
        ("model.options.grid=[3]", "expected a whole number"),
        ("model.options.dropout=7", "below 1"),
        ("model.options.heads=-1", "at least 1"),
        ("model.options.feedforward=0", "at least 1"),
        ("model.options.inputs=efective_channel", "Did you mean 'effective_channel'?"),
        ("model.options.layers=1.5", "expected a whole number"),
    ],
)
def test_train_refuses_unknown_setting_values(setting: str, words: str, tmp_path, capsys) -> None:
    assert main(["train", *SMALL, "--set", setting, "--out", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_watch_refuses_a_frozen_prefix_of_no_parameter() -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no parameter's name begins with 'encoder.'"):
        watch(model, torch.optim.SGD(model.parameters(), 0.1), frozen=("encoder.",))


# ---- 10: two writers, and endings -----------------------------------------------------------------------------------


def simulating(folder: Path, scenes: int) -> list[str]:
    """The command that writes a small data set."""
    return ["simulate", "--out", str(folder), "--scenes", str(scenes), "--preset", "original", "--device", "cpu", *TASK]


def test_simulate_refuses_a_second_writer(tmp_path, capsys) -> None:
    (tmp_path / "set.partial").mkdir()
    simulate = simulating(tmp_path / "set", 4)
    with locked(tmp_path / "set.partial"):
        assert main(simulate) == 2
    assert "another process is writing this data set" in capsys.readouterr().err
    assert main(simulate) == 0


@pytest.mark.usefixtures("terminal_signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_simulate_stopped_by_a_signal_says_how_to_continue(sent: signal.Signals, tmp_path, monkeypatch, capsys) -> None:
    simulate = simulating(tmp_path / "set", 8)
    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_shard", lambda *_: os.kill(os.getpid(), sent))
        assert main(simulate) == 130
    said = capsys.readouterr().err
    assert "0 of 11 scenes" in said and str(tmp_path / "set.partial") in said and "same command again" in said
    assert main(simulate) == 0 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_simulate_keeps_sighup_ignored_under_nohup(tmp_path, monkeypatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(
        write,
        "_write_shard",
        lambda *_: os.kill(os.getpid(), signal.SIGHUP) or (_ for _ in ()).throw(ConfigError("reached")),
    )
    try:
        assert main(simulating(tmp_path / "set", 4)) == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_load_config_takes_the_data_sets_task_unless_set(tmp_path, capsys) -> None:
    written(tmp_path / "scenes", capsys, "--set", "task.snapshots=8")
    flags = {"data.path": str(tmp_path / "scenes")}
    assert load_config(preset="original", flags=flags).task.snapshots == 8
    assert load_config(None, "original", ["task.snapshots=6"], flags).task.snapshots == 6
    assert load_config(None, "original", ["data.source=simulate"], flags).task.snapshots == 16
    (tmp_path / "scenes" / "manifest.json").write_text("{")
    assert load_config(preset="original", flags=flags).task.snapshots == 16  # the reader says what is wrong with it
