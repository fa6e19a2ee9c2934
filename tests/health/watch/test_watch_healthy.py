"""Plain PyTorch loops that do unusual things on purpose: the watch leaves them in peace, and names what looks the same
and is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ris_fast import FusedAdamW
from ris_fast.health import Finding, watch
from tests.health.watch.loops import network


def run(
    make: Callable[[Any], Any],
    model: nn.Module | None = None,
    steps: int = 24,
    before: Callable[..., Any] = lambda *_: None,
    after: Callable[..., Any] = lambda *_: None,
    scale: float = 1.0,
    **options: Any,
) -> list[Finding]:
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


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: CosineAnnealingLR(o, 24),
        lambda o: LambdaLR(o, lambda n: max(0.0, 1 - n / 24)),
        lambda o: LambdaLR(o, lambda n: min(1.0, n / 10)),
    ],
)
def test_watch_allows_a_schedule_that_touches_zero(schedule: Callable[..., Any]) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    plan = schedule(optimizer)
    assert run(lambda _: optimizer, model, after=lambda *_: plan.step()) == []


def test_watch_names_a_rate_that_was_always_zero() -> None:
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


def test_watch_allows_weights_that_grow_from_nothing() -> None:
    line = nn.Linear(8, 4)
    nn.init.zeros_(line.weight), nn.init.zeros_(line.bias)
    assert run(lambda p: sgd(p, 0.1), line) == []
    assert run(lambda p: torch.optim.Adam(p, lr=1e-2), shrunk(1e-3), 100) == []
    assert causes(run(lambda p: torch.optim.Adam(p, lr=100.0)), False) == ["learning_rate_too_large"]


@pytest.mark.parametrize("make", [sgd, torch.optim.Adam])
@pytest.mark.parametrize("scale", [2e4, 3e4, 1e5])
def test_watch_allows_any_loss_scale_divided_out(make: Callable[..., Any], scale: float) -> None:
    def unscale(model: nn.Module, _: Any) -> None:
        for parameter in model.parameters():
            parameter.grad /= scale

    assert run(make, before=unscale, scale=scale) == []


def test_watch_names_clips_that_leave_nothing() -> None:
    def clip(model: nn.Module, _: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-6)

    assert causes(run(sgd, before=clip)) == ["clip_too_small"]
    assert causes(run(torch.optim.Adam, before=clip)) == []  # which divides it out
    assert causes(run(torch.optim.Adam, before=clip), False) == ["clip_too_small"]


def test_watch_doubts_a_loss_scale_taken_out_too_far() -> None:
    """The factor stays and the norms fall; a threshold would keep the norm."""

    def unscale(model: nn.Module, _: Any) -> None:
        for parameter in model.parameters():
            parameter.grad /= 1e9

    found = run(sgd, before=unscale, scale=1e3)
    assert causes(found) == [] and causes(found, False) == ["clip_too_small"]


def test_watch_doubts_frozen_layers_unless_declared() -> None:
    model = network()
    model[0].requires_grad_(False)
    model[0].weight.normal_(std=0.1)  # as trained weights lie: fresh ones behind it would be named

    def part(_: Any) -> torch.optim.Optimizer:
        return sgd(model[2].parameters())

    assert run(part, model) == []  # a base that is most of the network, and in no optimizer
    assert run(part, model, frozen=("0.",)) == [] == run(part, model, frozen="0.")
    model[0].weight.requires_grad_(True)
    model[2].requires_grad_(False)  # in the optimizer, and the smaller part
    found = run(sgd, model)
    assert causes(found) == [] and causes(found, False) == ["frozen_parameters"]


def unit_rows(model: nn.Module, _: Any) -> None:
    with torch.no_grad():
        model[0].weight.div_(model[0].weight.norm(dim=1, keepdim=True))


def swing(model: nn.Module, _: Any) -> None:
    """What is left of the weights when they were moved to another place and back, with rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1).sub_(0.1)


@pytest.mark.parametrize("habit", [unit_rows, swing])
def test_watch_allows_weights_that_something_else_moves(habit: Callable[..., Any]) -> None:
    assert run(sgd, after=habit) == []


@pytest.mark.parametrize(("make", "said"), [(torch.optim.AdamW, ["weights_reset"]), (sgd, [])])
def test_watch_names_weights_put_back_now_and_then(make: Any, said: list[str]) -> None:
    """Not with certainty; episodes begin so, and where the optimizer keeps no state that is all there is to them."""
    first, count = network().state_dict(), iter(range(200))
    found = run(make, None, 150, after=lambda model, _: model.load_state_dict(first) if next(count) % 10 == 9 else None)
    assert causes(found) == [] and causes(found, False) == said


