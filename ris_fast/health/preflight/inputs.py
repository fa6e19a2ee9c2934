"""Preflight of what the network sees: sizes, units, and whether the answer can be made of it.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, Q factor columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight import mixing
from ris_fast.health.preflight.measures import CLOSE, SAME, relative_change, rms
from ris_fast.health.preflight.persistent import persistent
from ris_fast.health.preflight.probe import PreflightContext, layer_calls
from ris_fast.physics.real_complex import conj, expi, multiply, to_complex, to_pairs
from ris_fast.physics.scenes import Scenes

LARGE, SMALL_RMS = 1e3, 1e-3
FAINT, SLOW, MOSTLY = 1e-6, 1e-4, 0.5  # of the largest input, twice; share of them
MANY_SCENES, MANY_NUMBERS, FEW_LEVELS = 8, 8, 3  # of an input that is looked at for its values; of one that has few
CUT_OFF = 0.3  # share of the numbers that are one and the same
LOUD_DB = 20.0
SETTLED = 0.05  # relative change of what no longer grows
LOUDER = 2.0**13  # a power of two, by which numbers change exactly: no rounding enters the comparison
DIFFERENT = 1e-2  # relative, between the rows of an input: more than what a sum may hide
UNITS = (128.0, 8.0)  # of every second scene, and of the others
TOO_LARGE, OUTWEIGHS = 100.0, 300.0  # rms of one number of an input; times the median one
FEW = 4  # scenes that are enough where an answer is asked for often
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


def reads_scenes(context: PreflightContext) -> Iterator[Finding]:
    """The answer depends on the scene, and each scene's answer on that scene alone."""
    scenes = context.scenes
    answer = context.answer(scenes)
    seen = boundary(context, scenes)
    if not bool(answer.isfinite().all()) or scenes.batch < 2:
        context.note = f"not checked: {'there is one scene' if scenes.batch < 2 else 'answers are not finite'}"
        return
    if _rows_alike(answer):
        same = seen and all(map(_rows_alike, seen.values()))
        if _rows_alike(scenes.snapshots.flatten(1)):
            yield Finding("constant_input", f"all of {scenes.batch} scenes have the same snapshots.")
            return
        where, zero = ("", False) if same else _lost(context, scenes)
        seen = f"{scenes.batch} different scenes get the same factor"
        if same or bool(answer.any()):
            first = "; the first layers see the same numbers for all of them" if same else where
            yield Finding("ignored_input", f"{seen}{first}.")
        elif where:  # an answer of zeros to scenes that were seen is a dead network
            yield Finding("dead_units" if zero else "ignored_input", f"{seen}, zero{where}.")
        return
    yield from _constant_layers(context, scenes)
    yield from mixing.mixed(context)


def _constant_layers(context: PreflightContext, scenes: Scenes) -> Iterator[Finding]:
    """No layer says the same of all scenes when what it is given differs between them."""
    constant: list[tuple[str, bool]] = []

    def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        made = output[0] if isinstance(output, tuple) and output else output  # of attention, before its weights
        if not isinstance(made, Tensor) or made.dim() < 2 or made.shape[0] != scenes.batch:
            return
        given = [each.detach().float().flatten(1) for each in inputs if _a_row_each(each, scenes.batch)]
        differs = any(relative_change(each, each[:1].expand_as(each)) > DIFFERENT for each in given)
        after = made.detach().float().flatten(1)
        if differs and _rows_alike(after):
            constant.append((name, not bool(after.any())))

    with layer_calls(context.model, keep):
        context.answer(scenes)
    if constant:
        name, zero = constant[0]
        what = "zeros" if zero else "the same numbers"
        yield Finding(
            "dead_units" if zero else "ignored_input",
            f"{name} answers {scenes.batch} scenes with {what} though its inputs differ between them, also with other"
            " weights: a normalisation or a softmax over a single number leaves nothing, nor do units that are off for"
            " every input, nor a mask that is true where there is something. Which of them: print its output, the axis"
            " that is normalised, and the mask.",
            certain=False,
        )


