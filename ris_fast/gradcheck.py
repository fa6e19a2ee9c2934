"""Proves the gradients of every registered operator in every backend that this machine has: `ris-fast gradcheck`.

A row is an operator in one backend and one dtype: error of value and gradient against the float64 definition beside
the error that plain eager float32 makes, torch.autograd.gradcheck in float64, and whether the autograd graph stays
whole. Sabotaged backwards (sign, conjugate, one missing term) are checked too: those rows pass if they are caught.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.kernels.native import loader
from ris_fast.kernels.registry import Operator, Sample, operators

ROUNDING = {torch.float64: 1e-13, torch.float32: 5e-7, torch.bfloat16: 5e-7}  # error that counts as none: a few roundings
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


def tensors_of(args: Iterable[Any]) -> Iterable[Tensor]:
    """Tensors among arguments or results, lists opened."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors_of(arg)


def _mapped(args: Iterable[Any], change: Callable[[Tensor], Tensor]) -> list[Any]:
    return [change(a) if isinstance(a, Tensor) else [*_mapped(a, change)] if isinstance(a, (list, tuple)) else a for a in args]


def widened(args: Iterable[Any]) -> list[Any]:
    """The same arguments with floating-point tensors in float64, copied."""
    return _mapped(args, lambda t: t.detach().to(torch.float64) if t.is_floating_point() else t.clone())


def _tracked(args: Iterable[Any], positions: tuple[int, ...]) -> list[Any]:
    return [a.detach().clone().requires_grad_() if i in positions else a for i, a in enumerate(args)]


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return () if results is None else (results,) if isinstance(results, Tensor) else tuple(results)


def outcome(operator: Operator, run: Callable[..., Any], args: Iterable[Any]) -> list[Tensor]:
    """What a call is judged by: its leading results, and the arguments that it writes."""
    args = _mapped(args, lambda t: t.detach().clone(memory_format=torch.preserve_format))
    results = _as_tuple(run(*args))[: operator.results]
    return [*results, *tensors_of(args[i] for i in operator.mutates)]


def reference_gradients(operator: Operator, sample: Sample, args: Iterable[Any]) -> list[Tensor]:
    """Gradients of the summed first result, by autograd of the definition in the dtype of args."""
    args = _tracked(args, sample.differentiable)
    first = _as_tuple(operator.reference(*args))[0]
    return list(torch.autograd.grad(first.sum(), [args[i] for i in sample.differentiable]))


def unit_gradients(run: Callable[..., Any], sample: Sample, args: Iterable[Any]) -> list[Tensor]:
    """Gradients as a backend returns them: the results after the first, in the order of the differentiable arguments."""
    return list(_as_tuple(run(*args))[1 : 1 + len(sample.differentiable)])


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error in norm over pairs of tensors; absolute where the expectation is zero; inf for a NaN."""
    worst = 0.0
    for x, y in zip(found, expected, strict=True):
        scale = y.double().norm().item() if y.numel() else 0.0
        error = (x.double() - y.double()).norm().item() / (scale or 1.0) if y.numel() else 0.0
        worst = max(worst, error if error == error else float("inf"))
    return worst


def allowed(operator: Operator, eager: float, dtype: torch.dtype) -> float:
    """The rule: error_ratio times the error of the eager definition, of which a few roundings are always granted."""
    usable = eager if eager < 1e-2 else 0.0  # eager overflows on extreme scales and says nothing there
    return operator.error_ratio * max(usable, ROUNDING[dtype])


def measure(operator: Operator, backend: str, run: Callable[..., Any], dtype: torch.dtype, device: str, samples: Iterable[Sample]) -> Row:
    """Errors of one backend in one dtype over samples, against the float64 definition of the very same inputs."""
    row = Row(operator.name, backend, str(dtype).removeprefix("torch."))
    for sample in samples:
        args = sample.make(device, dtype)
        eager_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        exact, eager = widened(args), _mapped(args, lambda t: t.to(eager_dtype) if t.dtype == dtype else t)
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


def _worse(row: Row, name: str, value: float, value_limit: float, gradient: float, gradient_limit: float) -> Row:
    """The row with one more sample: the errors nearest to (or furthest beyond) their limits are kept."""
    wrong = [f"{name}: {what} error {error:.1e} > {limit:.1e}" for what, error, limit in (("value", value, value_limit), ("gradient", gradient, gradient_limit)) if error > limit]
    ratio = lambda error, limit: error / limit if limit else 0.0  # noqa: E731
    if ratio(value, value_limit) >= ratio(row.value_error, row.value_allowed):
        row = replace(row, value_error=value, value_allowed=value_limit)
    if ratio(gradient, gradient_limit) >= ratio(row.gradient_error, row.gradient_allowed):
        row = replace(row, gradient_error=gradient, gradient_allowed=gradient_limit)
    return replace(row, passed=row.passed and not wrong, note="; ".join([*filter(None, [row.note]), *wrong]))


class _Forced(torch.autograd.Function):
    """Runs one backend and uses the unit gradients that it returns, as the operator's own autograd does."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], positions: tuple[int, ...], *args: Any) -> Tensor:
        value, *units = _as_tuple(run(*args))
        ctx.positions, ctx.count = positions, len(args)
        ctx.save_for_backward(*units[: len(positions)])
        return value

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None] * (2 + ctx.count)
        for position, unit in zip(ctx.positions, ctx.saved_tensors, strict=True):
            out[2 + position] = grad_B.reshape(-1, *[1] * (unit.dim() - 1)) * unit
        return tuple(out)


