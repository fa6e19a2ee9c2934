"""The same function on many things by several processes, which end with the one that started them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch

from ris_fast import exit_codes

Thing, Result = TypeVar("Thing"), TypeVar("Result")


class WorkerLost(RuntimeError):
    """A process that did part of the work is gone. Exit code 3."""

    exit_code = exit_codes.DATA


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each_in_order(
    function: Callable[[Thing], Result],
    things: Sequence[Thing],
    jobs: int,
    done: Callable[[Result], None] = lambda _: None,
) -> Iterator[Result]:
    """function(thing) for each of them, in their order.

    Args: jobs: processes; 1: this one. Each has its part of the cores. The function and what it takes and gives are
        pickled. done: called with each result as soon as it is there, in any order.
    Raises: what the function raised first, WorkerLost where a process was killed. Then, and on an interrupt, all
        processes end at once.
    """
    if min(jobs, len(things)) <= 1:
        for thing in things:
            result = function(thing)
            done(result)
            yield result
        return
    yield from _by_processes(function, things, min(jobs, len(things)), done)


def _by_processes(
    function: Callable[[Thing], Result], things: Sequence[Thing], jobs: int, done: Callable[[Result], None]
) -> list[Result]:
    # started anew and not forked: a fork of a process with OpenMP threads may wait forever
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _start, (max(1, cores() // jobs),))
    try:
        with _interrupts_held():  # what starts now inherits that: an interrupt is this process's to act on
            futures = [pool.submit(function, thing) for thing in things]
        for future in as_completed(futures):
            done(future.result())
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise WorkerLost(
            f"one of {jobs} processes was killed, perhaps for lack of memory. What is written stays: run the same"
            f" command again, with fewer of them (--jobs {max(1, jobs // 2)}) if it was for memory."
        ) from None
    finally:
        _end(pool)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(pool: ProcessPoolExecutor) -> None:
    """Ends the processes, also those in the middle of something: they write whole files or none."""
    processes: list[Any] = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _start(threads: int) -> None:
    """In each new process: its part of the cores, and an end with its parent."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(exit_codes.INTERRUPTED)
