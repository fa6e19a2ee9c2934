"""Scenes and their simulation, batched and on the device.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from numbers import Integral

import torch
from torch import Tensor

from ris_fast.config.own_physics import doubt_of_codes
from ris_fast.config.schema import Task, section_of
from ris_fast.kernels.scenes.op import make_scenes
from ris_fast.kernels.values import readable
from ris_fast.old_names import renamed_field
from ris_fast.physics.array import RISArray
from ris_fast.physics.channel import FAR_RANGE_M, free_space_amplitude
from ris_fast.physics.codes import dft_codes, own_codes
from ris_fast.physics.miscalibration import estimated_channel, true_codes
from ris_fast.physics.own_channel import check_channel, draw_channel
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import power, to_pairs


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes on one device; complex arrays are real pairs, float32.

    A field is None where its source of data does not carry it: files may lack the channel (then `effective_channel`
    is there) or the geometry (then `covariance`, the dense target, is there).
    """

    snapshots: Tensor  # (B, L, M, 2)  y
    codes: Tensor  # (L, N, 2)     c_l, one set for all scenes; or (B, L, N, 2), one for each
    snr_db: Tensor  # (B,)          dB
    count: Tensor  # (B,) int64    sources in the scene
    index: Tensor  # (B,) int64    number of the scene in its split
    channel: Tensor | None = None  # (B, M, N, 2)  H
    factor: Tensor | None = None  # (B, N, K, 2)  target: columns sqrt(p_k) a_k, zero where no source
    azimuth: Tensor | None = None  # (B, K)        rad
    elevation: Tensor | None = None  # (B, K)        rad
    range_m: Tensor | None = None  # (B, K)        m
    power: Tensor | None = None  # (B, K)        linear, 0 where no source
    effective_channel: Tensor | None = None  # (B, L, M, 2)  H c_l
    covariance: Tensor | None = None  # (B, N, N, 2)  dense target, trace N

    @property
    def batch(self) -> int:
        """B, the number of scenes."""
        return self.snapshots.shape[0]

    @property
    def own_codes(self) -> bool:
        """Whether each scene has codes of its own."""
        return self.codes.dim() == 4

    def apply(self, change: Callable[[Tensor], Tensor], *, codes: bool = False) -> Scenes:
        """The same scenes with `change` applied to every per-scene tensor (and to shared codes if asked)."""
        changed = {
            item.name: change(value)
            for item in fields(self)
            if (value := getattr(self, item.name)) is not None and (codes or self.own_codes or item.name != "codes")
        }
        return replace(self, **changed)

    def __getitem__(self, rows: slice | Tensor) -> Scenes:
        """The scenes of a slice, of a mask (B,) or of row numbers."""
        return self.apply(lambda value: value[rows])

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""
        return self.apply(lambda value: value.to(device), codes=True)

    def double(self) -> Scenes:
        """The same scenes in float64, numbers of scenes and of sources left whole."""
        return self.apply(lambda value: value.double() if value.is_floating_point() else value, codes=True)

    def with_own_codes(self) -> Scenes:
        """The same scenes with codes (B, L, N, 2); shared ones are repeated without a copy."""
        return replace(self, codes=self.codes.expand(self.batch, -1, -1, -1))

    @staticmethod
    def concatenate(parts: list[Scenes]) -> Scenes:
        """One batch of several that have the same fields; codes become one set a scene where a part has that."""
        first = parts[0]
        if len(parts) == 1:
            return first
        own = any(part.own_codes for part in parts)
        parts = [part.with_own_codes() for part in parts] if own else parts
        joined = {
            item.name: torch.cat([getattr(part, item.name) for part in parts])
            for item in fields(first)
            if (own or item.name != "codes") and getattr(first, item.name) is not None
        }
        return replace(first, **joined)


renamed_field(Scenes, "collapsed", "effective_channel")


@lru_cache(maxsize=16)
def task_codes(task: Task, device: str) -> Tensor:
    return own_codes(task, device) if task.codes_file else dft_codes(task, device)


