"""What a process checks of a data set of ours on opening, and how many files at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ris_fast.environment import local_ranks

MOST_THREADS = 8  # a disk has enough to do


@dataclass(frozen=True)
class Verification:
    """Which contents this process checks: SHA-256 and finite values of every `ranks`-th file, all of them together.

    The processes of one machine share the files. Those of another one check them too, because they may have a copy of
    their own. Hashes of scenes, which find those that two splits share, are made by the first process of each machine.
    """

    contents: bool = True
    rank: int = 0
    ranks: int = 1

    @classmethod
    def here(cls, contents: bool) -> Verification:
        """For this process, of those that torchrun started on this machine. Args: contents: data.verify."""
        return cls(contents, *local_ranks())

    @property
    def scenes(self) -> bool:
        """Whether scenes are hashed."""
        return self.contents and self.rank == 0

    def file(self, number: int) -> bool:
        """Whether this process checks the file of this number in its split."""
        return self.contents and number % self.ranks == self.rank

    @property
    def notes(self) -> list[str]:
        """What a person should read of it."""
        return [] if self.contents else ["only sizes and headers of the files were checked (data.verify = false)"]


def threads_to_open() -> int:
    """As many as this process has cores for itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_THREADS, max(1, cores // local_ranks()[1]))
