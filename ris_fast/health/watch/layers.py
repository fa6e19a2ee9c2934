"""What the layers of a model are given and give in its first passes, which of them go on from a detached output of
another, and what recomputation makes of them.

Numbers stay on their device until the report.

Legend: R rows, a few scenes; F numbers of each.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.health.watch.eager import eager_hook
from ris_fast.health.watch.tensors import few_rows, is_plain, tensors_of

CALLS, CUTS, AGAIN = 1024, 256, 128  # that are kept


@dataclass
class LayerCall:
    """One call of a layer without parts.

    Args: given, gives: (6,) least, most, spread of all numbers, mean spread between rows, and mean square of a few
        numbers of its first input and output, and how many are not finite; until the first report those numbers, (R,
        F); whole: inputs are whole numbers; one_axis: the input has one axis; rows: of the input; with_grad: it
        requires a gradient; enabled: gradients are; training: the layer's mode; leaf: a derivative of the input is
        asked for, and nothing has made it.
    """

    name: str
    given: Tensor | None
    gives: Tensor | None
    whole: bool
    one_axis: bool
    rows: int
    with_grad: bool
    enabled: bool
    training: bool
    leaf: bool = False


@dataclass
class Cut:
    """A layer is given what another has made, detached. `reached`: a backward pass comes to what was made."""

    before: str
    after: str
    step: int
    reached: bool = False


@dataclass(frozen=True)
class Recomputed:
    """A layer's call within a backward pass against that in the forward pass: distances of inputs and outputs."""

    name: str
    given: float
    gives: float


@dataclass
class LayersRecord:
    """`kinds`: classes of the layers by name."""

    calls: dict[str, list[LayerCall]] = field(default_factory=dict)
    kinds: dict[str, nn.Module] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    recomputed: list[Recomputed] = field(default_factory=list)


class Layers:
    """Calls of layers, pass by pass."""

    def __init__(self) -> None:
        self.calls: dict[str, list[LayerCall]] = defaultdict(list)
        self.modules: dict[str, nn.Module] = {}
        self.count = 0
        self.cuts: list[Cut] = []
        self.made: dict[int, tuple[str, Tensor]] = {}  # by place in memory, in this pass
        self.samples: dict[str, list[tuple[Tensor | None, Tensor | None]]] = defaultdict(list)  # of this pass
        self.again: list[tuple[str, Tensor, Tensor]] = []

    def begin(self) -> None:
        """Before a pass."""
        self.made.clear()
        self.samples.clear()

    def note(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any, step: int, grad: bool) -> None:
        """One call in a forward pass; `grad`: with gradients enabled."""
        if module._modules or self.count >= CALLS:
            return
        given, gives = tensors_of(args, 2), tensors_of(output, 2)
        if not given or not gives or not (is_plain(given[0]) and is_plain(gives[0])):
            return
        self.count += 1
        self.modules[name] = module
        some = few_rows(given[:1]), few_rows(gives[:1])
        self.calls[name].append(
            LayerCall(
                name,
                *some,
                not given[0].is_floating_point() and not given[0].is_complex(),
                given[0].ndim == 1,
                given[0].shape[0] if given[0].ndim else 0,
                given[0].requires_grad,
                torch.is_grad_enabled(),
                module.training,
                given[0].requires_grad and given[0].is_leaf and type(given[0]) is Tensor,
            )
        )
        if grad:
            self.samples[name].append(some)
            self._note_cuts(name, given, gives, step)

    def _note_cuts(self, name: str, given: list[Tensor], gives: list[Tensor], step: int) -> None:
        for each in given:
            before = self.made.get(each.data_ptr()) if not each.requires_grad and each.is_floating_point() else None
            if before is not None and before[1].shape == each.shape and len(self.cuts) < CUTS:
                cut = Cut(before[0], name, step)
                self.cuts.append(cut)
                before[1].register_hook(eager_hook(_marker(cut)))
        self.made |= {each.data_ptr(): (name, each) for each in gives if each.requires_grad}

    @torch.no_grad()
    def note_again(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        """One call within a backward pass, of a layer that was called once in the forward pass."""
        before = self.samples.get(name, [])
        given, gives = tensors_of(args, 2), tensors_of(output, 2)
        if len(before) != 1 or len(self.again) >= AGAIN or not given or not gives:
            return
        now = few_rows(given[:1]), few_rows(gives[:1])
        distances = [_distance(one, other) for one, other in zip(before[0], now)]
        if distances[0] is not None and distances[1] is not None:
            self.again.append((name, distances[0], distances[1]))

    def record(self) -> LayersRecord:
        """All that was seen. Reads the device."""
        for each in chain.from_iterable(self.calls.values()):
            each.given, each.gives = _summary(each.given), _summary(each.gives)
        again = [Recomputed(name, float(given), float(gives)) for name, given, gives in self.again]
        return LayersRecord(dict(self.calls), dict(self.modules), list(self.cuts), again)


def _marker(cut: Cut) -> Any:
    def reached(_: Tensor) -> None:
        cut.reached = True

    return reached


def _summary(some: Tensor | None) -> Tensor | None:
    """(6,) of (R, F); as it is where it has been made."""
    if some is None or some.ndim == 1:
        return some
    some = some.cpu()
    between = some.std(0, correction=0).mean() if len(some) > 1 else some.new_zeros(())
    least, most = some.aminmax()
    return torch.stack(
        [least, most, some.std(correction=0), between, some.square().mean(), (~some.isfinite()).float().sum()]
    )


def _distance(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """(), relative."""
    if one is None or other is None or one.shape != other.shape:
        return None
    return (one - other).norm() / one.norm().clamp_min(1e-12)
