"""How much of the targets follows from the inputs, by means of a regression that knows nothing of the network.

Legend: N scenes; F numbers of each; G numbers of a target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ris_fast.health.watch.loss_records import LossRecord, Numbers
from ris_fast.health.watch.pass_records import PassRecord
from ris_fast.health.watch.records import LoopRecord

CLASSES, WIDE = 256, 32  # labels; numbers of one of several inputs, from which on they may not be all
SILENT = 0.035  # share that is found of `SCENES` by chance
SCENES, LEAST = 256, 96  # that are used at most, and without which nothing is said
RIDGES = (0.03, 0.3, 3.0)  # times the mean of a kernel's diagonal
WIDTHS = (0.25, 1.0)  # of a Gaussian kernel, in units of the median of squared distances; and a linear one


def scenes_with_targets(loop: LoopRecord, losses: Sequence[LossRecord]) -> tuple[Tensor, Tensor] | None:
    """(N, F) numbers of scenes, and (N, G) of their targets, labels as zeros and ones; None where they are not known,
    for inputs of symbols, and for pictures and sequences of several numbers, in which the same is seen at any place."""
    passes = {each.number: each for each in loop.forward.passes} if loop.forward is not None else {}
    inputs, targets = [], []
    for each in losses:
        one, asked = passes.get(each.number), each.targets
        if one is None or asked is None or asked.shape[:1] != one.shape[:1] or (asked.whole and len(asked.shape) > 1):
            continue
        if (rows := _rows(one, asked)) is None:
            continue
        labels = rows[1][:, 0].long() if asked.whole else None
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < CLASSES:
            continue
        inputs.append(rows[0])
        targets.append(rows[1] if labels is None else torch.nn.functional.one_hot(labels, CLASSES).float())
    alike = len({each.shape[1] for each in inputs}) == 1 and len({each.shape[1] for each in targets}) == 1
    if not alike or bool((torch.cat(inputs).frac() == 0).all()):
        return None
    return torch.cat(inputs), torch.cat(targets)


def _rows(one: PassRecord, asked: Numbers) -> tuple[Tensor, Tensor] | None:
    """Of one pass: all that its scenes are made of, and what is asked of them, row by row."""
    wanted = asked.few if asked.keys is None else asked.keys
    if one.inputs == 1 and sum(size > 1 for size in one.shape[1:]) <= 1 and one.keys is not None:
        given = one.keys if math.prod(one.shape[1:]) <= 2 * one.keys.shape[1] else None
    elif 1 < one.inputs == len(one.others) and all(each is not None for each in one.others):
        some = [each for each in one.others if each is not None]
        whole = any(bool((each.frac() == 0).all()) or each.shape[1] > WIDE for each in some)
        whole |= len({len(each) for each in some}) > 1
        given, wanted = None if whole else torch.cat(some, 1), asked.few
    else:
        return None
    if given is None or wanted is None or not len(wanted):
        return None
    step = -(-len(given) // len(wanted))
    scenes = one.shape[0]
    kept = [-(-scenes // len(each)) for each in (given, wanted)]  # one in so many scenes
    given = given[::step] if kept[1] == step * kept[0] else given
    return (given, wanted) if len(given) == len(wanted) else None


def by_chance(scenes: int) -> float:
    """A share that is no more than what is found of targets that have nothing to do with as many scenes."""
    return SILENT * SCENES / min(scenes, SCENES)


def explained_share(inputs_NF: Tensor, targets_NG: Tensor) -> float | None:
    """The largest share of the targets' variance that a kernel regression predicts for scenes that it was not fitted
    to; None for too few scenes. The inputs are taken as they are, in order of size and by their spectrum: what depends
    on a place, on none, or on a period."""
    inputs, first = distinct(inputs_NF)
    targets = targets_NG[first].double()
    if len(inputs) < LEAST or inputs.shape[1] < 1:
        return None
    some = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:SCENES]
    inputs, targets = inputs[some].double(), targets[some]
    targets = targets - targets.mean(0)
    if not bool(inputs.isfinite().all() and targets.isfinite().all()) or not bool(targets.any()):
        return None
    views = [inputs, torch.fft.rfft(inputs - inputs.mean(1, keepdim=True)).abs(), inputs.sort(1).values]
    return max(_predicted(kernel, targets) for view in views for kernel in _kernels(view))


def distinct(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Different scenes, and where each is first."""
    rows, where = inputs.unique(dim=0, return_inverse=True)
    first = torch.full((len(rows),), len(inputs)).scatter_reduce(0, where, torch.arange(len(inputs)), "amin")
    return inputs[first], first


def _kernels(view: Tensor) -> list[Tensor]:
    spread = view.std(0)
    unit = ((view - view.mean(0)) / torch.where(spread > 0, spread, torch.inf)).nan_to_num()
    apart = torch.cdist(unit, unit).square()
    middle = apart.flatten()[:: 1 + apart.numel() // 10_000].median().clamp_min(1e-12)
    return [unit @ unit.T, *((-apart / (width * middle)).exp() for width in WIDTHS)]


def _predicted(kernel: Tensor, targets: Tensor) -> float:
    """Each scene from all others."""
    values, vectors = torch.linalg.eigh(kernel)
    given, whole = vectors.T @ targets, targets.square().sum() * (len(targets) / (len(targets) - 1)) ** 2
    shares = []
    for ridge in RIDGES:
        inverse = 1 / (values.clamp_min(0) + ridge * kernel.diagonal().mean())
        left = vectors @ (given * inverse[:, None]) / (vectors.square() @ inverse)[:, None]
        shares.append(1 - float(left.square().sum() / whole))
    return max(shares)