def test_watch_allows_weights_that_repeat_by_rounding() -> None:
    """Two states one rounding apart, taken in turns, and looked at in every fifth step."""
    line, count = nn.Linear(8, 4), iter(range(100))
    states = [{name: value * (1 + odd * 1e-6) for name, value in line.state_dict().items()} for odd in (0, 1)]

    def turn(model: nn.Module, _: Any) -> None:
        model.load_state_dict(states[(next(count) + 1) % 2])

    optimizer = sgd(line.parameters(), 1e-5)
    optimizer.register_step_post_hook(lambda *_: turn(line, None))  # within the step
    line.load_state_dict(states[0])
    assert run(lambda _: optimizer, line, 40) == []


def test_watch_allows_gradients_set_by_hand() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(12):
        slopes = torch.autograd.grad((model(torch.randn(32, 8)) - 1.0).square().mean(), list(model.parameters()))
        for parameter, slope in zip(model.parameters(), slopes):
            parameter.grad = slope
        optimizer.step()
    assert seen.report() == []


# ---- what was trained in steps that were not looked at ----

MAKES = [sgd, lambda p: torch.optim.AdamW(p, lr=1e-3), torch.optim.Adagrad, FusedAdamW]


def fit(optimizer: torch.optim.Optimizer, output: Tensor) -> None:
    optimizer.zero_grad()
    (output - 1.0).square().mean().backward()
    optimizer.step()


def batch() -> Tensor:
    return torch.randn(4, 8)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("parts, every", [((0, -1), 100), ((-1, 0), 100), ((0, -1), 7)])
def test_watch_allows_layers_frozen_in_turn(parts: tuple[int, int], every: int, make: Callable[..., Any]) -> None:
    model = network()
    optimizer = make(model.parameters())
    seen = watch(model, optimizer, every)
    for number in range(120):
        model.requires_grad_(True)
        model[parts[number % 2]].requires_grad_(False)
        fit(optimizer, model(batch()))
    assert causes(seen.report()) == []  # one is frozen at this moment
    model.requires_grad_(True)
    assert seen.report() == []


@pytest.mark.parametrize("make", [sgd, torch.optim.AdamW])
def test_watch_allows_experts_trained_in_turn(make: Callable[..., Any]) -> None:
    experts = nn.ModuleList(nn.Linear(8, 4) for _ in range(30))
    optimizer = make(experts.parameters())
    seen = watch(experts, optimizer)
    for number in range(240):
        fit(optimizer, experts[number % 30](batch()))
        if number == 10:  # two thirds have not had their turn
            assert seen.report() == []
    assert seen.report() == []


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("joins", [11, 1000])
def test_watch_names_a_head_that_never_joins(joins: int, make: Callable[..., Any]) -> None:
    model = nn.ModuleDict({"body": network(), "head": nn.Linear(4, 2)})
    optimizer = make(model.parameters())
    seen = watch(model, optimizer)
    for number in range(99):
        output = model["body"](batch())
        fit(optimizer, output if number < joins else torch.cat([output, model["head"](output)], 1))
    found = seen.report()
    assert causes(found) == [] and causes(found, False) == ([] if joins == 11 else ["unused_head"])


def test_watch_ignores_moments_from_an_earlier_run() -> None:
    model = nn.ModuleDict({"body": network(), "head": nn.Linear(4, 2)})
    old, new = (torch.optim.AdamW(model.parameters()) for _ in range(2))
    fit(old, model["head"](model["body"](batch())))
    seen = watch(model, new)
    new.load_state_dict(old.state_dict())
    for _ in range(12):
        fit(new, model["body"](batch()))
    assert causes(seen.report(), False) == ["unused_head"]


def test_watch_allows_declared_layers_in_no_optimizer() -> None:
    model = network()
    optimizer = sgd(model[2].parameters())
    assert watch(model, optimizer, frozen=("0.",)).report() == []
    assert run(lambda _: optimizer, model, frozen=("0.",)) == []
    assert causes(run(lambda _: optimizer, model, frozen=("0.weight",))) == ["missing_from_optimizer"]


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("make", MAKES)
def test_watch_allows_a_critic_frozen_in_generator_steps(make: Callable[..., Any], clamp: bool) -> None:
    nets = nn.ModuleDict(
        {"made": nn.Linear(8, 4), "critic": nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))}
    )
    makes, judges = make(nets["made"].parameters()), make(nets["critic"].parameters())
    seen = watch(nets, [makes, judges])
    for number in range(40):
        nets["critic"].requires_grad_(True)
        fit(judges, nets["critic"](nets["made"](batch()).detach()))
        if clamp:
            torch._foreach_clamp_max_([p.data for p in nets["critic"].parameters()], 0.05)
        nets["critic"].requires_grad_(False)
        fit(makes, nets["critic"](nets["made"](batch())))
        if number % 13 == 0:
            assert seen.report() == []


