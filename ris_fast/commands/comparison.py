"""Runs side by side: what each is called, and what is to be said of runs that differ in more than the network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ris_fast.config.schema import CONTENTS, ConfigError, Task


class Tested(Protocol):
    """A run on its test scenes."""

    @property
    def task(self) -> Task:
        """The task that its network was trained for."""

    @property
    def scenes(self) -> tuple[Tensor, Tensor]:
        """Number of sources and SNR in dB of each test scene."""


def run_names(runs: Sequence[Path], command: str = "evaluate") -> list[str]:
    """What each run is called in tables: its folder, and the checkpoint where one is given; the path where two runs
    would have one name."""
    paths = [Path(os.path.realpath(run)) for run in runs]
    names = [f"{path.parent.parent.name}/{path.stem}" if path.suffix == ".safetensors" else path.name for path in paths]
    names = [str(run) if names.count(name) > 1 else name for name, run in zip(names, runs)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{command}: {twice} is given twice. Give each run once.")
    return names


def differences(base: Task, task: Task) -> dict[str, Any]:
    """The settings of a task that are not those of another, by name."""
    changed = {key: value for key, value in asdict(task).items() if getattr(base, key) != value}
    for place, contents in CONTENTS.items():  # a file and a function by their place, where their content differs
        if contents[0] not in changed:
            changed.pop(place, None)
        elif place in changed:
            changed = {key: value for key, value in changed.items() if key not in contents}
            changed[place] = changed[place] or "built in"
    return changed


def comparison_notes(tested: Mapping[str, Tested]) -> list[str]:
    """What is to be said of runs whose task or test scenes are not those of the first.

    Scenes are compared by their numbers of sources and SNRs, which one seed draws alike for tasks of other arrays.
    """
    (name, first), *others = tested.items()
    notes = []
    for other, each in others:
        changed = differences(first.task, each.task)
        differs = [f"task.{key} = {value}, not {getattr(first.task, key)}" for key, value in changed.items()]
        if differs:
            notes.append(
                f"{other} has another task than {name} ({'; '.join(differs)}): their figures compare tasks as well as"
                f" runs. Baselines and bounds shown are those of {name}"
            )
        elif not _equal(first.scenes, each.scenes):
            notes.append(
                f"{other} has other test scenes than {name}: their figures compare scenes as well as runs. Baselines"
                f" and bounds shown are those of {name}"
            )
    return notes


def _equal(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(map(torch.equal, one, other))
