"""Which array made these covariances: element spacing, wavelength, wavefront and order of the elements, from R and its
sources.

Model: the phase of a source is 2 pi (s (u i + v j) - s^2 w (i^2 + j^2) / (2 r)), with s the spacing in wavelengths and
    w the wavelength. Its linear part gives s, its curvature q = s^2 w. The strongest eigenvector of R is the steering
    vector of a scene's strongest source, so (s, q) maximise its overlap with the vectors of the sources: first on a
    grid, with the farthest scenes, whose curvature is the smallest, then by ever finer steps with all.
Legend: S scenes, H and V elements in a row and in a column, N = H V, K sources (padded), G points of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.data.geometry import CENTRED, centre, leading_factor, original_offset, recover_powers
from ris_fast.data.npz_format import split_ptr
from ris_fast.physics.array import RISArray, cosine_steering, direction_cosines
from ris_fast.physics.real_complex import expi

CLEAREST, FARTHEST, FITTED = (
    48,
    8,
    64,
)  # scenes in which one source is the strongest by far; of these for the grid; for the final figure
SPACINGS = (0.1, 1.5)  # wavelengths
CURVATURES = (
    *(0.1 * 1.35**k for k in range(13)),
    *(5.0 + 1.2 * k for k in range(100)),
)  # rad at the corner, median scene
SURE = 0.5  # overlap on the grid at which no other order is tried
ROUNDS = 25
NEAR = 0.3  # overlap from which phases are those of the source, without turns
DIGITS = 7


@dataclass(frozen=True)
class Labels:
    """What files say of scenes: positions (S, K) as stored, which are sources, and R (S, N, N, 2)."""

    azimuth: Tensor
    elevation: Tensor
    range_m: Tensor
    active: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, ptr: Tensor, count: Tensor, covariance: Tensor) -> Labels:
        return cls(*split_ptr(ptr.double(), count), covariance)

    @property
    def sources(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.azimuth, self.elevation, self.range_m, self.active

    def __getitem__(self, rows: Tensor | slice) -> Labels:
        return Labels(*(each[rows] for each in self.sources), self.covariance[rows])


@dataclass(frozen=True)
class Layout:
    """How the N elements are numbered. The reader's own order has the horizontal index fastest."""

    horizontal: int
    vertical: int
    vertical_fastest: bool = False

    def order(self) -> Tensor:
        """Numbers in the file of the elements in our order: (N,)."""
        numbers = torch.arange(self.horizontal * self.vertical)
        return numbers.view(self.horizontal, self.vertical).T.flatten() if self.vertical_fastest else numbers

    def reordered(self, covariance: Tensor) -> Tensor:
        order = self.order()
        return covariance[:, order][:, :, order] if self.vertical_fastest else covariance


@dataclass(frozen=True)
class FoundArray:
    """`fit`: mean NMSE of R on its own sources with this array."""

    array: RISArray
    layout: Layout
    fit: float

    @property
    def spacing_wavelengths(self) -> float:
        return self.array.spacing_m / self.array.wavelength_m


def fit_of(array: RISArray, labels: Labels, layout: Layout | None = None) -> Tensor:
    """NMSE of each R on its own sources, (S,), with the array off-centre or centred, whichever is better on the
    whole."""
    return min(fits_of(array, labels, layout), key=lambda each: float(each.mean()))


def fits_of(array: RISArray, labels: Labels, layout: Layout | None = None) -> list[Tensor]:
    """NMSE of each R on its own sources, (S,), for each offset that an array may have."""
    covariance = layout.reordered(labels.covariance) if layout else labels.covariance
    return [
        recover_powers(array, centre(array, offset, *labels.sources), labels.active, covariance)[1]
        for offset in dict.fromkeys((original_offset(array), CENTRED))
    ]


