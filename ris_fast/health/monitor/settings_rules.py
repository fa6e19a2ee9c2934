"""Rules over what is trained, and how: as it was when the run began, and as it is now."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ris_fast.config.spelling import words
from ris_fast.health.finding import Finding
from ris_fast.health.monitor.history import Row, Rule, RunHistory
from ris_fast.health.names import begins
from ris_fast.health.preflight.parameters import MOSTLY_FROZEN
from ris_fast.training.loss import TERMS

TRUTH = ("loss.cov", "loss.cov_pred", "loss.subspace", "loss.contrast")  # weights of what tells the factors the truth
STEEP_DECAY = 0.1  # of a weight in one step
ALL_WARM_UP = 0.95  # of the run
DOMINATES = 0.95  # of the loss, taken by what is not the covariance
NEXT_TO_NOTHING = 1e-6  # of a gradient, which clipping leaves
FAR_ABOVE, LARGE_EPSILON = 100.0, 1e-5  # epsilon over the gradient's root mean square; and at least
NEARLY_ALL = 0.9  # dropout
HALF = 0.5  # of the run


def settings_of(run: RunHistory) -> Mapping[str, Any]:
    return run.info.get("settings") or {}


def latest(run: RunHistory) -> Row:
    """The readings of the newest row, of a step or of an epoch."""
    epoch = run.epochs[-1].get("step", 0) if run.epochs else -1
    step = run.steps[-1].get("step", 0) if run.steps else -1
    return run.validation if epoch >= step else run.reading


def settings_changed(run: RunHistory) -> Iterator[Finding]:
    """What is trained, and how, stays as it was unless a callback says that it changes it."""
    changed: Mapping[str, Any] = latest(run).get("settings_changed") or {}
    if not changed:
        return
    if lost := changed.get("in no group"):
        if lost[1]["count"]:
            yield run.finding(
                "missing_from_optimizer",
                f"{lost[1]['count']} tensors are trainable since the run began and in no group of the optimizer, the"
                f" first {', '.join(lost[1]['names'][:3])}: no step moves them.",
            )
    weights = {name: value for name, value in changed.items() if name in TRUTH and _is_number(value[1])}
    told = {name: value for name, value in settings_of(run).items() if name in TRUTH} | {
        name: value[1] for name, value in weights.items()
    }
    if weights and told and not any(told.values()):
        yield run.finding(
            "zero_loss_weight",
            f"the weights of all terms that tell the network the truth are zero now: {_listed(weights)}.",
        )
    elif negative := {name: value for name, value in weights.items() if value[1] < 0}:
        yield run.finding("loss_sign", f"a weight of the covariance loss is negative now: {_listed(negative)}.")
    if decay := changed.get("optimizer.ema_decay"):
        yield from _decay(run, decay[1])
    rest = {name: value for name, value in changed.items() if name not in ("in no group", "optimizer.ema_decay")}
    if rest:
        yield Finding(
            "settings_changed",
            f"since the run began: {_listed(rest)}.{_by_whom(run)}",
            run.step,
            advice=(
                "If a callback or a schedule of yours is meant to do this, say so in it: `changes = "
                f"({next(iter(rest))!r},)` in its class. If not, look for what writes to the loss, the optimizer or"
                " the network between two steps."
            ),
            certain=False,
        )


def _decay(run: RunHistory, decay: Any) -> Iterator[Finding]:
    """The decay of the average may grow during the run; early in it an average does not stand still."""
    planned = run.steps[-1].get("planned_steps") if run.steps else None
    if not _is_number(decay) or not planned or run.step > HALF * planned:
        return
    memory = 1.0 / (1.0 - decay) if decay < 1.0 else math.inf
    if not 0.0 <= decay <= 1.0 or memory > planned:
        yield run.finding(
            "ema_frozen",
            f"the decay of the average is {decay:.9g} at step {run.step:,} of {planned:,}, that of an average over"
            f" {memory:.3g} steps: from here on it hardly follows the weights, or not at all.{_by_whom(run)}",
            certain=False,
        )


def _by_whom(run: RunHistory) -> str:
    names = run.info.get("own_callbacks") or []
    return f" Callbacks that may have done it: {', '.join(names)}." if names else " No callback of the run is yours."


def _listed(changed: Mapping[str, Any]) -> str:
    """'loss.cov from 1 to 0.03, 12 tensors frozen (a, b, c)'; four at most."""
    said = [_said(name, *value) for name, value in changed.items()]
    return ", ".join(said[:4]) + (f" and {len(said) - 4} more" if len(said) > 4 else "")


def _said(name: str, before: Any, now: Any) -> str:
    if isinstance(now, Mapping) and "count" in now:
        parts = [
            f"{each['count']} tensors {verb} ({', '.join(each['names'][:3])})"
            for each, verb in ((now, f"became {name}"), (before, f"are no longer {name}"))
            if each["count"]
        ]
        return " and ".join(parts)
    return f"{name} from {_short(before)} to {_short(now)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else "none" if value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def trained_tensors(run: RunHistory) -> Iterator[Finding]:
    """Every tensor of the network is trained, in one group of the optimizer."""
    seen = settings_of(run).get("membership")
    if len(run.steps) != 1 or not seen:
        return
    if (missing := seen["in_no_group"])["count"]:
        yield run.finding(
            "missing_from_optimizer",
            f"{missing['count']} of {seen['tensors']} tensors are trainable and in no group of the optimizer, the first"
            f" {', '.join(missing['names'][:3])}.",
        )
    if seen["not_of_the_network"]:  # which may be the parameters of a loss
        yield run.finding(
            "stale_optimizer_parameters",
            f"{seen['not_of_the_network']} of the optimizer's tensors are not the network's.",
            certain=bool(missing["count"]),
        )
    if (twice := seen["held_twice"])["count"]:
        yield run.finding(
            "duplicate_parameters",
            f"{twice['count']} tensors are in the optimizer more than once: {', '.join(twice['names'][:3])}.",
        )
    frozen, meant = seen["frozen"], words(str(run.info.get("frozen_on_purpose") or ""))
    names = [name for name in frozen["names"] if not begins(name, meant)]
    if names:
        yield run.finding(
            "frozen_parameters",
            f"{frozen['count']} of {seen['tensors']} tensors ({frozen['share']:.0%} of the weights) do not require a"
            f" gradient: {', '.join(names[:3])}.",
            certain=frozen["share"] >= MOSTLY_FROZEN and not run.info.get("from_weights"),
        )


def options_at_the_start(run: RunHistory) -> Iterator[Finding]:
    """Rates, decay, warm-up and the weights of the loss let something be learned."""
    settings = settings_of(run)
    if len(run.steps) != 2 or not settings:
        return
    rates, planned = run.steps[-1].get("lr") or {}, run.steps[-1].get("lr_planned") or {}
    if rates and not any(rates.values()) and not any(planned.values()):
        yield run.finding("zero_learning_rate", f"the learning rates of all {len(rates)} groups are zero, as planned.")
    decays = {name: settings.get(f"optimizer.weight_decay of {name}", 0.0) * peak for name, peak in peaks(settings)}
    if steep := [name for name, share in decays.items() if share >= STEEP_DECAY]:
        yield run.finding(
            "weight_decay_too_large",
            f"at its peak rate weight decay takes {decays[steep[0]]:.0%} of every weight of {steep[0]} in each step.",
        )
    if (warm := run.info.get("warmup") or 0.0) >= ALL_WARM_UP:
        yield run.finding("warmup_too_long", f"the learning rate rises over {warm:.0%} of the run.")
    shares = {name: share for name, share in settings.items() if name.startswith("dropout of ")}
    dropped = {name: share for name, share in shares.items() if share >= NEARLY_ALL}
    if dropped:
        name = max(dropped, key=dropped.__getitem__)
        yield run.finding("heavy_dropout", f"{name[11:]} drops {dropped[name]:.0%} of its inputs.", certain=False)
    told = {name: value for name, value in settings.items() if name in TRUTH}
    planned_weights = settings.get("off_plan") or {}
    if told and not any(told.values()):
        yield run.finding(
            "zero_loss_weight", f"{', '.join(told)} are zero in the loss: no term tells the network the truth."
        )
    elif zero := [name for name in TRUTH if planned_weights.get(name, [0.0, 1.0])[1] == 0]:
        yield run.finding(
            "zero_loss_weight",
            f"{zero[0]} is zero in the loss and {planned_weights[zero[0]][0]:g} in the configuration.",
            certain=False,
        )


def peaks(settings: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The name of each group of the optimizer, and its peak rate."""
    start = "optimizer.peak_lr of "
    return [(name[len(start) :], value) for name, value in settings.items() if name.startswith(start)]


