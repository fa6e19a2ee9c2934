"""Errors, recall, precision and distance from the Cramer-Rao bound of estimated sources, scene by scene.

Angles leave this file in degrees, ranges and positions in metres.

Legend: B batch, K true sources (padded), C = 4 coordinates: azimuth, elevation, range, position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.localize.matching import NARROW, WIDE, match
from ris_fast.localize.sources import Deviations, Sources

COORDINATES = ("azimuth_deg", "elevation_deg", "range_m", "position_m")
WHOLE_SCENES = ("precision_wide", "precision_narrow", "count_right")
RESOLVABLE = 3.0  # standard deviations
MEDIAN_OF_NORMAL = 0.6745  # median of |x| for a standard normal x


class Scores(NamedTuple):
    """Estimated sources beside the true ones, and what the bound promises. All on the CPU, float64 where not said."""

    true: Tensor  # (B, K) bool     where there is a source
    estimated: Tensor  # (B,) int64      number of estimates
    wide: Tensor  # (B, K) bool     sources matched within WIDE
    narrow: Tensor  # (B, K) bool     sources matched within NARROW, by an assignment of its own
    error: Tensor  # (B, K, C)       of sources matched within WIDE, NaN elsewhere; position is a distance
    bound: Tensor  # (B, K, C)       standard deviations of the bound, NaN where it is not known or not finite

    @property
    def count(self) -> Tensor:
        """True number of sources, (B,) int64."""
        return self.true.sum(1)

    @property
    def resolvable(self) -> Tensor:
        """Sources that an efficient estimator would have within WIDE nearly always, whatever it did: (B, K) bool, where
        RESOLVABLE standard deviations of the bound are within it in each coordinate."""
        return self.true & (RESOLVABLE * self.bound[..., :3] <= torch.tensor(WIDE).double()).all(-1)


class Ratios(NamedTuple):
    """Metrics as ratios of two sums over scenes, or as roots of such: what a bootstrap over scenes resamples."""

    names: tuple[str, ...]
    above: Tensor  # (J, B')
    below: Tensor  # (J, B')
    root: Tensor  # (J,) bool
    scenes: Tensor  # (B',) int64  numbers of the scenes

    def values(self) -> dict[str, float]:
        """By name; NaN where no scene counts."""
        value = self.above.sum(1) / self.below.sum(1)
        return dict(zip(self.names, torch.where(self.root, value.sqrt(), value).tolist()))


def score(estimate: Sources, truth: Sources, bound: Deviations | None = None) -> Scores:
    """Matches estimates to the truth within both tolerances and takes the errors of those matched within WIDE.

    Args: estimate and truth of the same scenes; the order of sources in a scene carries no meaning.
        bound: standard deviations of the Cramer-Rao bound, one for each true source.
    """
    wide, narrow = match(estimate, truth, WIDE), match(estimate, truth, NARROW) >= 0
    estimate, truth = _exact(estimate), _exact(truth)
    row = wide.clamp_min(0)
    found = Sources(*(each.gather(1, row) for each in estimate[:4]), estimate.count)
    distance = (found.cartesian() - truth.cartesian()).norm(dim=-1)
    differences = [ours - theirs for ours, theirs in zip(found[:3], truth[:3])]
    error = torch.stack((differences[0].rad2deg(), differences[1].rad2deg(), differences[2], distance), dim=-1)
    matched = wide >= 0
    return Scores(
        true=truth.active,
        estimated=estimate.count,
        wide=matched,
        narrow=narrow,
        error=error.masked_fill(~matched[..., None], torch.nan),
        bound=torch.full_like(error, torch.nan) if bound is None else bound_of(bound, truth),
    )


def bound_of(bound: Deviations, truth: Sources) -> Tensor:
    """Standard deviations (B, K, C) of azimuth, elevation, range and position at the true sources.

    Model: azimuth, elevation and range are orthogonal coordinates with scale factors r cos(elevation), r and 1, so that
        E |dp|^2 = r^2 cos^2(elevation) Var(azimuth) + r^2 Var(elevation) + Var(r), whatever their correlations.
    """
    truth, (azimuth, elevation, range_m) = _exact(truth), (each.detach().cpu().double() for each in bound[:3])
    across = truth.range_m * torch.hypot(truth.elevation.cos() * azimuth, elevation)
    deviations = torch.stack((azimuth.rad2deg(), elevation.rad2deg(), range_m, torch.hypot(across, range_m)), dim=-1)
    known = truth.active & deviations.isfinite().all(-1) & (deviations > 0).all(-1)
    return deviations.masked_fill(~known[..., None], torch.nan)


class Metrics:
    """The metrics that are ratios of sums, of any of the true sources.

    RMSE, CRB (root mean square of its deviations) and their ratio are of the sources that are matched within WIDE, the
    latter two of those whose bound is finite; with `resolvable_` in front, of those of them that are resolvable. There
    the ratio can be read: of a source whose bound is wider than the tolerance, matching keeps lucky estimates only, and
    few such sources decide a root mean square. `bound_recall` is that of an efficient unbiased estimator.
    """

    def __init__(self, scores: Scores) -> None:
        self.names: list[str] = []
        self.roots: list[bool] = []
        above, below, true = [], [], scores.true

        def add(name: str, over: Tensor, under: Tensor, root: bool = False) -> None:
            self.names.append(name)
            self.roots.append(root)
            above.append(over.double())
            below.append(under.double())

        bounded = true & scores.bound.isfinite().all(-1)
        first = true & (torch.arange(true.shape[1]) == 0)  # what a scene has once is counted at its first source
        estimates = first * scores.estimated[:, None]
        for name, tolerance, matched in (("wide", WIDE, scores.wide), ("narrow", NARROW, scores.narrow)):
            add(f"recall_{name}", matched, true)
            add(f"bound_recall_{name}", bounded * chance_within(scores.bound, tolerance), bounded)
            add(f"precision_{name}", matched, estimates)
        add("count_right", first & (scores.estimated == scores.count)[:, None], first)
        add("share_resolvable", scores.resolvable, true)
        add("resolvable_recall", scores.resolvable & scores.wide, scores.resolvable)
        square, least = (each.square().nan_to_num() for each in (scores.error, scores.bound))
        for prefix, matched in (("", scores.wide), ("resolvable_", scores.wide & scores.resolvable)):
            both = matched & bounded
            for index, name in enumerate(COORDINATES):
                ours, theirs = square[..., index], both * least[..., index]
                add(f"{prefix}rmse_{name}", matched * ours, matched, root=True)
                add(f"{prefix}crb_{name}", theirs, both, root=True)
                add(f"{prefix}rmse_over_crb_{coordinate(name)}", both * ours, theirs, root=True)
        self.above, self.below = torch.stack(above), torch.stack(below)  # (J, B, K)

    def of(self, sources: Tensor) -> Ratios:
        """Those of some of the true sources, (B, K) bool; the metrics of `WHOLE_SCENES` mean something where these are
        all sources of their scenes."""
        scenes = sources.any(1).nonzero()[:, 0]
        here = sources[scenes].double()
        above, below = ((each[:, scenes] * here).sum(2) for each in (self.above, self.below))
        return Ratios(tuple(self.names), above, below, torch.tensor(self.roots), scenes)


def chance_within(bound: Tensor, tolerance: Sequence[float]) -> Tensor:
    """Probability that normal errors with the deviations (B, K, C) of the bound are within (azimuth deg, elevation deg,
    range m), each coordinate for itself: (B, K), zero where the bound is not known.

    The recall that an efficient unbiased estimator can be expected to have. Knowing the box of the task helps beyond
    it, where the bound is wide."""
    limits = torch.tensor(tolerance, dtype=torch.float64)
    return (limits / bound[..., :3] / 2.0**0.5).erf().prod(-1).nan_to_num(0.0)


def medians(scores: Scores, sources: Tensor) -> dict[str, float]:
    """Median |error| of the sources matched within WIDE, and median of |error| / sd in units of the normal law's.

    The latter is 1 where errors are as the bound says, and far fewer sources than for the root mean square decide it.
    It is left out for positions, which are distances.
    """
    matched = sources & scores.wide
    error, bound = scores.error[matched].abs(), scores.bound[matched]
    found = {f"median_{name}": _median(error[:, index]) for index, name in enumerate(COORDINATES)}
    for index, name in enumerate(COORDINATES[:3]):
        relative = error[:, index] / bound[:, index]
        found[f"median_over_crb_{coordinate(name)}"] = _median(relative[relative.isfinite()]) / MEDIAN_OF_NORMAL
    return found


def confusion(scores: Scores) -> Tensor:
    """Scenes by true (rows, from 1) and estimated (columns, from 0) number of sources: (K, E + 1) int64."""
    rows, columns = scores.true.shape[1], int(max(scores.estimated.max(), scores.true.shape[1])) + 1
    there = scores.count > 0
    cell = (scores.count[there] - 1) * columns + scores.estimated[there]
    return torch.bincount(cell, minlength=rows * columns).view(rows, columns)


def coordinate(name: str) -> str:
    """`azimuth_deg` -> `azimuth`"""
    return name.rsplit("_", 1)[0]


def _median(values: Tensor) -> float:
    return values.quantile(0.5).item() if values.numel() else float("nan")


def _exact(sources: Sources) -> Sources:
    return Sources(*(each.detach().cpu().double() for each in sources[:4]), sources.count.cpu())