def numerical(operator: Operator, run: Callable[..., Any] | None, device: str, samples: Iterable[Sample], fast: bool = False) -> str:
    """torch.autograd.gradcheck in float64 through a backend (run), or through the operator as registered (None).

    Returns "pass", or the first sample that failed and why.
    """
    for sample in samples:
        args = _tracked(sample.make(device, torch.float64), sample.differentiable)

        def value(*free: Tensor, args: list[Any] = args, sample: Sample = sample) -> Tensor:
            full = list(args)
            for position, tensor in zip(sample.differentiable, free, strict=True):
                full[position] = tensor
            return _as_tuple(operator.call(*full))[0] if run is None else _Forced.apply(run, sample.differentiable, *full)

        try:
            torch.autograd.gradcheck(value, [args[i] for i in sample.differentiable], fast_mode=fast)
        except RuntimeError as error:  # GradcheckError is one
            return f"{sample.name}: {str(error).strip().splitlines()[0]}"
    return "pass"


def graph_faults(operator: Operator, device: str) -> list[str]:
    """What breaks the autograd graph of the registered operator; empty if nothing does."""
    sample = next(s for s in operator.samples if s.gradcheck)
    args = _tracked(sample.make(device, torch.float32), sample.differentiable)
    inputs = [args[i] for i in sample.differentiable]
    loss = lambda *a: _as_tuple(operator.call(*a))[0]  # noqa: E731
    grads = lambda out, **kw: torch.autograd.grad(out, inputs, **kw)  # noqa: E731
    close = lambda xs, ys: all(torch.allclose(x, y, rtol=1e-5, atol=1e-8) for x, y in zip(xs, ys, strict=True))  # noqa: E731
    base = grads(loss(*args).sum())
    used = loss(*args)
    seen: list[Tensor] = []
    handle = inputs[0].register_hook(seen.append)
    kept = loss(*args).sum()
    once, again = grads(kept, retain_graph=True), grads(kept)
    handle.remove()
    compiled = torch.compile(lambda *a: loss(*a), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        silent = loss(*args)
    parts = [grads(loss(*_rows(args, slice(i, i + 1))).sum(), allow_unused=True) for i in range(len(inputs[0]))]
    summed = [sum(part[k] for part in parts) for k in range(len(inputs))]
    checks = {
        "grad_fn": used.grad_fn is not None and type(used.grad_fn).__name__ != "NotImplemented",
        "a parameter without gradient": all(g is not None and g.abs().sum() > 0 for g in base),
        "output used twice": close(grads(used.sum() + (2 * used).sum()), [3 * g for g in base]),
        "retain_graph": close(once, base) and close(again, base),
        "hook": len(seen) == 2,
        "micro-batches": close(summed, base),
        "no_grad": silent.grad_fn is None and torch.equal(silent, used.detach()),
        "fullgraph": close(grads(compiled(*args).sum()), base),
        "opcheck": not _opcheck(operator, tuple(args)),
    }
    return [name for name, fine in checks.items() if not fine]


def _rows(args: list[Any], rows: slice) -> list[Any]:
    return [a[rows] if isinstance(a, Tensor) else a for a in args]


def _opcheck(operator: Operator, args: tuple[Any, ...]) -> str:
    """Empty, or what torch.library.opcheck complains about."""
    overload = operator.call if isinstance(operator.call, torch._ops.OpOverload) else operator.call.default
    try:
        torch.library.opcheck(overload, args)
    except Exception as error:  # opcheck raises several kinds, among them AssertionError
        return str(error).strip().splitlines()[0]
    return ""


def backends_here(operator: Operator, device: str) -> dict[str, Callable[..., Any]]:
    """Backends of an operator that run on this device in this process, C++ once per instruction set."""
    found = dict(operator.backends)
    triton, cpp = found.pop("triton", None), found.pop("cpp", None)
    if device != "cpu":
        found = {"plain": found["plain"]} if "plain" in found else {}
        return found | ({"triton": triton} if triton else {})
    if cpp and loader.available():
        simd = "simd" in getattr(getattr(cpp, "__code__", None), "co_varnames", ())
        found |= {f"cpp {level}": lambda *a, level=level: cpp(*a, simd=level) for level in loader.supported_levels()} if simd else {f"cpp {loader.level()}": cpp}
    return found


def backend_rows(operator: Operator, backend: str, run: Callable[..., Any], device: str, samples: tuple[Sample, ...], fast: bool = False) -> list[Row]:
    """A row per dtype; the float64 row carries gradcheck (fast: its random-direction form, on the samples named small)."""
    dtypes = (*operator.dtypes, *((torch.bfloat16,) if any(s.differentiable for s in samples) else ()))
    rows = [measure(operator, backend, run, dtype, device, samples) for dtype in dtypes]
    checked = [s for s in samples if s.gradcheck and s.differentiable and (s.name.startswith("small") or not fast)]
    if checked:
        result = numerical(operator, run, device, checked, fast)
        rows = [replace(r, gradcheck=result, passed=r.passed and result == "pass") if r.dtype == "float64" else r for r in rows]
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
        rows.append(Row(operator.name, "as registered", "float64", gradcheck=result, graph=graph, passed=result == "pass" and not faults))
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
        rows.append(replace(row, gradcheck="caught" if caught else "NOT CAUGHT", passed=caught, note="" if caught else "a wrong backward went unnoticed"))
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
        network = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 25 * 6 * 2)).to(device, torch.float64)
    factor = network(inputs).view(4, 25, 6, 2)
    ours = torch.autograd.grad(cov_nmse(factor, target_factor=target), list(network.parameters()), retain_graph=True, allow_unused=True)
    chain = dense_chain(factor, target, None, None, None, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0).mean()
    want = torch.autograd.grad(chain, list(network.parameters()))
    missing = [name for (name, _), g in zip(network.named_parameters(), ours, strict=True) if g is None]
    error = float("inf") if missing else max(relative([x], [y]) for x, y in zip(ours, want, strict=True))
    limit = ROUNDING[torch.float64]
    note = f"no gradient: {', '.join(missing)}" if missing else ""
    return Row("cov_nmse", "whole network", "float64", gradient_error=error, gradient_allowed=limit, graph="-" if missing else "pass", passed=error <= limit, note=note)


