"""What `ris-fast train` does around the trainer: the run folder, who is told, and how a run that ends early is explained."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Iterable, Mapping

from ris_fast.config import Config, ConfigError, Task
from ris_fast.report.eventlog import METRICS, JsonlReport, write_json, write_text
from ris_fast.report.observers import Observer, Observers
from ris_fast.settings import load_config, render_toml

CONFIG = "config.toml"
STOPPED_BY_HEALTH = 4
INTERRUPTED = 130


class OutOfMemory(RuntimeError):
    """The batch does not fit into memory; the message says which would. Exit code 5."""

    exit_code = 5


class RunFolder:
    """Observer that writes what a run was started with, once it has really started: config.toml and env.json."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config

    def start(self, info: Mapping[str, Any]) -> None:
        from ris_fast.environment import environment

        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / CONFIG, render_toml(self.config))
        write_json(self.folder / "env.json", environment())

    def step(self, row: Mapping[str, Any]) -> None:
        """A step changes nothing here."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch changes nothing here."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The summary is the event log's."""


def run_training(config: Config, out: Path | None, *, resume: bool = False) -> int:
    """Trains, shows and records one run. Returns its exit code: 0, 4 (stopped by health) or 130 (Ctrl-C).

    Raises ConfigError for a folder that holds another run, DataError, and OutOfMemory with a batch size that fits.
    """
    from ris_fast.report.console import ConsoleReport

    folder = new_folder(config, out) if not resume else Path(out or ".")
    console = ConsoleReport(standard_task=config.task == Task())
    try:
        summary = _fit(config, folder, _observers(config, folder, console), resume)
    except KeyboardInterrupt:
        console.close()
        print(f"\nris-fast: interrupted. {_how_to_resume(folder)}", file=sys.stderr)
        return INTERRUPTED
    finally:
        console.close()
    print(f"run folder: {folder}")
    return STOPPED_BY_HEALTH if summary["verdict"] == "stopped" else 0


def resumed_config(run: Path, refused: Mapping[str, Any], overrides: Iterable[str],
                   flags: Mapping[str, Any]) -> Config:
    """The settings of the run in `run`, with --set and flags on top. Raises ConfigError for a folder without a run."""
    extra = [name for name, value in refused.items() if value is not None]
    if extra:
        raise ConfigError(f"--resume continues {run} with its own settings and folder. Leave {', '.join(extra)} away.")
    if not (run / CONFIG).is_file():
        raise ConfigError(f"--resume {run}: not a run folder, it has no {CONFIG}. Give the folder that train printed.")
    return load_config(run / CONFIG, None, overrides, flags)


def new_folder(config: Config, out: Path | None) -> Path:
    """The folder of a new run; runs/DATE-TIME-PRESET by default. Raises ConfigError where a run already is."""
    if out is None:
        first = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.preset}"
        others = (first.with_name(f"{first.name}-{number}") for number in range(2, 1000))
        return next(path for path in (first, *others) if not path.exists())
    if out.is_file():
        raise ConfigError(f"--out {out} is a file; give the name of a folder.")
    if (out / METRICS).exists() or (out / CONFIG).exists():
        raise ConfigError(f"--out {out} already holds a run. Continue it with --resume {out}, or give another folder.")
    return out


def _fit(config: Config, folder: Path, observer: Observer, resume: bool) -> dict[str, Any]:
    from ris_fast.training.loop import Trainer

    try:
        return Trainer(config, folder, observer, resume=resume).fit()
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        problem = str(error).splitlines()[0]
    raise OutOfMemory(f"out of memory with {config.training.batch_size} scenes a micro-batch: {problem}\n"
                      f"{_smaller_batch(config)}")


def _is_memory(error: BaseException) -> bool:
    """torch names it OutOfMemoryError on a GPU; its CPU allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)


def _observers(config: Config, folder: Path, console: Observer) -> Observers:
    observers: list[Observer] = [RunFolder(folder, config), JsonlReport(folder), console]
    if config.report.plots:
        from ris_fast.report.plots import PlotReport

        observers.append(PlotReport(folder))
    return Observers(*observers)


def _how_to_resume(folder: Path) -> str:
    if (folder / "checkpoints" / "last.safetensors").is_file():
        return f"Continue with: ris-fast train --resume {folder}"
    return "No checkpoint had been saved yet."
