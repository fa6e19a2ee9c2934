"""A plain PyTorch loop under watch: mistakes that show between two steps, and healthy loops that look alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast import FusedAdamW
from ris_fast.health import watch
from tests.health.watch.loops import network, train


def certain_causes(make: Callable[..., Any], steps: int = 12, **habits: Any) -> list[str]:
    model = network()
    optimizer = make(model.parameters())
    seen = watch(model, optimizer)
    habits = {name: (lambda act=act: act(model, optimizer)) if callable(act) else act for name, act in habits.items()}
    train(model, optimizer, steps, **habits)
    return [finding.cause for finding in seen.report() if finding.certain]


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=1e-3), torch.optim.Adam, FusedAdamW])
def test_watch_names_gradients_never_cleared(make: Callable[..., Any]) -> None:
    assert certain_causes(make, clear=False) == ["gradients_never_cleared"]

    def clipped(model: nn.Module, _: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    assert certain_causes(make, clear=False, before=clipped) == ["gradients_never_cleared"]


@pytest.mark.parametrize(
    "clear",
    [
        lambda p: setattr(p, "grad", None),
        lambda p: p.grad.zero_(),
        lambda p: p.grad.data.zero_(),
        lambda p: p.grad.mul_(0.5),
    ],
)
def test_watch_allows_micro_batches_cleared_anyhow(clear: Callable[[Tensor], Any]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for number in range(48):
        (model(torch.randn(32, 8)) - 1.0).square().mean().backward()
        if number % 4 == 3:
            optimizer.step()
            for parameter in model.parameters():
                clear(parameter)
    assert seen.report() == []


def test_watch_allows_a_backward_that_is_thrown_away() -> None:
    """Another loss reaches the weights first, on top of the last step's gradients, and all is cleared before their
    own."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(12):
        model(torch.randn(32, 8)).sum().backward()
        train(model, optimizer, 1)
    assert seen.report() == []


def test_watch_names_a_step_called_twice() -> None:
    assert certain_causes(lambda p: torch.optim.SGD(p, lr=1e-2), before=lambda _, optimizer: optimizer.step()) == [
        "step_called_twice"
    ]


def test_watch_names_a_layer_with_its_gradient_taken_away() -> None:
    model = network()
    for habit, certain in (
        (lambda: model[0].weight.grad.zero_(), True),
        (lambda: setattr(model[0].weight, "grad", None), False),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        seen = watch(model, optimizer)
        train(model, optimizer, before=habit)
        (finding,) = seen.report()
        assert (finding.cause, finding.certain) == ("zeroed_gradients", certain) and "0.weight" in finding.evidence
        seen.frozen = ("0.weight",)
        assert seen.report() == []


def test_watch_names_impossible_rates_and_decays() -> None:
    assert (
        certain_causes(lambda p: torch.optim.Adam(p, lr=1e-12))
        == certain_causes(lambda p: torch.optim.SGD(p, lr=1e-12))
        == ["learning_rate_too_small"]
    )
    assert certain_causes(lambda p: torch.optim.AdamW(p, weight_decay=500.0)) == ["weight_decay_too_large"]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    seen, plan = watch(model, optimizer), torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 + step)
    for _ in range(6):
        train(model, optimizer, 1)
        plan.step()
    assert seen.report() == []  # a long warm-up


def test_watch_report_names_weights_broken_between_looks() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    train(model, optimizer, 20)
    train(model, optimizer, 1, before=lambda: model[0].weight.grad.mul_(float("nan")))
    (found,) = seen.report()
    assert found.cause == "nonfinite_gradients" and "0.weight" in found.evidence and found.step == 21


