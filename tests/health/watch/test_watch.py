"""A plain PyTorch loop under watch: its hooks, and that mistakes are named. What healthy loops may do is in
test_watch_healthy.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast import FusedAdamW
from ris_fast.health import watch
from ris_fast.health.watch.watcher import Watcher
from tests.health.watch.loops import network, train


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_watch_finds_nothing_in_a_healthy_loop(kind) -> None:
    model = network()
    optimizer = kind(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    train(model, optimizer)
    assert seen.report() == [] and seen.steps == 12


def first(seen) -> str:
    return seen.report()[0].cause


def test_watch_names_missing_and_frozen_parameters() -> None:
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1e-2)
    assert first(watch(model, optimizer)) == "missing_from_optimizer"

    model = network()
    model[0].requires_grad_(False)
    assert first(watch(model, torch.optim.SGD(model.parameters(), lr=1e-2))) == "frozen_parameters"


def test_watch_names_cleared_and_sanitised_gradients() -> None:
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


def test_watch_names_weights_that_are_put_back() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen, kept = watch(model, optimizer), {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        train(model, optimizer, 1)
        model.load_state_dict(kept)
    assert first(seen) == "weights_reset"


def test_watch_names_a_missing_step_and_an_unused_head() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 8)).sum().backward()
    assert first(seen) == "step_never_called"

    model = nn.ModuleDict({"body": network(), "head": nn.Linear(4, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    train(model["body"], optimizer)
    assert first(seen) == "unused_head" and "head" in seen.report()[0].evidence


def test_watch_samples_sparsely_and_close_removes_its_hooks() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer, every=10)
    train(model, optimizer, 30)
    steps = [record.step for record in seen.records]
    assert steps[:8] == [*range(8)] and all(0 < after - before <= 10 for before, after in pairwise(steps))
    seen.close()
    train(model, optimizer, 5)
    assert seen.steps == 30


def test_watch_does_not_break_a_compiled_graph() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(compiled, optimizer, 3)
    assert seen.report() == []


def test_watch_hooks_cause_no_recompilation() -> None:
    model = torch.compile(network(), fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer, every=10)
    torch._dynamo.utils.counters.clear()
    train(model, optimizer, 25)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and len(seen.records) >= 10
    assert seen.report() == [] and seen.records[0].names[0] == "0.weight"


# ---- other people's loops ----


def with_closure(
    kind: Callable[..., Any], steps: int = 12, gradient: Callable[[Tensor], Tensor] = lambda grad: grad
) -> Watcher:
    model = network()
    optimizer = kind(model.parameters())
    seen = watch(model, optimizer)
    model[0].weight.register_hook(gradient)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(torch.randn(32, 8)) - 1.0).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return seen


@pytest.mark.parametrize(
    "kind",
    [torch.optim.Adam, lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3), lambda p: FusedAdamW(p, clear_grads=True)],
)
def test_watch_sees_gradients_made_within_the_step(kind: Callable[..., Any]) -> None:
    assert with_closure(kind).report() == []
    assert first(with_closure(kind, 1, lambda grad: grad * float("nan"))) == "nonfinite_gradients"


def scaled(make: Callable[..., Any], factor: float = 1.0, steps: int = 40, **options: Any) -> Watcher:
    """Steps under torch's own loss scaler, with gradients in the range of float16; `factor` on the loss."""
    model, scaler = network(), torch.amp.GradScaler("cpu", **options)
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad.half().float())
    optimizer = make(model.parameters())
    seen = watch(model, optimizer, every=30)
    for _ in range(steps):
        optimizer.zero_grad()
        scaler.scale((model(torch.randn(32, 8)) - 1.0).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    return seen


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.AdamW(p, fused=True), FusedAdamW])
def test_watch_allows_a_loss_scaler_unless_it_skips_all(make: Callable[..., Any]) -> None:
    """Where the optimizer knows the scaler it is called in skipped steps too; where not, what it gets has been
    divided."""
    assert scaled(make).report() == []
    rough = scaled(make, 100.0, init_scale=2.0**20)
    assert rough.report() == [] and (rough.steps < 40 or not rough.records[0].grad_at_step.isfinite().all())
    finding = scaled(make, float("nan")).report()[0]
    assert finding.cause == "scaler_skips_all" or (
        finding.cause == "step_never_called" and "4 of them are not finite" in finding.evidence
    )


