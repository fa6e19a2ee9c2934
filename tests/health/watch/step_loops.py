"""Plain loops around one optimizer's steps: `wrong_*` with a mistake, `right_*` that look alike and are not one.

Each returns its Watcher. What is wrong, and the cause that is named for it, is in test_watch_steps.py.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss, normalize, relu, softplus
from torch.optim import Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, ExponentialLR, LambdaLR, OneCycleLR

from ris_fast.health import watch
from ris_fast.health.watch.watcher import Watcher

Act = Callable[[int, nn.Module, Any], Any]
MIX = torch.linspace(-1.0, 1.0, 32).view(8, 4)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def data(count: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 8)
    return x, torch.sin(x @ MIX)


def nothing(*_: Any) -> None:
    """Does nothing."""


def error(model: nn.Module, x: Tensor, y: Tensor, _: int) -> Tensor:
    return mse_loss(model(x), y)


def loop(
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    steps: int = 150,
    loss: Callable[[nn.Module, Tensor, Tensor, int], Tensor] = error,
    first: Act = nothing,
    before: Act = nothing,
    after: Act = nothing,
    **options: Any,
) -> Watcher:
    """`first` is called at the start of an iteration, `before` and `after` around the step."""
    model = net() if model is None else model
    optimizer = Adam(model.parameters()) if optimizer is None else optimizer
    seen = watch(model, optimizer, **options)
    for number in range(steps):
        x, y = data()
        first(number, model, optimizer)
        optimizer.zero_grad()
        loss(model, x, y, number).backward()
        before(number, model, optimizer)
        optimizer.step()
        after(number, model, optimizer)
    return seen


def with_schedule(make: Callable[[Optimizer], Any], steps: int = 150, lr: float = 1e-2) -> Watcher:
    model = net()
    optimizer = Adam(model.parameters(), lr=lr)
    plan = make(optimizer)
    return loop(model, optimizer, steps, after=lambda *_: plan.step())


def each(model: nn.Module, act: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            act(parameter)


# ---- rates and settings ----


def wrong_rate_zero_from_step_8() -> Watcher:
    return with_schedule(lambda o: LambdaLR(o, lambda n: max(0.0, 1 - n / 8)))


def wrong_rate_decays_to_nothing() -> Watcher:
    return with_schedule(lambda o: ExponentialLR(o, 0.5))


def wrong_rate_below_zero() -> Watcher:
    return with_schedule(lambda o: LambdaLR(o, lambda n: 1 - n / 100))


def wrong_schedule_never_advanced() -> Watcher:
    model = net()
    optimizer = Adam(model.parameters(), lr=1e-2)
    OneCycleLR(optimizer, 1e-2, total_steps=200)
    return loop(model, optimizer)


def wrong_decay_jumps() -> Watcher:
    def jump(number: int, _: nn.Module, optimizer: Optimizer) -> None:
        if number == 90:
            optimizer.param_groups[0]["weight_decay"] = 10.0

    return loop(after=jump)


def right_warm_restarts() -> Watcher:
    return with_schedule(lambda o: CosineAnnealingWarmRestarts(o, 20))


def right_one_cycle() -> Watcher:
    return with_schedule(lambda o: OneCycleLR(o, 1e-2, total_steps=151))


def right_rate_ends_at_zero() -> Watcher:
    return with_schedule(lambda o: LambdaLR(o, lambda n: max(0.0, 1 - n / 140)))


def right_decay_follows_a_schedule() -> Watcher:
    return loop(after=lambda n, _, o: o.param_groups[0].update(weight_decay=1e-4 * n))


# ---- weights that something else changes ----


def wrong_noise_every_16th_step() -> Watcher:
    def disturb(number: int, model: nn.Module, _: Any) -> None:
        if number % 16 == 15:
            model[2].weight.data.add_(torch.randn(32, 32) * 0.05)

    return loop(after=disturb)


def wrong_from_step_20_on() -> Watcher:
    return loop(after=lambda n, m, _: each(m, lambda p: p.add_(torch.randn_like(p) * 0.01)) if n >= 20 else None)


def wrong_average_over_raw() -> Watcher:
    model = net()
    average = deepcopy(model)

    def follow(number: int, model: nn.Module, _: Any) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.05)
        if number % 40 == 39:
            model.load_state_dict(average.state_dict())

    return loop(model, after=follow)


def wrong_update_by_hand_too() -> Watcher:
    return loop(after=lambda _, m, __: each(m, lambda p: p.sub_(0.05 * p.grad)))


def wrong_put_back() -> Watcher:
    model = net()
    start = deepcopy(model.state_dict())
    return loop(model, after=lambda n, m, _: m.load_state_dict(start) if n % 25 == 24 else None)


def wrong_second_optimizer() -> Watcher:
    model = net()
    other = torch.optim.SGD(model.parameters(), lr=1e-2)
    return loop(model, after=lambda *_: other.step())


def wrong_optimizer_built_anew() -> Watcher:
    model = net()
    optimizer = Adam(model.parameters())
    seen = watch(model, optimizer)
    for number in range(150):
        if number % 20 == 19:
            optimizer = Adam(model.parameters())
        optimizer.zero_grad()
        error(model, *data(), number).backward()
        optimizer.step()
    return seen


def right_clipped_weights() -> Watcher:
    model = net()
    optimizer = RMSprop(model.parameters(), lr=1e-3)
    return loop(model, optimizer, after=lambda _, m, __: [p.data.clamp_(-0.1, 0.1) for p in m.parameters()])


def right_bounded_norms() -> Watcher:
    return loop(after=lambda _, m, __: each(m[2], lambda p: p.ndim > 1 and p.copy_(torch.renorm(p, 2, 0, 1.0))))


def right_unit_rows() -> Watcher:
    return loop(after=lambda _, m, __: each(m[2], lambda p: p.ndim > 1 and p.copy_(normalize(p, dim=1))))


def right_pruned() -> Watcher:
    mask = torch.rand(32, 32) < 0.5
    return loop(after=lambda _, m, __: m[2].weight.data.mul_(mask))


def right_soft_threshold() -> Watcher:
    return loop(after=lambda _, m, __: each(m[2], lambda p: p.copy_(p.sign() * (p.abs() - 1e-4).clamp_min(0.0))))


def right_decay_by_hand() -> Watcher:
    return loop(after=lambda _, m, __: each(m, lambda p: p.mul_(1 - 1e-4)))


def right_sharpness_aware() -> Watcher:
    """Weights go up the slope and back before the step, which leaves their rounding."""

    def again(number: int, model: nn.Module, optimizer: Optimizer) -> None:
        with torch.no_grad():
            ascent = [0.05 * p.grad / p.grad.norm().clamp_min(1e-9) for p in model.parameters()]
            torch._foreach_add_(list(model.parameters()), ascent)
        optimizer.zero_grad()
        error(model, *data(), number).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), ascent)

    return loop(before=again)


def right_average_only_while_evaluating() -> Watcher:
    model = net()
    average = deepcopy(model)

    def evaluate(number: int, model: nn.Module, _: Any) -> None:
        if number % 20 == 19:
            kept = deepcopy(model.state_dict())
            model.load_state_dict(average.state_dict())
            model.load_state_dict(kept)

    return loop(model, after=evaluate)


def right_episodes() -> Watcher:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    starts = deepcopy(model.state_dict()), deepcopy(optimizer.state_dict())

    def restart(number: int, model: nn.Module, optimizer: Optimizer) -> None:
        if number % 10 == 9:
            model.load_state_dict(starts[0])
            optimizer.load_state_dict(starts[1])

    return loop(model, optimizer, after=restart)


def right_range_test() -> Watcher:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    starts = deepcopy(model.state_dict()), deepcopy(optimizer.state_dict())

    def rise(number: int, model: nn.Module, optimizer: Optimizer) -> None:
        if number < 60:
            optimizer.param_groups[0]["lr"] *= 1.2
        elif number == 60:
            model.load_state_dict(starts[0])
            optimizer.load_state_dict(starts[1])

    return loop(model, optimizer, after=rise)


class Lookahead(Optimizer):
    """Goes half of the way of five steps of another optimizer."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.param_groups, self.count = base, base.param_groups, 0
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.count += 1
        if self.count % 5 == 0:
            fast = [p.detach() for group in self.param_groups for p in group["params"]]
            torch._foreach_lerp_(self.slow, fast, 0.5)
            torch._foreach_copy_(fast, self.slow)


