"""Rules of `watch` on windows of a series: those of evaluation that overlap those of training, series without an order,
and targets that are part of the window.

None is certain: what a series is meant to be is not known here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import finding
from ris_fast.health.watch.loss_records import LossRecord
from ris_fast.health.watch.pass_records import PassRecord
from ris_fast.health.watch.records import EARLY
from ris_fast.health.watch.scenes import RICH, rows_of

WINDOW, SHARED, NO_ORDER = 6, 0.3, 0.05  # least length of a window; share of windows; correlation of neighbours


def windows_overlap(trained: list[PassRecord], evaluated: list[PassRecord]) -> Iterator[Finding]:
    """Windows of evaluation are made of numbers that windows of training have at other places."""
    one, other = series_of(trained), series_of(evaluated)
    if len(one) < 64 or len(other) < 16:
        return
    known = {each for row in _triples(one) for each in row}
    whole = set(rows_of(one))
    rows = [row for row, own in zip(_triples(other), rows_of(other)) if row and own not in whole]
    within = sum(2 * sum(each in known for each in row) > len(row) for row in rows)
    if len(rows) >= 16 and within > SHARED * len(rows):
        yield finding(
            "split_overlap",
            f"{within} of {len(rows)} windows that are evaluated, of those that were looked at, have most of their"
            " numbers in common with windows that are trained on.",
            evaluated[0].step,
            "The training set may be evaluated on purpose.",
            "Windows that overlap are no scenes of their own: split the series by time first, then cut each part.",
        )


def windows_without_order(trained: list[PassRecord]) -> Iterator[Finding]:
    """Windows overlap, as they do that are cut from one series, and neighbours in them have nothing to do with each
    other."""
    rows = series_of(trained)
    if len(rows) < 4 * 64:
        return
    numbers = (rows - rows.mean()).double()
    near = [float((numbers[:, lag:] * numbers[:, :-lag]).mean() / numbers.square().mean()) for lag in (1, 2, 3)]
    if overlap_within(rows) and max(map(abs, near)) < max(NO_ORDER, 3 / len(rows.unique()) ** 0.5):
        yield finding(
            "inputs_withhold_answer",
            f"inputs are windows of one series, which overlap, and neighbours in it have a correlation of"
            f" {near[0]:.2g}: what comes next does not follow from what was before.",
            trained[0].step + 1,
            "A series of increments, or of noise, is like that; one that was shuffled before windows were cut, too.",
            "Cut windows from the series in its order of time, and shuffle the windows.",
        )


def target_among_inputs(
    losses: Sequence[LossRecord], passes: dict[int, PassRecord], trained: Sequence[PassRecord]
) -> Iterator[Finding]:
    """Of windows of a series the one number that is asked for is one of those that the model is given, always the
    same."""
    found: set[int] | None = None
    count = 0
    for each in losses:
        one, asked = passes.get(each.number), each.targets
        if one is None or asked is None or asked.whole or asked.few is None or one.input is None:
            continue
        given, wanted = one.input, asked.few
        if wanted.shape[1] != 1 or len(given) != len(wanted) or len(wanted.unique()) < min(RICH, len(wanted)):
            continue
        near = (given - wanted).abs() <= 1e-3 * wanted.abs().amax()
        same = set(near.all(0).nonzero()[:, 0].tolist())
        found, count = same if found is None else found & same, count + 1
    if found and count >= EARLY and overlap_within(series_of(trained)):
        yield finding(
            "shuffled_labels",
            f"inputs are windows of a series, and the target of each is number {min(found) + 1} of the window itself,"
            f" in all {count} batches that were looked at: the model can copy it.",
            1,
            "A model that is to pass a number on looks like that.",
            "Ask for what comes after the inputs: of a window of n numbers from t on the number at t + n.",
        )


def series_of(passes: Sequence[PassRecord]) -> Tensor:
    """(N, F) different windows of a series; without any where inputs are none, or have few different numbers."""
    windows = [each for each in passes if each.keys is not None and max(each.shape[1:], default=0) >= WINDOW]
    windows = [each for each in windows if math.prod(each.shape[1:]) == max(each.shape[1:]) <= each.keys.shape[1]]
    windows = [each for each in windows if each.keys.shape[1] == windows[0].keys.shape[1]]
    rows = torch.cat([each.keys for each in windows]).unique(dim=0) if windows else torch.zeros(0, 0)
    return rows if len(rows) and len(rows.unique()) > 64 else rows[:0]


def overlap_within(rows: Tensor) -> bool:
    """Whether most numbers are in several windows."""
    met = Counter(each for row in _triples(rows) for each in set(row))
    return 2 * sum(count > 1 for count in met.values()) > len(met)


def _triples(rows: Tensor) -> list[list[bytes]]:
    """Of each row all three numbers in a row that differ, as 12 bytes."""
    found = []
    for row in rows:
        kept, varied = row.numpy().tobytes(), ((row[:-2] != row[1:-1]) & (row[1:-1] != row[2:])).tolist()
        found.append([kept[4 * n : 4 * n + 12] for n, each in enumerate(varied) if each])
    return found