def test_watch_allows_compiling_while_a_hook_waits() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    train(model, optimizer, 2)
    assert seen.hooks[0].gradients.stale_probe is not None
    torch._dynamo.utils.counters.clear()
    train(torch.compile(model, fullgraph=True, backend="aot_eager"), optimizer, 12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and seen.report() == []


# ---- thresholds and options that no run survives ----

NORM, VALUE = nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_


def clipped(
    clip: Callable[..., Any],
    threshold: float,
    make: Callable[..., Any] = torch.optim.AdamW,
    model: nn.Module | None = None,
) -> list[Any]:
    model = model or network()
    optimizer = make(model.parameters())
    seen = watch(model, optimizer)
    train(model, optimizer, before=lambda: clip(model.parameters(), threshold))
    return seen.report()


@pytest.mark.parametrize("make", [torch.optim.AdamW, FusedAdamW, lambda p: torch.optim.SGD(p, lr=1e-2)])
@pytest.mark.parametrize(
    "clip, threshold, said",
    [
        (NORM, 0.0, "product with zero"),
        (VALUE, 0.0, "product with zero"),
        (NORM, -1.0, "turned round"),
        (NORM, -1e-3, "turned round"),
        (VALUE, -1.0, "the same number"),
    ],
)
def test_watch_names_a_clip_threshold_of_zero_or_below(
    clip: Callable[..., Any], threshold: float, said: str, make: Callable[..., Any]
) -> None:
    (finding,) = clipped(clip, threshold, make)
    assert (
        finding.cause == "clip_too_small"
        and finding.certain
        and said in finding.evidence
        and "zero_grad" not in finding.advice
    )


@pytest.mark.parametrize("clip", [NORM, VALUE])
def test_watch_names_a_clip_threshold_of_nan(clip: Callable[..., Any]) -> None:
    finding = clipped(clip, float("nan"))[0]
    assert (
        finding.cause == "nonfinite_gradients"
        and "after backward" in finding.evidence
        and "clip threshold" in finding.advice
    )


@pytest.mark.parametrize("clip, threshold", [(NORM, float("inf")), (VALUE, float("inf")), (NORM, 1e-2), (VALUE, 1e-3)])
def test_watch_allows_clip_thresholds_a_run_survives(clip: Callable[..., Any], threshold: float) -> None:
    assert clipped(clip, threshold) == []


def test_watch_allows_a_network_of_one_number() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x

    assert clipped(NORM, 1.0, model=One()) == clipped(VALUE, 1e-2, model=One()) == []


def test_watch_doubts_gradients_negated_by_hand() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    train(model, optimizer, before=lambda: [p.grad.neg_() for p in model.parameters()])
    assert [(finding.cause, finding.certain) for finding in seen.report()] == [("loss_sign", False)]


def halves(steps: int = 6, **options: Any) -> list[Any]:
    model = network().half()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    seen = watch(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(32, 8).half()) - 1.0).square().mean().backward()
        optimizer.step()
    return seen.report()


@pytest.mark.parametrize("steps", [1, 6])
def test_watch_names_the_eps_of_a_nonfinite_step(steps: int) -> None:
    (finding,) = halves(steps)
    assert finding.cause == "nonfinite_step" and finding.certain and finding.step == 1
    assert (
        "eps of 1e-08 is zero in float16, whose smallest number is 6e-08" in finding.evidence
        and "logarithm" not in finding.advice
    )
    assert halves(steps, eps=1e-4) == []


def test_watch_names_zero_eps_and_infinite_rate() -> None:
    for options, said in (({"eps": 0.0}, "eps is zero"), ({"lr": float("inf")}, "The rate is inf")):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        seen = watch(model, optimizer)
        train(model, optimizer, 3, before=lambda first=model[0].weight: first.grad.zero_())
        finding = seen.report()[0]
        assert finding.cause == "nonfinite_step" and said in finding.evidence


# ---- reports at any moment ----


def test_watch_reports_at_any_moment_of_an_accumulation() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    assert seen.report() == []
    for number in range(12):
        (model(torch.randn(32, 8)) - 1.0).square().mean().backward()
        assert seen.report() == []
        if number % 4 == 3:
            optimizer.step()
            assert seen.report() == []
            optimizer.zero_grad()
            assert seen.report() == []


@pytest.mark.parametrize("cleared, passes", [(True, 300), (False, 4100)])
def test_watch_is_certain_of_no_step_after_thousands_of_backwards(cleared: bool, passes: int) -> None:
    """Gradients of one scene at a time are cleared hundreds of times before a step."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(passes):
        if cleared:
            optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
    (finding,) = seen.report()
    assert (finding.cause, finding.certain) == ("step_never_called", not cleared)
    assert f"{passes} backward passes, {299 if cleared else 0} of which found the gradients cleared" in finding.evidence


def test_watch_is_never_certain_of_parts_trained_in_turn() -> None:
    model = nn.ModuleDict({"one": nn.Linear(8, 4), "other": nn.Linear(8, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for number in range(6):
        train(model[("one", "other")[number % 2]], optimizer, 1)
        assert not [finding for finding in seen.report() if finding.certain]
    assert seen.report() == []
