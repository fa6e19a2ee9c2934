"""Preflight of the sizes and units of what first layers are given.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, Q factor columns, F numbers of an input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.measures import relative_change, rms
from ris_fast.health.preflight.probe import PreflightContext, layer_calls
from ris_fast.physics.scenes import Scenes

LARGE, SMALL_RMS = 1e3, 1e-3
FAINT, SLOW, MOSTLY = 1e-6, 1e-4, 0.5  # of the largest input, twice; share of them
MANY_SCENES, MANY_NUMBERS, FEW_LEVELS = 8, 8, 3  # of an input that is looked at for its values; of one that has few
CUT_OFF = 0.3  # share of the numbers that are one and the same
LOUD_DB = 20.0
SETTLED = 0.05  # relative change of what no longer grows
LOUDER = 2.0**13  # a power of two, by which numbers change exactly: no rounding enters the comparison
UNITS = (128.0, 8.0)  # of every second scene, and of the others
TOO_LARGE, OUTWEIGHS = 100.0, 300.0  # rms of one number of an input; times the median one
ABOUT = 10.0  # times more or less
FAR = 100.0  # times more or less than one, of numbers that a layer is given in the unit that they have
OTHER_UNIT = 0.01  # change of the median scene's factors; where every input is normalised it is exactly zero


def boundary(context: PreflightContext, scenes: Scenes, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of layers that depend on no weight: what the trainable part sees. Name of the layer -> (B, F)."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        first = next((each for each in inputs if isinstance(each, Tensor)), None)
        if first is not None and not first.requires_grad and first.dim() > 1 and first.shape[0] == scenes.batch:
            found.setdefault(name, first.detach().float().flatten(1))

    with layer_calls(context.model, keep), torch.enable_grad():
        context.answer_with_grad(scenes, seed)
    return found


def scale(context: PreflightContext) -> Iterator[Finding]:
    """First layers that do not normalise what they are given see numbers of order one."""
    scenes = context.scenes
    base, seen = context.answer(scenes), boundary(context, scenes)
    sizes = {name: rms(value) for name, value in seen.items()}
    tiny = {
        name: size
        for name, size in sizes.items()
        if 0 < size < SMALL_RMS and not _normalises(context, scenes, name, size)
    }
    louder = [
        boundary(context, replace(scenes, snapshots=unit * scenes.snapshots)) if bool(base.isfinite().all()) else {}
        for unit in (LOUDER**2, LOUDER**3)
    ]
    if name := next((name for name, now in seen.items() if _swallowed(now, *(each.get(name) for each in louder))), ""):
        yield Finding(
            "epsilon_swallows_signal",
            f"the input of {name} has rms {sizes[name]:.2g}, {rms(louder[0][name]):.2g} for snapshots"
            f" {LOUDER**2:.2g} times larger, and no more for still larger ones: a constant in the normalisation is"
            " larger than the signal.",
        )
        return
    if tiny:  # a network may weigh its inputs by the SNR; that has nothing to do with units
        loud = boundary(context, replace(scenes, snr_db=torch.full_like(scenes.snr_db, LOUD_DB)))
        tiny = {name: size for name, size in tiny.items() if rms(loud[name]) < SMALL_RMS}
    if tiny:
        name = min(tiny, key=tiny.__getitem__)
        yield Finding(
            "input_scale",
            f"the input of {name} has rms {tiny[name]:.2g}; layers expect numbers of order one.",
            certain=len(tiny) == len(sizes),  # else there are others to learn from
        )
        return
    for name, value in seen.items():
        each = value.square().mean(1).sqrt()
        uneven = float(each.max()) > 1e3 * float(each.median().clamp_min(1e-30))
        if uneven or sizes[name] > LARGE and not _normalises(context, scenes, name, sizes[name]):
            yield Finding(
                "input_scale",
                f"the input of {name} has rms {sizes[name]:.2g}, from {float(each.min()):.2g} to "
                f"{float(each.max()):.2g} between scenes.",
            )
            return
    for name, value in seen.items():
        for least, effect in (
            (FAINT, "a sum in float32 does not see them"),
            (SLOW, "weights that are as large as others see next to nothing of them, and take very long to grow"),
        ):
            if (share := _drowned(value, least)) > MOSTLY:
                yield Finding(
                    "input_scale",
                    f"{share:.0%} of the {value.shape[1]} numbers that {name} is given are below {least:g} of the"
                    f" largest of them (rms {sizes[name]:.2g}): {effect}. Bring each input to order one before they are"
                    " put together.",
                    certain=least == FAINT,
                )
                return
    if coarse := next(filter(None, (_coarse(name, value) for name, value in seen.items())), ""):
        yield Finding(
            "inputs_withhold_answer",
            coarse,
            advice="Look at what rounds, compares, clamps or takes an argmax before the first layer: give it the"
            " numbers themselves, in a unit in which they are of order one.",
            certain=False,
        )
        return
    if uneven := next((seen for name, value in seen.items() if (seen := _one_outweighs(name, value))), ""):
        yield Finding("input_scale", uneven, certain=False)
        return
    with context.full_precision():
        yield from _units(context, scenes)


def _one_outweighs(name: str, value: Tensor) -> str:
    """A number of a layer's input that is far larger than all the others; empty where there is none. Args: (B, F)."""
    each = value.square().mean(0).sqrt()
    high, usual = float(each.max()), float(each[each > 0].median()) if bool((each > 0).any()) else 0.0
    if value.shape[1] < 4 or not high > max(TOO_LARGE, OUTWEIGHS * usual):
        return ""
    return (
        f"number {int(each.argmax())} of the {value.shape[1]} that {name} is given has rms {high:.2g}, the median one"
        f" {usual:.2g}: the others are lost beside it."
    )


