"""What `seen.loss(value, outputs, targets)` shows; and losses that look alike and are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ris_fast.health import watch
from ris_fast.health.finding import Finding
from tests.health.watch.loops import network

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")


def run(
    loss: Callable[[Tensor, Tensor], Any],
    targets: Callable[[Tensor], Tensor] = lambda x: x[:, :4],
    model: nn.Module | None = None,
    steps: int = 12,
    shown: Callable[[Tensor, Tensor], tuple[Any, Any]] = lambda output, target: (output, target),
) -> list[Finding]:
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(steps):
        x = torch.randn(16, 8)
        output, target = model(x), targets(x)
        value = loss(output, target)
        assert seen.loss(value, *shown(output, target)) is value
        optimizer.zero_grad()
        if isinstance(value, Tensor) and value.requires_grad:
            value.backward()
        optimizer.step()
    return seen.report()


def causes(found: list[Finding], certain: bool = True) -> list[str]:
    return [finding.cause for finding in found if finding.certain or not certain]


def classes(x: Tensor) -> Tensor:
    return x[:, :4].argmax(1)


def ending(*last: nn.Module, width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, width), *last)


@pytest.mark.parametrize(
    "loss, targets, model",
    [
        (F.mse_loss, lambda x: x[:, :4], None),
        (lambda o, t: F.l1_loss(o, t) + 0.1 * o.square().mean(), lambda x: x[:, :4], None),
        (F.cross_entropy, classes, None),
        (lambda o, t: F.nll_loss(o.log_softmax(1), t), classes, None),
        (lambda o, t: F.nll_loss(o.log(), t), classes, nn.Softmax(1)),
        (lambda o, t: F.cross_entropy(10 * o.tanh(), t), classes, None),
        (F.binary_cross_entropy, lambda x: (x[:, :4] > 0).float(), nn.Sigmoid()),
        (F.binary_cross_entropy_with_logits, lambda x: (x[:, :4] > 0).float(), None),
        (lambda o, t: F.kl_div(o.log_softmax(1), t.softmax(1), reduction="batchmean"), lambda x: x[:, :4], None),
        (lambda o, t: F.mse_loss(o.squeeze(1), t), lambda x: x[:, 0], "narrow"),
        (lambda o, t: (o.T - o).sign().mul(t[None] - t[:, None]).relu().mean() + o.mean(), lambda x: x[:, 0], "narrow"),
        (F.mse_loss, lambda x: x[:, :4].relu(), nn.ReLU()),
        (F.mse_loss, lambda x: x[:, :4].tanh(), nn.Tanh()),
        (lambda o, t: o.sum(1).relu().mean(), lambda x: None, None),
        (lambda o, t: {"loss": F.mse_loss(o, t)}["loss"], lambda x: torch.zeros(16, 4), None),
        (lambda o, t: F.cross_entropy(o, t), lambda x: torch.zeros(16, dtype=torch.long), None),
        (lambda o, t: F.margin_ranking_loss(o[:, 0], o[:, 1], t), lambda x: x[:, 0].sign(), None),
    ],
)
def test_watch_allows_losses_of_all_kinds(loss: Any, targets: Any, model: Any) -> None:
    network = ending(width=1) if model == "narrow" else None if model is None else ending(model)
    assert run(loss, targets, network) == []


def test_watch_loss_needs_nothing_but_the_value_and_ignores_evaluation() -> None:
    assert run(F.mse_loss, shown=lambda *_: ()) == []
    model = network()
    seen = watch(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    with torch.no_grad():
        assert seen.loss(3.0) == 3.0
    model.eval()
    seen.loss(model(torch.randn(2, 8)).sum())
    assert not seen.losses.records


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, lambda o, t: (o - t).square().mean(), F.smooth_l1_loss])
def test_watch_names_shapes_that_are_broadcast(loss: Any) -> None:
    (finding,) = run(loss, lambda x: x[:, 0], ending(width=1))
    assert finding.cause == "shapes_broadcast" and finding.certain
    assert "(16, 1)" in finding.evidence and "(16,)" in finding.evidence and "(16, 16)" in finding.evidence


def test_watch_doubts_all_pairs() -> None:
    found = run(lambda o, t: (-(o - t).square()).exp().mean().neg(), lambda x: x[:, 0], ending(width=1))
    assert causes(found) == [] and causes(found, False) == ["shapes_broadcast"]


@pytest.mark.parametrize(
    "loss, targets, last",
    [
        (F.cross_entropy, classes, nn.Softmax(1)),
        (lambda o, t: F.cross_entropy(o.softmax(1), t) + 1e-3 * o.square().mean(), classes, nn.Identity()),
        (F.cross_entropy, classes, nn.Sigmoid()),
        (F.cross_entropy, lambda x: x[:, :4].softmax(1), nn.Softmax(1)),
        (lambda o, t: F.nll_loss(o.double().log_softmax(1), t), classes, nn.Softmax(1)),
        (F.binary_cross_entropy_with_logits, lambda x: (x[:, :4] > 0).float(), nn.Sigmoid()),
    ],
)
def test_watch_names_a_softmax_too_many(loss: Any, targets: Any, last: nn.Module) -> None:
    found = run(loss, targets, ending(last))
    assert causes(found) == ["softmax_twice"]


def test_watch_names_losses_without_history() -> None:
    assert causes(run(lambda o, t: torch.tensor(F.mse_loss(o, t).item(), requires_grad=True)))[0] == "loss_rebuilt"
    assert causes(run(lambda o, t: F.mse_loss(o.detach(), t)))[0] == "detached_loss"
    assert causes(run(lambda o, t: F.mse_loss(o, t).item()))[0] == "detached_loss"
    elsewhere = torch.ones(1, requires_grad=True)
    assert causes(run(lambda o, t: (F.mse_loss(o.detach(), t) * elsewhere).sum()))[0] == "detached_loss"


def test_watch_names_a_loss_without_history_unasked() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        torch.tensor(model(torch.randn(16, 8)).square().mean().item(), requires_grad=True).backward()
        optimizer.step()
    assert seen.report()[0].cause == "loss_rebuilt" and seen.report()[0].certain


def test_watch_allows_a_loss_that_is_logged_without_history() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        output = model(torch.randn(16, 8))
        output.square().mean().backward()
        seen.loss(output.detach().square().mean(), output)
        optimizer.step()
    assert seen.report() == []


def test_watch_says_where_a_nan_is_first() -> None:
    def late(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean() * (float("nan") if len(calls) > 6 else 1.0)

    calls: list[int] = []
    found = run(lambda o, t: calls.append(1) or late(o, t))
    finding = next(finding for finding in found if "the loss is NaN" in finding.evidence)
    assert finding.cause == "nonfinite_gradients" and finding.step == 7 and "in the loss makes it" in finding.evidence
    found = run(F.mse_loss, lambda x: torch.full((16, 4), float("nan")))
    assert found[0].cause == "nonfinite_data" and "targets" in found[0].evidence


@pytest.mark.parametrize(
    "last, said", [(nn.ReLU(), "nothing below 0"), (nn.Tanh(), "-1 to 1"), (nn.Sigmoid(), "0 to 1")]
)
def test_watch_doubts_outputs_that_cannot_reach_the_targets(last: nn.Module, said: str) -> None:
    (finding,) = run(F.mse_loss, model=ending(last))
    assert finding.cause == "limited_output" and not finding.certain and said in finding.evidence


def test_watch_doubts_an_imaginary_part_that_is_zero() -> None:
    class Complex(nn.Module):
        def __init__(self, imaginary: float) -> None:
            super().__init__()
            self.net, self.imaginary = network(), imaginary

        def forward(self, x: Tensor) -> Tensor:
            output = self.net(x)
            return torch.complex(output, self.imaginary * output)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().square().mean()

    def targets(x: Tensor) -> Tensor:
        return torch.complex(x[:, :4], x[:, 4:])

    assert causes(run(loss, targets, Complex(0.0)), False) == ["limited_output"]
    assert run(loss, targets, Complex(1.0)) == []


def test_watch_names_scenes_left_out_and_doubts_masks() -> None:
    (finding,) = run(lambda o, t: F.mse_loss(o[:1], t[:1]))
    assert finding.cause == "scenes_left_out" and finding.certain and "1 of 16 scenes" in finding.evidence
    found = run(lambda o, t: F.mse_loss(o[:4], t[:4]))
    assert causes(found) == [] and causes(found, False) == ["scenes_left_out"]
    assert run(lambda o, t: (o - t).square().mean(1).min()) == []  # another one each time
    assert run(lambda o, t: F.mse_loss(o[:12], t[:12])) == []


def test_watch_doubts_constant_targets_and_outputs() -> None:
    found = run(F.mse_loss, lambda x: torch.full((16, 4), 0.3))
    assert causes(found) == [] and causes(found, False) == ["constant_targets"]

    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * 0 + 1)

    found = run(F.mse_loss, model=Blind())
    assert causes(found) == [] and causes(found, False)[0] == "constant_input"  # of its first layer


def test_watch_doubts_a_negated_loss() -> None:
    found = run(lambda o, t: -F.mse_loss(o, t))
    assert causes(found) == [] and causes(found, False) == ["loss_sign"]


def test_watch_reads_nothing_before_the_report_and_stops_looking() -> None:
    """After the first calls those of one step in `every` are noted, and some that lie further and further apart."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer, every=50)
    for _ in range(120):
        optimizer.zero_grad()
        output = model(torch.randn(16, 8))
        seen.loss(output.square().mean(), output).backward()
        optimizer.step()
    assert len(seen.losses.records) < 50 and seen.report() == []
