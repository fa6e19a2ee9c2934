"""Preflight of dense targets against their own labels: R is made of the scene's sources, by the array of the task.

Legend: B batch, N RIS elements, K sources (padded).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ris_fast.data.fit_array import Labels, fit_array, fit_of, fits_of
from ris_fast.data.geometry import EXACT, leading_factor
from ris_fast.data.npz_load import APART
from ris_fast.health.causes import CAUSES
from ris_fast.health.finding import Finding
from ris_fast.health.preflight.distributions import UNITS
from ris_fast.health.preflight.pairing import belonging, with_factor
from ris_fast.health.preflight.probe import FEWEST, PreflightContext
from ris_fast.physics.array import RISArray
from ris_fast.physics.real_complex import conj

LOOSE = 0.02  # mean NMSE above which the array itself is in doubt; element jitter of 0.05 reaches 0.008
FITS = 0.05  # NMSE of one R on sources that are its own, where elements moved
BETTER = 0.3  # of the NMSE as read: what an explanation has to reach
ALIKE = 1.5  # of the NMSE with which one explanation fits: another one fits as well
EXAMINED, TRIED = 256, 8  # scenes; of these, with the sources of every other
# scenes; share of a vector's energy that is a product, from which it is a wave: 1, numbers in any order 0.4
CLEAREST, PRODUCT = 16, 0.7

LIMIT, CLOSE = 1.1, 0.05  # times the limits of the task, since positions may be of another origin; relative


def targets(context: PreflightContext) -> Iterator[Finding]:
    """The NMSE of every R on its own sources, as the reader measured it, and where it is bad, why."""
    source = context.trainer.source
    if not hasattr(source, "target_fit"):  # targets are made from their sources there
        return
    fits = {split: source.target_fit(split) for split in ("train", "val")}
    context.note = (
        f"NMSE median {float(fits['train'].median()):.2g}, largest {max(float(fit.max()) for fit in fits.values()):.2g}"
    )
    for split, fit in fits.items():
        apart = fit > APART
        if float(fit.mean()) > LOOSE or int(apart.sum()) >= max(FEWEST, 0.01 * len(fit)):
            finding = _explained(context, split, fit, apart)
            if finding is not None:
                yield finding
                return


def _explained(context: PreflightContext, split: str, fit: Tensor, apart: Tensor) -> Finding | None:
    """Why R does not fit: by an explanation that makes it fit, or by what it fits instead."""
    source, task = context.trainer.source, context.config.task
    everywhere = Labels.of(*source.labels(split, _spread(torch.arange(len(fit)))))
    if not bool(apart.any()):
        return _other_array(task, everywhere, every_size=True)
    rows, array = _spread(apart.nonzero()[:, 0]), RISArray.of(task)
    labels = Labels.of(*source.labels(split, rows))
    now = float(fit_of(array, labels).median())
    seen = (
        f"in {int(apart.sum())} of {len(fit)} {split} scenes R is not made of the scene's own sources: NMSE of R on"
        f" them {now:.2g} at the median, {float(fit.max()):.2g} at most"
    )
    others = fit[~apart]
    healthy = 2 * float(others.median()) if len(others) >= FEWEST else 0.0  # elements that move far leave more
    return (
        _undone(source, split, rows, labels, seen, min(max(FITS, healthy), BETTER * now))
        or _other_array(task, everywhere, every_size=False)
        or _other_rows(context, split, rows, labels, seen)
        or _other_array(task, everywhere, every_size=True)
        or _no_rows(context, split, rows, labels, seen)
    )


def _undone(source: Any, split: str, rows: Tensor, labels: Labels, seen: str, enough: float) -> Finding | None:
    """The mistake without which R fits, and the other sign that fits as well: from afar a conjugate is a source on the
    other side."""
    array = RISArray.of(source.task)
    tried = [
        (float(fit_of(array, other).median()), each, how)
        for each, how, other in _alternatives(source, split, rows, labels)
    ]
    best = min(tried, key=lambda each: each[0])
    if best[0] > enough:
        return None
    then, (cause, advice), how = best
    for other_fit, (other, other_advice), other_how in tried:
        if (
            {cause, other} == {"conjugation_error", "wrong_layout"}
            and other_fit < min(enough, ALIKE * then + EXACT)
            and "negated" in how + other_how
        ):
            return Finding(
                cause,
                f"{seen}; {how} it is {then:.2g}, {other_how} {other_fit:.2g}: one of the two has the other sign.",
                advice=f"{advice or CAUSES[cause].fix} Or: {other_advice or CAUSES[other].fix}",
            )
    return Finding(cause, f"{seen}; {how} it is {then:.2g}.", advice=advice)


def _spread(rows: Tensor) -> Tensor:
    """Some of these, at even distances."""
    return rows[torch.linspace(0, len(rows) - 1, min(EXAMINED, len(rows))).long()]


def _alternatives(
    source: Any, split: str, rows: Tensor, labels: Labels
) -> Iterator[tuple[tuple[str, str], str, Labels]]:
    """Mistakes that would explain the misfit, each undone: (cause, advice), in words, the labels then."""
    yield ("conjugation_error", ""), "with the conjugate of R", replace(labels, covariance=conj(labels.covariance))
    yield (
        ("wrong_layout", ""),
        "with azimuth and elevation exchanged",
        replace(labels, azimuth=labels.elevation, elevation=labels.azimuth),
    )
    for negated in (("azimuth",), ("elevation",), ("azimuth", "elevation")):
        name = " and ".join(negated)
        yield (
            (
                "wrong_layout",
                (
                    f"Write the {name} in ptr with the other sign: the phase of element (x, y) is k (u x + v y) for u ="
                    " sin(azimuth) cos(elevation), v = sin(elevation)."
                ),
            ),
            f"with the {name} negated",
            replace(labels, **{each: -getattr(labels, each) for each in negated}),
        )
    for step in (1, -1):
        neighbours = source.labels(split, (rows + step) % source.size(split))[2]
        yield (
            ("shuffled_labels", ""),
            f"with the R of the scene {'after' if step == 1 else 'before'} it",
            replace(labels, covariance=neighbours),
        )


def _other_array(task: Any, labels: Labels, *, every_size: bool) -> Finding | None:
    """The settings of the task that are not the files', by the array that fits them."""
    own = RISArray.of(task)
    now, found = float(fit_of(own, labels).mean()), fit_array(own, labels, every_size=every_size)
    if found is None or now < LOOSE:
        return None
    array, layout = found.array, found.layout
    values = {
        "ris_horizontal": array.horizontal,
        "ris_vertical": array.vertical,
        "wavelength_m": array.wavelength_m,
        "spacing_wavelengths": found.spacing_wavelengths,
        "wavefront": array.wavefront,
    }
    other = {name: value for name, value in values.items() if _differs(value, getattr(task, name))}
    fits = " and ".join(f"task.{name} = {_short(value)}" for name, value in other.items())
    said = " and ".join(_short(getattr(task, name)) for name in other)
    order = "the elements numbered with the vertical index fastest" if layout.vertical_fastest else ""
    evidence = (
        f"{' and '.join(filter(None, (fits, order)))} {'fits' if len(other) + bool(order) == 1 else 'fit'} these files"
        f" (NMSE of R on its own sources {found.fit:.2g});"
        f" {f'the task says {said}' if said else 'the reader takes the horizontal one'} ({now:.2g})."
    )
    if order:
        return Finding(
            "wrong_layout",
            evidence,
            advice="Write y, H_full, codes and R with the horizontal index fastest (n = j N_H + i)."
            + (f" Then {_settings(other)}." if other else ""),
        )
    if (unit := _unit_of_ranges(task, labels, other)) is not None:
        name, factor = unit
        return Finding(
            "wrong_units",
            f"the ranges of these files, {float(labels.range_m[labels.active].max()):.4g} at most, are in {name}: so"
            " read they lie where the task says, and R fits its own sources"
            f" (NMSE {found.fit:.2g}; in metres {now:.2g}).",
            advice=f"Write the ranges of ptr in metres: times {factor:g}.",
        )
    return Finding("task_differs", evidence, advice=f"{_settings(other).capitalize()}.")


