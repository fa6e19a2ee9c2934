"""Preflight of the parameters: set membership and identity, no threshold anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import permutations

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ris_fast.config.spelling import words
from ris_fast.health.finding import Finding
from ris_fast.health.names import begins
from ris_fast.health.preflight.autograd import graph_of
from ris_fast.health.preflight.measures import listed, rms
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.own import OwnNetwork

MOSTLY_FROZEN = 0.5  # of the weights: less are as likely frozen on purpose, as random features or fixed maps are
STANDARD = (nn.Linear, nn.modules.conv._ConvNd, nn.LayerNorm, nn.Embedding, nn.RMSNorm)


def frozen(context: PreflightContext) -> Iterator[Finding]:
    """Parameters that do not require a gradient and are not named in health.frozen."""
    allowed = words(context.config.health.frozen)
    names = [n for n, p in context.parameters.items() if not p.requires_grad and not begins(n, allowed)]
    if names:
        share = sum(context.parameters[name].numel() for name in names) / max(
            1, sum(p.numel() for p in context.parameters.values())
        )
        yield Finding(
            "frozen_parameters",
            f"{len(names)} of {len(context.parameters)} tensors ({share:.0%} of the weights) "
            f"do not require a gradient: {listed(names)}.",
            certain=share >= MOSTLY_FROZEN and not _adapted(context, names),
        )


def _adapted(context: PreflightContext, names: list[str]) -> bool:
    """Whether beside each frozen matrix two trainable ones of a lower rank make one of its shape, as adapters do."""
    matrices = [context.parameters[name].shape for name in names if context.parameters[name].dim() > 1]
    pairs = list(permutations([p.shape for p in context.trainable.values() if p.dim() == 2], 2))
    made = {
        (rows, columns)
        for one, other in pairs
        for rows, rank in (one, one[::-1])
        for inner, columns in (other, other[::-1])
        if rank == inner and rank < min(rows, columns)
    }
    return bool(matrices) and all(tuple(shape) in made for shape in matrices)


def membership(context: PreflightContext) -> Iterator[Finding]:
    """Every trainable parameter is in the optimizer exactly once, and nothing else is."""
    grouped = [
        (group.get("name", f"group {number}"), parameter)
        for number, group in enumerate(context.optimizer.param_groups)
        for parameter in group["params"]
    ]
    times = Counter(id(parameter) for _, parameter in grouped)
    own = {id(parameter): name for name, parameter in context.parameters.items()}
    twice = [own.get(key, "a tensor of no module") for key, count in times.items() if count > 1]
    if twice:
        yield Finding(
            "duplicate_parameters", f"{len(twice)} tensors are in the optimizer more than once: {listed(twice)}."
        )
    strangers = [where for where, parameter in grouped if id(parameter) not in own]
    if strangers:
        yield Finding(
            "stale_optimizer_parameters",
            f"{len(strangers)} of the optimizer's {len(grouped)} tensors are not "
            f"parameters of the network (in {listed(sorted(set(strangers)))}).",
        )
    missing = [name for key, name in own.items() if key not in times and context.parameters[name].requires_grad]
    if missing:
        yield Finding(
            "missing_from_optimizer",
            f"{len(missing)} of {len(own)} trainable tensors are in no group of the optimizer: {listed(missing)}.",
        )


def tied(context: PreflightContext) -> Iterator[Finding]:
    """No two names share one tensor or one piece of memory."""
    by_address: dict[int, list[str]] = {}
    for name, parameter in context.model.named_parameters(remove_duplicate=False):
        by_address.setdefault(parameter.data_ptr() if parameter.numel() else id(parameter), []).append(name)
    shared = [names for names in by_address.values() if len(names) > 1]
    if shared:
        yield Finding(
            "tied_parameters",
            f"{len(shared)} tensors have more than one name: {' = '.join(shared[0])}.",
            certain=not isinstance(context.model, OwnNetwork),  # theirs may share on purpose
        )


def unregistered(context: PreflightContext) -> Iterator[Finding]:
    """Layers keep their weights as parameters, and the loss reaches no leaf that is not one."""
    plain = [
        f"{name}.weight"
        for name, module in context.model.named_modules()
        if isinstance(module, STANDARD) and "weight" not in module._parameters and not _made_of_others(module)
    ]
    if plain:
        yield Finding("unregistered_parameters", f"{listed(plain)} is a buffer or a plain attribute, not a parameter.")
    own = {id(parameter) for parameter in context.parameters.values()}
    own |= {id(parameter) for group in context.optimizer.param_groups for parameter in group["params"]}
    found = eager_leaves(context)  # held, so that no other tensor gets the identity of one of them
    strangers = [leaf for key, leaf in found.items() if key not in own]
    if strangers and not any(isinstance(leaf, nn.Parameter) for leaf in strangers):
        again = eager_leaves(context)  # an activation is a new one in each call, a weight is the same
        strangers = [leaf for leaf in strangers if id(leaf) in again]
    registered = {id(p): name for name, p in nn.Module.named_parameters(context.model)}
    hidden = [registered[id(leaf)] for leaf in strangers if id(leaf) in registered]
    strangers = [leaf for leaf in strangers if id(leaf) not in registered]
    anew = [name for name in hidden if name in context.parameters]  # the name is known, and held another tensor
    if anew:
        yield Finding(
            "missing_from_optimizer",
            f"a forward pass puts other tensors in the place of {len(anew)} parameters of the network: {listed(anew)}."
            " The optimizer holds those of before, which nothing uses any more, and no step moves the new ones.",
            advice="Compute what forward needs in a local variable, as weight = self.layer.weight.clamp(-1, 1), or with"
            " torch.nn.utils.parametrize; assign nn.Parameter(...) in the constructor alone.",
        )
        return
    if hidden:
        kind = type(context.model).__name__
        yield Finding(
            "shadowed_parameters",
            f"{len(hidden)} tensors are parameters of modules of the network that the loss reaches, and"
            f" {kind}.parameters()"
            f" or named_parameters() leaves them out: {listed(hidden)}. No optimizer is given them.",
            advice="Remove the method of your own that lists parameters, or let it end in super().named_parameters().",
        )
    if strangers:
        yield Finding(
            "unregistered_parameters",
            f"the loss reaches {len(strangers)} tensors that are parameters of no module "
            f"of the network, the first of shape {tuple(strangers[0].shape)}.",
        )
        return
    if not hidden and (alone := _in_total_alone(context, own)):
        yield Finding(
            "unregistered_parameters",
            f"the total that is minimised depends on {len(alone)} tensors that ask for a gradient, the first of shape"
            f" {tuple(alone[0].shape)}, and neither network nor optimizer holds them: what weighs the loss is never"
            " trained. Where another optimizer has them, that is meant.",
            certain=False,
        )


def _in_total_alone(context: PreflightContext, own: set[int]) -> list[torch.Tensor]:
    """Leaves that the total reaches beside prediction and terms, the same ones in two calls."""
    with context.as_written():
        found = [graph_of(total).leaves if (total := context.run()[0]).requires_grad else {} for _ in range(2)]
    return [leaf for key, leaf in found[0].items() if key in found[1] and key not in own and leaf.requires_grad]


def _made_of_others(module: nn.Module) -> bool:
    """Whether its weight is computed from parameters: by torch's parametrizations, or its older weight_norm."""
    return is_parametrized(module, "weight") or any(name.startswith("weight_") for name in module._parameters)


