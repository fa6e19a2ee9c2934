"""Preflight of the labels of a scene against its target: as many sources as columns, where the columns say they are,
and as strong.

Model: column k of the factor is sqrt(p_k) a(azimuth_k, elevation_k, range_k). Sources are a set: columns and labels may
    come in different orders.
Legend: B batch, N RIS elements, K sources (padded).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.probe import AFTERWARDS, FEWEST, PreflightContext
from ris_fast.health.preflight.scenes import all_scenes
from ris_fast.physics.array import RISArray, steering
from ris_fast.physics.real_complex import conj, to_complex
from ris_fast.physics.scenes import Scenes

LOOKED_AT = 128  # scenes of each split
OTHER_COUNTS = 0.05  # share of the scenes
FITS, MANY = 0.95, 0.2  # likeness of a column and its source's wave; share of the sources below it
SOME = 0.04  # share of the sources below it, where all others fit exactly
EXACT, MANY_VALUES = 0.9999, 4  # likeness of a wave to its own column; sources for each value of a place
EXPLAINED = 0.5  # of the sources that do not fit, which an explanation makes fit
PROPORTIONAL = 0.05  # relative spread of power over squared column norm within a scene
COUNTED = ("count", "angle", "range", "chamfer", "contrast")  # terms that read the count
LOCATED = ("angle", "range", "chamfer")


def labels_of_targets(context: PreflightContext) -> Iterator[Finding]:
    """Counts, places and powers of the sources are those that the target is made of, where it is kept by its"
    " columns."""
    sets = {"training": all_scenes(context), "validation": context.validation, AFTERWARDS: context.later}
    for what, whole in sets.items():
        scenes = context.scenes[:0] if whole is None else whole[:LOOKED_AT]
        if scenes.factor is None or scenes.batch < FEWEST or not bool(scenes.factor.isfinite().all()):
            return
        finding = _counts(context, what, scenes) or _places(context, what, scenes) or _powers(what, scenes)
        if finding is not None:
            yield finding
            return


def _columns(scenes: Scenes) -> Tensor:
    """Which columns of the target are sources, (B, K)."""
    size = scenes.factor.square().sum((1, 3))
    return size > 1e-6 * size.amax(1, keepdim=True)


def _counts(context: PreflightContext, what: str, scenes: Scenes) -> Finding | None:
    """As many sources as the target has columns."""
    columns = _columns(scenes).sum(1)
    if scenes.power is not None and not torch.equal((scenes.power > 0).sum(1), columns):
        return None  # the columns are not the sources one by one
    off = scenes.count != columns
    if not float(off.float().mean()) > OTHER_COUNTS:
        return None
    seen = (
        f"in {int(off.sum())} of {scenes.batch} {what} scenes the count of sources is not that of the target's columns"
    )
    used = any(context.loss.weights.get(name, 0.0) > 0 for name in COUNTED)
    apart = (scenes.count - columns)[off]
    if torch.equal(scenes.count.sort()[0], columns.sort()[0]):
        return Finding(
            "shuffled_labels",
            f"{seen}; as often as in the targets, but in other scenes: it is another scene's.",
            certain=used,
        )
    how = (
        f"it is {abs(int(apart[0]))} too {'high' if int(apart[0]) > 0 else 'low'} in each of them, as where counting"
        " starts"
        " at another number"
        if bool((apart == apart[0]).all())
        else f"it is off by {int(apart.min())} to {int(apart.max())}"
    )
    return Finding(
        "parts_unrelated",
        f"{seen}: {how}.",
        advice="Count the sources of a scene from 1: count is the number of columns of its target that are not zero.",
        certain=used,
    )


# ---- places --------------------------------------------------------------------------------------------------------


def likeness(array: RISArray, scenes: Scenes) -> Tensor:
    """Of each source of each scene, how much of its wave the column that is most like it is made of: (S,) in [0, 1]."""
    active = _columns(scenes)
    reach = torch.where(active, scenes.range_m, 1.0).clamp_min(1e-3)
    waves = to_complex(
        steering(array, *(torch.where(active, each, 0.0) for each in (scenes.azimuth, scenes.elevation)), reach)
    )
    target = to_complex(scenes.factor)
    target = target / target.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.einsum("bkn,bnq->bkq", waves.conj(), target).abs().square().amax(2)[active]


