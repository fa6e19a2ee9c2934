"""What `watch` says of weights that begin alike or are compared with themselves, of averages in dicts, of optimizers'
settings and schedules; and of the right loops next to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from ris_fast.health import watch
from ris_fast.health.watch import schedulers
from ris_fast.health.watch.watcher import Watcher

Step = Callable[[int], object]


def mlp(*widths: int, between: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    parts: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        parts += [nn.Linear(before, after), between()]
    return nn.Sequential(*parts[:-1])


def batches(steps: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(steps, size, 8)
    return [(x, torch.sin(2 * x[:, :1]) + x[:, 1:2]) for x in inputs]


def fit(
    seen: Watcher | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    after: Step = lambda step: None,
    before: Step = lambda step: None,
    extra: Callable[[], Tensor | float] = lambda: 0.0,
) -> list[str]:
    """Causes after a plain loop; with the loss told where there is a watch."""
    for step, (x, y) in enumerate(batches(steps)):
        outputs = model(x)
        loss = F.mse_loss(outputs, y) + extra()
        optimizer.zero_grad()
        loss.backward()
        before(step)
        optimizer.step()
        after(step)
    return [] if seen is None else [each.cause for each in seen.report()]


@pytest.mark.parametrize("wrong", [True, False])
@pytest.mark.parametrize("kind", ["columns of tables", "rows of layers", "gates of a cell"])
def test_units_that_begin_as_one(kind: str, wrong: bool) -> None:
    torch.manual_seed(0)
    model: Any
    if kind == "columns of tables":
        model = nn.ModuleDict({"user": nn.Embedding(8, 4), "item": nn.Embedding(8, 4)})
        data, answer = torch.randint(8, (24, 32, 2)), lambda t: (model["user"](t[:, 0]) * model["item"](t[:, 1])).sum(1)
        truth: Any = lambda t: (t[:, 0] * t[:, 1]).float() / 20  # noqa: E731
    elif kind == "rows of layers":
        model = mlp(8, 16, 4)
        data, answer, truth = torch.randn(24, 32, 8), model, lambda t: t[:, :4]
    else:
        model = nn.ModuleDict({"cell": nn.LSTM(8, 16, batch_first=True), "head": nn.Linear(16, 1)})
        data, answer = torch.randn(24, 16, 5, 8), lambda t: model["head"](model["cell"](t)[0][:, -1])[:, 0]
        truth = lambda t: t[:, :, 0].sum(1)  # noqa: E731
    for name, each in model.named_parameters() if wrong else ():
        nn.init.constant_(each, 0.0 if "bias" in name else 0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for batch in data:
        optimizer.zero_grad()
        F.mse_loss(answer(batch), truth(batch)).backward()
        optimizer.step()
    assert ("symmetric_init" in [each.cause for each in seen.report()]) == wrong


def test_a_head_that_begins_at_zero_is_no_copy_of_itself() -> None:
    """Labels that have not come yet have equal rows; others tell them apart."""
    torch.manual_seed(0)
    model = mlp(8, 16, 40)
    nn.init.zeros_(model[2].weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for x, _ in batches(24):
        optimizer.zero_grad()
        F.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
    assert "symmetric_init" not in [each.cause for each in seen.report()]


@pytest.mark.parametrize("wrong", [True, False])
@pytest.mark.parametrize("penalty", ["squares before the pass", "distances after the pass"])
def test_weights_that_are_held_to_themselves(penalty: str, wrong: bool) -> None:
    torch.manual_seed(0)
    model = mlp(8, 16, 1)
    anchor = {name: each.detach() if wrong else each.detach().clone() for name, each in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for x, y in batches(56):
        if penalty == "squares before the pass":
            moved = sum((each - anchor[name]).square().sum() for name, each in model.named_parameters())
            loss = 0.1 * moved + F.mse_loss(model(x), y)
        else:
            loss = F.mse_loss(model(x), y)
            for name, each in model.named_parameters():
                loss = loss + F.mse_loss(each, anchor[name])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ([each.cause for each in seen.report()] == ["dead_loss_term"]) == wrong


AVERAGES: dict[str, tuple[float, list[str]]] = {
    "keeps nothing": (0.01, ["ema_equals_raw"]),
    "too slow": (0.9999, ["ema_cold"]),
    "stands still": (1.0, ["ema_frozen"]),
    "right": (0.97, []),
}


@pytest.mark.parametrize(("keep", "expected"), AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("kept_in", ["dict", "object"])
def test_averages_that_no_module_has(kept_in: str, keep: float, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = mlp(8, 16, 1)
    shadow = {name: each.detach().clone() for name, each in model.named_parameters()}
    holder = type("Average", (), {})()
    if kept_in == "object":
        holder.shadow = shadow

    def after(step: int) -> None:
        kept = holder.shadow if kept_in == "object" else shadow
        for name, each in model.named_parameters():
            if keep < 1:
                kept[name] = keep * kept[name] + (1 - keep) * each.detach()

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = watch(model, optimizer)
    found = fit(seen, model, optimizer, 320, after)
    assert found == expected


@pytest.mark.parametrize("wrong", [True, False])
def test_an_average_over_all_steps(wrong: bool) -> None:
    torch.manual_seed(0)
    model = mlp(8, 16, 1)
    average = AveragedModel(model, multi_avg_fn=None if wrong else _ema)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = watch(model, optimizer)
    found = fit(seen, model, optimizer, 160, lambda step: average.update_parameters(model))
    assert found == (["ema_cold"] if wrong else [])


def _ema(averages: list[Tensor], weights: list[Tensor], count: Any) -> None:
    torch._foreach_lerp_(averages, weights, 0.05)


def test_the_best_weights_kept_by_reference() -> None:
    torch.manual_seed(0)
    model, other = mlp(8, 16, 1), mlp(8, 16, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    best: dict[str, Tensor] = {}

    def after(step: int) -> None:
        if step % 4 == 0:
            best.update(model.state_dict())

    found = fit(watch(model, optimizer), model, optimizer, 60, after)
    other.load_state_dict(best)
    assert found == ["ema_equals_raw"]


OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], list[str]]] = {
    "betas in the other order": (lambda m: torch.optim.Adam(m.parameters(), 1e-3, (0.999, 0.9)), ["too_large"]),
    "momentum that remembers all": (lambda m: torch.optim.SGD(m.parameters(), 1e-3, 0.999), ["too_large"]),
    "decay of AdamW in Adam": (lambda m: torch.optim.Adam(m.parameters(), 2e-3, weight_decay=0.1), ["decay_too_large"]),
    "decay of AdamW in AdamW": (lambda m: torch.optim.AdamW(m.parameters(), 2e-3, weight_decay=0.1), []),
    "momentum": (lambda m: torch.optim.SGD(m.parameters(), 2e-2, 0.9), []),
}


@pytest.mark.parametrize(("build", "expected"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_settings_of_optimizers(build: Callable[[nn.Module], torch.optim.Optimizer], expected: list[str]) -> None:
    torch.manual_seed(0)
    model = mlp(8, 32, 1)
    optimizer = build(model)
    found = fit(watch(model, optimizer), model, optimizer, 160)
    assert [cause.removeprefix("learning_rate_").removeprefix("weight_") for cause in found[:1]] == expected


SCHEDULES: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "restarts in epochs": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 8), ["schedule_per_batch"]),
    "milestones in epochs": (lambda o: lr_scheduler.MultiStepLR(o, [5, 8], 0.1), ["learning_rate_too_small"]),
    "one restart": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 80), []),
    "milestones in steps": (lambda o: lr_scheduler.MultiStepLR(o, [80, 120], 0.1), []),
}


@pytest.mark.parametrize(("build", "expected"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_in_the_wrong_unit(build: Callable[[Any], Any], expected: list[str]) -> None:
    torch.manual_seed(0)
    model = mlp(8, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = build(optimizer)
    found = fit(watch(model, optimizer), model, optimizer, 160, lambda step: schedule.step())
    assert found == expected


@pytest.mark.parametrize(("mode", "expected"), [("max", ["learning_rate_off_plan"]), ("min", [])])
def test_a_rate_that_waits_for_the_wrong_score(mode: str, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = mlp(8, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen = watch(model, optimizer)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, mode, patience=2)

    def after(step: int) -> None:
        if step % 8 == 7:
            schedule.step(1.0 / step)

    assert fit(seen, model, optimizer, 160, after)[:1] == expected


@pytest.mark.parametrize("waits", [False, True], ids=["planned", "waits for a score"])
def test_a_schedule_that_is_gone_before_the_report(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made after the watch began, by a function that trains and returns; one that waits is searched for when the loop
    has run for long enough."""
    monkeypatch.setattr(schedulers, "SHARE", 1e6 if waits else 0.0)
    model = mlp(8, 8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen = watch(model, optimizer)

    def train() -> None:
        schedule = lr_scheduler.ReduceLROnPlateau(optimizer) if waits else lr_scheduler.StepLR(optimizer, 3)
        fit(None, model, optimizer, 8, lambda step: schedule.step(1.0) if waits else schedule.step())

    train()
    assert [each.kind for each in seen.schedulers.records()] == ["ReduceLROnPlateau" if waits else "StepLR"]


@pytest.mark.parametrize("wrong", [True, False])
def test_an_average_put_over_the_weights(wrong: bool) -> None:
    torch.manual_seed(0)
    model = mlp(8, 16, 1)
    slow = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def after(step: int) -> None:
        with torch.no_grad():
            for mean, weight in zip(slow.parameters(), model.parameters()):
                mean.lerp_(weight, 0.05)
        if wrong and step % 12 == 11:
            model.load_state_dict(slow.state_dict())

    found = fit(watch(model, optimizer), model, optimizer, 100, after)
    assert found[:1] == (["ema_saved_over_raw"] if wrong else [])


class Twins(nn.Module):
    """Two parts beside each other, each for one number."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) - 0.3 * self.second(x)


class Normed(nn.Module):
    """One normalisation, or two, at two places."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.body, self.head, self.norm = nn.Linear(8, 16), nn.Linear(16, 1), nn.BatchNorm1d(16)
        self.last = self.norm if shared else nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(4 * F.relu(self.norm(self.body(x)))))


