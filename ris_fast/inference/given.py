"""Measurements as a program hands them over: tensors or numpy arrays, checked against a task by name.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.data.measurements import CLEAN, KINDS, Measured, expected_shape, unusable
from ris_fast.physics.real_complex import to_pairs


def given_measurements(
    task: Task, snapshots: Any, channel: Any, codes: Any, snr_db: Any = None, *, products: bool = False
) -> Measured:
    """The arguments of `Predictor.predict` as real pairs in float32, where the snapshots are, with codes of rms 1.

    Args: products: whether `channel` may be H c_l, (B, L, M).
    Raises: TypeError or ValueError that names the array, what it is and what is expected.
    """
    length, antennas, elements = task.snapshots, task.bs_antennas, task.elements
    given = {"snapshots": snapshots, "channel": channel, "codes": codes}
    pairs = {name: to_pairs(_tensor(name, value)).float() for name, value in given.items()}
    y, h, c = pairs.values()
    batch, seen, operator, code = len(y), (length, antennas, 2), (antennas, elements, 2), (length, elements, 2)
    if y.shape[1:] != seen or not batch:
        raise _misshapen("snapshots", snapshots, expected_shape("snapshots", seen), "One scene is snapshots[None].")
    known = h.shape == (batch, *operator)
    if not known and not (products and h.shape == (batch, *seen)):
        also = f", or H c_l, {expected_shape('snapshots', seen)}" if products else ""
        raise _misshapen("channel", channel, expected_shape("channel", operator) + also, f"There are {batch} scenes.")
    if c.shape not in (code, (batch, *code)):
        raise _misshapen("codes", codes, expected_shape("codes", code), f"There are {batch} scenes.")
    measured = Measured(y, h if known else None, None if known else h, c, _snr(snr_db, batch))
    named = {"snapshots": y, "channel": h, "codes": c if c.dim() == 4 else c[None], "snr_db": measured.snr_db}
    for name, values in named.items():
        if (found := unusable(name, values, 0)) is not None:
            raise ValueError(f"predict: {name} has {found[0]}; expected {found[1]}. {CLEAN}")
    if not known and bool(measured.snr_db.isnan().any()):
        raise ValueError("predict: snr_db is not known, and cannot be estimated without the channel. Give it.")
    return measured.with_unit_codes()


def given_count(count: Any, batch: int, most: int) -> int | str | Tensor | None:
    """A number of sources, one a scene as a tensor (B,), a word or None. Raises: TypeError, ValueError."""
    if count is None or isinstance(count, str):
        return count
    values = _tensor("count", count)
    if values.is_floating_point() or values.is_complex():
        raise TypeError(f"predict: count is {values.dtype}, expected a whole number, or integers ({batch},).")
    if values.shape not in ((), (batch,)):
        raise _misshapen("count", count, f"({batch},), or one number", f"There are {batch} scenes.")
    if bool(((values < 0) | (values > most)).any()):
        low, high = int(values.min()), int(values.max())
        raise ValueError(f"predict: count goes from {low} to {high}; expected 0 to {most} (task.max_sources).")
    return int(values) if values.dim() == 0 else values.long()


def _tensor(name: str, value: Any) -> Tensor:
    """A tensor of numbers. Raises: TypeError."""
    if isinstance(value, Tensor) and value.dtype != torch.bool:
        return value.detach()
    array = np.asarray(value) if not isinstance(value, Tensor) else np.empty(0, bool)
    if array.dtype.kind not in KINDS:
        what = array.dtype if isinstance(value, (Tensor, np.ndarray)) else f"a {type(value).__name__}"
        raise TypeError(f"predict: {name} is {what}, expected numbers. Give a tensor or a numpy array of them.")
    copy = None if array.flags.writeable else True  # torch warns of memory that it could not write to
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C", copy=copy))


def _snr(snr_db: Any, batch: int) -> Tensor:
    """(B,) dB, NaN where it is not known."""
    values = torch.full((), torch.nan) if snr_db is None else _tensor("snr_db", snr_db)
    if values.is_complex() or values.shape not in ((), (batch,)):
        raise _misshapen("snr_db", values, f"({batch},), or one number", "Give dB, and NaN where it is not known.")
    return values.float().expand(batch)


def _misshapen(name: str, value: Any, expected: str, todo: str) -> ValueError:
    shape, kind = tuple(np.shape(value)), getattr(value, "dtype", type(value).__name__)
    if name in ("snapshots", "channel", "codes") and shape[-1:] != (2,) and "complex" not in str(kind):
        kind = f"{kind}, which is real"
    return ValueError(f"predict: {name} has shape {shape} of {kind}; expected {expected}. {todo}")