def eager_leaves(context: PreflightContext) -> dict[int, torch.Tensor]:
    """Leaves that the network itself, not what was made of it, and the loss reach."""
    with context.as_written():
        total, terms, prediction = context.run()
    leaves: dict[int, torch.Tensor] = {}
    for value in [*(each for each in prediction if each is not None), *terms.values()]:
        if value.requires_grad:
            leaves |= graph_of(value).leaves
    return leaves


def changed_by_a_pass(context: PreflightContext) -> list[str]:
    """Trainable tensors whose numbers a training pass changes."""
    if "changed by a pass" not in context.known:
        context.known["changed by a pass"] = _changed(context, context.run)
    return context.known["changed by a pass"]


def _changed(context: PreflightContext, run: Callable[[], object]) -> list[str]:
    """Trainable tensors, all moved a little, whose numbers `run` changes: what an earlier pass has bounded would be
    left as it is."""
    live, generator = context.trainable, torch.Generator().manual_seed(73)
    ways = [0.1 * (rms(each) or 0.1) * torch.randn(each.shape, generator=generator).to(each) for each in live.values()]
    context.model.train()
    with context.moved(list(live.values()), ways, 1.0):
        kept = {name: value.detach().clone() for name, value in live.items()}
        run()
        return [name for name, value in live.items() if not torch.allclose(value, kept[name], 0.0, 0.0, equal_nan=True)]


def left_alone(context: PreflightContext) -> Iterator[Finding]:
    """A forward pass reads the weights and does not change them."""
    names = changed_by_a_pass(context)

    def pass_on() -> None:
        context.loss(context.step.predict(context.scenes), context.scenes)

    # A first pass may set weights by its scenes, and buffers, left as they are behind it, say that it has.
    if names:
        pass_on()
    if names and _changed(context, pass_on):
        yield Finding(
            "weights_changed_outside",
            f"a forward pass of network and loss changes {len(names)} of {len(context.trainable)} trainable tensors:"
            f" {listed(names)}. It writes into them, as a clamp, a renormalisation or an average by .data or under"
            " no_grad does, and undoes what the optimizer has done.",
            advice="Compute another tensor from the weight, as torch.nn.utils.parametrize does, and leave the weight"
            " itself to the optimizer. Where weights are projected on purpose, that belongs behind the step.",
            certain=False,
        )


def precision(context: PreflightContext) -> Iterator[Finding]:
    """Weights have a format that small updates survive in."""
    low = [name for name, parameter in context.parameters.items() if parameter.dtype in (torch.float16, torch.bfloat16)]
    if low:
        yield Finding("low_precision_weights", f"{len(low)} tensors are kept in 16 bits: {listed(low)}.")


CHECKS = {
    "every parameter is trainable or named frozen": frozen,
    "every parameter is in the optimizer once": membership,
    "no two layers share a tensor": tied,
    "every weight is a parameter of the network": unregistered,
    "weights are kept in 32 bits": precision,
    "a forward pass leaves the weights alone": left_alone,
}