def _a_row_each(value: object, batch: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and value.shape[0] == batch


def _lost(context: PreflightContext, scenes: Scenes) -> tuple[str, bool]:
    """Where scenes become one: behind which layer, and whether as zeros; '' where it is behind the last one."""
    places: list[tuple[str, Tensor]] = []

    def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        first = next((each for each in inputs if isinstance(each, Tensor)), None)
        for what, value in (("the input of", first), ("the output of", output)):
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == scenes.batch:
                places.append((f"{what} {name}", value.detach().float().flatten(1)))

    with layer_calls(context.model, keep):
        context.answer(scenes)
    alike = [_rows_alike(value) for _, value in places]
    if all(alike) or not any(alike):
        return "", False
    last = max(number for number, each in enumerate(alike) if not each)
    if last + 1 == len(places):
        return "", False
    name, value = places[last + 1]
    return f": {places[last][0]} differs between them, and {name} no longer", not bool(value.any())


def _rows_alike(values: Tensor) -> bool:
    return relative_change(values, values[:1].expand_as(values)) < SAME


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


# ---- can it carry the answer?
# ------------------------------------------------------------------------------------------


def information(context: PreflightContext) -> Iterator[Finding]:
    """The answer changes when something is taken away that the target cannot be known without."""
    scenes = context.scenes
    base = context.answer(scenes)
    if _rows_alike(base) or not bool(base.isfinite().all()):
        context.note = "not checked: all answers are the same, or not finite"
        return
    if scenes.channel is None:
        yield Finding(
            "inputs_withhold_answer",
            "the scenes carry no channel H, only H c_l, and the network cannot see what the surface did to the field.",
        )
        return
    few = scenes[:FEW]
    for certain, known, changed in (
        (True, base, _without(context, scenes)),
        (False, context.answer(few), _other_parts(few)),
    ):
        for what, other in changed:
            if other is not None and relative_change(known, context.answer(other)) < SAME:
                yield Finding(
                    "inputs_withhold_answer",
                    f"{what} and the factors stay the same to {SAME:g}: the network does not see "
                    "what the target is made of.",
                    certain=certain,
                )
                return
    yield from _pairing(context, scenes)


def _without(context: PreflightContext, scenes: Scenes) -> Iterator[tuple[str, Scenes | None]]:
    """Scenes with one thing destroyed that the answer needs."""
    generator = torch.Generator().manual_seed(2)

    def phases(value: Tensor) -> Tensor:
        return multiply(value, expi(6.2832 * torch.rand(value.shape[:-1], generator=generator)).to(value))

    yield "the phases of the snapshots are drawn anew", replace(scenes, snapshots=phases(scenes.snapshots))
    yield (
        "the channel is that of another scene",
        replace(scenes, channel=scenes.channel.roll(1, 0), effective_channel=None),
    )
    yield "the phases of the channel are drawn anew", replace(scenes, channel=phases(scenes.channel))
    yield "the channel is changed where H c_l cannot show it", hidden_change(scenes)


def _other_parts(scenes: Scenes) -> Iterator[tuple[str, Scenes | None]]:
    """A part of the snapshots is another scene's, or all is mirrored: so is the target then."""
    other, (length, antennas) = scenes.snapshots.roll(1, 0), scenes.snapshots.shape[1:3]
    for size, name, mask in (
        (length, "snapshots", torch.arange(length)[:, None, None]),
        (antennas, "antennas", torch.arange(antennas)[:, None]),
    ):
        if size < 2:
            continue
        for which, part in (
            (f"all {name} but the first are", mask > 0),
            (f"the first half of the {name} is", mask < size // 2),
        ):
            change = torch.where(part.to(scenes.snapshots.device), other, scenes.snapshots)
            yield f"{which} another scene's", replace(scenes, snapshots=change)
        order = scenes.snapshots.roll(1, 1 if name == "snapshots" else 2)
        yield f"the {name} come in another order", replace(scenes, snapshots=order)
    conjugates = {name: conj(getattr(scenes, name)) for name in ("snapshots", "channel", "codes")}
    yield "snapshots, channel and codes are conjugated", replace(scenes, **conjugates, effective_channel=None)
    mirrored = {"channel": scenes.channel.flip(2), "codes": scenes.codes.flip(-2)}
    yield (
        "the elements of channel and codes come in reversed order",
        replace(scenes, **mirrored, effective_channel=None),
    )


def hidden_change(scenes: Scenes) -> Scenes | None:
    """Another channel with the same products H c_l; None where the codes span the surface and there is none."""
    codes = to_complex(scenes.codes)
    elements = codes.shape[-1]
    _, values, rows = torch.linalg.svd(codes.to(torch.complex128), full_matrices=True)
    rank = int((values > 1e-6 * values.max()).sum(-1).max())
    if rank >= elements:
        return None
    kernel = rows[..., rank:, :].conj()  # ([B,] N - rank, N), each row v with C v = 0
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(*scenes.channel.shape[:2], kernel.shape[-2], dtype=torch.complex128, generator=generator)
    extra = mix.to(kernel.device) @ kernel
    size = to_complex(scenes.channel).abs().square().mean().sqrt() / extra.abs().square().mean().sqrt()
    return replace(
        scenes, channel=scenes.channel + to_pairs((extra * size).to(torch.complex64)), effective_channel=None
    )


def _pairing(context: PreflightContext, scenes: Scenes) -> Iterator[Finding]:
    """What a first layer makes of snapshots and channel together is H^H y, which a phase of an antenna leaves alone,
    and not H^T y."""
    generator = torch.Generator().manual_seed(59)
    phases = 6.2832 * torch.rand(scenes.batch, scenes.channel.shape[1], generator=generator)
    turn = expi(phases).to(scenes.snapshots)
    back = turn * torch.tensor((1.0, -1.0)).to(turn)
    seen, channel = boundary(context, scenes), multiply(scenes.channel, turn[:, :, None])
    right, wrong = (
        boundary(
            context,
            replace(
                scenes, channel=channel, snapshots=multiply(scenes.snapshots, way[:, None]), effective_channel=None
            ),
        )
        for way in (turn, back)
    )
    for name, value in seen.items():
        if _usual_change(value, wrong[name]) < CLOSE < 0.05 < _usual_change(value, right[name]):
            yield Finding(
                "conjugation_error",
                f"the input of {name} does not change when channel and snapshots turn in opposite directions, each"
                " antenna by a phase of its own, and does when they turn together: it is made of H^T y where H^H y"
                " belongs.",
            )
            return


def _usual_change(a: Tensor, b: Tensor) -> float:
    """Of the median scene: in a loud one rounding alone may change what a pursuit finds, and a wrong product changes
    all."""
    return float(((a - b).norm(dim=1) / a.norm(dim=1).clamp_min(1e-30)).median())


CHECKS = {
    "answers depend on the scene, and on no other": persistent(reads_scenes, "ignored_input", "dead_units"),
    "inputs are of order one in any unit": scale,
    "inputs can carry the answer": persistent(information, "inputs_withhold_answer"),
}
