"""What the rules of `watch` read: steps, optimizers and tensors as plain data.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ris_fast.health.watch.histories import GradientNumbers, NumbersRecord, Passes, PlainSteps, TensorHistory

if TYPE_CHECKING:
    from ris_fast.health.watch.changes import OutsideChange
    from ris_fast.health.watch.copies import CopyRecord
    from ris_fast.health.watch.functions import FunctionCheck
    from ris_fast.health.watch.layers import LayersRecord
    from ris_fast.health.watch.module_records import AlikeUnits, ModulesRecord
    from ris_fast.health.watch.rank_records import RanksRecord
    from ris_fast.health.watch.rivals import Rival
    from ris_fast.health.watch.schedulers import SchedulerRecord

EARLY = 8  # steps after which a gradient that has not come yet is no longer waited for


@dataclass
class StepRecord:
    """One optimizer step. Norms stay on their device until `on_host`.

    Args: names: (T,) of the tensors; usual_norms: (T,) what a layer's initial norm is, about; rates: learning rates of
        the groups; weights_before, weights_after: (T,) float32 norms,
        as they were read last: on the CPU not in each look after the first, while the weights seem finite;
        closure: gradients came within the step; scaled: a loss scaler takes care of gradients that are not finite;
        grad_after_backward, grad_at_step: (T,) float32 norms of the gradients as backward left them and as the
            optimizer found them; grad_after_step: (T,) as they are after the step, in the first steps;
        grad_change: (6,) of a few numbers of each gradient, as backward left them against what the optimizer found: the
            cosine of both, the share of negative zeros at the step, the spread over the size of each, and that of
            magnitudes. None where no hooked tensor had a gradient; 1, 0, 1, 1, 1, 1 where they are known to be the
            same;
        update_ratio: (), norm of the update over that of the weights, of a few numbers of each tensor, where there was
            a gradient;
        reset: (), whether the weights are bit for bit those of an earlier step, and were others in between;
        uncleared: (), whether one gradient of the step before was added to;
        hooked: tensors with a hook on their gradient; none_grads: those of them that no gradient came to;
        no_grad: tensors whose gradient is None at the step; earlier: those to which a backward pass came that was not
            the last;
        loss_scale: of the torch.amp.GradScaler that called the step; moved: (T,) how many of the sampled numbers of
            each tensor the step changed, of `sizes`.
    """

    step: int
    names: list[str]
    usual_norms: list[float]
    rates: list[float | Tensor]
    weights_before: Tensor
    closure: bool
    scaled: bool
    weights_after: Tensor | None = None
    grad_after_backward: Tensor | None = None
    grad_at_step: Tensor | None = None
    grad_after_step: Tensor | None = None
    grad_change: Tensor | None = None
    update_ratio: Tensor | None = None
    reset: Tensor | None = None
    uncleared: Tensor | None = None
    hooked: tuple[str, ...] = ()
    none_grads: tuple[str, ...] = ()
    no_grad: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()
    loss_scale: float | Tensor | None = None
    moved: Tensor | None = None
    sizes: list[int] = field(default_factory=list)

    def on_host(self) -> StepRecord:
        host = {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        scale = None if self.loss_scale is None else float(self.loss_scale)
        return replace(self, **host | {"rates": [float(rate) for rate in self.rates], "loss_scale": scale})

    def gradient_norms(self) -> tuple[float, float]:
        """Of all tensors: as backward left the gradients, and as the optimizer found them."""
        return float(self.grad_after_backward.norm()), float(self.grad_at_step.norm())


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """A tensor of the model or of an optimizer, at the report. A tensor has one record: they compare by identity.

    Args: name: empty where it is not the model's; shape, size: empty and 0 while a tensor is lazy.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    dtype: torch.dtype
    trainable: bool


@dataclass(frozen=True)
class OptimizerRecord:
    """One optimizer, at the report.

    Args: kinds: names of its class and of those that it derives from; groups: its `param_groups`, with records for
        tensors; steps: made so far; records: of the steps that were looked at; weight_norms: of the tensors, by name,
        that are the model's and have a norm; trained: tensors that differ from what they were before the first step;
        frozen: those without requires_grad, and with_grad: those with a gradient, at the last step;
        arrived: norms of the gradients that came since the last step; passes: backward passes before the first step;
        cleared: those that found the gradients of the pass before gone; histories: of its tensors over all steps;
        plain: what is known of every step; between: backward passes between two steps; numbers: of the tensors that
        have been in a step that was looked at, by name; outside: changes of weights between two steps; denominators:
        see there; rivals: optimizers that the watch was not given, which step on
        tensors of this one; loads: how often its state was loaded; reloads: with as many steps behind it as that
        loaded before, although steps were made since; span: its first and last step, counted in those of all
        optimizers; gradient: of the last look.
    """

    kinds: frozenset[str]
    groups: list[dict[str, Any]]
    steps: int
    records: list[StepRecord]
    weight_norms: dict[str, float]
    trained: set[TensorRecord]
    frozen: set[TensorRecord]
    with_grad: set[TensorRecord]
    arrived: list[float]
    passes: int
    cleared: int
    histories: dict[TensorRecord, TensorHistory]
    plain: PlainSteps
    between: Passes
    numbers: dict[str, NumbersRecord]
    outside: list[OutsideChange]
    denominators: dict[str, tuple[float, float]]
    rivals: list[Rival]
    loads: int
    reloads: int
    span: tuple[int, int] | None
    gradient: GradientNumbers

    @property
    def tensors(self) -> list[TensorRecord]:
        """Of all groups; one that is in two groups comes twice."""
        return [tensor for group in self.groups for tensor in group["params"]]


