"""The surface: element positions and near-field steering vectors.

Legend: N elements, K sources. Lengths in metres, angles in radians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral, Real

import torch
from torch import Tensor

from ris_fast.config.own_physics import POSITIONS, read_positions, unchanged_file
from ris_fast.config.schema import ConfigError, Task, section_of
from ris_fast.kernels.values import readable
from ris_fast.physics.real_complex import expi


@dataclass(frozen=True)
class RISArray:
    """A planar array: a centred grid, element n = j * horizontal + i, horizontal index fastest; or elements anywhere.

    Args: horizontal, vertical: elements in a row and in a column; N is their product;
        wavelength_m, spacing_m: metres, above 0;
        wavefront: "fresnel" or "spherical", the phase that `steering` gives a near-field source;
        places: (x, y) of every element in metres. There is no grid then: horizontal, vertical and spacing_m mean
            nothing. Angles and ranges are seen from x = y = 0.
    Raises: TypeError or ValueError naming the argument.
    """

    horizontal: int = 12
    vertical: int = 12
    wavelength_m: float = 0.3
    spacing_m: float = 0.15
    wavefront: str = "fresnel"
    places: tuple[tuple[float, float], ...] = ()
    _made: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
        """The array of a task. Raises: ConfigError where it is no `Task`, and where its elements_file is missing,
        changed or of no use."""
        section_of("RISArray.of", "task", task, Task)
        if task.elements_file:
            return _of_file(task)
        return cls(task.ris_horizontal, task.ris_vertical, task.wavelength_m, task.spacing_m, task.wavefront)

    @property
    def elements(self) -> int:
        """N, the number of elements."""
        return len(self.places) or self.horizontal * self.vertical

    @property
    def grid(self) -> bool:
        """Whether the elements are in rows and columns."""
        return not self.places

    @property
    def wavenumber(self) -> float:
        """2 pi / wavelength, rad/m."""
        return 2.0 * math.pi / self.wavelength_m

    def positions(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """x and y of the elements, (N,) each, in metres, a grid centred on the origin."""
        if self.places:
            key = (str(torch.device(device)), dtype)
            if key not in self._made:
                x_N, y_N = torch.tensor(self.places, dtype=torch.float64).T.contiguous().to(device, dtype)
                self._made[key] = x_N, y_N
            return self._made[key]
        x = (torch.arange(self.horizontal, device=device, dtype=dtype) - (self.horizontal - 1) / 2) * self.spacing_m
        y = (torch.arange(self.vertical, device=device, dtype=dtype) - (self.vertical - 1) / 2) * self.spacing_m
        return x.repeat(self.vertical), y.repeat_interleave(self.horizontal)

    def shares(self) -> tuple[Tensor, Tensor]:
        """x_N and y_N as shares of the aperture's width and height, float64; a grid of n columns is n spacings wide,
        and so are n different x."""
        if self.places:
            x, y = (_share(each) for each in self.positions("cpu", torch.float64))
            return x, y
        i = torch.arange(self.horizontal, dtype=torch.float64) - (self.horizontal - 1) / 2
        j = torch.arange(self.vertical, dtype=torch.float64) - (self.vertical - 1) / 2
        return (i / self.horizontal).repeat(self.vertical), (j / self.vertical).repeat_interleave(self.horizontal)


def _share(place: Tensor) -> Tensor:
    width = float(place.max() - place.min())
    if not width:
        return torch.zeros_like(place)
    different = 1 + int((place.sort()[0].diff() > 1e-6 * width).sum())
    share = (place - (place.max() + place.min()) / 2) / (width * different / (different - 1))
    return share.mul(2**32).round().div(2**32)  # a grid's own, whatever the rounding of its positions


@lru_cache(maxsize=16)
def _of_file(task: Task) -> RISArray:
    """The array of a task that names a file of positions, once it is known to be the one that is meant."""
    unchanged_file(POSITIONS, task.elements_file, task.elements_hash)
    found = read_positions(task.elements_file)
    if len(found) != task.ris_elements:
        raise ConfigError(
            f"{POSITIONS} = '{task.elements_file}' holds {len(found)} elements, and task.ris_elements is"
            f" {task.ris_elements}. Leave task.ris_elements out."
        )
    far = float((found**2).sum(1).max() ** 0.5)
    if far > task.range_max_m:
        raise ConfigError(
            f"{POSITIONS} = '{task.elements_file}' has an element {far:.4g} m from the origin, beyond the farthest"
            f" source (task.range_max_m = {task.range_max_m:g}). Give metres, from the centre of the array."
        )
    return RISArray(
        task.ris_horizontal,
        task.ris_vertical,
        task.wavelength_m,
        task.spacing_m,
        task.wavefront,
        tuple((x, y) for x, y in found.tolist()),
    )


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
