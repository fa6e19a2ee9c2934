"""Rules of `watch` on what stands beside the model: copies of it, states that are loaded, data that are written to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.pass_records import PassRecord
from ris_fast.health.watch.records import EARLY, LoopRecord

PLACES = 3


def state_findings(loop: LoopRecord) -> list[Finding]:
    return [
        *copy_is_trained(loop),
        *loads_its_own(loop),
        *data_written_to(loop),
        *dropout_without_gradient(loop),
    ]


def copy_is_trained(loop: LoopRecord) -> Iterator[Finding]:
    """The model is never called and no gradient comes to it; one to a copy, which no optimizer holds."""
    called = loop.forward is not None and (loop.forward.passes_heard or loop.forward.layers.calls)
    came = any(each.with_grad for by in loop.optimizers for each in by.histories.values())
    copies = [each for each in loop.forward.copies if each.with_grad and not each.held] if loop.forward else []
    if copies and not called and not came and loop.steps >= EARLY:
        compiled = copies[0].compiled
        yield finding(
            "stale_compiled_graph" if compiled else "stale_optimizer_parameters",
            f"the model that the optimizer holds is never called, and no gradient comes to it in {loop.steps} steps: a"
            f" copy of it{', which is compiled,' if compiled else ''} has gradients at {copies[0].with_grad} of"
            f" {copies[0].tensors} tensors, and no optimizer holds those.",
            loop.steps,
            advice="Call the model that the optimizer was built of, or build the optimizer of what is called.",
        )


def loads_its_own(loop: LoopRecord) -> Iterator[Finding]:
    """What is loaded are the model's own tensors."""
    if loop.kept and loop.kept[-1]:
        yield finding(
            "ema_equals_raw",
            "a state that was loaded into the model is made of the model's own tensors: it was kept by reference, and"
            " has followed every step since, so that nothing was put back.",
            loop.steps,
            MAY_BE_MEANT,
            "Keep a copy: `copy.deepcopy(model.state_dict())`.",
        )


def data_written_to(loop: LoopRecord) -> Iterator[Finding]:
    """Inputs that are slices of one tensor, which is written to, so that they come again as something near to what
    they were."""
    known: dict[tuple[int, int], PassRecord] = {}
    found: dict[tuple[int, int], bool] = defaultdict(bool)
    for each in loop.forward.passes if loop.forward is not None else ():
        if each.source is None or each.keys is None:
            continue
        place = each.source[:2]
        before, known[place] = known.get(place), each
        if before is None or before.keys is None or before.source is None or before.keys.shape != each.keys.shape:
            continue
        moved = not torch.equal(before.keys, each.keys) and before.source[2] != each.source[2]
        found[place] |= moved and _alike(before.keys, each.keys)
    if sum(found.values()) >= PLACES and all(found.values()):
        yield finding(
            "scenes_altered",
            f"inputs are slices of one tensor, which is written to: {len(found)} of them came again with other numbers"
            " that go with those of before.",
            loop.steps,
            "An augmentation that works in place does that, and adds up over the epochs.",
            "Copy a batch before it is changed: `batch = data[i:j].clone()`.",
        )


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    pair = torch.stack([one.double().flatten(), other.double().flatten()])
    return bool(pair.isfinite().all()) and float(torch.corrcoef(pair)[0, 1]) > 0.3


def dropout_without_gradient(loop: LoopRecord) -> Iterator[Finding]:
    """Dropouts that are on in calls without gradients, and in no others, within a model whose other parts are trained:
    a teacher."""
    if loop.forward is None:
        return
    for name, calls in loop.forward.layers.calls.items():
        module = loop.forward.layers.kinds[name]
        if not isinstance(module, nn.modules.dropout._DropoutNd) or not module.p or len(calls) < 4:
            continue
        of_part = [each for each in loop.parameters if each.name.startswith(name.partition(".")[0] + ".")]
        still = of_part and not any(each.trainable or each in loop.moved_outside for each in of_part)
        if still and all(each.training and not each.enabled for each in calls) and not loop.forward.passes_heard:
            yield finding(
                "train_mode_in_validation",
                f"the dropout {name} is on in all {len(calls)} calls that were looked at, and gradients are off in all"
                " of them: a teacher or a target answers with noise.",
                1,
                "A noisy teacher may be meant.",
                "Call `eval()` on the part that is not trained.",
            )
            return
