"""The operator `ris_fast::aperture_field` and the function of that name; not differentiable, it reads data only.

Letters: B batch, L snapshots, M base-station antennas, N = V H RIS elements (V rows of H), P fields of a scene.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..registration import cpp_or, register
from ..registry import Family
from ..values import check_shapes
from . import native, reference
from .samples import SAMPLES, cost


@torch.no_grad()
def aperture_field(
    channel: Tensor,
    codes: Tensor,
    snapshots: Tensor,
    snr_db: Tensor,
    *,
    static: bool = True,
    root: tuple[Tensor, Tensor] | None = None,
    steps: int,
) -> Tensor:
    """The linear minimum-mean-square-error estimate of the field on the surface: (B, N, P, 2), without a gradient.

    Model: x = C^(1/2) t, (C^(1/2) G^H G C^(1/2) + ridge I) t = C^(1/2) G^H y, by `steps` conjugate-gradient steps;
        G x = H diag(c_l) x of every snapshot, ridge = |H|_F^2 / (M SNR), the ratio of noise to field power per element
        where C has a unit diagonal.
    Args: channel (B, M, N, 2), codes ([B,] L, N, 2), snapshots (B, L, M, 2), snr_db (B,) finite; entries whose squares
        are representable. static: one field for all snapshots (P = 1), else one for each (P = L). root: the Hermitian
        root of the prior covariance, C^(1/2) = vertical (x) horizontal, as (V, V, 2) and (H, H, 2); none is the
        identity, which makes it regularised least squares.
    Raises: ValueError for shapes that do not fit each other.
    Numerics: in the widest dtype of channel, codes and snapshots, at least float32. Snapshots of zeros give zeros.
    Cost: 8 (2 steps + 1) L M N FLOPs a scene.
    """
    dtype = reduce(torch.promote_types, (channel.dtype, codes.dtype, snapshots.dtype), torch.float32)
    given = (each.to(dtype) for each in (channel, codes, snapshots, snr_db))
    vertical, horizontal = (None, None) if root is None else (each.to(dtype) for each in root)
    return torch.ops.ris_fast.aperture_field.default(*given, vertical, horizontal, static, steps)


def _check(
    channel: Tensor,
    codes: Tensor,
    snapshots: Tensor,
    snr_db: Tensor,
    vertical: Tensor | None,
    horizontal: Tensor | None,
) -> None:
    if channel.dtype not in native.DTYPES:
        raise ValueError(f"aperture_field: the channel is {channel.dtype}, expected float32 or float64. Convert it.")
    batch, antennas, elements, _ = channel.shape
    length, own = snapshots.shape[1], (batch,) if codes.dim() == 4 else ()
    given = {"codes": codes, "snapshots": snapshots, "snr_db": snr_db}
    expected = {"codes": (*own, length, elements, 2), "snapshots": (batch, length, antennas, 2), "snr_db": (batch,)}
    if vertical is not None and horizontal is not None:
        rows, columns = len(vertical), len(horizontal)
        given |= {"vertical": vertical, "horizontal": horizontal}
        expected |= {"vertical": (rows, rows, 2), "horizontal": (columns, columns, 2)}
        if rows * columns != elements:
            raise ValueError(
                f"aperture_field: the root is of {rows} rows of {columns} elements, the channel {tuple(channel.shape)}"
                f" of {elements}. Pass the root of this array."
            )
    elif vertical is not horizontal:
        raise ValueError("aperture_field: one factor of the root is missing. Pass both, or none for the identity.")
    of = f"channel {tuple(channel.shape)}. Pass the {{name}} of this task and these scenes."
    check_shapes("aperture_field", given, expected, of, channel.dtype)


def _cpp(*args: Any, simd: str | None = None) -> Tensor:
    _check(*args[:6])
    return native.aperture_field(*args, simd=simd)


def _plain(*args: Any) -> Tensor:
    _check(*args[:6])
    return reference.aperture_field(*args)


def _fake(channel: Tensor, codes: Tensor, snapshots: Tensor, *rest: Any) -> Tensor:
    batch, _, elements, _ = channel.shape
    static = rest[3]
    return channel.new_empty(batch, elements, 1 if static else snapshots.shape[1], 2)


OPERATOR = register(
    "aperture_field(Tensor channel, Tensor codes, Tensor snapshots, Tensor snr_db, Tensor? vertical, "
    "Tensor? horizontal, bool static, int steps) -> Tensor",
    cpu=cpp_or(_plain, _cpp),
    cuda=_plain,
    elsewhere=_plain,
    fake=_fake,
    reference=reference.aperture_field,
    samples=SAMPLES,
    cost=cost,
    backends={"cpp": _cpp},
)
FAMILY = Family("field", (OPERATOR,))
