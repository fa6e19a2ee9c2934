"""The surface: element positions and near-field steering vectors.

Legend: N elements, K sources. Lengths in metres, angles in radians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from ris_fast.config.schema import Task, section_of
from ris_fast.kernels.values import readable
from ris_fast.physics.real_complex import expi


@dataclass(frozen=True)
class RISArray:
    """A centred planar array; element n = j * horizontal + i, horizontal index fastest.

    Args: horizontal, vertical: elements in a row and in a column; N is their product;
        wavelength_m, spacing_m: metres, above 0;
        wavefront: "fresnel" or "spherical", the phase that `steering` gives a near-field source.
    Raises: TypeError or ValueError naming the argument.
    """

    horizontal: int = 12
    vertical: int = 12
    wavelength_m: float = 0.3
    spacing_m: float = 0.15
    wavefront: str = "fresnel"

    def __post_init__(self) -> None:
        for name in ("horizontal", "vertical"):
            if not isinstance(getattr(self, name), Integral):
                raise TypeError(
                    f"RISArray: {name} is a {type(getattr(self, name)).__name__}, expected a whole number of "
                    "elements. Use RISArray.of(task) for the array of a task."
                )
        if self.wavefront not in ("fresnel", "spherical"):
            raise ValueError(f"RISArray: wavefront is {self.wavefront!r}; it must be 'fresnel' or 'spherical'.")
        lengths = (self.wavelength_m, self.spacing_m)
        if not all(isinstance(each, Real) for each in lengths):
            raise TypeError(
                f"RISArray: wavelength_m is {self.wavelength_m!r} and spacing_m {self.spacing_m!r}, expected numbers of"
                " metres."
            )
        if min(self.horizontal, self.vertical) < 1 or not all(0 < each < math.inf for each in lengths):
            raise ValueError(f"RISArray: sizes and lengths must be positive, got {self}.")

    @classmethod
    def of(cls, task: Task) -> RISArray:
        """The array of a task. Raises: ConfigError where it is no `Task`."""
        section_of("RISArray.of", "task", task, Task)
        return cls(task.ris_horizontal, task.ris_vertical, task.wavelength_m, task.spacing_m, task.wavefront)

    @property
    def elements(self) -> int:
        """N, the number of elements."""
        return self.horizontal * self.vertical

    @property
    def wavenumber(self) -> float:
        """2 pi / wavelength, rad/m."""
        return 2.0 * math.pi / self.wavelength_m

    def positions(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """x and y of the elements, (N,) each, in metres, the array centred on the origin."""
        x = (torch.arange(self.horizontal, device=device, dtype=dtype) - (self.horizontal - 1) / 2) * self.spacing_m
        y = (torch.arange(self.vertical, device=device, dtype=dtype) - (self.vertical - 1) / 2) * self.spacing_m
        return x.repeat(self.vertical), y.repeat_interleave(self.horizontal)


def direction_cosines(azimuth: Tensor, elevation: Tensor) -> tuple[Tensor, Tensor]:
    """u = sin(azimuth) cos(elevation), v = sin(elevation)."""
    return azimuth.sin() * elevation.cos(), elevation.sin()


def steering(array: RISArray, azimuth: Tensor, elevation: Tensor, range_m: Tensor) -> Tensor:
    """Unit-norm near-field steering vectors a(azimuth, elevation, range).

    Model: exp(j psi_n)/sqrt(N); fresnel: psi = k (u x + v y - (x^2 + y^2)/(2 r));
        spherical: psi = k (r - sqrt(r^2 - 2 r (u x + v y) + x^2 + y^2)).
    Args: azimuth, elevation (...) rad and range_m (...) m, one shape, float32 or float64.
    Returns: (..., N, 2), the dtype of `azimuth`.
    Raises: TypeError or ValueError naming the argument. Ranges of 0 or less are refused on a CPU; elsewhere their
        values are not looked at, which would wait for the device, and give NaN (0) or a vector that means nothing
        (below 0).
    Numerics: the spherical path difference is formed as -d/(r + sqrt(r^2 + d)), which does not cancel for large r.
    """
    if not isinstance(array, RISArray):
        raise TypeError(f"steering: array is a {type(array).__name__}, expected a RISArray. Pass RISArray.of(task).")
    for name, value in (("azimuth", azimuth), ("elevation", elevation), ("range_m", range_m)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"steering: {name} is a {type(value).__name__}, expected a tensor. Pass torch.as_tensor({name})."
            )
    if not azimuth.shape == elevation.shape == range_m.shape:
        raise ValueError(
            f"steering: azimuth {tuple(azimuth.shape)}, elevation {tuple(elevation.shape)} and range_m "
            f"{tuple(range_m.shape)} must have one shape."
        )
    if readable(range_m) and bool((range_m <= 0).any()):
        raise ValueError(
            f"steering: range_m goes down to {float(range_m.amin()):.3g}, expected metres above 0 from the centre of"
            " the array."
        )
    return cosine_steering(array, *direction_cosines(azimuth, elevation), range_m)


def cosine_steering(array: RISArray, u: Tensor, v: Tensor, range_m: Tensor) -> Tensor:
    """`steering` from direction cosines: u, v, range_m (...) -> (..., N, 2).

    The Fresnel form is defined for any u and v; a reader of an off-centre array shifts them past the unit circle.
    """
    x, y = array.positions(u.device, u.dtype)
    u, v, r = (each[..., None] for each in (u, v, range_m))
    if array.wavefront == "fresnel":
        path = u * x + v * y - (x * x + y * y) / (2.0 * r)
    else:
        excess = x * x + y * y - 2.0 * r * (u * x + v * y)
        path = -excess / (r + (r * r + excess).sqrt())
    return expi(array.wavenumber * path) / math.sqrt(array.elements)
