"""`ris-fast evaluate`: NMSE of a trained run on its test scenes, beside the baselines and the MMSE bound."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_fast import exit_codes
from ris_fast.commands.scene_figures import by_count, by_snr, group_figures, scene_figures
from ris_fast.commands.suspect_scenes import training_scenes, wrong_targets
from ris_fast.config.schema import ConfigError, Task
from ris_fast.data.errors import DataError
from ris_fast.data.open_source import open_source
from ris_fast.data.source import SceneSource
from ris_fast.inference.opened_run import OpenedRun, open_run
from ris_fast.report.console import counter
from ris_fast.report.evaluation import evaluation_text, save_evaluation
from ris_fast.report.eventlog import dumps
from ris_fast.streams import stage
from ris_fast.training.compiled_model import choose_device

SETTINGS_ADVICE = re.compile(r"--set|--preset|\btask\.|settings")  # what a run that is being evaluated cannot be given


class EvaluationError(ValueError):
    """An evaluation without a figure; the message says where it is lost. Exit code 3."""

    exit_code = exit_codes.DATA


def evaluate_command(run: Path, *, scenes: int | None, device: str, data: str | None, json: bool) -> int:
    """Prints the evaluation and leaves it, with a figure, in the run folder."""
    stage("opening the run and its test scenes")
    result = evaluate(run, scenes, device, data, counter("scenes read"))
    print(dumps(result, indent=2) if json else evaluation_text(result))
    figure = save_evaluation(result)  # after printing: a folder that cannot be written costs no figure
    if not json:
        print(f"\nfigure: {figure}")
    return exit_codes.DONE


def evaluate(
    run: str | Path,
    scenes: int | None = None,
    device: str = "auto",
    data: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """NMSE of a run's weights on its test scenes, in float32 and evaluation mode.

    Args: run: run folder or its checkpoints folder, whose best checkpoint is meant, or a checkpoint.
        scenes: how many test scenes; all by default.
        data: folder of another data set of the same task, or of the run's own where it was moved.
        progress: called with (scenes read, scenes in all) while data files are read.
    Returns: plain numbers and texts: `nmse` (mean, median), `baselines`, `mmse_bound` (None for another task than
        RIS-12x12, and for fewer than FEW scenes), and the same for each group of `by_snr` and `by_count`, see
        `group_figures`; `notes` for a person.
    Raises: ConfigError where there is no run or too few scenes, CheckpointError, DataError; EvaluationError where the
        network's answers are not finite.
    """
    opened = open_run(run) if data is None else _with_data(open_run(run), data)
    config, on = opened.config, choose_device(device)
    source = _test_scenes(opened, on, progress)
    size = _test_size(source, scenes)
    model = opened.network()
    began = time.monotonic()
    figures = scene_figures(model.to(on), config.task, source, size)
    _refuse_nonfinite(figures["network"], opened)
    seconds = time.monotonic() - began
    standard = config.task == Task()
    return {
        "run": str(opened.folder),
        "model": config.model.name,
        "checkpoint": opened.checkpoint,
        "weights": opened.kind,
        "notes": [*opened.notes, *training_scenes(source, size), *wrong_targets(source, config.task, size)],
        "standard": standard,
        "epoch": opened.epoch,
        "parameters": sum(each.numel() for each in model.parameters()),
        "device": str(on),
        "source": source.describe(),
        "scenes": size,
        "seconds": seconds,
        **group_figures(figures, standard),
        "by_snr": by_snr(figures, standard),
        "by_count": by_count(figures, standard),
    }


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
