"""Clocks that jump by hours while a run trains: the time of day both ways, the monotonic one forward (as after sleep).

A library put before the C library's own (`clock.c`, built with `cc`) adds to the clocks what the trial says.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

from bench.durability import reading
from bench.durability.processes import Server
from bench.durability.tasks import MODES, half_done, resume_arguments
from bench.durability.trial import CONTINUED, LOST, SILENT, Outcome, Part, Trial, compared, fresh_folder

HOURS = 3600.0
NAME = "hybrid, simulated, accumulated"


class Clock:
    """The two numbers that the library reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(16))

    def set(self, day: float = 0.0, monotonic: float = 0.0) -> None:
        with open(self.path, "r+b") as file:
            file.write(struct.pack("dd", day, monotonic))


def clock_jumps(trial: Trial) -> Outcome:
    fresh_folder(trial.folder)
    if len(trial.servers) < 3:  # kept for the trials to come
        trial.servers.append(_server(trial))
    server = trial.servers[2]
    clock = Clock(Path(server.environment["DURABILITY_CLOCK"]))  # back at the true time
    return KINDS[trial.number % len(KINDS)](trial, server, clock)


def _server(trial: Trial) -> Server:
    """A server whose commands see the clocks of the campaign."""
    place = trial.folder.with_name(f"clock-{trial.number}")  # LD_PRELOAD takes a space for an end
    place.mkdir()
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", place / "clock.so", source, "-ldl", "-lm"], check=True)
    clock = Clock(place / "now")
    environment = {"LD_PRELOAD": str(place / "clock.so"), "DURABILITY_CLOCK": str(clock.path)}
    clock.set(5 * HOURS, HOURS)
    asked = [sys.executable, "-c", "import time; print(time.time(), time.monotonic())"]
    said = subprocess.run(asked, env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout
    day, monotonic = (float(word) for word in said.split())
    if day < time.time() + 4 * HOURS or monotonic < time.monotonic() + 0.9 * HOURS:
        raise RuntimeError("the clocks of the campaign do not move")
    clock.set()
    return Server(environment)


def _jump(day: float, monotonic: float = 0.0):
    """A run in whose midst the clock jumps, twice: there and back, as far as a clock can."""

    def kind(trial: Trial, server: Server, clock: Clock) -> Outcome:
        run = trial.folder / "run"
        server.start(MODES[NAME].arguments(run, trial.prepared), trial.folder)
        server.wait(trial.random.uniform(0.3, 0.8) * trial.prepared.seconds[NAME])
        clock.set(day, monotonic)
        if monotonic == 0.0:
            server.wait(0.3)
            clock.set(-day)
        ended = server.end()
        trial.tell(["train", f"{day:+g} s", f"{monotonic:+g} s"], ended)
        outcome = compared(trial, ended, run, NAME)
        took = json.loads((run / "summary.json").read_text())["seconds"]
        if outcome.verdict == CONTINUED and not 0 < took < ended.seconds + monotonic + 1:
            return Outcome(LOST, f"the run says that it took {took:g} s")
        return outcome

    return kind


def _limited(trial: Trial, server: Server, clock: Clock) -> Outcome:
    """--max-seconds counts the time that passes, whatever the time of day does meanwhile; then the run continues."""
    run, limit = trial.folder / "run", 1.5
    endless = [*MODES[NAME].arguments(run, trial.prepared), "--epochs", "100000", "--max-seconds", str(limit)]
    server.start(endless, trial.folder)
    server.wait(1.0)
    clock.set(-5 * HOURS)
    server.wait(0.5)
    clock.set(5 * HOURS)
    ended = server.end()
    trial.tell(endless, ended)
    took = json.loads((run / "summary.json").read_text())["seconds"] if ended.trained else -1.0
    if not limit <= took < limit + 1.5:
        return Outcome(LOST, f"{took:g} s of {limit:g}: {ended.last_line}")
    again = server.run([*resume_arguments(run), "--max-seconds", str(2 * limit)], trial.folder)
    trial.tell(["train", "--resume"], again)
    took = json.loads((run / "summary.json").read_text())["seconds"]
    return Outcome(CONTINUED) if 2 * limit <= took < 2 * limit + 1.5 else Outcome(LOST, f"resumed: {took:g} s")


def _slept(trial: Trial, server: Server, clock: Clock) -> Outcome:
    """A machine that slept for an hour counts it as used, says so, and the run continues with more time."""
    run = trial.folder / "run"
    endless = [*MODES[NAME].arguments(run, trial.prepared), "--epochs", "100000", "--max-seconds", "600"]
    server.start(endless, trial.folder)
    while reading.best_score(run) is None and server.wait(0.05) is None:
        pass
    clock.set(0.0, HOURS)
    ended = server.end()
    trial.tell(endless, ended)
    if not ended.trained:
        return Outcome(LOST, f"{ended.code}: {ended.last_line}")
    steps = reading.checkpoint(run, "last")[1]["state"]["step"]
    server.start([*resume_arguments(run), "--max-seconds", "7200"], trial.folder)
    server.wait(3.0)
    ended = server.kill(signal.SIGINT)
    trial.tell(["train", "--resume"], ended)
    after = reading.checkpoint(run, "last")[1]["state"]["step"]
    return Outcome(CONTINUED) if after > steps else Outcome(LOST, f"{after} steps, {steps} before")


def _names(trial: Trial, server: Server, clock: Clock) -> Outcome:
    """Two runs without --out at the same time of day get two folders, and neither harms the other."""
    arguments = MODES[NAME].arguments(trial.folder, trial.prepared)
    at = arguments.index("--out")
    del arguments[at : at + 2]
    for _ in range(2):
        clock.set(1_000_000_000.0 - time.time())  # the same second again
        trial.tell(arguments, server.run(arguments, trial.folder))
    runs = sorted((trial.folder / "runs").iterdir())
    wrong = [reading.apart(reading.result(run), trial.prepared.results[NAME]) for run in runs]
    if len(runs) != 2 or any(wrong):
        return Outcome(SILENT, f"{[run.name for run in runs]} {wrong}")
    return Outcome(CONTINUED)


def _old_files(trial: Trial, server: Server, clock: Clock) -> Outcome:
    """Files of a half-done run that are from the future, or from 1970, and a clock that stands before them."""
    run = trial.folder / "run"
    shutil.copytree(half_done(trial.prepared, NAME), run)
    ahead = trial.number // len(KINDS) % 2 == 0
    for path in (run, *run.rglob("*")):
        os.utime(path, (time.time() + 5 * HOURS,) * 2 if ahead else (0, 0))
    clock.set(-1e9)
    ended = server.run(resume_arguments(run), trial.folder)
    trial.tell(["train", "--resume"], ended)
    return compared(trial, ended, run, NAME)


KINDS = (_jump(5 * HOURS), _jump(-5 * HOURS), _jump(0.0, 5 * HOURS), _limited, _slept, _names, _old_files)
PARTS = (Part("clocks that jump", 2 * len(KINDS), clock_jumps),)