def gradient_beside_its_options(run: RunHistory) -> Iterator[Finding]:
    """The gradient is larger than epsilon and is not clipped to nothing, and the covariance is a part of the loss."""
    settings, reading, row = settings_of(run), run.reading, run.steps[-1]
    norm, numbers = reading.get("raw_norm"), run.info.get("parameters") or 1
    if not settings or len(run.steps) < 4:
        return
    weighted = {name: abs(term["weighted"]) for name, term in (row.get("terms") or {}).items()}
    total = sum(weighted.values())
    # A term of the user's own may be the main one.
    others = {name: value for name, value in weighted.items() if f"loss.{name}" not in TRUTH and total > 0}
    others = {name: value for name, value in others.items() if name in TERMS}
    if others and any(f"loss.{name}" in TRUTH for name in weighted) and sum(others.values()) > DOMINATES * total:
        name = max(others, key=others.__getitem__)
        if math.isfinite(total):
            yield run.finding(
                "dominating_term",
                f"{name} is {others[name] / total:.1%} of the weighted loss; the terms of the covariance are"
                f" {1 - sum(others.values()) / total:.2%}.",
                certain=False,
            )
    if not norm or not math.isfinite(norm) or (row.get("loss_scale") or 1.0) != 1.0:
        return
    clip = settings.get("optimizer.max_grad_norm")
    epsilons = [value for name, value in settings.items() if name.startswith("optimizer.eps of ")]
    rms = norm / math.sqrt(numbers)
    if clip is not None and 0 < clip < NEXT_TO_NOTHING * norm and clip / math.sqrt(numbers) < 10 * min(epsilons or [0]):
        yield run.finding(
            "clip_too_small",
            f"clipping to {clip:.3g} leaves {clip / norm:.1e} of a gradient of norm {norm:.3g}, whose numbers then are"
            f" {clip / math.sqrt(numbers):.1e} beside an epsilon of {min(epsilons):.0e}.",
        )
    elif epsilons and min(epsilons) >= LARGE_EPSILON and min(epsilons) > FAR_ABOVE * rms:
        yield run.finding(
            "epsilon_swallows_signal",
            f"the optimizer's epsilon is {min(epsilons):.0e} and the gradient's numbers are {rms:.1e}: steps are"
            f" {rms / min(epsilons):.1e} of the rate.",
            certain=False,
        )


def settings_off_plan(run: RunHistory) -> Iterator[Finding]:
    """A run that stalled had the settings that its configuration names."""
    off = settings_of(run).get("off_plan") or {}
    if run.summary.get("verdict") == "stalled" and off:
        yield run.finding(
            "settings_changed",
            f"before the first step something had changed what the configuration says: {_listed(off)}.",
            certain=False,
        )


SETTINGS_RULES: tuple[Rule, ...] = (
    trained_tensors,
    options_at_the_start,
    gradient_beside_its_options,
    settings_changed,
)
