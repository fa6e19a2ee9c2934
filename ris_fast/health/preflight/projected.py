"""The network under the loss's own gradient, held fixed: a function of the weights that is as smooth as the network.

Model: s(w) = sum_k <c_k, out_k(w)>, c_k the loss's gradient at output k for the weights as they are. There s has the
    loss's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from ris_fast.health.preflight.autograd import StoppedValues
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.finite_difference import Along
from ris_fast.health.preflight.measures import rms
from ris_fast.health.preflight.probe import PreflightContext

NOISE = 2e-6  # of a loss of order one in float32
STEPS = (1e-2, 1e-3)
DIRECTIONS = 3  # along one the derivative may happen to be next to nothing; two that agree are enough
PIECES, LENGTHS = 8, (1e-3, 1e-4)  # of a line, between jumps
FEW = 4  # scenes: an error that few have is a larger share of these, and it costs a pass each


def says_something(gradient: Tensor) -> bool:
    """It is neither zero nor not finite, which other checks have names for."""
    return bool(gradient.any()) and bool(gradient.isfinite().all())


def projection(
    context: PreflightContext, held: StoppedValues | None = None, *, by_loss: bool = False
) -> tuple[ProjectedOutputs, dict[str, Tensor]] | None:
    """s(w) of `parts`, and its gradient by autograd at each tensor that it reaches; None where there is none."""
    live = context.trainable
    total, _, prediction = context.run(context.scenes[:FEW])
    outputs = {name: value for name, value in prediction._asdict().items() if value is not None and value.requires_grad}
    if not live or not outputs or not total.requires_grad or not bool(total.isfinite()):
        return None
    cotangents = dict(zip(outputs, derivatives(total, list(outputs.values()), retain_graph=True)))
    cotangents = {
        name: cotangent for name, cotangent in cotangents.items() if cotangent is not None and says_something(cotangent)
    }
    if not cotangents:
        return None
    found = derivatives([outputs[name] for name in cotangents], list(live.values()), list(cotangents.values()))
    gradients = {
        name: gradient
        for name, gradient in zip(live, found)
        if gradient is not None and bool(gradient.isfinite().all())
    }
    return (LossItself if by_loss else ProjectedOutputs)(context, cotangents, held), gradients


class ProjectedOutputs:
    """The network's outputs around the weights as they are, each times the loss's gradient at it."""

    noise = NOISE

    def __init__(self, context: PreflightContext, cotangents: dict[str, Tensor], held: StoppedValues | None) -> None:
        self.context, self.cotangents, self.held = context, cotangents, held
        self.here = self._outputs()

    def _outputs(self) -> list[Tensor]:
        """In float64, with the random numbers of `PreflightContext.run`, and with gradients on: without them a network
        may behave differently."""
        self.context.rewind()
        with self.held or nullcontext():
            prediction = self.context.step.predict(self.context.scenes[:FEW])
        return [getattr(prediction, name).detach().double() for name in self.cotangents]

    def change(self, tensors: list[Tensor], directions: list[Tensor]) -> float:
        """The largest relative change of an output when weights go the whole way along directions."""
        with self.context.moved(tensors, directions, 1.0):
            now = self._outputs()
        return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(now, self.here))

    def line(self, tensors: list[Tensor], gradients: list[Tensor], directions: list[Tensor]) -> Along:
        """Along one direction of some weights. Its rounding is that of the outputs that change at all, or where a
        change is too small to show, of all."""

        @cache
        def gone(step: float) -> list[Tensor]:
            with self.context.moved(tensors, directions, step):
                return [
                    (now - value) * cotangent
                    for now, value, cotangent in zip(self._outputs(), self.here, self.cotangents.values())
                ]

        there = [
            (bool(way.any()), float((value * cotangent).square().sum()))
            for way, value, cotangent in zip(gone(STEPS[0]), self.here, self.cotangents.values())
        ]
        size = sum(own for moves, own in there if moves) or sum(own for _, own in there)
        return (
            float(sum((g * d).sum() for g, d in zip(gradients, directions))),
            lambda step: float(sum(way.sum() for way in gone(step))) if step else 0.0,
            self.noise * math.sqrt(size),
        )

    def between_jumps(self, tensors: list[Tensor], directions: list[Tensor], length: float) -> float:
        """The slope along one direction, scene by scene the median over pieces of this length: a piece in which a
        scene's outputs jump, as where another number becomes one of the largest k, does not say how they move."""
        ways = []
        for piece in range(-PIECES // 2, PIECES // 2 + 1):
            with self.context.moved(tensors, directions, piece * length):
                ways.append(
                    sum(
                        ((now - value) * cotangent).flatten(1).sum(1)
                        for now, value, cotangent in zip(self._outputs(), self.here, self.cotangents.values())
                    )
                )
        return float(torch.stack(ways).diff(dim=0).median(0).values.sum()) / length


class LossItself(ProjectedOutputs):
    """The loss in the place of the outputs."""

    noise = 0.0

    def __init__(self, context: PreflightContext, cotangents: dict[str, Tensor], held: StoppedValues | None) -> None:
        self.scenes = context.scenes[:FEW].double()
        super().__init__(context, {"loss": torch.ones((), dtype=torch.float64)}, held)

    def _outputs(self) -> list[Tensor]:
        prediction = self.context.predict(self.context.scenes[:FEW])
        with torch.no_grad():
            return [self.context.loss(prediction.apply(Tensor.double), self.scenes)[0].double()]


def lines(
    projected: ProjectedOutputs, tensors: list[Tensor], gradients: list[Tensor], generator: torch.Generator
) -> Iterator[Along]:
    """Some weights along random directions, each as large as they are."""
    for directions in random_directions(tensors, generator):
        yield projected.line(tensors, gradients, directions)


def random_directions(tensors: list[Tensor], generator: torch.Generator) -> Iterator[list[Tensor]]:
    """Each as large as the weights are."""
    sizes = [rms(tensor) for tensor in tensors]
    first = min([0.02, *filter(None, sizes)])  # of a tensor that starts at zero
    for _ in range(DIRECTIONS):
        yield [
            torch.randn(tensor.shape, generator=generator).to(tensor) * (size or first)
            for tensor, size in zip(tensors, sizes)
        ]
