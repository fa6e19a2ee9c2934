"""`ris-fast evaluate`: NMSE and positions of trained runs on their test scenes, beside baselines and bounds."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ris_fast import exit_codes
from ris_fast.commands.comparison import comparison_notes, run_names
from ris_fast.commands.estimators import method_words, network_estimator, opponents
from ris_fast.commands.position_figures import (
    example_scene,
    find_sources,
    first_scene,
    missing_for_positions,
    position_figures,
)
from ris_fast.commands.runner import writing_results
from ris_fast.commands.scene_figures import Grouped, scene_figures, training_mean
from ris_fast.commands.suspect_scenes import training_scenes, wrong_targets
from ris_fast.config.schema import ConfigError, Task
from ris_fast.config.user_code import short_reference
from ris_fast.data.errors import DataError
from ris_fast.data.open_source import open_source
from ris_fast.data.source import SceneSource
from ris_fast.files import check_writable
from ris_fast.inference.locating import choose_count, choose_method
from ris_fast.inference.opened_run import OpenedRun, open_run
from ris_fast.inference.predictor import Predictor
from ris_fast.localize.metrics import Scores
from ris_fast.report.console import counter
from ris_fast.report.evaluation import COMPARISON, comparison_text, evaluation_text, save_figures, save_record
from ris_fast.report.evaluation_csv import write_csv
from ris_fast.report.eventlog import dumps, write_json
from ris_fast.report.scene_plot import Example
from ris_fast.streams import stage
from ris_fast.training.compiled_model import choose_device

SETTINGS_ADVICE = re.compile(r"--set|--preset|\btask\.|settings")  # what a run that is being evaluated cannot be given

Progress = Callable[[str, int, int], None]  # what is counted, how many are done, of how many


class EvaluationError(ValueError):
    """An evaluation without a figure; the message says where it is lost. Exit code 3."""

    exit_code = exit_codes.DATA


@dataclass(frozen=True)
class Search:
    """How the sources of a scene are found, see `Predictor.predict`; None: the best that the data allow."""

    method: str | None = None
    count: int | str | None = None
    opponents: bool = False  # classical estimators on the same scenes


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns, and what figures need beside it."""

    result: dict[str, Any]
    scores: dict[str, Scores]  # by estimator; empty where no positions are scored
    example: Example | None
    task: Task
    scenes: tuple[Tensor, Tensor]  # number of sources and SNR in dB of each test scene


def evaluate_command(
    runs: Sequence[Path],
    *,
    scenes: int | None,
    device: str,
    data: str | None,
    json: bool,
    csv: Path | None,
    search: Search | None,
    plots: Path | None,
) -> int:
    """Prints the evaluation of one run, or of several side by side; leaves records in their folders, and figures.

    Several runs with `plots` leave everything in that folder.
    """
    names = run_names(runs)
    if csv is not None and csv.suffix.lower() != ".csv":  # it could be a checkpoint or somebody's measurements
        raise ConfigError(f"evaluate: --csv {csv}: expected a name that ends in .csv.")
    for path in (csv, plots and plots / COMPARISON):
        if path is not None:
            check_writable(path)
    stage("opening the run and its test scenes")
    progress = _Bars()
    done = {name: evaluate_run(run, scenes, device, data, progress, search) for name, run in zip(names, runs)}
    results = {name: each.result for name, each in done.items()}
    first, *others = done.values()
    notes = comparison_notes(done)
    together = {"notes": notes, "runs": list(results.values())}
    if json:
        print(dumps(together if others else first.result, indent=2))
    else:
        print(comparison_text(results, notes) if others else evaluation_text(first.result))
    scores = {name: next(iter(each.scores.values())) for name, each in done.items() if each.scores}
    folder = Path(first.result["run"]) / "plots" if plots is None else plots
    with writing_results():  # after printing: a folder that cannot be written costs no figure
        if others and plots is not None:
            write_json(plots / COMPARISON, together)
        else:
            for result in results.values():
                save_record(result)
        if csv is not None:
            write_csv(csv, results)
        saved = save_figures(results, scores if others else first.scores, None if others else first.example, folder)
    if not json:
        print("\nfigures, and a .pdf of each: " + ", ".join(map(str, saved.values())))
    return exit_codes.DONE


class _Bars:
    """A progress bar for each thing that is counted."""

    def __init__(self) -> None:
        self.what, self.show = "", counter("")

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.what or done <= 1:
            self.what, self.show = what, counter(what)
        self.show(done, total)


def evaluate(
    run: str | Path,
    scenes: int | None = None,
    device: str = "auto",
    data: str | None = None,
    progress: Progress | None = None,
    search: Search | None = None,
) -> dict[str, Any]:
    """NMSE and positions of a run's weights on its test scenes, in float32 and evaluation mode.

    Args: run: run folder or its checkpoints folder, whose best checkpoint is meant, or a checkpoint.
        scenes: how many test scenes; all by default.
        data: folder of another data set of the same task, or of the run's own where it was moved.
        progress: called with what is counted, how many are done and how many there are.
        search: how sources are found; by default they are not.
    Returns: plain numbers and texts: `nmse` (mean, median), `nmse_interval`, `baselines`, `mmse_bound` (None for
        another task than RIS-12x12, and for fewer than FEW scenes), the same for each group of `by_snr`, `by_count` and
        `by_snr_and_count`, see `Grouped`; `positions`, see `position_figures`, or None; `notes` for a person.
    Raises: ConfigError where there is no run or too few scenes, CheckpointError, DataError; EvaluationError where the
        network's answers are not finite.
    """
    return evaluate_run(run, scenes, device, data, progress, search).result


