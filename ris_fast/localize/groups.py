"""Scores by SNR, number of sources and range: which scenes and sources a group has, and its metrics.

Legend: B batch, K true sources (padded).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ris_fast.localize.bootstrap import Bootstrap
from ris_fast.localize.metrics import WHOLE_SCENES, Metrics, Scores, medians

SNR_BIN_DB = 5.0
RANGE_EDGES_M = (0.5, 2.0, 5.0, 10.0)  # and what is nearer or farther than these, where it occurs


class Group(NamedTuple):
    """Some of the true sources of all scenes."""

    label: dict[str, Any]  # of `snr_db` (from, to), `sources` and `range_m` (from, to) those that it is split by
    sources: Tensor  # (B, K) bool

    def has(self, metric: str) -> bool:
        """Whether a metric means something here: those of whole scenes need all sources of a scene."""
        return metric not in WHOLE_SCENES or "range_m" not in self.label


def snr_bins(snr_db: Tensor) -> tuple[Tensor, list[tuple[float, float]]]:
    """The bin of each scene, (B,) int64, and the ends of the bins in dB; the last one keeps its upper end."""
    first = math.floor(snr_db.min().item() / SNR_BIN_DB)
    last = max(first, math.ceil(snr_db.max().item() / SNR_BIN_DB) - 1)
    bins = (snr_db / SNR_BIN_DB).floor().clamp(first, last).to(torch.int64) - first
    return bins, [(each * SNR_BIN_DB, (each + 1) * SNR_BIN_DB) for each in range(first, last + 1)]


def range_bins(range_m: Tensor, true: Tensor) -> tuple[Tensor, list[tuple[float, float]]]:
    """The bin of each source, (B, K) int64, and the ends of the bins in metres."""
    near, far = (each.item() for each in range_m[true].double().aminmax())
    inner = [edge for edge in RANGE_EDGES_M if near < edge < far]
    low = max([edge for edge in RANGE_EDGES_M if edge <= near], default=near)
    high = min([edge for edge in RANGE_EDGES_M if edge >= far], default=far)
    edges = [low, *inner, high]
    bins = torch.bucketize(range_m.double(), torch.tensor(inner, dtype=torch.float64), right=True)
    return bins, list(zip(edges, edges[1:]))


def groups(true: Tensor, snr_db: Tensor, range_m: Tensor) -> Iterator[Group]:
    """All, the margins by SNR, number of sources and range, and SNR x number x range, without and with range.

    Groups without a source are left out. Args: true, range_m: (B, K); snr_db: (B,). All on the CPU.
    """
    (by_snr, snrs), (by_range, ranges) = snr_bins(snr_db), range_bins(range_m, true)
    count = true.sum(1)
    axes = {
        "snr_db": [(ends, (by_snr == each)[:, None]) for each, ends in enumerate(snrs)],
        "sources": [(each, (count == each)[:, None]) for each in count.unique().tolist()],
        "range_m": [(ends, by_range == each) for each, ends in enumerate(ranges)],
    }
    for split in ((), ("snr_db",), ("sources",), ("range_m",), ("snr_db", "sources"), tuple(axes)):
        for cell in product(*(axes[name] for name in split)):
            sources = true
            for _, chosen in cell:
                sources = sources & chosen
            if sources.any():
                yield Group({name: label for name, (label, _) in zip(split, cell)}, sources)


def group_scores(scores: Scores, split: Sequence[Group], bootstrap: Bootstrap | None) -> list[dict[str, Any]]:
    """Of each group its label, `scenes`, `true_sources`, `matched`, `metrics`, and `intervals` of those that are ratios
    of sums and say something of the estimates; no intervals without a bootstrap.

    Precision and the share of scenes whose number of sources is right are left out of groups by range."""
    metrics, found = Metrics(scores), []
    for group in split:
        ratios = metrics.of(group.sources)
        values = ratios.values() | medians(scores, group.sources)
        intervals = {} if bootstrap is None else bootstrap.intervals(ratios)
        found.append(
            group.label
            | {
                "scenes": len(ratios.scenes),
                "true_sources": int(group.sources.sum()),
                "matched": int((group.sources & scores.wide).sum()),
                "metrics": {name: value for name, value in values.items() if group.has(name)},
                "intervals": {name: ends for name, ends in intervals.items() if group.has(name) and _estimated(name)},
            }
        )
    return found


def _estimated(name: str) -> bool:
    """Whether a metric is of the estimates, not of the bound."""
    return not name.removeprefix("resolvable_").startswith(("bound_", "share_", "crb_"))


def of_axis(entries: Sequence[dict[str, Any]], *axes: str) -> list[dict[str, Any]]:
    """Those entries of `group_scores` that are split by exactly these axes."""
    split = {"snr_db", "sources", "range_m"}
    return [entry for entry in entries if split & entry.keys() == set(axes)]
