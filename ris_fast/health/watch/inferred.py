"""Targets that nobody told of: what the outputs and the gradient at them say, where the graph says which loss it is.

Legend: R rows, a few scenes; F numbers of each.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ris_fast.health.watch.graph import MOVING
from ris_fast.health.watch.loss import WALKED
from ris_fast.health.watch.loss_records import LossRecord, Numbers
from ris_fast.health.watch.pass_records import PassRecord
from ris_fast.health.watch.records import LoopRecord

CLASSES = 64  # of which the numbers of a row are all known
SQUARES = (["MseLoss"], ["Mean", "Pow", "Sub"], ["Mean", "Pow", "Rsub"], ["Sum", "Pow", "Sub"], ["Mean", "Mul", "Sub"])
WITHIN = 0.05  # of 0 or 1, where a label is


def told_losses(loop: LoopRecord) -> list[LossRecord]:
    """Losses that were told; where none were, those that backward passes began from, with outputs and targets where
    these follow from the gradient."""
    if loop.losses:
        return list(loop.losses)
    passes = {each.number: each for each in loop.forward.passes} if loop.forward is not None else {}
    walked = loop.met[:WALKED]
    if len({tuple(each.through) for each in walked}) != 1:
        return list(loop.met)
    through = [name for name in walked[0].through if name not in MOVING]
    return [
        _with_targets(replace(each, of_weights=walked[0].of_weights), passes[each.number], through)
        for each in loop.met
        if each.number in passes
    ]


def _with_targets(loss: LossRecord, one: PassRecord, through: list[str]) -> LossRecord:
    """`through`: operations of the term that depends on the outputs, from its root on, up to the one that made them."""
    made, slope = one.output, one.slope
    if made is None or slope is None or made.shape != slope.shape or not bool((made + slope).isfinite().all()):
        return loss
    size = math.prod(one.output_shape)
    asked = _targets(through[:-1], loss, made, slope, one.output_shape)
    outputs = Numbers(one.output_shape, False, False, made.min(), made.max(), made.new_zeros(()), None, made)
    if asked is None or not size:
        return replace(loss, outputs=outputs)
    whole = asked.shape[1] == 1 and one.output_shape[1:2] > (1,)
    shape = one.output_shape[:1] if whole else one.output_shape
    targets = Numbers(shape, whole, False, asked.min(), asked.max(), made.new_zeros(()), None, asked)
    return replace(loss, outputs=outputs, targets=targets)


def _targets(inner: list[str], loss: LossRecord, made: Tensor, slope: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """(R, F), or (R, 1) labels; None for another loss than these. `inner`: operations between loss and outputs."""
    size = math.prod(shape)
    if inner in SQUARES:
        pull = slope.square().mean() * size  # of all outputs, about
        alone = not loss.of_weights and loss.value is not None and float(loss.value) > 0
        usual = [2.0 / size, 2.0 / max(1, *shape[:1], 1), 2.0]
        factor = float(pull / (2 * loss.value)) if alone else usual[0]
        near = min(usual, key=lambda each: abs(math.log(max(factor, 1e-30) / each)))
        return made - slope / near if 0.4 < factor / near < 2.5 else None
    if inner == ["NllLoss", "LogSoftmax"] and len(shape) == 2 and 1 < shape[1] == made.shape[1] <= CLASSES:
        labels = slope.argmin(1, keepdim=True).float()
        return torch.where((slope == 0).all(1, keepdim=True), -100.0, labels)
    if inner in (["BinaryCrossEntropyWithLogits"], ["BinaryCrossEntropy"]):
        given = made.sigmoid() if inner[0].endswith("Logits") else made * (1 - made)
        asked = made.sigmoid() - slope * size if inner[0].endswith("Logits") else made - slope * size * given
        ends = torch.minimum(asked.abs(), (1 - asked).abs())
        return asked.round() if bool((ends < WITHIN).all()) else None
    return None
