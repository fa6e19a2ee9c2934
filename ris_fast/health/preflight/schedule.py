"""Preflight of rates and sizes: the whole schedule, computed, beside the weights and the first gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import all_finite, listed, rms, total_norm
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.training.schedule import learning_rate_factor
from ris_fast.training.telemetry.step_window import median
from ris_fast.training.validation import scene_nmse

LONGEST_WARMUP = 0.5  # of the run
SHORTEST_PATH = 0.01  # all rates added up, beside the size of the weights: Adam moves about one rate a step
DECAY_PER_STEP = 0.01  # share of a weight that decay takes in one step; a hundred steps then forget it
LARGE, WILD = 0.5, 20.0  # times the size of a weight in one step
FLIPPED = 2.0  # share from which a weight that decays grows, with the other sign each time
EXCHANGED = 0.95  # a beta1 that no recipe is above with a smaller beta2
FAR_OFF = 10.0  # times the rate of the configuration
TINY = 1e-3  # numbers of a tensor
FINE, FINE_STEP, LONG_PATH = 5e-5, 1e-3, 2.0  # a rate; beside the size of a weight; all rates added up, beside it
UNTRAINED, SHUFFLES = 0.9, 3  # of the NMSE with shuffled weights; networks of these
CLIPPED_TO = 1e-3  # of the first gradient's norm


def factors(context: PreflightContext, samples: int = 1000) -> tuple[list[float], int]:
    """The schedule at up to `samples` of its steps, and the number of steps from one to the next."""
    settings, planned = context.config.optimizer, max(1, context.trainer.plan.planned)
    stride = max(1, planned // samples)
    return [
        learning_rate_factor(step, planned, settings.warmup, settings.final_lr) for step in range(0, planned, stride)
    ], stride


def rates(context: PreflightContext) -> Iterator[Finding]:
    """No group's rate is zero, the warm-up ends, and the run is long enough for its rates."""
    groups = context.optimizer.param_groups
    zero = [
        str(group.get("name", number))
        for number, group in enumerate(groups)
        if not group.get("peak_lr", group["lr"]) > 0
    ]
    if zero:
        yield Finding("zero_learning_rate", f"the learning rate of {listed(zero)} is zero.")
    if any(group.get("maximize") for group in groups):
        yield Finding("loss_sign", "the optimizer maximises the loss (maximize=True).")
    exchanged = [each for group in groups if (each := group.get("betas")) and each[0] > max(each[1], EXCHANGED)]
    if exchanged:
        mean, square = (1 / (1 - beta) for beta in exchanged[0])
        yield Finding(
            "learning_rate_too_large",
            f"betas are {exchanged[0]}: the gradient is averaged over {mean:.0f} steps and its square over"
            f" {square:.0f}, so that steps have another size than the rate and go on where the gradient has turned long"
            " ago. The two are exchanged.",
            advice="Set optimizer.beta1=0.9 and optimizer.beta2=0.999.",
            certain=False,
        )
    yield from _peaks(context)
    shape, stride = factors(context)
    planned = context.trainer.plan.planned
    top = shape.index(max(shape)) * stride
    if planned > 10 and top >= LONGEST_WARMUP * planned:
        yield Finding("warmup_too_long", f"the learning rate rises until step {top} of {planned}.", certain=False)
    yield from _sizes(context, sum(shape) * stride)


def _peaks(context: PreflightContext) -> Iterator[Finding]:
    """The peak rates of all groups together are not far from those of the configuration."""
    settings = context.config.optimizer
    wanted = max(settings.backbone_lr, settings.head_lr)
    peak = max((group.get("peak_lr", group["lr"]) for group in context.optimizer.param_groups), default=0.0)
    if 0 < peak < wanted / FAR_OFF or peak > FAR_OFF * wanted > 0:
        yield Finding(
            "learning_rate_too_small" if peak < wanted else "learning_rate_too_large",
            f"the highest peak rate of the optimizer's groups is {peak:.2g}, and the configuration has {wanted:.2g}."
            " Something has set it, as an optimizer's state that was loaded from another run brings its rates along.",
            advice="After optimizer.load_state_dict(...) set group['lr'] and group['peak_lr'] again, or give the rate"
            " that is meant in optimizer.backbone_lr and optimizer.head_lr.",
            certain=False,
        )


def _sizes(context: PreflightContext, path: float) -> Iterator[Finding]:
    """One step moves a weight by about its rate: all of them beside the weights' size, and one beside it.

    Certain is what no run survives: rates at which no group moves, or at which every step is many times what a layer
        holds.
    """
    groups = context.optimizer.param_groups
    slow, fast, wild = [], [], False
    for number, group in enumerate(groups):
        peak = group.get("peak_lr", group["lr"])
        matrices = [p.detach() for p in group["params"] if p.dim() > 1 and bool(p.any())]
        if not matrices or not peak > 0:
            continue
        name, size = str(group.get("name", number)), median([rms(p) for p in matrices])
        usual = max(
            size, median([p[0].numel() ** -0.5 for p in matrices])
        )  # small first weights grow to this in no time
        if peak * path < SHORTEST_PATH * size and context.trainer.plan.planned > 20:
            slow.append(f"{name}: {peak * path:.2g} beside weights of {size:.2g}")
        if peak > LARGE * usual:
            fast.append(f"{name}: {peak:.2g} a step beside weights of {usual:.2g}")
            wild = wild or peak > WILD * usual
        decay = peak * group.get("weight_decay", 0.0)
        if decay > DECAY_PER_STEP:
            yield Finding(
                "weight_decay_too_large",
                f"decay takes {decay:.0%} of the weights of {name} in every step at the peak rate.",
                certain=decay >= FLIPPED,
            )
    moving = [group for group in groups if any(p.dim() > 1 for p in group["params"])]
    if not slow and (seen := _gentle(context, path)):
        yield Finding(
            "learning_rate_too_small",
            seen,
            advice="Where weights were to be loaded, print what load_state_dict(..., strict=False) returns: with names"
            " that begin otherwise, as with 'module.' or '_orig_mod.', it loads none and says so there alone. To train"
            " from scratch, take rates of 1e-4 or more.",
            certain=False,
        )
    if slow:
        yield Finding(
            "learning_rate_too_small",
            f"the whole run can move weights by no more than {listed(slow)}.",
            certain=len(slow) == len(moving),
        )
    if fast:
        yield Finding(
            "learning_rate_too_large",
            f"one step moves weights by more than {LARGE:g} of their size, since Adam's are of the rate's size whatever"
            f" the gradient: {listed(fast)}.",
            certain=wild,
        )