def evaluate_run(
    run: str | Path,
    scenes: int | None,
    device: str,
    data: str | None,
    progress: Progress | None,
    search: Search | None,
) -> Evaluation:
    """`evaluate`, with the scores of single sources."""
    opened = open_run(run) if data is None else _with_data(open_run(run), data)
    config, on = opened.config, choose_device(device)
    source = _test_scenes(opened, on, progress and (lambda *counts: progress("scenes read", *counts)))
    size = _test_size(source, scenes)
    model = opened.network().to(on)
    began = time.monotonic()
    constant = training_mean(source)
    figures = scene_figures(model, config.task, source, size, constant)
    _refuse_nonfinite(figures["network"], opened)
    seconds = time.monotonic() - began
    positions = _positions(model, config.task, source, size, constant, progress, search)
    figures |= positions.nmse
    standard = config.task == Task()
    grouped = Grouped(figures, standard)
    notes = [*opened.notes, *training_scenes(source, size), *wrong_targets(source, config.task, size), *positions.notes]
    result = {
        "run": str(opened.folder),
        "model": short_reference(config.model.name),
        "checkpoint": opened.checkpoint,
        "weights": opened.kind,
        "notes": notes,
        "standard": standard,
        "epoch": opened.epoch,
        "parameters": sum(each.numel() for each in model.parameters()),
        "device": str(on),
        "source": source.describe(),
        "seconds": seconds,
        **grouped.group(),
        "by_snr": grouped.by("snr_db"),
        "by_count": grouped.by("sources"),
        "by_snr_and_count": grouped.by("snr_db", "sources"),
        "positions": positions.figures,
    }
    return Evaluation(result, positions.scores, positions.example, config.task, (figures["count"], figures["snr_db"]))


class _Positions(NamedTuple):
    figures: dict[str, Any] | None
    scores: dict[str, Scores]
    example: Example | None
    nmse: dict[str, Tensor]  # (B,) of the classical estimators
    notes: list[str]  # why there are none


def _positions(
    model: nn.Module,
    task: Task,
    source: SceneSource,
    size: int,
    constant: Tensor,
    progress: Progress | None,
    search: Search | None,
) -> _Positions:
    if search is None:
        return _Positions(None, {}, None, {}, [])
    scene = first_scene(source)
    missing = missing_for_positions(scene, search.opponents)
    if scene.azimuth is None:
        return _Positions(None, {}, None, {}, missing)
    method = choose_method(search.method, scene.channel is not None)
    count = choose_count(search.count, method, task)
    estimators = {"network": network_estimator(Predictor(model, task, products=scene.channel is None), method, count)}
    if search.opponents and scene.channel is not None:
        estimators |= opponents(task)
    shown = progress and (lambda *counts: progress("scenes located", *counts))
    found = find_sources(estimators, task, source, size, constant, shown)
    figures, scores = position_figures(found, method_words(method, count))
    nmse = {name: each for name, each in found.nmse.items() if name != "network"}
    return _Positions(figures, scores, example_scene(model, task, source, found), nmse, missing)


def _with_data(run: OpenedRun, data: str) -> OpenedRun:
    return replace(run, config=replace(run.config, data=replace(run.config.data, source="auto", path=data)))


def _test_scenes(run: OpenedRun, device: torch.device, progress: Callable[[int, int], None] | None) -> SceneSource:
    """The run's data. Raises: DataError whose advice `evaluate` can follow: a trained network has its task for good."""
    try:
        return open_source(run.config, device, progress)
    except DataError as error:
        if not SETTINGS_ADVICE.search(error.todo):
            raise
        file = shlex.quote(str(run.folder / "config.toml"))
        raise DataError(
            error.where,
            error.key,
            error.found,
            error.expected,
            "The network was trained for the task of its run. "
            f"Write scenes of it: ris-fast simulate {file} --out DIR --scenes 1000, and give --data DIR.",
        ) from None


def _refuse_nonfinite(nmse: Tensor, run: OpenedRun) -> None:
    """Raises EvaluationError where the network's answer to a scene is not finite."""
    lost = (~nmse.isfinite()).nonzero().flatten()
    if not len(lost):
        return
    weights = run.nonfinite_weights()
    why = f"its weights are not, first '{weights[0]}'" if weights else "its weights are"
    raise EvaluationError(
        f"{run.folder}, checkpoint '{run.checkpoint}': the network's answer is not finite for {len(lost)} of"
        f" {nmse.numel()} test scenes, first scene {int(lost[0])}; {why}. There is no mean NMSE. Evaluate another"
        " checkpoint of this run."
    )


def _test_size(source: SceneSource, scenes: int | None) -> int:
    have = source.size("test")
    if have == 0:
        raise ConfigError(f"evaluate: there are no test scenes ({source.describe()}). Add a test split to the data.")
    wanted = have if scenes is None else scenes
    if not 1 <= wanted <= have:
        raise ConfigError(f"evaluate: {wanted} test scenes asked for; this run has {have}. Give --scenes 1 to {have}.")
    return wanted