def _frozen(part: nn.Module) -> nn.Module:
    return part.requires_grad_(False)


def _trained(part: nn.Module) -> nn.Module:
    """As a part is after a training."""
    with torch.no_grad():
        for each in part.parameters():
            each += 0.05 * torch.randn_like(each)
    return part


def _scaled(part: nn.Sequential, factor: float) -> nn.Sequential:
    part[0].register_forward_hook(lambda module, given, made: made + (factor - 1) * (made - made.detach()))
    return part


_ONE = torch.nn.Linear(8, 1)
PARTS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "one part under two names": (lambda: Twins(_ONE, _ONE), ["tied_parameters"]),
    "two parts": (lambda: Twins(nn.Linear(8, 1), nn.Linear(8, 1)), []),
    "one normalisation in two places": (lambda: Normed(True), ["tied_parameters"]),
    "two normalisations": (lambda: Normed(False), []),
    "dropout at the end": (lambda: nn.Sequential(mlp(8, 16, 1), nn.Dropout(0.5)), ["heavy_dropout"]),
    "dropout before the end": (lambda: nn.Sequential(mlp(8, 16), nn.Dropout(0.1), nn.Linear(16, 1)), []),
    "frozen as new": (lambda: Twins(_frozen(mlp(8, 32, 1)), nn.Linear(8, 1)), ["frozen_parameters"]),
    "frozen under adapters": (lambda: Twins(_frozen(mlp(8, 32, 1)), mlp(8, 8, 1)), []),
    "frozen as trained": (lambda: Twins(_frozen(_trained(mlp(8, 32, 1))), nn.Linear(8, 1)), []),
    "gradient scaled away": (lambda: _scaled(mlp(8, 16, 16, 1), 1e-4), ["gradient_scale_differs"]),
    "gradient as it is": (lambda: _scaled(mlp(8, 16, 16, 1), 1.0), []),
}


@pytest.mark.parametrize(("build", "expected"), PARTS.values(), ids=PARTS)
def test_parts_of_a_model(build: Callable[[], nn.Module], expected: list[str]) -> None:
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-2, momentum=0.9)
    assert fit(watch(model, optimizer), model, optimizer, 80) == expected