def right_lookahead() -> Watcher:
    model = net()
    return loop(model, Lookahead(Adam(model.parameters())))


def right_phases_of_two_optimizers() -> Watcher:
    model, (x, y) = net(), data(256)
    first, second = Adam(model.parameters()), torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    seen = watch(model, [first, second])

    def closure() -> Tensor:
        model.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(60):
        closure()
        first.step()
    for _ in range(20):
        second.step(closure)
    return seen


# ---- steps without effect ----


class Undoing(Adam):
    """Keeps some of its tensors where they are."""

    def __init__(self, parameters: Any, keep: slice) -> None:
        super().__init__(parameters)
        self.keep = keep

    def step(self, closure: Any = None) -> None:
        tensors = [p.data for p in self.param_groups[0]["params"]][self.keep]
        kept = [tensor.clone() for tensor in tensors]
        super().step()
        torch._foreach_copy_(tensors, kept)


def wrong_step_moves_nothing() -> Watcher:
    model = net()
    return loop(model, Undoing(model.parameters(), slice(None)))


def wrong_step_moves_some() -> Watcher:
    model = net()
    return loop(model, Undoing(model.parameters(), slice(2, 3)))


def wrong_half_weights_stand_still() -> Watcher:
    model = net().bfloat16()
    optimizer = AdamW(model.parameters(), lr=1e-5)
    return loop(model, optimizer, loss=lambda m, x, y, _: mse_loss(m(x.bfloat16()), y.bfloat16()))


