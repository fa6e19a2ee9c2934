"""What a gradient is held against: the float64 definition by the rule, torch's numerical Jacobian, and a whole
graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ris_fast.kernels.registry import Operator, Sample

ROUNDING = {
    torch.float64: 1e-13,
    torch.float32: 5e-7,
    torch.bfloat16: 5e-7,
}  # error that counts as none: a few roundings


def tensors_of(args: Iterable[Any]) -> Iterable[Tensor]:
    """Tensors among arguments or results, lists opened."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors_of(arg)


def mapped(args: Iterable[Any], change: Callable[[Tensor], Tensor]) -> list[Any]:
    """The same arguments with every tensor changed, lists opened."""
    return [
        change(a) if isinstance(a, Tensor) else [*mapped(a, change)] if isinstance(a, (list, tuple)) else a
        for a in args
    ]


def widened(args: Iterable[Any]) -> list[Any]:
    """The same arguments with floating-point tensors in float64, copied."""
    return mapped(args, lambda t: t.detach().to(torch.float64) if t.is_floating_point() else t.clone())


def _tracked(args: Iterable[Any], positions: tuple[int, ...]) -> list[Any]:
    return [a.detach().clone().requires_grad_() if i in positions else a for i, a in enumerate(args)]


def as_tuple(results: Any) -> tuple[Any, ...]:
    return () if results is None else (results,) if isinstance(results, Tensor) else tuple(results)


def outcome(operator: Operator, run: Callable[..., Any], args: Iterable[Any]) -> list[Tensor]:
    """What a call is judged by: its leading results, and the arguments that it writes."""
    args = mapped(args, lambda t: t.detach().clone(memory_format=torch.preserve_format))
    results = as_tuple(run(*args))[: operator.results]
    return [*results, *tensors_of(args[i] for i in operator.mutates)]


def reference_gradients(operator: Operator, sample: Sample, args: Iterable[Any]) -> list[Tensor]:
    """Gradients of the summed first result, by autograd of the definition in the dtype of args."""
    args = _tracked(args, sample.differentiable)
    first = as_tuple(operator.reference(*args))[0]
    return list(torch.autograd.grad(first.sum(), [args[i] for i in sample.differentiable]))


def unit_gradients(run: Callable[..., Any], sample: Sample, args: Iterable[Any]) -> list[Tensor]:
    """Gradients as a backend returns them: the results after the first, in the order of the differentiable
    arguments."""
    return list(as_tuple(run(*args))[1 : 1 + len(sample.differentiable)])


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


class _Forced(torch.autograd.Function):
    """Runs one backend and uses the unit gradients that it returns, as the operator's own autograd does."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], positions: tuple[int, ...], *args: Any) -> Tensor:
        value, *units = as_tuple(run(*args))
        ctx.positions, ctx.count = positions, len(args)
        ctx.save_for_backward(*units[: len(positions)])
        return value

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None] * (2 + ctx.count)
        for position, unit in zip(ctx.positions, ctx.saved_tensors, strict=True):
            out[2 + position] = grad_B.reshape(-1, *[1] * (unit.dim() - 1)) * unit
        return tuple(out)


def numerical(
    operator: Operator, run: Callable[..., Any] | None, device: str, samples: Iterable[Sample], fast: bool = False
) -> str:
    """torch.autograd.gradcheck in float64 through a backend (run), or through the operator as registered (None).

    Returns "pass", or the first sample that failed and why.
    """
    for sample in samples:
        args = _tracked(sample.make(device, torch.float64), sample.differentiable)

        def value(*free: Tensor, args: list[Any] = args, sample: Sample = sample) -> Tensor:
            full = list(args)
            for position, tensor in zip(sample.differentiable, free, strict=True):
                full[position] = tensor
            return (
                as_tuple(operator.call(*full))[0] if run is None else _Forced.apply(run, sample.differentiable, *full)
            )

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
    loss = lambda *a: as_tuple(operator.call(*a))[0]  # noqa: E731
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
    try:
        torch.library.opcheck(operator.call, args)
    except Exception as error:  # opcheck raises several kinds, among them AssertionError
        return str(error).strip().splitlines()[0]
    return ""
