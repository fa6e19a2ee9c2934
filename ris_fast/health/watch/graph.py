"""Which tensors a model's outputs depend on through autograd, and which of these nobody trains."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.health.watch.hooks import plain_name
from ris_fast.health.watch.masks import masks_of
from ris_fast.health.watch.numbers_kept import overflows_of, reaches_of
from ris_fast.health.watch.operations import (
    operation,
    over_scenes,
    reshaped_apart,
    reshaped_as_transposed,
    straight_products,
)
from ris_fast.health.watch.pass_records import LeafRecord, PassShapes
from ris_fast.health.watch.rivals import held_by_optimizers
from ris_fast.health.watch.samples import few_numbers, has_norm

NODES = 20_000  # of a graph that are looked at
LEAVES = 256  # that are kept
DEPTH = 3  # of lists in lists that are searched for a name
CHAIN = 16  # operations from a root on
SMALL = 64  # nodes of the graph of what comes of parameters
CHOOSING = ("Embedding", "Index", "Gather", "Take", "Scatter", "MaskedFill", "MaskedSelect")
# Operations that leave numbers as they are, or some of them.
MOVING = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Transpose", "Permute", "T", "ToCopy", "Clone"}
MOVING |= {"Select", "Slice", "Index"}


@dataclass
class _Leaf:
    """A tensor that requires a gradient and that is none of the model's parameters."""

    tensor: weakref.ref[Tensor]
    shape: tuple[int, ...]
    parameter: bool
    numbers: Tensor | None
    step: int
    among_trained: bool
    of_outputs: bool
    passes: int = 1


