"""Rules of `watch` on what goes into the model and comes out: batches that repeat, inputs that are NaN or all the same,
evaluations that differ or do not follow the weights, and what the gradient at the output says of the loss.

None is certain but two: scenes may be alike on purpose, and a loss may leave some out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.names import begins
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.pass_records import ForwardRecord, PassRecord
from ris_fast.health.watch.records import EARLY, LoopRecord

SCENES, LOOKS = 8, 4


def batch_findings(loop: LoopRecord) -> list[Finding]:
    """What the numbers that go in and out show."""
    if loop.forward is None or not loop.forward.passes:
        return []
    trained = [each for each in loop.forward.passes if each.training and each.reached]
    evaluated = [each for each in loop.forward.passes if not each.training and not each.reached and _both(each)]
    return [
        *nonfinite_inputs(loop.forward.passes),
        *softmax_twice(trained),
        *constant_input(trained),
        *(repeated_batch(trained) or one_batch(trained, evaluated)),
        *cached_validation(loop, evaluated),
        *random_evaluation(evaluated),
        *scenes_left_out(trained),
        *(shapes_broadcast(trained) if not _elementwise(loop) else ()),
        *collapsed_outputs(trained),
        *outputs_unused(loop, trained),
        *trained_on_evaluation(loop.forward),
        *ignored_input(trained),
        *unsettled_buffers(loop.forward, loop.frozen),
        *batch_shrinks(loop.forward),
    ]


def _both(each: PassRecord) -> bool:
    return each.input is not None and each.output is not None


def nonfinite_inputs(passes: list[PassRecord]) -> Iterator[Finding]:
    """The first pass whose outputs are not finite has such inputs; later ones may be fed what came out before."""
    first = next((each for each in passes if each.nonfinite_out is not None and bool(each.nonfinite_out.any())), None)
    if first is not None and first.nonfinite_in is not None and bool(first.nonfinite_in.any()):
        what = "NaN" if bool(first.nonfinite_in[0]) else "infinities"
        yield finding(
            "nonfinite_data",
            f"inputs of forward pass {first.number} have {what}, and its outputs are the first that are not finite, of"
            " those that were looked at.",
            first.step + 1,
            "Masks hold infinities on purpose."
            if not bool(first.nonfinite_out[0])
            else "No backward pass was made from it: the loop may leave such batches out."
            if first.grad and not first.reached
            else "",
        )


def softmax_twice(trained: list[PassRecord]) -> Iterator[Finding]:
    """The model ends in a softmax or sigmoid, and the gradient that arrives is that of a cross-entropy which applies
    its own: no other loss has it in batch after batch."""
    for kind, loss in (("softmax", "a cross-entropy"), ("sigmoid", "a binary cross-entropy with logits")):
        marks = [each.mark for each in trained if each.mark is not None and each.mark_kind == kind]
        if len(marks) >= LOOKS and all(float(mark[0]) < 1e-3 for mark in marks):
            yield finding(
                "softmax_twice",
                f"the model ends in a {kind}, and the gradient that arrives there is {kind}(output) minus the label, in"
                f" all {len(marks)} passes that were looked at: that of {loss}, which applies its own {kind}.",
                trained[0].step + 1,
            )


def shapes_broadcast(trained: list[PassRecord]) -> Iterator[Finding]:
    """The gradient at an output (B, 1) is that of a mean square against one number, the same for all scenes of a batch
    and another in the next: what the mean of all targets of a batch is, where shapes are broadcast."""
    marks = [each.mark for each in trained if each.mark is not None and each.mark_kind == "broadcast"]
    if len(marks) < LOOKS or any(float(mark[0]) > 1e-3 for mark in marks):
        return
    _, targets, means = torch.stack(marks).double().T
    of_outputs = float(torch.corrcoef(torch.stack([targets, means]))[0, 1].abs()) > 0.99  # as with a variance
    if float(targets.std()) > 1e-3 * float(targets.abs().mean()) and not of_outputs:
        yield finding(
            "shapes_broadcast",
            f"outputs have shape {trained[0].output_shape}, and all scenes of a batch are drawn to one number, another"
            f" in each batch ({', '.join(f'{float(each):.3g}' for each in targets[:3])}).",
            trained[0].step + 1,
            "Targets of shape (B,) do that, or targets that are the same within a batch: print both shapes.",
        )


def _elementwise(loop: LoopRecord) -> bool:
    """Whether the losses' own graph says that outputs are compared one by one."""
    told = [each for each in (*loop.losses, *loop.met) if each.direct and each.outputs is not None]
    sizes = [(math.prod(each.outputs.shape), map(math.prod, each.chain_shapes)) for each in told]
    return len(sizes) >= LOOKS and all(max(made, default=0) <= size for size, made in sizes)


