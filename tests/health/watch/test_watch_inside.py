"""What `watch` sees within a model's passes: inputs it writes into, random evaluations, autocast that layers leave,
sequences over scenes, classes and scenes without a gradient; and healthy loops that look alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_fast.health import watch
from ris_fast.health.finding import Finding
from tests.health.watch.loops import network


class Calls(nn.Module):
    """A network whose forward pass is a function of itself."""

    def __init__(self, function: Callable[[Calls, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.function, self.net = function, network()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def fit(model: nn.Module, given: Callable[[], Tensor], steps: int = 24, evaluated: bool = False) -> list[Finding]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        (model(given()) - 1.0).square().mean().backward()
        optimizer.step()
        if evaluated and step % 8 == 7:
            model.eval()
            with torch.no_grad():
                model(given())
            model.train()
    found = seen.report()
    seen.close()
    return found


def assert_only(found: list[Finding], cause: str) -> None:
    assert [each.cause for each in found] == [cause] and not found[0].certain


# ---- inputs that are written into ----


def standardise(model: Calls, x: Tensor) -> Tensor:
    return model.net(x.sub_(2.0).mul_(0.9))


def test_watch_sees_a_model_that_writes_into_its_data_set() -> None:
    data = torch.randn(32, 8)
    starts = [0, 8, 16, 24] * 8
    assert_only(fit(Calls(standardise), lambda: data[starts.pop() :][:8], 16), "scenes_altered")
    assert_only(fit(Calls(standardise), lambda: data, 16), "scenes_altered")


def refilled() -> Callable[[], Tensor]:
    buffer = torch.zeros(8, 8)
    return lambda: buffer.copy_(torch.randn(8, 8))


def kept(choose: Callable[[Tensor], Tensor] = lambda data: data) -> Callable[[], Tensor]:
    data = torch.randn(32, 8)
    return lambda: choose(data)


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (standardise, lambda: lambda: torch.randn(8, 8)),
        (standardise, refilled),
        (standardise, lambda: kept(lambda data: data[torch.randperm(32)[:8]])),
        (lambda m, x: m.net(F.relu_(x)), kept),
        (lambda m, x: m.net(x.clone().mul_(2.0)), kept),
    ],
    ids=["new", "refilled", "copied", "relu", "cloned"],
)
def test_watch_accepts_writes_that_nobody_reads_again(
    function: Callable[[Calls, Tensor], Tensor], given: Callable[[], Callable[[], Tensor]]
) -> None:
    assert fit(Calls(function), given()) == []


# ---- evaluations that draw random numbers ----


@pytest.mark.parametrize(
    "model",
    [
        lambda: Calls(lambda m, x: F.dropout(m.net(x), m.dropout), dropout=0.1),
        lambda: Calls(lambda m, x: m.net(F.dropout(x, m.drop_rate, True)), drop_rate=0.2),
    ],
)
def test_watch_sees_a_dropout_that_is_on_in_evaluation(model: Callable[[], nn.Module]) -> None:
    assert_only(fit(model(), lambda: torch.randn(8, 8), evaluated=True), "train_mode_in_validation")


@pytest.mark.parametrize(
    "model",
    [
        lambda: Calls(lambda m, x: m.net(m.dropout(x)), dropout=nn.Dropout(0.1)),
        lambda: Calls(lambda m, x: m.net(F.dropout(x, m.dropout, m.training)), dropout=0.1),
        lambda: Calls(lambda m, x: m.net(m.dropout(x)) + torch.randn(8, 4), dropout=nn.Dropout(0.1)),
        lambda: Calls(lambda m, x: m.net(m.attention(x, x, x)[0]), attention=nn.MultiheadAttention(8, 2, 0.1)),
        lambda: Calls(lambda m, x: m.net(x)),
    ],
    ids=["module", "functional", "samples", "attention", "none"],
)
def test_watch_accepts_random_numbers_without_a_dropout_in_evaluation(model: Callable[[], nn.Module]) -> None:
    assert fit(model(), lambda: torch.randn(8, 8), evaluated=True) == []


# ---- autocast ----


class Patched(nn.Linear):
    """Leaves the region it is called in."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def outside(x: Tensor, layers: nn.Module) -> Tensor:
    for layer in layers:
        with torch.autocast("cpu", enabled=False):
            x = layer(x.float())
    return x


def train_cast(model: nn.Module, run: Callable[[Tensor], Tensor], enabled: bool = True) -> list[Finding]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = run(torch.randn(8, 8))
        optimizer.zero_grad()
        (outputs.float() - 1.0).square().mean().backward()
        optimizer.step()
    return seen.report()


def test_watch_sees_layers_that_leave_autocast() -> None:
    model = network()
    assert_only(train_cast(model, lambda x: outside(x, model)), "compiled_differs")
    model = network()
    for layer in model:
        layer.register_forward_hook(lambda _m, _a, output: output.float())
    assert_only(train_cast(model, model), "compiled_differs")


