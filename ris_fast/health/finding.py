"""A finding, and the order in which findings are told: causes before their consequences, certain before likely."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from ris_fast.health.causes import CAUSES

# Families of evidence, most certain first; within one, what comes first explains what comes later.
LEVELS: dict[str, tuple[str, ...]] = {
    "structural": (
        "nonfinite_data",
        "manifest_differs",
        "scenes_altered",
        "empty_cache_slot",
        "constant_input",
        "constant_targets",
        "rank_sees_other_data",
        "repeated_batch",
        "stale_cache",
        "task_differs",
        "mismatched_channel",
        "wrong_layout",
        "shuffled_labels",
        "parts_unrelated",
        "snr_labels_differ",
        "split_overlap",
        "stale_optimizer_parameters",
        "ranks_diverged",
        "stale_compiled_graph",
        "compiled_differs",
        "cached_validation",
        "unregistered_parameters",
        "tied_parameters",
        "duplicate_parameters",
        "frozen_parameters",
        "missing_from_optimizer",
        "low_precision_weights",
        "zero_learning_rate",
        "zero_loss_weight",
        "batchnorm_statistics",
        "eval_mode_in_training",
        "train_mode_in_validation",
        "loss_rebuilt",
        "detached_loss",
        "dead_loss_term",
        "conjugation_error",
        "wrong_units",
        "loss_sign",
        "target_scale_differs",
        "scenes_mixed",
        "heavy_dropout",
        "epsilon_swallows_signal",
        "input_scale",
        "inputs_withhold_answer",
        "ignored_input",
        "saturated_output",
        "clamped_loss",
        "symmetric_init",
        "zero_product_init",
        "dead_units",
        "bad_initialisation",
        "non_differentiable",
        "zeroed_gradients",
        "detached_backbone",
        "losses_differ",
        "wrong_backward",
        "output_rank_too_low",
        "unused_head",
        "kernel_differs",
    ),
    "contract": (
        "step_never_called",
        "step_called_twice",
        "step_once_per_epoch",
        "batches_skipped",
        "scaler_skips_all",
        "sanitised_gradients",
        "fp16_overflow",
        "gradient_underflow",
        "gradients_cleared_before_step",
        "clip_before_unscale",
        "gradients_never_cleared",
        "last_micro_batch_only",
        "rank_gradient_missing",
        "accumulation_not_divided",
        "schedule_per_epoch",
        "schedule_per_batch",
        "learning_rate_off_plan",
        "weights_reset",
        "ema_saved_over_raw",
        "optimizer_state_lost",
        "ema_nonfinite",
        "raw_not_validated",
        "ema_equals_raw",
        "ema_frozen",
    ),
    "gradient": ("nonfinite_step", "nonfinite_gradients", "dominating_term", "clip_too_small"),
    "movement": ("warmup_too_long", "learning_rate_too_large", "weight_decay_too_large", "learning_rate_too_small"),
    "outcome": ("ema_cold", "collapsed", "validation_apart", "overfitting", "stalled_at_baseline"),
}
SEVERITIES = tuple(LEVELS)
_PLACE = {cause: (level, place) for level, causes in enumerate(LEVELS.values()) for place, cause in enumerate(causes)}


@dataclass(frozen=True)
class Finding:
    """One cause with what was seen.

    Args: cause: a name of `causes.CAUSES`; evidence: tensors, steps and numbers in one or two sentences;
        step: optimizer steps attempted when it was seen, 0 before the first.
    """

    cause: str
    evidence: str
    step: int = 0
    severity: str = ""
    advice: str = ""
    certain: bool = field(default=True)

    def __post_init__(self) -> None:
        if self.cause not in _PLACE:
            raise ValueError(f"Finding: no cause is called '{self.cause}'. Add it to causes.py and to LEVELS.")
        object.__setattr__(self, "severity", self.severity or SEVERITIES[_PLACE[self.cause][0]])
        object.__setattr__(self, "advice", self.advice or fix_of(self.cause))

    @property
    def meaning(self) -> str:
        return CAUSES[self.cause]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"meaning": self.meaning}

    def __str__(self) -> str:
        when = "before the first step" if self.step == 0 else f"at step {self.step}"
        return (
            f"{self.cause} ({self.severity}, {when}{'' if self.certain else ', not certain'}): {self.meaning}.\n  seen:"
            f" {self.evidence}\n  fix: {self.advice}"
        )


def ranked(findings: Iterable[Finding], muted: Iterable[str] = ()) -> list[Finding]:
    """Most certain first, each cause once (where it was seen first), muted ones left out."""
    first: dict[str, Finding] = {}
    for finding in findings:
        if finding.cause not in set(muted):
            first.setdefault(finding.cause, finding)
    return sorted(first.values(), key=lambda finding: (not finding.certain, *_PLACE[finding.cause]))


def explained(findings: Sequence[Finding], *, more: bool = False) -> str:
    """Ranked findings in full: all that are certain, or the first where none is; what else was seen in a line each.

    `more`: with the command that explains a cause.
    """
    whole = [finding for finding in findings if finding.certain] or list(findings[:1])
    lines = [
        f"{finding}\n  more: ris-fast why --explain {finding.cause}" if more else str(finding) for finding in whole
    ]
    return "\n".join(
        [*lines, *(f"also seen, less telling: {each.cause}: {each.evidence}" for each in findings if each not in whole)]
    )


def page(cause: str) -> str:
    """The page on a cause: what it is, how it is seen, how it is fixed. Raises KeyError for an unknown name."""
    if cause not in CAUSES:
        raise KeyError(cause)
    return resources.files("ris_fast.health").joinpath("pages", f"{cause}.md").read_text(encoding="utf-8")


@cache
def fix_of(cause: str) -> str:
    """The first paragraph under 'Mend' of the cause's page."""
    _, _, fix = page(cause).partition("## Fix\n")
    return " ".join(fix.strip().split("\n\n")[0].split())
