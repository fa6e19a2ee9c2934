"""`ris-fast tune`: trains one trial after another with settings that a study chooses, each a run folder of its own."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ris_fast import exit_codes
from ris_fast.commands.run_folder import RUNS, run_lock
from ris_fast.commands.train import fit_in_folder
from ris_fast.config.load import load_config, read_toml, render_toml
from ris_fast.config.schema import Config, ConfigError, Task
from ris_fast.files import StorageError, check_writable, locked, make_folder, write_text
from ris_fast.report.console import ConsoleReport
from ris_fast.report.trackers import check_trackers
from ris_fast.streams import stage
from ris_fast.training.batch_size import is_memory
from ris_fast.training.state import RunStopped
from ris_fast.tuning.pruning import Pruning, TrialPruned
from ris_fast.tuning.space import Space, default_space, read_space, space_toml
from ris_fast.tuning.study import (
    ENDED,
    FOLDER,
    best_trial,
    check_optuna,
    open_study,
    release_dead,
    trials_csv,
    trials_text,
)

JOURNAL, BEST, TABLE, OUTPUT = "study.log", "best.toml", "trials.csv", "output.txt"
STUDY = "tune"  # its name where none is given
HOPELESS = 3  # trials in a row whose settings are refused, with none that ran: the space is wrong


Load = Callable[[Mapping[str, Any]], Config]


def tune_command(
    config: Path | None,
    preset: str | None,
    overrides: Sequence[str],
    flags: Mapping[str, Any],
    *,
    trials: int,
    seed: int,
    study: str | None,
    storage: str | None,
    out: Path | None,
    prune: bool,
    print_space: bool,
) -> int:
    """Runs trials and prints their table. Exit code 0 where one of the study's trials is whole, 4 where none is, 130
    after Ctrl-C."""

    def load(params: Mapping[str, Any]) -> Config:
        return load_config(config, preset, overrides, {**flags, **params})

    space = study_space(config, load)
    if print_space:
        print(space_toml(space), end="")
        return exit_codes.DONE
    if trials < 1:
        raise ConfigError(f"tune: --trials {trials} asked for. Give --trials 1 or more.")
    check_optuna()
    base = load({})
    check_trackers(base.report.tracker)
    folder = out or Path(RUNS) / f"{time.strftime('%Y%m%d-%H%M%S')}-tune"
    check_writable(folder / TABLE)
    make_folder(folder)
    where, name = storage or str(folder / JOURNAL), study or STUDY
    stage("opening the study")
    found = open_study(where, name, seed, base, space, prune=prune)
    for number in release_dead(found, _nobody_trains):
        print(f"note: trial {number} was under way when its process was killed; it counts as failed")
    tuning = Tuning(load, space, folder, prune=prune)
    budget = f"{base.training.max_seconds:g} s" if base.training.max_seconds else f"{base.training.epochs} epochs"
    print(
        f"study '{name}' in {where}: {len(found.get_trials(deepcopy=False))} trials, {trials} more, {budget} each,"
        f" over {', '.join(space)}",
        flush=True,
    )
    code = exit_codes.DONE
    try:
        for _ in range(trials):
            tuning.trial(found)
    except KeyboardInterrupt:
        code = exit_codes.INTERRUPTED
        print(f"ris-fast: interrupted. The same command with --out {folder} goes on with the study", file=sys.stderr)
    print(f"\n{trials_text(found, list(space))}\n")
    best = best_trial(found)
    if best is None:
        print("no trial has come to its end; ris-fast why TRIAL says more of one")
        return code or exit_codes.NOT_LEARNED
    print(f"best: trial {best.number}, validation NMSE {best.value:.4g}; train it: ris-fast train {folder / BEST}")
    return code


def study_space(config: Path | None, load: Load) -> Space:
    """The [tune] table of the file with settings, or the default space of the network. Raises: ConfigError for a range
    or a choice that its setting does not take."""
    table = {} if config is None else read_toml(config)
    space = read_space(table["tune"]) if "tune" in table else default_space(load({}).model.name)
    for key, each in space.items():
        for value in each.extremes:
            try:
                load({key: value})
            except ConfigError as error:
                raise ConfigError(f"[tune] {key}: {str(error).removeprefix('flag: ')}") from error
    return space


def trial_line(study: Any, number: int, seconds: float) -> str:
    """A trial in a line: how it ended, how good it is, with which settings."""
    trial = study.get_trials(deepcopy=False)[number]
    reached = trial.value if trial.value is not None else None
    said = [
        f"trial {number}: {trial.state.name.lower()}",
        trial.user_attrs.get(ENDED, ""),
        "" if reached is None or trial.user_attrs.get(ENDED) else f"NMSE {reached:.4g}",
        f"{trial.user_attrs.get('epochs', 0)} epochs, {seconds:.0f} s",
        " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in trial.params.items()),
    ]
    return "; ".join(part for part in said if part)


def release_memory() -> None:
    """Frees a trial's network, moments and graphs before the next one; called when no error holds them any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _nobody_trains(folder: str) -> bool:
    """Whether no process of this machine holds the run; false where it is not here to be seen."""
    try:
        with locked(folder):
            return True
    except OSError:
        return False


