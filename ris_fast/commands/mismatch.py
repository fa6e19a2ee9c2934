"""`ris-fast mismatch`: networks trained on one task, tested on the scenes of others, in one table.

A network keeps the task of its run: the array, ranges and codes that it believes in. A test task makes the scenes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ris_fast import exit_codes
from ris_fast.commands.comparison import differences
from ris_fast.commands.flags import absolute
from ris_fast.commands.runner import writing_results
from ris_fast.commands.scene_figures import FACTS, scene_figures, training_mean
from ris_fast.config.load import load_config
from ris_fast.config.schema import Config, ConfigError, Task
from ris_fast.config.section import LARGEST_INT
from ris_fast.config.spelling import did_you_mean
from ris_fast.data.open_source import open_source
from ris_fast.files import check_writable
from ris_fast.inference.opened_run import open_run
from ris_fast.physics.mmse_bound import mmse_bound
from ris_fast.report.console import counter
from ris_fast.report.eventlog import dumps
from ris_fast.report.mismatch import RECORD, mismatch_text, save_mismatch
from ris_fast.streams import stage
from ris_fast.training.compiled_model import choose_device

SHAPES = ("bs_antennas", "snapshots")  # settings that a network's inputs have
GRID = ("ris_horizontal", "ris_vertical")  # two more, where the elements are in rows and columns


@dataclass(frozen=True)
class Trained:
    """A run's network with what it was trained for."""

    name: str
    config: Config
    model: nn.Module


def mismatch_command(
    runs: Sequence[Path],
    *,
    against: Sequence[str],
    data: Sequence[Path],
    scenes: int | None,
    device: str,
    json: bool,
    out: Path | None,
) -> int:
    """Prints the table; with `out`, leaves it there as mismatch.json and mismatch.png."""
    if scenes is not None and scenes < 1:
        raise ConfigError(f"mismatch: --scenes {scenes} asked for. Give --scenes 1 or more.")
    if out is not None:
        check_writable(out / RECORD)
    stage("opening the runs")
    result = mismatch(runs, against, data, scenes, device, counter("evaluations"))
    print(dumps(result, indent=2) if json else mismatch_text(result))
    if out is not None:
        with writing_results():
            figure = save_mismatch(result, out)
        if not json:
            print(f"\nfigure: {figure}")
    return exit_codes.DONE


