"""A disk that is full: from the start, or from a random moment on. A small tmpfs as root, else a limit on files' sizes.

As root each trial mounts a tmpfs of its own. It is too small for the whole run, or a file fills it while the run is
under way; the space is freed by a larger size or by removing that file.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.durability import reading
from bench.durability.tasks import MODES, moment, simulate_arguments
from bench.durability.trial import CONTINUED, LOST, SAID, SILENT, Outcome, Part, Trial, compared, fresh_folder

ENOUGH = "64m"
RUN_BYTES, SCENES_BYTES = 700_000, 2_400_000  # that a run and a data set of the campaign take, a little more
SAYS = ("No space left on device", "File too large", "GB free; expected")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)},mode=777", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Takes all the space that is left."""
    with open(path, "wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"0" * size)
            except OSError:
                pass


def full_train(trial: Trial) -> Outcome:
    name = list(MODES)[trial.number % len(MODES)]
    disk = fresh_folder(fresh_folder(trial.folder) / "disk")
    run = disk / "run"
    start = MODES[name].arguments(run, trial.prepared)

    def then() -> Outcome:
        return compared(trial, trial.continued(run, start), run, name)

    return _full(trial, disk, start, RUN_BYTES, trial.prepared.seconds[name], then)


def full_simulate(trial: Trial) -> Outcome:
    disk = fresh_folder(fresh_folder(trial.folder) / "disk")
    out = disk / "scenes"
    start = simulate_arguments(out)

    def then() -> Outcome:
        ended = trial.run(start) if not out.exists() else None
        if ended is not None and ended.code != 0:
            return Outcome(LOST, f"exit code {ended.code}: {ended.last_line}")
        wrong = reading.apart(reading.files(out), trial.prepared.files)
        return Outcome(SILENT, f"differs in {', '.join(wrong)}") if wrong else Outcome(CONTINUED)

    return _full(trial, disk, start, SCENES_BYTES, trial.prepared.seconds["simulate"], then)


def _full(trial: Trial, disk: Path, start: list[str], needed: int, seconds: float, then: Any) -> Outcome:
    """Runs the command on a disk that gets full, judges what it says, frees space and lets it continue."""
    if os.getuid() != 0:
        limit = trial.random.randrange(0, needed // 2)
        return _judged(trial, trial.run(start, file_limit=max(limit, 1)), disk, then)
    early = trial.random.random() < 0.5
    with small_disk(disk, trial.random.randrange(0, needed) if early else 2 * needed):
        ballast = disk / "ballast"
        trial.server.start(start, trial.folder)
        if not early:
            ended = trial.server.wait(moment(trial.random, seconds))
            if ended is None:
                fill(ballast)
        if early or ended is None:
            ended = trial.server.end()
        trial.tell(start, ended)

        def freed() -> Outcome:
            ballast.unlink(missing_ok=True)
            subprocess.run(["mount", "-o", f"remount,size={ENOUGH}", str(disk)], check=True)
            return then()

        return _judged(trial, ended, disk, freed)


def _judged(trial: Trial, ended: Any, disk: Path, then: Any) -> Outcome:
    if "Traceback" in ended.text:
        return Outcome(LOST, "a traceback")
    said = any(each in ended.text for each in SAYS) and str(disk) in ended.text
    if not ended.trained and not (ended.code == 3 and said):
        return Outcome(LOST, f"exit code {ended.code}: {ended.last_line}")
    for name in ("last", "best"):
        if (disk / "run").exists():
            reading.checkpoint(disk / "run", name)  # raises for one that is not whole
    needs_more = ended.code == 3 and (disk / "run" / "checkpoints" / "last.safetensors").exists()
    if needs_more and "--resume" not in ended.text:
        trial.story.append("does not say how to continue")
    outcome = then()
    if outcome.verdict == SILENT and "verdict" in outcome.detail and "summary.json is not complete" in ended.text:
        return Outcome(SAID, outcome.detail)
    return outcome


PARTS = (Part("full disk, train", 25, full_train), Part("full disk, simulate", 25, full_simulate))