@lru_cache(maxsize=16)
def task_positions(task: Task, device: str) -> Tensor:
    """Element positions in wavelengths, (2, N); formed in float64, so that half a wavelength stays exact."""
    positions_m = torch.stack(RISArray.of(task).positions(device, torch.float64))
    return (positions_m / task.wavelength_m).float()


def check_physics(task: Task, device: torch.device | str) -> list[str]:
    """Notes on a task that scenes are to be made of, once its own array, codes and channel are known to be of use.

    Raises: ConfigError, one line that says which is not, and why.
    """
    section_of("check_physics", "task", task, Task)
    task_positions(task, str(device))
    task_codes(task, str(device))
    doubt = doubt_of_codes(task.codes_file) if task.codes_file else ""
    return [*filter(None, [doubt]), *(check_channel(task, str(device)) if task.channel else ())]


def simulate(task: Task, scenes: int | Tensor, generator: SceneGenerator, codes: Tensor | None = None) -> Scenes:
    """Scenes of a split, by number: the same scene whatever the batch, order or device.

    Model: H = sqrt(k/(k+1)) a_BS a_RIS^H + sqrt(1/(k+1)) W, W entries CN(0, 1/M), k the Rician factor, a_RIS from 100
        m, or what the task's own `channel` draws; y_l = H diag(c_l) x_l + n_l, x_l = sum_k g_k s_kl a_k; n white, its
        power set by the scene's SNR. A task may add phase errors and an error of the channel estimate, see
        `miscalibration`: codes and channel are then those that a receiver believes in.
    Args: scenes: how many (0, 1, ...), or (B,) int64 indices; generator: seed, split and device;
        codes: (L, N, 2), or (B, L, N, 2) for a set a scene; the task's own if none are given.
    Returns: `Scenes` with every field but `effective_channel` and `covariance`.
    Raises: TypeError or ValueError, naming the argument, what it was and what is expected. Values of scene numbers are
        looked at on a CPU only.
    Source: the measurement model of RIS-12x12, README.
    """
    section_of("simulate", "task", task, Task)
    index = _numbers(scenes, generator)
    device = index.device
    draw = _draw_scene(task, generator.uniform(index, "scene", 3 * task.max_sources + 5))
    amplitude, source_power = _amplitudes(task, draw, generator.normal(index, "symbols", _symbol_count(task)))
    codes = task_codes(task, str(device)) if codes is None else _given_codes(task, codes, index)
    channel, snapshots, factor = make_scenes(
        index,
        seed=generator.seed,
        channel_stream=generator.stream("channel"),
        noise_stream=generator.stream("noise"),
        antennas=task.bs_antennas,
        positions=task_positions(task, str(device)),
        codes=true_codes(task, codes, index, generator),
        amplitude=amplitude,
        power=source_power,
        rician=draw["rician"],
        channel=draw_channel(task, index, generator) if task.channel else None,
        snr_db=draw["snr_db"],
        spherical=task.wavefront == "spherical",
        **_places(task, draw),
    )
    active = source_power > 0
    return Scenes(
        snapshots=snapshots,
        codes=codes,
        snr_db=draw["snr_db"],
        count=draw["count"],
        index=index,
        channel=estimated_channel(task, channel, index, generator),
        factor=factor,
        power=source_power,
        **{key: draw[key] * active for key in ("azimuth", "elevation", "range_m")},
    )


def _numbers(scenes: int | Tensor, generator: SceneGenerator) -> Tensor:
    """Scene numbers (B,) int64 on the device of the generator."""
    if not isinstance(generator, SceneGenerator):
        raise TypeError(
            f'simulate: generator is {generator!r}, expected a SceneGenerator. Pass SceneGenerator(seed, "train").'
        )
    if isinstance(scenes, Tensor):
        return _given_numbers(scenes).to(generator.device, torch.int64)
    if not isinstance(scenes, Integral) or isinstance(scenes, bool):
        raise TypeError(
            f"simulate: scenes is a {type(scenes).__name__}, expected how many or a tensor of scene numbers. "
            "Pass an int or torch.tensor([...])."
        )
    if scenes < 0:
        raise ValueError(f"simulate: scenes is {scenes}, expected how many to make, 0 or more.")
    return torch.arange(scenes, device=generator.device)


