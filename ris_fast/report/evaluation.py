"""An evaluation for a person: tables beside baselines and MMSE bound, a figure and a JSON file in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ris_fast.physics.mmse_bound import FEW
from ris_fast.report.baselines import judge
from ris_fast.report.eventlog import write_json
from ris_fast.report.tables import text_table

FIGURE = "evaluate.png"
RECORD = "evaluation.json"


def evaluation_text(result: Mapping[str, Any]) -> str:
    """The whole evaluation in plain text; `result` is what `evaluate` returns."""
    bound = result["mmse_bound"]
    judged = judge(result["nmse"]["mean"], result["baselines"], mmse_bound=bound, milestones=bound is not None)
    head = [
        (
            f"{result['model']}, {result['weights']} weights of epoch {result['epoch']} (checkpoint"
            f" '{result['checkpoint']}'), {result['parameters']:,} parameters, on {result['device']}"
        ),
        result["source"],
        *(f"note: {note}" for note in result["notes"]),
        f"mean NMSE {judged}",
    ]
    tables = [
        _table(
            "SNR in dB",
            [(f"{low:g} .. {high:g}", group) for group in result["by_snr"] for low, high in [group["snr_db"]]],
            result,
        ),
        _table("sources", [(str(group["sources"]), group) for group in result["by_count"]], result),
    ]
    return "\n".join(head) + "\n\n" + "\n\n".join([*tables, mmse_bound_note(result)])


def mmse_bound_note(result: Mapping[str, Any]) -> str:
    """What the MMSE bound is, or why there is none."""
    if not result["standard"]:
        return "MMSE bound: known for RIS-12x12 with its default ranges only."
    return (
        "MMSE bound: what the posterior mean is expected to score, estimated by Monte Carlo (40 to 250 scenes a cell)"
        f" and interpolated in SNR;\na guide, not the bound itself. None for fewer than {FEW} scenes, whose mean may be"
        " on either side of an expectation."
    )


def save_evaluation(result: Mapping[str, Any]) -> Path:
    """Writes evaluation.json and plots/evaluate.png into the run folder. Returns the figure's path."""
    from ris_fast.report.plots import evaluation_figure, save

    run = Path(result["run"])
    write_json(run / RECORD, result)
    save(evaluation_figure(result), run / "plots" / FIGURE)
    return run / "plots" / FIGURE


def _table(label: str, groups: list[tuple[str, Mapping[str, Any]]], whole: Mapping[str, Any]) -> str:
    baselines = list(whole["baselines"])
    rows = [
        (
            name,
            group["scenes"],
            group["nmse"]["mean"],
            group["nmse"]["median"],
            group["mmse_bound"],
            *(group["baselines"][baseline] for baseline in baselines),
        )
        for name, group in [*groups, ("all", whole)]
    ]
    return text_table((label, "scenes", "NMSE mean", "median", "MMSE bound", *baselines), rows)
