"""What `watch` says of one loop, with its mistake or without it, and whether that tells the two apart."""

from __future__ import annotations

import pickle
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist

from bench.faults.loops.catalogue import Loop
from ris_fast.health import watch
from ris_fast.health.finding import Finding, ranked
from ris_fast.health.watch.guard import FAILURES

ROOT = Path(__file__).parents[3]

RANKS_LIMIT_S = 60.0  # for all ranks of a loop together, from their start


@dataclass(frozen=True)
class LoopOutcome:
    """What was said of one loop.

    `said`: causes in the report's order, `certain` beside each; `evidence`: of the first; `crashed`: the exception
    that ended the loop or the report, or the time limit; `ended_at`: the loss that the loop returns, the mean over
    ranks, None where there is none.
    """

    name: str
    group: str
    wrong: bool
    expect: tuple[str, ...]
    said: tuple[str, ...]
    certain: tuple[bool, ...]
    evidence: str
    seconds: float
    crashed: str = ""
    ended_at: float | None = None


@dataclass(frozen=True)
class Judged:
    """A loop beside its twin; a loop that is right has no `mistake`."""

    twin: LoopOutcome
    mistake: LoopOutcome | None = None

    @property
    def detected(self) -> bool:
        """Something is said of the mistake that is not said of the twin."""
        return self.mistake is not None and bool(set(self.mistake.said) - set(self.twin.said))

    @property
    def named(self) -> bool:
        """What the report of the mistake begins with is a right answer, and is not said of the twin."""
        if self.mistake is None or not self.mistake.said:
            return False
        first = self.mistake.said[0]
        return first in self.mistake.expect and first not in self.twin.said

    @property
    def accused(self) -> bool:
        """Something is said of the twin, which is right."""
        return bool(self.twin.said)

    @property
    def accused_certainly(self) -> bool:
        return any(self.twin.certain)


def judge_loop(loop: Loop, seed: int = 0) -> Judged:
    """Runs the twin and, where the loop has one, the mistake."""
    twin = score_loop(loop, False, seed)
    return Judged(twin, score_loop(loop, True, seed) if loop.expect else None)


def score_loop(loop: Loop, wrong: bool, seed: int = 0) -> LoopOutcome:
    """Runs a loop to its end under `watch` and asks for the report."""
    began = time.monotonic()
    findings, crashed, ended_at = watched(loop, wrong, seed) if loop.ranks == 1 else watched_ranks(loop, wrong, seed)
    return LoopOutcome(
        loop.name,
        loop.group,
        wrong,
        loop.expect,
        tuple(finding.cause for finding in findings),
        tuple(finding.certain for finding in findings),
        findings[0].evidence.replace(f"{ROOT}/", "") if findings else "",  # results say nothing of the machine
        time.monotonic() - began,
        crashed,
        ended_at,
    )


# ---- in this process -----------------------------------------------------------------------------------------------


class WithoutLoss:
    """A watcher to which a loop may also tell its loss, which this one does not read."""

    def __init__(self, watcher: Any) -> None:
        self.watcher = watcher

    def loss(self, value: Any, *_: Any) -> Any:
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.watcher, name)


def watched(loop: Loop, wrong: bool, seed: int) -> tuple[list[Finding], str, float | None]:
    """What all watches of the loop say together, what ended it if that was an exception, and its loss."""
    watchers: list[Any] = []

    def attach(model: Any, optimizer: Any, **options: Any) -> Any:
        watcher = watch(model, optimizer, **options)
        watchers.append(watcher)
        return watcher if hasattr(watcher, "loss") else WithoutLoss(watcher)

    findings: list[Finding] = []
    crashed, ended_at, before = "", None, len(FAILURES)
    with as_before(seed):
        try:
            ended_at = loop.run(attach, wrong, seed)
        except Exception as error:  # of the loop; what was seen until then is still reported
            crashed = described(error)
        try:
            findings = ranked([finding for watcher in watchers for finding in watcher.report()])
        except Exception as error:
            crashed = crashed or f"report: {described(error)}"
        finally:
            for watcher in watchers:
                watcher.close()
    crashed = crashed or next(iter(FAILURES[before:]), "")
    return findings, crashed or ("" if watchers else "no watch was attached"), ended_at


@contextmanager
def as_before(seed: int) -> Iterator[None]:
    """Seeds all generators, ignores warnings, and undoes what a loop may leave behind in torch."""
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)


def described(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


# ---- in several processes ------------------------------------------------------------------------------------------


def watched_ranks(loop: Loop, wrong: bool, seed: int) -> tuple[list[Finding], str, float | None]:
    """What the watches of all ranks say together, what ended the first that did not reach its end, and the loss."""
    context = get_context("forkserver")  # which imports once, for the ranks of all loops, what they need
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        ranks = [
            context.Process(target=run_rank, args=(loop, wrong, seed, rank, place), daemon=True)
            for rank in range(loop.ranks)
        ]
        for rank in ranks:
            rank.start()
        ended = wait_for(ranks, RANKS_LIMIT_S)
        findings: list[Finding] = []
        crashes: list[str] = []
        losses: list[float] = []
        for rank, in_time in enumerate(ended):
            path = place / f"{rank}.pickle"
            if path.exists():
                found, crashed, ended_at = pickle.loads(path.read_bytes())
                findings += found
                losses += [] if ended_at is None else [ended_at]
            else:
                crashed = "ended without a report" if in_time else f"was not through after {RANKS_LIMIT_S:.0f} s"
            crashes += [f"rank {rank}: {crashed}"] if crashed else []
    return ranked(findings), crashes[0] if crashes else "", mean(losses) if losses else None


def wait_for(processes: list[BaseProcess], limit_s: float) -> list[bool]:
    """Waits for all; kills what still runs at the limit. Returns which of them ended by themselves."""
    until = time.monotonic() + limit_s
    while (running := [each.sentinel for each in processes if each.is_alive()]) and time.monotonic() < until:
        wait(running, until - time.monotonic())
    ended = [not each.is_alive() for each in processes]
    for each in processes:
        each.kill()
        each.join()
    return ended


def run_rank(loop: Loop, wrong: bool, seed: int, rank: int, place: Path) -> None:
    """One rank, in a process of its own; leaves what it found in a file, which is whole or not there."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place / 'meeting'}",
        rank=rank,
        world_size=loop.ranks,
        timeout=timedelta(seconds=RANKS_LIMIT_S),
    )
    written = place / f"{rank}.unfinished"
    written.write_bytes(pickle.dumps(watched(loop, wrong, seed)))
    written.rename(place / f"{rank}.pickle")
    dist.destroy_process_group()
