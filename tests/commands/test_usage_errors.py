"""Every mistake on the command line is answered with the nearest valid spelling and exit code 2; nothing is guessed."""

from __future__ import annotations

import pytest

from ris_fast.commands.cli import main
from ris_fast.config.load import load_config


@pytest.mark.parametrize(
    "arguments, answer",
    [
        (["train", "--presett", "seed"], "--preset"),
        (["train", "--batchsize", "3"], "--batch-size"),
        (["trian"], "train"),
        (["evalate", "run"], "evaluate"),
        (["train", "--preset", "orignal"], "Did you mean 'original'?"),
        (["train", "--preset", "original", "--set", "training.epoch=3"], "Did you mean 'epochs'?"),
        (["train", "--preset", "original", "--set", "trainig.epochs=3"], "Did you mean 'training'?"),
        (["train", "--preset", "original", "--set", "epochs=3"], "section.key=value"),
        (["train", "--preset", "original", "--precision", "bf61"], "bf16"),
        (["train", "--preset", "original", "--backend", "refrence"], "reference"),
        (["train", "--preset", "original", "--epochs", "0"], "at least 1"),
        (["train", "--preset", "original", "--epochs", "ten"], "--epochs"),
        (["train", "--preset", "original", "--epochs", "1.5"], "whole number"),
        (["train", "no-such-file.toml"], "no-such-file.toml"),
        (["train", "--preset", "original", "--device", "cuda:99"], "cuda:99"),
        (["train", "--preset", "original", "--device", "gpu"], "auto, cpu, cuda"),
        (["train", "a.toml", "b.toml"], "b.toml"),
        (["train", "--nothing-like-it"], "ris-fast train --help"),
        (["train", "--config", "a.toml"], "without an option: ris-fast train FILE.toml"),
        (["check", "--config=a.toml"], "without an option: ris-fast check FILE.toml"),
        (["--config", "a.toml"], "without an option: ris-fast train FILE.toml"),
        (["a.toml"], "without an option: ris-fast train a.toml"),
        (["bench", "--config", "a.toml"], "ris-fast bench --help"),
        (["train", "--seed", "1", "--seed", "2"], "--seed specified multiple times"),
        (["train", "--seed", "x"], "'x' is not a whole number"),
        (["why", "a", "b", "c"], "Too many arguments: b c."),
        (["bench", "kernel"], 'Did you mean "kernels"?'),
        (["bench", "--device", "gpu"], "--device is 'gpu'; expected auto, cpu, cuda or cuda:N"),
        (["gradcheck", "--device", "cpu:3"], "there is one CPU"),
        (["gradcheck", "--device", "mps"], "kernels exist for cpu and cuda"),
        (["env", "--device", "cpu"], "ris-fast env --help"),
        (["evaluate"], "RUN"),
        (["compare"], "RUN"),
        (["compare", "no-such-run"], "not a run folder"),
        (["compare", "no-such-run", "--reech", "0.1"], "--reach"),
        (["compare", "no-such-run", "--reach", "-1"], "--reach -1 is no NMSE"),
        (["compare", "no-such-run", "--csv", "figures.png"], "ends in .csv"),
        (["track", "no-such-run", "--to", "tensorboard"], "not a run folder"),
        (["track", "no-such-run"], "--to"),
        (["tune", "--trails", "3"], "--trials"),
        (["tune", "no-such-file.toml"], "no-such-file.toml"),
        (["tune", "--preset", "orignal"], "Did you mean 'original'?"),
        (["tune", "--storage="], "--storage is empty"),
        (["tune", "--preset", "laptop", "--set", "report.tracker=tensorbord"], "Did you mean 'tensorboard'?"),
        (["train", "--preset", "laptop", "--set", "report.tracker=tensorbord"], "Did you mean 'tensorboard'?"),
        (["simulate", "--scenes", "4"], "--out"),
        (["simulate", "--out", "x", "--scenes", "4", "--preset", "original", "--device", "gpu"], "auto, cpu, cuda"),
        (["evaluate", "no-such-run"], "not a run folder"),
        (["train", "--resume", "no-such-run"], "not a run folder"),
    ],
)
def test_usage_error_says_what_would_do(arguments: list[str], answer: str, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert answer in said.err and said.err.startswith("ris-fast: ") and "Traceback" not in said.err
    assert said.out == "" and list(tmp_path.iterdir()) == []


def test_print_config_shows_provenance_and_reads_back(capsys, tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('preset = "original"\n[training]\nepochs = 7\nbatch_size = 32\n[optimizer]\neps = 1e-7\n')
    arguments = ["train", str(file), "--set", "task.snapshots=8", "--epochs", "9", "--print-config"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    origin = {line.partition(" = ")[0]: line.rpartition("# ")[2] for line in text.splitlines() if "# " in line}
    assert origin["epochs"] == "flag" and origin["snapshots"] == "--set" and origin["eps"] == str(file)
    assert origin["backbone_lr"] == "preset original" and origin["wavelength_m"] == "default"
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert load_config(again) == load_config(file, None, ["task.snapshots=8"], {"training.epochs": 9})


def test_train_flags_reach_their_settings(capsys) -> None:
    assert (
        main(
            [
                "train",
                "--preset",
                "laptop",
                "--accumulate",
                "4",
                "--seed",
                "1e3",
                "--max-seconds",
                "12",
                "--no-compile",
                "--backend",
                "reference",
                "--precision",
                "bf16",
                "--data",
                "shards",
                "--device",
                "cpu",
                "--print-config",
            ]
        )
        == 0
    )
    lines = [line.split("  #")[0].rstrip() for line in capsys.readouterr().out.splitlines() if line.endswith("# flag")]
    assert {
        "accumulate = 4",
        "seed = 1000",
        "max_seconds = 12.0",
        "compile = false",
        'backend = "reference"',
        'precision = "bf16"',
        'device = "cpu"',
    } < set(lines)
    assert any(line.startswith('path = "/') and line.endswith('/shards"') for line in lines)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["--version"], []])
def test_help_is_not_an_error(arguments: list[str], capsys) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip()


def test_resume_refuses_flags_of_a_new_run(capsys, tmp_path) -> None:
    assert main(["train", "--resume", str(tmp_path), "--preset", "original", "--out", "x"]) == 2
    assert "Leave --preset, --out away" in capsys.readouterr().err


def test_bench_checks_its_json_path_before_measuring(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("ris_fast.commands.bench.run_bench", lambda *_: pytest.fail("measured"))
    assert main(["bench", "--device", "cpu", "--json", str(tmp_path)]) == 3
    assert f"{tmp_path} cannot be written: Is a directory" in capsys.readouterr().err
    from ris_fast.files import check_writable

    check_writable(tmp_path / "new" / "figures.json")
    (tmp_path / "old.json").write_text("{}")
    check_writable(tmp_path / "old.json")
    assert [path.name for path in tmp_path.rglob("*")] == ["old.json"] and (tmp_path / "old.json").read_text() == "{}"


@pytest.mark.parametrize("flags", [["--opponents"], ["--count", "2"], ["--method", "music"]])
def test_evaluate_refuses_flags_that_no_positions_makes_idle(flags: list[str], capsys, tmp_path) -> None:
    assert main(["evaluate", str(tmp_path), "--no-positions", *flags]) == 2
    said = capsys.readouterr().err
    assert f"--no-positions leaves nothing for {flags[0]} to do" in said and said.count("\n") == 1


@pytest.mark.parametrize("command, flag", [("evaluate", "--csv"), ("evaluate", "--plots"), ("mismatch", "--out")])
def test_outputs_are_checked_before_the_work(command: str, flag: str, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("ris_fast.commands.evaluate.evaluate_run", lambda *_: pytest.fail("evaluated"))
    monkeypatch.setattr("ris_fast.commands.mismatch.mismatch", lambda *_: pytest.fail("evaluated"))
    (tmp_path / "file").write_text("")
    assert main([command, str(tmp_path / "run"), flag, str(tmp_path / "file" / "below.csv")]) == 3
    assert " cannot be written: " in capsys.readouterr().err


def test_mismatch_names_the_flag_of_too_few_scenes(capsys, tmp_path) -> None:
    assert main(["mismatch", str(tmp_path), "--scenes", "0"]) == 2
    assert "--scenes 0 asked for. Give --scenes 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "mismatch"])
def test_an_interrupt_says_what_was_written(command: str, capsys, monkeypatch, tmp_path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ris_fast.commands.evaluate.evaluate_run", interrupted)
    monkeypatch.setattr("ris_fast.commands.mismatch.mismatch", interrupted)
    assert main([command, str(tmp_path)]) == 130
    assert "interrupted: nothing was written, and a file of an earlier call is as it was" in capsys.readouterr().err
    monkeypatch.setattr("ris_fast.commands.mismatch.mismatch", lambda *_: {})
    monkeypatch.setattr("ris_fast.commands.mismatch.mismatch_text", str)
    monkeypatch.setattr("ris_fast.commands.mismatch.save_mismatch", interrupted)
    assert main(["mismatch", str(tmp_path), "--out", str(tmp_path / "new")]) == 130
    assert "interrupted while writing: each file is whole" in capsys.readouterr().err


def test_evaluate_writes_no_table_over_another_kind_of_file(capsys, tmp_path) -> None:
    kept = tmp_path / "best.safetensors"
    kept.write_bytes(b"weights")
    assert main(["evaluate", str(tmp_path), "--csv", str(kept)]) == 2
    said = capsys.readouterr().err
    assert "expected a name that ends in .csv" in said and said.count("\n") == 1
    assert kept.read_bytes() == b"weights"
