"""Preflight of what was made of the network, compiled graphs and replicas: the step calls the network itself, on scenes
it leaves alone.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.network import CLOSE, SAME, change
from ris_fast.health.preflight.probe import SMALL, Subject
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes

FEW = 8  # scenes on which a network that torch did not compile is compared
CALLS = 4  # on the same few scenes: one network, or several that take turns
NOISIER = 1.5  # times the spread of the network's own answers
SLOPE, SLOPE_LOW = 1e-2, 0.2  # relative, of a gradient in float32 and in 16 bits
FAINT = 1e-4  # of the whole gradient: a tensor with less is measured by this


def inputs_kept(subject: Subject) -> Iterator[Finding]:
    """The network reads its scenes and does not write into them."""
    names = _altered(subject, subject.scenes)
    if names:
        yield Finding(
            "scenes_altered",
            f"after one call of the network the {' and the '.join(names)} of its scenes are not what they were.",
        )


def _altered(subject: Subject, scenes: Scenes) -> list[str]:
    """What of the scenes one call changes, in a copy of them."""
    names = [name for name in ("snapshots", "channel", "codes", "snr_db") if getattr(scenes, name) is not None]
    copy = replace(scenes, **{name: getattr(scenes, name).clone() for name in names})
    _network(subject, copy)
    return [
        name
        for name in names
        if not torch.allclose(getattr(copy, name), getattr(scenes, name), 0.0, 0.0, equal_nan=True)
    ]


def compiles(subject: Subject) -> Iterator[Finding]:
    """Compiles what training will call, once for the checks that follow and for training; the note says how long it
    took."""
    subject.trainer._compile()
    subject.note = subject.trainer.compile_note
    yield from ()


def same_network(subject: Subject) -> Iterator[Finding]:
    """What the step calls is the network: the same answers now, and after the weights have changed.

    Torch compiles anew for every mode, and training compiles one: what it compiled is called as training calls it.
    """
    if not subject.compiled and not _patched(subject):
        return
    few = subject.scenes[:FEW]
    scenes = subject.groups[0][0] if subject.by_torch else few
    random = _noise(subject, few, _eager) > 10 * SAME
    subject.model.train(subject.by_torch)
    finding = (
        _compare_random(subject, scenes)
        if random and subject.by_torch
        else _compare_compiled(subject, scenes)
        if subject.by_torch
        else _compare(subject, scenes, True)
    )
    subject.model.eval()
    with torch.no_grad():
        finding = finding or _compare(subject, few, False)
    subject.model.train()
    if finding is None and random:
        finding = _compare_modes(subject, scenes)
    if finding is not None:
        yield finding


def _patched(subject: Subject) -> bool:
    return "predict" in subject.step.__dict__


def _compare(subject: Subject, scenes: Scenes, grad: bool) -> Finding | None:
    answers = [_network(subject, scenes) for _ in range(CALLS)]
    spread = max(change(answers[0], other) for other in answers)
    if spread > CLOSE:
        return _calls_differ(subject, scenes, spread)
    written = _eager(subject, scenes)
    weights, directions = _elsewhere(subject)
    with subject.moved(weights, directions, 0.3):
        moved, wanted = _network(subject, scenes), _eager(subject, scenes)
    finding = _difference(subject, "while training" if grad else "in validation", answers[0], written, moved, wanted)
    if (
        finding is not None
        and finding.cause == "stale_compiled_graph"
        and not grad
        and change(answers[0], moved) < SAME
        and _follows(subject, weights, directions)
    ):
        return Finding(
            "cached_validation",
            "in validation, the network's answers to scenes that it has seen are the same, bit for bit, after "
            "its weights were changed; those to other scenes are not.",
        )
    return finding


def _difference(
    subject: Subject, how: str, answer: Tensor, written: Tensor, moved: Tensor, wanted: Tensor
) -> Finding | None:
    """What the step calls and the network as written, on the same scenes with the weights as they are, and with
    others."""
    now, later = change(written, answer), change(wanted, moved)
    if later > max(CLOSE, 2 * now) and (change(answer, moved) < SAME or later > 0.1 * change(wanted, written)):
        return _stale(how, later, now)
    if now > _tolerance(subject):
        own = subject.step.network is subject.trainer.network and not subject.by_torch
        return Finding(
            "compiled_differs",
            f"{how}, what the step calls answers otherwise than the network as written, "
            f"relative difference {now:.2g}{', though nothing is compiled' if own else ''}.",
            certain=not own,
        )
    return None


def _elsewhere(subject: Subject) -> tuple[list[nn.Parameter], list[Tensor]]:
    """All weights, and a random direction of the size of each."""
    weights = list(subject.parameters.values())
    return weights, [
        torch.randn_like(weight) * (float(weight.detach().square().mean().sqrt()) or 0.1) for weight in weights
    ]


def _stale(how: str, later: float, now: float) -> Finding:
    return Finding(
        "stale_compiled_graph",
        f"{how}, what the step calls does not follow the network's weights: after they were changed its "
        f"answers are off by {later:.2g} (before: {now:.2g}).",
    )


def _compare_random(subject: Subject, scenes: Scenes) -> Finding | None:
    """As `_compare` for dropout, whose random numbers a compiler draws in another order: means over two calls differ no
    more than those of the network itself do."""

    def gaps() -> tuple[float, float]:
        first, called, second = (
            sum(_seeded(call, subject, scenes, seed) for seed in seeds) / len(seeds)
            for call, seeds in ((_eager, (1, 2)), (_network, (3, 4)), (_eager, (5, 6)))
        )
        return change(first, called), change(first, second)

    now, usual = gaps()
    if now > CLOSE + NOISIER * usual:
        return Finding(
            "compiled_differs",
            "while training, what the step calls answers otherwise than the network as written: on the average "
            f"of two calls by {now:.2g}, the network itself by {usual:.2g}.",
        )
    with subject.moved(*_elsewhere(subject), 0.3):
        later, usual = gaps()
    return _stale("while training", later, now) if later > CLOSE + NOISIER * usual else None


def _compare_compiled(subject: Subject, scenes: Scenes) -> Finding | None:
    """As `_compare` for what torch compiled, and its backward pass too, on a whole batch: no pass more than it
    takes."""
    (answer, called), (written, slopes) = _gradients(subject, scenes), _gradients(subject, scenes, as_written=True)
    with subject.moved(*_elsewhere(subject), 0.3):
        moved, wanted = _network(subject, scenes), _eager(subject, scenes)
    return _difference(subject, "while training", answer, written, moved, wanted) or _compare_gradients(
        subject, called, slopes
    )


def _compare_gradients(subject: Subject, called: dict[str, Tensor], wanted: dict[str, Tensor]) -> Finding | None:
    """The compiled backward pass against that of the network as written."""
    if not wanted:
        return None
    total = float(torch.stack([slope.norm() for slope in wanted.values()]).norm())
    allowed = SLOPE if subject.config.training.precision == "fp32" else SLOPE_LOW
    off = {
        name: float((called[name] - slope).norm()) / max(float(slope.norm()), FAINT * total)
        for name, slope in wanted.items()
    }
    worst = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name])
    if math.isfinite(total) and not off[worst] <= allowed:
        return Finding(
            "compiled_differs",
            f"while training, the gradient that what the step calls gives {worst} is not the one of the network "
            f"as written, relative difference {off[worst]:.2g}.",
        )
    return None


def _gradients(subject: Subject, scenes: Scenes, *, as_written: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The factor; and name of each trainable tensor -> gradient of a random sum of the outputs, empty where autograd
    leads nowhere."""
    live = {name: parameter for name, parameter in subject.parameters.items() if parameter.requires_grad}
    prediction = _written(subject, scenes) if as_written else subject.step.predict(scenes)
    outputs = [value for value in prediction if value is not None and value.requires_grad]
    answer = prediction.factor.detach().float().clone()
    if not live or not outputs:
        return answer, {}
    generator = torch.Generator().manual_seed(29)
    sides = [torch.randn(value.shape, generator=generator).to(value) for value in outputs]
    slopes = torch.autograd.grad(outputs, list(live.values()), sides, allow_unused=True)
    return answer, {name: torch.zeros_like(live[name]) if slope is None else slope for name, slope in zip(live, slopes)}


