"""Source positions, powers and their number from covariance factors.

Legend: B batch, N RIS elements, Q factor columns, K sources (padded).
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.kernels.values import readable
from ris_fast.localize.count import count_sources
from ris_fast.localize.manifold import Manifold
from ris_fast.localize.search import find_positions
from ris_fast.localize.sources import Sources
from ris_fast.localize.spectrum import LOADING, check_factor, decompose, signal_basis, signal_factor
from ris_fast.physics.non_negative import non_negative_least_squares

BLOCK = 64  # scenes that a CPU takes at once: their tensors stay in its caches


@torch.no_grad()
def locate(
    factor: Tensor,
    task: Task,
    *,
    count: Tensor | int | None = None,
    method: str = "music",
    loading: float = LOADING,
) -> Sources:
    """The sources of covariances R = F F^H, batched on the factor's device.

    Args: factor (B, N, Q, 2) or complex (B, N, Q), Q <= 32, of any scale; count: sources a scene, (B,), one number for
        all, or None to count them in the factor (`count_sources`); method: "music" or "mvdr", the spectrum that is
        searched; loading: MVDR's eps as a share of the trace.
    Returns: `Sources`, float64, max_sources rows, strongest first. A scene has no more sources than its
        factor has rank. Powers are those of R, in the factor's unit squared, non-negative least squares of R on the
        steering vectors found.
    A factor of zeros, or one with a number that is not finite, has no source: count 0.
    Raises: TypeError or ValueError that names the argument.
    """
    pairs = check_factor("locate", factor, task)
    number = None if count is None else _given_count(count, pairs, task.max_sources)
    manifold = Manifold.of(task, pairs.device)
    size = BLOCK if pairs.device.type == "cpu" else max(1, len(pairs))
    blocks = zip(pairs.split(size), [None] * max(1, len(pairs)) if number is None else number.split(size))
    found = [_locate_block(manifold, *block, task.max_sources, method, loading) for block in blocks]
    return Sources(*(torch.cat(each) for each in zip(*found)))


def _locate_block(
    manifold: Manifold, factor: Tensor, count: Tensor | None, most: int, method: str, loading: float
) -> Sources:
    parts = decompose(factor)
    count = count_sources(parts, most) if count is None else torch.minimum(count, parts.rank)
    basis, signal = signal_basis(parts, count, most, method, loading), signal_factor(parts, count, most)
    position = find_positions(manifold, basis, signal, count, most)
    scale = factor.double().square().sum((1, 2, 3)).nan_to_num(0.0, 0.0, 0.0)
    power = source_powers(manifold, position, parts.factor, count) * scale[:, None]
    return Sources.of_cosines(position, power, count)


def source_powers(manifold: Manifold, position: Tensor, factor: Tensor, count: Tensor) -> Tensor:
    """Powers p >= 0 that make sum_k p_k a_k a_k^H closest to R = F F^H in Frobenius norm.

    Model: normal matrix |a_i^H a_j|^2, right side a_k^H R a_k = |F^H a_k|^2.
    Args: position (B, K, 3) float64; factor (B, N, Q) complex128; count (B,). Returns: (B, K), zero beyond the count.
    """
    there = torch.arange(position.shape[1], device=count.device) < count[:, None]
    steer = manifold.steer(position) * there[..., None]
    gram = (steer.conj() @ steer.mT).abs().square()
    return non_negative_least_squares(gram, (steer.conj() @ factor).abs().square().sum(2))


def _given_count(count: Tensor | int, factor: Tensor, most: int) -> Tensor:
    """Numbers (B,) int64 of sources; those above `most` are refused where values may be read, else taken for it."""
    batch = factor.shape[0]
    if isinstance(count, Integral) and not isinstance(count, bool):
        count = torch.full((batch,), int(count), dtype=torch.int64)
    if not isinstance(count, Tensor) or count.is_floating_point() or count.is_complex() or count.dtype == torch.bool:
        kind = count.dtype if isinstance(count, Tensor) else f"a {type(count).__name__}"
        raise TypeError(f"locate: count is {kind}, expected a whole number or an integer tensor ({batch},).")
    if count.shape != (batch,):
        raise ValueError(f"locate: count is {tuple(count.shape)}, expected ({batch},), one number a scene.")
    if readable(count) and bool(((count < 0) | (count > most)).any()):
        raise ValueError(
            f"locate: count goes from {int(count.min())} to {int(count.max())}, expected 0 to {most}. Set"
            " task.max_sources to the most that a scene can have."
        )
    return count.to(factor.device, torch.int64).clamp(0, most)
