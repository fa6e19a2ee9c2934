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


class Ratio(NamedTuple):
    """A metric as a ratio of two sums over scenes, or its square root: what a bootstrap over scenes resamples."""

    above: Tensor  # (B,)
    below: Tensor  # (B,)
    root: bool = False

    def value(self) -> float:
        """NaN where no scene counts."""
        value = (self.above.sum() / self.below.sum()).item()
        return value**0.5 if self.root else value


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


def ratios(scores: Scores, sources: Tensor, *, all_ranges: bool = True) -> dict[str, Ratio]:
    """The metrics of some of the true sources, each a ratio of sums over scenes.

    RMSE, CRB (root mean square of its deviations) and their ratio are of the sources that are matched within WIDE, the
    latter two of those whose bound is finite; with `resolvable_` in front, of those of them that are resolvable. There
    the ratio can be read: of a source whose bound is wider than the tolerance, matching keeps lucky estimates only, and
    few such sources decide a root mean square. Precision and the share of scenes whose number of sources is right
    belong to whole scenes, and are left out where `sources` are those of some ranges only.
    Args: sources: (B, K) bool.
    """
    sources = sources & scores.true
    matched = sources & scores.wide
    found = {"recall_wide": Ratio(_sum(matched), _sum(sources))}
    found["recall_narrow"] = Ratio(_sum(sources & scores.narrow), _sum(sources))
    bounded = sources & scores.bound.isfinite().all(-1)
    for name, tolerance in (("wide", WIDE), ("narrow", NARROW)):
        found[f"bound_recall_{name}"] = Ratio(_sum(bounded * chance_within(scores.bound, tolerance)), _sum(bounded))
    if all_ranges:
        whole = sources.any(1)
        found["precision_wide"] = Ratio(_sum(matched), whole * scores.estimated.double())
        found["precision_narrow"] = Ratio(_sum(sources & scores.narrow), whole * scores.estimated.double())
        found["count_right"] = Ratio((whole & (scores.estimated == scores.count)).double(), whole.double())
    found["share_resolvable"] = Ratio(_sum(sources & scores.resolvable), _sum(sources))
    found["resolvable_recall"] = Ratio(_sum(matched & scores.resolvable), _sum(sources & scores.resolvable))
    return found | _errors(scores, matched) | _errors(scores, matched & scores.resolvable, "resolvable_")


def _errors(scores: Scores, matched: Tensor, prefix: str = "") -> dict[str, Ratio]:
    bounded = matched & scores.bound.isfinite().all(-1)
    square, least = (each.square().nan_to_num() for each in (scores.error, scores.bound))
    found = {}
    for index, name in enumerate(COORDINATES):
        ours, theirs = _sum(bounded * square[..., index]), _sum(bounded * least[..., index])
        found[f"{prefix}rmse_{name}"] = Ratio(_sum(matched * square[..., index]), _sum(matched), root=True)
        found[f"{prefix}crb_{name}"] = Ratio(theirs, _sum(bounded), root=True)
        found[f"{prefix}rmse_over_crb_{coordinate(name)}"] = Ratio(ours, theirs, root=True)
    return found


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


def _sum(values: Tensor) -> Tensor:
    return values.double().sum(1)


def _exact(sources: Sources) -> Sources:
    return Sources(*(each.detach().cpu().double() for each in sources[:4]), sources.count.cpu())
