"""Plain PyTorch loops that do unusual things on purpose: the watch leaves them in peace, and names what looks the same and is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ris_fast.health import Finding, watch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def run(make: Callable[[Any], Any], model: nn.Module | None = None, steps: int = 24, before: Callable[..., Any] = lambda *_: None,
        after: Callable[..., Any] = lambda *_: None, scale: float = 1.0, **options: Any) -> list[Finding]:
    """`before` and `after` the optimizer's step are called with model and optimizer."""
    model = network() if model is None else model
    optimizer = make(model.parameters())
    seen = watch(model, optimizer, every=5, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * (model(torch.randn(32, 8)) - 1.0).square().mean()).backward()
        before(model, optimizer)
        optimizer.step()
        after(model, optimizer)
    return seen.report()


def causes(found: list[Finding], certain: bool = True) -> list[str]:
    return [finding.cause for finding in found if finding.certain or not certain]


def sgd(parameters: Any, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


@pytest.mark.parametrize("schedule", [lambda o: CosineAnnealingLR(o, 24), lambda o: LambdaLR(o, lambda n: max(0.0, 1 - n / 24)),
                                      lambda o: LambdaLR(o, lambda n: min(1.0, n / 10))])
def test_a_schedule_may_begin_or_end_at_zero(schedule: Callable[..., Any]) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    plan = schedule(optimizer)
    assert run(lambda _: optimizer, model, after=lambda *_: plan.step()) == []


def test_a_rate_that_was_always_zero_is_told_and_a_group_may_stand_still() -> None:
    assert causes(run(lambda p: sgd(p, 0.0))) == ["zero_learning_rate"]
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    found = run(lambda _: sgd(groups), model)
    assert causes(found) == [] and causes(found, False) == ["zero_learning_rate"] and "frozen=" in found[0].advice
    assert run(lambda _: sgd(groups), model, frozen=("0.",)) == []


def shrunk(factor: float) -> nn.Module:
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def test_weights_may_grow_from_nothing() -> None:
    line = nn.Linear(8, 4)
    nn.init.zeros_(line.weight), nn.init.zeros_(line.bias)
    assert run(lambda p: sgd(p, 0.1), line) == []
    assert run(lambda p: torch.optim.Adam(p, lr=1e-2), shrunk(1e-3), 100) == []
    assert causes(run(lambda p: torch.optim.Adam(p, lr=100.0)), False) == ["learning_rate_too_large"]


@pytest.mark.parametrize("make", [sgd, torch.optim.Adam])
@pytest.mark.parametrize("scale", [2e4, 3e4, 1e5])
def test_any_loss_scale_that_is_divided_out_is_no_clip(make: Callable[..., Any], scale: float) -> None:
    def unscale(model: nn.Module, _: Any) -> None:
        for parameter in model.parameters():
            parameter.grad /= scale

    assert run(make, before=unscale, scale=scale) == []


def test_clips_that_leave_nothing_are_told_where_they_matter() -> None:
    def clip(model: nn.Module, _: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-6)

    assert causes(run(sgd, before=clip)) == ["clip_too_small"]
    assert causes(run(torch.optim.Adam, before=clip)) == []          # which divides it out
    assert causes(run(torch.optim.Adam, before=clip), False) == ["clip_too_small"]


def test_a_loss_scale_taken_out_where_nothing_is_left_to_learn_is_doubted() -> None:
    """The factor stays and the norms fall; a threshold would keep the norm."""
    def unscale(model: nn.Module, _: Any) -> None:
        for parameter in model.parameters():
            parameter.grad /= 1e9

    found = run(sgd, before=unscale, scale=1e3)
    assert causes(found) == [] and causes(found, False) == ["clip_too_small"]


def test_frozen_layers_are_declared_or_doubted() -> None:
    model = network()
    model[0].requires_grad_(False)
    part = lambda _: sgd(model[2].parameters())
    assert causes(run(part, model)) == [] and causes(run(part, model), False) == ["frozen_parameters"]
    assert run(part, model, frozen=("0.",)) == [] == run(part, model, frozen="0.")
    model[0].weight.requires_grad_(True)
    model[2].requires_grad_(False)                                   # in the optimizer, and the smaller part
    assert causes(run(sgd, model)) == ["frozen_parameters"]


def unit_rows(model: nn.Module, _: Any) -> None:
    with torch.no_grad():
        model[0].weight.div_(model[0].weight.norm(dim=1, keepdim=True))


def swing(model: nn.Module, _: Any) -> None:
    """What is left of the weights when they were moved to another place and back, with rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1).sub_(0.1)


@pytest.mark.parametrize("habit", [unit_rows, swing])
def test_weights_that_something_else_moves_are_not_reset(habit: Callable[..., Any]) -> None:
    assert run(sgd, after=habit) == []


def test_weights_put_back_now_and_then_are_seen() -> None:
    first, count = network().state_dict(), iter(range(100))
    assert causes(run(sgd, after=lambda model, _: model.load_state_dict(first) if next(count) % 10 == 9 else None)) == ["weights_reset"]


def test_weights_at_rest_may_come_round_by_their_rounding() -> None:
    """Two states one rounding apart, taken in turns, and looked at in every fifth step."""
    line, count = nn.Linear(8, 4), iter(range(100))
    states = [{name: value * (1 + odd * 1e-6) for name, value in line.state_dict().items()} for odd in (0, 1)]

    def turn(model: nn.Module, _: Any) -> None:
        model.load_state_dict(states[(next(count) + 1) % 2])

    optimizer = sgd(line.parameters(), 1e-5)
    optimizer.register_step_post_hook(lambda *_: turn(line, None))        # within the step
    line.load_state_dict(states[0])
    assert run(lambda _: optimizer, line, 40) == []


def test_gradients_may_be_put_there_by_hand() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(12):
        slopes = torch.autograd.grad((model(torch.randn(32, 8)) - 1.0).square().mean(), list(model.parameters()))
        for parameter, slope in zip(model.parameters(), slopes):
            parameter.grad = slope
        optimizer.step()
    assert seen.report() == []


def test_mends_speak_of_a_plain_loop() -> None:
    from ris_fast.health.watch_rules import mend

    for cause in ("zero_learning_rate", "frozen_parameters", "clip_too_small", "nonfinite_gradients", "weight_decay_too_large"):
        assert not any(word in mend(cause) for word in ("health.", "optimizer.backbone_lr", "optimizer.max_grad_norm", "ris-fast")), cause
