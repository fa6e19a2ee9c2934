"""What `watch` says of terms and targets, tasks in turn, half precision, graphs, and two optimizers of one tensor; and
of loops near to them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ris_fast.health import watch

STEPS = 24


def said(model: nn.Module, optimizers, step: Callable[[], None], steps: int = STEPS, **options) -> list[str]:
    """Causes after steps of a loop."""
    seen = watch(model, optimizers, **options)
    for _ in range(steps):
        step()
    return [each.cause for each in seen.report()]


def loop(model: nn.Module, lossf: Callable[[Tensor], Tensor], data: Callable[[], Tensor], **options) -> list[str]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        lossf(data()).backward()
        optimizer.step()

    return said(model, optimizer, step, **options)


@pytest.mark.parametrize("clears", [True, False])
def test_tasks_that_clear_what_the_other_has_left(clears: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(6, 8), "one": nn.Linear(8, 1), "other": nn.Linear(8, 1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        x = torch.randn(16, 6)
        optimizer.zero_grad()
        for task in ("one", "other"):
            if clears:
                optimizer.zero_grad()
            (model[task](model["trunk"](x).tanh()) - x[:, :1]).square().mean().backward()
        optimizer.step()

    found = said(model, optimizer, step)
    assert found[:1] == (["gradients_cleared_before_step"] if clears else [])


def test_gradients_of_a_frozen_part_that_are_set_to_none() -> None:
    """As self-distillation does in its first epoch: not those of an earlier pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        x = torch.randn(16, 6)
        optimizer.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        model[2].weight.grad = None
        optimizer.step()

    assert "gradients_cleared_before_step" not in said(model, optimizer, step)