@pytest.mark.parametrize(
    ("layer", "inside", "enabled"),
    [
        (nn.Linear, contextlib.nullcontext, True),
        (nn.Linear, contextlib.nullcontext, False),
        (nn.Linear, lambda: torch.autocast("cpu", enabled=False), True),
        (nn.Linear, lambda: torch.autocast("cpu", enabled=False), False),
        (Patched, contextlib.nullcontext, True),
    ],
)
def test_watch_accepts_autocast_as_it_is_used(layer: type[nn.Linear], inside: Callable[[], Any], enabled: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), layer(16, 4))

    def run(x: Tensor) -> Tensor:
        with inside():
            return model(x)

    assert train_cast(model, run, enabled) == []


# ---- sequences ----


class Reads(nn.Module):
    def __init__(self, layer: nn.Module, turned: bool, every: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.turned, self.every = layer, nn.Linear(8, 1), turned, every

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turned else x
        out = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)[0]
        out = out.transpose(0, 1) if self.turned else out
        return self.head(out if self.every else out[:, -1])


@pytest.mark.parametrize("layer", [lambda: nn.GRU(8, 8), lambda: nn.LSTM(8, 8), lambda: nn.MultiheadAttention(8, 2)])
def test_watch_sees_sequences_that_run_over_scenes(layer: Callable[[], nn.Module]) -> None:
    assert_only(fit(Reads(layer(), False), lambda: torch.randn(16, 6, 8)), "scenes_mixed")


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: Reads(nn.GRU(8, 8, batch_first=True), False), (16, 6, 8)),
        (lambda: Reads(nn.GRU(8, 8), True), (16, 6, 8)),
        (lambda: Reads(nn.GRU(8, 8), False, every=True), (6, 16, 8)),
        (lambda: Reads(nn.GRU(8, 8), False), (6, 1, 8)),
        (lambda: Reads(nn.MultiheadAttention(8, 2), True), (16, 6, 8)),
    ],
    ids=["first", "turned", "by_time", "stream", "attention"],
)
def test_watch_accepts_sequences_over_time(model: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    assert fit(model(), lambda: torch.randn(shape)) == []


# ---- what the loss reads ----


def classify(criterion: nn.Module, labels: Callable[[], Tensor], tokens: int = 0) -> list[Finding]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(32):
        label = labels()
        outputs = model(torch.randn(label.numel() // tokens, tokens, 8) if tokens else torch.randn(len(label), 8))
        outputs = outputs.flatten(0, -2)
        optimizer.zero_grad()
        seen.loss(criterion(outputs, label), outputs, label).backward()
        optimizer.step()
    return seen.report()


@pytest.mark.parametrize(
    "criterion",
    [nn.CrossEntropyLoss(ignore_index=0), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 1.0, 1.0]))],
)
def test_watch_sees_a_class_that_the_loss_leaves_out(criterion: nn.Module) -> None:
    assert_only(classify(criterion, lambda: torch.randint(4, (16,))), "scenes_left_out")


@pytest.mark.parametrize(
    ("criterion", "labels", "tokens"),
    [
        (nn.CrossEntropyLoss(), lambda: torch.randint(4, (16,)), 0),
        (nn.CrossEntropyLoss(ignore_index=-1), lambda: torch.randint(-1, 4, (16,)), 0),
        (nn.CrossEntropyLoss(ignore_index=0), lambda: torch.randint(4, (32,)), 4),
        (nn.CrossEntropyLoss(), lambda: torch.randint(1, 3, (16,)), 0),
        (nn.CrossEntropyLoss(weight=torch.tensor([0.01, 1.0, 1.0, 1.0])), lambda: torch.randint(4, (16,)), 0),
    ],
    ids=["all", "unknown", "padding", "absent", "rare"],
)
def test_watch_accepts_labels_without_a_gradient(
    criterion: nn.Module, labels: Callable[[], Tensor], tokens: int
) -> None:
    assert classify(criterion, labels, tokens) == []


def compare_rows(gives: Callable[[Tensor], Tensor], asked: tuple[int, ...]) -> list[Finding]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(12):
        outputs, target = gives(model(torch.randn(16, 8))), torch.randn(asked)
        optimizer.zero_grad()
        seen.loss((outputs - target).square().mean(), outputs, target).backward()
        optimizer.step()
    return seen.report()


def test_watch_sees_one_row_for_a_batch() -> None:
    assert_only(compare_rows(lambda y: y.mean(0, keepdim=True), (16, 4)), "batch_shrinks")


@pytest.mark.parametrize(
    ("gives", "asked"),
    [
        (lambda y: y, (16, 4)),
        (lambda y: y.mean(0, keepdim=True), (1, 4)),
        (lambda y: y.mean(0), (4,)),
        (lambda y: y.mean(0, keepdim=True), (5, 4)),
        (lambda y: y, (1, 4)),
    ],
)
def test_watch_accepts_rows_that_are_meant(gives: Callable[[Tensor], Tensor], asked: tuple[int, ...]) -> None:
    assert "batch_shrinks" not in [each.cause for each in compare_rows(gives, asked)]