def _drowned(value: Tensor, least: float) -> float:
    """Share of the inputs, not counting those that are always zero, that are smaller than `least` of the largest.
    Args: (B, F)."""
    size = value.square().mean(0).sqrt()
    size = size[size > 0]
    return float((size < least * size.max()).float().mean()) if len(size) > 1 else 0.0


def _coarse(name: str, value: Tensor) -> str:
    """Numbers of a layer's input that have hardly more than one value; empty where most have many. Args: (B, F)."""
    varying = value[:, (value != value[:1]).any(0)]
    batch, count = varying.shape
    if batch < MANY_SCENES or count < MANY_NUMBERS:
        return ""
    few = (varying.sort(0)[0].diff(dim=0) != 0).sum(0) < FEW_LEVELS
    share = float(few.float().mean())
    if share > MOSTLY and len(varying[:, few].unique()) <= MANY_NUMBERS:
        return (
            f"{share:.0%} of the {count} numbers that {name} is given and that differ between {batch} scenes have"
            f" {FEW_LEVELS} values or fewer: they were rounded, compared or made one of a few."
        )
    values, counts = varying[varying != 0].unique(return_counts=True)
    often = counts.argmax()
    if float(counts[often]) > CUT_OFF * varying.numel():
        return (
            f"{float(counts[often]) / varying.numel():.0%} of the numbers that {name} is given and that differ between"
            f" scenes are {float(values[often]):.3g} exactly: they are cut off there."
        )
    return ""


def _normalises(context: PreflightContext, scenes: Scenes, name: str, size: float) -> bool:
    """Whether a layer tells scenes apart about as loudly as with inputs of rms one, in training. Args: size: their rms
    as they are."""
    spread: list[float] = []

    def ask(module: nn.Module, inputs: tuple, named: dict, output: object) -> None:
        place = next((number for number, each in enumerate(inputs) if isinstance(each, Tensor)), None)
        if spread or place is None:
            return
        for unit in (1.0, 2.0 ** -round(math.log2(size))):
            torch.manual_seed(0)
            made = module.forward(*inputs[:place], unit * inputs[place], *inputs[place + 1 :], **named)
            made = made[0] if isinstance(made, tuple) else made
            spread.append(rms(made - made.mean(0)) if isinstance(made, Tensor) and not made.is_complex() else math.nan)

    handle = dict(context.model.named_modules())[name].register_forward_hook(ask, with_kwargs=True)
    try:
        with context.as_written(), torch.no_grad():
            context.predict(scenes)
            context.rewind()
    finally:
        handle.remove()
    return len(spread) == 2 and 1 / ABOUT < spread[0] / max(spread[1], 1e-30) < ABOUT


def _units(context: PreflightContext, scenes: Scenes) -> Iterator[Finding]:
    """Where the units of y and of H matter to the answers, numbers far from one that follow these reach no layer.

    In y = H (c o x) + n they change, scene by scene, the unit of x alone, which no covariance shows. A power of two
    changes every float exactly. Another factor would round, and at high SNR a pursuit makes much of that.
    """
    units = torch.tensor(UNITS).repeat(scenes.batch)[: scenes.batch].to(scenes.snapshots).view(-1, 1, 1, 1)
    base, seen = directions(context.answer(scenes)), boundary(context, scenes)
    for what, other in (
        ("snapshots", replace(scenes, snapshots=units * scenes.snapshots)),
        ("channel", _channel_times(scenes, units)),
    ):
        gap = float((directions(context.answer(other)) - base).flatten(1).norm(dim=1).median())
        if not gap > OTHER_UNIT:
            continue
        for name, value in boundary(context, other).items():
            size = rms(seen[name])
            far = not 1 / FAR < size < FAR and relative_change(seen[name], value) > OTHER_UNIT
            if far and not _normalises(context, scenes, name, size):
                yield Finding(
                    "input_scale",
                    f"the input of {name} has rms {size:.2g} and follows the unit of the {what}: nothing normalises"
                    f" it, scene by scene or by a constant of the data, and the factors change by {gap:.2g} with"
                    " another unit.",
                    certain=False,
                )
                return


def directions(factor: Tensor) -> Tensor:
    """Factors of norm 1, scene by scene: their size says nothing."""
    return factor / factor.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)


def _channel_times(scenes: Scenes, units: Tensor) -> Scenes:
    """The channel, or where there is none the products H c_l, in other units."""
    name = "effective_channel" if scenes.channel is None else "channel"
    return replace(scenes, **{"effective_channel": None, name: units * getattr(scenes, name)})


def _swallowed(now: Tensor, larger: Tensor | None, largest: Tensor | None) -> bool:
    """Small now, larger in the same direction when the scene is louder, and as large when it is louder still.

    That is what a size and a constant divide. What is left alone grows on, as a logarithm does, and what is clamped
    ends in another direction.
    """
    if larger is None or largest is None or not rms(larger) > 3 * rms(now) > 0:
        return False
    rows, loud = (each / each.norm(dim=1, keepdim=True).clamp_min(1e-30) for each in (now, largest))
    return max(relative_change(largest, larger), relative_change(loud, rows)) < SETTLED
