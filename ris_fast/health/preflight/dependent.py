"""Preflight of what preparation took out of the scenes: numbers that depend on each other exactly, where noise
or fading makes all of them different.

A mean that was subtracted, a snapshot or an antenna that is zero or there twice, a projection on fewer dimensions: of
each something is exactly zero in every scene. White noise in L snapshots and M antennas leaves nothing so.
Legend: B batch, L snapshots, M base-station antennas, N RIS elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.measures import on_a_grid
from ris_fast.health.preflight.pairing import as_believed
from ris_fast.health.preflight.probe import FEWEST, PreflightContext
from ris_fast.health.preflight.scenes import all_scenes
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes

LOOKED_AT = 32  # scenes of each split
NOISY_DB = 50.0  # below it noise is far above the rounding of float32, of float16 too
NOTHING = 1e-3  # of the noise's amplitude; rounding to 16 bits leaves more
CUT_OFF = 0.04  # share of the numbers of a scene that are the largest one exactly
REMOVED = "something was taken out"  # which explains what else does not fit: in `known` of the context
AXES = {"snapshots": ((1, "snapshots"), (2, "antennas")), "channel": ((1, "antennas"), (2, "elements"))}


def removed(context: PreflightContext) -> Iterator[Finding]:
    """Snapshots fill as many dimensions as they have, and no mean of them or of the channel is exactly zero."""
    for what, scenes in (("training", all_scenes(context)), ("validation", context.validation)):
        scenes = as_believed(scenes[:LOOKED_AT], context.config.task)
        scenes = scenes[(scenes.snr_db < NOISY_DB) & (scenes.snapshots.flatten(1) != 0).any(1)]
        if scenes.batch < FEWEST or not bool(scenes.snapshots.isfinite().all()):
            return
        if seen := _twice_or_zero(scenes) or _dimensions(scenes) or _sizes(scenes) or _ends(scenes) or _steps(scenes):
            context.known[REMOVED] = True
            yield Finding(
                "inputs_withhold_answer",
                f"in all of {scenes.batch} {what} scenes {seen}, although their noise makes all numbers different.",
                advice="Look at what prepares snapshots between their source and the network: what it subtracts,"
                " projects, pads or copies. Give the network all L snapshots of all M antennas as they were received.",
            )
            return
        if scenes.channel is not None and bool(scenes.channel.isfinite().all()):
            if seen := _mean(scenes.channel, "channel") or _one_part(scenes.channel, "channel"):
                context.known[REMOVED] = True
                yield Finding(
                    "mismatched_channel",
                    f"in all of {scenes.batch} {what} scenes {seen}: something took it away, and the snapshots were"
                    " made with the whole channel.",
                    certain=not context.config.task.channel,
                )
                return


def _noise(scenes: Scenes) -> Tensor:
    """Amplitude of the noise in one number, (B,)."""
    ratio = 10.0 ** (scenes.snr_db.double() / 10.0)
    return (to_complex(scenes.snapshots.double()).abs().square().mean((1, 2)) / (1.0 + ratio)).sqrt()


def _twice_or_zero(scenes: Scenes) -> str:
    """Snapshots or antennas without a signal, or with another one's; real numbers where complex ones were received."""
    if seen := _one_part(scenes.snapshots, "snapshots"):
        return seen
    for axis, name in AXES["snapshots"]:
        rows = scenes.snapshots.transpose(1, axis).flatten(2)
        zero = (rows == 0).all(2).all(0)
        if bool(zero.any()):
            first = ", ".join(map(str, zero.nonzero()[:3, 0].tolist()))
            return f"{int(zero.sum())} of {len(zero)} {name} are exactly zero, the first {first}"
        same = (rows[:, :, None] == rows[:, None]).all(3).all(0).triu(1)
        if bool(same.any()):
            one, other = same.nonzero()[0].tolist()
            return f"{int(same.any(0).sum())} of {len(same)} {name} repeat another one, as {name} {one} and {other}"
    return ""