def _places(context: PreflightContext, what: str, scenes: Scenes) -> Finding | None:
    """Each source's place is that of a column."""
    if scenes.azimuth is None or scenes.elevation is None or scenes.range_m is None:
        return None
    active = _columns(scenes)
    if scenes.azimuth.shape[1] != scenes.factor.shape[2]:
        return None
    if bool((bare := (active & ~(scenes.range_m > 0)).any(1)).any()):
        return (
            Finding(
                "parts_unrelated",
                f"in {int(bare.sum())} of {scenes.batch} {what} scenes a column of the target has a source without a"
                " range:"
                " the ranges are another scene's, or in another order than the columns.",
                certain=_used(context),
            )
            if context.trainer.source.endless
            else None
        )
    array = RISArray.of(context.config.task)
    if array.elements != scenes.factor.shape[1]:
        return None
    found = likeness(array, scenes)
    wrong = found < FITS
    if (rounded := _rounded(what, scenes, active, found)) is not None and context.trainer.source.endless:
        return rounded
    share = float(wrong.float().mean())
    if not (share > MANY or share > SOME and float(found[~wrong].median()) > EXACT):
        return None
    seen = (
        f"{int(wrong.sum())} of {len(found)} sources of {what} scenes are not where the columns of the target say: a"
        f" column is {float(found[wrong].median()):.0%} of the wave from there at the median"
        f"{_default(scenes, active, wrong)}"
    )
    used = _used(context)
    if (apart := context.known.get("parts apart")) is True:
        return None  # the target itself is not that of its snapshots
    for cause, how, change in _alternatives(array, of_target=apart is None):
        other = likeness(array, change(scenes))
        if float((other[wrong] > FITS).float().mean()) > EXPLAINED and float(other.mean()) > float(found.mean()):
            return Finding(cause, f"{seen}, and {float(other.median()):.0%} {how}.", certain=used)
    for setting, tried in _other_tasks(array):
        other = likeness(tried, scenes)
        if float((other[wrong] > FITS).float().mean()) > EXPLAINED and float(other.mean()) > float(found.mean()):
            return Finding("task_differs", f"{seen}, and {float(other.median()):.0%} with {setting}.", certain=False)
    return Finding(
        "parts_unrelated", f"{seen}; in no other order, unit or sign that was tried it is more.", certain=False
    )


def _default(scenes: Scenes, active: Tensor, wrong: Tensor) -> str:
    """One value that most of the wrong places have, as where they were missing and were filled in."""
    for name in ("azimuth", "elevation", "range_m"):
        values = getattr(scenes, name)[active][wrong]
        value = values.mode()[0]
        if float((values == value).float().mean()) > EXPLAINED:
            return f", and most of these have the {name.removesuffix('_m')} {float(value):.4g}, as what is missing does"
    return ""


def _rounded(what: str, scenes: Scenes, active: Tensor, found: Tensor) -> Finding | None:
    """Places of few values, which the target is made between."""
    if not float(found.median()) < EXACT:
        return None
    for name in ("azimuth", "elevation", "range_m"):
        values = getattr(scenes, name)[active]
        count = len(values.unique())
        if MANY_VALUES * count < len(values) and count > 1:
            return Finding(
                "parts_unrelated",
                f"the {name.removesuffix('_m')} of {len(values)} sources of {what} scenes has {count} different values,"
                f" and the columns of the target are {float(found.median()):.2%} of the waves from there at the median:"
                " labels are rounded, to a grid or to a whole number, and the target is made of what was not.",
                advice="Keep places as numbers with a fraction, in float32; or make the target of the rounded ones.",
                certain=False,
            )
    return None


def _used(context: PreflightContext) -> bool:
    """Whether a term reads the places, of scenes that are made of them."""
    return any(context.loss.weights.get(name, 0.0) > 0 for name in LOCATED) and context.trainer.source.endless


def _other_tasks(array: RISArray) -> Iterator[tuple[str, RISArray]]:
    """Arrays that the scenes may have been made with, by the setting that is another."""
    for factor in (0.5, 2.0):
        if array.grid:
            yield (
                f"task.spacing_wavelengths {factor:g} times as large",
                replace(array, spacing_m=factor * array.spacing_m),
            )
        yield f"task.wavelength_m {factor:g} times as large", replace(array, wavelength_m=factor * array.wavelength_m)
    other = "spherical" if array.wavefront == "fresnel" else "fresnel"
    yield f"task.wavefront = {other}", replace(array, wavefront=other)


