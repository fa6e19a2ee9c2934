"""Folders and files without rights, and two processes that want the same run or data set.

Root may write anywhere, so as root the commands give that up first (see `server.py`). Each time the rights are given
back afterwards.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.durability import reading
from bench.durability.processes import Ended
from bench.durability.tasks import MODES, Prepared, half_done, moment, resume_arguments, simulate_arguments
from bench.durability.trial import CONTINUED, LOST, SAID, SILENT, Outcome, Part, Trial, compared, fresh_folder

HYBRID = "hybrid, simulated, accumulated"


@dataclass(frozen=True)
class Case:
    """Rights that are taken: of which path, to which mode, before which command. `needed`: whether it must be said."""

    path: str
    mode: int
    command: str  # resume, train, simulate or why
    half: str = HYBRID
    needed: bool = True


CASES = (
    Case("run", 0o555, "resume"),
    Case("run/checkpoints", 0o555, "resume"),
    Case("run/checkpoints", 0o000, "resume"),
    Case("run/checkpoints/last.safetensors", 0o000, "resume"),
    Case("run/checkpoints/last.safetensors", 0o444, "resume", needed=False),  # a rename needs no right to the file
    Case("run/config.toml", 0o000, "resume"),
    Case("run/metrics.jsonl", 0o444, "resume"),
    Case("run/metrics.jsonl", 0o000, "resume"),
    Case("run", 0o000, "resume"),
    Case("run/metrics.jsonl", 0o000, "why"),
    Case("run/config.toml", 0o000, "why", needed=False),
    Case("shards", 0o000, "train", "shards"),
    Case("shards/manifest.json", 0o000, "train", "shards"),
    Case("shards/train-00000.safetensors", 0o000, "train", "shards"),
    Case("npz", 0o000, "train", "npz"),
    Case("npz/train", 0o000, "train", "npz"),
    Case("npz/train/shard_000.npz", 0o000, "train", "npz"),
    Case("out", 0o555, "train"),
    Case("out", 0o555, "simulate"),
    Case("out/scenes.partial", 0o555, "simulate"),
    Case("out/scenes.partial/train-00000.safetensors", 0o000, "simulate", needed=False),  # it is made again
    Case("out/scenes.partial/plan.json", 0o000, "simulate"),
)


def without_rights(trial: Trial) -> Outcome:
    case = CASES[trial.number % len(CASES)]
    fresh_folder(trial.folder)
    arguments = _arranged(trial, case)
    path = trial.folder / case.path
    usual = path.stat().st_mode & 0o777
    path.chmod(case.mode)
    ended = trial.run(arguments, powerless=True)
    trial.story.append(f"{case.path} {case.mode:o}: {ended.code} {ended.last_line}")
    if path.exists():  # else the work is finished, under its own name
        path.chmod(usual)
    refused = ended.code in (2, 3) and case.path.rpartition("/")[2] in ended.text
    noted = ended.trained and "note: " in ended.text and path.name in ended.text
    if "Traceback" in ended.text or (case.needed and not refused and not noted):
        return Outcome(LOST, f"{case.path} {case.mode:o}, {case.command}: {ended.code} {ended.last_line}")
    then = _then(trial, case, arguments, ended)
    return Outcome(SAID) if then.verdict == CONTINUED and case.needed else then


def _arranged(trial: Trial, case: Case) -> list[str]:
    """Puts there what the command starts from; returns its arguments."""
    run, out = trial.folder / "run", trial.folder / "out"
    out.mkdir()
    if case.command in ("resume", "why"):
        shutil.copytree(half_done(trial.prepared, case.half), run)
        return resume_arguments(run) if case.command == "resume" else ["why", str(run)]
    if case.command == "train":
        data = MODES[case.half].data
        if data != "simulate":
            shutil.copytree(trial.prepared.folder / data, trial.folder / data)
        return MODES[case.half].arguments(out / "run", Prepared(trial.folder))
    if "partial" in case.path:
        shutil.copytree(trial.prepared.folder / "simulated", out / "scenes.partial")
        manifest = out / "scenes.partial" / "manifest.json"
        plan = _plan_of(manifest)
        manifest.unlink()
        (out / "scenes.partial" / "plan.json").write_text(plan)
    return simulate_arguments(out / "scenes")


def _plan_of(manifest: Path) -> str:
    """plan.json as it was before the manifest."""
    import json

    from ris_fast.data.write import SHARD_SCENES

    whole = json.loads(manifest.read_text())
    scenes = {split: entry["scenes"] for split, entry in whole.pop("splits").items()}
    kept = {key: whole[key] for key in ("format", "version", "task", "seed")}
    return json.dumps({**kept, "scenes": scenes, "shard_scenes": SHARD_SCENES}, indent=1) + "\n"


def _then(trial: Trial, case: Case, arguments: list[str], ended: Ended) -> Outcome:
    """With its rights back, the same command does what it should."""
    if case.command == "why":
        return Outcome(CONTINUED) if trial.run(arguments).code in (0, 4) else Outcome(LOST, "why does not work again")
    if not (ended.trained and case.command != "simulate") and ended.code != 0:
        ended = trial.run(arguments, powerless=True)
    if case.command == "simulate":
        if ended.code != 0:
            return Outcome(LOST, f"then {ended.code}: {ended.last_line}")
        wrong = reading.apart(reading.files(trial.folder / "out" / "scenes"), trial.prepared.files)
        return Outcome(SILENT, f"differs in {wrong}") if wrong else Outcome(CONTINUED)
    run = trial.folder / ("run" if case.command == "resume" else "out/run")
    return compared(trial, ended, run, case.half)


def rivals(trial: Trial) -> Outcome:
    """Two processes on one thing, the second a random moment later: one has it, the other one is told so."""
    kind = ("two starts", "resumed while it starts", "two resumed", "two simulate")[trial.number % 4]
    fresh_folder(trial.folder)
    name, run, out = HYBRID, trial.folder / "run", trial.folder / "scenes"
    start = MODES[name].arguments(run, trial.prepared)
    if kind == "two resumed":
        shutil.copytree(half_done(trial.prepared, name), run)
    first, second = {
        "two starts": (start, start),
        "resumed while it starts": (start, resume_arguments(run)),
        "two resumed": (resume_arguments(run), resume_arguments(run)),
        "two simulate": (simulate_arguments(out), simulate_arguments(out)),
    }[kind]
    one, other = trial.servers
    one.start(first, trial.folder, "first")
    waited = one.wait(moment(trial.random, trial.prepared.seconds["simulate" if "simul" in kind else name]))
    other.start(second, trial.folder, "second")
    ends = [waited or one.end(), other.end()]
    trial.story += [f"{kind}: {ended.code} {ended.last_line}" for ended in ends]
    if any("Traceback" in ended.text for ended in ends):
        return Outcome(LOST, f"{kind}: a traceback")
    refused = [ended for ended in ends if ended.code in (2, 3)]
    made = [ended for ended in ends if ended.trained]
    if len(made) + len(refused) != 2 or not made:
        return Outcome(LOST, f"{kind}: ends {[ended.code for ended in ends]}")
    wrong = (
        reading.apart(reading.files(out), trial.prepared.files)
        if kind == "two simulate"
        else reading.apart(reading.result(run), trial.prepared.results[name])
    )
    return Outcome(SILENT, f"{kind}: differs in {wrong[:4]}") if wrong else Outcome(SAID if refused else CONTINUED)


Work = Callable[[Trial], Outcome]
PARTS = (Part("without rights", len(CASES), without_rights), Part("two processes", 16, rivals))
