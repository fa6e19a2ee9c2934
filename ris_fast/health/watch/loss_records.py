"""What the rules of `watch` read of losses, told or met, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass
class Numbers:
    """Of outputs or targets. Numbers stay on their device until `on_host`.

    Args: whole: classes or counts; least, most: (), of real and imaginary parts; imaginary: (), largest imaginary part;
        nonfinite: (2,), whether there are NaN, infinities; few: (R, F) a few numbers; keys: a
        few of more rows, by which scenes are known again; viewed, matrices, plane:
        see `tensors`.
    """

    shape: tuple[int, ...]
    whole: bool
    complex: bool
    least: Tensor
    most: Tensor
    imaginary: Tensor
    nonfinite: Tensor | None
    few: Tensor | None
    keys: Tensor | None = None
    viewed: str = ""
    matrices: Tensor | None = None
    plane: Tensor | None = None

    def on_host(self) -> Numbers:
        return replace(self, **{name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)})


@dataclass
class LossSigns:
    """Of one loss. Numbers stay on their device until `on_host`.

    Args: looked: these are known; unlogged: a loss that expects logarithms and the operation that gives it something
        else; most_logged: (), the largest number that it was given; asked: (2,), least and most of the targets of a
        binary cross-entropy; pull: (), from -1 to 1, how well a small step against the gradient at the outputs brings
        them nearer to the targets; easiest: (3,), share of the numbers with a gradient, and how far these are from
        their targets at most, and others at least.
    """

    looked: bool = False
    unlogged: tuple[str, ...] = ()
    most_logged: Tensor | None = None
    asked: Tensor | None = None
    pull: Tensor | None = None
    easiest: Tensor | None = None

    def on_host(self) -> LossSigns:
        return replace(self, **{name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)})


@dataclass
class LossRecord:
    """One loss that `seen.loss` was given in training.

    Args: step: made before it by the watched optimizers, all together; tensor: it is one; made_anew: it requires a
        gradient and has no history; chain, chain_shapes: operations from the root on while each has one operand with a
        gradient, and shapes of what they give; direct: the chain ends at the operation that made the outputs; behind:
        the chain from there on; of_model: it depends on the model's parameters, None where that was not looked at;
        twice: a softmax or sigmoid that is applied to another, both names; value: (), its mean; rows: (B,) scenes with
        a gradient at the first output; over_scenes: see `operations`; factors: () numbers that terms are multiplied
        by; summed: a sum over scenes is added to a mean over them; ungraphed: a number without a gradient is added;
        number: of the model's last pass; signs: see there; through: the chain of the one term that depends on outputs;
        of_weights: another depends on the model's parameters alone; transposed: see `operations`; surrogate, extremes,
        pairing, axis_apart, chooses: see `terms`; compares_weights: in that other term they are compared with what has
        no gradient; of_inputs: one depends on the model's inputs alone; still: of differences that it is made of, of
        weights alone where nobody told of the loss, whether they are exactly zero.
    """

    step: int
    tensor: bool
    requires_grad: bool
    made_anew: bool
    chain: list[str]
    chain_shapes: list[tuple[int, ...]]
    direct: bool
    behind: list[str]
    outputs_require_grad: bool
    outputs: Numbers | None
    targets: Numbers | None
    value: Tensor | None
    of_model: bool | None = None
    twice: tuple[str, ...] = ()
    rows: Tensor | None = None
    over_scenes: list[str] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    summed: bool = False
    ungraphed: bool = False
    number: int = 0
    signs: LossSigns = field(default_factory=LossSigns)
    through: list[str] = field(default_factory=list)
    of_weights: bool = False
    transposed: list[str] = field(default_factory=list)
    surrogate: int = 0
    still: list[Tensor] = field(default_factory=list)
    compares_weights: bool = False
    of_inputs: bool = False
    extremes: bool = False
    pairing: str = ""
    axis_apart: str = ""
    chooses: bool = False

    def on_host(self) -> LossRecord:
        host: dict[str, Any] = {name: [each.cpu() for each in getattr(self, name)] for name in ("factors", "still")}
        host |= {name: each.cpu() for name, each in vars(self).items() if isinstance(each, Tensor)}
        host |= {name: each.on_host() for name, each in vars(self).items() if isinstance(each, (Numbers, LossSigns))}
        return replace(self, **host)