def collapsed_outputs(trained: list[PassRecord]) -> Iterator[Finding]:
    """Outputs of several numbers that had all directions at first and have one at last, while inputs differ."""
    wide = [each for each in trained if _both(each) and each.output.shape[1] > 1 and len(each.output) >= LOOKS]
    for shape in dict.fromkeys(each.output_shape[1:] for each in wide):  # of parts that are called one by one, too
        yield from _collapsed([each for each in wide if each.output_shape[1:] == shape])


def _collapsed(both: list[PassRecord]) -> Iterator[Finding]:
    if len(both) < 2 * EARLY or both[0].step > EARLY:
        return
    spreads = [_spread_of_directions(each.output) for each in both]
    first, last = min(spreads[:4]), max(spreads[-EARLY:])
    if first > 0.05 and last < min(0.01 * first, 2e-3) and not any(_alike(each.input) for each in both[-EARLY:]):
        yield finding(
            "ignored_input",
            f"outputs of different scenes pointed in different directions at first (spread {first:.2g}), and in one at"
            f" last ({last:.2g}): they no longer depend on the input.",
            both[-1].step + 1,
            "Targets that are nearly the same for all scenes lead there; so does a loss that nothing keeps from a"
            " constant answer.",
        )


def _spread_of_directions(rows: Tensor) -> float:
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return float((unit - unit.mean(0)).square().sum(1).mean())


def outputs_unused(loop: LoopRecord, trained: list[PassRecord]) -> Iterator[Finding]:
    """Some of the numbers that the model answers with never have a gradient, and the others always have."""
    known = [each for each in trained if each.slope is not None and len(each.output_shape) == 2]
    known = [each for each in known if each.slope.shape[1] == each.output_shape[1] == known[0].output_shape[1]]
    if len(known) < 2 * EARLY or len(known) < sum(each.slope is not None for each in trained):
        return
    silent = torch.stack([(each.slope == 0).all(0) for each in known])
    never, now_and_then = silent.all(0), silent.any(0)
    if not never.any() or not torch.equal(never, now_and_then) or bool(never.all()):
        return
    several = bool(loop.met) and not loop.met[0].through
    why = "Other terms of the loss read them, with a weight of zero, or none does" if several else "No term reads them"
    places = ", ".join(str(each) for each in never.nonzero()[:3, 0].tolist())
    yield finding(
        "zero_loss_weight" if several else "unused_head",
        f"{int(never.sum())} of the {len(never)} numbers of each output, at place {places}, have a gradient of exactly"
        f" zero in all {len(known)} passes that were looked at, and the others have one.",
        known[0].step + 1,
        f"{why}; a mask does this, too. {MAY_BE_MEANT}",
        "Print the weight of each term as it is used, and which columns of the output each term reads.",
        harm=float(never.double().mean()),
    )


def trained_on_evaluation(forward: ForwardRecord) -> Iterator[Finding]:
    """Steps that follow passes in evaluation mode alone, among others that follow passes in training mode, from places
    of their own."""
    end = max((each.step for each in forward.passes if each.training and each.of_kind <= forward.first), default=0)
    reached = [each for each in forward.passes if each.reached and each.step <= end]
    by_step = {step: list(passes) for step, passes in groupby(reached, lambda each: each.step)}
    odd = [passes for passes in by_step.values() if not any(each.training for each in passes)]
    usual = {each.site for passes in by_step.values() for each in passes if each.training}
    apart = not usual & {each.site for passes in odd for each in passes}
    if len(odd) >= LOOKS and len(by_step) >= 2 * len(odd) and apart and len(by_step) - len(odd) >= EARLY:
        yield finding(
            "split_overlap",
            f"{len(odd)} steps that were looked at follow backward passes from outputs in evaluation mode alone, made"
            f" at {odd[0][0].place}: what is evaluated there is trained on.",
            odd[0][0].step + 1,
            "A part of training may run in evaluation mode on purpose.",
            "Evaluate within `torch.no_grad()`, and step in training only.",
        )


