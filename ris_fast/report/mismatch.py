"""The mismatch report for a person: every run on every test task, as tables, a JSON file and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from ris_fast.files import make_folder, save_figure
from ris_fast.physics.baseline_names import CONSTANT_BASELINES
from ris_fast.report.baselines import label
from ris_fast.report.drawing import new_figure
from ris_fast.report.eventlog import write_json
from ris_fast.report.style import FLOOR_SHADES, GRID, INK, look
from ris_fast.report.tables import text_table

RECORD, FIGURE = "mismatch.json", "mismatch.png"
TICKS = ("|", "x", "+", "1", "2", "3", "4", "_")  # markers of the estimates without a network


def mismatch_text(result: Mapping[str, Any]) -> str:
    """`result` is what `mismatch` returns."""
    tests, names = result["tests"], result["runs"]
    classical = _classical(result)
    bounds = ["MMSE bound"] if any(test["mmse_bound"] is not None for test in tests) else []
    means = [
        (
            task_name(test, result),
            test["scenes"],
            *(_marked(test, name, "mean") for name in names),
            *(test["runs"][run]["baselines"][key] for run, key in classical.values()),
            test["runs"][names[0]]["baselines"]["mean"],
            *([test["mmse_bound"]] if bounds else []),
        )
        for test in tests
    ]
    medians = [(task_name(test, result), *(_marked(test, name, "median") for name in names)) for test in tests]
    return "\n\n".join(
        [
            f"A row is a test task, by what differs from that of {names[0]}; * was trained on it.",
            text_table(("mean NMSE on", "scenes", *names, *classical, "mean covariance", *bounds), means),
            text_table(("median NMSE on", *names), medians),
        ]
    )


def task_name(test: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """'phase_error_deg 10, channel_snr_db 25', or whose task it is; of files with the name of their folder."""
    said = ", ".join(f"{key} {_short(value)}" for key, value in test["test"].items()) or f"task of {result['runs'][0]}"
    return f"{Path(test['data']).name}: {said}" if test["data"] else said


def save_mismatch(result: Mapping[str, Any], folder: Path) -> Path:
    """Writes mismatch.json and mismatch.png into the folder. Returns the figure's path."""
    make_folder(folder)
    write_json(folder / RECORD, result)
    save_figure(folder / FIGURE, mismatch_figure(result), 150)
    return folder / FIGURE


def mismatch_figure(result: Mapping[str, Any]) -> Any:
    """Mean NMSE of every run and of the pursuit on every test task; a full marker where the run was trained on it."""
    tests, names = result["tests"], result["runs"]
    figure = new_figure(8.0, 1.6 + 0.42 * len(tests))
    axes, rows = figure.subplots(), range(len(tests))
    for (key, (run, baseline)), marker, colour in zip(_classical(result).items(), cycle(TICKS), cycle(FLOOR_SHADES)):
        style = {"ls": "", "marker": marker, "color": colour, "ms": 11, "mew": 1.5}
        axes.plot([test["runs"][run]["baselines"][baseline] for test in tests], rows, **style, label=key)
    for index, name in enumerate(names):
        cells = [test["runs"][name] for test in tests]
        style = {"ls": "", "marker": look(index).marker, "color": look(index).color, "ms": 7}
        axes.plot([cell["nmse"]["mean"] for cell in cells], rows, **style, mfc="none", label=name)
        own = [(cell["nmse"]["mean"], row) for row, cell in enumerate(cells) if cell["trained"]]
        axes.plot(*zip(*own), **style)
    bounds = [(test["mmse_bound"], row) for row, test in enumerate(tests) if test["mmse_bound"] is not None]
    if bounds:
        axes.plot(*zip(*bounds), "d", color=INK, ms=5, label="MMSE bound, estimated")
    axes.set_xscale("log")
    axes.set_yticks(list(rows), [task_name(test, result) for test in tests])
    axes.invert_yaxis()
    axes.grid(True, which="both", axis="x", color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
    axes.set_xlabel("mean NMSE on the test scenes; full: trained on this task", color=INK)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _classical(result: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Column -> (run, baseline) of the estimates without a network, from each run that has other figures than those
    before it."""
    found: dict[str, tuple[str, str]] = {}
    for run in result["runs"]:
        for key in result["tests"][0]["runs"][run]["baselines"]:
            before = [(r, k) for r, k in found.values() if k == key]
            if key not in CONSTANT_BASELINES and not any(_same(result, run, r, key) for r, _ in before):
                found[f"{label(key)} of {run}" if before else label(key)] = (run, key)
    return found


def _same(result: Mapping[str, Any], one: str, other: str, key: str) -> bool:
    return all(
        test["runs"][one]["baselines"][key] == test["runs"][other]["baselines"].get(key) for test in result["tests"]
    )


def _marked(test: Mapping[str, Any], name: str, key: str) -> str:
    cell = test["runs"][name]
    return f"{cell['nmse'][key]:.3g}{' *' if cell['trained'] else ''}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
