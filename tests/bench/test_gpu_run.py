"""bench/gpu.sh runs seldom and far away: whatever happens to a stage, what the others found is kept, and what it names
must exist here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import report, rows, run
from bench.gpu.stages import STAGES, Stage

ROOT = Path(__file__).parents[2]
NOTE = "from bench.gpu.rows import note; note('a figure', value={}); "


def python(code: str, seconds: int = 60) -> Stage:
    return Stage(seconds, (sys.executable, "-c", code), (sys.executable, "-c", code))


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (rows.ROWS, rows.STAGE, rows.TRIAL, "RIS_FAST_GPU_SH_STAGES", "RIS_FAST_GPU_SH_SECONDS"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever the run writes there
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(rows.COMMIT, "abc1234")
    monkeypatch.setattr(run, "KEPT", tmp_path)
    monkeypatch.setattr(run, "GRACE", 1)
    return tmp_path


def stages(monkeypatch: pytest.MonkeyPatch, **given: Stage) -> None:
    monkeypatch.setattr(run, "STAGES", given)


def ended(out: Path) -> dict[str, str]:
    return {name: at["abc1234"] for name, at in run.outcomes(rows.read(out / run.RESULTS)).items()}


def test_gpu_script_is_valid_bash() -> None:
    assert subprocess.run(["bash", "-n", ROOT / "bench/gpu.sh"], capture_output=True, text=True).stderr == ""


def test_a_run_keeps_every_figure_whatever_becomes_of_a_stage(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignoring = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    stages(
        monkeypatch,
        fails=python(NOTE.format(1) + "print('why'); raise SystemExit(3)"),
        hangs=python(ignoring + NOTE.format(2) + "time.sleep(100)", seconds=12),
        killed=python(NOTE.format(3) + "import os; os.kill(os.getpid(), 9)"),
        works=python(NOTE.format(4)),
    )
    monkeypatch.setattr(run, "LEAST", 0)
    assert run.main() == 1
    assert ended(out) == {
        "fails": "exit code 3",
        "hangs": run.OUT_OF_TIME,
        "killed": "killed by signal 9",
        "works": run.DONE,
    }
    figures = {row["stage"]: row["value"] for row in rows.read(out / run.RESULTS) if row["item"] == "a figure"}
    assert figures == {"fails": 1, "hangs": 2, "killed": 3, "works": 4}
    assert "why" in (out / run.LOG).read_text() and {path.name for path in out.iterdir()} == {run.RESULTS, run.LOG}


def test_a_second_run_does_first_what_the_first_did_not_get_through(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    later = {"works": python(NOTE.format(1)), "fails": python("raise SystemExit(1)"), "waits": python(NOTE.format(2))}
    stages(monkeypatch, **later)
    monkeypatch.setenv("RIS_FAST_GPU_SH_STAGES", "works fails")
    assert run.main() == 1
    with (out / run.RESULTS).open("a") as file:
        file.write('{"stage": "waits", "item": "a torn li')  # as a kill leaves it
    known = run.outcomes(rows.read(out / run.RESULTS))
    assert run.order(known, "abc1234") == ["fails", "waits"]
    assert run.order(known, "of other code") == ["fails", "waits", "works"]
    monkeypatch.setenv("RIS_FAST_GPU_SH_STAGES", "")
    capsys.readouterr()
    run.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["fails", "waits"]
    assert ended(out)["waits"] == run.DONE
    assert {"stage": "waits", "item": "a figure", "value": 2}.items() <= rows.read(out / run.RESULTS)[-2].items()


def test_a_run_without_time_says_so(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages(monkeypatch, first=python("pass"))
    monkeypatch.setenv("RIS_FAST_GPU_SH_SECONDS", "1")
    assert run.main() == 1 and ended(out) == {"first": "not run: no time left"}


def test_a_run_refuses_a_stage_that_is_not_there(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RIS_FAST_GPU_SH_STAGES", "smoke benches")
    assert run.main() == 2 and "benches: no such stage; there are smoke" in capsys.readouterr().err


def test_the_first_stages_fit_into_the_first_run() -> None:
    first = list(STAGES)[: list(STAGES).index("train_original")]
    assert sum(STAGES[name].seconds for name in first) <= 420
    second = ("train_original", "gradcheck", "step", "check")
    assert sum(STAGES[name].seconds for name in second) <= 380


COLLECT = """
import json, os, sys, pytest, torch, ris_fast.training.trainer
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
for name, words in json.loads(sys.argv[1]).items():
    if (child := os.fork()) == 0:  # files of bench and of tests have the same names: each stage by itself
        code = pytest.main([*words, "--collect-only", "-n", "0"])
        sys.stdout.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        print(name, file=sys.stderr)
