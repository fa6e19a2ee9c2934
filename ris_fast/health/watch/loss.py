"""What `seen.loss(value, outputs, targets)` notes of a loss: its graph near the root, shapes and ranges.

The first calls are noted, then others that lie further and further apart, one step in `every` among them. Nothing is
read from the device until the report.

Legend: R rows, a few scenes; F numbers, a few of each; B scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ris_fast.health.watch.eager import eager_hook
from ris_fast.health.watch.graph import CHAIN, MOVING, GraphLeaves, chain_of, graph_of
from ris_fast.health.watch.loss_records import LossRecord, Numbers
from ris_fast.health.watch.loss_signs import signs_of
from ris_fast.health.watch.operations import (
    made_shape,
    operation,
    over_scenes,
    reshaped_as_transposed,
    saved_tensor,
)
from ris_fast.health.watch.tensors import (
    KEY_NUMBERS,
    KEYS,
    few_rows,
    from_transposes,
    is_plain,
    largest_in_rows,
    nonfinite,
    plane_of,
    tensors_of,
    viewed_as,
)
from ris_fast.health.watch.terms import (
    axis_apart,
    compares_leaves,
    of_inputs_alone,
    pairing,
    sum_beside_mean,
    surrogate_sign,
    takes_extremes,
    takes_smallest,
    term_of_outputs,
    term_without_graph,
    weight_terms,
    zero_differences,
)

FIRST, LATE, WALKED = 32, 64, 4  # calls that are noted, of later steps, and with a walk through the graph
SIGNED = 12  # first calls whose operations and gradient are looked at; and the late ones
GROWING = 8  # later calls lie further and further apart, by this part of their number

# Operations that take a loss from its outputs to one number.
REDUCING = {"Mean", "Sum", "Div", "Mul", "Sqrt", "Pow", "Abs", "MseLoss", "SmoothL1Loss", "HuberLoss", "Neg", "Expand"}
# What takes raw outputs, and what must not have been applied to them before.
RAW = {"LogSoftmax": ("Softmax", "Sigmoid"), "BinaryCrossEntropyWithLogits": ("Sigmoid", "Softmax")}


class LossHook:
    """Notes losses that it is given."""

    def __init__(
        self, leaves: GraphLeaves, step: Callable[[], tuple[int, int]], number: Callable[[], int], every: int
    ) -> None:
        """`step`: steps of all watched optimizers together, and of the one that has made most; `number`: of the
        model's last pass."""
        self.leaves, self.step, self.number, self.every = leaves, step, number, every
        self.records: list[LossRecord] = []
        self.count = self.late = 0
        self.next = FIRST + 1

    def note(self, value: Any, outputs: Any, targets: Any, training: bool) -> None:
        """One loss, if it is one that is looked at. Evaluation is not."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not training:
            return
        self.count += 1
        steps, most = self.step()
        if self.count > FIRST:
            if self.late >= LATE or (most % self.every and self.count < self.next):
                return
            self.late += 1
            self.next = self.count + max(1, self.count // GROWING)
        with torch.no_grad():
            self._look(value, tensors_of(outputs), tensors_of(targets), steps)

    def _look(self, value: Any, outputs: list[Tensor], targets: list[Tensor], step: int) -> None:
        tensor = next(iter(tensors_of(value)), None)
        now = record_of(tensor, outputs, targets, step, self.number())
        if tensor is not None and tensor.grad_fn is not None:
            if self.count <= WALKED:
                walk(now, tensor.grad_fn, outputs, self.leaves)
            elif 0 < self.late <= WALKED:  # a schedule may have raised them
                now.factors = _factors(graph_of([tensor.grad_fn], set())[1])
            if self.count <= SIGNED or self.late:
                now.signs = signs_of(tensor, outputs, targets)
        self.records.append(now)
        if self.count <= FIRST and outputs and outputs[0].requires_grad and outputs[0].grad_fn is not None:
            rows = outputs[0].shape[0] if outputs[0].ndim else 0

            def reached(grad: Tensor) -> None:
                largest = largest_in_rows(grad.detach(), rows)
                now.rows = None if largest is None else largest != 0

            outputs[0].register_hook(eager_hook(reached))


def record_of(
    root: Tensor | None, outputs: list[Tensor], targets: list[Tensor], step: int, number: int, early: bool = True
) -> LossRecord:
    """What a loss shows near its root. `early`: numbers of outputs, and what is behind them, are looked at too."""
    node = None if root is None else root.grad_fn
    ends = ends_of(outputs)
    chain = chain_of(node, ends)
    return LossRecord(
        step=step,
        tensor=root is not None,
        requires_grad=root is not None and root.requires_grad,
        made_anew=root is not None and root.requires_grad and node is None,
        chain=[name for name, _, _ in chain],
        chain_shapes=[shape for _, shape, _ in chain],
        direct=bool(chain) and chain[-1][2],
        behind=[name for each in ends for name, _, _ in chain_of(each, set())][:CHAIN] if early else [],
        outputs_require_grad=any(each.requires_grad for each in outputs),
        outputs=numbers_of(outputs) if early else None,
        targets=numbers_of(targets, keys=True),
        value=root.detach().float().mean() if root is not None and is_plain(root) else None,
        number=number,
    )


def walk(now: LossRecord, node: Any, outputs: list[Tensor], leaves: GraphLeaves, told: bool = True) -> None:
    """Looks at the whole graph of a loss; where it was not told of, at what lies before the outputs only."""
    ends, own = ends_of(outputs), leaves.own_parameters()
    found, users, _ = graph_of([node], set() if told else ends)
    rows = outputs[0].shape[0] if outputs and outputs[0].ndim else 0
    near = graph_of([node], ends)[1] if told else users
    if told:
        now.of_model = any(id(leaf.variable) in own for leaf in found)
        now.factors = _factors(users)
    else:
        leaves.note_loss(found, rows, now.step)
    of_weights = weight_terms(node, ends, own)
    apart = graph_of(of_weights, ends)[1]
    now.through, now.of_weights = term_of_outputs(node, ends), bool(of_weights)
    now.still, now.compares_weights = zero_differences(users if told else apart), compares_leaves(apart)
    now.of_inputs = of_inputs_alone(node, leaves.given)
    now.twice = next(filter(None, map(applied_twice, users)), ())
    now.over_scenes = over_scenes(near, rows, True) if ends or not told else []
    now.transposed, now.surrogate = reshaped_as_transposed(near), surrogate_sign(node)
    now.extremes, now.pairing = takes_extremes(near, ends), pairing(near, rows)
    now.axis_apart, now.chooses = axis_apart(users), takes_smallest(near)
    now.summed, now.ungraphed = sum_beside_mean(node, ends, rows), term_without_graph(node)


def ends_of(outputs: Sequence[Tensor]) -> set[Any]:
    """Nodes of the graph that made them."""
    return {each.grad_fn for each in outputs if each.grad_fn is not None}


def _factors(nodes: Iterable[Any]) -> list[Tensor]:
    return [factor for each in nodes if (factor := _factor(each)) is not None]


def _factor(node: Any) -> Tensor | None:
    """(), the number that a product of one number by a term of the loss has as the other factor, before it is freed."""
    terms = [each for each, _ in node.next_functions if each is not None]
    if operation(node) != "Mul" or len(terms) != 1 or made_shape(node) != ():
        return None
    factors = [saved_tensor(node, name) for name in ("self", "other")]
    some = [each for each in factors if each is not None and each.numel() == 1 and is_plain(each)]
    return some[0].detach().float().reshape(()) if len(some) == 1 else None


def numbers_of(tensors: Sequence[Tensor], keys: bool = False) -> Numbers | None:
    """Of the first tensor; `keys`: also those by which scenes are known again. Numbers stay on its device."""
    if not tensors or not is_plain(tensors[0]) or not tensors[0].numel():
        return None
    tensor = tensors[0].detach()
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    ends = real.float().aminmax()
    imaginary = real[..., 1].abs().max() if tensor.is_complex() else torch.zeros_like(ends.max)
    return Numbers(
        shape=tuple(tensor.shape),
        whole=not tensor.is_floating_point() and not tensor.is_complex(),
        complex=tensor.is_complex(),
        least=ends.min,
        most=ends.max,
        imaginary=imaginary,
        nonfinite=nonfinite([real]),
        few=few_rows([tensor]),
        keys=few_rows([tensor], KEYS, KEY_NUMBERS) if keys else None,
        viewed=viewed_as(tensors) if keys else "",
        matrices=from_transposes(tensors),
        plane=plane_of(tensors) if keys else None,
    )


def applied_twice(node: Any) -> tuple[str, ...]:
    """What applies a softmax or sigmoid of its own, and the one that came before it; with nothing but a new shape in
    between."""
    if (name := operation(node)) == "Sub":  # as `Categorical(logits=...)` takes off what scores add up to
        first, second = ([each for each, _ in node.next_functions] + [None, None])[:2]
        own = second is not None and operation(second) == "Logsumexp" and second.next_functions[0][0] is first
        return ("Logsumexp", "Softmax") if own and operation(first) == "Softmax" else ()
    if name not in RAW:
        return ()
    before = next((each for each, *_ in chain_of(node, set())[1:] if each not in MOVING), "")
    return (name, before) if before in RAW[name] else ()
