"""`ris-fast compare`: what several runs have written, side by side. Nothing is trained or evaluated."""

from __future__ import annotations

import json as json_
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ris_fast import exit_codes
from ris_fast.commands.comparison import run_names
from ris_fast.commands.runner import writing_results
from ris_fast.config.load import plain_settings
from ris_fast.config.schema import ConfigError
from ris_fast.files import CONFIG, METRICS, SUMMARY, check_writable, read_text
from ris_fast.inference.opened_run import run_config
from ris_fast.old_names import OldNameWarning, current_names
from ris_fast.report.compare import RECORD, comparison, comparison_text, save_comparison, save_csv
from ris_fast.report.console import validation
from ris_fast.report.evaluation import RECORD as EVALUATION
from ris_fast.report.eventlog import dumps, read_events


def compare_command(
    runs: Sequence[Path], *, reach: Sequence[float], json: bool, csv: Path | None, out: Path | None
) -> int:
    """Prints the comparison; `csv` and `out` leave it in files."""
    if csv is not None and csv.suffix.lower() != ".csv":  # it could be a file of somebody's
        raise ConfigError(f"compare: --csv {csv}: expected a name that ends in .csv.")
    for level in reach:
        if not 0.0 < level < math.inf:
            raise ConfigError(f"compare: --reach {level:g} is no NMSE. Give a number above 0.")
    for path in (csv, out and out / RECORD):
        if path is not None:
            check_writable(path)
    result = compare(runs, reach)
    print(dumps(result, indent=2) if json else comparison_text(result))
    with writing_results():
        if csv is not None:
            save_csv(result, csv)
        figure = None if out is None else save_comparison(result, out)
    if figure is not None and not json:
        print(f"\nfigure: {figure}")
    return exit_codes.DONE


def compare(runs: Sequence[str | Path], reach: Iterable[float] = ()) -> dict[str, Any]:
    """What `comparison` makes of the runs in these folders. Raises: ConfigError for a folder that holds no run."""
    paths = [Path(run) for run in runs]
    names = run_names(paths, "compare")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OldNameWarning)
        return comparison({name: read_run(path) for name, path in zip(names, paths)}, list(reach))


def read_run(folder: Path) -> dict[str, Any]:
    """The facts of one run, from its settings, rows, summary and evaluation."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"compare: {folder} is not a run folder: it has no {CONFIG}. Give the folder that train printed."
        )
    settings = plain_settings(run_config(folder))
    rows = read_events(folder, skip_broken=True) if (folder / METRICS).is_file() else []
    start = next((row for row in reversed(rows) if row.get("event") == "start"), {})
    epochs = [row for row in rows if row.get("event") == "epoch"]
    summary, evaluation = _table(folder / SUMMARY), _table(folder / EVALUATION)
    curve = [(row["scenes_seen"], validation(row)) for row in epochs]
    scores = [(nmse, row["epoch"]) for row, (_, nmse) in zip(epochs, curve) if math.isfinite(nmse)]
    best, epoch = min(scores, default=(None, None))
    last = epochs[-1] if epochs else {}
    seconds = summary.get("seconds", last.get("seconds", 0.0))
    seen = summary.get("scenes_seen", last.get("scenes_seen", 0))
    return {
        "folder": str(folder),
        "verdict": summary.get("verdict", "unfinished"),
        "val_nmse": best,
        "best_epoch": epoch,
        "test_nmse": evaluation.get("nmse", {}).get("mean"),
        "test_scenes": evaluation.get("scenes"),
        "test_source": evaluation.get("source"),
        "scenes_seen": seen,
        "seconds": seconds,
        "scenes_per_s": seen / seconds if seconds else 0.0,
        "parameters": summary.get("parameters", start.get("parameters")),
        "baselines": start.get("baselines") or summary.get("baselines") or {},
        "mmse_bound": start.get("mmse_bound"),
        "validation": _validation_scenes(settings),
        "curve": curve,
        "settings": settings,
    }


def _validation_scenes(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that say which scenes a run is validated on, besides those of its task."""
    simulated = settings["data.source"] == "simulate" or not settings["data.path"]
    shown = min(settings["data.val_limit"], settings["data.val_scenes"])
    return {"data.val_limit": shown} | (
        {"data.seed": settings["data.seed"]} if simulated else {"data.path": settings["data.path"]}
    )


def _table(path: Path) -> dict[str, Any]:
    """A JSON file of a run; empty where there is none, or none that can be read."""
    try:
        text = read_text(path)
        found = json_.loads(text)
    except (OSError, ValueError):
        return {}
    return current_names([found], text, path)[0] if isinstance(found, dict) else {}