def fit_array(task: RISArray, labels: Labels, *, every_size: bool = True) -> FoundArray | None:
    """The array that explains these covariances best, in the fewest digits that do; None where none does much better
    than the task's.

    Args: every_size: try every H V = N, not only the task's own and those exchanged.
    Cost: about a second on one core for 12 x 12 elements; 7 where no size fits.
    """
    if not task.grid:
        return None  # only grids are tried
    labels = labels[:256]
    clear = _Clear.of(labels)
    layout, start = _best_start(task, clear, every_size)
    found = [
        _refined(clear, layout, start, wavefront, offset)
        for wavefront in (task.wavefront, *({"fresnel", "spherical"} - {task.wavefront}))
        for offset in {original_offset(RISArray(layout.horizontal, layout.vertical)), CENTRED}
    ]
    few = labels[:FITTED]
    best = min(
        (FoundArray(array, layout, float(fit_of(array, few, layout).mean())) for array in found),
        key=lambda each: each.fit,
    )
    if best.fit > 0.3 * float(fit_of(task, few).mean()):
        return None
    return _plain(best, task, few)


class _Clear(NamedTuple):
    """The scenes with the strongest strongest source: orthonormal columns that span R (S, N, K), that source's first;
    and the sources."""

    basis: Tensor
    azimuth: Tensor
    elevation: Tensor
    range_m: Tensor
    active: Tensor

    @classmethod
    def of(cls, labels: Labels) -> _Clear:
        factor = torch.view_as_complex(leading_factor(labels.covariance, labels.active.shape[1]))
        strength = factor.abs().square().sum(1)
        rows = (strength[:, 0] / strength.sum(1)).topk(min(CLEAREST, len(strength)))[1]
        basis = factor[rows].to(torch.complex128)
        basis = basis / basis.norm(dim=1, keepdim=True).clamp_min(1e-30)
        azimuth, elevation, range_m, active = (each[rows] for each in labels.sources)
        return cls(basis, azimuth, elevation, torch.where(active, range_m, 1.0), active)

    def farthest(self) -> _Clear:
        nearest = torch.where(self.active, self.range_m, math.inf).amin(1)
        rows = nearest.topk(min(FARTHEST, len(nearest)))[1]
        return _Clear(*(each[rows] for each in self))


