"""A run that stands still above what a classical estimator makes of the network's own inputs.

A learning curve falls by about as much in every doubling of the steps, or by less: on the logarithm of the steps it is
a line or flatter, and where the line leads is the most that can be hoped for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.epoch_rules import constant, trained
from ris_fast.health.monitor.history import Row, RunHistory, validated
from ris_fast.physics.baseline_names import CONSTANT_BASELINES

LOOK_BACK, LOOK_AHEAD = 4.0, 64.0  # from a quarter of the steps to now; to 64 times as many, however short the run
FEWEST_STEPS, FEWEST_ROWS = 200, 16  # of the run, and in sight
DEVIATIONS = 3.0
CLEAR = 0.05  # of what the estimator gains over the constant answer: annealing may bring a run that is nearer below it
MIN_GAIN = 0.05  # of the constant answer, which an estimator gains that says something of the scenes
PATH = 0.5  # of its own size, which the median tensor has had the rates to move
ROWS_A_DOUBLING = 64  # at which the rule looks at most, so that long runs cost little


class Line(NamedTuple):
    """A weighted least-squares line y = mean + slope (x - centre), and what its noise is."""

    centre: float
    mean: float
    slope: float
    weight: float  # sum of the weights
    spread: float  # weighted sum of squares of x
    variance: float  # of one unit of weight

    def at(self, x: float) -> tuple[float, float]:
        """Value and its standard deviation."""
        error = math.sqrt(self.variance * (1.0 / self.weight + (x - self.centre) ** 2 / self.spread))
        return self.mean + self.slope * (x - self.centre), error

    @property
    def slope_error(self) -> float:
        return math.sqrt(self.variance / self.spread)


def fitted(x: Sequence[float], y: Sequence[float], weights: Sequence[float]) -> Line:
    """The line through three points or more."""
    total = math.fsum(weights)
    centre, mean = (math.fsum(w * v for w, v in zip(weights, values)) / total for values in (x, y))
    spread = math.fsum(w * (a - centre) ** 2 for w, a in zip(weights, x))
    slope = math.fsum(w * (a - centre) * (b - mean) for w, a, b in zip(weights, x, y)) / spread
    squares = math.fsum(w * (b - mean - slope * (a - centre)) ** 2 for w, a, b in zip(weights, x, y))
    return Line(centre, mean, slope, total, spread, squares / (len(x) - 2))


class Figure(NamedTuple):
    """The estimator on the network's inputs, and the best constant answer."""

    name: str
    nmse: float
    constant: float

    @property
    def clearly_above(self) -> float:
        return self.nmse + CLEAR * (self.constant - self.nmse)


def inputs_figure(run: RunHistory) -> Figure | None:
    """What a classical estimator makes of the network's inputs, on training or validation scenes, whichever is worse;
    None where there is none, or where it hardly beats a constant."""
    baselines, lowest = run.info.get("baselines") or {}, constant(run)
    names = [name for name in baselines if name not in CONSTANT_BASELINES]
    if not names or lowest is None:
        return None
    name = min(names, key=lambda each: float(baselines[each]))
    nmse = max(float(baselines[name]), float((run.info.get("training_baselines") or {}).get(name, 0.0)))
    return Figure(name.replace("_", " "), nmse, lowest[1]) if nmse < (1.0 - MIN_GAIN) * lowest[1] else None


class Sight(NamedTuple):
    """Reports in sight: the middle step of each, the NMSE of its training scenes, and the steps behind it."""

    steps: list[float]
    nmse: list[float]
    weights: list[float]
    path: float  # that the median tensor has moved, in its own size, were all its steps in one direction

    def after(self, step: float) -> Sight:
        first = sum(each < step for each in self.steps)
        return Sight(self.steps[first:], self.nmse[first:], self.weights[first:], self.path)


def in_sight(run: RunHistory) -> Sight:
    """The reports from a quarter of the run's steps on."""
    rows = [_report(run, row) for row in run.steps if row["step"] >= run.step / LOOK_BACK]
    kept = [row for row in rows if row[2] > 0 and row[0] >= run.step / LOOK_BACK]
    steps, nmse, weights, ratios = (list(column) for column in zip(*kept)) if kept else ([], [], [], [])
    return Sight(steps, nmse, weights, math.fsum(ratio * made for ratio, made in zip(ratios, weights)))


def _report(run: RunHistory, row: Row) -> tuple[float, float, float, float]:
    health = row.get("health") or {}
    made = float(health.get("steps") or 0)
    return row["step"] - 0.5 * made, trained(run, row), made, float(health.get("update_ratio") or 0.0)


def stalled_above_inputs(run: RunHistory) -> Iterator[Finding]:
    """A network does not stay above what its own inputs say without it."""
    if run.step < FEWEST_STEPS or not _due(len(run.steps)) or run.info.get("loaded"):
        return
    if run.info.get("dropout") and not run.epochs:  # which raises the NMSE of training, and not what is validated
        return
    figure = inputs_figure(run)
    if figure is None:
        return
    sight = in_sight(run)
    if len(sight.steps) < FEWEST_ROWS or not all(map(math.isfinite, sight.nmse)):
        return
    if _warming_up(run) or sight.path < PATH or any(validated(row) < figure.nmse for row in run.epochs):
        return
    line = fitted([math.log2(step) for step in sight.steps], sight.nmse, sight.weights)
    planned = max(run.steps[-1].get("planned_steps") or 0, run.step)
    now, end = (line.at(math.log2(step)) for step in (run.step, max(planned, LOOK_AHEAD * run.step)))
    if _surely(now) <= figure.clearly_above or _surely(end) <= figure.nmse or _gathers_pace(sight, planned, figure):
        return
    yield run.finding("stalled_above_inputs", _seen(run, sight, line, figure, planned), certain=False)


def _surely(value: tuple[float, float]) -> float:
    return value[0] - DEVIATIONS * value[1]


def _gathers_pace(sight: Sight, planned: int, figure: Figure) -> bool:
    """Whether the last half of the steps falls for certain, and as fast a fall to the end would reach the figure."""
    late = sight.after(sight.steps[-1] / 2)
    if len(late.steps) < 3:
        return True
    line = fitted(*late[:3])
    falls = line.slope < -DEVIATIONS * line.slope_error
    return falls and line.at(planned)[0] < figure.nmse


def _due(rows: int) -> bool:
    """Whether to look at this many rows: at each of the first, then at a share of them."""
    return rows % max(1, 2 ** rows.bit_length() // (2 * ROWS_A_DOUBLING)) == 0


def _warming_up(run: RunHistory) -> bool:
    """Whether the learning rate still rises."""
    rates = [max((row.get("lr") or {"": 0.0}).values()) for row in run.steps[-2:]]
    return rates[-1] > rates[0]


def _seen(run: RunHistory, sight: Sight, line: Line, figure: Figure, planned: int) -> str:
    level, error = line.at(math.log2(run.step))
    scenes, last = run.steps[-1].get("scenes_seen"), line.at(math.log2(planned))[0]
    behind = f", {scenes:,} scenes" if scenes else ""
    return (
        f"the NMSE of the training scenes stands at {level:.3g} (+-{error:.2g}) at step {run.step:,}{behind}; from step"
        f" {sight.steps[0]:,.0f} on it changes by {line.slope:+.2g} (+-{line.slope_error:.2g}) in each doubling of the"
        f" steps, which makes {last:.3g} at the end of the run, step {planned:,}. {figure.name.capitalize()} on the"
        f" network's own inputs has {figure.nmse:.3g} without a network, the constant answer {figure.constant:.3g}."
    )
