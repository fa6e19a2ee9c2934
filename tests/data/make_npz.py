"""Writes shards in the original pipeline's format, from its own formulas in float64 numpy.

Nothing here uses ris_fast's steering or shift, so that the reader is tested against an independent definition. Only
the channel, the codes and the geometry are taken from the simulator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ris_fast.config.schema import Task
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate

SMALL = Task(bs_antennas=4, ris_horizontal=6, ris_vertical=4, snapshots=8, max_sources=3)


def as_complex(pairs: Any) -> np.ndarray:
    return np.asarray(pairs, np.float64) @ np.array([1.0, 1.0j])


def as_pairs(values: np.ndarray) -> np.ndarray:
    return np.stack((values.real, values.imag), -1).astype(np.float32)


def original_steering(
    task: Task,
    azimuth: np.ndarray,
    elevation: np.ndarray,
    range_m: np.ndarray,
    centred: bool = False,
    shift: Any = (0.0, 0.0),
) -> np.ndarray:
    """(...) -> (..., N): elements at (i - N_H // 2) d, as the original places them, or centred; `shift` spacings
    further, all or each."""
    d, k0 = task.spacing_m, 2 * np.pi / task.wavelength_m
    x, y = (np.arange(n) - ((n - 1) / 2 if centred else n // 2) for n in (task.ris_horizontal, task.ris_vertical))
    x, y = d * (np.tile(x, task.ris_vertical) + shift[0]), d * (np.repeat(y, task.ris_horizontal) + shift[1])
    u, v, r = (np.sin(azimuth) * np.cos(elevation))[..., None], np.sin(elevation)[..., None], range_m[..., None]
    if task.wavefront == "fresnel":
        path = u * x + v * y - (x**2 + y**2) / (2 * r)
    else:
        path = r - np.sqrt(r**2 - 2 * r * (u * x + v * y) + x**2 + y**2)
    return np.exp(1j * k0 * path) / np.sqrt(task.elements)


def original_arrays(
    scenes: int,
    *,
    task: Task = SMALL,
    seed: int = 0,
    split: str = "train",
    centred: bool = False,
    jitter: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> dict[str, np.ndarray]:
    """All keys of a shard. `jitter` (eta) moves the elements scene by scene by U(+-eta wavelength / 2) in x and in y,
    as the original's option does, in data and R alike. Symbols are drawn once a snapshot where the task has them so."""
    rng = np.random.default_rng([seed, scenes])
    drawn = simulate(task, scenes, SceneGenerator(seed, split))
    count, active = drawn.count.numpy(), np.arange(task.max_sources) < drawn.count.numpy()[:, None]
    azimuth, elevation, range_m = (np.asarray(t, np.float32) for t in (drawn.azimuth, drawn.elevation, drawn.range_m))
    safe = np.where(active, range_m, 1.0)
    moved = jitter / 2 / task.spacing_wavelengths * rng.uniform(-1, 1, (2, scenes, 1, task.elements)) + np.reshape(
        shift, (2, 1, 1, 1)
    )
    steer = original_steering(task, azimuth.astype(float), elevation.astype(float), safe.astype(float), centred, moved)
    gain = (task.wavelength_m / (4 * np.pi * safe) * active)[:, None]
    drawn_symbols = (scenes, task.snapshots if task.symbols == "per_snapshot" else 1, task.max_sources)
    amplitude = gain * (rng.normal(size=drawn_symbols) + 1j * rng.normal(size=drawn_symbols)) / np.sqrt(2)
    covariance = np.einsum("bk,bkn,bkm->bnm", (np.abs(amplitude) ** 2).mean(1), steer, steer.conj())
    covariance *= task.elements / np.trace(covariance, axis1=1, axis2=2).real[:, None, None]
    channel, codes = as_complex(drawn.channel), as_complex(drawn.codes)
    field = np.einsum("blk,bkn->bln", amplitude, steer)
    clean = 1000 * np.einsum("bmn,bln->blm", channel, codes * field)
    snr = np.asarray(drawn.snr_db, np.float32)
    level = np.sqrt(np.mean(np.abs(clean) ** 2, (1, 2)) / 10 ** (snr / 10) / 2)[:, None, None]
    noisy = clean + level * (rng.normal(size=clean.shape) + 1j * rng.normal(size=clean.shape))
    return {
        "y": as_pairs(noisy),
        "H": as_pairs(np.einsum("bmn,ln->blm", channel, codes)),
        "H_full": as_pairs(channel),
        "codes": np.repeat(as_pairs(codes)[None], scenes, 0),
        "ptr": np.concatenate((azimuth, elevation, range_m), 1).astype(np.float32),
        "K": count.astype(np.int32),
        "snr": snr,
        "R": as_pairs(covariance),
    }


def write_npz(path: Path, arrays: dict[str, np.ndarray], *, compressed: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def write_folders(
    root: Path, *, train: int = 40, val: int = 12, test: int = 8, drop: tuple[str, ...] = (), **options: Any
) -> Path:
    """root/train (two shards), root/val, root/test."""
    for split, scenes in (("train", train), ("val", val), ("test", test)):
        if scenes:
            arrays = original_arrays(scenes, split=split, **options)
            arrays = {key: value for key, value in arrays.items() if key not in drop}
            cut = scenes // 3 if split == "train" else scenes
            write_npz(root / split / "shard_000.npz", {key: value[:cut] for key, value in arrays.items()})
            if cut < scenes:
                write_npz(root / split / "shard_001.npz", {key: value[cut:] for key, value in arrays.items()})
    return root


def all_scenes(source: Any, split: str) -> Scenes:
    import torch

    return source.batch(split, torch.arange(source.size(split)))