def _layouts(task: RISArray, every_size: bool) -> Iterator[Layout]:
    """The task's own sizes in both orders and exchanged; after that, every other way to make N."""
    pairs = [(task.horizontal, task.vertical), (task.vertical, task.horizontal)]
    others = [(h, task.elements // h) for h in range(2, task.elements // 2 + 1) if task.elements % h == 0]
    for h, v in dict.fromkeys(pairs + others * every_size):
        yield from (Layout(h, v), Layout(h, v, vertical_fastest=True))


def _best_start(task: RISArray, clear: _Clear, every_size: bool) -> tuple[Layout, tuple[float, float]]:
    """The layout and the (spacing, curvature) of the grid with the largest overlap."""
    far, best = clear.farthest(), (-1.0, Layout(task.horizontal, task.vertical), (0.5, 0.25 * task.wavelength_m))
    for layout in _layouts(task, every_size):
        best = max(best, _grid(far, layout), key=lambda each: each[0])
        if best[0] > SURE:
            break
    return best[1], best[2]


def _indices(size: int, offset: float) -> Tensor:
    return torch.arange(size, dtype=torch.float64) - (size - 1) / 2 + offset


def _grid(far: _Clear, layout: Layout) -> tuple[float, Layout, tuple[float, float]]:
    """The largest mean overlap on the grid, and where it is. The steering vector is a product over rows and columns
    there."""
    half = max(layout.horizontal, layout.vertical) / 2
    q = (
        torch.tensor(CURVATURES, dtype=torch.float64)
        * float(far.range_m[far.active].median())
        / (2 * math.pi * half**2)
    )
    offset = original_offset(RISArray(layout.horizontal, layout.vertical))
    x, y = _indices(layout.horizontal, offset[0]), _indices(layout.vertical, offset[1])
    grid_SVH = far.basis[:, layout.order(), 0].to(torch.complex64).view(-1, layout.vertical, layout.horizontal)
    u, v = direction_cosines(far.azimuth, far.elevation)
    best = (-1.0, layout, (0.5, float(q[0])))
    for spacing in torch.arange(SPACINGS[0], SPACINGS[1], 0.4 / max(layout.horizontal, layout.vertical)).tolist():

        def side(cosine: Tensor, at: Tensor, spacing: float = spacing) -> Tensor:
            bend = q[:, None, None, None] * at.square() / (2 * far.range_m[..., None])
            return torch.view_as_complex(expi((-2 * math.pi * (spacing * cosine[..., None] * at - bend)).float()))

        overlap = torch.einsum("svh,gskh,gskv->gsk", grid_SVH, side(u, x), side(v, y)).abs().square()
        score, point = (overlap * far.active).amax(2).mean(1).max(0)
        best = max(
            best,
            (float(score) / layout.horizontal / layout.vertical, layout, (spacing, float(q[point]))),
            key=lambda each: each[0],
        )
    return best


def _refined(
    clear: _Clear, layout: Layout, start: tuple[float, float], wavefront: str, offset: tuple[float, float]
) -> RISArray:
    """Gauss-Newton in (s, q) on the phases between each source's vector and its projection on the span of R, where that
    is near."""
    scene, source = clear.active.nonzero(as_tuple=True)
    positions = [each[scene, source][:, None] for each in clear[1:]]
    basis, point = clear.basis[:, layout.order()][scene], torch.tensor(start, dtype=torch.float64)

    def array(at: Tensor) -> RISArray:
        s, q = (max(float(each), 1e-6) for each in at)
        return RISArray(layout.horizontal, layout.vertical, q / s**2, q / s, wavefront)

    def steer(at: Tensor) -> Tensor:
        """Steering vectors of all sources: (P, N)."""
        sources = centre(array(at), offset, *positions)
        return torch.view_as_complex(cosine_steering(array(at), sources.u, sources.v, sources.range_m))[:, 0]

    for _ in range(ROUNDS):
        here = steer(point)
        inside = (basis @ (basis.mH @ here[..., None]))[..., 0]
        overlap = (here.conj() * inside).sum(1).real
        turned = (here.conj() * inside).imag * (overlap > NEAR)[:, None]
        step = 1e-6 * point
        slope = torch.stack(
            [
                (here.conj() * steer(point + step * axis)).angle() / float(step @ axis)
                for axis in torch.eye(2, dtype=torch.float64)
            ],
            -1,
        )
        slope = (slope - slope.mean(1, keepdim=True)) * (overlap > NEAR)[:, None, None]
        normal = torch.einsum("pni,pnj->ij", slope, slope) / here.shape[1]
        change = torch.linalg.lstsq(normal, torch.einsum("pni,pn->i", slope, turned)[:, None])[0][:, 0]
        point = (point + change.clamp(-0.2 * point, 0.2 * point)).clamp_min(1e-6)
    return array(point)


def _plain(best: FoundArray, task: RISArray, labels: Labels) -> FoundArray:
    """The task's own spacing and wavelength where they fit as well, else the fewest digits, from three, that do."""
    allowed, array, layout = 1.02 * best.fit + 1e-9, best.array, best.layout

    def shortest(exact: float, own: float, made: Callable[[float], RISArray]) -> RISArray:
        for value in (own, *(float(f"{exact:.{digits}g}") for digits in range(3, DIGITS))):
            if float(fit_of(made(value), labels, layout).mean()) <= allowed:
                return made(value)
        return made(exact)

    ratio = array.spacing_m / array.wavelength_m
    array = shortest(
        ratio, task.spacing_m / task.wavelength_m, lambda value: replace(array, spacing_m=value * array.wavelength_m)
    )
    ratio = array.spacing_m / array.wavelength_m
    array = shortest(
        array.wavelength_m, task.wavelength_m, lambda value: replace(array, wavelength_m=value, spacing_m=ratio * value)
    )
    return FoundArray(array, layout, float(fit_of(array, labels, layout).mean()))
