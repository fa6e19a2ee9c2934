"""Findings in the words of a plain loop, which has no settings of this project."""

from __future__ import annotations

from ris_fast.health.causes import CAUSES
from ris_fast.health.finding import Finding

LOOK_AFTER_BACKWARD = (
    "Look at what runs between `backward()` and `step()`: a clip threshold that is not a number, or a division."
)
MAY_BE_MEANT = "That may be meant."

FIXES = {
    "weight_decay_too_large": "Lower `weight_decay`; 1e-4 to 1e-1 is usual with AdamW.",
    "frozen_parameters": (
        "Call `requires_grad_(True)` on them before the optimizer is built; if they are meant to be frozen, say so: "
        '`watch(..., frozen=("beginning of their names",))`.'
    ),
    "zero_learning_rate": (
        "Give the group a rate above zero, and look at what the scheduler makes of it; if it is meant to stand still, "
        'say so: `watch(..., frozen=("beginning of its parameters\' names",))`.'
    ),
    "nonfinite_step": (
        "Keep the weights in float32 and let `torch.autocast` choose the format of the products; else an `eps` that the"
        " format has, such as 1e-4 in float16."
    ),
    "clip_too_small": (
        "Clip near the norms that arrive, e.g. `clip_grad_norm_(model.parameters(), 1.0)`, after "
        "`scaler.unscale_(optimizer)`."
    ),
    "sanitised_gradients": (
        "Remove the `nan_to_num` and fix the term that the NaN comes from; until then leave such steps out."
    ),
    "nonfinite_gradients": (
        "Find the operation with `torch.autograd.detect_anomaly()`: roots, divisions and logarithms at zero are usual."
    ),
    "settings_changed": (
        "Give it to the optimizer where that is built, and look for what writes to `optimizer.param_groups` at this"
        " step."
    ),
    "loss_sign": "Give the optimizer the gradients as backward leaves them, and leave `maximize` off.",
    "unused_head": (
        "Let the loss read what these parameters make, look for a `detach()` on the way, or take them out of the model."
    ),
}


def fix(cause: str) -> str:
    """What to do in a plain loop."""
    return FIXES.get(cause) or CAUSES[cause].fix


def finding(cause: str, evidence: str, step: int = 0, doubt: str = "", advice: str = "", harm: float = 1.0) -> Finding:
    """`doubt`: what else it may be; with it the finding is not certain. `advice`: where it is not the usual one."""
    text = f"{evidence} {doubt}".strip()
    return Finding(cause, text, step, advice=advice or fix(cause), certain=not doubt, harm=harm)