class GraphLeaves:
    """The leaves of the graphs of some forward passes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.walked = 0
        self.cut = False  # a graph was larger than is looked at
        self.functions: set[type] = set()  # torch.autograd.Functions that are not torch's
        self.reached: set[int] = set()  # ids of the model's parameters
        self.by_first: set[int] = set()  # of those, by the first output, where there are several
        self.several = 0  # passes with several
        self.unknown: list[_Leaf] = []
        self.given: set[int] = set()  # ids of inputs of the model
        self.of_losses: list[_Leaf] = []
        self.kept: list[tuple[_Leaf, Tensor]] = []
        self.owners: dict[int, tuple[str, bool, bool]] = {}
        self.shapes: list[PassShapes] = []
        self.made_float16 = False  # by an operation of a pass

    def own_parameters(self) -> dict[int, str]:
        """Names of all parameters by id, whatever a model's own `parameters` says; of what `functional_call` puts in
        their place too."""
        return {
            id(value): plain_name(f"{path}{name}")
            for path, module in modules_of(self.model)
            for name, value in module._parameters.items()
            if value is not None
        }

    def walk(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], step: int) -> int:
        """Looks at the graph of a pass, up to its inputs. Returns: its number of nodes."""
        own, given = self.own_parameters(), {id(each) for each in inputs}
        self.given |= given
        ends = {each.grad_fn for each in inputs if each.grad_fn is not None}
        leaves, users, nodes = graph_of([each.grad_fn for each in outputs if each.grad_fn is not None], ends)
        self.walked, self.cut = self.walked + 1, self.cut or nodes >= NODES
        rows = inputs[0].shape[0] if inputs and inputs[0].ndim else 0
        same = rows if outputs and outputs[0].shape[:1] == (rows,) else 0
        self.shapes.append(
            PassShapes(
                over_scenes(users, same),
                reshaped_apart(users, rows),
                reshaped_as_transposed(users),
                masks_of(users),
                overflows_of(users),
                reaches_of(users, rows, outputs[0].shape[0] if outputs and outputs[0].ndim else 0),
                straight_products(users),
            )
        )
        self.made_float16 = self.made_float16 or any(map(makes_float16, users))
        self.functions |= {each for node in users if (each := own_function(node)) is not None}
        self.reached |= {id(leaf.variable) for leaf in leaves} & own.keys()
        if len(outputs) > 1 and outputs[0].grad_fn is not None:
            self.several += 1
            self.by_first |= {id(leaf.variable) for leaf in graph_of([outputs[0].grad_fn], ends)[0]} & own.keys()
        sizes = {each.shape[0] for each in outputs if each.ndim}
        for leaf in leaves:
            if id(leaf.variable) not in own and id(leaf.variable) not in given:
                like = not sizes or tuple(leaf.variable.shape)[:1] in {(n,) for n in sizes}
                _keep(self.unknown, leaf, step, like, lambda leaf=leaf: _among_trained(leaf, own, users))
        return nodes

    def note_loss(self, leaves: Sequence[Any], rows: int, step: int) -> None:
        """Leaves of a loss that are behind no output. `rows`: of the outputs."""
        own = self.own_parameters()
        for leaf in leaves:
            if id(leaf.variable) not in own and id(leaf.variable) not in self.given:
                _keep(self.of_losses, leaf, step, tuple(leaf.variable.shape)[:1] == (rows,), lambda: False)

    def outside(self, called: set[int]) -> list[str]:
        """Names of the parameters of parts that were called, and that no output depends on."""
        if self.cut or not self.walked:
            return []
        own = self.own_parameters()
        return [
            own[id(value)]
            for _, module in modules_of(self.model)
            if id(module) in called
            for value in module._parameters.values()
            if value is not None and value.requires_grad and id(value) not in self.reached
        ]

    def beside_first(self) -> tuple[list[str], list[str]]:
        """Names of the parameters that the first of several outputs depends on, and of those that only others do."""
        if self.cut or not self.several or self.several < self.walked:
            return [], []
        own = self.own_parameters()
        return [own[key] for key in self.by_first & own.keys()], [own[key] for key in self.reached - self.by_first]

    def records(self) -> list[LeafRecord]:
        """What is nobody's, and what the model's own list leaves out. Reads the device."""
        visible, own = {id(p) for p in self.model.parameters()}, self.own_parameters()
        tensors = {id(value): value for _, module in modules_of(self.model) for value in module._parameters.values()}
        hidden = [tensors[key] for key in self.reached if key in tensors and key not in visible]
        if not self.unknown and not hidden:
            return []
        held = held_by_optimizers()
        return [
            *(self._record(leaf, held) for leaf in self.unknown),
            *(_left_out(own[id(each)], each, id(each) in held, self.walked) for each in hidden),
        ]

    def settle_losses(self) -> None:
        """After the last loss whose leaves are noted: keeps those that came again and that no optimizer holds, with who
        has them, as both may be gone at the report."""
        again = [(leaf, tensor) for leaf in self.of_losses if leaf.passes > 1 and (tensor := leaf.tensor()) is not None]
        held = held_by_optimizers() if again else set()
        self.kept = [(leaf, tensor) for leaf, tensor in again if id(tensor) not in held]
        self.owners = _owners({id(tensor) for _, tensor in self.kept}) if self.kept else {}

    def loss_records(self) -> list[LeafRecord]:
        """Of losses. Reads the device."""
        held = held_by_optimizers() if self.kept else set()
        found = []
        for leaf, tensor in self.kept:
            name, training, registered = self.owners.get(id(tensor), ("", None, False))
            found.append(replace(self._record(leaf, held), name=name, training=training, registered=registered))
        return found

    def _record(self, leaf: _Leaf, held: set[int]) -> LeafRecord:
        tensor = leaf.tensor()
        name, training = find_name(self.model, tensor) if tensor is not None else ("", None)
        return LeafRecord(
            name=name,
            shape=leaf.shape,
            size=torch.Size(leaf.shape).numel(),
            parameter=leaf.parameter,
            passes=leaf.passes,
            alive=tensor is not None,
            held=tensor is not None and id(tensor) in held,
            unchanged=_is_same(leaf),
            since=leaf.step,
            among_trained=leaf.among_trained,
            like_outputs=leaf.of_outputs,
            training=training,
            registered=False,
            with_grad=tensor is not None and tensor.grad is not None,
        )


def _left_out(name: str, tensor: Tensor, held: bool, passes: int) -> LeafRecord:
    """A parameter of a module that the model's `parameters` does not give."""
    return LeafRecord(
        name=name,
        shape=tuple(tensor.shape),
        size=tensor.numel(),
        parameter=True,
        passes=passes,
        alive=True,
        held=held,
        unchanged=not held,
        since=0,
        among_trained=True,
        like_outputs=False,
        training=None,
        registered=True,
        with_grad=tensor.grad is not None,
    )


def makes_float16(node: Any) -> bool:
    made = getattr(node, "_input_metadata", None)
    return bool(made) and made[0].dtype == torch.float16


