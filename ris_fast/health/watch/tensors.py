"""What a model is given and gives: the tensors in it, and a few of their numbers.

Legend: R rows, of the first axis; F numbers of each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

import torch
from torch import Tensor

NEITHER = torch.zeros(2, dtype=torch.bool)
ROWS, NUMBERS, LARGE, MANY = 8, 64, 2**24, 64  # kept rows, numbers of a row, size not searched for NaN, tensors


def tensors_of(value: Any, depth: int = 4) -> list[Tensor]:
    """The tensors in tuples, dicts, data classes and other objects, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) is tuple and len(value) == 1 and isinstance(value[0], Tensor):
        return [value[0]]
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float, torch.nn.Module)):
        return []
    if isinstance(value, Mapping):
        parts: Any = value.values()
    elif isinstance(value, Sequence):
        parts = value
    elif dataclasses.is_dataclass(value) or type(value).__module__.partition(".")[0] not in ("torch", "builtins"):
        parts = getattr(value, "__dict__", {}).values()
    else:
        return []
    found: list[Tensor] = []
    for part in list(parts)[:MANY]:
        found += tensors_of(part, depth - 1)
    return found[:MANY]


CHANNELS = 32  # of scenes whose numbers are compared with those beside them
MOST_NUMBERS = 2**16  # of scenes that are compared with each other, or with those beside them
GRID = 8  # places along each side of a picture
KEYS, KEY_NUMBERS = 64, 128  # rows by which scenes are known again


def few_rows(tensors: Sequence[Tensor], rows: int = ROWS, numbers: int = NUMBERS) -> Tensor | None:
    """(R, F) float32 of the first tensor of real or complex numbers; of the first of whole numbers if there is none."""
    plain = [each for each in tensors if is_plain(each) and each.numel()]
    chosen = next(
        (each for each in plain if each.is_floating_point() or each.is_complex()), plain[0] if plain else None
    )
    if chosen is None:
        return None
    values = chosen.detach()
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    values = values.reshape(1) if values.ndim == 0 else values
    some = values.as_strided(*_grid(tuple(values.shape), values.stride(), rows, numbers))
    return (some.flatten(1) if some.ndim > 1 else some[:, None]).to(torch.float32, copy=True)