@dataclass(frozen=True)
class LoopRecord:
    """A model and its optimizers, at the report.

    Args: steps: made by the optimizer that has made most; frozen: beginnings of names of parameters that are not meant
        to be trained; added: parameters that came after the watch began; frozen_at_start: those without
        requires_grad when the watch began; rival_tensors: those that an optimizer which the watch was not given has
        stepped on; masters: the optimizers' tensors that never were the model's; moved_outside:
        those that no optimizer was to train and that have changed; with_gradient: those with one now; forward: the
        model's passes; losses: those that `seen.loss` was given; met: those that backward passes began from in steps
        that were looked at;
        schedulers: of its optimizers; kept: of states that were loaded into the model, whether all their tensors were
        its own; helpers: modules beside it; aliases: dicts and lists of its own numbers, with how many searches met
        them; as_drawn: weights of layers without requires_grad that lie as torch draws them for a new one; ranks: what
        is known of them, None for a loop of one process;
        scales: of torch.amp.GradScalers that are at work in the process.
    """

    parameters: list[TensorRecord]
    optimizers: list[OptimizerRecord]
    steps: int
    frozen: tuple[str, ...]
    added: set[TensorRecord]
    frozen_at_start: set[TensorRecord]
    rival_tensors: set[TensorRecord]
    masters: set[TensorRecord]
    moved_outside: set[TensorRecord]
    with_gradient: set[TensorRecord]
    forward: ForwardRecord | None = None
    losses: Sequence[LossRecord] = ()
    met: Sequence[LossRecord] = ()
    schedulers: Sequence[SchedulerRecord] = ()
    kept: Sequence[bool] = ()
    helpers: Sequence[HelperRecord] = ()
    aliases: Mapping[str, int] = field(default_factory=dict)
    as_drawn: frozenset[TensorRecord] = frozenset()
    ranks: RanksRecord | None = None
    scales: Sequence[float] = ()

    @property
    def uphill(self) -> bool | None:
        """Whether the optimizers make the loss larger (`maximize=True`); None where some groups do and others do
        not."""
        ways = {bool(group.get("maximize")) for each in self.optimizers for group in each.groups}
        return ways.pop() if len(ways) == 1 else None


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
        beside_first: see `graph`; in_parts: the model is a container that nobody calls, and passes are those of its
        parts.
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
    layers: LayersRecord
    functions: list[FunctionCheck]
    modules: ModulesRecord
    foreign_steps: int
    copies: list[CopyRecord]
    units: list[AlikeUnits]
    of_losses: list[LeafRecord]
    beside_first: tuple[list[str], list[str]]
    in_parts: bool


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


@dataclass(frozen=True)
class HelperRecord:
    """A module beside the model, or weights in a dict or a list.

    Args: name: of the variable; of: the part of the model that it has the shapes of, None where there is none;
        as_begun: it had, about, the numbers that this part began with; training: the mode it was in, and dropouts:
        those of it that are on; trained: it has had a gradient; called: since it was found; steps: made when it was
        last looked at; looks: how often it was; still: looks at which it was what it was first; distances: after steps
        of which the one before was looked at too, how far it was from the part, now or before the step, in units of
        that step; rounded: of a copy in 16 bits, after each step that wrote to it, the shares of numbers that have
        changed, and that are the part's in its format; moved: the part has moved; way: share
        of its way from the first weights that the helper has come; buffers_still: running statistics are what they
        were first, though its weights moved and the part's statistics did; kept: it is no module;
        equal_shares: of a mean of equal shares, how many states it is of.
    """

    name: str
    of: str | None
    as_begun: bool
    training: bool
    dropouts: int
    trained: bool
    called: bool
    steps: int
    looks: int
    still: int
    distances: list[float]
    moved: bool
    way: float | None
    buffers_still: bool
    rounded: list[tuple[float, float]]
    kept: bool = False
    equal_shares: int = 0


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
        pairing, axis_apart: see `terms`; compares_weights: in that other term they are compared with what has no
        gradient; of_inputs: one depends on the model's inputs alone; still: of differences that it is made of, of
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

    def on_host(self) -> LossRecord:
        host: dict[str, Any] = {name: [each.cpu() for each in getattr(self, name)] for name in ("factors", "still")}
        host |= {name: each.cpu() for name, each in vars(self).items() if isinstance(each, Tensor)}
        host |= {name: each.on_host() for name, each in vars(self).items() if isinstance(each, (Numbers, LossSigns))}
        return replace(self, **host)


def is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
