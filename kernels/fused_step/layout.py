"""Where everything lies: slots of the state vectors, and the tables that cut a flat buffer into tensors and chunks.

T tensors in the buffer, C chunks of work, G parameter groups, P elements of the buffer. A *row* is 64 elements.

A flat buffer holds T tensors one after another, each padded with zeros to whole rows, so that every tensor begins on
a 256-byte boundary (float32). The kernels work chunk by chunk; a chunk never crosses a tensor. A tensor without a
gradient has no chunk: it is neither read nor written. A tensor with no elements has one chunk of length zero, so that
its step is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

ROW = 64


class Hyper(IntEnum):
    """Slots written by the host: float64, the first eight for all tensors, then eight a group."""

    MAX_NORM = 0  # infinity: no clipping
    EMA_DECAY = 1
    EMA_WARMUP = 2  # 1: decay is at most (1 + t) / (10 + t) after t applied steps
    TELEMETRY = 3  # 1: weight and update norms are measured
    DYNAMIC = 4  # 1: the loss scale follows overflows
    GROWTH_INTERVAL = 5  # clean steps before the loss scale doubles
    GROUPS = 8


class Group(IntEnum):
    """Slots of one group, at Hyper.GROUPS + Group.COUNT * group."""

    LR = 0
    BETA1 = 1
    BETA2 = 2
    EPS = 3
    WEIGHT_DECAY = 4
    SIGN = 5  # 1: minimise, -1: maximise
    DECOUPLED = 6  # 1: AdamW, 0: Adam with L2
    COUNT = 8


class State(IntEnum):
    """Slots written by the device: float64."""

    ATTEMPTED = 0
    APPLIED = 1
    SKIPPED = 2
    CLIPPED = 3
    NORM = 4  # of the last step's gradient, unscaled, before clipping
    CLIP = 5  # factor of the last step, 1 where nothing was clipped
    SCALE = 6  # loss scale
    GROWTH = 7  # clean steps since the loss scale changed
    EXTERNAL_SCALE = 8  # loss scale of somebody else (torch.amp.GradScaler)
    EXTERNAL_BAD = 9  # non-finite values that somebody else found
    SKIP = 10  # 1: the last step was skipped
    EMA_WEIGHT = 11  # 1 - decay of the last step
    FIRST_BAD = 12  # first tensor with a non-finite gradient in the last skipped step, -1: none
    SUMSQ = 13  # sum of squares of the scaled gradient over all tensors
    BAD = 14  # non-finite values over all tensors
    EARLIER = 15  # by how much the step count of the oldest moments is ahead of APPLIED: steps of an earlier optimizer
    COUNT = 16


class Coefficient(IntEnum):
    """Columns of the (T, 12) table that pass two reads: one row per tensor."""

    GRADIENT = 0  # sign * clip / scale
    DECAY = 1  # 1 - lr * weight_decay (AdamW)
    L2 = 2  # weight_decay (Adam)
    MOMENT1 = 3  # 1 - beta1
    BETA2 = 4
    MOMENT2 = 5  # 1 - beta2
    STEP = 6  # lr / (1 - beta1^t)
    ROOT = 7  # 1 / sqrt(1 - beta2^t)
    EPS = 8
    COUNT = 12


class Segment(IntEnum):
    """Columns of the (T, 5) int64 table of tensors."""

    FIRST_CHUNK = 0
    CHUNKS = 1  # 0: no gradient, the tensor is left alone
    GROUP = 2
    START = 3  # first element
    PADDED = 4  # elements including padding
    COUNT = 5


class Chunk(IntEnum):
    """Columns of the (C, 3) int64 table of chunks."""

    START = 0
    LENGTH = 1  # a multiple of ROW
    SEGMENT = 2
    COUNT = 3


class Telemetry(IntEnum):
    """Columns of the (T, 4) float32 table."""

    GRAD_NORM = 0  # unscaled, before clipping
    WEIGHT_NORM = 1  # after the update
    UPDATE_NORM = 2  # of new minus old weights; 0 where the step was skipped
    NONFINITE = 3
    COUNT = 4


def padded(numel: int) -> int:
    """`numel` rounded up to whole rows."""
    return -(-numel // ROW) * ROW


def tables(numels: Sequence[int], groups: Sequence[int], live: Sequence[bool], chunk: int) -> tuple[Tensor, Tensor]:
    """The (T, 5) table of tensors and the (C, 3) table of chunks, int64 on the CPU.

    Args:
        numels: elements of each tensor; groups: its parameter group; live: whether it has a gradient.
        chunk: longest chunk, a multiple of ROW.
    """
    lengths = torch.tensor([padded(n) for n in numels], dtype=torch.int64)
    starts = lengths.cumsum(0) - lengths
    counts = torch.where(torch.tensor(live, dtype=torch.bool), (-(-lengths // chunk)).clamp_min(1), 0)
    firsts = counts.cumsum(0) - counts
    segments = torch.stack([firsts, counts, torch.tensor(groups, dtype=torch.int64), starts, lengths], dim=1)
    owner = torch.repeat_interleave(torch.arange(len(numels)), counts)
    begin = (torch.arange(owner.numel()) - firsts[owner]) * chunk
    chunks = torch.stack([starts[owner] + begin, (lengths[owner] - begin).clamp_max(chunk), owner], dim=1)
    return segments, chunks.contiguous()


def scratch(segments: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Work space that goes with the tables: partial sums (C, 2) float64, and tickets (T + 2) int32.

    Tickets count finished chunks per tensor, then finished tensors; the last one holds how many tensors have work.
    """
    tickets = torch.zeros(segments.shape[0] + 2, dtype=torch.int32)
    tickets[-1] = int((segments[:, Segment.CHUNKS] > 0).sum())
    return torch.zeros(chunks.shape[0], 2, dtype=torch.float64), tickets
