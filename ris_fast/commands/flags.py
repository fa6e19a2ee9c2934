"""Flags that several commands have, with their help. A command's own flags have theirs in its docstring in cli.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ris_fast.commands.usage import whole_number, whole_number_or_auto, whole_number_or_word
from ris_fast.config.schema import ConfigError

WHOLE = Parameter(converter=whole_number, accepts_keys=False)
PRESET_HELP = "laptop (default on a CPU), full (default on a GPU) or original."
DEVICE_HELP = "auto, cpu, cuda or cuda:N."
SEED_HELP = "Seed of the weights and of the order of the scenes; --set data.seed=N draws other scenes."
AGAINST_HELP = "Test tasks: the first run's with task.key=value,value,... in turn; may be given again."
SET_HELP = "Any other setting, section.key=value; may be given again."

Whole = Annotated[int | None, WHOLE]
WholeOrAuto = Annotated[int | str | None, Parameter(converter=whole_number_or_auto, accepts_keys=False)]
WholeOrWord = Annotated[int | str | None, Parameter(converter=whole_number_or_word, accepts_keys=False)]
Preset = Annotated[str | None, Parameter(help=PRESET_HELP)]
Device = Annotated[str | None, Parameter(help=DEVICE_HELP)]
BestDevice = Annotated[str, Parameter(help=DEVICE_HELP)]
Seed = Annotated[int | None, WHOLE, Parameter(help=SEED_HELP)]
NoCompile = Annotated[bool, Parameter(help="Run without torch.compile.")]
Against = Annotated[list[str] | None, Parameter(help=AGAINST_HELP)]
Settings = Annotated[list[str] | None, Parameter(name="--set", help=SET_HELP)]


def run_flags(device: str | None, data: Path | None, seed: int | None, no_compile: bool) -> dict[str, Any]:
    """Settings of the flags that `train` and `check` have in common; None: not given."""
    return {
        "training.device": device,
        "data.path": absolute(data),
        "training.seed": seed,
        "training.compile": False if no_compile else None,
    }


def absolute(path: Path | None) -> str | None:
    """The absolute path. Unlike Path.resolve, os.path.realpath takes links that lead in a circle."""
    return None if path is None else os.path.realpath(os.path.expanduser(path))


def alone(command: str, flag: str, others: dict[str, Any]) -> None:
    """Refuses what has no meaning beside a flag. Raises: ConfigError."""
    if given := ", ".join(name for name, value in others.items() if value is not None):
        raise ConfigError(f"{command}: {flag} leaves nothing for {given} to do. Leave one or the other out.")