def _calls_differ(subject: Subject, scenes: Scenes, spread: float) -> Finding | None:
    """Calls on the same scenes differ: ranks, or copies in one process; None for a network that is random or writes
    into its scenes."""
    if _altered(subject, scenes) or change(_eager(subject, scenes), _eager(subject, scenes)) > CLOSE:
        return None
    ranks = (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        or subject.config.training.accumulate > 1
    )
    return Finding(
        "ranks_diverged" if ranks else "stale_compiled_graph",
        f"calls of the step's network on the same scenes differ by {spread:.2g}: they do not use the same weights.",
    )


def _follows(subject: Subject, weights: list[nn.Parameter], directions: list[Tensor]) -> bool:
    """Whether scenes that were not asked for before are answered with the weights as they are."""
    with subject.moved(weights, directions, 0.3):
        fresh = subject.groups[1][0] if subject.by_torch else subject.groups[1][0][:SMALL]
        return change(_eager(subject, fresh), _network(subject, fresh)) < CLOSE


def _tolerance(subject: Subject) -> float:
    return CLOSE if subject.config.training.precision == "fp32" else 0.05


def _compare_modes(subject: Subject, scenes: Scenes) -> Finding | None:
    """A network with dropout is random in training; what the step calls must be as well."""
    if _noise(subject, scenes, _network) < SAME:
        return Finding(
            "eval_mode_in_training",
            "in training the network's dropout is at work, and what the step calls answers "
            "as in evaluation mode: it was compiled or copied in evaluation mode.",
        )
    return None


def _noise(subject: Subject, scenes: Scenes, call: Callable[[Subject, Scenes], Tensor]) -> float:
    """How much two answers to the same scenes differ in training."""
    subject.model.train()
    return change(*(_seeded(call, subject, scenes, seed) for seed in (1, 2)))


def _seeded(call: Callable[[Subject, Scenes], Tensor], subject: Subject, scenes: Scenes, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return call(subject, scenes)


def _network(subject: Subject, scenes: Scenes) -> Tensor:
    torch.manual_seed(torch.initial_seed() % 2**31)
    return subject.step.predict(scenes).factor.detach().float().clone()


def _eager(subject: Subject, scenes: Scenes) -> Tensor:
    return _written(subject, scenes).factor.detach().float().clone()


def _written(subject: Subject, scenes: Scenes) -> Prediction:
    """What the network as written answers, in the run's precision."""
    network = subject.step.network
    subject.step.network = subject.model
    try:
        return type(subject.step).predict(subject.step, scenes)
    finally:
        subject.step.network = network


SMALL_BATCH = {"the network leaves its scenes alone": inputs_kept}
COMPILING = {"the network is compiled": compiles}
WHOLE_STEP = {"the step calls the network itself": same_network}
