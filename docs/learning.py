"""Draws docs/learning.png: the original report's network as it learns here, beside what the report expected and got.

    python docs/learning.py [FILE]

Reads bench/results/original/: the epochs' rows of a run's metrics.jsonl, and its summary. The report's figures are of
its own loss, training and validation: expected in the first and the last of 30 epochs, and found in all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RUN = Path(__file__).parents[1] / "bench" / "results" / "original"
EXPECTED = {"training": (0.806, 0.198), "validation": (1.921, 0.187)}
FOUND = {"training": 0.217, "validation": 1.921642}
COLORS = {"training": "#d9822b", "validation": "#1f5fa8"}
INK, PALE, REPORT = "#222222", "#777777", "#b04a5a"


def draw(file: str | Path) -> None:
    rows = [json.loads(line) for line in (RUN / "epochs.jsonl").read_text().splitlines()]
    summary = json.loads((RUN / "summary.json").read_text())
    figure = Figure(figsize=(9.0, 5.0), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(yscale="log", ylim=(0.01, 2.6), xlim=(0.3, rows[-1]["epochs"] + 0.7), ylabel="NMSE")
    axes.set_xlabel(f"epoch of {rows[0]['scenes_seen']:,} scenes")
    draw_report(axes, rows[-1]["epochs"])
    draw_lines(axes, summary)
    epochs = [row["epoch"] for row in rows]
    curves = {
        "training": [row["terms"]["cov"]["raw"] for row in rows],
        "validation": [min(row["val_nmse_raw"], row["val_nmse_ema"]) for row in rows],
    }
    for name, values in curves.items():
        axes.plot(epochs, values, color=COLORS[name], lw=2.2, label=f"{name}, here: {values[-1]:.3f} at the end")
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center right", frameon=False, fontsize=9.5, bbox_to_anchor=(1.0, 0.36))
    figure.savefig(file, dpi=150)


def draw_report(axes: Axes, last: int) -> None:
    for name, ends in EXPECTED.items():
        label = f"{name}, expected by the report: {ends[0]:g} to {ends[1]:g}"
        axes.plot((1, last), ends, color=COLORS[name], lw=1.0, ls=":", marker="o", ms=4, mfc="white", label=label)
    for name, value in FOUND.items():
        axes.axhline(value, color=REPORT, lw=0.8)
        axes.text(last, value * 1.04, f"{name} in the report", color=REPORT, fontsize=8, ha="right", va="bottom")


def draw_lines(axes: Axes, summary: dict) -> None:
    lines = {"mean": "constant answer", "lmmse": "linear MMSE field, no network"}
    known = {text: summary["baselines"][name] for name, text in lines.items()} | {"MMSE bound": summary["mmse_bound"]}
    for text, value in known.items():
        axes.axhline(value, color=PALE, lw=0.8, ls="--")
        axes.text(0.5, value * 1.04, f"{text}, {value:.3g}", color=INK, fontsize=8, va="bottom")


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
