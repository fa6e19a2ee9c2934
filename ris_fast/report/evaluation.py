"""Evaluations for a person: tables beside baselines and bounds, figures and a JSON file in the run folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ris_fast.files import read_text
from ris_fast.physics.mmse_bound import FEW
from ris_fast.report.baselines import judge, label
from ris_fast.report.eventlog import write_json
from ris_fast.report.positions import beside, group_label, matching_note, positions_text, side_by_side
from ris_fast.report.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ris_fast.localize.metrics import Scores
    from ris_fast.report.scene_plot import Example

RECORD, COMPARISON = "evaluation.json", "compare.json"
ALONE, TOGETHER = "evaluate", "compare"  # beginnings of the names of figures
Results = Mapping[str, Mapping[str, Any]]  # what `evaluate` returns, by the name of each run


def evaluation_text(result: Mapping[str, Any]) -> str:
    """The whole evaluation of one run in plain text."""
    tables = [
        _nmse_table(
            "SNR in dB", [("{:g} .. {:g}".format(*group["snr_db"]), group) for group in result["by_snr"]], result
        ),
        _nmse_table("sources", [(str(group["sources"]), group) for group in result["by_count"]], result),
        mmse_bound_note(result),
    ]
    positions = [positions_text(result["positions"])] if result["positions"] else []
    return "\n".join(_head(result)) + "\n\n" + "\n\n".join([*tables, *positions])


def comparison_text(results: Results, notes: list[str]) -> str:
    """Several runs in one table a metric, a column for each run; `notes` on the comparison itself."""
    heads = ["\n".join([f"{name}: {_head(result)[0]}", *_head(result)[1:]]) for name, result in results.items()]
    located = networks(results)
    positions = ["Positions, all scenes\n" + beside(located), side_by_side(located), matching_note()] if located else []
    first = next(iter(results.values()))
    parts = [*heads, *(f"note: {note}" for note in notes), _nmse_beside(results), mmse_bound_note(first), *positions]
    return "\n\n".join(parts)


def networks(results: Results) -> dict[str, Mapping[str, Any]]:
    """The positions of each run's network, of the runs that have any."""
    return {
        name: next(iter(result["positions"]["estimators"].values()))
        for name, result in results.items()
        if result["positions"]
    }


def mmse_bound_note(result: Mapping[str, Any]) -> str:
    """What the MMSE bound is, or why there is none."""
    if not result["standard"]:
        return "MMSE bound: known for RIS-12x12 with its default ranges only."
    return (
        "MMSE bound: what the posterior mean is expected to score, estimated by Monte Carlo (40 to 250 scenes a cell)"
        f" and interpolated in SNR;\na guide, not the bound itself. None for fewer than {FEW} scenes, whose mean may be"
        " on either side of an expectation."
    )


def save_record(result: Mapping[str, Any]) -> None:
    """Writes evaluation.json into the run folder, but not over one of more scenes, nor one with positions by one
    without; a note on standard error says so. Raises StorageError."""
    path = Path(result["run"]) / RECORD
    scenes, positions = _recorded(path)
    less = ["positions"] if positions and not result["positions"] else []
    less += [f"more scenes ({scenes}, not {result['scenes']})"] if scenes > result["scenes"] else []
    if less:
        print(f"note: {path} is left as it was: it has {' and '.join(less)}.", file=sys.stderr)
    else:
        write_json(path, result)


def _recorded(path: Path) -> tuple[int, bool]:
    """How many scenes a record has, and whether it has positions; none where there is no record that can be read."""
    try:
        old = json.loads(read_text(path))
        return int(old["scenes"]), bool(old.get("positions"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0, False


def save_figures(
    results: Results, scores: Mapping[str, Scores], example: Example | None, folder: Path
) -> dict[str, Path]:
    """Writes every figure as .png and .pdf. Args: scores: by estimator of one run, or by run; example: a scene to draw.
    Returns: the path of each .png."""
    from ris_fast.report.style import save

    prefix = ALONE if len(results) == 1 else TOGETHER
    saved = {}
    for name, figure in figures(results, scores, example).items():
        saved[name] = folder / f"{prefix}{name}.png"
        for path in (saved[name], saved[name].with_suffix(".pdf")):
            save(figure, path)
    return saved


def figures(results: Results, scores: Mapping[str, Scores], example: Example | None) -> dict[str, Figure]:
    """The figures by the end of their name: NMSE, and for positions RMSE, errors, number of sources and a scene."""
    from ris_fast.report.evaluation_plots import evaluation_figure
    from ris_fast.report.position_plots import count_figure, error_figure, rmse_figure
    from ris_fast.report.scene_plot import scene_figure

    (name, only), *others = results.items()
    made = {"": evaluation_figure(results if others else {"network": only})}
    if scores:
        estimators = networks(results) if others else only["positions"]["estimators"]
        made |= {"_rmse": rmse_figure(estimators), "_errors": error_figure(scores), "_count": count_figure(scores)}
    return made if example is None else made | {"_scene": scene_figure(example)}


def _head(result: Mapping[str, Any]) -> list[str]:
    bound = result["mmse_bound"]
    judged = judge(result["nmse"]["mean"], result["baselines"], mmse_bound=bound, milestones=bound is not None)
    return [
        (
            f"{result['model']}, {result['weights']} weights of epoch {result['epoch']} (checkpoint"
            f" '{result['checkpoint']}'), {result['parameters']:,} parameters, on {result['device']}"
        ),
        result["source"],
        *(f"note: {note}" for note in result["notes"]),
        f"mean NMSE {judged}",
    ]


def _nmse_table(axis: str, groups: list[tuple[str, Mapping[str, Any]]], whole: Mapping[str, Any]) -> str:
    baselines = list(whole["baselines"])
    rows = [
        (
            name,
            group["scenes"],
            group["nmse"]["mean"],
            "{:.3g} .. {:.3g}".format(*group["nmse_interval"]),
            group["nmse"]["median"],
            group["mmse_bound"],
            *(group["baselines"][baseline] for baseline in baselines),
        )
        for name, group in [*groups, ("all", whole)]
    ]
    return text_table(
        (axis, "scenes", "NMSE mean", "95 % interval", "median", "MMSE bound", *map(label, baselines)), rows
    )


def _nmse_beside(results: Results) -> str:
    """Mean NMSE by SNR and number of sources, a column for each run; bound and pursuit are the first run's."""
    first = next(iter(results.values()))
    rows: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        for group in (*result["by_snr"], *result["by_count"]):
            rows.setdefault(group_label(group), {})[name] = group
        rows["all"] = rows.pop("all", {}) | {name: result}  # last
    names, baselines = list(results), [name for name in first["baselines"] if name != "zero"]
    table = []
    for group, row in rows.items():
        known = row.get(names[0])
        bound = known and known["mmse_bound"]
        others = [known and known["baselines"][each] for each in baselines]
        table.append((group, *(row[name]["nmse"]["mean"] if name in row else None for name in names), bound, *others))
    return "Mean NMSE\n" + text_table(("", *names, "MMSE bound", *map(label, baselines)), table)
