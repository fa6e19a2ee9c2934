"""Preflight of what was made of the network, compiled graphs and replicas: the step calls the network itself, on scenes it leaves alone.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Iterator

import torch
from torch import Tensor, nn

from ris_fast.health.check_network import CLOSE, SAME, change
from ris_fast.health.finding import Finding
from ris_fast.health.subject import SMALL, Subject
from ris_fast.physics.scenes import Scenes


def inputs_kept(subject: Subject) -> Iterator[Finding]:
    """The network reads its scenes and does not write into them."""
    names = _altered(subject, subject.scenes)
    if names:
        yield Finding("scenes_altered", f"after one call of the network the {' and the '.join(names)} of its scenes are not what they were.")


def _altered(subject: Subject, scenes: Scenes) -> list[str]:
    """What of the scenes one call changes, in a copy of them."""
    names = [name for name in ("snapshots", "channel", "codes", "snr_db") if getattr(scenes, name) is not None]
    copy = replace(scenes, **{name: getattr(scenes, name).clone() for name in names})
    _network(subject, copy)
    return [name for name in names if not torch.allclose(getattr(copy, name), getattr(scenes, name), 0.0, 0.0, equal_nan=True)]


def same_network(subject: Subject) -> Iterator[Finding]:
    """What the step calls is the network: the same answers now, and after the weights have changed."""
    if not subject.compiled and not _patched(subject):
        return
    scenes = subject.groups[0][0] if subject.by_torch else subject.scenes
    modes = [(module, module.training) for module in subject.model.modules()]
    for training in (False, True):
        subject.model.train(training)
        for grad in ((True, False) if not training else (True,)):
            with torch.set_grad_enabled(grad):
                finding = _compare(subject, scenes, grad)
            if finding is not None:
                break
        if finding is not None or not any(isinstance(m, nn.Dropout) and m.p for m in subject.model.modules()):
            break
    for module, mode in modes:
        module.training = mode
    if finding is not None:
        yield finding


def _patched(subject: Subject) -> bool:
    return "predict" in subject.step.__dict__


def _compare(subject: Subject, scenes: Scenes, grad: bool) -> Finding | None:
    if subject.model.training:
        return _compare_modes(subject, scenes)
    answers = [_network(subject, scenes) for _ in range(4)]
    spread = max(change(answers[0], other) for other in answers)
    if spread > CLOSE:
        return _calls_differ(subject, scenes, spread)
    now = change(_eager(subject, scenes), answers[0])
    weights = [parameter for parameter in subject.parameters.values()]
    directions = [torch.randn_like(weight) * (float(weight.detach().square().mean().sqrt()) or 0.1) for weight in weights]
    with subject.moved(weights, directions, 0.3):
        moved, wanted = _network(subject, scenes), _eager(subject, scenes)
    later, stuck = change(wanted, moved), change(answers[0], moved)
    how = "while training" if grad else "in validation"
    if later > max(CLOSE, 2 * now) and stuck < SAME and not grad and _follows(subject, weights, directions):
        return Finding("cached_validation", f"{how}, the network's answers to scenes that it has seen are the same, bit for bit, after "
                       f"its weights were changed; those to other scenes are not.")
    if later > max(CLOSE, 2 * now) and (stuck < SAME or later > 0.1 * change(wanted, _eager(subject, scenes))):
        return Finding("stale_compiled_graph", f"{how}, what the step calls does not follow the network's weights: after they "
                       f"were changed its answers are off by {later:.2g} (before: {now:.2g}).")
    if now > _tolerance(subject):
        own = subject.step.network is subject.trainer.network and not subject.by_torch
        return Finding("compiled_differs", f"{how}, what the step calls answers otherwise than the network as written, "
                       f"relative difference {now:.2g}{', though nothing is compiled' if own else ''}.", certain=not own)
    return None


def _calls_differ(subject: Subject, scenes: Scenes, spread: float) -> Finding | None:
    """Four calls on the same scenes differ: ranks, or copies in one process; None for a network that is random or writes into its scenes."""
    if _altered(subject, scenes) or change(_eager(subject, scenes), _eager(subject, scenes)) > CLOSE:
        return None
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized() or subject.config.training.accumulate > 1
    return Finding("ranks_diverged" if ranks else "stale_compiled_graph", f"four calls of the step's network on the same scenes differ by "
                   f"{spread:.2g}: they do not use the same weights.")


def _follows(subject: Subject, weights: list[nn.Parameter], directions: list[Tensor]) -> bool:
    """Whether scenes that were not asked for before are answered with the weights as they are."""
    with subject.moved(weights, directions, 0.3):
        fresh = subject.groups[1][0] if subject.by_torch else subject.groups[1][0][:SMALL]
        return change(_eager(subject, fresh), _network(subject, fresh)) < CLOSE


def _tolerance(subject: Subject) -> float:
    return CLOSE if subject.config.training.precision == "fp32" else 0.05


def _compare_modes(subject: Subject, scenes: Scenes) -> Finding | None:
    """A network with dropout is random in training; what the step calls must be as well."""
    def noise(call: object) -> float:
        answers = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            answers.append(call(subject, scenes))  # type: ignore[operator]
        return change(*answers)
    eager, called = noise(_eager), noise(_network)
    if eager > 10 * SAME and called < SAME:
        return Finding("eval_mode_in_training", "in training the network's dropout is at work, and what the step calls answers "
                       "as in evaluation mode: it was compiled or copied in evaluation mode.")
    return None


def _network(subject: Subject, scenes: Scenes) -> Tensor:
    torch.manual_seed(torch.initial_seed() % 2**31)
    return subject.step.predict(scenes).factor.detach().float().clone()


def _eager(subject: Subject, scenes: Scenes) -> Tensor:
    network = subject.step.network
    subject.step.network = subject.model
    try:
        return type(subject.step).predict(subject.step, scenes).factor.detach().float().clone()
    finally:
        subject.step.network = network


CHECKS = {"the network leaves its scenes alone": inputs_kept, "the step calls the network itself": same_network}
