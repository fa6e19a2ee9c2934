"""Checkpoints off the path of a step: a run waits for a copy of its tensors; a thread hashes and writes the copy."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_fast.files import WRITER
from ris_fast.training.checkpoint import Groups, named_as_in_file, write_checkpoint

Copy = dict[str, Tensor]
Layout = tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """A checkpoint to write, and the event behind the copy of its tensors where they came from CUDA."""

    folder: Path
    name: str
    manifest: Mapping[str, Any]
    layout: Layout
    copy: Copy
    copied: torch.cuda.Event | None

    def arrived(self) -> bool:
        return self.copied is None or self.copied.query()


class CheckpointWriter:
    """Writes checkpoints one at a time, in a thread that lives while there is something to write.

    Of each name at most one checkpoint is being written and one waits: a newer one takes the place of the one that
    waits. Python ends only when the thread has. Whatever goes wrong in the thread is raised once, by the next call of
    `save`, `poll` or `finish`, and drops what waits.

    Memory: a copy of the tensors of each name, and a second one where a name is saved while it is being written. Copies
    are kept for the next time: pinned memory takes long to get.

    CUDA: a copy is queued on the current stream, behind the steps so far and before the next one, which changes the
    tensors; the host does not wait for it. `poll` gives it to the thread once it has arrived, so that the thread makes
    no CUDA call, which could fall into the capture of a graph and spoil it. Not yet run on a GPU.
    """

    def __init__(self) -> None:
        self._copying: dict[str, Job] = {}  # by name, as in `_ready`; the thread does not look here
        self._lock = threading.Lock()  # of the four that follow, which both sides change
        self._ready: dict[str, Job] = {}
        self._spare: dict[Layout, list[Copy]] = defaultdict(list)
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()  # there is no thread, or it has nothing left to write
        self._idle.set()
        self._error: BaseException | None = None
        self._writing = ""  # a name
        self._written, self._bytes, self._waited, self._seconds = 0, 0, 0.0, 0.0

    def save(self, folder: Path, name: str, groups: Groups, manifest: Mapping[str, Any]) -> None:
        """Copies the tensors, which may change afterwards, and has `save_checkpoint` write them."""
        with self._waiting():
            self._raise()
            tensors = named_as_in_file(groups)
            layout = tuple((key, value.shape, value.dtype, value.is_cuda) for key, value in tensors.items())
            copy = self._memory(name, layout) or _like(tensors)
            self._copying[name] = Job(folder, name, manifest, layout, copy, _fill(copy, tensors))
            self._hand_over()

    def poll(self) -> None:
        """Gives the thread what has arrived on the host by now; waits for nothing."""
        self._raise()
        if self._copying:
            self._hand_over()

    def busy(self, name: str) -> bool:
        """Whether a checkpoint of this name is not on disk yet."""
        return name == self._writing or name in self._ready or name in self._copying

    def finish(self) -> None:
        """Waits until everything that was saved is on disk."""
        with self._waiting():
            for job in self._copying.values():
                if job.copied is not None:
                    job.copied.synchronize()
            self._hand_over()
            self._idle.wait()  # an interrupt in Thread.join would make Python take the thread for ended (gh-90882)
            self._raise()

    def close(self) -> str:
        """`finish` where another error is on its way; returns what went wrong here, empty if nothing did."""
        try:
            self.finish()
            return ""
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def figures(self) -> dict[str, float]:
        """Checkpoints and bytes that were written, seconds that the callers waited, and seconds of the thread."""
        return {
            "written": self._written,
            "bytes": self._bytes,
            "waited_seconds": self._waited,
            "writer_seconds": self._seconds,
        }

    # ---- the caller's side ------------------------------------------------------------------------------------------

    def _memory(self, name: str, layout: Layout) -> Copy | None:
        """An earlier copy to fill anew, if there is one. What waits under this name is given up for it."""
        with self._lock:
            for job in (self._copying.pop(name, None), self._ready.pop(name, None)):
                if job is not None:
                    self._spare[job.layout].append(job.copy)
            return self._spare[layout].pop() if self._spare[layout] else None

    def _hand_over(self) -> None:
        for job in [job for job in self._copying.values() if job.arrived()]:
            with self._lock:
                self._ready[job.name] = replace(
                    self._copying.pop(job.name), copied=None
                )  # the event stays on this side
                if self._thread is None:
                    self._idle.clear()
                    self._thread = threading.Thread(target=self._work, name=WRITER)
                    self._thread.start()

    def _raise(self) -> None:
        if (error := self._error) is not None:
            self._error = None
            raise error

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._next()) is not None:
            began = time.perf_counter()
            try:
                self._bytes += write_checkpoint(job.folder, job.name, job.copy, job.manifest)
                self._written += 1
            except BaseException as error:  # the run has to hear of it, whatever it is
                with self._lock:
                    self._error = error
                    self._ready.clear()
            self._seconds += time.perf_counter() - began
            with self._lock:
                self._spare[job.layout].append(job.copy)

    def _next(self) -> Job | None:
        """What has waited longest; the thread ends where there is nothing."""
        with self._lock:
            self._writing = next(iter(self._ready), "")
            if not self._writing:
                self._thread = None
                self._idle.set()
            return self._ready.pop(self._writing, None)


def _like(tensors: Mapping[str, Tensor]) -> Copy:
    """Host memory for these tensors, pinned for those on CUDA."""
    return {
        key: torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda) for key, value in tensors.items()
    }


def _fill(copy: Copy, tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
    """Copies the tensors; those on CUDA are there once the event has passed."""
    for key, value in tensors.items():
        copy[key].copy_(value.detach(), non_blocking=True)
    if not any(value.is_cuda for value in tensors.values()):
        return None
    copied = torch.cuda.Event()
    copied.record()
    return copied
