"""Rules of `watch` on a loss scale: taken out twice, or still in the gradients when they are clipped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import finding
from ris_fast.health.watch.records import LoopRecord, OptimizerRecord, StepRecord, is_finite

CLOSE = 1e-3


def scale_findings(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Of steps that a torch.amp.GradScaler calls, whose scale is known."""
    looks = [(each, each.loss_scale) for each in optimizer.records if each.loss_scale and each.loss_scale >= 4]
    looks = [(each, scale) for each, scale in looks if not each.closure and _usable(each)]
    if len(looks) < 2:
        return
    factors = [(each, scale, ratio(each)) for each, scale in looks]
    if all(factor is not None and abs(factor * scale * scale - 1) < CLOSE for _, scale, factor in factors):
        scale = looks[0][1]
        yield finding(
            "unscaled_twice",
            f"gradients reach the optimizer at {factors[0][2]:.3g} of what arrives in all {len(looks)} steps that "
            "were looked"
            f" at: the square of 1 / {scale:g}, the loss scale.",
            looks[0][0].step + 1,
        )
        return
    norms = [(*each.gradient_norms(), scale) for each, scale in looks]
    clipped = [at_step * scale for _, at_step, scale in norms]
    arrived = [before / scale for before, _, scale in norms]
    same = max(clipped) <= (1 + CLOSE) * min(clipped) and max(arrived) > 1.01 * min(arrived)
    if len(norms) >= 4 and same and min(scale for *_, scale in norms) >= 16 and _is_round(clipped[0]):
        scales, at_step = {scale for *_, scale in norms}, norms[0][1]
        if len(scales) > 1 or not _is_round(at_step):
            yield finding(
                "clip_before_unscale",
                f"the norm that reaches the optimizer is {at_step:.3g} in all {len(norms)} steps that were looked at: "
                f"{clipped[0]:.3g}, a threshold, over the loss scale of {norms[0][2]:g}.",
                looks[0][0].step + 1,
            )


def scale_left_in(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    """A loss is multiplied by the scale of a GradScaler, which does not make the step: the gradients have it still.
    Where the loss was told too, the one that backward began from is that many times it."""
    looks = [each for each in optimizer.records if not each.closure and _usable(each)]
    as_they_came = all(ratio(each) is not None and abs(ratio(each) - 1) < CLOSE for each in looks)  # type: ignore[operator]
    alone = len(loop.optimizers) == 1 and not any(each.scaled or each.loss_scale for each in optimizer.records)
    met = {each.step: float(each.value) for each in loop.met if each.value is not None and each.chain[:1] == ["Mul"]}
    scale = next((each for each in loop.scales if each >= 4), 0.0)
    if not scale or not alone or len(looks) < 2 or not as_they_came or not 2 <= len(met) == len(loop.met):
        return
    told = {each.step: float(each.value) for each in loop.losses if each.value is not None}
    both = [(met[step], value) for step, value in told.items() if step in met and math.isfinite(value)]
    large = both or median(map(abs, met.values())) > scale / 100  # a scaler of another loop may be left
    if large and all(abs(scaled - scale * value) <= CLOSE * abs(scaled) for scaled, value in both):
        yield finding(
            "gradient_scale_differs",
            f"a GradScaler with a scale of {scale:g} is at work, backward passes begin from a product, and gradients"
            f" (norm {looks[0].gradient_norms()[1]:.3g}) reach the step as they come, which the scaler does not make.",
            looks[0].step + 1,
            "A scaler of another network, and a loss with a weight, look so.",
            "Call `scaler.step(optimizer)` and `scaler.update()` instead of `optimizer.step()`.",
        )


def _usable(record: StepRecord) -> bool:
    arrived, at_step = record.gradient_norms()
    return is_finite(record.grad_after_backward) and is_finite(record.grad_at_step) and arrived > 0 and at_step > 0


def ratio(record: StepRecord) -> float | None:
    """What reaches the optimizer over what arrived, if it is the same for all tensors."""
    some = record.grad_after_backward > 0
    if not some.any() or not is_finite(record.grad_at_step) or not is_finite(record.grad_after_backward):
        return None
    ratios = record.grad_at_step[some].double() / record.grad_after_backward[some].double()
    low, high = float(ratios.min()), float(ratios.max())
    return high if high <= (1 + CLOSE) * low else None


def is_square_of_scale(record: StepRecord) -> bool:
    """Whether the ratio is that of a power of two taken out twice, of 1024 or more."""
    factor = ratio(record)
    if not factor:
        return False
    power = -math.log2(factor)
    return power >= 20 and abs(power - round(power)) < 1e-5 and round(power) % 2 == 0


def _is_round(value: float) -> bool:
    """Two digits, as a person writes a threshold."""
    return value > 0 and abs(float(f"{value:.1e}") - value) <= CLOSE * value