def mismatch(
    runs: Sequence[str | Path],
    against: Iterable[str] = (),
    data: Iterable[str | Path] = (),
    scenes: int | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """NMSE of every run on simulated test scenes of its own task, of the other runs' tasks and of changed tasks, and on
    the test scenes of data sets.

    Args: runs: as `evaluate` takes one; against: 'task.key=value,value,...', each value a test task that differs from
        the first run's task in this; data: folders of data sets, of whatever task; scenes: test scenes of each task, at
        most those that a data set has; by default as many as the first run has. progress: called with (evaluations
        done, evaluations in all).
    Returns: `runs`, their names; `base`, the first run's task; `tests`, a list with `test` (the settings in which it
        differs from `base`), `data` (a folder or None), `scenes`, `mmse_bound` (None but for RIS-12x12) and `runs`: by
        name `nmse` (mean, median), `baselines` (means) and whether the run was `trained` on this.
    Raises: ConfigError for a run that is none, and for a task whose scenes have another shape than a run's; DataError.
    """
    on, trained = choose_device(device), [_open(name, run) for name, run in _named(runs)]
    base = trained[0].config
    tasks = dict.fromkeys([*(each.config.task for each in trained), *changed_tasks(base.task, against)])
    tests = [_simulated(base, task, scenes) for task in tasks] + [_of_files(base, path, scenes) for path in data]
    for test in tests:
        for each in trained:
            _check_shapes(each, test.task)
    rows: list[dict[str, Any]] = []
    for test in tests:
        source, cells = open_source(test, on), {}
        size = min(test.data.test_scenes, source.size("test"))
        if size < 1:
            raise ConfigError(f"mismatch: there are no test scenes ({source.describe()}). Give --scenes 1 or more.")
        constant = training_mean(source)
        for each in trained:
            figures = scene_figures(each.model.to(on).eval(), each.config.task, source, size, constant)
            same = test.task == each.config.task and test.data.path in ("", each.config.data.path)
            cells[each.name] = {"trained": same, **_cell(figures)}
            if progress is not None:
                progress(len(rows) * len(trained) + len(cells), len(tests) * len(trained))
        bound = mmse_bound(figures["count"].tolist(), figures["snr_db"].tolist()) if test.task == Task() else None
        what = {"test": differences(base.task, test.task), "data": test.data.path or None, "scenes": size}
        rows.append({**what, "mmse_bound": bound, "runs": cells})
    return {"runs": [each.name for each in trained], "base": asdict(base.task), "tests": rows}


def _simulated(base: Config, task: Task, scenes: int | None) -> Config:
    """Test scenes of a task, simulated."""
    size = base.data.test_scenes if scenes is None else scenes
    return replace(base, task=task, data=replace(base.data, source="simulate", path="", test_scenes=size))


def _of_files(base: Config, path: str | Path, scenes: int | None) -> Config:
    """Test scenes of a data set; one that does not say its task has the first run's."""
    found = load_config(None, base.preset, (), {"data.path": absolute(Path(path))})
    task = found.task if "data set" in found.provenance.values() else base.task
    return replace(_simulated(base, task, scenes), data=replace(found.data, test_scenes=scenes or LARGEST_INT))


def changed_tasks(task: Task, against: Iterable[str]) -> list[Task]:
    """The task with each of the values of 'task.key=value,value,...' in turn. Raises: ConfigError."""
    names, tasks = [item.name for item in fields(Task)], []
    for text in against:
        key, equals, values = text.partition("=")
        section, _, name = key.strip().partition(".")
        if not equals or section != "task":
            raise ConfigError(
                f"--against {text}: expected task.key=value,value,..., such as task.phase_error_deg=5,10."
            )
        if name not in names:
            raise ConfigError(f"--against {text}: [task] has no key '{name}'.{did_you_mean(name, names)}")
        tasks += [task.changed(**{name: _value(each)}) for each in values.split(",")]
    return tasks


def _value(text: str) -> Any:
    """A value as --set takes it."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _named(runs: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """Each run under the name of its folder and of the checkpoint that is given, or under its path where two would have
    one name. Raises: ConfigError."""
    paths = [Path(run) for run in runs]
    whole = [path.absolute() for path in paths]
    names = [f"{each.parent.parent.name}/{each.stem}" if each.suffix == ".safetensors" else each.name for each in whole]
    named = [(str(path) if names.count(name) > 1 else name, path) for name, path in zip(names, paths)]
    if len(dict(named)) < len(named):
        raise ConfigError(f"mismatch: a run is given twice among {', '.join(map(str, runs))}. Give each run once.")
    return named


def _open(name: str, run: Path) -> Trained:
    opened = open_run(run)
    return Trained(name, opened.config, opened.network())


def _check_shapes(run: Trained, task: Task) -> None:
    own = run.config.task
    rows = GRID if not (own.elements_file or task.elements_file) else ()
    wrong = [key for key in (*SHAPES, *rows) if getattr(task, key) != getattr(own, key)]
    if not wrong and task.elements != own.elements:
        raise ConfigError(
            f"mismatch: scenes of {task.elements} elements do not fit the network of {run.name}, which was trained with"
            f" {own.elements}. Compare runs and tasks of as many elements (task.elements_file, task.ris_horizontal,"
            " task.ris_vertical)."
        )
    if wrong:
        raise ConfigError(
            f"mismatch: scenes with {_settings(task, wrong)} do not fit the network of {run.name}, which was trained"
            f" with {_settings(run.config.task, wrong)}. Compare runs and tasks of one array and number of snapshots."
        )


def _settings(task: Task, keys: Sequence[str]) -> str:
    return ", ".join(f"task.{key} = {getattr(task, key)}" for key in keys)


def _cell(figures: dict[str, Tensor]) -> dict[str, Any]:
    nmse = figures["network"]
    return {
        "nmse": {"mean": nmse.mean().item(), "median": nmse.quantile(0.5).item()},
        "baselines": {name: value.mean().item() for name, value in figures.items() if name not in FACTS},
    }