def wrong_weights_rounded() -> Watcher:
    return loop(after=lambda _, m, __: [p.data.copy_(p.data.bfloat16()) for p in m.parameters()])


def wrong_epsilon() -> Watcher:
    return loop(loss=lambda *given: 1e-9 * error(*given))


def wrong_declared_frozen() -> Watcher:
    return loop(frozen=("0.",))


def right_half_weights_move() -> Watcher:
    model = net().bfloat16()
    optimizer = AdamW(model.parameters(), lr=3e-3)
    return loop(model, optimizer, loss=lambda m, x, y, _: mse_loss(m(x.bfloat16()), y.bfloat16()))


def right_masters() -> Watcher:
    model = net().bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = AdamW(masters, lr=1e-4)
    seen = watch(model, optimizer)
    for _ in range(100):
        x, y = data()
        model.zero_grad()
        mse_loss(model(x.bfloat16()), y.bfloat16()).backward()
        for master, parameter in zip(masters, model.parameters()):
            master.grad = parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters()):
                parameter.copy_(master)
    return seen


# ---- gradients ----


def wrong_rounded_outputs() -> Watcher:
    return loop(loss=lambda m, x, y, _: mse_loss(m(x).round(), y))


def wrong_dead_layer() -> Watcher:
    model = net()
    nn.init.constant_(model[0].bias, -50.0)
    return loop(model)


