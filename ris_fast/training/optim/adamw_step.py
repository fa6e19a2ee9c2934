"""One AdamW step over all buckets: the calls of the fused kernels, and the decision that the buckets share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.optim.bucket import Bucket


def adamw_step(buckets: Sequence[Bucket], clear: bool, measured: bool, record: bool) -> None:
    """Norm, clipping, AdamW, averaging and clearing in two passes over memory, without a host read.

    Pass one takes the norm of all gradients, and counts elements that are not finite: if there is one, the step is
    skipped. Pass two computes, for every element of tensors with a gradient (t: steps of the tensor so far),

        g <- clip / scale * grad,   negative with maximize   (+ weight_decay * p for Adam)
        exp_avg    <- beta1 exp_avg + (1 - beta1) g
        exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) g^2
        p   <- (1 - lr weight_decay) p - lr exp_avg / (1 - beta1^t) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
        ema <- ema_decay ema + (1 - ema_decay) p

    Args:
        clear: leaves the gradients zero.
        measured: the last accumulation did the sums of pass one, so only the decision is left.
        record: copies the telemetry of the step into the ring.
    """
    alone = len(buckets) == 1
    for bucket in buckets:
        if not measured:
            bucket.measure(finish=alone)
    if not alone:
        _share_totals(buckets)
    if measured or not alone:
        for bucket in buckets:
            bucket.decide()
    for bucket in buckets:
        bucket.apply(clear)
        bucket.average_rest()
        if record:
            bucket.record()


def _share_totals(buckets: Sequence[Bucket]) -> None:
    """Gives every bucket the sum of squares and the non-finite count over all of them."""
    totals = slice(State.SUMSQ, State.BAD + 1)
    first = buckets[0].device
    total = torch.stack([bucket.state[totals].to(first, non_blocking=True) for bucket in buckets]).sum(0)
    for bucket in buckets:
        bucket.state[totals].copy_(total, non_blocking=True)
