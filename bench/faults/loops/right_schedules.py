"""Right loops whose rates or weights jump on purpose: schedules, restarts, restored weights, averages."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, fit, mlp

RIGHT = Group("right_schedules")


@RIGHT.right("OneCycle: rate and momentum change at every step, down to a ten-thousandth of the peak")
def one_cycle(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, steps = Task(8, 3), draw.choice((200, 300))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = lr_scheduler.OneCycleLR(optimizer, draw.choice((0.1, 0.2)), total_steps=steps, final_div_factor=1e3)
    attach(model, optimizer)
    falls(fit(model, optimizer, task, steps, lambda *_: schedule.step()))


@RIGHT.right("cosine with warm restarts, down to rate 0 before each of them")
def warm_restarts(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((5e-3, 1e-2)))
    schedule = lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=draw.choice((20, 40)), T_mult=draw.choice((1, 2))
    )
    attach(model, optimizer)
    falls(fit(model, optimizer, task, 300, lambda *_: schedule.step()))


@RIGHT.right("ReduceLROnPlateau over the losses of validation passes, which run without gradient")
def plateau(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3, noise=0.2)
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((1e-2, 2e-2)))
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, min_lr=1e-5)
    attach(model, optimizer)
    validation = task.batch(128)

    def after(step: int, loss: Tensor) -> None:
        if step % 15 == 14:
            model.eval()
            with torch.no_grad():
                schedule.step(F.mse_loss(model(validation[0]), validation[1]))
            model.train()

    falls(fit(model, optimizer, task, 300, after))


@RIGHT.right("linear warm-up whose first rate is 0, then a cosine to 0")
def warm_up_from_zero(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, steps, warm = Task(8, 3), 300, draw.choice((10, 30))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((5e-3, 1e-2)), weight_decay=0.05)

    def rate(step: int) -> float:
        if step < warm:
            return step / warm
        return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warm) / (steps - warm))).item())

    schedule = lr_scheduler.LambdaLR(optimizer, rate)
    attach(model, optimizer)
    falls(fit(model, optimizer, task, steps, lambda *_: schedule.step()))


@RIGHT.right(
    "a learning-rate range test: the rate grows until the loss explodes, then weights and optimizer are restored"
)
def range_test(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    attach(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def grow(step: int, loss: Tensor) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 10 ** (6 / 60)

    fit(model, optimizer, task, draw.choice((50, 60)), grow)
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    for group in optimizer.param_groups:
        group["lr"] = draw.choice((0.05, 0.1))
    falls(fit(model, optimizer, task, 250))


@RIGHT.right("SWA: averaged weights, a rate of their own, and BatchNorm recalibrated by forward passes at the end")
def weight_averaging(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, width = Task(8, 3), draw.choice((24, 32))
    model = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    averaged = AveragedModel(model)
    schedule = SWALR(optimizer, swa_lr=draw.choice((0.02, 0.05)), anneal_epochs=20)
    attach(model, optimizer)

    def after(step: int, loss: Tensor) -> None:
        if step >= 150:
            averaged.update_parameters(model)
            schedule.step()

    falls(fit(model, optimizer, task, 250, after))
    update_bn([task.batch(32)[0] for _ in range(10)], averaged)


@RIGHT.right("an average of the weights is swapped in for each validation, and the raw weights back after it")
def average_swapped_in(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, often = Task(8, 3), draw.choice((20, 25))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    attach(model, optimizer)
    validation, scores = task.batch(128), []

    def after(step: int, loss: Tensor) -> None:
        averaged.update_parameters(model)
        if step % often == often - 1:
            raw = copy.deepcopy(model.state_dict())
            model.load_state_dict(averaged.module.state_dict())
            model.eval()
            with torch.no_grad():
                scores.append(F.mse_loss(model(validation[0]), validation[1]))
            model.load_state_dict(raw)
            model.train()

    falls(fit(model, optimizer, task, 250, after))
    falls(scores)


@RIGHT.right("two phases with an optimizer each: the second is built anew for other parameters and watched again")
def rebuilt_optimizer(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    losses = []
    for phase, rate in enumerate((1e-2, draw.choice((2e-3, 3e-3)))):
        chosen = list(model.parameters()) if phase else list(model[-1].parameters())
        for p in model.parameters():
            p.requires_grad_(any(p is each for each in chosen))
        optimizer = torch.optim.AdamW(chosen, lr=rate)
        seen = attach(model, optimizer, frozen=() if phase else ("0.", "2."))
        losses += fit(model, optimizer, task, 150)
        if not phase:
            seen.close()
    falls(losses)


@RIGHT.right("two phases: Adam first, then SGD; both are watched from the start")
def two_optimizers_in_phases(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    first = torch.optim.Adam(model.parameters(), lr=5e-3)
    second = torch.optim.SGD(model.parameters(), lr=draw.choice((0.02, 0.05)), momentum=0.9)
    attach(model, [first, second])
    losses = fit(model, first, task, 120)
    falls(losses + fit(model, second, task, 120))


@RIGHT.right("resumed: weights and optimizer state of an earlier run are loaded after the watch began")
def resumed(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, width = Task(8, 3), draw.choice((24, 32))
    earlier = mlp(8, width, 3)
    before = torch.optim.AdamW(earlier.parameters(), lr=2e-3)
    losses = fit(earlier, before, task, 80)
    saved = copy.deepcopy((earlier.state_dict(), before.state_dict()))
    model = mlp(8, width, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    attach(model, optimizer)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    falls(losses + fit(model, optimizer, task, 150))


@RIGHT.right("the best weights are loaded back whenever validation has not improved, with a smaller rate")
def back_to_the_best(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, rate = Task(8, 3, noise=0.2), draw.choice((0.02, 0.03))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    attach(model, optimizer)
    validation, losses, lowest, best = task.batch(64), [], float("inf"), copy.deepcopy(model.state_dict())
    for _ in range(15):
        losses += fit(model, optimizer, task, 20)
        with torch.no_grad():
            score = float(F.mse_loss(model(validation[0]), validation[1]))
        if score < lowest:
            lowest, best = score, copy.deepcopy(model.state_dict())
        else:
            model.load_state_dict(best)
            rate /= 2
            optimizer.param_groups[0]["lr"] = rate
    falls(losses)