def test_watch_takes_several_optimizers() -> None:
    model = network()
    parts = torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[2].parameters(), lr=1e-2)
    seen = watch(model, parts)
    for _ in range(12):
        for optimizer in parts:
            optimizer.zero_grad()
        (model(torch.randn(32, 8)) - 1.0).square().mean().backward()
        for optimizer in parts:
            optimizer.step()
    assert seen.report() == [] and {record.names[0] for record in seen.records} == {"0.weight", "2.weight"}
    seen.close()
    both = torch.optim.SGD(model.parameters(), lr=1e-2), parts[0]
    assert first(watch(model, both)) == "duplicate_parameters"
    assert first(watch(model, parts[0])) == "missing_from_optimizer"
    with pytest.raises(ValueError, match="0 optimizers"):
        watch(model, [])


def test_watch_follows_parameters_that_come_and_go() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer, every=5)
    train(model, optimizer, 3)
    model[0].requires_grad_(True)
    model.append(nn.Linear(4, 4))
    optimizer.add_param_group({"params": model[3].parameters()})
    train(model, optimizer, 10)
    assert seen.report() == [] and len(seen.records[0].names) == 4 and len(seen.records[-1].names) == 6
    model[2].requires_grad_(False)
    train(model, optimizer, 10)
    assert first(seen) == "frozen_parameters" and seen.steps == 23


def test_watch_takes_sparse_lazy_and_half_parameters() -> None:
    """Integers, weights that are not there yet, sparse gradients, and half precision whose norm leaves its range."""
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.LazyLinear(4), nn.Linear(4, 1))
    model.register_parameter("table", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    wide = nn.Parameter(torch.full((64, 64), 2e3, dtype=torch.float16))
    model.register_parameter("wide", wide)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not model.table], lr=1e-6)
    seen = watch(model, optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        (model(torch.randint(0, 10, (8,))).square().mean() + (wide.float() * 2e3).sum()).backward()
        optimizer.step()
    assert seen.report() == []  # what is frozen from the start and no layer's weight is a table
    assert seen.records[0].hooked == ("wide", "0.weight", "2.weight", "2.bias") and "1.weight" in seen.records[1].hooked
    assert seen.records[-1].grad_after_backward[0] == pytest.approx(2e3 * 64, rel=1e-3)


def test_watch_allows_a_target_network_that_follows() -> None:
    """A frozen copy within the model, moved by hand between steps, is nobody's optimizer's."""
    model = nn.ModuleDict({"online": network(), "target": network()})
    model["target"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["online"].parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(4):
        train(model["online"], optimizer, 1)
        torch._foreach_lerp_(
            list(model["target"].parameters()), [p.detach() for p in model["online"].parameters()], 0.1
        )
    assert seen.report() == []


# ---- the name ----


@pytest.mark.parametrize(
    "imports",
    [
        "from ris_fast.health import watch",
        "from ris_fast.health.watch import watch",
        "import ris_fast.health.watch; watch = ris_fast.health.watch",
        "import ris_fast.health.watch; watch = ris_fast.health.watch.watch",
        "import ris_fast.health.watch.fixes; from ris_fast.health import watch",
        "from ris_fast.health.watch.fixes import fix; from ris_fast.health.watch import watch",
    ],
)
def test_watch_is_a_function_however_imported_without_torch(imports: str) -> None:
    code = f"{imports}; import sys; assert watch.__code__.co_name == 'watch' and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
