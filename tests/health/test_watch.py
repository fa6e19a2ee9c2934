"""A plain PyTorch loop under watch: healthy ones are left in peace, and mistakes are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ris_fast.health import watch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def train(model, optimizer, steps: int = 12, before=lambda: None, clear: bool = True) -> None:
    for _ in range(steps):
        loss = (model(torch.randn(32, 8)) - 1.0).square().mean()
        if clear:
            optimizer.zero_grad()
        loss.backward()
        before()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_healthy_loop_is_left_in_peace(kind) -> None:
    model = network()
    optimizer = kind(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    train(model, optimizer)
    assert seen.report() == [] and seen.steps == 12


def first(seen) -> str:
    return seen.report()[0].cause


def test_mistakes_are_named() -> None:
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1e-2)
    assert first(watch(model, optimizer)) == "missing_from_optimizer"

    model = network()
    model[0].requires_grad_(False)
    assert first(watch(model, torch.optim.SGD(model.parameters(), lr=1e-2))) == "frozen_parameters"


def test_gradients_that_are_replaced_on_their_way_are_seen() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    train(model, optimizer, before=lambda: optimizer.zero_grad(set_to_none=False))
    assert first(seen) == "gradients_cleared_before_step"

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    model[0].weight.register_hook(lambda grad: grad * float("nan"))
    train(model, optimizer, before=lambda: [p.grad.nan_to_num_() for p in model.parameters()])
    assert first(seen) == "sanitised_gradients"


def test_weights_that_are_put_back_are_seen() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen, kept = watch(model, optimizer), {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        train(model, optimizer, 1)
        model.load_state_dict(kept)
    assert first(seen) == "weights_reset"


def test_a_step_that_never_comes_and_a_head_that_nobody_reads() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    model(torch.randn(2, 8)).sum().backward()
    assert first(seen) == "step_never_called"

    model = nn.ModuleDict({"body": network(), "head": nn.Linear(4, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    train(model["body"], optimizer)
    assert first(seen) == "unused_head" and "head" in seen.report()[0].evidence


def test_after_closing_no_hook_is_left_and_sampling_is_sparse() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer, every=10)
    train(model, optimizer, 30)
    assert [record["step"] for record in seen.records] == [*range(8), 10, 20]
    seen.close()
    train(model, optimizer, 5)
    assert seen.steps == 30


def test_a_compiled_graph_is_not_broken() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(compiled, optimizer, 3)
    assert seen.report() == []