def _dimensions(scenes: Scenes) -> str:
    """A direction in which there is no noise."""
    y, noise = to_complex(scenes.snapshots.double()), _noise(scenes)
    if seen := _mean(scenes.snapshots, "snapshots", noise):
        return seen
    values = torch.linalg.svdvals(y)
    less = values < NOTHING * noise[:, None]
    count = int(less.sum(1).min())
    if not count:
        return ""
    rank = values.shape[1]
    return f"the snapshots, a matrix {tuple(y.shape[1:])}, have rank {rank - count} where noise gives them {rank}"


def _sizes(scenes: Scenes) -> str:
    """Antennas, snapshots or numbers that all have one size, as where each was divided by its own."""
    power = to_complex(scenes.snapshots.double()).abs().square()
    for axes, name in (((), "numbers of the snapshots"), ((1,), "antennas"), ((2,), "snapshots")):
        sizes = power.mean(axes, keepdim=True) if axes else power
        if sizes[0].numel() > 1 and bool(((sizes / sizes.mean((1, 2), keepdim=True) - 1).abs() < NOTHING).all()):
            return f"all {name} have exactly the same size: each was divided by its own, and how they compare is lost"
    return ""


def _ends(scenes: Scenes) -> str:
    """Numbers that were cut off at the largest one."""
    size = scenes.snapshots.flatten(1).abs()
    largest = size >= size.amax(1, keepdim=True) * (1 - 1e-6)
    share = largest.float().mean(1)
    cut = (share > CUT_OFF) & (largest.sum(1) > 1)  # one number is the largest of any scene
    if not float(cut.float().mean()) > 0.5:
        return ""
    return (
        f"numbers of the snapshots go to a largest one, at which they are cut off: {float(share[cut].median()):.0%} of"
        f" them are it exactly in {int(cut.sum())} scenes"
    )


def _steps(scenes: Scenes) -> str:
    """Numbers that were rounded to steps larger than the noise."""
    noise = _noise(scenes)
    values = [each.flatten().unique() for each in scenes.snapshots.double()]
    few = scenes.snapshots[0].numel() // 2  # values of numbers that are all different are as many as these
    if not all(1 < len(each) < min(4, few) or on_a_grid(scene) for each, scene in zip(values, scenes.snapshots)):
        return ""
    ratio = torch.stack([each.diff().min() for each in values]) / noise
    if not float(ratio.median()) > 1.0:
        return ""
    return (
        f"the numbers of the snapshots are whole multiples of one step, {float(ratio.median()):.3g} times the noise at"
        " the median: they were rounded, as to few bits or in a format that is too narrow for their size"
    )


def _one_part(values: Tensor, name: str) -> str:
    """Which part of all numbers is exactly zero. Args: (B, ., ., 2)."""
    parts = [part for part, each in zip(("real", "imaginary"), values.unbind(-1)) if not bool(each.any())]
    return f"the {parts[0]} parts of the {name} are exactly zero" if len(parts) == 1 else ""


def _mean(values: Tensor, name: str, size: Tensor | None = None) -> str:
    """A mean that is exactly zero in every scene. Args: (B, ., ., 2); size of what is random in it, (B,)."""
    given = to_complex(values.double())
    scale = given.abs().square().mean((1, 2)).sqrt() if size is None else size
    for axes, over in (((1,), AXES[name][0][1]), ((2,), AXES[name][1][1]), ((1, 2), "all numbers")):
        if given[0].numel() > 1 and all(given.shape[axis] > 1 for axis in axes):
            largest = given.mean(axes).abs().reshape(len(given), -1).amax(1)
            if bool((largest < NOTHING * scale / 10).all()):
                return f"the mean of the {name} over the {over.removeprefix('all ')} is exactly zero"
    return ""


CHECKS = {"nothing was taken out of the snapshots": removed}