def own_function(node: Any) -> type | None:
    """The user's torch.autograd.Function that a node of the graph comes from."""
    function = getattr(node, "_forward_cls", None)
    own = isinstance(function, type) and function.__module__.partition(".")[0] != "torch"
    return function if own else None


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, which ends in a point; whatever a model's own `modules` says."""
    seen, stack = set(), [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module
            stack += [(f"{path}{name}.", part) for name, part in reversed(module._modules.items()) if part is not None]


def graph_of(roots: Sequence[Any], ends: set[Any]) -> tuple[list[Any], dict[Any, Any], int]:
    """Leaves of a graph, which node uses each node (one of them), and how many nodes it has, without those behind
    `ends`."""
    users: dict[Any, Any] = dict.fromkeys(roots)
    stack, leaves = list(users), []
    while stack and len(users) < NODES:
        node = stack.pop()
        if node in ends:
            continue
        if type(node).__name__ == "AccumulateGrad":
            leaves.append(node)
        for after, _ in node.next_functions:
            if after is not None and after not in users:
                users[after] = node
                stack.append(after)
    return leaves, users, len(users)


def comes_of_parameters_only(root: Any, own: Container[int]) -> bool:
    """Whether no other tensor is in a small graph. `own`: ids of parameters. What is chosen by an index comes of the
    index too."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        if type(node).__name__ == "AccumulateGrad":
            if id(node.variable) not in own:
                return False
            continue
        if len(seen) > SMALL or operation(node).startswith(CHOOSING) or not node.next_functions:
            return False
        for after, _ in node.next_functions:
            if after is None:
                return False
            if after not in seen:
                seen.add(after)
                stack.append(after)
    return True


def _among_trained(leaf: Any, own: Mapping[int, str], users: Mapping[Any, Any]) -> bool:
    """Whether the operation that uses it has another operand that comes from parameters of the model."""
    node = users.get(leaf)
    while node is not None:
        if len(node.next_functions) > 1:  # None where an operand has no gradient, as data
            branches = [after for after, _ in node.next_functions if after is not None]
            found = [id(each.variable) for each in graph_of(branches, set())[0]]
            return any(key in own for key in found)
        node = users.get(node)
    return False


def _keep(kept: list[_Leaf], leaf: Any, step: int, of_outputs: bool, among: Callable[[], bool]) -> None:
    tensor = leaf.variable
    if tensor.numel() and not tensor.untyped_storage().nbytes():  # gathered for the pass and freed: FSDP2's
        return
    for known in kept:
        if known.tensor() is tensor:
            known.passes += 1
            return
    if len(kept) < LEAVES:
        numbers = few_numbers([tensor.detach()]) if has_norm(tensor) else None
        parameter, shape = isinstance(tensor, nn.Parameter), tuple(tensor.shape)
        kept.append(_Leaf(weakref.ref(tensor), shape, parameter, numbers, step, among(), of_outputs))


def _is_same(leaf: _Leaf) -> bool:
    """Whether its numbers are those that it had first."""
    tensor = leaf.tensor()
    if tensor is None or leaf.numbers is None:
        return False
    now = few_numbers([tensor.detach()])
    return torch.equal(now, leaf.numbers) if now.device == leaf.numbers.device else False


def _owners(wanted: set[int]) -> dict[int, tuple[str, bool, bool]]:
    """Of tensors that modules have as parameters: 'Proxies.directions', the mode, and whether it is a layer of
    torch."""
    found = {}
    for each in gc.get_objects():
        if issubclass(type(each), nn.Module) and (own := each.__dict__.get("_parameters")):
            for name, value in own.items():
                if id(value) in wanted:
                    of_torch = type(each).__module__.startswith("torch.")
                    found[id(value)] = f"{type(each).__name__}.{name}", each.training, of_torch
    return found


def find_name(model: nn.Module, tensor: Tensor) -> tuple[str, bool | None]:
    """Where a tensor is kept that is no parameter of the model, e.g. 'layers[0].weight', and the mode of its layer."""
    for path, module in modules_of(model):
        for name, value in vars(module).items():
            if not name.startswith(("_modules", "_parameters")):
                if (found := _within(value, tensor, DEPTH)) is not None:
                    return f"{path}{name}{found[0]}", found[1]
    return "", None


def _within(value: Any, tensor: Tensor, depth: int) -> tuple[str, bool | None] | None:
    if value is tensor:
        return "", None
    if isinstance(value, nn.Module):
        for path, module in modules_of(value):
            for name, each in module._parameters.items():
                if each is tensor:
                    return f".{path}{name}", module.training
        return None
    if depth and isinstance(value, (list, tuple, dict)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            if (found := _within(part, tensor, depth - 1)) is not None:
                return f"[{key!r}]{found[0]}", found[1]
    return None


def chain_of(node: Any, ends: set[Any]) -> list[tuple[str, tuple[int, ...], bool]]:
    """Operations from the root on while each has one operand with a gradient: the name, the shape of what it gives, and
    whether it is the one that made the outputs."""
    found: list[tuple[str, tuple[int, ...], bool]] = []
    while node is not None and len(found) < CHAIN:
        made = getattr(node, "_input_metadata", None)
        shape = tuple(made[0].shape) if made else ()
        found.append((operation(node), shape, node in ends))
        after = [each for each, _ in node.next_functions if each is not None]
        node = after[0] if len(after) == 1 and node not in ends else None
    return found
