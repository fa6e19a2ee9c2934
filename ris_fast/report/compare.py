"""Several runs side by side for a person: how good, how soon, how fast, and what they differ in; runs that differ in
their seeds alone are one group with mean and spread."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ris_fast.files import make_folder, save_figure, write_text
from ris_fast.report.compare_plot import comparison_figure
from ris_fast.report.eventlog import write_json
from ris_fast.report.tables import text_table

RECORD, FIGURE = "comparison.json", "comparison.png"
SEEDS = ("training.seed", "data.seed")
SPREAD = ("val_nmse", "test_nmse", "seconds", "scenes_per_s")  # figures whose mean and spread a group has
ENDINGS = "-_. "  # between what the names of a group's runs share and what they do not
Run = Mapping[str, Any]  # what `commands.compare` reads of one run


def grouped(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """Group name -> names of its runs, which have the same settings but for their seeds; in the order given."""
    groups: list[list[str]] = []
    for name, run in runs.items():
        same = next((group for group in groups if _setup(runs[group[0]]) == _setup(run)), None)
        groups.append([name]) if same is None else same.append(name)
    return {_group_name(group): group for group in groups}


def comparison(runs: Mapping[str, Run], reach: Sequence[float]) -> dict[str, Any]:
    """All that is shown of the runs: `runs` by name, `groups` by name with mean and spread, `differ`, `notes`.

    Args: reach: validation NMSEs for which the scenes are told that a run took to reach them.
    """
    groups, levels = grouped(runs), list(reach) or _levels(runs)
    base = next(iter(runs.values()))
    told = {
        name: {
            **run,
            "reach": {f"{level:g}": _reached(run, level) for level in levels},
            "same_task": not _differences(base, run, "task."),
        }
        for name, run in runs.items()
    }
    return {
        "runs": told,
        "groups": {
            name: {
                "runs": members,
                **{key: spread([told[each][key] for each in members]) for key in SPREAD},
                "reach": {
                    f"{level:g}": spread([told[each]["reach"][f"{level:g}"] for each in members]) for level in levels
                },
            }
            for name, members in groups.items()
        },
        "differ": differing({name: runs[members[0]] for name, members in groups.items()}),
        "notes": comparability_notes(runs, groups),
    }


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, standard deviation (of a sample), smallest and largest of the values that there are."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return {
        "n": len(known),
        "mean": fmean(known) if known else None,
        "sd": stdev(known) if len(known) > 1 else None,
        "min": min(known, default=None),
        "max": max(known, default=None),
    }


def differing(runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """'section.key' -> its value in each run, of settings that are not alike; no seeds, [report], [health]."""
    setups = {name: _setup(run) for name, run in runs.items()}
    keys = sorted({key for setup in setups.values() for key in setup})
    rows = {key: {name: setup.get(key) for name, setup in setups.items()} for key in keys}
    return {key: row for key, row in rows.items() if any(value != next(iter(row.values())) for value in row.values())}


def comparability_notes(runs: Mapping[str, Run], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """What keeps figures of the runs from being compared: another task, other scenes, a run that has not ended."""
    (first, base), *others = runs.items()
    notes = []
    for name, run in others:
        task = _differences(base, run, "task.")
        if task:
            notes.append(f"{name} has another task than {first} ({task}): their NMSEs cannot be compared")
        elif run["validation"] != base["validation"]:
            if not _same_group(groups, first, name):
                what = _named_differences(base["validation"], run["validation"])
                notes.append(
                    f"{name} was validated on other scenes than {first} ({what}): small differences mean nothing"
                )
    for group, members in groups.items():
        if len({runs[each]["settings"].get("data.seed") for each in members}) > 1:
            notes.append(f"{group}: its runs drew other scenes too (data.seed), which its spread includes")
    tested = {
        name: (run["test_scenes"], run["test_source"]) for name, run in runs.items() if run["test_nmse"] is not None
    }
    if len(set(tested.values())) > 1:
        counts = ", ".join(f"{name} {scenes:,}" for name, (scenes, _) in tested.items())
        notes.append(
            f"the runs were evaluated on different test scenes ({counts}): their test NMSEs cannot be compared"
        )
    for name, run in runs.items():
        if run["verdict"] == "unfinished":
            notes.append(f"{name} has not come to its end: it was killed, or is still training")
        if run["val_nmse"] is None:
            notes.append(f"{name} has no validation yet, and is in no mean")
    return notes


def comparison_text(result: Mapping[str, Any]) -> str:
    """`result` is what `comparison` returns."""
    runs, groups = result["runs"], result["groups"]
    levels = list(next(iter(runs.values()))["reach"])
    rows = [
        (
            name,
            run["verdict"],
            run["val_nmse"],
            run["best_epoch"],
            run["test_nmse"],
            *run["reach"].values(),
            round(run["seconds"]),
            round(run["scenes_per_s"]),
            run["parameters"],
        )
        for name, run in runs.items()
    ]
    heads = ("val NMSE", "epoch", "test NMSE", *(f"scenes to {level}" for level in levels))
    parts = [text_table(("run", "verdict", *heads, "seconds", "scenes/s", "parameters"), rows)]
    if any(len(group["runs"]) > 1 for group in groups.values()):
        parts.append(
            "Over seeds: mean, standard deviation and range\n"
            + text_table(
                ("group", "runs", "val NMSE", "sd", "min .. max", "test NMSE", "sd", "scenes/s"),
                [
                    (
                        name,
                        group["val_nmse"]["n"],
                        group["val_nmse"]["mean"],
                        group["val_nmse"]["sd"],
                        _range(group["val_nmse"]),
                        group["test_nmse"]["mean"],
                        group["test_nmse"]["sd"],
                        group["scenes_per_s"]["mean"],
                    )
                    for name, group in groups.items()
                ],
            )
        )
    parts += [f"note: {note}" for note in result["notes"]]
    if result["differ"]:
        table = [(key, *(_shown(row[name]) for name in groups)) for key, row in result["differ"].items()]
        parts.append("Settings that differ\n" + text_table(("", *groups), table))
    return "\n\n".join(parts)


def comparison_csv(result: Mapping[str, Any]) -> str:
    """A row for each run, with the settings that differ."""
    text, groups = io.StringIO(), {run: name for name, each in result["groups"].items() for run in each["runs"]}
    facts = ("folder", "verdict", "val_nmse", "best_epoch", "test_nmse", "test_scenes", "scenes_seen", "seconds")
    facts += ("scenes_per_s", "parameters")
    levels = list(next(iter(result["runs"].values()))["reach"])
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", "group", *facts, *(f"scenes_to_{each}" for each in levels), *SEEDS, *result["differ"]))
    for name, run in result["runs"].items():
        values = [run[key] for key in facts] + list(run["reach"].values())
        writer.writerow(
            (name, groups[name], *values, *(run["settings"].get(key) for key in (*SEEDS, *result["differ"])))
        )
    return text.getvalue()


def save_comparison(result: Mapping[str, Any], folder: Path) -> Path:
    """Writes comparison.json and comparison.png into the folder. Returns the figure's path."""
    make_folder(folder)
    write_json(folder / RECORD, result)
    save_figure(folder / FIGURE, comparison_figure(result), 150)
    return folder / FIGURE


