"""Rules of `watch` on the modes of a model's parts, on the state that goes from one pass to the next, and on what is
given twice. None is certain."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.pass_records import PassRecord
from ris_fast.health.watch.records import EARLY, LoopRecord

AGAIN = 16  # scenes that came again
ALIKE, APART = 0.12, 0.1  # correlation of one scene's two appearances, and how far above that of two scenes
HEAVY = 0.8  # share that a mask removes


def mode_findings(loop: LoopRecord) -> list[Finding]:
    """What the passes show."""
    if loop.forward is None:
        return []
    trained = [each for each in loop.forward.passes if each.training and each.reached]
    evaluated = [each for each in loop.forward.passes if not each.training and not each.reached and not each.grad]
    return [
        *part_left_in_evaluation(loop.forward.passes),
        *state_of_other_scenes(trained),
        *same_input_twice(trained),
        *evaluation_altered(evaluated),
        *mask_too_heavy(loop),
    ]


def part_left_in_evaluation(passes: list[PassRecord]) -> Iterator[Finding]:
    """Parts that were in training mode are in evaluation mode for good, and the model is not."""
    trained = [each for each in passes if each.reached and each.training and each.parts]
    trained = [each for each in trained if each.parts == trained[0].parts]  # else another part of a container
    late = trained[-EARLY:]
    most = max((each.parts_training for each in trained), default=0)
    if len(trained) < 2 * EARLY or trained[0].parts_training != most or late[0].parts_training >= most:
        return
    if len({each.parts_training for each in late}) == 1 and late[-1].parts_training < most:
        since = next(
            each for each in trained if all(one.parts_training < most for one in trained if one.number >= each.number)
        )
        yield finding(
            "eval_mode_in_training",
            f"since step {since.step + 1} {most - late[-1].parts_training} of {late[-1].parts} dropouts and"
            " normalisations train in evaluation mode; before that they trained in training mode, and the model still"
            " says that it does.",
            since.step + 1,
            "Statistics are sometimes frozen on purpose after a while.",
            "Call `train()` on the whole model after each evaluation: `eval()` on a part is not undone by itself.",
        )


def state_of_other_scenes(trained: list[PassRecord]) -> Iterator[Finding]:
    """A state goes from each pass to the next, row by row, and the scenes of a row do not go on."""
    carried = [each for each in trained if each.carried]
    if len(carried) < EARLY or 2 * len(carried) < len(trained):
        return
    known: dict[bytes, bytes] = {}
    again = other = 0
    for one, now in pairwise(trained):
        adjacent = now.carried and now.of_kind == one.of_kind + 1
        if not adjacent or one.keys is None or now.keys is None or one.keys.shape != now.keys.shape:
            continue
        for before, after in zip(one.keys, now.keys):
            if len(after.unique()) < 4:
                continue
            key, value = after.numpy().tobytes(), before.numpy().tobytes()
            again += key in known
            other += known.setdefault(key, value) != value
    if again >= AGAIN and 4 * other > 3 * again:
        yield finding(
            "stale_cache",
            f"the state that a pass leaves goes into the next, row by row, and of {again} scenes that came again"
            f" {other} came after another scene than before: each begins with the state of a scene that it does not"
            " follow.",
            carried[0].step + 1,
            MAY_BE_MEANT,
            "Begin each sequence with a new state, or serve the windows of a sequence in their order, each in its row.",
        )


def same_input_twice(trained: list[PassRecord]) -> Iterator[Finding]:
    """Two passes for one loss are given the same numbers, and the model draws none."""
    pairs = [(one, now) for one, now in pairwise(trained) if now.open_before and one.step == now.step]
    alike = [
        one.input is not None
        and now.input is not None
        and one.inputs == now.inputs == 1
        and torch.equal(one.input, now.input)
        and one.output is not None
        and now.output is not None
        and torch.equal(one.output, now.output)
        for one, now in pairs
    ]
    if len(alike) >= EARLY and all(alike):
        yield finding(
            "repeated_batch",
            f"two passes for one loss are given the same scenes, bit for bit, and give the same outputs, in all"
            f" {len(alike)} steps that were looked at.",
            pairs[0][0].step + 1,
            "Two views of a scene that are one tensor look like that; so does a pass too many.",
            "Draw each view by itself, and look whether the augmentation writes into its input.",
        )


def evaluation_altered(evaluated: list[PassRecord]) -> Iterator[Finding]:
    """The same scenes are evaluated in each round, each time a little otherwise."""
    rounds: dict[int, Tensor] = {}
    for each in evaluated:
        if each.input is not None and each.inputs == 1 and len(each.input) >= 4 and each.input.shape[1] >= 8:
            rounds.setdefault(each.step, each.input)
    looks = list(rounds.values())
    if len(looks) < 3 or any(each.shape != looks[0].shape for each in looks):
        return
    centre = torch.cat(looks).mean(0)
    unit = [torch.nn.functional.normalize((each - centre).double(), dim=1) for each in looks]
    matched, crossed, equal = [], [], False
    for one, other in pairwise(unit):
        table = one @ other.T
        matched += table.diagonal().tolist()
        crossed += table[~torch.eye(len(table), dtype=torch.bool)].tolist()
        equal |= bool((table.diagonal() > 1 - 1e-6).any())
    near, far = (sum(each) / len(each) for each in (matched, crossed))
    if not equal and near > ALIKE and near > far + APART:
        yield finding(
            "scenes_change",
            f"the scenes that are evaluated are the same in {len(looks)} rounds but for what is added to them: a scene"
            f" and its last appearance have a correlation of {near:.2g}, two scenes one of {far:.2g}.",
            evaluated[0].step,
            "A random augmentation in evaluation does that. " + MAY_BE_MEANT,
            "Give evaluation a transform of its own, without the random ones.",
        )


def mask_too_heavy(loop: LoopRecord) -> Iterator[Finding]:
    """A product with a random mask, as a functional dropout makes, that leaves next to nothing."""
    if loop.forward is None:
        return
    passes = [[share for share in each.masks if share > HEAVY] for each in loop.forward.shapes]
    if len(passes) >= 2 and all(passes):
        yield finding(
            "heavy_dropout",
            f"in each pass that was looked at something is multiplied by a mask that is zero at {passes[0][0]:.0%} of"
            " its places and one and the same number at the others, as a dropout does.",
            1,
            "The rate of torch's dropout is the share that is removed, not the share that is kept. " + MAY_BE_MEANT,
        )
