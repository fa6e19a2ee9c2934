"""Rows of the table: each operator in each backend and dtype, wrong backwards that must be caught, and a whole
network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.gradcheck.criteria import (
    ROUNDING,
    allowed,
    graph_faults,
    mapped,
    numerical,
    outcome,
    reference_gradients,
    relative,
    unit_gradients,
    widened,
)
from ris_fast.kernels.native import loader
from ris_fast.kernels.registry import Operator, Sample, operators

WRONG = ("wrong sign", "conjugate", "missing term")


@dataclass(frozen=True)
class Row:
    """One line of the table; errors are relative norms, the worst over samples, with the eager error beside them.

    gradcheck and graph are "pass", "-" (does not apply) or what failed; passed is the verdict.
    """

    operator: str
    backend: str
    dtype: str
    value_error: float = 0.0
    value_allowed: float = 0.0
    gradient_error: float = 0.0
    gradient_allowed: float = 0.0
    gradcheck: str = "-"
    graph: str = "-"
    passed: bool = True
    note: str = ""


def measure(
    operator: Operator,
    backend: str,
    run: Callable[..., Any],
    dtype: torch.dtype,
    device: str,
    samples: Iterable[Sample],
) -> Row:
    """Errors of one backend in one dtype over samples, against the float64 definition of the very same inputs."""
    row = Row(operator.name, backend, str(dtype).removeprefix("torch."))
    for sample in samples:
        args = sample.make(device, dtype)
        eager_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        exact, eager = widened(args), mapped(args, partial(_cast, dtype, eager_dtype))
        want = outcome(operator, operator.reference, exact)
        value = relative(outcome(operator, run, args), want)
        value_limit = allowed(operator, relative(outcome(operator, operator.reference, eager), want), dtype)
        gradient = gradient_limit = 0.0
        if sample.differentiable:
            want = reference_gradients(operator, sample, exact)
            gradient = relative(unit_gradients(run, sample, args), want)
            gradient_limit = allowed(operator, relative(reference_gradients(operator, sample, eager), want), dtype)
        row = _worse(row, sample.name, value, value_limit, gradient, gradient_limit)
    return row


def _cast(dtype: torch.dtype, to: torch.dtype, t: Tensor) -> Tensor:
    """Tensors of one dtype in another; the rest as they are."""
    return t.to(to) if t.dtype == dtype else t


def _worse(row: Row, name: str, value: float, value_limit: float, gradient: float, gradient_limit: float) -> Row:
    """The row with one more sample: the errors nearest to (or furthest beyond) their limits are kept."""
    wrong = [
        f"{name}: {what} error {error:.1e} > {limit:.1e}"
        for what, error, limit in (("value", value, value_limit), ("gradient", gradient, gradient_limit))
        if error > limit
    ]
    ratio = lambda error, limit: error / limit if limit else 0.0  # noqa: E731
    if ratio(value, value_limit) >= ratio(row.value_error, row.value_allowed):
        row = replace(row, value_error=value, value_allowed=value_limit)
    if ratio(gradient, gradient_limit) >= ratio(row.gradient_error, row.gradient_allowed):
        row = replace(row, gradient_error=gradient, gradient_allowed=gradient_limit)
    return replace(row, passed=row.passed and not wrong, note="; ".join([*filter(None, [row.note]), *wrong]))


def backends_here(operator: Operator, device: str) -> dict[str, Callable[..., Any]]:
    """Backends of an operator that run on this device in this process, C++ once per instruction set."""
    found = dict(operator.backends)
    triton, cpp = found.pop("triton", None), found.pop("cpp", None)
    if device != "cpu":
        found = {"plain": found["plain"]} if "plain" in found else {}
        return found | ({"triton": triton} if triton else {})
    if cpp and loader.available():
        simd = "simd" in getattr(getattr(cpp, "__code__", None), "co_varnames", ())
        found |= (
            {f"cpp {level}": lambda *a, level=level: cpp(*a, simd=level) for level in loader.supported_levels()}
            if simd
            else {f"cpp {loader.level()}": cpp}
        )
    return found


def backend_rows(
    operator: Operator,
    backend: str,
    run: Callable[..., Any],
    device: str,
    samples: tuple[Sample, ...],
    fast: bool = False,
) -> list[Row]:
    """A row per dtype; the float64 row carries gradcheck (fast: its random-direction form, on the samples named
    small)."""
    dtypes = (*operator.dtypes, *((torch.bfloat16,) if any(s.differentiable for s in samples) else ()))
    rows = [measure(operator, backend, run, dtype, device, samples) for dtype in dtypes]
    checked = [s for s in samples if s.gradcheck and s.differentiable and (s.name.startswith("small") or not fast)]
    if checked:
        result = numerical(operator, run, device, checked, fast)
        rows = [
            replace(r, gradcheck=result, passed=r.passed and result == "pass") if r.dtype == "float64" else r
            for r in rows
        ]
    return rows


def operator_rows(operator: Operator, device: str) -> list[Row]:
    """The definition itself, every backend of this process, and the operator as users reach it."""
    rows: list[Row] = []
    checked = [s for s in operator.samples if s.gradcheck]
    if checked:
        through = replace(operator, call=operator.reference)
        result = numerical(through, None, device, checked)
        rows.append(Row(operator.name, "reference", "float64", gradcheck=result, passed=result == "pass"))
    for name, run in backends_here(operator, device).items():
        rows += backend_rows(operator, name, run, device, operator.samples)
    if checked:
        result, faults = numerical(operator, None, device, checked), graph_faults(operator, device)
        graph = ", ".join(faults) or "pass"
        rows.append(
            Row(
                operator.name,
                "as registered",
                "float64",
                gradcheck=result,
                graph=graph,
                passed=result == "pass" and not faults,
            )
        )
    return rows


def sabotaged(operator: Operator, run: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """The backend with a wrong first gradient: opposite sign, conjugate, or the normalisation term left out."""

    def wrong(*args: Any) -> tuple[Any, ...]:
        value, unit, *rest = run(*args)
        if kind == "wrong sign":
            return value, -unit, *rest
        if kind == "conjugate":
            return value, unit * unit.new_tensor([1.0, -1.0]), *rest
        return value, _without_normalisation(args[0], args[1]), *rest

    return wrong


def _without_normalisation(factor: Tensor, target_factor: Tensor) -> Tensor:
    """4 a D F / |T|^2: the gradient of the plain objective without - (tr(F^H D F)/|F|^2) F."""
    from ris_fast.kernels.cov_nmse.reference import covariance

    pred, target = covariance(factor), covariance(target_factor)
    scale = 4 * factor.shape[1] / factor.square().sum((1, 2, 3)) / target.abs().square().sum((1, 2))
    return torch.view_as_real(scale[:, None, None] * ((pred - target) @ torch.view_as_complex(factor)))


def sabotage_rows(operator: Operator, device: str) -> list[Row]:
    """Tests of the tests: each wrong backward must fail both the comparison and gradcheck."""
    name, run = list(backends_here(operator, device).items())[-1]
    samples = tuple(s for s in operator.samples if s.gradcheck)[:1]  # the plain objective with a low-rank target
    rows = []
    for kind in WRONG:
        wrong = sabotaged(operator, run, kind)
        row = measure(operator, f"{kind} ({name})", wrong, torch.float64, device, samples)
        caught = not row.passed and numerical(operator, wrong, device, samples) != "pass"
        rows.append(
            replace(
                row,
                gradcheck="caught" if caught else "NOT CAUGHT",
                passed=caught,
                note="" if caught else "a wrong backward went unnoticed",
            )
        )
    return rows


def network_row(device: str) -> Row:
    """Every parameter's gradient of a network under cov_nmse, against autograd of the dense chain, in float64."""
    from ris_fast.kernels.cov_nmse.op import cov_nmse
    from ris_fast.kernels.cov_nmse.reference import cov_nmse as dense_chain

    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)  # noqa: E731
    inputs, target = draw(4, 24), draw(4, 25, 3, 2)
    torch_state = torch.random.fork_rng(devices=[])
    with torch_state:
        torch.manual_seed(7)
        network = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 25 * 6 * 2)).to(
            device, torch.float64
        )
    factor = network(inputs).view(4, 25, 6, 2)
    ours = torch.autograd.grad(
        cov_nmse(factor, target_factor=target), list(network.parameters()), retain_graph=True, allow_unused=True
    )
    chain = dense_chain(factor, target, None, None, None, 0.0, 0.0, 0.0, 0.0).mean()
    want = torch.autograd.grad(chain, list(network.parameters()))
    missing = [name for (name, _), g in zip(network.named_parameters(), ours, strict=True) if g is None]
    error = float("inf") if missing else max(relative([x], [y]) for x, y in zip(ours, want, strict=True))
    limit = ROUNDING[torch.float64]
    note = f"no gradient: {', '.join(missing)}" if missing else ""
    return Row(
        "cov_nmse",
        "whole network",
        "float64",
        gradient_error=error,
        gradient_allowed=limit,
        graph="-" if missing else "pass",
        passed=error <= limit,
        note=note,
    )


def triton_rows() -> list[Row]:
    """The Triton bodies on their small samples; for a process in which Triton's interpreter was chosen."""
    rows = []
    for operator in operators():
        samples = tuple(s for s in operator.samples if s.small)
        if "triton" in operator.backends and samples:
            here = replace(operator, dtypes=tuple(d for d in operator.dtypes if d != torch.bfloat16))
            rows += [
                r
                for r in backend_rows(
                    here, "triton (interpreter)", operator.backends["triton"], "cpu", samples, fast=True
                )
                if r.dtype != "bfloat16"
            ]
    return rows
