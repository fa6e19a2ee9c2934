"""What the graph of a told loss and the gradient at its outputs show: which way it pulls them, what its operations were
given, and whether something divides it after it was told.

Legend: B scenes, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ris_fast.health.watch.eager import eager_hook
from ris_fast.health.watch.graph import MOVING
from ris_fast.health.watch.loss_records import LossSigns
from ris_fast.health.watch.operations import operation, saved_tensor
from ris_fast.health.watch.tensors import LARGE, is_plain

SEEN = 256  # operations of a loss that are looked at
LOGARITHMIC = {"NllLoss": "nll_loss", "NllLoss2D": "nll_loss", "KlDiv": "kl_div"}  # that expect logarithms
RAW = {"Addmm", "Mm", "Add", "Convolution", "Relu", "Bmm"}  # what gives no logarithm of probabilities
ENDS = {"Softmax": "softmax", "Sigmoid": "sigmoid"}
# What takes outputs to other numbers than those that targets are compared with.
BENT = {"LogSoftmax", "BinaryCrossEntropyWithLogits", "Softplus", "LogSigmoidForward", "Softmax", "Sigmoid", "Tanh"}
BENT |= {"Exp", "Log", "Log1p", "Expm1", "Cos", "Sin", "Fft", "FftR2C", "FftC2C", "Convolution", "Mm", "Bmm", "Addmm"}
# What keeps the order of numbers: a gradient towards labels of 0 and 1 has the same sign on both sides.
MONOTONE = {"BinaryCrossEntropyWithLogits", "Sigmoid", "Softplus", "LogSigmoidForward", "Tanh", "Exp", "Log"}
OF_VARIANCE = {"Exp", "Log", "Softplus"}


def signs_of(loss: Any, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> LossSigns:
    """Of a loss with a history. Reads nothing from the device."""
    signs = LossSigns(looked=True)
    ends = {each.grad_fn for each in outputs if each.grad_fn is not None}
    stack, seen, names = [loss.grad_fn], {loss.grad_fn}, set()
    while stack and len(seen) < SEEN:
        node = stack.pop()
        _look(node, signs)
        names |= set() if node in ends else {operation(node)}
        for after, _ in () if node in ends else node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)
    names |= {operation(node) for node in ends} & {"LogSoftmax"}
    both = outputs and targets and outputs[0].device == targets[0].device
    pull = pull_towards(outputs[0], targets[0], names & BENT) if both else None
    apart = distances(outputs[0], targets[0]) if both else None
    if (pull is not None or apart is not None) and outputs[0].requires_grad:

        def pulled(grad: Tensor) -> None:
            grad = grad.detach()
            signs.pull = None if pull is None else pull(grad)
            if apart is not None and (reached := grad != 0).shape[:1] == apart.shape[:1]:
                reached = reached if reached.ndim == apart.ndim else reached.any(1)
                far = torch.where(reached, apart, -torch.inf).amax()
                near = torch.where(reached, torch.inf, apart).amin()
                signs.easiest = torch.stack([reached.float().mean(), far, near])

        outputs[0].register_hook(eager_hook(pulled))
    return signs


def distances(outputs: Tensor, targets: Tensor) -> Tensor | None:
    """How wrong each output is, in an order that losses have too: of numbers, of labels of 0 and 1, and of classes
    (scores on the second axis). None for a large number of them."""
    if not is_plain(outputs) or not is_plain(targets) or outputs.is_complex() or targets.is_complex():
        return None
    if not outputs.ndim or not targets.numel() or not 0 < outputs.numel() < LARGE:
        return None
    made, asked = outputs.detach(), targets.detach()
    if made.shape == asked.shape and asked.is_floating_point():
        whole = ((asked == 0) | (asked == 1)).all()
        return torch.where(whole, (1 - 2 * asked) * made, (made - asked).abs()).float()
    if made.ndim > 1 and asked.shape == made.shape[:1] + made.shape[2:] and not asked.is_floating_point():
        own = made.gather(1, asked.long().clamp(0, made.shape[1] - 1)[:, None])[:, 0]
        return (made.float().logsumexp(1) - own).float()
    return None


def _look(node: Any, signs: LossSigns) -> None:
    name = operation(node)
    if name in LOGARITHMIC and not signs.unlogged:
        before = _before(node)
        if before in RAW or before in ENDS:
            signs.unlogged = (LOGARITHMIC[name], before)
            signs.most_logged = _most(saved_tensor(node, "self"))
    elif name == "Sub" and not signs.unlogged and (given := _in_divergence(node)) is not None:
        signs.unlogged = ("kl_div", operation(given))
        signs.most_logged = _most(saved_tensor(given, "result"))
    elif name.startswith("BinaryCrossEntropy") and signs.asked is None:
        if (target := saved_tensor(node, "target")) is not None:
            signs.asked = torch.stack(target.detach().float().aminmax())


def _most(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().float().amax()


def _in_divergence(node: Any) -> Any:
    """The softmax or sigmoid that `kl_div` is given: it takes its product with the targets from a number that has no
    gradient."""
    if len(node.next_functions) != 2:
        return None  # a number taken off
    (first, _), (second, _) = node.next_functions
    if first is not None or second is None or operation(second) != "Mul":
        return None
    factors = [after for after, _ in second.next_functions if after is not None]
    return factors[0] if len(factors) == 1 and operation(factors[0]) in ENDS else None


def _before(node: Any) -> str:
    """The operation that makes its first operand, behind those that move numbers only."""
    for _ in range(8):
        node = node.next_functions[0][0] if node is not None and node.next_functions else None
        if node is None or operation(node) not in MOVING:
            break
    return "" if node is None else operation(node)


def pull_towards(outputs: Tensor, targets: Tensor, bent: set[str]) -> Callable[[Tensor], Tensor] | None:
    """For the gradient at these outputs: () from 1, straight towards the targets, to -1, away from them; None where
    they cannot be compared. `bent`: operations of the loss that take outputs to other numbers."""
    if not is_plain(outputs) or not is_plain(targets) or outputs.is_complex() or targets.is_complex():
        return None
    made, asked = outputs.detach(), targets.detach()
    if asked.is_floating_point() and made.ndim == asked.ndim == 2 and made.shape[1] == 2 * asked.shape[1]:
        made, bent = made[:, : asked.shape[1]], bent - OF_VARIANCE  # a mean and a variance of each
    if asked.is_floating_point() and made.shape == asked.shape and not bent:
        apart = (made - asked).flatten().float()

        def of_numbers(grad: Tensor) -> Tensor:
            slope = (grad if grad.shape == made.shape else grad[:, : made.shape[1]]).detach().flatten().float()
            near = torch.nn.functional.cosine_similarity(slope, torch.where(slope != 0, apart, 0.0), dim=0)
            return torch.where((slope != 0).any(), near, torch.nan)

        return of_numbers
    if asked.is_floating_point() and made.shape == asked.shape and bent <= MONOTONE:
        whole = ((asked == 0) | (asked == 1)).all()

        def of_labels(grad: Tensor) -> Tensor:
            slope = grad.detach().float()
            pull = (slope * (1 - 2 * asked)).sum() / slope.abs().sum()
            return torch.where(whole, pull, torch.nan)

        return of_labels
    if (
        {"LogSoftmax", "Softmax"} & bent
        and not asked.is_floating_point()
        and made.ndim == 2
        and asked.shape == made.shape[:1]
        and made.shape[1] > 1
    ):

        def of_classes(grad: Tensor) -> Tensor:
            own = grad.detach().gather(1, asked.long().clamp(0, made.shape[1] - 1)[:, None])
            return -2 * own.sum() / grad.detach().abs().sum().clamp_min(1e-30)

        return of_classes
    return None