def _unit_of_ranges(task: Any, labels: Labels, other: dict[str, Any]) -> tuple[str, float] | None:
    """The unit, and times what it gives metres, in which ranges are where the task says and the wavelength too: the
    curvature of a wave is that of their ratio alone."""
    if list(other) != ["wavelength_m"]:
        return None
    ranges, limits = labels.range_m[labels.active], (task.range_min_m, task.range_max_m)
    for name, factor in UNITS[1].items():
        inside = [
            (limits[0] / LIMIT <= scale * ranges) & (scale * ranges <= limits[1] * LIMIT) for scale in (1.0, factor)
        ]
        if abs(factor * other["wavelength_m"] / task.wavelength_m - 1) < CLOSE and bool(
            inside[1].all() > inside[0].all()
        ):
            return name, factor
    return None


def _differs(value: Any, own: Any) -> bool:
    return abs(value - own) > 1e-9 * abs(own) if isinstance(value, float) else value != own


def _short(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _settings(values: dict[str, Any]) -> str:
    return "give " + " ".join(f"--set task.{name}={_short(value)}" for name, value in values.items())


def _other_rows(context: PreflightContext, split: str, rows: Tensor, labels: Labels, seen: str) -> Finding | None:
    """R or the positions are another scene's: by a scene whose positions fit, or by an R that is made like sources but
    not of its snapshots."""
    array = RISArray.of(context.config.task)
    hits = _fitting(array, labels)
    # The same with mirrored positions, which are nobody's: what a small array lets fit by chance.
    apart = hits > 0.25 + _fitting(array, replace(labels, azimuth=-labels.azimuth, elevation=-labels.elevation))
    scenes, whose = with_factor(context.trainer.source.batch(split, rows)), "R or the positions belong"
    if scenes.channel is not None:
        found = belonging(scenes, context.config.task.symbols == "static")
        apart, whose = (
            apart or found.mixed_up and _made_of_sources(array, labels),
            "R belongs" if found.mixed_up else "R belongs to its snapshots, and the positions (ptr) belong",
        )
    how = f", and {hits:.0%} of some of them fit the positions of another scene" if hits > 0.25 else ""
    return Finding("shuffled_labels", f"{seen}{how}: {whose} to another scene.") if apart else None


def _no_rows(context: PreflightContext, split: str, rows: Tensor, labels: Labels, seen: str) -> Finding | None:
    """R is made of no sources that this array could see, and is not that of its snapshots either, unlike where elements
    moved far."""
    scenes = with_factor(context.trainer.source.batch(split, rows))
    if scenes.channel is None or not belonging(scenes, context.config.task.symbols == "static").mixed_up:
        return None
    return Finding(
        "parts_unrelated",
        f"{seen}; R is made of no scene's sources: it is no sum over waves of this array, nor of another spacing,"
        " wavelength or size, and does not belong to its snapshots either.",
        advice=(
            "Look at how R is made: the order of its elements must be that of H_full and codes, its array and"
            " wavelength those of the task."
        ),
    )


def _made_of_sources(array: RISArray, labels: Labels) -> bool:
    """Whether the strongest source of the clearest R is a wave: a product of a row and a column over the array,
    nearly. Not known of elements that are in no rows and columns."""
    if not array.grid:
        return False
    vector = torch.view_as_complex(leading_factor(labels.covariance, labels.active.shape[1]))
    strength = vector.abs().square().sum(1)
    clearest = (strength[:, 0] / strength.sum(1)).topk(min(CLEAREST, len(strength)))[1]
    values = torch.linalg.svdvals(vector[clearest, :, 0].unflatten(1, (array.vertical, array.horizontal))).square()
    return float((values[:, 0] / values.sum(1)).median()) > PRODUCT


def _fitting(array: RISArray, labels: Labels) -> float:
    """Share of some scenes whose R is made of the sources of any of the others."""
    few = range(min(TRIED, len(labels.covariance)))
    pairs = (
        fits_of(array, replace(labels, covariance=labels.covariance[row].expand_as(labels.covariance))) for row in few
    )
    return sum(float(torch.stack(each).min()) < FITS for each in pairs) / len(few)


CHECKS = {"targets are made of their own sources": targets}
