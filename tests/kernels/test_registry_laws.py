"""The laws that every registered kernel obeys, whatever it computes; iterates over the registry and nothing else."""

from __future__ import annotations

import pytest
import torch

from ris_fast.gradcheck import backends_here, measure, outcome, tensors_of
from ris_fast.kernels.registry import FAMILIES, Operator, Sample, families, operators

OPERATORS = {operator.name: operator for operator in operators()}
BACKENDS = [(name, backend) for name, operator in OPERATORS.items() for backend in backends_here(operator, "cpu")]
SAMPLES = [
    (name, f"{i}-{sample.name}") for name, operator in OPERATORS.items() for i, sample in enumerate(operator.samples)
]
SMALL = [
    (name, f"{i}-{s.name}") for name, operator in OPERATORS.items() for i, s in enumerate(operator.samples) if s.small
]


def sample_of(name: str, sample: str) -> tuple[Operator, Sample]:
    operator = OPERATORS[name]
    return operator, operator.samples[int(sample.split("-")[0])]


def test_registry_family_is_one_folder_and_one_line() -> None:
    assert [family.name for family in families()] == list(FAMILIES)
    assert all(family.operators for family in families())


def test_registry_operators_have_several_and_small_samples() -> None:
    for operator in OPERATORS.values():
        assert len(operator.samples) >= 3, operator.name
        assert any(sample.small for sample in operator.samples), operator.name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_registry_backends_are_as_exact_as_eager(name: str, backend: str) -> None:
    operator = OPERATORS[name]
    for dtype in operator.dtypes:
        row = measure(operator, backend, backends_here(operator, "cpu")[backend], dtype, "cpu", operator.samples)
        assert row.passed, row.note


@pytest.mark.parametrize(("name", "sample"), SAMPLES)
def test_registered_operator_agrees_with_its_reference(name: str, sample: str) -> None:
    operator, chosen = sample_of(name, sample)
    row = measure(operator, "as registered", operator.call, operator.dtypes[0], "cpu", [chosen])
    assert row.passed, row.note


@pytest.mark.parametrize(("name", "sample"), SAMPLES)
def test_registered_operator_repeats_bitwise_with_any_threads(name: str, sample: str) -> None:
    operator, chosen = sample_of(name, sample)
    args = chosen.make("cpu", operator.dtypes[0])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(outcome(operator, operator.call, args))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(
            torch.equal(x, y) or (x.isnan() == y.isnan()).all() and torch.equal(x.nan_to_num(), y.nan_to_num())
            for x, y in zip(results[0], other, strict=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sample"), SMALL)
def test_registered_operator_passes_opcheck(name: str, sample: str) -> None:
    operator, chosen = sample_of(name, sample)
    args = chosen.make("cpu", operator.dtypes[0])
    for position in chosen.differentiable:
        args[position].requires_grad_()
    result = torch.library.opcheck(operator.call, args)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("name", OPERATORS)
def test_registered_operator_compiles_without_graph_break(name: str) -> None:
    operator = OPERATORS[name]
    chosen = next(s for s in operator.samples if s.small)
    run = torch.compile(lambda *a: operator.call(*a), fullgraph=True, backend="aot_eager")
    found = outcome(operator, run, chosen.make("cpu", operator.dtypes[0]))
    want = outcome(operator, operator.call, chosen.make("cpu", operator.dtypes[0]))
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_cost_is_positive_for_standard_samples(name: str) -> None:
    operator = OPERATORS[name]
    for sample in operator.samples:
        args = sample.make("cpu", operator.dtypes[0])
        cost = operator.cost(*args)
        assert cost.bytes >= 0 and cost.flops >= 0
        if sample.name.startswith("standard"):
            assert cost.bytes > 0 and cost.flops > 0 and any(True for _ in tensors_of(args))