def _given_numbers(scenes: Tensor) -> Tensor:
    if scenes.dtype == torch.bool or scenes.is_floating_point() or scenes.is_complex():
        raise TypeError(
            f"simulate: scenes is {scenes.dtype}, expected whole scene numbers, torch.int64. Use a mask as"
            " mask.nonzero()[:, 0]."
        )
    if scenes.dim() != 1:
        raise ValueError(
            f"simulate: scenes is {tuple(scenes.shape)}, expected scene numbers (B,). Use scenes.flatten()."
        )
    if readable(scenes) and bool((scenes < 0).any()):
        raise ValueError(f"simulate: scenes goes down to {int(scenes.min())}, expected scene numbers of 0 or more.")
    return scenes


def _given_codes(task: Task, codes: Tensor, index: Tensor) -> Tensor:
    if not isinstance(codes, Tensor):
        raise TypeError(f"simulate: codes is a {type(codes).__name__}, expected a tensor. Pass torch.as_tensor(codes).")
    pairs, shared = to_pairs(codes), (task.snapshots, task.elements, 2)
    if tuple(pairs.shape) not in (shared, (len(index), *shared)):
        raise ValueError(
            f"simulate: codes is {tuple(codes.shape)}, expected {shared} for all scenes or {(len(index), *shared)} for"
            " each of them; complex ones without the last axis. Pass codes of this task."
        )
    return pairs.to(index.device, torch.float32)


def _symbol_count(task: Task) -> int:
    return 2 * task.max_sources * (task.snapshots if task.symbols == "per_snapshot" else 1)


def _draw_scene(task: Task, uniform: Tensor) -> dict[str, Tensor]:
    """The geometry and the scalars of each scene from (B, 3 K_max + 5) uniforms in (0, 1]."""

    def between(u: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * u

    k = task.max_sources
    azimuth, elevation = math.radians(task.azimuth_deg), math.radians(task.elevation_deg)
    los = math.radians(60.0)
    scalars = uniform[:, 3 * k :].unbind(1)
    return {
        "azimuth": between(uniform[:, :k], -azimuth, azimuth),
        "elevation": between(uniform[:, k : 2 * k], -elevation, elevation),
        "range_m": between(uniform[:, 2 * k : 3 * k], task.range_min_m, task.range_max_m),
        "count": (scalars[0] * k).ceil().clamp(1, k).to(torch.int64),
        "snr_db": between(scalars[1], task.snr_min_db, task.snr_max_db),
        "rician": between(scalars[2], task.rician_min, task.rician_max),
        "los_azimuth": between(scalars[3], -los, los),
        "los_elevation": between(scalars[4], -los, los),
    }


def _amplitudes(task: Task, draw: dict[str, Tensor], normals: Tensor) -> tuple[Tensor, Tensor]:
    """Complex source amplitudes g_k s_kl (B, S, K, 2), S = 1 or L, and powers p_k (B, K); both zero beyond the
    count."""
    range_m = draw["range_m"]
    gain = free_space_amplitude(range_m, task.wavelength_m) if task.power == "path_loss" else torch.ones_like(range_m)
    active = torch.arange(task.max_sources, device=range_m.device) < draw["count"][:, None]
    symbols = normals.unflatten(1, (-1, task.max_sources, 2)) * math.sqrt(0.5)
    amplitude = symbols * (gain * active)[:, None, :, None]
    return amplitude, power(amplitude).mean(1)


def _places(task: Task, draw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sources (B, K, 3) and the base station (B, 3), each azimuth, elevation in rad and range in wavelengths."""
    far = torch.full_like(draw["rician"], FAR_RANGE_M / task.wavelength_m)
    return {
        "source": torch.stack((draw["azimuth"], draw["elevation"], draw["range_m"] / task.wavelength_m), dim=-1),
        "los_direction": torch.stack((draw["los_azimuth"], draw["los_elevation"], far), dim=-1),
    }