def save_csv(result: Mapping[str, Any], path: Path) -> None:
    write_text(path, comparison_csv(result))


def _setup(run: Run) -> dict[str, Any]:
    """The settings that make a run another experiment: not its seeds, what it writes and how it is watched."""
    return {
        key: value
        for key, value in run["settings"].items()
        if key not in SEEDS and not key.startswith(("report.", "health."))
    }


def _group_name(names: Sequence[str]) -> str:
    """What the names of the runs share, or the first and the last."""
    if len(names) == 1:
        return names[0]
    shared = _prefix(names)
    return shared if len(shared) > 2 else f"{names[0]} .. {names[-1]}"


def _prefix(names: Sequence[str]) -> str:
    same = 0
    while all(len(name) > same and name[same] == names[0][same] for name in names):
        same += 1
    head = names[0][:same]
    cut = max(head.rfind(each) for each in ENDINGS)
    return head[:cut] if cut > 0 else head


def _levels(runs: Mapping[str, Run]) -> list[float]:
    """Three round figures around where the runs got: the lowest that all reached, and the next ones that any did."""
    best = [run["val_nmse"] for run in runs.values() if run["val_nmse"] is not None]
    rounds = [
        digit * 10.0**power for power in (0, -1, -2, -3, -4) for digit in (5.0, 2.0, 1.0) if digit * 10.0**power < 1.0
    ]
    reached = [each for each in rounds if best and each >= min(best)]
    return [float(f"{each:.3g}") for each in reached[-3:]]


def _reached(run: Run, level: float) -> int | None:
    return next((x for x, y in run["curve"] if y <= level), None)


def _differences(base: Run, run: Run, beginning: str) -> str:
    keys = [key for key in {**base["settings"], **run["settings"]} if key.startswith(beginning)]
    return _named_differences(*({key: each["settings"].get(key) for key in keys} for each in (base, run)))


def _named_differences(base: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    keys = [key for key in {**base, **other} if base.get(key) != other.get(key)]
    return ", ".join(f"{key} = {_shown(other.get(key))}, not {_shown(base.get(key))}" for key in keys)


def _same_group(groups: Mapping[str, Sequence[str]], one: str, other: str) -> bool:
    return any(one in members and other in members for members in groups.values())


def _range(group: Mapping[str, Any]) -> str:
    return "-" if group["n"] < 2 else f"{group['min']:.4g} .. {group['max']:.4g}"


def _shown(value: Any) -> str:
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
