"""Rules of `watch` on forward passes: those that no backward reaches, tensors that nobody trains, and modes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.names import begins
from ris_fast.health.watch.describe import describe_steps, describe_tensors, share_of
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.pass_records import ForwardRecord, LeafRecord, PassRecord
from ris_fast.health.watch.records import EARLY, LoopRecord

ROUNDS = 3  # as many steps with the same pattern of passes are no accident
LONG = 1000  # steps after which what has not come yet is no longer waited for
FORWARD_IN_STEP = 3  # passes of one step, from the same place, of which all but one are thrown away


def forward_findings(loop: LoopRecord) -> list[Finding]:
    """What the passes and their graphs show."""
    if loop.forward is None or not loop.forward.passes:
        return []
    return [
        *no_backward(loop, loop.forward),
        *forwards_without_backward(loop.forward),
        *unregistered_parameters(loop, loop.forward),
        *parameters_of_losses(loop, loop.forward),
        *detached_backbone(loop, loop.forward),
        *switched_to_evaluation(loop.forward),
        *eval_mode_in_training(loop.forward),
        *train_mode_in_validation(loop.forward),
    ]


def no_backward(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """Steps are made, and in none a gradient came to an output or a parameter, nor did anything train them by hand. A
    loss that `seen.loss` was given says more."""
    passes = [each for each in forward.passes if each.training and each.grad and each.step < forward.steps]
    heard = [record for each in loop.optimizers for record in each.records if record.hooked]
    silent = all(len(each.none_grads) == len(each.hooked) and float(each.grad_at_step.norm()) == 0 for each in heard)
    if loop.losses or len(passes) < EARLY or len(heard) < EARLY or not silent or any(each.reached for each in passes):
        return
    if not any(each.trained for each in loop.optimizers):
        others = bool(forward.foreign_steps) or len(loop.optimizers) > 1
        yield finding(
            "detached_loss" if others else "loss_rebuilt",
            f"{forward.steps} steps were made, and of {len(passes)} forward passes in training none was reached by a"
            " backward pass, nor was any parameter: "
            + (
                "other networks are trained in between, and what they are given of this one's outputs is detached."
                if others
                else "the loss is a new tensor made of numbers, or `backward()` is not called. `loss.grad_fn` is None"
                " in the first case."
            ),
            passes[0].step + 1,
        )


def forwards_without_backward(forward: ForwardRecord) -> Iterator[Finding]:
    """Passes in training mode from one place of the program, of which some reach a backward and most do not.

    A place whose passes never do is no evidence: a critic's step, a rollout or an evaluation looks so. Certain where
    each step since the first has as many passes, only the last of them reaches a backward, no other model is trained in
    between, and no pass goes on with the graph of the one before.
    """
    trained = [each for each in forward.passes if each.training and each.grad and each.of_kind <= forward.first]
    for site in dict.fromkeys(each.site for each in trained if each.reached):
        passes = [each for each in trained if each.site == site]
        rounds = [list(each) for step, each in groupby(passes, lambda each: each.step) if step < forward.steps]
        rounds = rounds[:-1] if forward.made > forward.first else rounds  # whose end may not have been looked at
        made, thrown = sum(map(len, rounds)), sum(not each.reached for of_step in rounds for each in of_step)
        if not rounds or 2 * thrown < made or thrown < FORWARD_IN_STEP - 1:
            continue
        size = len(rounds[0])
        regular = all(_only_last(each, size) for each in rounds)
        certain = regular and forward.together and _no_healthy_loop(passes, rounds, trained)
        text = (
            f"{size} forward passes, 1 backward: {size - 1} of {size} batches reach no loss, "
            f"{describe_steps([each[0].step + 1 for each in rounds], len(rounds))}"
            if regular
            else f"{thrown} of {made} forward passes reach no backward"
        )
        yield finding(
            "forwards_without_backward",
            f"{text}. They are made at {passes[0].place}, in training mode and with gradients.",
            rounds[-1][-1].step + 1,
            "" if certain else "They may be meant for something else: a choice among passes, or another model's step.",
            harm=thrown / made,
        )
        return


def _only_last(of_step: list[PassRecord], size: int) -> bool:
    return len(of_step) == size and of_step[-1].reached and not any(each.reached for each in of_step[:-1])


def _no_healthy_loop(passes: list[PassRecord], rounds: list[list[PassRecord]], trained: list[PassRecord]) -> bool:
    """See `forwards_without_backward`."""
    steps = [each[0].step for each in rounds]
    nodes = {each.nodes for each in passes if each.nodes}
    return (
        len(rounds) >= ROUNDS
        and len(rounds[0]) >= FORWARD_IN_STEP
        and steps[0] == 0
        and all(later - step == steps[1] - steps[0] for step, later in pairwise(steps))
        and passes[-1].foreign_steps == passes[0].foreign_steps
        and len(nodes) == 1
        and len({each.shape[1:] for each in passes}) == 1
        and not any(each.reached and each.site != passes[0].site for each in trained)
    )


def unregistered_parameters(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """Tensors that outputs depend on, that no optimizer holds and nothing changes.

    Points of which a derivative is taken look like a plain tensor with a row for each scene. A random layer at the
    input, made anew in each pass, may be meant as an augmentation.
    """
    whole = sum(each.size for each in loop.parameters)
    made = [each for each in forward.leaves if each.parameter and not each.registered and each.passes == 1]
    anew = [each for each in made if not each.name and sum(other.shape == each.shape for other in made) > 1]
    if anew and forward.walked > 1:
        shapes = list(dict.fromkeys(each.shape for each in anew))
        yield finding(
            "unregistered_parameters",
            f"{len(shapes)} parameters are made anew in each of {forward.walked} forward passes, so that nothing trains"
            f" them, of shapes {', '.join(map(str, shapes[:3]))}.",
            forward.steps,
            "" if all(each.among_trained for each in anew) else "As a random augmentation of inputs that is right.",
            advice="Make the layer in `__init__`, as an attribute of the module.",
        )
        return
    idle = [
        each
        for each in forward.leaves
        if each.alive and not each.held and each.unchanged and each.passes > 1 and not begins(each.name, loop.frozen)
    ]
    for cause, leaves in (
        ("shadowed_parameters", [each for each in idle if each.registered]),
        ("unregistered_parameters", [each for each in idle if not each.registered]),
    ):
        if leaves:
            yield _idle(cause, leaves, whole, forward.steps)


def parameters_of_losses(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """Tensors of a loss that receive gradients, that no optimizer holds and nothing changes. Layers in evaluation mode,
    or many, are another network that judges the outputs."""
    idle = [each for each in forward.of_losses if each.with_grad and each.unchanged and not each.held]
    layers = [each for each in idle if each.registered]
    own = [each for each in idle if not each.registered and (each.parameter or not each.like_outputs)]
    found = own or [each for each in layers if each.training and len(layers) <= 2]
    if found and loop.steps >= EARLY:
        sizes = {each.name or f"a tensor of shape {each.shape}": each.size for each in found}
        whole = sum(each.size for each in loop.parameters) + sum(sizes.values())
        yield finding(
            "missing_from_optimizer",
            f"{describe_tensors(sizes, whole)}. The loss depends on them beside the model's outputs, gradients come to"
            " them, no optimizer holds them, and their numbers have not changed.",
            loop.steps,
            MAY_BE_MEANT,
            "Give them to the optimizer too: `[*model.parameters(), *criterion.parameters()]`.",
        )


def _idle(cause: str, leaves: list[LeafRecord], whole: int, steps: int) -> Finding:
    sizes = {each.name or f"a tensor of shape {each.shape}": each.size for each in leaves}
    part = share_of(sizes, whole + sum(sizes.values()))
    doubt = (
        "Few steps have been made so far."
        if steps < EARLY
        else "Points of which a derivative is taken look like this."
        if all(not each.parameter and each.like_outputs and each.shape for each in leaves)
        else "They are in evaluation mode, so that they may be meant to stand still."
        if all(each.training is False for each in leaves)
        else "They may be meant to stand still."
        if part > 0.5 or not any(each.with_grad for each in leaves)
        else ""
    )
    whose = "`parameters()` does not give them" if cause == "shadowed_parameters" else "they are no module's parameters"
    return finding(
        cause,
        f"{describe_tensors(sizes, whole + sum(sizes.values()))}. The output depends on them, {whose}, no optimizer"
        " holds them, and their numbers have not changed.",
        steps,
        doubt,
        harm=part,
    )


def detached_backbone(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """Parameters of parts that run in each pass and that no output depends on: their gradients stop inside the model.
    Where such a part has an auxiliary loss of its own, a gradient comes."""
    names = set(forward.outside_graph)
    silent = {
        tensor
        for optimizer in loop.optimizers
        for tensor in optimizer.tensors
        if optimizer.steps and tensor.name in names and tensor.trainable and tensor not in optimizer.trained
        if all(tensor.name in record.none_grads for record in optimizer.records if tensor.name in record.hooked)
    }
    sizes = {each.name: each.size for each in silent if not begins(each.name, loop.frozen)}
    heard = {
        name for by in loop.optimizers for each in by.records for name in each.hooked if name not in each.none_grads
    }
    never = [
        each
        for by in loop.optimizers
        for each in by.tensors
        if each.trainable and each not in silent and each not in by.trained and each.name not in heard
    ]
    if sizes and sum(each.size for each in never) <= sum(sizes.values()):  # else parts that do not run are the cause
        whole = sum(each.size for each in loop.parameters)
        yield finding(
            "detached_backbone",
            f"{describe_tensors(sizes, whole)}. Their layers run in the forward pass, and the output does not depend on"
            " them through autograd; no gradient has come to them.",
            forward.steps,
            "" if min(each.steps for each in loop.optimizers) >= LONG else "A later phase may let gradients through.",
            harm=share_of(sizes, whole),
        )


def switched_to_evaluation(forward: ForwardRecord) -> Iterator[Finding]:
    """The forward pass itself puts the whole model into evaluation mode."""
    passes = [each for each in forward.passes if each.training and each.grad and each.parts]
    if len(passes) > 1 and not any(each.training_after for each in passes):
        yield finding(
            "eval_mode_in_training",
            f"the model is in training mode before each of {len(passes)} forward passes and in evaluation mode after:"
            " `forward` calls `eval()`.",
            passes[0].step + 1,
            advice="Take `self.eval()` out of `forward`, and call `model.eval()` where you evaluate.",
        )


def eval_mode_in_training(forward: ForwardRecord) -> Iterator[Finding]:
    """Passes that a backward reaches, in evaluation mode, where the mode matters; for good after others in training
    mode, or all of them. Both may be meant."""
    trained = [each for each in forward.passes if each.reached and each.parts]
    last = [each for each in trained[-EARLY:] if not each.training]
    if len({each.step for each in last}) < min(EARLY, 4) or len(last) < min(len(trained), EARLY):
        return
    before = [each for each in trained if each.training]
    since = next(each for each in trained if not each.training and not any(e.number > each.number for e in before))
    yield finding(
        "eval_mode_in_training",
        f"since step {since.step + 1} the model trains in evaluation mode; before that it trained in training mode."
        if before
        else f"all {len(trained)} passes that a backward reached ran in evaluation mode.",
        since.step + 1,
        f"A backbone is sometimes tuned so. {MAY_BE_MEANT}",
    )


def train_mode_in_validation(forward: ForwardRecord) -> Iterator[Finding]:
    """Evaluation with parts in training mode; or passes in runs, without gradients, in training mode, where the model
    is never in evaluation mode. Averages over dropout, and statistics gathered anew, look so."""
    used = {each.site for each in forward.passes if each.reached}
    idle = [each for each in forward.passes if each.parts and not each.reached]
    threads = {each.thread for each in forward.passes if each.reached}  # an actor's passes are no validation
    quiet = [each for each in idle if (not each.grad or each.site not in used) and each.thread in threads]
    evaluated = [each for each in forward.passes if not each.training and not each.reached and each.parts]
    by_step = [list(each) for _, each in groupby(evaluated, lambda each: each.step)]
    if by_step and all(map(_same_inputs, by_step)):
        return  # samples of dropout
    if len(evaluated) > 1 and all(each.parts_training for each in evaluated):
        yield finding(
            "train_mode_in_validation",
            f"{evaluated[0].parts_training} of {evaluated[0].parts} dropouts and normalisations are in training mode"
            " while the model is in evaluation mode.",
            evaluated[0].step,
            "Averages over dropout are made so on purpose.",
        )
        return
    trained = {each.step for each in forward.passes if each.reached}
    runs = [list(each) for _, each in groupby(quiet, lambda each: each.step)]
    rounds = [each for each in runs if all(one.training and one.parts_training for one in each)]
    rounds = [each for each in rounds if not _same_inputs(each)]  # samples of dropout
    steps = max(len(trained), rounds[-1][0].step) if rounds else 0
    if len(rounds) > 1 and not evaluated and 4 * len(rounds) <= steps:
        first = rounds[0][0].step
        since = f", first {f'after step {first}' if first else 'before the first step'}"
        yield finding(
            "train_mode_in_validation",
            f"{sum(map(len, rounds))} forward passes that no backward reached, in {len(rounds)} of the intervals"
            f" between steps, ran in training mode{since}, and none in evaluation mode.",
            rounds[-1][0].step,
            "Statistics that are gathered anew, or averages over dropout, look the same.",
        )


def _same_inputs(passes: list[PassRecord]) -> bool:
    """Whether an input is given again within a round."""
    inputs = [each.input for each in passes if each.input is not None]
    return any(torch.equal(one, other) for one, other in pairwise(inputs))
