"""What a loop under `watch` is: one function with the mistake in an `if`; its healthy twin differs by that alone.

A function that is called with `wrong=False` is a right loop of an unusual kind, or the twin of a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ris_fast.health.causes import CAUSES

# `attach(model, optimizer, **options)` returns a Watcher, and the trial asks it for its report when the loop is over.
Attach = Callable[..., Any]


@dataclass(frozen=True)
class Loop:
    """One loop.

    Args:
        name: of the function; group: of its file.
        story: the mistake, or what is unusual about a loop that is right, in one line.
        run: run(attach, wrong, seed): builds model and optimizer, attaches the watch and trains for some seconds;
            returns a loss that shows what the mistake costs, or nothing.
        expect: causes any one of which is a right first answer; empty for a loop that is right.
        ranks: processes that run it, in one gloo group, where torch.distributed is initialised before the call.
        source: where the mistake was published, if it was.
    """

    name: str
    group: str
    story: str
    run: Callable[[Attach, bool, int], float | None]
    expect: tuple[str, ...] = ()
    ranks: int = 1
    source: str = ""

    def __post_init__(self) -> None:
        if unknown := [cause for cause in self.expect if cause not in CAUSES]:
            raise ValueError(f"loop {self.name}: there is no cause {', '.join(unknown)}.")


class Group:
    """Collects the loops of one file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loops: list[Loop] = []

    def mistake(self, story: str, expect: str, ranks: int = 1, source: str = "") -> Callable[[Callable], Callable]:
        """Decorator of `name(attach, wrong, seed)`, which makes the mistake where `wrong`."""
        return self._keep(story, tuple(expect.split()), ranks, source)

    def right(self, story: str, ranks: int = 1) -> Callable[[Callable], Callable]:
        """Decorator of `name(attach, wrong, seed)` without a mistake; `wrong` is never true."""
        return self._keep(story, (), ranks, "")

    def _keep(self, story: str, expect: tuple[str, ...], ranks: int, source: str) -> Callable[[Callable], Callable]:
        def keep(function: Callable) -> Callable:
            self.loops.append(Loop(function.__name__, self.name, story, function, expect, ranks, source))
            return function

        return keep


# Modules of this package with a `Group` of loops each.
GROUPS: tuple[str, ...] = (
    "unseen_2026_11_first",
    "unseen_2026_11_first_more",
    "unseen_2026_11_second",
    "unseen_2026_11_second_more",
    "unseen_2026_11_third",
    "unseen_2026_11_third_more",
    "unseen_2026_11_fourth",
    "unseen_2026_11_fourth_more",
    "unseen_2026_11_fifth",
    "unseen_2026_11_fifth_more",
    "unseen_2026_11_sixth",
    "unseen_2026_11_sixth_more",
    "unseen_2026_11_seventh",
    "unseen_2026_11_seventh_more",
    "unseen_2026_11_eighth",
    "unseen_2026_11_eighth_more",
    "published",
    "published_experts",
    "published_modules",
    "published_optimizers",
    "published_ranks",
    "right_adversarial",
    "right_data",
    "right_episodes",
    "right_hands",
    "right_losses",
    "right_more",
    "right_networks",
    "right_parameters",
    "right_precision",
    "right_ranks",
    "right_schedules",
    "right_steps",
    "right_teachers",
    "right_weights",
)


def all_loops() -> dict[str, Loop]:
    """Every loop of every group by name, in the order of the files."""
    loops: dict[str, Loop] = {}
    for module in GROUPS:
        for group in vars(import_module(f"bench.faults.loops.{module}")).values():
            for loop in group.loops if isinstance(group, Group) else ():
                if loops.setdefault(loop.name, loop) is not loop:
                    raise ValueError(f"loops: {loops[loop.name].group} and {loop.group} both have {loop.name}.")
    return loops
