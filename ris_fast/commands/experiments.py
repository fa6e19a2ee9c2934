"""Flags and help of the commands about several runs and about trackers: `compare`, `track`, `tune`; see cli.py."""

from __future__ import annotations

from pathlib import Path

from ris_fast.streams import stage


def track(run: Path, /, *, to: str) -> int:
    """Mirror a run that is there already in TensorBoard, Trackio or W&B, as a new run there.

    Parameters
    ----------
    run
        Run folder. To mirror a run while it trains: train --set report.tracker=NAME.
    to
        tensorboard, trackio or wandb; several with commas between them.
    """
    stage("reading the run")
    from ris_fast.commands.track import track_command

    return track_command(run, to)
