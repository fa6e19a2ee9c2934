"""What `watch` sees of what goes into a model and comes out; and loops that look alike and are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ris_fast.health import watch
from ris_fast.health.finding import Finding
from tests.health.watch.loops import network

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")


def mean_square(output: Tensor, x: Tensor) -> Tensor:
    return (output - x[:, : output.shape[1]]).square().mean()


def run(
    batches: Iterable[Tensor],
    model: nn.Module | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = mean_square,
    evaluate: Callable[[nn.Module], Any] = lambda model: None,
    make: Callable[..., Any] = lambda p: torch.optim.SGD(p, lr=1e-2),
) -> list[Finding]:
    """One step with each batch; `evaluate` after every eighth."""
    model = network() if model is None else model
    optimizer = make(model.parameters())
    seen = watch(model, optimizer)
    for number, x in enumerate(batches):
        optimizer.zero_grad()
        loss(model(x), x).backward()
        optimizer.step()
        if number % 8 == 7:
            evaluate(model)
    return seen.report()


def causes(found: list[Finding], certain: bool = True) -> list[str]:
    return [finding.cause for finding in found if finding.certain or not certain]


def others(count: int = 24, size: int = 16) -> list[Tensor]:
    return [torch.randn(size, 8) for _ in range(count)]


def ending(*last: nn.Module, width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, width), *last)


def in_evaluation(inputs: Callable[[], Iterable[Tensor]]) -> Callable[[nn.Module], None]:
    @torch.no_grad()
    def evaluate(model: nn.Module) -> None:
        model.eval()
        for x in inputs():
            model(x)
        model.train()

    return evaluate


# ---- inputs ----


def test_watch_names_inputs_with_nan() -> None:
    batches = others()
    batches[3][2, 5] = float("nan")
    found = run(batches)
    assert "nonfinite_data" in causes(found) and next(f for f in found if f.cause == "nonfinite_data").step == 4

    infinite = others()
    infinite[3][2, 5] = float("inf")
    assert causes(run(infinite))[0] == "nonfinite_data"

    class Imputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.nan_to_num())

    assert run(batches, Imputing(), lambda o, x: mean_square(o, x.nan_to_num())) == []


def test_watch_doubts_batches_that_come_twice() -> None:
    """Workers that read the same scenes make them anew; a loop that makes two steps with a batch, or sees all scenes in
    every step, is right."""
    found = run([x.clone() for x in others(12) for _ in range(2)])
    assert (
        causes(found) == [] and causes(found, False) == ["repeated_batch"] and "2 times in a row" in found[0].evidence
    )
    assert run([x for x in others(12) for _ in range(2)]) == []
    assert run(others(1) * 24) == [] == run([x.clone() for x in others(1) * 24])
    assert run(others(4) * 6) == []


@pytest.mark.parametrize("others_of_its_size", [True, False])
def test_watch_doubts_one_batch_where_evaluation_has_more(others_of_its_size: bool) -> None:
    kept = torch.randn(16, 8)
    look = in_evaluation(lambda: others(6, 16 if others_of_its_size else 8))
    found = run([kept.clone() for _ in range(24)], evaluate=look)
    assert causes(found) == [] and causes(found, False) == (["repeated_batch"] if others_of_its_size else [])
    assert run([kept] * 24, evaluate=look) == []


def test_watch_doubts_scenes_that_are_all_the_same() -> None:
    found = run([torch.randn(1, 8).repeat(16, 1) for _ in range(24)])
    assert causes(found) == [] and "constant_input" in causes(found, False)


# ---- evaluation ----


@pytest.mark.parametrize("again", [True, False])
def test_watch_doubts_evaluations_that_differ(again: bool) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.net(x), 0.5)

    x = torch.randn(16, 8)
    found = run(others(), Dropping(), evaluate=in_evaluation(lambda: [x, x] if again else others(2)))
    assert causes(found) == [] and causes(found, False) == (["train_mode_in_validation"] if again else [])
    assert run(others(), evaluate=in_evaluation(lambda: [x, x])) == []


def test_watch_doubts_an_evaluation_that_does_not_follow_the_weights() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.kept = network(), None

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return self.net(x)
            self.kept = self.net(x) if self.kept is None else self.kept
            return self.kept

    x = torch.randn(16, 8)
    found = run(others(), Caching(), evaluate=in_evaluation(lambda: [x]))
    assert causes(found) == [] and causes(found, False) == ["cached_validation"]
    assert run(others(), evaluate=in_evaluation(lambda: [x])) == []


def test_watch_doubts_buffers_that_no_training_pass_settles() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
            self.net[1].eval()
            self.net[1].train = lambda mode=True: self.net[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    found = run(others(), Held())
    assert causes(found) == [] and causes(found, False) == ["unsettled_buffers"] and "net.1" in found[0].evidence
    pretrained = Held()
    pretrained.net[1].running_var.fill_(2.0)
    assert run(others(), pretrained) == []


@pytest.mark.filterwarnings("ignore")
def test_watch_doubts_a_spectral_norm_evaluated_first() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 16)), nn.GELU(), nn.Linear(16, 4))

    assert run(others(), model(), evaluate=in_evaluation(others)) == []
    early = model()
    seen = watch(early, torch.optim.SGD(early.parameters(), lr=1e-2))
    in_evaluation(others)(early)
    (finding,) = seen.report()
    assert finding.cause == "unsettled_buffers" and not finding.certain


# ---- what a gradient at the output gives away ----


def classes(x: Tensor) -> Tensor:
    return x[:, :4].argmax(1)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=1e-2), torch.optim.AdamW])
@pytest.mark.parametrize(
    "loss, last",
    [
        (lambda o, x: F.cross_entropy(o, classes(x)), nn.Softmax(1)),
        (lambda o, x: 512 * F.cross_entropy(o, classes(x), torch.arange(1.0, 5.0)), nn.Softmax(1)),
        (lambda o, x: F.binary_cross_entropy_with_logits(o, (x[:, :4] > 0).float()), nn.Sigmoid()),
    ],
)
def test_watch_names_a_softmax_too_many_unasked(loss: Any, last: nn.Module, make: Any) -> None:
    assert causes(run(others(), ending(last), loss, make=make)) == ["softmax_twice"]


@pytest.mark.parametrize(
    "loss, last",
    [
        (lambda o, x: F.nll_loss(o.log(), classes(x)), nn.Softmax(1)),
        (lambda o, x: -o.gather(1, classes(x)[:, None]).mean(), nn.Softmax(1)),
        (lambda o, x: F.mse_loss(o, F.one_hot(classes(x), 4).float()), nn.Softmax(1)),
        (lambda o, x: F.mse_loss(o, x[:, :4].softmax(1)), nn.Softmax(1)),
        (lambda o, x: F.binary_cross_entropy(o, (x[:, :4] > 0).float()), nn.Sigmoid()),
        (lambda o, x: F.mse_loss(o, (x[:, :4] > 0).float()), nn.Sigmoid()),
        (lambda o, x: F.mse_loss(o, torch.zeros_like(o)), nn.Sigmoid()),
        (lambda o, x: F.cross_entropy(o, classes(x)), nn.LogSoftmax(1)),
    ],
)
@pytest.mark.parametrize("start", [1.0, 0.0])
def test_watch_allows_losses_of_probabilities(loss: Any, last: nn.Module, start: float) -> None:
    """At the uniform answer too, where a softmax of probabilities is the probabilities again."""
    model = ending(last)
    model[2].weight.data.mul_(start), model[2].bias.data.mul_(start)
    assert run(others(), model, loss) == []


def test_watch_doubts_outputs_drawn_to_one_number_per_batch() -> None:
    def broadcast(output: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(output, x[:, 0])

    found = run(others(), ending(width=1), broadcast)
    assert causes(found) == [] and causes(found, False) == ["shapes_broadcast"] and "(16, 1)" in found[0].evidence


@pytest.mark.parametrize(
    "loss",
    [
        mean_square,
        lambda o, x: (o - 1).square().mean(),
        lambda o, x: (1 - o.std(0)).relu().mean(),
        lambda o, x: F.huber_loss(o, x[:, :1]),
        lambda o, x: o.var() + o.mean().square(),
        lambda o, x: F.binary_cross_entropy_with_logits(o, (x[:, :1] > 0).float()),
        lambda o, x: -o.mean(),
    ],
)
def test_watch_allows_losses_of_single_numbers(loss: Any) -> None:
    assert run(others(), ending(width=1), loss) == []


def test_watch_doubts_rows_without_gradient() -> None:
    found = run(others(), loss=lambda o, x: mean_square(o[:2], x[:2]))
    assert causes(found) == [] and causes(found, False) == ["scenes_left_out"] and "2 of 16 rows" in found[0].evidence
    nodes = torch.randn(16, 8)
    assert run([nodes] * 24, loss=lambda o, x: mean_square(o[:2], x[:2])) == []  # all nodes of one graph
    assert run(others(), loss=lambda o, x: (o - x[:, :4]).square().mean(1).topk(2).values.mean()) == []


# ---- within the model ----


class Halving(nn.Module):
    """Half of the batch goes through the layers, or pairs of scenes do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.kind == "half":
            return self.last(self.middle(x[: len(x) // 2])).repeat(2, 1)
        if self.kind == "experts":
            chosen = x[:, 0] > 0
            x = x.index_put((chosen,), self.middle(x[chosen]))
        if self.kind == "sets":
            x = self.middle(x.view(-1, 2, 8).mean(1)).repeat_interleave(2, 0) + x
        return self.last(self.middle(x) if self.kind == "whole" else x)


@pytest.mark.parametrize("kind, said", [("half", ["batch_shrinks"]), ("experts", []), ("sets", []), ("whole", [])])
def test_watch_doubts_a_batch_that_shrinks_inside(kind: str, said: list[str]) -> None:
    found = run(others(), Halving(kind))
    assert causes(found) == [] and causes(found, False) == said
    assert kind != "half" or ("from middle on" in found[0].evidence and "see 8" in found[0].evidence)