def constant_input(trained: list[PassRecord]) -> Iterator[Finding]:
    """All scenes of each batch are the same."""
    inputs = [each.input for each in trained if each.input is not None and each.inputs == 1]
    if len(inputs) >= EARLY and all(len(each) >= LOOKS and _alike(each) for each in inputs):
        yield finding(
            "constant_input",
            f"all scenes of a batch are the same, in {len(inputs)} batches that were looked at.",
            trained[0].step + 1,
            MAY_BE_MEANT,
        )


def _alike(rows: Tensor) -> bool:
    return bool((rows == rows[0]).all())


def one_batch(trained: list[PassRecord], evaluated: list[PassRecord]) -> list[Finding]:
    """Training reads one batch, made anew each time, and evaluation has several others of its size, as data have that
    do not fit into one."""
    seen = [each for each in trained if each.input is not None]
    alike = len(seen) >= EARLY and all(_same(seen[0], each) and not each.given_again for each in seen)
    others: list[PassRecord] = []
    for each in evaluated if alike else ():
        if each.shape == seen[0].shape and not any(_same(each, other) for other in (seen[0], *others)):
            others.append(each)
    if len(others) < LOOKS:
        return []
    return [
        finding(
            "repeated_batch",
            f"all {len(seen)} steps that were looked at read the same batch, made anew each time; evaluation has"
            f" {len(others)} others of its size.",
            seen[1].step + 1,
            "An iterator that is made for each step, `next(iter(loader))`, does that; so does one batch on purpose.",
        )
    ]


def repeated_batch(trained: list[PassRecord]) -> list[Finding]:
    """Batches come as often in a row, made anew each time: as from workers that read the same scenes. A loop that makes
    several steps with a batch gives the same tensor again. Later passes are not all looked at."""
    seen = [each for number, each in enumerate(trained, 1) if each.of_kind == number and each.input is not None]
    steps = [each.step for each in seen]
    runs: list[list[PassRecord]] = []
    for each in seen:
        if runs and _same(runs[-1][-1], each):
            runs[-1].append(each)
        else:
            runs.append([each])
    whole = runs[:-1]  # the last may go on
    count = len(whole[0]) if whole else 0
    apart = len(set(steps)) == len(steps) and not any(each.given_again for run in whole for each in run[1:])
    if count < 2 or len(whole) < LOOKS or not apart or any(len(run) != count for run in whole):
        return []
    return [
        finding(
            "repeated_batch",
            f"each batch comes {count} times in a row, at steps of their own, in {len(whole)} batches.",
            whole[0][1].step + 1,
            f"{count} workers that read the same scenes do that; so does a data set that repeats them on purpose.",
        )
    ]


def _same(one: PassRecord, other: PassRecord) -> bool:
    return one.shape == other.shape and torch.equal(one.input, other.input)


def cached_validation(loop: LoopRecord, evaluated: list[PassRecord]) -> Iterator[Finding]:
    """The same input gives the same output, bit for bit, after steps that changed weights."""
    pairs = [(one, other) for one, other in _again(evaluated) if one.step != other.step]
    equal = [torch.equal(one.output, other.output) and len(one.output.unique()) > 2 for one, other in pairs]
    if len(pairs) > 1 and all(equal) and any(each.trained for each in loop.optimizers):
        yield finding(
            "cached_validation",
            f"{len(pairs)} inputs were evaluated again after more steps, and gave the same output, bit for bit.",
            pairs[0][1].step,
            "Outputs are kept from before, or a copy computes with old weights: compare the model's parameters with "
            "those at the evaluation before.",
        )


def random_evaluation(evaluated: list[PassRecord]) -> Iterator[Finding]:
    """The same input gives another output, with the same weights."""
    whole = [
        each for each in evaluated if not each.parts_training
    ]  # else samples of dropout, or what that is named for
    pairs = [(one, other) for one, other in _again(whole) if one.step == other.step]
    apart = [_distance(one.output, other.output) > 1e-3 for one, other in pairs]
    if apart and all(apart):
        yield finding(
            "train_mode_in_validation",
            f"{len(pairs)} inputs were evaluated twice with the same weights, in evaluation mode, with other outputs.",
            pairs[0][0].step,
            "A functional dropout without `training=self.training` does that; so does a model that samples on purpose.",
        )


def _again(passes: list[PassRecord]) -> list[tuple[PassRecord, PassRecord]]:
    """Each pass with the last one before that had the same input."""
    found = []
    for number, each in enumerate(passes):
        before = next((one for one in reversed(passes[:number]) if _same(one, each)), None)
        if before is not None and before.output.shape == each.output.shape and before.inputs == each.inputs == 1:
            found.append((before, each))
    return found


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm().clamp_min(1e-12))


