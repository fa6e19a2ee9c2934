"""What the steps that `watch` saw come to: rules over records, with mends that speak of a plain loop.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Iterator

import torch
from torch.nn.parameter import is_lazy

from ris_fast.health.finding import Finding, mend_of, ranked

if TYPE_CHECKING:
    from ris_fast.health.watch import Follower, Seen, Watch

SCALER_STEPS = 24          # a loss scale halves its way to one that fits in fewer

MENDS = {
    "weight_decay_too_large": "Lower `weight_decay`; 1e-4 to 1e-1 is usual with AdamW.",
    "frozen_parameters": "Call `requires_grad_(True)` on them before the optimizer is built; if they are meant to be frozen, say so: "
                         "`watch(..., frozen=(\"beginning of their names\",))`.",
    "zero_learning_rate": "Give the group a rate above zero, and look at what the scheduler makes of it; if it is meant to stand still, "
                          "say so: `watch(..., frozen=(\"beginning of its parameters' names\",))`.",
    "clip_too_small": "Clip near the norms that arrive, e.g. `clip_grad_norm_(model.parameters(), 1.0)`, and after `scaler.unscale_(optimizer)`.",
    "sanitised_gradients": "Remove the `nan_to_num` and mend the term that the NaN comes from; until then leave such steps out.",
    "nonfinite_gradients": "Find the operation with `torch.autograd.detect_anomaly()`: roots, divisions and logarithms at zero are usual.",
    "unused_head": "Let the loss read what these parameters make, look for a `detach()` on the way, or take them out of the model.",
}


def mend(cause: str) -> str:
    """In the words of a plain loop, which has no settings of this project."""
    return MENDS.get(cause) or mend_of(cause)


def told(watch: "Watch") -> list[Finding]:
    """All findings, most certain first. Reads the device."""
    return ranked([*_membership(watch), *(found for follower in watch.followers for found in _followed(watch, follower))])


def _found(cause: str, evidence: str, step: int = 0, certain: bool = True) -> Finding:
    return Finding(cause, evidence + ("" if certain else " That may be as it should."), step, advice=mend(cause), certain=certain)


def _membership(watch: "Watch") -> list[Finding]:
    """The parameters as they are now, against the optimizers'."""
    own = {id(p): name.replace("_orig_mod.", "") for name, p in watch.model.named_parameters()}
    held = Counter(id(p) for optimizer in watch.optimizers for group in optimizer.param_groups for p in group["params"])
    trained = {id(p): p.requires_grad for p in watch.model.parameters()}
    wrong = {"missing_from_optimizer": [name for key, name in own.items() if trained[key] and key not in held],
             "stale_optimizer_parameters": ["a tensor of the optimizer" for key in held if key not in own],
             "duplicate_parameters": [own.get(key, "?") for key, count in held.items() if count > 1]}
    return [*_frozen(watch, own, held),
            *(_found(cause, f"{len(names)}: {', '.join(names[:3])}.", watch.steps) for cause, names in wrong.items() if names)]


def _frozen(watch: "Watch", own: dict[int, str], held: Counter[int]) -> Iterator[Finding]:
    """Uncertain where all have stood still from the beginning, and no optimizer holds them or they are most of the model."""
    numbers = {id(p): 0 if is_lazy(p) else p.numel() for p in watch.model.parameters()}
    keys = [id(p) for p in watch.model.parameters() if not p.requires_grad and not own[id(p)].startswith(watch.frozen)]
    if keys:
        most = 2 * sum(numbers[key] for key in keys) > sum(numbers.values())
        meant = watch.still.issuperset(keys) and (most or held.keys().isdisjoint(keys))
        yield _found("frozen_parameters", f"{len(keys)}: {', '.join(own[key] for key in keys[:3])}.", watch.steps, not meant)


def _followed(watch: "Watch", follower: "Follower") -> list[Finding]:
    """What one optimizer's steps say."""
    if not follower.steps:
        return list(_never_stepped(follower))
    records = [record.on_host() for record in follower.records]
    return [*(found for record in records for found in _judge(record, next(r for r in records if r.names == record.names))),
            *_unheard(watch, records), *_skipped(records), *_still(watch, follower, records), *_clipped(records)]


def _never_stepped(follower: "Follower") -> Iterator[Finding]:
    bad = sum(not bool(norm.isfinite()) for norm in follower.arrived.values())
    skipped = f" {bad} of them are not finite: a loss scaler or a check may skip every step." if bad else ""
    if follower.arrived:
        yield _found("step_never_called", f"{len(follower.arrived)} tensors have received gradients and the optimizer has made no "
                     f"step.{skipped}")