class Tuning:
    """One process of a study: its settings, its space and its folder.

    Args: load: the configuration with these settings on top; prune: end trials that are behind.
    """

    def __init__(self, load: Load, space: Space, folder: Path, *, prune: bool) -> None:
        self.load, self.space, self.folder, self.prune = load, space, folder, prune
        self.preflight = True  # of the first trial here; the watch over a run's rows is on in all of them
        self.refused, self.ran = 0, 0

    def settings(self, params: Mapping[str, Any], origin: str) -> Config:
        """The configuration of a trial."""
        config = self.load(params)
        return replace(config, provenance={**config.provenance, **dict.fromkeys(params, origin)})

    def trial(self, study: Any) -> None:
        """Chooses, trains and records one trial. Raises what ends the study: an interrupt, a full disk, wrong data."""
        with ExitStack() as held:  # its folder, until it is recorded: another process takes a free one's trial for dead
            self._trial(study, held)

    def _trial(self, study: Any, held: ExitStack) -> None:
        from optuna.trial import TrialState

        trial, began = study.ask(), time.monotonic()
        state, value, ended, raised = TrialState.FAIL, None, "", None
        try:
            params = {key: each.suggest(trial) for key, each in self.space.items()}
            value = self._train(trial, f"{study.study_name}-{trial.number:04d}", params, held)
            state, ended = (TrialState.PRUNED, "no finite validation") if value is None else (TrialState.COMPLETE, "")
        except TrialPruned as error:
            state, ended = TrialState.PRUNED, str(error)
        except RunStopped as error:  # worse than any that ran: the study should look elsewhere
            state, ended = TrialState.PRUNED, error.finding
        except ConfigError as error:
            ended = str(error)
            self.refused += 1
            raised = error if self.refused >= HOPELESS and not self.ran else None
        except (MemoryError, RuntimeError) as error:
            ended = "out of memory" if is_memory(error) else str(error)
            state, raised = (TrialState.PRUNED, None) if is_memory(error) else (state, error)
        except BaseException as error:
            ended, raised = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error), error
        release_memory()
        if ended:
            trial.set_user_attr(ENDED, ended)
        if state != TrialState.FAIL:
            self.ran += 1
        study.tell(trial, value if state == TrialState.COMPLETE else None, state=state)
        print(trial_line(study, trial.number, time.monotonic() - began), flush=True)
        self.save(study)
        if raised is not None:
            raise raised

    def _train(self, trial: Any, name: str, params: Mapping[str, Any], lock: ExitStack) -> float | None:
        """Trains a trial in its folder, which stays locked as long as `lock` is open, and where output.txt has what
        `ris-fast train` would have printed. Returns: its best validation NMSE."""
        config, folder = self.settings(params, f"trial {trial.number}"), self.folder / name
        try:
            folder.mkdir()
        except FileExistsError:
            raise StorageError(folder, FileExistsError(17, "it holds another trial")) from None
        except OSError as error:
            raise StorageError(folder, error) from error
        lock.enter_context(run_lock(folder))
        with ExitStack() as held:
            trial.set_user_attr(FOLDER, str(folder.absolute()))
            text = held.enter_context(open(folder / OUTPUT, "w", encoding="utf-8", buffering=1))
            held.enter_context(redirect_stdout(text))
            console = ConsoleReport(text, standard_task=config.task == Task(), run=folder)
            pruning = Pruning(trial, config, prune=self.prune)
            try:
                summary = fit_in_folder(config, folder, console, preflight=self.preflight, callbacks=[pruning])
            finally:
                self.preflight = False
                trial.set_user_attr("epochs", pruning.epochs)
                trial.set_user_attr("seconds", round(pruning.seconds, 1))
        best = None if summary is None else summary["best_val_nmse"]
        return None if best is None or not math.isfinite(best) else best

    def save(self, study: Any) -> None:
        """The table of all trials, and the settings of the best one."""
        write_text(self.folder / TABLE, trials_csv(study, list(self.space)))
        if (best := best_trial(study)) is not None:
            write_text(self.folder / BEST, render_toml(self.settings(best.params, f"trial {best.number}")))
