"""Flags and help of the commands about several runs and about trackers: `compare`, `track`, `tune`; see cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ris_fast.commands.flags import Device, NoCompile, Preset, Settings, Whole, run_flags
from ris_fast.streams import stage


def compare(
    run: Path,
    /,
    *others: Path,
    reach: Annotated[list[float] | None, Parameter(consume_multiple=False)] = None,
    json: bool = False,
    csv: Path | None = None,
    out: Path | None = None,
) -> int:
    """Table and figure of several runs: validation and test NMSE, scenes to reach one, speed, settings that differ;
    runs that differ in their seeds alone are one group with mean and spread.

    Parameters
    ----------
    run
        Run folder.
    others
        More runs, finished or not.
    reach
        Tell the scenes that each run took to this validation NMSE; may be given again. By default three round figures.
    json
        Print JSON instead of tables.
    csv
        Write a table with a row for each run.
    out
        Write comparison.json and comparison.png into this folder.
    """
    stage("reading the runs")
    from ris_fast.commands.compare import compare_command

    return compare_command((run, *others), reach=reach or (), json=json, csv=csv, out=out)


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


def tune(
    config: Path | None = None,
    /,
    *,
    preset: Preset = None,
    device: Device = None,
    data: Path | None = None,
    trials: Whole = 20,
    seconds_per_trial: float | None = None,
    epochs: Whole = None,
    seed: Whole = 0,
    study: str | None = None,
    storage: str | None = None,
    out: Path | None = None,
    no_pruning: bool = False,
    no_compile: NoCompile = False,
    set_: Settings = None,
    print_space: bool = False,
) -> int:
    """Search for better settings with Optuna: trials, each a run folder, of which those that are behind are ended
    early.

    Parameters
    ----------
    config
        TOML file with settings, and perhaps a [tune] table with the space; see --print-space.
    data
        Folder of shards; without it scenes are simulated.
    trials
        Trials to run now; 20 by default. A study that is there already goes on.
    seconds_per_trial
        Anneal each trial towards this many seconds; by default what the settings say of training.max_seconds.
    epochs
        Epochs of each trial, within those seconds.
    seed
        Seed of the choice of settings; that of the trials' weights is --set training.seed=N.
    study
        Name of the study; tune by default.
    storage
        Journal file that several processes and machines may share, on NFS too, or a database's URL as Optuna takes
        one; study.log in the folder by default.
    out
        Folder of the trials, best.toml and trials.csv; runs/DATE-TIME-tune by default, the same one to go on.
    no_pruning
        Train every trial to its end.
    print_space
        Print the space as TOML, and stop.
    """
    stage("loading torch")
    from ris_fast.commands.tune import tune_command

    flags = {
        **run_flags(device, data, None, no_compile),
        "training.max_seconds": seconds_per_trial,
        "training.epochs": epochs,
    }
    return tune_command(
        config,
        preset,
        set_ or (),
        flags,
        trials=20 if trials is None else trials,
        seed=seed or 0,
        study=study,
        storage=storage,
        out=out,
        prune=not no_pruning,
        print_space=print_space,
    )
