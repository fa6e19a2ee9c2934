"""Work on a few items ahead, on threads: scenes read while the trainer is busy with those before, files checked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Protocol, TypeVar

from torch import Tensor

from ris_fast.data.source import SceneSource
from ris_fast.physics.scenes import Scenes

Item, Result, Group = TypeVar("Item"), TypeVar("Result"), TypeVar("Group", bound=Sequence[Tensor])
GROUPS_AHEAD = 2


class ReadsAhead(Protocol):
    """A source whose `batch` is `assemble` of what `read` gives, of which a thread may do the second.

    `reads_ahead`: whether it pays, for scenes that come from files, or from host memory to a GPU.
    """

    reads_ahead: bool

    def read(self, split: str, index: Tensor) -> dict[str, Tensor]: ...

    def assemble(self, split: str, columns: dict[str, Tensor]) -> Scenes: ...


def scene_groups(
    source: SceneSource, split: str, groups: Iterable[Group]
) -> Generator[tuple[Group, list[Scenes]], None, None]:
    """Each group of index tensors with the scenes of each tensor, in order; read ahead of time where that pays.

    The scenes are the same bit for bit, and an error is raised at the group that it belongs to. A thread reads
    GROUPS_AHEAD groups while the caller is busy; it ends with the groups, or when this generator is closed. What a
    device does is left to the caller's thread and stream. `groups` are taken ahead of time too, on the caller's thread.
    """
    if not reads_ahead(source):
        for group in groups:
            yield group, [source.batch(split, index) for index in group]
        return

    def read(group: Group) -> tuple[Group, list[dict[str, Tensor]]]:
        return group, [source.read(split, index) for index in group]

    with closing(in_threads(read, groups, 1, GROUPS_AHEAD + 1)) as found:
        for group, columns in found:
            yield group, [source.assemble(split, each) for each in columns]


def reads_ahead(source: SceneSource | ReadsAhead) -> bool:
    """Whether `scene_groups` reads this source's scenes ahead of time."""
    return bool(getattr(source, "reads_ahead", False))


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Generator[Result, None, None]:
    """work(item) of each item in order, on threads of its own; at most `ahead` results are begun and not yet taken.

    The first exception in the order of the items is raised when its turn comes, and ends the work, as closing does.
    """
    pool = ThreadPoolExecutor(threads, "ris-fast-ahead")
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) >= ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
