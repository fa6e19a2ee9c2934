"""Preflight of which scenes and which micro-batches are learned from: the gradient apart for each.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from re import sub

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.autograd import flattened_at
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import all_finite, listed
from ris_fast.health.preflight.persistent import persistent
from ris_fast.health.preflight.probe import PreflightContext, layer_calls
from ris_fast.health.preflight.terms import leaf
from ris_fast.health.preflight.truth import COVARIANCE
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.validation import scene_nmse

MOST = 256  # scenes of a micro-batch that are looked at
RIGHT = 1e-4  # NMSE below which a scene may have nothing to say
FEW_MISSED, HALF = 0.1, 0.5  # shares of the scenes from which something is said
FEWEST = 3  # scenes that have one value
MICRO_BATCHES, MOST_TRIED = 4, 64  # of a step, and scenes of each
OTHER_ORDER, PERIODS = (1, 0, 3, 2, 3, 1, 2, 0), (2, 3, 4)  # in which they come again; of a switch by the call's number


def scenes_learned_from(context: PreflightContext) -> Iterator[Finding]:
    """Every scene of a micro-batch whose prediction is not right has a gradient at the output, and in each layer.

    Two draws of random numbers: a layer or a scene that is dropped by chance comes back.
    """
    scenes = context.groups[0][0][:MOST]
    if scenes.batch < 2:
        return
    total, terms, prediction, layers = _forward(context, scenes, 1)
    outputs = [value for value in prediction if value is not None and value.requires_grad]
    if not total.requires_grad or not outputs or not bool(total.isfinite()):
        return
    at_output = [part for part in derivatives(total, outputs, retain_graph=True) if part is not None]
    if not at_output or not all(bool(part.isfinite().all()) for part in at_output):
        return
    reached = _rows(at_output)
    if not bool(reached.any()):
        return  # no gradient at all has names of its own
    if float(reached.float().mean()) < 1 - FEW_MISSED:
        total, _, again, _ = _forward(context, scenes, 2)
        outputs = [value for value in again if value is not None and value.requires_grad]
        reached |= _rows([part for part in derivatives(total, outputs) if part is not None])
        left_out = ~reached & _has_slope(context, prediction, scenes, ~reached)
        share = float(left_out.float().mean())
        hardest = share > FEW_MISSED and _easiest(context, prediction, scenes, left_out)
        if share > FEW_MISSED and not (hardest and share <= 1 - FEW_MISSED):
            own = getattr(context.loss, "own_name", "")
            more = " They are those of the lowest loss: where hard examples are mined on purpose, that is meant."
            yield _left_out(
                scenes,
                left_out,
                "no gradient at the output",
                certain=share > HALF and not own,
                more=more if hardest else "",
            )
        return
    if (finding := _without_factor(context, prediction, scenes, terms)) is not None:
        yield finding
        return
    if (finding := _without_count(context, prediction, scenes, terms)) is not None:
        yield finding
        return
    if not layers:
        return
    partly = _lost_inside(layers, derivatives(total, list(layers.values()), retain_graph=True))
    lost = {name: rows for name, rows in partly.items() if _most(rows)}
    if not lost or _parts_for_some(partly, lost):
        return
    total, _, _, layers = _forward(context, scenes, 2)
    again = _lost_inside(layers, derivatives(total, list(layers.values())))
    lost = {name: both for name in lost if name in again and _most(both := lost[name] & again[name])}
    if lost and (flat := flattened_at(_forward(context, scenes, 1)[0])):
        yield Finding(
            "saturated_output",
            f"most of the gradient's numbers arrive at {listed(list(dict.fromkeys(flat)))} and leave as zero: what is"
            f" given there lies where it is flat, and {max(int(each.sum()) for each in lost.values())} of"
            f" {scenes.batch} scenes have no gradient at {listed(list(lost))}.",
            advice="Print what the sigmoid, softmax or tanh is given. Bring it to numbers of order one.",
            certain=False,
        )
        return
    if lost:
        name = max(lost, key=lambda each: int(lost[each].sum()))
        more = f"a gradient at the output and none at {listed(list(lost))}"
        yield _left_out(scenes, lost[name], more, certain=False)


def _without_factor(
    context: PreflightContext, prediction: Prediction, scenes: Scenes, terms: dict[str, Tensor]
) -> Finding | None:
    """Scenes of whose covariance the loss says nothing, whatever other terms say of them. A loss that leaves those out
    which are right already is no mistake."""
    without = _not_told(context, prediction, terms)
    if without is None or float(without.float().mean()) <= FEW_MISSED:
        return None
    _, terms, again, _ = _forward(context, scenes, 2)
    other = _not_told(context, again, terms)
    without &= without if other is None else other
    share = float(without.float().mean())
    with torch.no_grad():
        score = scene_nmse(prediction, scenes)
    if share <= FEW_MISSED or not bool(score.isfinite().all()):
        return None
    left, kept = score[without], score[~without]
    if float(left.max()) <= float(kept.min()) * (1 + RIGHT):
        return None
    easiest = float(kept.max()) <= float(left.min()) * (1 + RIGHT)
    if easiest and (bound := _one_value(context, prediction, scenes, without)) is not None:
        return Finding(
            "clamped_loss",
            f"{int(without.sum())} of {scenes.batch} scenes of a micro-batch, those with the highest NMSE"
            f" ({float(left.min()):.3g} and more), have no gradient of what compares them with the truth, and each by"
            f" itself has the same loss, {bound:.3g}: it is held at a bound, and what is furthest from the truth is not"
            " learned from.",
            certain=share > HALF,
        )
    which = (
        f" They are those with the highest NMSE, {float(left.min()):.3g} and more: the loss keeps the easiest scenes."
        if easiest
        else ""
    )
    return _left_out(
        scenes,
        without,
        "no gradient of what compares them with the truth",
        certain=easiest and share > HALF,
        more=which,
    )


def _without_count(
    context: PreflightContext, prediction: Prediction, scenes: Scenes, terms: dict[str, Tensor]
) -> Finding | None:
    """Scenes of some counts of sources that the count's term, or one of the user's own, says nothing of: a
    cross-entropy always has a slope."""
    outputs = [value for value in prediction if value is not None and value.requires_grad]
    logits, own = prediction.count_logits, getattr(context.loss, "own_name", "")
    for name in ("count", own):
        if name not in terms or not terms[name].requires_grad or logits is None or logits.shape[1] < 2:
            continue
        parts = [part for part in derivatives([terms[name]], outputs, retain_graph=True) if part is not None]
        without = ~_rows(parts) if parts and all_finite(parts) else torch.ones(0, dtype=torch.bool)
        kept = {int(each) for each in scenes.count[~without]} if len(without) else set()
        counts = sorted({int(each) for each in scenes.count[without]} - kept) if kept else []
        if counts and float(without.float().mean()) > FEW_MISSED:
            return _left_out(
                scenes,
                without,
                f"no gradient of the term {name}",
                certain=False,
                more=f" They are those with {listed([str(each) for each in counts])} sources: a label that is ignored"
                " (ignore_index), a weight of a class that is zero, or a mask does that.",
            )
    return None


@torch.no_grad()
def _one_value(context: PreflightContext, prediction: Prediction, scenes: Scenes, rows: Tensor) -> float | None:
    """The value that the terms of the covariance, or the user's own, have for each of these scenes by itself; None
    where it is not one."""
    values, named = set(), (*COVARIANCE, getattr(context.loss, "own_name", ""))
    for row in rows.nonzero()[:FEWEST, 0].tolist():
        one = slice(row, row + 1)
        terms = context.loss(prediction.apply(lambda value, one=one: value[one]), scenes[one])[1]
        values.add(tuple(float(terms[name]) for name in named if name in terms))
    return next(iter(values))[0] if len(values) == 1 and int(rows.sum()) >= FEWEST else None


def _not_told(context: PreflightContext, prediction: Prediction, terms: dict[str, Tensor]) -> Tensor | None:
    """Scenes at whose factor the covariance terms have no gradient, (B,); None where they have none anywhere."""
    weights, own = context.loss.weights, getattr(context.loss, "own_name", "")
    kinds = [[name for name in names if weights.get(name, 0.0) > 0 and name in terms] for names in (COVARIANCE, (own,))]
    told: dict[float, Tensor] = {}
    for names in kinds:
        parts = [weights[name] * terms[name] for name in names if terms[name].requires_grad]
        if parts and prediction.factor.requires_grad:
            (found,) = derivatives(parts, [prediction.factor], retain_graph=True)
            if found is not None and bool(found.any()) and all_finite([found]):
                told[float(found.norm())] = ~_rows([found])
    return told[max(told)] if told else None  # of a term of the user's own, where that is the main one


def _lost_inside(layers: dict[str, Tensor], parts: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Name of each layer that is reached for some scenes and not for others -> the scenes that it is not, (B,)."""
    rows = {name: ~_rows([part]) for name, part in zip(layers, parts) if part is not None}
    return {name: lost for name, lost in rows.items() if bool(lost.any()) and not bool(lost.all())}