def scenes_left_out(trained: list[PassRecord]) -> Iterator[Finding]:
    """The same few places of each batch have a gradient at the output, whatever the batch.

    The first or last of the first axis may be a place in time.
    """
    found = [each for each in trained if each.rows is not None and len(each.rows) >= SCENES and bool(each.rows.any())]
    if len(found) < EARLY or any(not torch.equal(each.rows, found[0].rows) for each in found):
        return
    count, places = int(found[0].rows.sum()), found[0].rows.nonzero()[:, 0].tolist()
    in_time = len(found[0].shape) > 2 and count == 1 and places[0] in (0, len(found[0].rows) - 1)
    others = any(
        not torch.equal(one.input, other.input) for one, other in pairwise(found) if _both(one) and _both(other)
    )
    if 4 * count <= len(found[0].rows) and others and not in_time:
        yield finding(
            "scenes_left_out",
            f"{count} of {len(found[0].rows)} rows of the output have a gradient, the same places in all"
            f" {len(found)} batches that were looked at.",
            found[0].step + 1,
            "A mask of scenes or time steps looks like that.",
            harm=1 - count / len(found[0].rows),
        )


def ignored_input(trained: list[PassRecord]) -> Iterator[Finding]:
    """Scenes differ and outputs do not, after the first steps."""
    late = [each for each in trained if _both(each) and each.step >= EARLY and len(each.input) >= LOOKS]
    late = [each for each in late if len(each.output) == len(each.input) and not _alike(each.input)]
    if len(late) >= EARLY and all(_alike(each.output) for each in late):
        yield finding(
            "ignored_input",
            f"scenes of a batch differ and all get the same output, bit for bit, in {len(late)} batches.",
            late[0].step + 1,
            "Dead units before the last layer do that too: look whether the layers before it are zero.",
        )


def unsettled_buffers(forward: ForwardRecord, frozen: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Buffers that training passes should have settled are those of a new layer, which is not meant to stand still."""
    unsettled = [name for name in forward.unsettled if not begins(f"{name}.", frozen)]
    if unsettled and forward.steps >= EARLY:
        yield finding(
            "unsettled_buffers",
            f"{len(unsettled)}: {', '.join(unsettled[:3])}: after {forward.steps} steps they are as"
            " they were made, since the layers run in evaluation mode only.",
            forward.steps,
            MAY_BE_MEANT,
        )
    evaluated = next((each.number for each in forward.passes if not each.training), None)
    trained = next((each.number for each in forward.passes if each.training), None)
    if forward.spectral and evaluated is not None and (trained is None or evaluated < trained):
        yield finding(
            "unsettled_buffers",
            f"{', '.join(forward.spectral[:3])}: the spectral norm is used in evaluation mode before its first update,"
            " with a random vector for the largest singular one.",
            0,
            "An evaluation of untrained weights means little anyhow.",
        )


def batch_shrinks(forward: ForwardRecord) -> Iterator[Finding]:
    """All parts from some place on get the same fraction of a batch, and the model gives all of it again."""
    axes = {size for each in forward.passes for size in each.shape[1:]}
    found = [_shrunk(*each, axes) for each in forward.rows_inside]
    if len(found) >= 2 and all(found) and len({(whole / part, name) for name, whole, part in found}) == 1:
        name, whole, part = found[0]
        yield finding(
            "batch_shrinks",
            f"the model is given {whole} scenes and gives {whole}, and from {name} on its layers see {part}.",
            1,
            "A part that works on groups of scenes looks like that.",
        )


def _shrunk(whole: int, given: int, rows: list[tuple[str, int]], axes: set[int]) -> tuple[str, int, int] | None:
    """The part from which on, the scenes given, and those that are left; `given`: of the model's output; `axes`: sizes
    of the input's other axes, one of which may have become the first. A part that is called again may be given chunks.
    """
    kinds = [size for size, _ in groupby(size for _, size in rows)]
    if len(kinds) == 1 and kinds[0] not in axes and len({name for name, _ in rows}) == len(rows):
        kinds = [whole, *kinds]  # before the first part
    if given != whole or len(kinds) != 2 or kinds[0] != whole or not 1 < kinds[1] < whole or whole % kinds[1]:
        return None
    return next(name for name, size in rows if size == kinds[1]), whole, kinds[1]