"""


@pytest.mark.slow
def test_every_stage_selects_tests_that_a_gpu_would_have() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # as bench/gpu.sh has it
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    commands = {name: stage.command for name, stage in STAGES.items() if "pytest" in stage.command}
    asked = {name: command[command.index("pytest") + 1 :] for name, command in commands.items()}
    assert len(asked) > 5
    command = [sys.executable, "-W", "ignore", "-c", COLLECT, json.dumps(asked)]
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert told.stderr == "", told.stdout[-3000:]  # the names of stages that select nothing


# ---- what becomes of the results ------------------------------------------------------------------------------------


def kept(folder: Path, *given: dict) -> Path:
    (folder / "results.jsonl").write_text("".join(json.dumps({"commit": "abc1234", **row}) + "\n" for row in given))
    readme = folder / "TOP.md"
    readme.write_text(f"before\n{report.BEGIN}\nwhat stood here\n{report.END}\nafter\n")
    return readme


CEILINGS = {"stage": "smoke", "item": "ceilings", "ok": True, "copy_GB_per_s": 3012.4, "bf16_TFLOP_per_s": 790.2}


def test_report_writes_both_tables_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = {**CEILINGS, "copy_GB_per_s": 1.0}
    readme = kept(tmp_path, older, CEILINGS, {"stage": "smoke", "item": "stage", "outcome": "done", "seconds": 61.0})
    assert report.main(tmp_path, readme) == 0
    text, document = readme.read_text(), (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "what stood here" not in text
    assert "| copy bandwidth | 3,012 GB/s |" in text and "790 TFLOP/s" in text
    assert "`RIS_FAST_GPU_SH_STAGES=smoke bash bench/gpu.sh`" in document and "| abc1234 |" in document
    missing = capsys.readouterr().out.partition("still missing:")[2]
    assert "training of `full`" in missing and "copy bandwidth" not in missing
    again = readme.read_text()
    report.main(tmp_path, readme)
    assert readme.read_text() == again


def test_report_takes_no_figure_from_a_trial_or_from_what_was_wrong(tmp_path: Path) -> None:
    wrong = {"stage": "smoke", "item": "captured step, 2048 scenes", "ok": False, "error": "RuntimeError: no"}
    readme = kept(tmp_path, {**CEILINGS, "trial": True}, wrong)
    report.main(tmp_path, readme)
    assert report.NOTHING in readme.read_text()
    assert "NOT RIGHT smoke / captured step, 2048 scenes: RuntimeError: no" in report.table([wrong])


def test_report_says_a_training_by_its_summary() -> None:
    summary = {"best_val_nmse": 0.0213, "seconds": 39.8, "scenes_seen": 7_340_032, "scenes_per_s": 184_000.0}
    row = {"stage": "train_full", "item": "full", "ok": True, "seconds_to": {"0.187": 1.4, "0.03": None}}
    row["summary"] = {**summary, "verdict": "learned"}
    assert "0.0213 after 40 s and 7,340,032 scenes, 184,000 scenes/s (0.187 after 1.4 s); learned" in report.table(
        [row]
    )


def test_report_refuses_a_readme_without_marks(tmp_path: Path) -> None:
    readme = kept(tmp_path, CEILINGS)
    readme.write_text("no marks here")
    assert report.main(tmp_path, readme) == 2 and readme.read_text() == "no marks here"


def test_readme_has_the_block() -> None:
    text = (ROOT / "README.md").read_text()
    assert report.BEGIN in text and report.END in text.partition(report.BEGIN)[2]
    assert report.block(report.measured(report.FOLDER / "results.jsonl")) in text
