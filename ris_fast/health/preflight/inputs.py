"""Preflight of what the network sees: whether it is of its scenes, and whether the answer can be made of it.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, Q factor columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight import mixing
from ris_fast.health.preflight.input_scale import boundary, scale
from ris_fast.health.preflight.measures import CLOSE, SAME, relative_change
from ris_fast.health.preflight.persistent import persistent
from ris_fast.health.preflight.probe import PreflightContext, layer_calls
from ris_fast.physics.real_complex import conj, expi, multiply, to_complex, to_pairs
from ris_fast.physics.scenes import Scenes

DIFFERENT = 1e-2  # relative, between the rows of an input: more than what a sum may hide
FEW = 4  # scenes that are enough where an answer is asked for often


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


def _one_channel(scenes: Scenes) -> bool:
    """Whether all scenes have the same channel, which a network may learn by heart."""
    return relative_change(scenes.channel, scenes.channel.roll(1, 0)) < CLOSE


def _without(context: PreflightContext, scenes: Scenes) -> Iterator[tuple[str, Scenes | None]]:
    """Scenes with one thing destroyed that the answer needs."""
    generator = torch.Generator().manual_seed(2)

    def phases(value: Tensor) -> Tensor:
        return multiply(value, expi(6.2832 * torch.rand(value.shape[:-1], generator=generator)).to(value))

    yield "the phases of the snapshots are drawn anew", replace(scenes, snapshots=phases(scenes.snapshots))
    if _one_channel(scenes):
        return
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
    if _one_channel(scenes):
        return
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