def interpreted_rows() -> list[Row]:
    """The Triton bodies under Triton's interpreter on the CPU, in a process of their own (it must be chosen before import)."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "ris_fast.gradcheck"], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [Row("every", "triton (interpreter)", "float64", passed=False, note=f"the interpreter process failed: {last}")]
    return [Row(**row) for row in json.loads(done.stdout)]


def _interpreter_worker() -> list[Row]:
    rows = []
    for operator in operators():
        samples = tuple(s for s in operator.samples if s.small)
        if "triton" in operator.backends and samples:
            here = replace(operator, dtypes=tuple(d for d in operator.dtypes if d != torch.bfloat16))
            rows += [r for r in backend_rows(here, "triton (interpreter)", operator.backends["triton"], "cpu", samples, fast=True) if r.dtype != "bfloat16"]
    return rows


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def run_gradcheck(device: str | torch.device | None = None, interpreter: bool = True) -> list[Row]:
    """All rows for this machine; the verdict is all(row.passed for row in rows).

    Args:
        device: "cpu" or "cuda[:i]"; the GPU where there is one by default.
        interpreter: also run the Triton bodies under Triton's interpreter (half a minute; needs triton).
    """
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[Row] = []
    for operator in operators():
        rows += operator_rows(operator, device)
        if any(s.differentiable for s in operator.samples):
            rows += sabotage_rows(operator, device)
    rows.append(network_row(device))
    if interpreter and _has_triton():
        rows += interpreted_rows()
    return rows


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in _interpreter_worker()]))