def _parts_for_some(partly: dict[str, Tensor], lost: dict[str, Tensor]) -> bool:
    """Whether layers that differ in a number of their names share the scenes among them, as the experts of a router."""
    kinds = {sub(r"\d+", "#", name) for name in lost}
    shared = torch.stack([rows for name, rows in partly.items() if sub(r"\d+", "#", name) in kinds])
    return len(shared) > 1 and float(shared.all(0).float().mean()) <= FEW_MISSED


def _most(rows: Tensor) -> bool:
    return float(rows.float().mean()) > HALF


def _left_out(scenes: Scenes, rows: Tensor, what: str, *, certain: bool, more: str = "") -> Finding:
    """Certain where more than half of the scenes are left out at the output, which no selection of hard ones does."""
    first = ", ".join(str(int(each)) for each in scenes.index[rows][:3])
    return Finding(
        "scenes_left_out",
        f"{int(rows.sum())} of {scenes.batch} scenes of a micro-batch have {what}, although their predictions are not"
        f" right; first scenes {first}. The network learns from {1 - float(rows.float().mean()):.0%} of what it is"
        f" shown.{more}",
        certain=certain,
    )


def _forward(
    context: PreflightContext, scenes: Scenes, seed: int
) -> tuple[Tensor, dict[str, Tensor], Prediction, dict[str, Tensor]]:
    """Total, terms and prediction in training mode, and what each layer answered that has a row a scene."""
    layers: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad and output.dim() and output.shape[0] == scenes.batch:
            layers.setdefault(name, output)

    with layer_calls(context.model, keep):
        total, terms, prediction = context.run(scenes, seed=seed)
    return total, terms, prediction, layers


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """Scenes for which any of the gradients is not zero, (B,)."""
    return torch.stack([part.flatten(1).bool().any(1) for part in parts]).any(0)


