"""`ris-fast track`: mirrors a run that is there already in a tracker."""

from __future__ import annotations

import warnings
from pathlib import Path

from ris_fast import exit_codes
from ris_fast.commands.run_folder import run_lock
from ris_fast.config.load import load_config
from ris_fast.config.schema import ConfigError
from ris_fast.config.spelling import words
from ris_fast.files import CONFIG, METRICS, SUMMARY
from ris_fast.old_names import OldNameWarning
from ris_fast.report.trackers import check_trackers, mirror
from ris_fast.streams import stage


def track_command(run: Path, to: str) -> int:
    """Mirrors the run in each of the trackers `to`, anew."""
    if not any((run / name).is_file() for name in (METRICS, SUMMARY)):
        raise ConfigError(f"track: {run} is not a run folder: it has no {METRICS}. Give the folder that train printed.")
    if not words(to):
        raise ConfigError("track: --to is empty. Give tensorboard, trackio or wandb.")
    check_trackers(to)
    config = load_config(run / CONFIG) if (run / CONFIG).is_file() else None
    with run_lock(run), warnings.catch_warnings():
        warnings.simplefilter("ignore", OldNameWarning)
        for name in words(to):
            stage(f"mirroring in {name}")
            print(f"{name}: {mirror(run, name, config):,} rows of {run}")
    return exit_codes.DONE
