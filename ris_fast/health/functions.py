"""A user's own torch.autograd.Function: is its backward the derivative of its forward?

In one pass the inputs of a few calls are kept, and the function is called again on copies of them, moved a little to
both sides. Random numbers are put back. Functions that communicate, or whose inputs are not plain numbers, are left
alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CALLS, NUMBERS, DIRECTIONS = 2, 2**18, 4
TOLERANCE = 0.02
STEP, STEPPED = 1e-4, 0.05  # of the numbers that a step of their own size changes, a small step changes fewer
FORMATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class FunctionCheck:
    """(D,) derivatives along random directions: by differences of the forward, and by the backward; whether a backward
    that is none of the forward is meant: see `_is_substitute`."""

    name: str
    by_forward: list[float]
    by_backward: list[float]
    substitute: bool

    @property
    def wrong(self) -> bool:
        """Whether the two are apart."""
        forward, backward = torch.tensor([self.by_forward, self.by_backward], dtype=torch.float64)
        return float((forward - backward).norm()) > TOLERANCE * float(forward.norm())


class FunctionChecks:
    """Checks of the functions that were met in earlier passes."""

    def __init__(self) -> None:
        self.checked: set[type] = set()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.wrapped: list[tuple[Any, Any]] = []  # functions, and what stood as their forward
        self.found: list[FunctionCheck] = []

    def begin(self, functions: Iterable[Any]) -> None:
        """Before a pass: keeps what these are called with."""
        self.finish(check=False)
        alone = not (dist.is_available() and dist.is_initialized())
        for function in functions:
            if alone and function not in self.checked and "apply" not in vars(function):
                self.checked.add(function)
                self.wrapped.append((function, vars(function).get("forward")))
                function.forward = staticmethod(self._wrapper(function))

    def _wrapper(self, function: Any) -> Any:
        """In the place of `forward`: `apply` may have been taken from the class before."""
        whole, without = function.forward, int(function.setup_context is torch.autograd.Function.setup_context)

        def forward(*args: Any) -> Any:
            plain = args[without:]  # of its ctx
            if sum(each is function for each, _ in self.calls) < CALLS and _is_plain_call(plain):
                kept = tuple(each.detach().clone() if isinstance(each, Tensor) else each for each in plain)
                self.calls.append((function, kept))
            return whole(*args)

        return forward

    def finish(self, check: bool = True) -> None:
        """After it: takes the wrappers away, and checks."""
        for function, forward in self.wrapped:
            if forward is None:
                del function.forward  # which is that of its base again
            else:
                function.forward = forward
        calls, self.wrapped, self.calls = self.calls if check else [], [], []
        for function, args in calls:
            with torch.random.fork_rng(), torch.enable_grad():
                try:
                    found = check_function(function, args)
                except Exception:  # of the user's code, which need not take other numbers
                    found = None
            if found is not None:
                self.found.append(found)


def _is_plain_call(args: tuple[Any, ...]) -> bool:
    tensors = [each for each in args if isinstance(each, Tensor)]
    others = [each for each in args if not isinstance(each, Tensor)]
    real = [each for each in tensors if each.requires_grad]
    return (
        bool(real)
        and all(type(each) in (Tensor, torch.nn.Parameter) and each.numel() <= NUMBERS for each in tensors)
        and all(each.dtype in FORMATS for each in tensors if each.is_floating_point() or each.is_complex())
        and all(each.requires_grad <= each.is_floating_point() for each in tensors)
        and all(each is None or isinstance(each, (bool, int, float, str, tuple, torch.Size)) for each in others)
    )


def _is_substitute(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether a backward that is no derivative is meant: the forward goes in steps, as a spike or a rounding does, or
    it gives on what it is given, and the backward keeps the sign of each number, as one that clips does."""
    given = [each.detach().double() if _is_real(each) else each for each in args]
    (number, first), *others = [(n, each) for n, each in enumerate(given) if _is_real(each)]
    leaf = first.clone().requires_grad_()

    def called(value: Tensor) -> Any:
        return function.apply(*given[:number], value, *given[number + 1 :])

    made = called(leaf)
    if not isinstance(made, Tensor) or not made.requires_grad:
        return False
    generator = torch.Generator(device="cpu").manual_seed(1)
    along, arriving = (torch.randn(each.shape, generator=generator).to(each) for each in (first, made))
    if not others and torch.equal(made, first):
        (left,) = torch.autograd.grad(made, leaf, arriving)
        return bool((left * arriving >= 0).all())
    size = float(first.abs().mean()) or 1.0
    with torch.no_grad():
        near, far = (float((called(first + step * size * along) != made).double().mean()) for step in (STEP, 1.0))
    return near < STEPPED * far


def _is_real(each: Any) -> bool:
    return isinstance(each, Tensor) and each.is_floating_point()


def check_function(function: Any, args: tuple[Any, ...]) -> FunctionCheck | None:
    """Derivatives of a call along random directions, in float64; None where it is not a function of its numbers."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def leaves(shift: float = 0.0, along: dict[int, Tensor] | None = None) -> list[Any]:
        made = []
        for number, each in enumerate(args):
            if _is_real(each):
                value = each.double()
                made.append(value + shift * along[number] if along else value.clone().requires_grad_())
            else:
                made.append(each.clone() if isinstance(each, Tensor) else each)
        return made

    def outputs(given: list[Any]) -> list[Tensor]:
        made = function.apply(*given)
        made = list(made) if isinstance(made, (tuple, list)) else [made]
        return [each for each in made if _is_real(each)]

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    given = leaves()
    real = [each for each in given if isinstance(each, Tensor) and each.requires_grad]
    made = [each for each in outputs(given) if each.requires_grad]
    again = [each for each in outputs(leaves()) if each.requires_grad]
    if not made or not all(torch.equal(one, other) for one, other in zip(made, again)):
        return None
    by_forward, by_backward = [], []
    for _ in range(DIRECTIONS):
        along = {n: drawn(each) for n, each in enumerate(given) if isinstance(each, Tensor) and each.requires_grad}
        size = max(float(each.detach().abs().mean()) for each in real) or 1.0
        weights = [drawn(each) for each in made]
        sides = []
        for shift in (STEP * size, -STEP * size):
            with torch.no_grad():
                sides.append(sum(float((w * y).sum()) for w, y in zip(weights, outputs(leaves(shift, along)))))
        gradients = torch.autograd.grad(made, real, weights, retain_graph=True, allow_unused=True)
        pairs = zip(along.values(), gradients)
        by_forward.append((sides[0] - sides[1]) / (2 * STEP * size))
        by_backward.append(sum(float((move * gradient).sum()) for move, gradient in pairs if gradient is not None))
    if not all(map(math.isfinite, by_forward + by_backward)):
        return None
    return FunctionCheck(function.__name__, by_forward, by_backward, _is_substitute(function, args))