@torch.no_grad()
def _easiest(context: PreflightContext, prediction: Prediction, scenes: Scenes, rows: Tensor) -> bool:
    """Whether some scenes are those that have the lowest loss by themselves: the loss then learns from the hardest."""
    values = torch.tensor(
        [
            float(context.loss(prediction.apply(lambda value, at=at: value[at : at + 1]), scenes[at : at + 1])[0])
            for at in range(scenes.batch)
        ]
    )
    rows = rows.cpu()
    kept, left = values[~rows], values[rows]
    return len(kept) > 0 and float(left.max()) <= float(kept.min()) + RIGHT * float(kept.abs().max())


def _has_slope(context: PreflightContext, prediction: Prediction, scenes: Scenes, rows: Tensor) -> Tensor:
    """Of some scenes, whether the loss of each alone has a gradient at the output: (B,)."""
    found = torch.zeros_like(rows)
    for row in rows.nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        alone = prediction.apply(lambda value, one=one: leaf(value[one]))
        total = context.loss(alone, scenes[one])[0]
        outputs = [value for value in alone if value is not None]
        if total.requires_grad and float(total.detach()) > RIGHT:
            parts = derivatives(total, outputs)
            found[row] = any(part is not None and bool(part.any()) for part in parts)
    return found


# ---- micro-batches
# ----------------------------------------------------------------------------------------------------


def micro_batches(context: PreflightContext) -> Iterator[Finding]:
    """Every micro-batch of a step reaches the same tensors, whichever random numbers are drawn."""
    group = [scenes[:MOST_TRIED] for scenes in context.groups[0][:MICRO_BATCHES]]
    live = list(context.trainable)
    if len(group) < 2 or not live:
        return
    order = [*range(len(group)), *(row % len(group) for row in OTHER_ORDER)]
    missing = _missing(context, [group[row] for row in order[: max(4, len(group))]])
    if missing is None or all(each == missing[0] for each in missing):
        return
    missing = _missing(context, [group[row] for row in order])
    if missing is None:
        return
    period = next((p for p in PERIODS if all(each == missing[k % p] for k, each in enumerate(missing))), 0)
    by_scenes = all(each == missing[row] for row, each in zip(order, missing))
    if not period and not by_scenes:
        return  # it follows random numbers, as a layer that is dropped by chance does
    shown = max(range(len(missing)), key=lambda number: len(missing[number]))
    names = [live[number] for number in sorted(missing[shown] - frozenset.intersection(*missing))]
    seen = f"{len(names)} of {len(live)} tensors receive no gradient from some micro-batches of a step: {listed(names)}"
    if period and not by_scenes:
        every = {2: "second", 3: "third"}.get(period, "fourth")
        seen += f"; it is every {every} call in turn, whichever scenes it has. Where tasks take turns, that is meant"
    elif not period:
        seen += (
            "; it is the same scenes each time. Where parts of the network are for some scenes only, as experts are,"
            " that is meant"
        )
    yield Finding("micro_batches_differ", f"{seen}.", certain=False)


def _missing(context: PreflightContext, group: Sequence[Scenes]) -> list[frozenset[int]] | None:
    """Numbers of the trainable tensors that each micro-batch gives no gradient to, one after the other."""
    live, found = list(context.trainable.values()), []
    context.model.train()
    torch.manual_seed(1)
    for scenes in group:
        total = context.loss(context.step.predict(scenes), scenes)[0]
        if not total.requires_grad or not bool(total.isfinite()):
            return None
        parts = derivatives(total, live)
        found.append(frozenset(n for n, part in enumerate(parts) if part is None or not bool(part.any())))
    return found


SMALL_BATCH = {"every scene is learned from": persistent(scenes_learned_from, "scenes_left_out")}
WHOLE_STEP = {"every micro-batch reaches the same tensors": micro_batches}