def _unheard(watch: "Watch", records: list["Seen"]) -> Iterator[Finding]:
    """Tensors that no gradient came to, neither from backward nor put there by hand."""
    heard = Counter(name for record in records for name in record.heard)
    missing = Counter(name for record in records for name, given in zip(record.names, record.given)
                      if name in record.missing and given == 0)
    if never := [name for name, count in missing.items() if count == heard[name] and not name.startswith(watch.frozen)]:
        yield _found("unused_head", f"{len(never)} of {len(heard)} trainable tensors never received a gradient: "
                     f"{', '.join(never[:3])}.", records[-1].step)


def _skipped(records: list["Seen"]) -> Iterator[Finding]:
    if records[-1].step >= SCALER_STEPS and all(record.scaled and not _finite(record.given) for record in records):
        yield _found("scaler_skips_all", f"the gradients of all {len(records)} steps that were looked at are not finite.",
                     records[-1].step)


def _still(watch: "Watch", follower: "Follower", records: list["Seen"]) -> Iterator[Finding]:
    """Groups whose rate was zero in every step seen. A schedule may end there; a group of several may be meant to stand still."""
    own = {id(p): name for name, p in follower.own().items()}
    groups = [{own.get(id(p), "") for p in group["params"]} for group in follower.optimizer.param_groups]
    rates = [[record.rates[n] for record in records if n < len(record.rates)] for n in range(len(groups))]
    zero = [n for n, seen in enumerate(rates) if len(seen) > 1 and not any(rate > 0 for rate in seen)]
    if names := [f"group {n}" for n in zero if not all(name.startswith(watch.frozen) for name in groups[n])]:
        yield _found("zero_learning_rate", f"{len(names)}: {', '.join(names[:3])}, in all {len(records)} steps that were looked at.",
                     records[-1].step + 1, len(zero) == len(groups))


def _clipped(records: list["Seen"]) -> Iterator[Finding]:
    """A factor on all gradients may be a loss scale taken out again, and means nothing to Adam: it must be seen in the updates.

    Where updates do not show it, norms that are the same in every step betray a threshold.
    """
    seen = [(record, float(record.came.norm()), float(record.given.norm())) for record in records
            if _finite(record.came) and not record.closure and max(record.rates) > 0]
    small = [each for each in seen if 0 < each[2] < 1e-4 * each[1]]
    if not small or len(small) < len(seen):
        return
    record, arrived, passed = small[0]
    evidence = f"norm {arrived:.3g} arrives and {passed:.3g} reaches the optimizer."
    slow = all(given < 1e-5 * float(each.before.norm()) and each.moved is not None and float(each.moved) < 1e-5 * max(each.rates)
               for each, _, given in small)
    norms = [given for _, _, given in small]
    if slow:
        yield _found("clip_too_small", evidence, record.step + 1)
    elif len(small) > 3 and max(norms) < 1e-3 and max(norms) < (1 + 1e-4) * min(norms):
        yield _found("clip_too_small", f"{evidence} It is the same norm in {len(small)} steps.", record.step + 1, certain=False)


def _judge(seen: "Seen", first: "Seen") -> list[Finding]:
    """One step: what arrived, what the optimizer was given, what moved; `first`: the first step of the same tensors."""
    arrived, passed = float(seen.came.norm()), float(seen.given.norm())
    found = []
    if not _finite(seen.came) and _finite(seen.given):
        found.append(("sanitised_gradients", f"{int((~seen.came.isfinite()).sum())} tensors' gradients arrive non-finite and reach the "
                      f"optimizer finite.", True))
    elif not _finite(seen.given) and not seen.scaled:
        found.append(("nonfinite_gradients", f"{int((~seen.given.isfinite()).sum())} of {len(seen.given)} tensors.", True))
    elif arrived > 0 and passed == 0:
        found.append(("gradients_cleared_before_step", f"norm {arrived:.3g} arrives and the optimizer finds zero.", True))
    if seen.reset is not None and bool(seen.reset):
        found.append(("weights_reset", "the weights are again, bit for bit, those of an earlier step; others came in between.", True))
    if (grown := _growth(seen, first)) > 10.0:
        found.append(("learning_rate_too_large", f"the weights' norm has grown by a factor of {grown:.3g}.", False))
    return [_found(cause, evidence, seen.step + 1, certain) for cause, evidence, certain in found]


def _growth(seen: "Seen", first: "Seen") -> float:
    """Of the tensors that began at a usual size: what begins at zero or next to it has to grow."""
    usual = first.before >= 0.1 * torch.tensor(first.sizes)
    grown = float(seen.after[usual].norm()) / float(first.before[usual].norm()) if len(seen.after) == len(usual) and usual.any() else 1.0
    return grown if grown == grown else 1.0          # not-a-number is told as such


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
