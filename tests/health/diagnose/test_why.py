"""`ris-fast why` and `check` on run folders and on rows of other trainers; `why --explain`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ris_fast.commands.check import conclusion
from ris_fast.commands.cli import main
from ris_fast.health.diagnose.printed_rows import printed_rows
from ris_fast.health.diagnose.why import why
from ris_fast.health.finding import Finding, explained, ranked
from tests.command_line import FEW_SCENES, settings

SMALL = [
    *("--preset", "original", "--device", "cpu", "--no-compile", "--batch-size", "16"),
    *settings("training.precision=fp32"),
    *settings("task.ris_horizontal=4", "task.ris_vertical=4", "task.bs_antennas=4", "task.snapshots=8"),
    *settings("task.max_sources=2", *FEW_SCENES, "data.test_scenes=32", "model.options.width=32"),
    *settings(
        "model.options.heads=4", "model.options.grid=5", "model.options.feedforward=32", "model.options.layers=1"
    ),
    *settings("optimizer.backbone_lr=2e-3", "optimizer.head_lr=2e-3"),
]


def test_why_explains_the_original_report_from_its_losses(tmp_path: Path, capsys) -> None:
    """Training 0.217 +- 0.001, validation 1.921642 in every epoch: what the original's log had, as plain rows."""
    losses = [0.216999, 0.218567, 0.217593, 0.217210]
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        "".join(
            json.dumps({"epoch": i + 1, "train_loss": loss, "val_loss": 1.921642, "batches": 8}) + "\n"
            for i, loss in enumerate(losses)
        )
    )
    assert main(["why", str(file), "--json"]) == 0
    causes = [finding["cause"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert causes == ["step_once_per_epoch"]


def test_why_says_both_halves_of_the_original_report(tmp_path: Path, capsys) -> None:
    """One step an epoch, and constant validation because not even that step is applied: no cache is blamed."""
    (tmp_path / "metrics.jsonl").write_text(
        (json.dumps({"train_loss": 0.217, "val_loss": 1.921642, "batches": 9}) + "\n") * 9
    )
    assert main(["why", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert (
        "9 epochs were read" in text
        and "not certain" in text
        and "--resume" not in text
        and "cached_validation" not in text
    )
    assert (
        text.index("step_once_per_epoch (")
        < text.index("hardly changes")
        < text.index("once an epoch, behind the loop over batches")
        < text.index("The validation loss is 1.921642 in all 9 epochs, so not even that step is applied")
    )


SHORT = [{"train_loss": 0.6931 + 0.0003 * (i % 2), "val_loss": 0.6931} for i in range(9)]
PLAIN = {
    "few digits": (SHORT, ["cached_validation"], "may be rounding"),
    "nothing moves": ([{"loss": 1.3, "valid_loss": 1.921642}] * 5, ["step_never_called"], "no weight seems to move"),
    "rounding": (
        [{"loss": 4.1, "val_loss": value} for value in (4.8333380, 4.8333375, 4.8333380)],
        ["step_never_called"],
        "4.83334, but for rounding",
    ),
    "one that hardly learns": (
        [{"loss": 4.1 - 1e-3 * i, "val_loss": 4.8333380 - 1e-5 * i} for i in range(5)],
        [],
        "5 epochs were read",
    ),
    "cache": ([{"loss": 2.0 * 0.8**i, "val_loss": 1.921642} for i in range(5)], ["cached_validation"], "never change"),
    "one row": ([{"loss": 1.3, "val_loss": 1.921642}], [], "1 epoch was read"),
    "not a number": (
        [
            {"train_loss": 1 / (i + 1) if i < 4 else math.nan, "val_loss": math.nan if i > 3 else 1.0 / (i + 1)}
            for i in range(8)
        ],
        ["nonfinite_gradients"],
        "nan from row 5 of 8 on, 0.25 in the one before",
    ),
    "overfitting": (
        [{"train/loss": 2.0 * 0.8**i, "val/loss": 1.0 + 0.05 * i} for i in range(10)],
        ["overfitting"],
        "in epoch 1 of 10",
    ),
    "other names": ([{"loss": 0.217, "validation_loss": 1.921642}] * 4, ["step_once_per_epoch"], "divided by 8.9"),
    "learns": (
        [{"training loss": 1 / (i + 1), "eval-loss": 1.1 / (i + 1)} for i in range(6)],
        [],
        "watch(model, optimizer)",
    ),
}


@pytest.mark.parametrize("kind", ["lines", "list"])
@pytest.mark.parametrize("story", PLAIN)
def test_why_reads_plain_rows_under_their_usual_keys(story: str, kind: str, tmp_path: Path, capsys) -> None:
    rows, causes, said = PLAIN[story]
    file = tmp_path / "log.json"
    file.write_text(json.dumps(rows) if kind == "list" else "\n".join(map(json.dumps, rows)))
    assert main(["why", str(file)]) == 0
    text = capsys.readouterr().out
    assert said in text and all(cause in text for cause in causes)
    assert main(["why", str(file), "--json"]) == 0
    assert [finding["cause"] for finding in json.loads(capsys.readouterr().out)["findings"]] == causes


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is empty"),
        (b'{"a": 1}', "with the keys a"),
        (b"[1, 2]", "not of objects"),
        (b"\xff\xfe\x00\x81", "not text"),
        (b"hello\nthere\n", "not JSON"),
        (b"hello", "not JSON"),
        (b"[{", "not JSON"),
        (b"Step,Value\n1,0.5\n2,0.4\n", "with the keys Step, Value"),
        (b"loss of signal at noon\nvalidation was fine\n", "not JSON"),
        (b"epoch 3 begins\n", "not JSON"),
    ],
)
def test_why_refuses_a_file_that_holds_no_run(content: bytes, said: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(content)
    assert main(["why", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error and str(file) in error and "xpected" in error


def test_why_says_how_to_resume_a_killed_run(tmp_path: Path, capsys) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.safetensors").touch()
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"event": "start"})
        + "\n"
        + json.dumps({"event": "epoch", "step": 8, "train_loss": 0.5, "val_nmse_raw": 0.4})
        + "\n"
    )
    assert main(["why", str(tmp_path)]) == 0
    assert f"ris-fast train --resume {tmp_path}" in capsys.readouterr().out


ORIGINAL = [0.217 + 0.0005 * math.sin(i) for i in range(30)]
PRINTED = {
    "the original's": [f"Epoch {i + 1:03d}/030: train {loss:.6f}  val 1.921642" for i, loss in enumerate(ORIGINAL)],
    "named": [f"Epoch {i + 1}/30 - train_loss: {loss:.4f} - val_loss: 1.921642" for i, loss in enumerate(ORIGINAL)],
    "brackets": [f"Epoch [{i + 1}/30], Train Loss: {loss:.4f}, Val Loss: 1.921642" for i, loss in enumerate(ORIGINAL)],
    "a logger's": [
        f"2025-10-01 12:00:{i:02d},123 INFO trainer: epoch={i} | training loss={loss:.4f} | validation loss={1.921642}"
        " | lr 1e-4"
        for i, loss in enumerate(ORIGINAL)
    ],
    "two lines": [
        line
        for i, loss in enumerate(ORIGINAL)
        for line in (f"Epoch {i + 1}/30", f"8/8 [====] - 1s 5ms/step - loss: {loss:.4f} - val_loss: 1.921642")
    ],
    "batches first": [
        line
        for i, loss in enumerate(ORIGINAL)
        for line in (
            f"Train Epoch: {i} [0/64 (0%)]\tLoss: 3.1",
            f"Train Epoch: {i} [32/64 (50%)]\tLoss: {loss:.4f}",
            "Test set: Average loss: 1.921642, Accuracy: 1/64 (2%)",
        )
    ],
    "a table": ["epoch,step,train_loss,val_loss"] + [f"{i},{8 * i},{loss},1.921642" for i, loss in enumerate(ORIGINAL)],
    "a sparse table": (
        ["epoch,step,train_loss_epoch,train_loss_step,val_loss"]
        + [
            line
            for i, loss in enumerate(ORIGINAL)
            for line in (f"{i},{8 * i},,0.9,", f"{i},{8 * i + 7},,,1.921642", f"{i},{8 * i + 7},{loss},,")
        ]
    ),
    "semicolons": ["Epoch;Train Loss;Val Loss"] + [f"{i};{loss};1.921642" for i, loss in enumerate(ORIGINAL)],
}


@pytest.mark.parametrize("kind", PRINTED)
def test_why_reads_printed_logs(kind: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "train.log"
    file.write_text(
        "\n".join(
            ["device: cpu, train 64 scenes", *PRINTED[kind], "done in 3.2 s"]
            if "table" not in kind and kind != "semicolons"
            else PRINTED[kind]
        )
    )
    assert main(["why", str(file)]) == 0
    text = capsys.readouterr().out
    assert (
        "30 epochs were read" in text
        and "divided by 8.9" in text
        and "in all 30 epochs, so not even that step is applied" in text
    )
    assert "cached_validation" not in text


def test_printed_rows_reads_our_own_epoch_lines() -> None:
    line = (
        "Epoch 001/120: train 0.140  val 0.023  raw 0.023 ema 0.024  |g| 0.0954  clipped 19%  skipped 0%  8064 scenes/s"
    )
    assert printed_rows(line) == [{"epoch": 1, "train_loss": 0.140, "val_loss": 0.023, "grad_norm": 0.0954}]


def test_why_refuses_a_damaged_file_of_rows(tmp_path: Path, capsys) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"train_loss": 0.5, "val_loss": 0.4}\n{"train_loss": 0.5, "val\n{"train_loss": 0.5, "val_loss": 0.4}\n'
    )
    assert main(["why", str(file)]) == 2 and str(file) in capsys.readouterr().err


def test_explained_gives_certain_findings_in_full() -> None:
    findings = ranked(
        [
            Finding("unused_head", "a head."),
            Finding("split_overlap", "copies."),
            Finding("ema_cold", "cold.", certain=False),
        ]
    )
    for text in (explained(findings), conclusion(findings, ""), conclusion(findings, "2 checks could not run")):
        assert (
            text.index("split_overlap (structural")
            < text.index("seen: copies.")
            < text.index("unused_head (structural")
            < text.index("seen: a head.")
        )
        assert text.count("fix: ") == 2 and "\nalso seen, less telling: ema_cold: cold." in text
    assert explained(findings[2:]).count("fix: ") == 1


def test_why_finds_nothing_in_a_run_that_learns() -> None:
    rows = [{"epoch": i, "train_loss": 1.0 / (i + 1), "val_loss": 1.1 / (i + 1), "grad_norm": 0.3} for i in range(6)]
    assert why("run", rows).findings == ()


@pytest.mark.slow
def test_train_stopped_by_preflight_exits_4_and_why_agrees(tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert (
        main(
            ["train", *SMALL, "--epochs", "1", "--out", str(out), "--set", "loss.cov=0", "--set", "loss.cov_pred=0.05"]
        )
        == 4
    )
    assert "zero_loss_weight" in capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert (
        summary["verdict"] == "stopped"
        and summary["findings"][0] == "zero_loss_weight"
        and summary["evidence"][0]["advice"]
    )
    assert main(["why", str(out)]) == 0
    assert "zero_loss_weight" in capsys.readouterr().out


@pytest.mark.slow
def test_train_healthy_run_has_no_finding_and_logs_tensors(tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert (
        main(["train", *SMALL, "--epochs", "2", "--out", str(out), "--log-tensors"]) == 4
    )  # two epochs teach it too little
    text = capsys.readouterr().out
    assert "preflight: " in text and "nothing found" in text and "[GRAD] step 1:" in text
    assert json.loads((out / "summary.json").read_text())["findings"] == []
    assert (out / "plots" / "tensors.png").is_file() and (out / "tensors.csv").read_text().startswith(
        "step,tensor,grad_norm"
    )
    assert main(["why", str(out)]) == 0
    assert "o rule found a mistake" in capsys.readouterr().out


@pytest.mark.slow
def test_check_exits_4_on_a_certain_mistake(capsys) -> None:
    assert main(["check", *SMALL]) == 0
    lines = capsys.readouterr().out
    assert "the truth scores zero" in lines and "nothing found" in lines
    assert main(["check", *SMALL, "--json", "--graph", "--set", "optimizer.head_lr=0"]) == 4
    result = json.loads(capsys.readouterr().out)
    assert result["findings"][0]["cause"] == "zero_learning_rate" and len(result["graph"]["rows"]) > 20


def test_why_explain_corrects_a_misspelt_cause(capsys, tmp_path: Path) -> None:
    assert main(["why", "--explain", "unused_head"]) == 0
    assert "## Fix" in capsys.readouterr().out
    assert main(["why", "--explain", "unused_heads"]) == 2 and "Did you mean 'unused_head'?" in capsys.readouterr().err
    assert main(["why", str(tmp_path / "nothing")]) == 2


def test_why_names_the_baseline_a_stalled_run_missed(tmp_path: Path, capsys) -> None:
    summary = {
        "verdict": "stalled",
        "best_val_nmse": 0.0266,
        "baselines": {"mean": 0.79, "pursuit": 0.0256},
        "optimizer_steps": 8,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert main(["why", str(tmp_path)]) == 0
    assert (
        "not better than pursuit, 0.0256, which the network's inputs give without it: train longer"
        in capsys.readouterr().out
    )
    assert main(["why", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reason"].startswith("stalled: best validation NMSE 0.0266")


def test_why_names_a_damaged_summary_and_rows_without_numbers(tmp_path: Path, capsys) -> None:
    (tmp_path / "summary.json").write_text('{"verdict": "lear')
    (tmp_path / "metrics.jsonl").write_text('{"train_loss": 1.0}\n')
    assert main(["why", str(tmp_path)]) == 2
    assert str(tmp_path / "summary.json") in (said := capsys.readouterr().err) and "Remove it" in said
    (tmp_path / "rows.jsonl").write_text('{"train_loss": "x", "val_loss": null}\n' * 3)
    (tmp_path / "summary.json").unlink()
    assert main(["why", str(tmp_path / "rows.jsonl")]) == 2 and "none of them has a number" in capsys.readouterr().err


def test_why_names_a_record_in_which_an_entry_changed_its_name(tmp_path: Path, capsys) -> None:
    """As one flipped bit does it."""
    health = {"call": 1, "steps": 1, "attempted": 1, "applied": 1, "moved": 3, "tensors": 3}
    rows = [{"event": "step", "step": step, "train_loss": 1.0, "health": health} for step in (1, 2)]
    text = "\n".join(map(json.dumps, [{"event": "start", "epoch_steps": 4}, *rows])) + "\n"
    (tmp_path / "metrics.jsonl").write_text("applhed".join(text.rsplit("applied", 1)))
    assert main(["why", str(tmp_path)]) == 2
    assert "damaged" in (said := capsys.readouterr().err) and "Traceback" not in said
