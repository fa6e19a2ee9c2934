"""What a network is given, taken in every natural form once, at its edge: complex or pairs, any precision, codes a
scene or shared.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.kernels.scale import rescaled
from ris_fast.physics.real_complex import to_pairs


class Inputs(NamedTuple):
    """Real pairs in float32; snapshots and channel in any unit."""

    snapshots: Tensor  # (B, L, M, 2)
    channel: Tensor  # (B, M, N, 2), or H c_l, (B, L, M, 2), where the network takes it
    codes: Tensor  # (L, N, 2) or (B, L, N, 2)
    snr_db: Tensor  # (B,)


def network_inputs(
    who: str,
    task: Task,
    snapshots: Tensor,
    channel: Tensor,
    codes: Tensor,
    snr_db: Tensor | float,
    *,
    products: bool = False,
    why: str = "",
) -> Inputs:
    """The four inputs of the network `who`, converted and checked against each other and the task. Reads no value.

    Args: complex arrays are real pairs (..., 2) of any precision, or complex without that axis; snr_db (B,) or one
        number;
        products: whether H c_l may stand for the channel; why: what to add where the channel is of another shape.
    Raises: TypeError or ValueError naming the input, what was given and what is expected.
    """
    given = {"snapshots": snapshots, "channel": channel, "codes": codes}
    pairs = {name: _pairs(who, name, value) for name, value in given.items()}
    (batch, length), antennas, elements = (
        _sizes(who, task, snapshots, pairs["snapshots"]),
        task.bs_antennas,
        task.elements,
    )
    full, seen, shared = (batch, antennas, elements, 2), (batch, length, antennas, 2), (length, elements, 2)
    allowed = {"channel": (full, seen) if products else (full,), "codes": (shared, (batch, *shared))}
    for name, shapes in allowed.items():
        if not any(_equal(pairs[name].shape, shape) for shape in shapes):
            raise ValueError(
                f"{who}: {name} is {tuple(given[name].shape)}, expected"
                f" {' or '.join(map(str, shapes))}{why if name == 'channel' else ''} for snapshots"
                f" {tuple(snapshots.shape)} and this task; complex ones without the last axis. Give the {name} of these"
                " scenes."
            )
    return Inputs(*pairs.values(), _snr(who, snr_db, pairs["snapshots"]))


def _equal(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Size by size: torch.compile(dynamic=True) does not trace a comparison of whole tuples of symbols."""
    return len(shape) == len(expected) and all(size == wanted for size, wanted in zip(shape, expected))


def _pairs(who: str, name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{who}: {name} is a {type(value).__name__}, expected a tensor. Give torch.as_tensor({name}).")
    pairs = to_pairs(value)
    wide = (
        pairs.dtype == torch.float64 and name != "codes"
    )  # may be out of float32's range, and its unit does not matter
    return (rescaled(pairs) if wide else pairs).float()


def _sizes(who: str, task: Task, given: Tensor, pairs: Tensor) -> tuple[int, int]:
    """B and L of the snapshots (B, L, M, 2)."""
    if pairs.dim() != 4 or tuple(pairs.shape[2:]) != (task.bs_antennas, 2) or min(pairs.shape[:2]) < 1:
        raise ValueError(
            f"{who}: snapshots are {tuple(given.shape)} {given.dtype}, expected (B, L, M, 2) real or (B, L, M) complex"
            f" with M = task.bs_antennas = {task.bs_antennas}, B and L at least 1. Give a batch of scenes; one scene is"
            " snapshots[None]."
        )
    return pairs.shape[0], pairs.shape[1]


def _snr(who: str, snr_db: Tensor | float, like: Tensor) -> Tensor:
    """(B,) float32 on the device of `like`."""
    try:
        snr = torch.as_tensor(snr_db, dtype=torch.float32, device=None if isinstance(snr_db, Tensor) else like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{who}: snr_db is {snr_db!r}, expected a number of dB or a tensor (B,).") from error
    snr = snr.expand(like.shape[0]) if snr.dim() == 0 else snr
    if snr.shape != like.shape[:1]:
        raise ValueError(
            f"{who}: snr_db is {tuple(snr.shape)}, expected ({like.shape[0]},), one value in dB a scene, or one number"
            " for all."
        )
    return snr