@pytest.mark.parametrize(
    ("lossf", "expected"),
    [
        (lambda o, x: (o - x).square().mean() + o.square().sum(1).sum(), ["dominating_term"]),
        (lambda o, x: (o - x).square().sum(1).mean() + o.square().sum(1).sum(), ["dominating_term"]),
        (lambda o, x: (o - x).square().sum(1).mean() + o.square().mean(1).mean(), []),
        (lambda o, x: (o - x).square().sum() + o.square().sum(1).sum(), []),
        (lambda o, x: (o - x).square().mean() + o.square().sum() / 16, []),
        (lambda o, x: (o - x).square().mean() + 1e-3 * o.abs().sum(), []),
    ],
)
def test_terms_that_are_reduced_apart(lossf, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
    found = loop(model, lambda x: lossf(model(x), x), lambda: torch.randn(16, 6))
    assert found == expected


def test_a_penalty_on_weights_is_no_sum_over_scenes() -> None:
    """Though the layer is as wide as the batch is large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
    found = loop(model, lambda x: F.mse_loss(model(x), x) + model[0].weight.square().sum(), lambda: torch.randn(16, 6))
    assert found == []


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, ["constant_targets"]), (0.5, [])])
def test_labels_of_a_binary_loss_that_are_all_the_same(fraction: float, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen = watch(model, optimizer)
    for _ in range(STEPS):
        x = torch.randn(16, 6)
        made, asked = model(x), fraction * (x[:, :1] > 0).float()
        optimizer.zero_grad()
        seen.loss(F.binary_cross_entropy_with_logits(made, asked), made, asked).backward()
        optimizer.step()
    assert [each.cause for each in seen.report()] == expected


@pytest.mark.parametrize(
    ("rate", "factor", "expected"),
    [
        (1e-2, lambda step: 1e-2 * (1 - step / 200), ["learning_rate_too_small"]),
        (1e-2, lambda step: 1 - step / 200, []),
        (1e-2, lambda step: step / 12000, []),  # a long warm-up
        (1.0, lambda step: 1e-2 * (1 - step / 200), []),  # as is usual with a base of one
    ],
)
def test_a_schedule_that_gives_the_rate_for_a_factor(rate: float, factor, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def step() -> None:
        x = torch.randn(16, 6)
        optimizer.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        optimizer.step()
        schedule.step()

    found = said(model, optimizer, step, steps=110)
    assert ("learning_rate_too_small" in found) == bool(expected)


@pytest.mark.parametrize(("declared", "expected"), [(("0",), ["frozen_parameters"]), (("0", "2"), []), ((), [])])
def test_a_frozen_layer_beside_those_that_are_declared(declared: tuple[str, ...], expected: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    for part in (model[0], model[2]):
        part.requires_grad_(False)
    found = loop(model, lambda x: F.mse_loss(model(x), x[:, :1]), lambda: torch.randn(16, 6), frozen=declared)
    assert found == expected


@pytest.mark.parametrize(("both", "expected"), [(True, ["duplicate_parameters"]), (False, [])])
def test_a_judge_in_the_optimizer_of_those_whom_it_judges(both: bool, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"maker": nn.Linear(4, 2), "judge": nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))}
    )
    maker, judge = model["maker"], model["judge"]
    of_maker = torch.optim.Adam((model if both else maker).parameters(), lr=1e-3)
    of_judge = torch.optim.Adam(judge.parameters(), lr=1e-3)

    def step() -> None:
        made = maker(torch.randn(32, 4))
        of_judge.zero_grad()
        (F.softplus(-judge(torch.randn(32, 2) + 1)).mean() + F.softplus(judge(made.detach())).mean()).backward()
        of_judge.step()
        of_maker.zero_grad()
        F.softplus(-judge(made)).mean().backward()
        of_maker.step()

    assert said(model, [of_maker, of_judge], step) == expected


@pytest.mark.parametrize(
    ("kind", "keep", "expected"),
    [
        (torch.bfloat16, 0.999, ["low_precision_weights"]),
        (torch.float32, 0.999, []),
        (torch.bfloat16, None, []),  # a reference that stays
    ],
)
def test_an_average_in_16_bits(kind: torch.dtype, keep: float | None, expected: list[str]) -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    model = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student).requires_grad_(False).to(kind)})
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)

    def step() -> None:
        x = torch.randn(16, 6)
        optimizer.zero_grad()
        (F.mse_loss(student(x), x[:, :1]) + F.mse_loss(student(x), model["teacher"](x.to(kind)).float())).backward()
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(model["teacher"].parameters(), student.parameters()) if keep else ():
                mean.mul_(keep).add_(weight.to(kind), alpha=1 - keep)

    assert said(model, optimizer, step, steps=60, frozen=("teacher",)) == expected


class Squares(nn.Module):
    """A norm whose squares are in half precision, and which may scale them down first."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        half = x.half() * self.scale
        return (half * torch.rsqrt(half.pow(2).mean(1, keepdim=True) + 1e-3)).float()


@pytest.mark.parametrize(("scale", "expected"), [(1.0, ["fp16_overflow"]), (1e-3, [])])
def test_squares_beyond_half_precision(scale: float, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Squares(scale), nn.Linear(16, 1))
    found = loop(model, lambda x: F.mse_loss(model(x), x[:, :1].sign()), lambda: 1000 * torch.randn(16, 6))
    assert found == expected


class Messages(nn.Module):
    """One round of messages along edges (2, E) of all graphs of a batch, of five nodes each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        hidden = self.first(nodes).tanh()
        received = torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])
        return self.last(hidden + received).unflatten(0, (-1, 5)).mean(1)


@pytest.mark.parametrize(("moved", "expected"), [(0, ["scenes_mixed"]), (5, [])])
def test_edges_of_graphs_that_are_joined(moved: int, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = Messages()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        nodes, edges = torch.randn(40, 6), torch.randint(5, (2, 8, 10)) + moved * torch.arange(8)[:, None]
        optimizer.zero_grad()
        F.mse_loss(model(nodes, edges.flatten(1)), nodes.unflatten(0, (-1, 5))[:, :, :1].mean(1)).backward()
        optimizer.step()

    assert said(model, optimizer, step) == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (lambda x: torch.where(torch.arange(8) >= 6, x, -100)[: len(x)], []),
        (
            lambda x: torch.where((torch.arange(8) >= 6) & (torch.arange(16)[:, None] % 4 > 0), x, -100),
            ["scenes_left_out"],
        ),
        (lambda x: torch.where(torch.rand(16, 8) < 0.15, x, -100), []),  # masked tokens
    ],
)
def test_sequences_of_which_no_label_counts(labels, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen = watch(model, optimizer)
    for _ in range(STEPS):
        x = torch.randint(9, (16, 8))
        made, asked = model(x).transpose(1, 2), labels((x + 1) % 9)[torch.randperm(16)]
        optimizer.zero_grad()
        seen.loss(F.cross_entropy(made, asked), made, asked).backward()
        optimizer.step()
    assert [each.cause for each in seen.report()] == expected


@pytest.mark.parametrize(("term", "expected"), [("number", ["dead_loss_term"]), ("graph", []), ("attack", [])])
def test_a_penalty_on_a_derivative_that_is_a_number(term: str, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 1))

    def lossf(x: Tensor) -> Tensor:
        points = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=term == "graph")
        if term == "attack":
            return F.mse_loss(model(x + 0.01 * slope.sign()), x[:, :1])
        return F.mse_loss(model(x), x[:, :1]) + slope.square().mean()

    assert [each for each in loop(model, lossf, lambda: torch.randn(16, 6)) if each == "dead_loss_term"] == expected