class Adapted(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.base = net().requires_grad_(False)
        self.down, self.up = nn.Parameter(scale * torch.randn(8, 4)), nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up


def adapted(scale: float) -> Watcher:
    model = Adapted(scale)
    return loop(model, Adam([model.down, model.up]))


def wrong_both_factors_zero() -> Watcher:
    return adapted(0.0)


def right_adapter() -> Watcher:
    return adapted(0.1)


def wrong_hook_zeroes() -> Watcher:
    model = net()
    model[2].weight.register_hook(lambda grad: grad * 0)
    return loop(model)


def wrong_cleared_every_16th_step() -> Watcher:
    return loop(before=lambda n, _, o: o.zero_grad(set_to_none=False) if n % 16 == 15 else None)


def wrong_turned_round_at_times() -> Watcher:
    return loop(before=lambda n, m, _: each(m, lambda p: p.grad.neg_()) if n % 4 == 3 else None)


def wrong_micro_batches_cleared() -> Watcher:
    model = net()
    optimizer = Adam(model.parameters())
    seen = watch(model, optimizer)
    for number in range(160):
        optimizer.zero_grad()
        error(model, *data(), 0).backward()
        if number % 4 == 3:
            optimizer.step()
    return seen


def wrong_steps_end() -> Watcher:
    model = net()
    optimizer = Adam(model.parameters())
    seen = watch(model, optimizer)
    for number in range(150):
        optimizer.zero_grad()
        error(model, *data(), 0).backward()
        if number < 20:
            optimizer.step()
    return seen


def right_attacked_inputs() -> Watcher:
    def attack(_: int, model: nn.Module, optimizer: Optimizer) -> None:
        x, y = data()
        for _ in range(2):
            x.requires_grad_()
            mse_loss(model(x), y).backward()
            x = (x + 0.01 * x.grad.sign()).detach()
            optimizer.zero_grad()

    return loop(first=attack)


def right_tasks_apart() -> Watcher:
    """A backward pass for each task, cleared, and their sum put there by hand."""

    def gather(_: int, model: nn.Module, optimizer: Optimizer) -> None:
        rows = []
        for task in range(3):
            optimizer.zero_grad()
            x, y = data()
            mse_loss(model(x)[:, task], y[:, task]).backward()
            rows.append([p.grad.clone() for p in model.parameters()])
        for parameter, grads in zip(model.parameters(), zip(*rows)):
            parameter.grad = sum(grads)

    return loop(before=gather)


def right_hinge_satisfied() -> Watcher:
    """Once every margin is wide enough, all gradients are zero."""
    x = torch.randn(64, 8)
    model, sign = net(), x[:, 0].sign()
    optimizer = Adam(model.parameters(), lr=1e-2)
    return loop(model, optimizer, 300, lambda m, *_: relu(1 - sign * m(x)[:, 0]).mean())


# ---- a loss scale ----


def scaled(before: Callable[..., Any] = nothing) -> Watcher:
    model, scaler = net(), torch.amp.GradScaler("cpu")
    optimizer = Adam(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(50):
        optimizer.zero_grad()
        scaler.scale(error(model, *data(), 0)).backward()
        before(model, optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
    return seen


def clip(model: nn.Module, *_: Any) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def wrong_scale_divided_again() -> Watcher:
    def divide(model: nn.Module, optimizer: Optimizer, scaler: Any) -> None:
        scaler.unscale_(optimizer)
        each(model, lambda p: p.grad.div_(scaler.get_scale()))

    return scaled(divide)


def wrong_scale_divided_twice_by_hand() -> Watcher:
    return loop(
        loss=lambda *given: 65536 * error(*given), before=lambda _, m, __: each(m, lambda p: p.grad.div_(65536.0**2))
    )


def wrong_clipped_while_scaled() -> Watcher:
    return scaled(clip)


def right_scaler() -> Watcher:
    return scaled()


def right_clipped_after_unscaling() -> Watcher:
    return scaled(lambda model, optimizer, scaler: (scaler.unscale_(optimizer), clip(model)))


# ---- tensors that are frozen, late, or of nobody's network ----


def wrong_frozen_from_step_20() -> Watcher:
    return loop(first=lambda n, m, _: m[2].requires_grad_(n < 20))


def right_unfrozen_one_by_one() -> Watcher:
    return loop(first=lambda n, m, _: [m[layer].requires_grad_(n >= 20 * layer) for layer in (0, 2)])


def translation(listed: bool) -> Watcher:
    """A discriminator that is frozen when an iteration ends."""
    nets = nn.ModuleDict({"made": net(), "judge": nn.Linear(12, 1)})
    makes, judges = (Adam(nets[name].parameters()) for name in ("made", "judge"))
    seen = watch(nets, [makes, judges] if listed else makes)
    for _ in range(60):
        x, y = data()
        made = nets["made"](x)
        nets["judge"].requires_grad_(True)
        judges.zero_grad()
        scores = [nets["judge"](torch.cat([x, given], 1)) for given in (made.detach(), y)]
        (softplus(scores[0]).mean() + softplus(-scores[1]).mean()).backward()
        judges.step()
        nets["judge"].requires_grad_(False)
        makes.zero_grad()
        (softplus(-nets["judge"](torch.cat([x, made], 1))).mean() + l1_loss(made, y)).backward()
        makes.step()
    return seen


def right_judge_frozen_at_the_end() -> Watcher:
    return translation(True)


def right_judge_of_an_optimizer_not_given() -> Watcher:
    return translation(False)


def right_fixed_positions() -> Watcher:
    model = net()
    model.register_parameter("positions", nn.Parameter(torch.randn(8), requires_grad=False))
    return loop(model, loss=lambda m, x, y, _: mse_loss(m(x + m.positions), y))


def right_head_every_16th_step() -> Watcher:
    def loss(model: nn.Module, x: Tensor, y: Tensor, number: int) -> Tensor:
        body = model["body"](x)
        return mse_loss(body, y) + (mse_loss(model["head"](body), y) if number % 16 == 15 else 0)

    return loop(nn.ModuleDict({"body": net(), "head": nn.Linear(4, 4)}), loss=loss)


def right_weights_of_the_loss() -> Watcher:
    """Its second weight is used in every 16th step."""
    model, spreads = net(), nn.Parameter(torch.zeros(2))
    late = nn.Parameter(torch.zeros(1))

    def loss(model: nn.Module, x: Tensor, y: Tensor, number: int) -> Tensor:
        plain = mse_loss(model(x), y) * (-spreads[0]).exp() + spreads[0]
        return (plain * (-late).exp() + late).sum() if number % 16 == 15 else plain

    return loop(model, Adam([*model.parameters(), spreads, late]), loss=loss)
