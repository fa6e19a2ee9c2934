"""The study of a tuning: where its trials are kept, how the next one is chosen, and what they say. Optuna is imported
when a study is opened."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

from ris_fast.config.load import plain_settings
from ris_fast.config.schema import Config, ConfigError
from ris_fast.files import make_folder, writing
from ris_fast.report.tables import text_table
from ris_fast.tuning.pruning import PARTS, behind
from ris_fast.tuning.space import Space

STARTUP = 10  # trials with random settings, before those that are left say where to look
COMPARED_WITH = 4  # whole trials, before any other is ended early
GRACE = 0.2  # of the budget, in which none is
FREE = ("training.device", "training.compile", "training.capture", "training.seed", "report.", "health.")  # may differ
FEWEST = 4  # whole trials from which importances are computed
ENDED, FOLDER = "ended", "folder"  # of a trial: why it ended otherwise than by itself; its run folder


def check_optuna() -> None:
    """Raises: ConfigError where Optuna is not installed."""
    if find_spec("optuna") is None:
        raise ConfigError("tune: Optuna is not installed. Run pip install 'ris-fast[tune]'.")


def open_study(storage: str, name: str, seed: int, config: Config, space: Space, *, prune: bool = True) -> Any:
    """The study of this name, new or as its trials have left it.

    Args: storage: a journal file, which any number of processes and machines may share, NFS too, or a database's URL;
        config, space: what its trials have in common, which must be that of the trials that are there.
    Raises: ConfigError for a storage that cannot be used, or a study of other settings.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with quiet():
        study = optuna.create_study(
            storage=_storage(storage),
            study_name=name,
            sampler=seeded_sampler(seed),
            pruner=median_pruner() if prune else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
    _same(study, f"study '{name}' in {storage}", {"settings": _common(config, space), "space": _plain(space)})
    return study


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings of what is experimental in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _storage(storage: str) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if "://" not in storage:
        make_folder(Path(storage).parent)
        with writing(storage):
            return optuna.storages.JournalStorage(JournalFileBackend(storage))
    try:
        return optuna.storages.get_storage(storage)
    except Exception as error:  # of SQLAlchemy, of a driver that is missing, of the server
        raise ConfigError(f"tune: --storage {storage} cannot be opened: {str(error).splitlines()[0]}") from error


def median_pruner() -> Any:
    """Ends a trial that is behind the median of the whole ones; see `behind`."""
    import optuna

    class MedianByBudget(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            whole = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
            others = (each.intermediate_values for each in whole)
            return behind(trial.intermediate_values, others, grace=math.ceil(GRACE * PARTS), fewest=COMPARED_WITH)

    return MedianByBudget()


def seeded_sampler(seed: int) -> Any:
    """TPE over all settings at once, whose draws for a trial depend on the seed, the trial's number and the trials
    before it: processes that share a study and a seed do not draw the same settings."""
    import optuna

    class SeededByTrial(optuna.samplers.BaseSampler):
        def __init__(self) -> None:
            self.inner = self._sampler(0)

        def _sampler(self, number: int) -> Any:
            mixed = (seed * 1_000_003 + number) % 2**32
            with quiet():
                return optuna.samplers.TPESampler(
                    seed=mixed, n_startup_trials=STARTUP, multivariate=True, group=True, constant_liar=True
                )

        def before_trial(self, study: Any, trial: Any) -> None:
            self.inner = self._sampler(trial.number)
            self.inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self.inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self.inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self.inner.sample_independent(study, trial, param_name, param_distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self.inner.after_trial(study, trial, state, values)

    return SeededByTrial()


def _common(config: Config, space: Space) -> dict[str, Any]:
    return {
        key: value for key, value in plain_settings(config).items() if key not in space and not key.startswith(FREE)
    }


def _plain(space: Space) -> dict[str, Any]:
    return {key: {**asdict(each), "choices": list(each.choices)} for key, each in space.items()}


def _same(study: Any, what: str, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Records what the trials have in common, or compares it. Raises: ConfigError."""
    for name, values in expected.items():
        recorded = study.user_attrs.get(name)
        if recorded is None:
            study.set_user_attr(name, values)
        elif differ := [key for key in {**recorded, **values} if recorded.get(key) != values.get(key)]:
            shown = ", ".join(f"{key} = {values.get(key)!r}, not {recorded.get(key)!r}" for key in differ[:4])
            raise ConfigError(
                f"tune: {what} has trials of other {name} ({shown}), which cannot be compared with new ones. Give the"
                " same settings, or another name with --study."
            )


def release_dead(study: Any, dead: Callable[[str], bool]) -> list[int]:
    """Marks trials that no process trains any more as failed. Args: dead: whether none holds this run folder. Returns:
    their numbers."""
    import optuna

    found = []
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        folder = trial.user_attrs.get(FOLDER)
        if folder is not None and dead(folder):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            found.append(trial.number)
    return found


def best_trial(study: Any) -> Any:
    """The whole trial with the lowest NMSE; None where there is none."""
    whole = [each for each in study.get_trials(deepcopy=False) if each.state.name == "COMPLETE"]
    return min(whole, key=lambda each: each.value, default=None)


def importances(study: Any) -> dict[str, float]:
    """Share of each setting in what separates the best trials from the others (PED-ANOVA); empty where too few trials
    are whole, or all are alike."""
    import optuna

    whole = [each for each in study.get_trials(deepcopy=False) if each.state.name == "COMPLETE"]
    if len(whole) < FEWEST or len({each.value for each in whole}) < 2:
        return {}
    with quiet():
        try:
            found = optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
        except (ValueError, RuntimeError, ZeroDivisionError):  # settings that did not vary among the whole trials
            return {}
    return {key: float(value) for key, value in found.items()} if all(map(math.isfinite, found.values())) else {}


def trial_rows(study: Any, space: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows of a table of all trials."""
    rows = [
        [
            trial.number,
            trial.state.name.lower(),
            trial.value if trial.state.name == "COMPLETE" else _last(trial),
            trial.user_attrs.get("epochs"),
            trial.user_attrs.get("seconds"),
            *(trial.params.get(key) for key in space),
            trial.user_attrs.get(ENDED, "its process was killed" if trial.state.name == "FAIL" else ""),
        ]
        for trial in study.get_trials(deepcopy=False)
    ]
    return ["trial", "state", "nmse", "epochs", "seconds", *space, ENDED], rows


def trials_text(study: Any, space: Sequence[str]) -> str:
    """All trials, and what the settings are worth."""
    heads, rows = trial_rows(study, space)
    short = [*heads[:5], *(key.rpartition(".")[2] for key in space), ENDED]
    worth = importances(study)
    said = ", ".join(f"{key} {value:.0%}" for key, value in sorted(worth.items(), key=lambda item: -item[1]))
    none = f"not computed: fewer than {FEWEST} whole trials, or none that differ"
    rows = [[*row[:-1], shorten(row[-1], 60, placeholder=" ...")] for row in rows]
    return f"{text_table(short, rows)}\n\nimportance of the settings: {said or none}"


def trials_csv(study: Any, space: Sequence[str]) -> str:
    heads, rows = trial_rows(study, space)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    return text.getvalue()


def _last(trial: Any) -> float | None:
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None
