"""Terms of a loss: which are sums over the scenes of a batch and which are means, by their operations and shapes.

Nothing is read from a tensor.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ris_fast.health.watch.graph import MOVING, chain_of, graph_of
from ris_fast.health.watch.operations import axes_of, made_shape, operation, saved_tensor
from ris_fast.health.watch.tensors import is_plain

TERMS, MEAN = 16, 1  # that are looked at; as losses keep their reduction
LOSSES = ("MseLoss", "SmoothL1Loss", "HuberLoss", "NllLoss", "BinaryCrossEntropy", "KlDiv")
SMALLEST = {"Min", "Minimum", "Amin", "Aminmax", "Sort", "Topk"}
BOUNDS = {"Minimum": 1, "Maximum": -1}
SCALING = {"Mul", "Div", "Neg"}
PAIRED = ("MseLoss", "SmoothL1Loss", "HuberLoss")
EVEN = {"Pow", "Abs", "LinalgVectorNorm", "Norm", "Mul"}  # of a difference; without a gradient where that is zero
DIFFERENCES = 64  # that are looked at


def sum_beside_mean(root: Any, ends: set[Any], scenes: int) -> bool:
    """Whether a loss adds a plain sum over all scenes, without any factor, to a mean over them, both of outputs."""
    if operation(root) not in ("Add", "Sub") or scenes < 2 or not ends:
        return False
    kinds = {kind for term in _terms(root) if (kind := _kind(term, scenes)) and _of_outputs(term, ends)}
    return kinds == {"sum", "mean"}


def term_without_graph(root: Any) -> bool:
    """Whether one number that has no gradient is added to one that has."""
    return any(
        operation(node) in ("Add", "Sub")
        and len(node.next_functions) == 2
        and None in [each for each, _ in node.next_functions]
        for node in _sums(root)
    )


def _sums(root: Any) -> list[Any]:
    """Additions of one number to another, from the root on."""
    found, waiting = [], [root]
    while waiting and len(found) < TERMS:
        node = waiting.pop()
        if operation(node) in ("Add", "Sub") and made_shape(node) == ():
            found.append(node)
            waiting += [each for each, _ in node.next_functions if each is not None]
    return found


def _terms(root: Any) -> Iterator[Any]:
    """What is added up to one number."""
    waiting, count = [root], 0
    while waiting and count < TERMS:
        node, count = waiting.pop(), count + 1
        if operation(node) in ("Add", "Sub") and made_shape(node) == ():
            waiting += [each for each, _ in node.next_functions if each is not None]
        else:
            yield node


def _kind(term: Any, scenes: int) -> str:
    name, plain = operation(term), True
    while name in SCALING and made_shape(term) == ():
        after = [each for each, _ in term.next_functions if each is not None]
        if len(after) != 1:
            return ""
        term, plain = after[0], False
        name = operation(term)
    sizes = tuple(getattr(term, "_saved_self_sym_sizes", ()))
    if name in ("Sum", "Mean") and made_shape(term) == () and sizes[:1] == (scenes,):
        return "mean" if name == "Mean" else "sum" if plain else ""
    return "mean" if name.startswith(LOSSES) and getattr(term, "_saved_reduction", 0) == MEAN else ""


def _of_outputs(term: Any, ends: set[Any]) -> bool:
    return not ends.isdisjoint(graph_of([term], ends)[1])


def of_inputs_alone(root: Any, given: Container[int]) -> bool:
    """Whether a term depends on inputs of the model, and on nothing else that has a gradient."""
    for term in _terms(root):
        leaves, _, _ = graph_of([term], set())
        if leaves and all(id(leaf.variable) in given for leaf in leaves):
            return True
    return False


def weight_terms(root: Any, ends: set[Any], own: Mapping[int, str]) -> list[Any]:
    """Terms that depend on parameters of the model alone."""
    found = []
    for term in _terms(root):
        leaves, nodes, _ = graph_of([term], ends)
        if leaves and ends.isdisjoint(nodes) and all(id(leaf.variable) in own for leaf in leaves):
            found.append(term)
    return found


def zero_differences(nodes: Iterable[Any]) -> list[Tensor]:
    """Of distances in a graph whose numbers are still there, (): whether both sides are the same, bit for bit."""
    found: list[Tensor] = []
    for node in nodes:
        name = operation(node)
        if name.startswith(PAIRED):
            pair = saved_tensor(node, "self"), saved_tensor(node, "target")
            if all(each is not None and is_plain(each) for each in pair):
                found.append((pair[0] == pair[1]).all())  # type: ignore[operator, union-attr]
        elif name in EVEN and (value := saved_tensor(node, "self")) is not None and is_plain(value):
            before = [each for each, *_ in chain_of(node, set())[1:] if each not in MOVING] or _factors(node)
            if before[:1] == ["Sub"]:
                found.append(~value.detach().any())
        if len(found) >= DIFFERENCES:
            break
    return found


def compares_leaves(nodes: Iterable[Any]) -> bool:
    """Whether a leaf is compared with a tensor that has no gradient."""
    for node in nodes:
        sides = [each for each, _ in node.next_functions]
        leaf = [type(each).__name__ == "AccumulateGrad" for each in sides if each is not None]
        if leaf == [True] and (operation(node).startswith(PAIRED) or (operation(node) == "Sub" and len(sides) == 2)):
            return True
    return False


def _factors(node: Any) -> list[str]:
    """The one operation that gives both factors of a product."""
    made = {each for each, _ in node.next_functions if each is not None}
    return [operation(each) for each in made] if len(made) == 1 else []


def term_of_outputs(root: Any, ends: set[Any]) -> list[str]:
    """Operations of the one term that depends on outputs, from its root on; empty where several do."""
    through = [
        [name for name, _, _ in chain_of(term, ends)]
        for term in _terms(root)
        if not ends.isdisjoint(graph_of([term], ends)[1])
    ]
    return through[0] if len(through) == 1 else []


def surrogate_sign(root: Any) -> int:
    """Of a policy's clipped objective, the smaller of two products with a ratio of probabilities: 1 where the loss adds
    it, -1 where it takes it off, 0 where there is none or factors hide its sign. Of the larger one the other way
    round."""
    waiting, count = [(root, 1)], 0
    while waiting and count < TERMS:
        node, sign = waiting.pop()
        name, count = operation(node), count + 1
        after = [each for each, _ in node.next_functions if each is not None]
        if name in BOUNDS and len(after) == 2 and sum(map(_of_ratio, after)) == 2:
            return sign * BOUNDS[name]
        if name in ("Neg", "Mean", "Add", "View") or (name == "Sub" and len(after) == 2):
            signs = [sign, -sign] if name == "Sub" else [-sign if name == "Neg" else sign] * len(after)
            waiting += zip(after, signs)
    return 0


def takes_extremes(nodes: Iterable[Any], ends: set[Any]) -> bool:
    """Whether the smaller and the larger ones are taken of outputs as they are and of something else: as where boxes
    overlap, between their corners."""
    return {operation(node) for node in nodes if operation(node) in BOUNDS and _operand(node) in ends} == {*BOUNDS}


def takes_smallest(nodes: Iterable[Any]) -> bool:
    """Whether the smallest of several comparisons counts: of orders in which outputs may come, or of points."""
    return any(operation(node) in SMALLEST for node in nodes)


def axis_apart(nodes: Iterable[Any]) -> str:
    """Where a likelihood picks one of as many classes as another axis has than the one that a softmax adds up to one:
    'a logarithm of a softmax over axis 1 of (32, 12, 5), and one of 5 classes'."""
    for node in nodes:
        if not operation(node).startswith("NllLoss"):
            continue
        before = node.next_functions[0][0] if node.next_functions else None
        classes = made_shape(before)[1:2] if before is not None else ()
        for _ in range(8):
            if before is None or operation(before) not in MOVING:
                break
            before = before.next_functions[0][0]
        if before is None or operation(before) != "LogSoftmax" or not classes:
            continue
        shape = made_shape(before)
        axis = axes_of(before, len(shape))
        if len(axis) == 1 and axis != {0} and shape[min(axis)] != classes[0] and classes[0] in shape:
            return f"a logarithm of a softmax over axis {min(axis)} of {shape}, and one of {classes[0]} classes"
    return ""


def pairing(nodes: Iterable[Any], scenes: int) -> str:
    """How a loss parts a batch into two views of as many scenes: its "halves", or "neighbours", every other row."""
    for node in nodes:
        name, before, made = operation(node), tuple(getattr(node, "_saved_self_sym_sizes", ())), made_shape(node)
        if scenes < 8 or scenes % 2 or before[:1] != (scenes,) or len(before) < 2:
            continue
        half = scenes // 2
        if name in ("Split", "Slice") and getattr(node, "_saved_dim", None) == 0 and made == (half, *before[1:]):
            step = getattr(node, "_saved_step", 1)
            return "halves" if step == 1 else "neighbours" if step == 2 else ""
        if name in ("View", "UnsafeView", "ReshapeAlias") and made in ((2, half, *before[1:]), (half, 2, *before[1:])):
            return "halves" if made[0] == 2 else "neighbours"
    return ""


def _operand(node: Any) -> Any:
    """What made the first of its operands with a gradient, before some of it was chosen."""
    for _ in range(8):
        node = next((each for each, _ in node.next_functions if each is not None), None)
        if node is None or operation(node) not in MOVING:
            break
    return node


def _of_ratio(product: Any) -> bool:
    """Whether it is a product with an exponential, clamped or not."""
    node = next((each for each, _ in product.next_functions if each is not None), None)
    if operation(product) != "Mul" or node is None:
        return False
    if operation(node).startswith("Clamp"):
        node = node.next_functions[0][0]
    return node is not None and operation(node) == "Exp"
