"""More loops that are right and look like mistakes, each beside the mistake that it looks like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_fast.health import watch
from ris_fast.health.finding import Finding

Loop = Callable[[bool], tuple[list[Finding], str]]


def mlp(*widths: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        parts += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def loud_scenes(wrong: bool) -> tuple[list[Finding], str]:
    """Few scenes are evaluated, of which some are much louder than others; or their columns come in another order."""
    model = mlp(24, 16, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen, mixed = watch(model, optimizer), torch.randn(4, 24)

    def drawn(count: int) -> Tensor:
        directions = torch.randn(count, 4) @ mixed + torch.randn(count, 24) if wrong else torch.randn(count, 24)
        return directions * torch.randn(count, 1).exp()

    checked = drawn(50)
    for number in range(40):
        x = drawn(32)
        step(optimizer, (model(x) - x[:, :1].sin()).square().mean())
        if number % 10 == 9:
            model.eval()
            with torch.no_grad():
                model(checked.roll(1, 1) if wrong else checked)
            model.train()
    return seen.report(), "distributions_differ"


CASES = [
    loud_scenes,
]


@pytest.mark.parametrize("wrong", [True, False], ids=["wrong", "right"])
@pytest.mark.parametrize("loop", CASES, ids=lambda loop: loop.__name__)
def test_what_looks_alike_is_told_apart(loop: Loop, wrong: bool) -> None:
    torch.manual_seed(0)
    found, cause = loop(wrong)
    causes = [each.cause for each in found]
    assert cause in causes if wrong else not found, causes


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_complex_numbers_are_read_without_a_warning(told: bool, recwarn: pytest.WarningsRecorder) -> None:
    """Weights, masks, frozen layers, outputs and targets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, dtype=torch.cfloat), nn.Linear(16, 16, dtype=torch.cfloat))
    model[1].requires_grad_(False)
    optimizer = torch.optim.Adam(model[:1].parameters(), lr=1e-3)
    seen, mask = watch(model, optimizer, every=1), 2 * (torch.rand(16, 16) > 0.5).to(torch.cfloat)
    model.register_forward_hook(lambda _, __, made: made * mask)
    for _ in range(40):
        x = torch.randn(16, 8, dtype=torch.cfloat)
        made, asked = model(x), x.repeat(1, 2)
        loss = (made - asked).abs().square().mean()
        step(optimizer, seen.loss(loss, made, asked) if told else loss)
    seen.report()
    assert not recwarn.list