@lru_cache(1024)
def _grid(
    shape: tuple[int, ...], strides: tuple[int, ...], rows: int, numbers: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a few numbers, evenly spread."""
    each = max(
        1, round(numbers ** (1 / max(1, sum(size > 1 for size in shape[1:]))))
    )  # numbers along each further axis
    steps = [-(-size // (rows if axis == 0 else each)) for axis, size in enumerate(shape)]
    return (
        tuple(-(-size // step) for size, step in zip(shape, steps)),
        tuple(stride * step for stride, step in zip(strides, steps)),
    )


def nonfinite(tensors: Sequence[Tensor]) -> Tensor | None:
    """(2,), whether there is a NaN in any, and an infinity; None without tensors that can have one. Very large ones are
    not searched."""
    real = [each for each in tensors if is_plain(each) and each.is_floating_point() and 0 < each.numel() < LARGE]
    if not real:
        return None
    with torch.no_grad():
        if all(map(_is_surely_finite, real)):
            return NEITHER
        flags = [torch.stack([each.isnan().any(), each.isinf().any()]) for each in real]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any(0)


def _is_surely_finite(tensor: Tensor) -> bool:
    """Where reading is free, a sum that is finite says it at once."""
    return tensor.device.type == "cpu" and math.isfinite(tensor.sum(dtype=torch.float32).item())


def source_of(tensors: Sequence[Tensor]) -> tuple[int, int, int] | None:
    """Of a first tensor that is a view of part of another: that one's id, the place in it, and its version."""
    if not tensors or not is_plain(tensors[0]) or tensors[0].is_inference() or (base := tensors[0]._base) is None:
        return None
    part = base.numel() > tensors[0].numel()
    return (id(base), tensors[0].storage_offset(), base._version) if part else None


def from_transposes(tensors: Sequence[Tensor]) -> Tensor | None:
    """(2,) of a first tensor that is, or is a view of real numbers of, complex square matrices: how far a few of them
    are from their transpose, and from its conjugate, relative to their size. None for any other."""
    tensor = tensors[0].detach() if tensors and is_plain(tensors[0]) else None
    base = None if tensor is None or tensor.is_complex() or tensor.is_inference() else tensors[0]._base
    tensor = base.detach() if base is not None and is_plain(base) and base.is_complex() else tensor
    if tensor is not None and tensor.is_floating_point() and tensor.ndim == 4 and tensor.shape[1] == 2:
        tensor = torch.complex(tensor[:ROWS, 0].float(), tensor[:ROWS, 1].float())
    if tensor is None or not tensor.is_complex() or tensor.ndim < 3 or not 1 < tensor.shape[-1] == tensor.shape[-2]:
        return None
    some = tensor[:ROWS]
    size = some.abs().square().sum().sqrt().clamp_min(1e-30)
    return torch.stack([(some - some.mT).abs().square().sum(), (some - some.mH).abs().square().sum()]).sqrt() / size


def likeness(tensors: Sequence[Tensor]) -> Tensor | None:
    """(5 + C,) of a first tensor (B, C, ..., W) with few channels C and many places each: how alike numbers are that
    lie 1, C - 1, C and C + 1 places apart in a scene, as correlations; the most alike of those W - 1, W and W + 1
    apart, which are neighbours as the shape is; and those C apart from each of the first C on. None for any other."""
    tensor = tensors[0] if tensors and is_plain(tensors[0]) else None
    if tensor is None or tensor.ndim not in (3, 4) or not tensor.is_floating_point():
        return None
    channels, places = tensor.shape[1], math.prod(tensor.shape[2:])
    if not 3 <= channels <= CHANNELS or not 4 * channels <= places or not tensor.shape[0]:
        return None
    rows = tensor.detach()[: max(1, MOST_NUMBERS // (channels * places))].flatten(1)[:, :MOST_NUMBERS].float()
    rows = rows - rows.mean()
    size = rows.square().mean().clamp_min(1e-30)
    near, width = (1, channels - 1, channels, channels + 1), tensor.shape[-1]
    lags = (*near, *(max(1, width + step) for step in (-1, 0, 1)))
    alike = torch.stack([(rows[:, lag:] * rows[:, :-lag]).mean() for lag in lags]) / size
    apart = torch.cat([alike[: len(near)], alike[len(near) :].amax().reshape(1)])
    series = rows[:, : rows.shape[1] // channels * channels].unflatten(1, (-1, channels))
    each = (series[:, 1:] * series[:, :-1]).mean((0, 1)) / series.square().mean((0, 1)).clamp_min(1e-30)
    return torch.cat([apart, each])


def paired_rows(tensors: Sequence[Tensor]) -> Tensor | None:
    """(3,) correlations of scenes of a first tensor: of each even row with the next, of that with the one after it, and
    of each row of the first half with that of the second. None for any other than an even number of some rows."""
    tensor = tensors[0] if tensors and is_plain(tensors[0]) else None
    if tensor is None or tensor.ndim < 2 or not tensor.is_floating_point() or tensor.shape[0] % 2:
        return None
    if tensor.shape[0] < 8 or tensor[0].numel() < 4 or tensor.numel() > MOST_NUMBERS:
        return None
    rows = tensor.detach().flatten(1).float()
    rows = (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-12)
    rows, half = torch.nn.functional.normalize(rows, dim=1), len(rows) // 2
    both = ((rows[::2], rows[1::2]), (rows[1:-1:2], rows[2::2]), (rows[:half], rows[half:]))
    return torch.stack([(one * other).sum(1).mean() for one, other in both])


def plane_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """(R, 64), of a first tensor of pictures (B, C, H, W) numbers on a grid of 8 x 8 places, the mean of all channels;
    of (B, H, W) too. None for any other."""
    tensor = tensors[0].detach() if tensors and is_plain(tensors[0]) else None
    if tensor is None or tensor.is_complex() or tensor.ndim not in (3, 4) or min(tensor.shape[-2:]) < GRID:
        return None
    rows, columns = (size // GRID for size in tensor.shape[-2:])
    first = [(size - (GRID - 1) * step) // 2 for size, step in zip(tensor.shape[-2:], (rows, columns))]
    some = tensor[:ROWS, ..., first[0] :: rows, first[1] :: columns][..., :GRID, :GRID].float()
    return (some.mean(1) if some.ndim == 4 else some).flatten(1)


def viewed_as(tensors: Sequence[Tensor]) -> str:
    """Of a first tensor that is another one, or scenes of it, in a shape that takes its axes for others, both shapes:
    '(32, 12, 12, 3) as (32, 3, 12, 12)', as a transpose does that is written as a view. Empty for any other."""
    if not tensors or not is_plain(tensors[0]) or tensors[0].is_inference() or (base := tensors[0]._base) is None:
        return ""
    shape, before = tuple(tensors[0].shape), tuple(base.shape)
    if not shape or not before or not (tensors[0].is_contiguous() and base.is_contiguous()):
        return ""
    if base.numel() != tensors[0].numel():
        before = (shape[0], *before[1:])
    same = math.prod(before) == math.prod(shape)
    return f"{before} as {shape}" if same and crosses(before, shape) else ""


def crosses(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether axes are cut where no parting and joining of whole axes cuts them, or are the same in another order."""
    ends = sorted({*accumulate(reversed(before), mul), *accumulate(reversed(after), mul)} - {0})
    large = [[size for size in shape if size > 1] for shape in (before, after)]
    permuted = large[0] != large[1] and sorted(large[0]) == sorted(large[1])
    return permuted or any(high % low for low, high in pairwise(ends))


@torch.no_grad()
def largest_in_rows(grad: Tensor, rows: int) -> Tensor | None:
    """(B,), the largest magnitude in each row of a gradient; None where rows are not the batch's."""
    if not is_plain(grad) or grad.ndim == 0 or grad.shape[0] != rows or not grad.numel():
        return None
    return grad.abs().reshape(rows, -1).amax(1)


def is_plain(tensor: Tensor) -> bool:
    """Of numbers in memory, with strides; no tensor of another class, such as one sharded over ranks."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
    )
