"""Turns the rows of bench/results/gpu/results.jsonl into tables: `python -m bench.gpu.report`.

Writes bench/results/gpu/README.md and the block of README.md between its two marks, and says what is still missing. A
figure is the latest of its kind; of a stage that was run again the earlier figures stay where nothing newer replaced
them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu import rows as files
from bench.gpu.stages import STAGES

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "gpu")
BEGIN, END = "<!--gpu-->", "<!--/gpu-->"  # around what `python -m bench.gpu.report` writes
NOTHING = "**Nothing has run on a GPU yet**: Triton kernels are checked under its interpreter."
MS = "{:.3g} ms"
Row = Mapping[str, Any]


class Figure(NamedTuple):
    """A promised figure: what it is called, what was wanted, where it comes from, and how a row says it."""

    name: str
    wanted: str
    stage: str
    item: str  # how the row's item begins or, of a benchmark, what its name holds
    say: Callable[[Row], str | None]
    shown: bool = False  # in README.md too


def _path(*keys: str, form: str) -> Callable[[Row], str | None]:
    def say(row: Row) -> str | None:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return form.format(value) if isinstance(value, (int, float)) else None

    return say


def _slower(of: str) -> Callable[[Row], str | None]:
    """How many times as long as ours the first variant takes whose name holds `of`."""

    def say(row: Row) -> str | None:
        found = row.get("times_slower_than_ours") or {}
        return next((f"x {value:.3g}" for name, value in found.items() if of in name), None)

    return say


def _captured(row: Row) -> str | None:
    step = f"{row['step_ms']:.3g} ms, {row['scenes_per_s']:,.0f} scenes/s" if row.get("ok") else None
    return step and f"{step}, {'one graph' if row['captured'] else 'not captured: ' + row['refused']}"


def _trained(row: Row) -> str | None:
    summary = row.get("summary") or {}
    if summary.get("best_val_nmse") is None:
        return None
    reached = ", ".join(f"{at} after {s:.1f} s" for at, s in row["seconds_to"].items() if s is not None)
    return (
        f"{summary['best_val_nmse']:.4g} after {summary['seconds']:.0f} s and {summary['scenes_seen']:,} scenes,"
        f" {summary['scenes_per_s']:,.0f} scenes/s ({reached or 'no target reached'}); {summary['verdict']}"
    )


def _rate(row: Row) -> str | None:
    return next((f"{each['scenes_per_s']:,.0f} scenes/s" for each in row.get("rows", []) if each["scenes_per_s"]), None)


def _same_bits(row: Row) -> str | None:
    return "the same bits" if row.get("bit_for_bit") else None


def _loss(target: str) -> tuple[str, str]:
    return "cov_nmse", f"{target}-4096-144"


_OPTIMIZER, _STEP = ("fused_step", "test_against_torch[16340000-150-1"), ("step", "against_peers[original-bf16-1024")


_FULL, _HOST = ("step_full", "against_peers[full-bf16-1024"), ("host_time", "host_time[150]")


def _host(row: Row) -> str | None:
    found = row.get("variants") or {}
    if not {"torch fused", "FusedAdamW"} <= found.keys():
        return None
    return f"x {found['torch fused']['host_s'] / found['FusedAdamW']['host_s']:.3g}"


def _operators(row: Row) -> str | None:
    return f"{row['backend']}, relative error {row['error']:.1e}" if row.get("ok") else None


FIGURES = (
    Figure("copy bandwidth", "", "smoke", "ceilings", _path("copy_GB_per_s", form="{:,.0f} GB/s"), True),
    Figure("bf16 product", "", "smoke", "ceilings", _path("bf16_TFLOP_per_s", form="{:,.0f} TFLOP/s"), True),
    Figure("covariance loss against float64", "right", "smoke", "operator cov_nmse", _operators),
    Figure("FusedAdamW, replayed against eager", "the same bits", "smoke", "FusedAdamW replayed", _same_bits),
    Figure("step of `full`, 2,048 scenes", "one graph", "smoke", "captured step", _captured, True),
    *(
        Figure(f"pursuit, {n:,} scenes, in a graph", "", "smoke", f"pursuit, {n} scenes", _path("graph_ms", form=MS))
        for n in (64, 512, 2048, 4096)
    ),
    Figure("the same, plain torch, 2,048 scenes", "x 3", "features", "2048-fresnel", _slower("plain torch")),
    Figure("training of `full`, validation NMSE", "0.03 within 40 s", "train_full", "full", _trained, True),
    Figure("training of `original`, validation NMSE", "0.187", "train_original", "original", _trained, True),
    Figure("optimizer step, 16.34 M weights, torch's fused one", "x 1.3", *_OPTIMIZER, _slower("torch fused"), True),
    Figure("its share of the streaming rate", "0.85", *_OPTIMIZER, _path("share_of_streaming", form="{:.2f}")),
    Figure("covariance loss, 4,096 dense targets, eager", "x 30", *_loss("dense"), _slower("eager"), True),
    Figure("covariance loss, 4,096 low-rank targets, eager", "x 100", *_loss("low-rank"), _slower("eager"), True),
    Figure("loop of `full`, batch 2,048", "", "loop", "default-2048]", _rate),
    Figure("loop of `full`, batch 8,192", "400,000 scenes/s", "loop", "default-8192]", _rate, True),
    Figure("step of `original`, 1,024 scenes, bf16, clean eager", "x 3", *_STEP, _slower("eager loop"), True),
    Figure("step of `original`, the same compiled", "x 1.5", *_STEP, _slower("eager loop, compiled"), True),
    Figure("step of `original`, the original's", "x 100", *_STEP, _slower("original's step"), True),
    Figure("step of `full`, 1,024 scenes, bf16, clean eager", "x 3", *_FULL, _slower("eager loop")),
    Figure("step of `full`, the same compiled", "x 1.5", *_FULL, _slower("eager loop, compiled")),
    Figure("optimizer step, 150 tensors of 64, torch's fused one, host time", "x 10", *_HOST, _host),
    Figure("energy, `full`", "", "efficiency", "default", _path("energy", "joules_a_scene", form="{:.3g} J a scene")),
)


def measured(path: Path) -> list[Row]:
    """The rows of a file without those of a trial."""
    return [row for row in files.read(path) if not row.get("trial")]


def latest(rows: Iterable[Row], figure: Figure) -> Row | None:
    """The newest row that says the figure."""
    of_stage = [row for row in rows if row.get("stage") == figure.stage and figure.item in str(row.get("item", ""))]
    return next((row for row in reversed(of_stage) if figure.say(row) is not None), None)


def machine(rows: Sequence[Row]) -> str:
    found = next((row for row in reversed(rows) if row.get("item") == "machine" and row.get("ok")), None)
    if found is None:
        return "no machine has said what it is"
    conditions = found["conditions"]
    versions = ", ".join(f"{name} {conditions['versions'].get(name)}" for name in ("torch", "triton"))
    gpus = conditions.get("gpus")
    card = ", ".join(gpu["name"] for gpu in gpus) if isinstance(gpus, list) else str(gpus)
    return f"{card}; {versions}; {found['nvidia_smi']}"


def table(rows: Sequence[Row]) -> str:
    """What a person looks for first, as plain text."""
    lines = ["TRIAL in tiny sizes: no figure"] if any(row.get("trial") for row in rows) else []
    lines.append(machine(rows))
    for figure in FIGURES:
        if (row := latest(rows, figure)) is not None:
            lines.append(f"{figure.name}: {figure.say(row)}" + (f" (wanted {figure.wanted})" if figure.wanted else ""))
    wrong = [row for row in rows if row.get("ok") is False and _is_last(rows, row)]
    lines += [
        f"NOT RIGHT {row['stage']} / {row['item']}: {row.get('error') or row.get('note') or ''}"[:300] for row in wrong
    ]
    return "\n".join(lines)


def _is_last(rows: Sequence[Row], row: Row) -> bool:
    same = [each for each in rows if (each.get("stage"), each.get("item")) == (row.get("stage"), row.get("item"))]
    return same[-1] is row


def missing(rows: Sequence[Row]) -> list[str]:
    return [f"{figure.name} (stage {figure.stage})" for figure in FIGURES if latest(rows, figure) is None]


def document(rows: Sequence[Row]) -> str:
    """bench/results/gpu/README.md."""
    lines = [
        "# Measured on a GPU",
        "",
        machine(rows),
        "",
        "| figure | found | wanted | commit | command |",
        "|---|---|---|---|---|",
    ]
    for figure in FIGURES:
        if (row := latest(rows, figure)) is not None:
            command = f"`RIS_FAST_GPU_SH_STAGES={figure.stage} bash bench/gpu.sh`"
            lines.append(
                f"| {figure.name} | {figure.say(row)} | {figure.wanted} | {row.get('commit', '')} | {command} |"
            )
    lines += ["", "Stages, as each ended last:", "", "| stage | outcome | seconds | commit |", "|---|---|---|---|"]
    for name in STAGES:
        ended = [row for row in rows if row.get("stage") == name and row.get("item") == "stage"]
        if ended:
            lines.append(f"| {name} | {ended[-1]['outcome']} | {ended[-1]['seconds']} | {ended[-1]['commit']} |")
    checked = {row["item"]: row["ok"] for row in rows if row.get("stage") == "gradcheck" and "ok" in row}
    if checked:
        lines += ["", f"Gradient checks: {sum(checked.values())} of {len(checked)} rows passed."]
    lines += ["", "Still missing:", "", *(f"- {name}" for name in missing(rows) or ["nothing"])]
    return "\n".join(lines) + "\n"


def block(rows: Sequence[Row]) -> str:
    """README's lines between the marks."""
    shown = [(figure, row) for figure in FIGURES if figure.shown and (row := latest(rows, figure)) is not None]
    if not shown:
        return NOTHING
    card = machine(rows).partition(";")[0]
    return "\n".join(
        [f"| {card} | measured |", "|---|---|", *(f"| {figure.name} | {figure.say(row)} |" for figure, row in shown)]
    )


def main(folder: Path = FOLDER, readme: Path = ROOT / "README.md") -> int:
    rows = measured(folder / "results.jsonl")
    text = readme.read_text()
    before, mark, rest = text.partition(BEGIN)
    if not mark or END not in rest:
        print(f"{readme} lacks the marks {BEGIN!r} and {END!r}.", file=sys.stderr)
        return 2
    readme.write_text(f"{before}{BEGIN}\n{block(rows)}\n{rest[rest.index(END) :]}")
    if rows:
        (folder / "README.md").write_text(document(rows))
    print(table(rows))
    print("\nstill missing:\n" + "\n".join(missing(rows) or ["nothing"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