def _alternatives(array: RISArray, *, of_target: bool) -> Iterator[tuple[str, str, Callable[[Scenes], Scenes]]]:
    """Mistakes that would explain it, each undone: cause, in words, how to undo it. Args: of_target: the target may be
    what is wrong; else it is known to be that of its snapshots."""
    names = ("azimuth", "elevation")

    def both(change: Callable[[Tensor], Tensor]) -> Callable[[Scenes], Scenes]:
        return lambda scenes: replace(scenes, **{name: change(getattr(scenes, name)) for name in names})

    yield "wrong_units", "with angles read as degrees", both(torch.deg2rad)
    yield "wrong_units", "with angles read as sines", both(lambda value: value.clamp(-1, 1).asin())
    yield (
        "wrong_layout",
        "with azimuth and elevation exchanged",
        lambda scenes: replace(scenes, azimuth=scenes.elevation, elevation=scenes.azimuth),
    )
    for negated in (("azimuth",), ("elevation",), names):
        yield (
            "wrong_layout",
            f"with the {' and '.join(negated)} negated",
            lambda scenes, each=negated: replace(scenes, **{name: -getattr(scenes, name) for name in each}),
        )
    if of_target:
        yield (
            "conjugation_error",
            "with the conjugate of the target",
            lambda scenes: replace(scenes, factor=conj(scenes.factor)),
        )
        for order in element_orders(array):
            yield (
                "wrong_layout",
                f"with the target's elements {order[0]}",
                lambda scenes, rows=order[1]: replace(scenes, factor=scenes.factor[:, rows]),
            )
    for step, where in ((-1, "after"), (1, "before")):
        if of_target:
            yield (
                "shuffled_labels",
                f"with the target of the scene {where} it",
                lambda scenes, step=step: replace(scenes, factor=scenes.factor.roll(step, 0)),
            )
        yield (
            "shuffled_labels",
            f"with the angles of the scene {where} it",
            both(lambda value, step=step: value.roll(step, 0)),
        )


def element_orders(array: RISArray) -> Iterator[tuple[str, Tensor]]:
    """Other orders in which the elements of a grid may be written, (N,), in words."""
    if array.places or array.elements < 2:
        return
    rows, columns = array.vertical, array.horizontal
    grid = torch.arange(rows * columns)
    square = grid.view(rows, columns)
    if rows > 1 and columns > 1:
        yield "counted with the vertical index fastest", grid.view(columns, rows).T.flatten()
        yield "counted with the other index fastest", square.T.flatten()
        yield "mirrored left to right", square.flip(1).flatten()
        yield "mirrored top to bottom", square.flip(0).flatten()
    yield "in reversed order", grid.flip(0)


# ---- powers --------------------------------------------------------------------------------------------------------


def _powers(what: str, scenes: Scenes) -> Finding | None:
    """Within a scene, powers are to each other as the squared norms of their columns."""
    active = _columns(scenes)
    if scenes.power is None or scenes.power.shape != active.shape:
        return None
    if bool((negative := (scenes.power < 0) & active).any()):
        return Finding(
            "wrong_units",
            f"{int(negative.sum())} of {int(active.sum())} sources of {what} scenes have a power below zero, down to"
            f" {float(scenes.power.min()):.3g}: powers are linear, and these may be in dB.",
            advice="Write power as 10^(dB / 10); what has a power above zero is taken for a source.",
            certain=False,
        )
    if not torch.equal(scenes.power > 0, active):
        return None
    several = active.sum(1) > 1
    if int(several.sum()) < FEWEST:
        return None
    size = scenes.factor.square().sum((1, 3)).double()
    apart = [_spread(size, scenes.power.double() ** exponent, active, several) for exponent in (1.0, 2.0, 0.5)]
    if apart[0] <= PROPORTIONAL:
        return None
    how = next(
        (
            f" They go with {name} of the powers."
            for value, name in zip(apart[1:], ("the square", "the root"))
            if value <= PROPORTIONAL
        ),
        "",
    )
    return Finding(
        "parts_unrelated",
        f"within {what} scenes the squared norms of the target's columns are not to each other as the powers of the"
        " sources"
        f" (they are off by {math.expm1(apart[0]):.0%} at the median).{how}",
        advice="A column of the target is sqrt(p) a: the root of the source's power, once, times its steering vector.",
        certain=False,
    )


def _spread(size: Tensor, power: Tensor, active: Tensor, several: Tensor) -> float:
    """Half the span of the logarithm of power over squared norm within a scene: of the median scene with several
    sources."""
    ratio = (power.clamp_min(1e-300) / size.clamp_min(1e-300)).log()
    high = ratio.masked_fill(~active, -torch.inf).amax(1)
    low = ratio.masked_fill(~active, torch.inf).amin(1)
    return float(((high - low) / 2)[several].median())


CHECKS = {"counts, places and powers are those of the target": labels_of_targets}
