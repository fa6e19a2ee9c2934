"""One trial: a scratch folder, commands in it, and the verdict."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.durability import reading
from bench.durability.processes import Ended, Server
from bench.durability.tasks import Prepared, resume_arguments

CONTINUED, SAID, LOST, SILENT = "continued", "said", "lost", "silent"
VERDICTS = (CONTINUED, SAID, LOST, SILENT)


@dataclass(frozen=True)
class Outcome:
    """continued: in the end all is as undisturbed, bit for bit; said: it is not, and a message says exactly what is
    wrong, or what was left out; lost: what was there cannot be had any more, or nothing says how; silent: the result is
    another one, and nothing says so."""

    verdict: str
    detail: str = ""


@dataclass
class Trial:
    """What a trial has: its random numbers, its scratch folder, servers for its commands, what is prepared."""

    number: int
    seed: int
    folder: Path
    servers: list[Server]
    prepared: Prepared
    story: list[str] = field(default_factory=list)  # what was done, and how each command ended

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.seed} {self.number}")

    @property
    def server(self) -> Server:
        return self.servers[0]

    def run(self, arguments: Sequence[str], **limits: Any) -> Ended:
        ended = self.server.run(arguments, self.folder, **limits)
        self.tell(arguments, ended)
        return ended

    def tell(self, arguments: Sequence[str], ended: Ended) -> None:
        words = " ".join(each for each in arguments[:3])
        self.story.append(f"{words}: {ended.code} after {ended.seconds:.2f} s: {ended.last_line[:300]}")

    def killed_after(self, arguments: Sequence[str], seconds: float) -> bool:
        """Runs a command and kills it after these seconds; false where it had ended by then."""
        self.server.start(arguments, self.folder)
        if (ended := self.server.wait(seconds)) is None:
            ended = self.server.kill()
        self.tell(arguments, ended)
        return ended.code < 0

    def continued(self, run: Path, start: Sequence[str], **limits: Any) -> Ended:
        """Follows the messages: resumes the run, or starts it anew where that is what they advise."""
        if run.exists():
            ended = self.run(resume_arguments(run), **limits)
            if not (ended.code == 2 and "or start anew" in ended.text):
                return ended
        return self.run(start, **limits)


@dataclass(frozen=True)
class Part:
    """Some trials of one kind. `trial` does number N of them."""

    name: str
    trials: int
    trial: Callable[[Trial], Outcome]


def compared(trial: Trial, ended: Ended, run: Path, mode: str, *, rows: bool = False) -> Outcome:
    """The verdict on a run that was trained to its end, against the undisturbed one; with `rows` on what its
    metrics.jsonl says of its epochs, too."""
    if "Traceback" in ended.text:
        return Outcome(LOST, "a traceback")
    if not ended.trained:
        return Outcome(LOST, f"exit code {ended.code}: {ended.last_line}")
    expected = trial.prepared.results[mode]
    wrong = reading.apart(reading.result(run), expected)
    if wrong and "has no moments" in ended.text:
        return Outcome(SAID, "killed before the first last checkpoint")
    if rows:
        wrong += reading.apart(reading.epochs(run), trial.prepared.epochs[mode])
    return Outcome(SILENT, f"differs in {', '.join(wrong[:4])} ({len(wrong)})") if wrong else Outcome(CONTINUED)


def fresh_folder(path: Path) -> Path:
    """An empty folder that anybody may write to."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, mode=0o777)
    path.chmod(0o777)
    return path


def timed(part: Part, trial: Trial) -> tuple[Outcome, float]:
    """The outcome and the seconds of a trial; an error of the campaign's own counts as lost."""
    began = time.monotonic()
    try:
        outcome = part.trial(trial)
    except Exception as error:
        outcome = Outcome(LOST, f"{type(error).__name__}: {error}")
    return outcome, time.monotonic() - began
