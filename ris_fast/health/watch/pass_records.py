"""What the rules of `watch` read of forward passes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ris_fast.health.functions import FunctionCheck
    from ris_fast.health.watch.copies import CopyRecord
    from ris_fast.health.watch.layers import LayersRecord
    from ris_fast.health.watch.module_records import AlikeUnits, ModulesRecord


@dataclass
class PassRecord:
    """One forward pass of the model. Numbers stay on their device until `on_host`.

    Args: number, of_kind: of the pass, from 1, among all and among those of its mode; step, foreign_steps: made before
        it by the watched optimizers, all together, and by those of other models; site, place: from where it was called;
        training, training_after: the model's mode before and after it; grad: whether an output requires a gradient;
        reached: whether a backward pass came to one; parts_training: parts whose mode matters that are in training
        mode, of `parts`; inputs: tensors given; shape, output_shape: of the first; nodes: of its graph, 0 where it was
        not walked; input, output: (R, F) a few numbers; nonfinite_in, nonfinite_out: (2,), whether there are NaN, or
        infinities, the former not where outputs are known to be finite; rows: (B,) scenes with a gradient at the
        output; given_again: the first input is the tensor that the pass before was given; mark_kind, mark: which
        mistake the gradient at the output looks like, and how far it is from that; keys: a few numbers of more rows of
        the input, by which scenes are known again; others: (R, F) of each input, where there are several; grad_finite:
        (), whether the gradient at the output is; source: of an input that is a view, the id of what it is a view of,
        its place in it, and how often that was written to; viewed, matrices, likeness, pairs, plane: see
        `tensors`;
        draws: a hash of where the generator of random numbers stands, of passes in training; slope: (R, F) of the
        gradient at the first output, those numbers that `output` has; carried: an input is what the pass before gave;
        open_before: no backward pass had come to the pass before yet; thread: that made it.
    """

    number: int
    of_kind: int
    step: int
    foreign_steps: int
    site: int
    place: str
    training: bool
    training_after: bool
    grad: bool
    parts_training: int
    parts: int
    inputs: int
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    reached: bool = False
    nodes: int = 0
    input: Tensor | None = None
    output: Tensor | None = None
    nonfinite_in: Tensor | None = None
    nonfinite_out: Tensor | None = None
    rows: Tensor | None = None
    given_again: bool = False
    mark_kind: str = ""
    mark: Tensor | None = None
    keys: Tensor | None = None
    others: list[Tensor | None] = field(default_factory=list)
    source: tuple[int, int, int] | None = None
    viewed: str = ""
    matrices: Tensor | None = None
    likeness: Tensor | None = None
    pairs: Tensor | None = None
    plane: Tensor | None = None
    grad_finite: Tensor | None = None
    draws: int | None = None
    slope: Tensor | None = None
    carried: bool = False
    open_before: bool = False
    thread: int = 0

    def on_host(self) -> PassRecord:
        host: dict[str, Any] = {"others": [None if each is None else each.cpu() for each in self.others]}
        host |= {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **host)


@dataclass(frozen=True)
class PassShapes:
    """Of one pass: see `operations`, `masks` and `numbers_kept`."""

    over_scenes: list[str]
    apart: list[str]
    transposed: list[str]
    masks: list[Tensor]
    overflows: list[tuple[str, Tensor]]
    reaches: list[tuple[int, int, Tensor]]
    straight: int


@dataclass(frozen=True)
class LeafRecord:
    """A tensor that outputs depend on and that the model's own list of parameters does not have.

    Args: name: where it is kept, empty where that is not known; passes: that depend on it, of those that were walked;
        alive: it is still there; held: by an optimizer; unchanged: its numbers are those that it had first; since:
        steps made before that; among_trained: its operation has another operand that comes from parameters;
        like_outputs: it may have a row for each scene; training: mode of the layer that has it; registered: it is a
        parameter of one of the model's modules; with_grad: it has a gradient now.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    parameter: bool
    passes: int
    alive: bool
    held: bool
    unchanged: bool
    since: int
    among_trained: bool
    like_outputs: bool
    training: bool | None
    registered: bool
    with_grad: bool


@dataclass(frozen=True)
class ForwardRecord:
    """The model's forward passes, at the report.

    Args: passes: those that were looked at; first: as many in training were all looked at, from the
        beginning; made: all in training;
        steps: of the watched optimizers, all together; together: they have made as many steps each; leaves: that are
        nobody's; walked: passes whose graph was; outside_graph: parameters of parts that were called, which no output
        depends on; unsettled: running statistics of a new layer, used in evaluation mode;
        spectral: layers with a spectral norm that is settled in training; rows_inside: of a pass, scenes that the model
        is given and gives, and those that each of its layers is given; sequences: of a pass, shapes that the model is
        given and gives, and the first two axes that each of its layers with time first is given; formats: calls of
        layers by what became of autocast in them; passes_heard: of the model itself; written: of inputs that come again
        where the model wrote into one, whether they are what it left, and whether it writes there again; drawn: of
        evaluations, whether they drew random numbers; own_dropouts: parts that call a dropout by themselves; shapes,
        layers, functions, modules: see there; foreign_steps: of optimizers of other models; copies: other
        modules of its class, where the model was not called before the first step;
        units: of matrices that began with equal ones; of_losses: leaves that losses depend on and outputs do not;
        beside_first: see `graph`; made_float16: an operation gave numbers in that format; in_parts: the model is a
        container that nobody calls, and passes are those of its parts.
    """

    passes: list[PassRecord]
    first: int
    made: int
    steps: int
    together: bool
    leaves: list[LeafRecord]
    walked: int
    outside_graph: list[str]
    unsettled: list[str]
    spectral: list[str]
    rows_inside: list[tuple[int, int, list[tuple[str, int]]]]
    sequences: list[tuple[tuple[int, ...], tuple[int, ...], list[tuple[str, int, int]]]]
    formats: dict[str, int]
    passes_heard: int
    written: list[tuple[bool, bool]]
    drawn: list[bool]
    own_dropouts: list[str]
    shapes: list[PassShapes]
    made_float16: bool
    layers: LayersRecord
    functions: list[FunctionCheck]
    modules: ModulesRecord
    foreign_steps: int
    copies: list[CopyRecord]
    units: list[AlikeUnits]
    of_losses: list[LeafRecord]
    beside_first: tuple[list[str], list[str]]
    in_parts: bool
