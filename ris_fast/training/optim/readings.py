"""Counters and per-tensor telemetry of an optimizer: what is read from its buckets, and what the host counts itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.optim.bucket import Bucket
from ris_fast.training.optim.placement import Placement


class StepCounts:
    """Steps attempted and skipped as far as the host knows without reading from the device."""

    def __init__(self) -> None:
        self.attempted = self.skipped = 0

    def set(self, counters: Tensor) -> None:
        """Takes both from `counters` (16,), the state of a bucket."""
        self.attempted, self.skipped = (int(counters[slot]) for slot in (State.ATTEMPTED, State.SKIPPED))

    def read(self, states: Sequence[Sequence[float]], placement: Placement, newest: bool) -> dict[str, Any]:
        """Names the counters in `states`, those of each bucket, and takes the steps skipped; if newest, also those
        attempted."""
        first, named = states[0], zip(states, placement.members, strict=True)
        bad = [members[int(each[State.FIRST_BAD])] for each, members in named if each[State.FIRST_BAD] >= 0]
        self.skipped = int(first[State.SKIPPED])
        if newest:
            self.attempted = int(first[State.ATTEMPTED])
        return dict(
            attempted=int(first[State.ATTEMPTED]),
            applied=int(first[State.APPLIED]),
            skipped=self.skipped,
            clipped=int(first[State.CLIPPED]),
            grad_norm=first[State.NORM],
            loss_scale=first[State.SCALE],
            first_bad_tensor=placement.names[min(bad)] if bad else None,
        )


def counter_states(buckets: Sequence[Bucket]) -> Tensor:
    """(buckets, 16) float64: a copy of the counters of every bucket, on the first one's device."""
    return torch.stack([bucket.state.to(buckets[0].device) for bucket in buckets])


def by_tensor(tables: Sequence[Tensor], placement: Placement) -> Tensor:
    """Tables (..., T of a bucket, 4), one a bucket, as one copy (..., T, 4) in the order of the optimizer's tensors."""
    if len(tables) == 1:
        return tables[0].clone()
    whole = tables[0].new_empty(*tables[0].shape[:-2], len(placement.params), tables[0].shape[-1])
    for table, members in zip(tables, placement.members, strict=True):
        whole[..., members, :] = table.to(whole.device)
    return whole
