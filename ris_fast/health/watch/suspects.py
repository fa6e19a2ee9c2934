"""What is most likely behind a loop that has learned nothing, of what its inputs, weights and steps show.

Each of these alone is no mistake: networks with normalisations take inputs and weights of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from ris_fast.health.watch.fixes import fix
from ris_fast.health.watch.records import LoopRecord, OptimizerRecord, is_finite

SMALL, LARGE = 0.03, 20.0  # spreads of inputs, and the root of their mean square
OFFSET, OUTLYING, RARE = 20.0, 60.0, 0.25  # means over spreads; outliers over the middle half, and their share
STILL, WILD = 0.02, 0.1  # of the weights, that all steps together move, and that one does
USUAL = 0.577  # of a matrix' norm over the root of its rows, as torch draws it
LARGE_WEIGHTS, SMALL_WEIGHTS = 4.0, 0.1  # times that
SHRUNK = 0.4
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Suspect:
    """`evidence`: what points to the cause, without a full stop."""

    cause: str
    evidence: str
    doubt: str
    advice: str


def suspect(loop: LoopRecord) -> Suspect | None:
    """The likeliest, or None."""
    ways: tuple[Callable[[LoopRecord], Suspect | None], ...] = (
        odd_inputs,
        straight_network,
        small_steps,
        odd_weights,
        wild_steps,
        shrunk_weights,
    )
    return next((found for way in ways if (found := way(loop)) is not None), None)


def odd_inputs(loop: LoopRecord) -> Suspect | None:
    """Inputs of a size, or with an offset or outliers, that initial weights are not made for."""
    if (numbers := raw_inputs(loop)) is None:
        return None
    spread, mean = float(numbers.std()), float(numbers.mean())
    middle = numbers.flatten()[:: max(1, numbers.numel() // 100_000)]
    low, half, high = (float(each) for each in middle.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=middle.dtype)))
    away = (middle - half).abs() / max(high - low, 1e-30)
    if high > low and bool((away > OUTLYING).any()) and float((away > OUTLYING / 2).double().mean()) < RARE:
        outlier = float(middle[away.argmax()])
        what = f"half of the numbers that go in lie from {low:.3g} to {high:.3g}, and some are {outlier:.3g}"
    elif spread < SMALL or math.hypot(spread, mean) > LARGE or abs(mean) > OFFSET * spread:
        what = f"what goes in is {mean:.3g} +- {spread:.2g}"
    else:
        return None
    return Suspect(
        "input_scale",
        f"{what}, for which initial weights are not made",
        "Targets that do not belong to their inputs would end like this, too.",
        "Bring each input to mean 0 and deviation 1, once, with the statistics of the training set; mark missing values"
        " in a column of their own.",
    )


def raw_inputs(loop: LoopRecord) -> Tensor | None:
    """(N, F) a few numbers of what the model is given in training; None where a normalisation or a table comes
    first."""
    forward = loop.forward
    if forward is None or not forward.layers.kinds:
        return None
    first = next(iter(forward.layers.kinds.values()))
    calls = next(iter(forward.layers.calls.values()), [])
    if isinstance(first, NORMS) or "Norm" in type(first).__name__ or not calls or calls[0].whole:
        return None
    keys = [each.keys for each in forward.passes if each.training and each.reached and each.keys is not None]
    keys = [each.double() for each in keys if each.shape[1] == keys[0].shape[1]]
    numbers = torch.cat(keys) if keys else torch.zeros(0)
    return numbers if len(numbers) > 1 and bool(numbers.isfinite().all()) and bool(numbers.std() > 0) else None


def straight_network(loop: LoopRecord) -> Suspect | None:
    """Several layers in a row, and nothing between them that bends."""
    shapes = loop.forward.shapes if loop.forward is not None else []
    if not shapes or any(each.straight < 2 for each in shapes):
        return None
    return Suspect(
        "limited_output",
        f"{shapes[0].straight} layers with weights follow one another, and no operation between them bends: together"
        " they can do what one of them can",
        "A linear model may be what is meant, and then the task asks for more.",
        "Put an activation between each two of them: `nn.Linear` and `nn.Conv2d` have none.",
    )


def small_steps(loop: LoopRecord) -> Suspect | None:
    """All steps together have moved the weights by next to nothing of their size."""
    by = loop.optimizers[0]
    ratios = _ratios(by)
    moved = median(ratios) * by.steps if ratios else 1.0
    rate = max((max(each.rates) for each in by.records if each.rates), default=0.0)
    if moved > STILL:
        return None
    return Suspect(
        "learning_rate_too_small",
        f"a step at a rate of {rate:.3g} moves the weights by {median(ratios):.2g} of their size, all {by.steps}"
        f" together by no more than {moved:.2g}",
        "Gradients that are scaled down on their way would do the same.",
        fix("learning_rate_too_small"),
    )


def wild_steps(loop: LoopRecord) -> Suspect | None:
    """Each step moves the weights by a good part of their size."""
    ratios = _ratios(loop.optimizers[0])
    if len(ratios) < 8 or median(ratios[:8]) < WILD:
        return None
    return Suspect(
        "learning_rate_too_large",
        f"a step moves the weights by {median(ratios[:8]):.2g} of their size",
        "Weights that begin very small look the same.",
        fix("learning_rate_too_large"),
    )


def _ratios(by: OptimizerRecord) -> list[float]:
    some = [float(each.update_ratio) for each in by.records if each.update_ratio is not None]
    return [each for each in some if each == each]


def odd_weights(loop: LoopRecord) -> Suspect | None:
    """Most matrices begin far larger or smaller than layers are drawn, and no normalisation takes that back."""
    by, forward = loop.optimizers[0], loop.forward
    if forward is None or not by.records or any(isinstance(each, NORMS) for each in forward.layers.kinds.values()):
        return None
    first = by.records[0]
    sizes = [
        float(norm) / (USUAL * usual)
        for name, norm, usual in zip(first.names, first.weights_before, first.usual_norms)
        if usual > 1 and name.rpartition(".")[2] == "weight"
    ]
    large, small = sum(each > LARGE_WEIGHTS for each in sizes), sum(each < SMALL_WEIGHTS for each in sizes)
    if len(sizes) < 2 or 2 * max(large, small) <= len(sizes):
        return None
    return Suspect(
        "bad_initialisation",
        f"{max(large, small)} of {len(sizes)} matrices begin {median(sizes):.2g} times as large as torch draws them",
        "A rate that does not fit would end like this, too.",
        "Draw a matrix with a deviation of about the root of 1 / inputs: torch's own layers do, and"
        " `nn.init.kaiming_normal_` or `xavier_normal_`; `normal_` draws with 1 where it is not told.",
    )


def shrunk_weights(loop: LoopRecord) -> Suspect | None:
    """A term of the loss that depends on weights alone has taken these to a part of what they were."""
    by = loop.optimizers[0]
    looks = [each for each in by.records if each.weights_after is not None and is_finite(each.weights_after)]
    if not any(each.of_weights for each in loop.met) or len(looks) < 16 or looks[0].names != looks[-1].names:
        return None
    wide = torch.tensor([size > 1.0 for size in looks[0].usual_norms]) & (looks[0].weights_before > 0)
    kept = float(looks[-1].weights_after[wide].norm()) / max(float(looks[0].weights_before[wide].norm()), 1e-30)
    if not wide.any() or kept > SHRUNK:
        return None
    return Suspect(
        "dominating_term",
        f"a term of the loss depends on weights alone, and the matrices have come to {kept:.2g} of their first norm",
        "Weights that are meant to become sparse shrink, too; so they do under a large `weight_decay`.",
        "Print the penalty beside the rest of the loss: a sum over all weights grows with their number, a mean does"
        " not.",
    )