def _gentle(context: PreflightContext, path: float) -> str:
    """What says that all rates are of a fine-tuning and the weights are those of no training; empty where not."""
    moving = [
        (group.get("peak_lr", group["lr"]), median([rms(p) for p in matrices]))
        for group in context.optimizer.param_groups
        if (matrices := [p.detach() for p in group["params"] if p.dim() > 1 and bool(p.any())])
    ]
    if not moving or any(
        not 0 < peak < FINE or peak > FINE_STEP * size or peak * path > LONG_PATH * size for peak, size in moving
    ):
        return ""
    score, drawn = _beside_shuffled(context)
    if not score > UNTRAINED * drawn:
        return ""
    peak = max(peak for peak, _ in moving)
    return (
        f"rates are {peak:.2g} at most, as to refine weights that have learned, and the network knows no more than one"
        f" whose numbers are shuffled within each tensor (an NMSE of {score:.3g} beside {drawn:.3g}): it starts"
        " untrained. Either the rates are too small for that, or weights that were to be loaded are not in it."
    )


@torch.no_grad()
def _beside_shuffled(context: PreflightContext) -> tuple[float, float]:
    """The NMSE of the small batch, and the lowest of networks with the same numbers in other places."""
    live = [each for each in context.trainable.values() if each.dim() > 1]
    generator, drawn = torch.Generator().manual_seed(71), []
    score = float(scene_nmse(context.guess, context.scenes).mean())
    for _ in range(SHUFFLES):
        ways = [
            each.detach().flatten()[torch.randperm(each.numel(), generator=generator)].view_as(each) - each
            for each in live
        ]
        with context.moved(live, ways, 1.0):
            drawn.append(float(scene_nmse(context.predict(context.scenes), context.scenes).mean()))
    return score, min(drawn)


def first_gradient(context: PreflightContext) -> Iterator[Finding]:
    """Clip threshold and Adam's epsilon beside the first gradient.

    Adam divides a gradient by its own size, so that clipping changes no step, until its epsilon is larger than what is
    left.
    """
    live = [p for p in context.parameters.values() if p.requires_grad]
    total = context.run()[0]
    if not live or not total.requires_grad or not bool(total.isfinite()):
        return
    parts = [g for g in derivatives(total, live) if g is not None and bool(g.any())]
    if not parts or not all_finite(parts):
        return
    norm = total_norm(parts)
    limit = context.optimizer.max_grad_norm or math.inf
    sizes = [rms(part) * min(1.0, limit / norm) for part in parts]
    size, largest = median(sizes), max(sizes)
    if (loud := _loud(context, limit)) is not None:
        yield loud
        return
    eps = max(group.get("eps", 0.0) for group in context.optimizer.param_groups)
    if limit < CLIPPED_TO * norm and eps > size:
        yield Finding(
            "clip_too_small",
            f"gradients of norm {norm:.3g} are clipped to {limit:.3g}, and an entry to {size:.2g}, beside Adam's "
            f"epsilon of {eps:.2g}.",
            certain=eps > largest,
        )
    elif eps > 10 * size:
        yield Finding(
            "epsilon_swallows_signal",
            f"Adam's epsilon is {eps:.2g} and a gradient entry {size:.2g}: steps are as much "
            "smaller than the learning rate says.",
            certain=eps > largest,
        )


def _loud(context: PreflightContext, limit: float) -> Finding | None:
    """A tensor of tiny numbers that alone makes the gradient as large, where a clip cuts all of it to nothing."""
    live = context.trainable
    for name, tensor in live.items():
        if not 0 < (tiny := rms(tensor)) < TINY:
            continue
        norms = []
        for larger in (0.0, 1.0 / tiny - 1.0):
            with context.moved([tensor], [tensor.detach().clone()], larger):
                norms.append(total_norm(derivatives(context.run()[0], list(live.values()))))
        if norms[1] * CLIPPED_TO < limit < norms[0] * CLIPPED_TO:
            return Finding(
                "bad_initialisation",
                f"the numbers of {name} are {tiny:.1e} at the start, and the gradient of all has norm {norms[0]:.2g}"
                f" with them and {norms[1]:.2g} with numbers of order one: what they multiply is next to nothing, a"
                f" normalisation behind makes up for that, and the clip to {limit:g} leaves nothing of the gradient.",
                certain=False,
            )
    return None


CHECKS = {"the schedule of the whole run": rates, "clipping and epsilon beside the first gradient": first_gradient}
