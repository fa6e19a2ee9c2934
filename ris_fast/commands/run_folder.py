"""The folder of a run: made for one run only, held by one process, and found again to continue."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ris_fast.config.load import load_config, render_toml
from ris_fast.config.schema import Config, ConfigError
from ris_fast.files import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    LAST,
    METRICS,
    SUMMARY,
    StorageError,
    locked,
    make_folder,
    read_text,
    remove_leftovers,
    write_text,
    writing,
)
from ris_fast.inference.opened_run import changed_settings, run_config
from ris_fast.old_names import current_origin
from ris_fast.report.eventlog import write_json
from ris_fast.training.callback import Callback
from ris_fast.training.checkpoint import read_settings

RUNS, ENVIRONMENT = "runs", "env.json"


class RunFolder(Callback):
    """Writes what a run was started with, once it has really started: config.toml and env.json."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config

    def on_train_start(self, info: dict[str, Any]) -> None:
        from ris_fast.environment import environment

        write_text(self.folder / CONFIG, render_toml(self.config))
        write_json(self.folder / ENVIRONMENT, environment())


def new_folder(config: Config, out: Path | None) -> Path:
    """Makes the folder of a new run; runs/DATE-TIME-PRESET by default. Raises ConfigError where a run already is."""
    if out is None:
        first = Path(RUNS) / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.preset}"
        others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
        return next(path for path in itertools.chain([first], others) if _made(path))
    if os.path.lexists(out) and not os.path.isdir(out):
        what = "a link that leads nowhere" if out.is_symlink() else "a file"
        raise ConfigError(f"--out {out} is {what}; give the name of a folder.")
    with writing(out):
        held = any((out / name).exists() for name in (METRICS, CONFIG)) and not refused_only(out)
    if held:
        raise ConfigError(
            f"--out {out} already holds a run. Continue it with --resume {shlex.quote(str(out))}, or give another"
            " folder."
        )
    _made(out)
    return out


def refused_only(folder: Path) -> bool:
    """Whether nothing but a preflight that refused a run has happened in the folder: not a step, not a checkpoint."""
    if (folder / METRICS).exists() or (folder / CHECKPOINTS).exists() or not (folder / SUMMARY).is_file():
        return False
    try:
        summary = json.loads(read_text(folder / SUMMARY))
        return summary["verdict"] == "stopped" and summary["optimizer_steps"] == 0 and bool(summary["findings"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def forget_refused(folder: Path) -> None:
    """Removes what a refused preflight left, so that the run that begins now is the folder's only one."""
    if refused_only(folder):
        with writing(folder):
            for name in (SUMMARY, CONFIG, ENVIRONMENT):
                (folder / name).unlink(missing_ok=True)


def _made(folder: Path) -> bool:
    """Whether this call made the folder: of two runs that ask for the same one, one did."""
    make_folder(folder.parent)
    try:
        folder.mkdir()
        return True
    except FileExistsError:
        return False
    except OSError as error:
        raise StorageError(folder, error) from error


def drop_if_empty(folder: Path) -> None:
    """A run that never began leaves no folder of its own."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        if folder.parent == Path(RUNS):
            folder.parent.rmdir()


def _enter(held: ExitStack, folder: Path, deadline: float) -> None:
    """Takes the lock, once another process lets go of it. Raises BlockingIOError where none does until then."""
    while True:
        try:
            return held.enter_context(locked(folder))
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)


@contextlib.contextmanager
def run_lock(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Keeps two processes from writing one run, and removes what an earlier one was killed in writing. Raises
    ConfigError.

    Args: wait: seconds in which another process may let go of it.
    """
    with ExitStack() as held:
        deadline = time.monotonic() + wait
        try:
            _enter(held, folder, deadline)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process is training this run. Wait for it or stop it.") from None
        except OSError as error:
            raise ConfigError(
                f"{folder} is no folder that can be read: {error.strerror}. Give the folder of a run."
            ) from error
        remove_leftovers(folder)
        yield


def resumed_config(run: Path, refused: Mapping[str, Any], overrides: Iterable[str], flags: Mapping[str, Any]) -> Config:
    """The settings of the run in `run`, with --set and flags on top. Raises ConfigError for a folder without a run."""
    extra = [name for name, value in refused.items() if value is not None]
    if extra:
        raise ConfigError(f"--resume continues {run} with its own settings and folder. Leave {', '.join(extra)} away.")
    folder, checkpoint = run_and_checkpoint(run)
    file = folder / CONFIG
    if not file.is_file() and not _written_anew(file, checkpoint):
        raise ConfigError(
            f"--resume {run}: there is no {CONFIG}: not a run folder, or a run that ended before it had saved anything."
            " Give the folder that train printed, or start anew."
        )
    config = _read_config(file, checkpoint, overrides, flags)
    for changed in changed_settings(folder, checkpoint, config):
        print(f"note: {changed}")
    recorded = recorded_provenance(read_text(file))
    return replace(
        config,
        provenance={
            key: recorded.get(key, origin) if origin == str(file) else origin
            for key, origin in config.provenance.items()
        },
    )


def _written_anew(file: Path, checkpoint: str) -> bool:
    """Whether a lost config.toml could be written from the settings that the checkpoint was trained with."""
    found = read_settings(file.parent / CHECKPOINTS, checkpoint)
    if found is None:
        return False
    preset, settings = found
    write_text(file, render_toml(load_config(None, preset, (), settings)))
    print(f"note: {file} is missing: written anew from the settings in checkpoint '{checkpoint}'")
    return True


def _read_config(file: Path, checkpoint: str, overrides: Iterable[str], flags: Mapping[str, Any]) -> Config:
    """The settings in a run's config.toml, with those on top. Raises ConfigError, which names the file where that is
    what cannot be used, and says how to continue without it."""
    try:
        return run_config(file.parent, overrides, flags)
    except ConfigError as error:
        try:
            load_config(file)
        except ConfigError as of_file:
            said = str(of_file) if str(file) in str(of_file) else f"{file}: {of_file}"
            if read_settings(file.parent / CHECKPOINTS, checkpoint) is not None:
                said += f" Or remove {file}: --resume then writes it anew from checkpoint '{checkpoint}'."
            raise ConfigError(said) from error
        raise


def run_and_checkpoint(place: Path) -> tuple[Path, str]:
    """The run folder and the name of the checkpoint that `--resume PLACE` means: the last one, or the file given.

    The name is empty where the run ended before its first checkpoint: it begins anew then.
    """
    if place.suffix == ".safetensors":
        return place.parent.parent, place.stem
    there = (name for name in (LAST, BEST) if (place / CHECKPOINTS / f"{name}.safetensors").is_file())
    return place, next(there, "")


def recorded_provenance(text: str) -> dict[str, str]:
    """'section.key' -> where its value came from, as the comments of a run's config.toml say."""
    found, section = {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif " = " in line and "  # " in line:
            found[f"{section}.{line.partition(' = ')[0]}"] = current_origin(line.rpartition("  # ")[2])
    return found


def how_to_resume(folder: Path) -> str:
    if run_and_checkpoint(folder)[1]:
        return f"Continue with: ris-fast train --resume {shlex.quote(str(folder))}"
    return "No checkpoint had been saved yet."
