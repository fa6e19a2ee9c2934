"""Rules of `watch` on what happens within a model's passes: inputs that it writes into, random numbers, number formats,
and the axis that sequences run over. None is certain: each may be meant."""

from __future__ import annotations

from collections.abc import Iterator

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.records import EARLY, LoopRecord

AGAIN, EVALUATED, LAYERS = 4, 2, 2


def inside_findings(loop: LoopRecord) -> list[Finding]:
    """What the passes show; parts may be called where the model itself is not."""
    if loop.forward is None:
        return []
    return [*scenes_altered(loop), *random_evaluation(loop), *autocast_ignored(loop), *scenes_mixed(loop)]


def scenes_altered(loop: LoopRecord) -> Iterator[Finding]:
    """The model is given, at the same place in memory, what it left there, and changes it again. A buffer that is
    filled anew has other numbers, and what is the same after a second time, as after a ReLU, is not changed."""
    written = loop.forward.written
    again = sum(same and changed for same, changed in written)
    if again >= AGAIN and again == len(written):
        yield finding(
            "scenes_altered",
            f"the model writes into the tensor that it is given, and {again} times was given what it had left there,"
            " and changed it again.",
            loop.steps,
            "A state that the network itself moves on looks like that.",
        )


def random_evaluation(loop: LoopRecord) -> Iterator[Finding]:
    """All evaluations draw random numbers, and a part has a dropout that evaluation mode does not reach by itself."""
    forward = loop.forward
    if len(forward.drawn) >= EVALUATED and all(forward.drawn) and forward.own_dropouts:
        names = ", ".join(name or "the model" for name in forward.own_dropouts[:3])
        yield finding(
            "train_mode_in_validation",
            f"all {len(forward.drawn)} passes in evaluation mode, without gradients, drew random numbers, and a dropout"
            f" is called by hand in {names}: it is on in evaluation too.",
            loop.steps,
            "A model that samples on purpose draws some as well: evaluate one input twice with the rate at 0.",
        )


def autocast_ignored(loop: LoopRecord) -> Iterator[Finding]:
    """Layers with weights whose output stays in float32 within an autocast region; where it is switched off within it,
    only if something else than the model calls its layers, since a model may do that on purpose."""
    formats = loop.forward.formats
    kinds = ("ignored",) if loop.forward.passes_heard else ("ignored", "left")
    calls = sum(formats.get(kind, 0) for kind in kinds)
    if calls >= LAYERS and calls > 9 * formats.get("used", 0):
        yield finding(
            "compiled_differs",
            f"{calls} calls of layers gave float32 within an autocast region, {formats.get('used', 0)} its own format:"
            " what runs them, or has replaced them, does not heed the region.",
            loop.steps,
            MAY_BE_MEANT,
            "Enter the region within the function that is traced or compiled, and trace again.",
        )


def scenes_mixed(loop: LoopRecord) -> Iterator[Finding]:
    """A layer that takes time first is given the model's input as it is, whose first axis is that of the outputs: it
    runs over the scenes. A single stream has one scene; outputs with the second axis too have one for each time."""
    found = [
        name
        for given, gives, layers in loop.forward.sequences
        for name, first, second in layers
        if given[:2] == (first, second) and gives[:1] == (first,) and first != second > 1 and second not in gives[1:]
    ]
    passes = len(loop.forward.sequences)
    if passes >= LAYERS and len(found) >= passes and loop.steps >= EARLY:
        first, second = loop.forward.sequences[0][0][:2]
        yield finding(
            "scenes_mixed",
            f"{found[0]} takes time first (batch_first=False) and is given {first} by {second}, as the model is, which"
            f" gives {first} rows: it runs over the {first} scenes as if they were times.",
            1,
            "Where the first axis is time, and outputs are one for each time, that is right.",
            "Build the layer with `batch_first=True`, or transpose its input and output.",
        )
