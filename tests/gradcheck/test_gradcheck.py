"""Every row of the gradient checks, the sabotaged ones included, and the same through the project's own networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ris_fast import gradcheck
from ris_fast.gradcheck import Row
from ris_fast.kernels.cov_nmse import reference
from ris_fast.kernels.registry import operators
from tests.kernels.old_interpreter import skip_interpreter_of_old_triton

DIFFERENTIABLE = [o for o in operators() if any(s.differentiable for s in o.samples)]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return gradcheck.run_gradcheck("cpu", interpreter=False)


@pytest.mark.slow
def test_run_gradcheck_passes_every_row(rows: list[Row]) -> None:
    assert rows and not [row for row in rows if not row.passed]


@pytest.mark.slow
def test_run_gradcheck_covers_every_operator_and_backend(rows: list[Row]) -> None:
    for operator in operators():
        found = {row.backend for row in rows if row.operator == operator.name}
        assert set(gradcheck.backends_here(operator, "cpu")) <= found
    for operator in DIFFERENTIABLE:
        mine = [row for row in rows if row.operator == operator.name]
        assert {"reference", "as registered"} <= {row.backend for row in mine}
        numeric = [
            row
            for row in mine
            if row.dtype == "float64" and row.backend != "whole network" and row.gradcheck != "caught"
        ]
        assert numeric and all(row.gradcheck == "pass" for row in numeric)


@pytest.mark.parametrize("kind", gradcheck.WRONG)
def test_gradcheck_catches_a_wrong_backward(kind: str) -> None:
    operator = DIFFERENTIABLE[0]
    run = list(gradcheck.backends_here(operator, "cpu").values())[-1]
    sample = next(s for s in operator.samples if s.gradcheck)
    wrong = gradcheck.sabotaged(operator, run, kind)
    assert not gradcheck.measure(operator, kind, wrong, torch.float64, "cpu", [sample]).passed
    assert gradcheck.numerical(operator, wrong, "cpu", [sample]) != "pass"
    assert gradcheck.numerical(operator, run, "cpu", [sample]) == "pass"


def test_gradcheck_catches_a_wrong_value() -> None:
    operator = DIFFERENTIABLE[0]
    run = list(gradcheck.backends_here(operator, "cpu").values())[-1]

    def biased(*args: object) -> tuple[torch.Tensor, ...]:
        value, *rest = run(*args)
        return value * (1 + 1e-5), *rest

    row = gradcheck.measure(operator, "biased", biased, torch.float32, "cpu", operator.samples[:1])
    assert not row.passed and "value" in row.note


def test_graph_faults_catches_a_cut_graph() -> None:
    operator = DIFFERENTIABLE[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradcheck.graph_faults(replace(operator, call=lambda *a: operator.call(a[0].detach(), *a[1:])), "cpu")


def test_gradcheck_samples_include_degenerate_inputs() -> None:
    names = " ".join(s.name for s in DIFFERENTIABLE[0].samples if s.gradcheck)
    for kind in ("rank-deficient", "equal-sources", "one-source", "zero-columns", "small-scales"):
        assert kind in names


@pytest.mark.slow
def test_triton_bodies_pass_gradcheck_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the interpreter is triton's")
    found = gradcheck.interpreted_rows()
    skip_interpreter_of_old_triton(found[0].note or "")
    assert {row.operator for row in found} >= {o.name for o in DIFFERENTIABLE}
    assert not [row for row in found if not row.passed]


@pytest.mark.gpu
def test_run_gradcheck_passes_on_the_gpu() -> None:
    assert not [row for row in gradcheck.run_gradcheck("cuda", interpreter=False) if not row.passed]


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("name", ["backprojection", "hybrid"])
def test_cov_nmse_network_gradients_equal_the_dense_chain(name: str) -> None:
    """Through the project's networks, parameter by parameter, by the rule: at most twice the error of the eager
    chain."""
    import ris_fast
    from ris_fast.config.schema import Task

    task = Task()
    torch.manual_seed(5)
    model = ris_fast.build_model(name, task).eval()
    scenes = ris_fast.simulate(task, 2, ris_fast.SceneGenerator(1, "train"))
    factor, target = model(scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db).factor, scenes.factor
    plain = (None, None, None, 0.0, 0.0, 0.0, 0.0)
    ours = gradients(model, ris_fast.cov_nmse(factor, target_factor=target))
    eager = gradients(model, reference.cov_nmse(factor, target, *plain).mean())
    exact = gradients(model, reference.cov_nmse(factor.double(), target.double(), *plain).mean())
    reached = [key for key, g in exact.items() if g is not None]
    assert reached and [key for key, g in ours.items() if g is not None] == reached
    for key in reached:
        error, usual = ((g[key] - exact[key]).norm() / exact[key].norm().clamp_min(1e-30) for g in (ours, eager))
        assert error <= 2 * max(usual, 2e-6), f"{key}: {error:.1e}, eager {usual:.1e}"