@pytest.mark.parametrize("make", MAKES)
def test_watch_allows_freezing_a_trained_network(make: Callable[..., Any]) -> None:
    model = network()
    optimizer = make(model.parameters())
    assert run(lambda _: optimizer, model) == []
    seen = watch(model, optimizer)
    for _ in range(12):
        fit(optimizer, model(batch()))
    model.requires_grad_(False)
    assert seen.report() == []
    model[2].requires_grad_(True)
    for _ in range(12):  # training goes on without the first layer
        fit(optimizer, model(batch()))
    assert causes(seen.report()) == [] and causes(seen.report(), False) == ["frozen_parameters"]


@pytest.mark.parametrize("make", MAKES)
def test_watch_allows_parameters_of_a_criterion(make: Callable[..., Any]) -> None:
    model, sigma = network(), nn.Linear(1, 1)
    optimizer = make([*model.parameters(), *sigma.parameters()])
    seen = watch(model, optimizer)
    assert causes(seen.report()) == []
    for _ in range(12):
        output = model(batch())
        fit(optimizer, output * sigma(output.mean().view(1, 1)).exp())
        assert seen.report() == []


def test_watch_names_stale_tensors_of_a_replaced_layer() -> None:
    for steps in (0, 3, 12):  # before the exchange
        model = network()
        optimizer = torch.optim.AdamW(model.parameters())
        seen = watch(model, optimizer)
        for number in range(24):
            if number == steps:
                model[2] = nn.Linear(16, 4)
                assert "missing_from_optimizer" not in causes(seen.report(), False)  # a new optimizer may come
            fit(optimizer, model(batch()))
        assert causes(seen.report()) == ["stale_optimizer_parameters", "missing_from_optimizer"]
        assert "(4, 16)" in seen.report()[0].evidence


def test_watch_names_stale_tensors_of_no_module() -> None:
    model, forgotten = network(), nn.Linear(3, 3)
    found = run(lambda p: sgd([*p, *forgotten.parameters()]), model)
    assert causes(found) == [] and causes(found, False) == ["stale_optimizer_parameters"]


# ---- a step that is yet to come ----


def test_watch_allows_hundreds_of_accumulated_passes() -> None:
    line = nn.Linear(8, 4)
    optimizer = sgd(line.parameters())
    seen = watch(line, optimizer)
    for _ in range(299):
        line(batch()).mean().backward()
    assert [(each.cause, each.certain) for each in seen.report()] == [("step_never_called", False)]
    optimizer.step()
    assert seen.report() == []


@pytest.mark.parametrize("whole", [False, True])
def test_watch_allows_an_optimizer_of_a_second_phase(whole: bool) -> None:
    """Gradients reach its layers meanwhile; `whole`: and are cleared with all others."""
    model = network()
    phases = sgd(model[0].parameters()), sgd(model[2].parameters())
    seen = watch(model, phases)
    for optimizer in phases:
        for number in range(120):
            if whole:
                model.zero_grad()
            fit(optimizer, model(batch()))
            if number in (70, 119):
                assert causes(seen.report()) == []
    assert seen.report() == []


# ---- arguments that mean nothing ----


def test_watch_refuses_wrong_arguments_by_name() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    for given, said in (
        ((None, optimizer), "model is None"),
        (("x", optimizer), "model is 'x'"),
        ((model, "x"), "optimizer is 'x'"),
        ((model, None), "optimizer is None"),
        ((model, [optimizer, 3]), "a list, with 3 in it"),
        ((model, model.parameters()), "optimizer is"),
        ((optimizer, model), "model is"),
        ((model, optimizer, 1.5), "every=1.5"),
        ((model, optimizer, "2"), "every='2'"),
        ((model, optimizer, 0), "every=0"),
        ((model, optimizer, True), "every=True"),
        ((model, optimizer, sgd(model.parameters())), "watch(model, [optimizer, other])"),
        ((model, optimizer, 1, 5), "frozen=5"),
        ((model, optimizer, 1, None), "frozen=None"),
        ((model, optimizer, 1, ("0.", 5)), "frozen="),
    ):
        with pytest.raises(ValueError, match="^watch: .*" + re.escape(said)):
            watch(*given)
    assert watch(model, (each for each in [optimizer]), frozen=["0."]).report() == []


def test_watch_fixes_speak_of_a_plain_loop() -> None:
    from ris_fast.health.watch.fixes import fix

    for cause in (
        "zero_learning_rate",
        "frozen_parameters",
        "clip_too_small",
        "nonfinite_gradients",
        "weight_decay_too_large",
    ):
        assert not any(
            word in fix(cause) for word in ("health.", "optimizer.backbone_lr", "optimizer.max_grad_norm", "ris-fast")
        ), cause
