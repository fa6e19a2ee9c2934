"""Files as other people write them: HDF5 from Python, .mat of version 7.3 as MATLAB lays it out."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np

from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate
from tests.data.make_npz import SMALL, as_complex

MATLAB_COMPLEX = np.dtype([("real", "f8"), ("imag", "f8")])
DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def mapping_of_docs(number: int) -> str:
    """The mapping files that docs/data.md shows: 0 of a laboratory with MATLAB, 1 of an HDF5 file."""
    return re.findall(r"```toml\n(.*?)```", DOCS.read_text(), re.S)[number]


def scenes_of(count: int, split: str = "train") -> Scenes:
    return simulate(SMALL, count, SceneGenerator(3, split))


def save_mat(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """MATLAB's layout: 512 bytes before the HDF5, axes reversed, complex numbers as two fields, at least two axes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in arrays.items():
            value = np.atleast_2d(value).T
            if np.iscomplexobj(value):
                both = np.empty(value.shape, MATLAB_COMPLEX)
                both["real"], both["imag"] = value.real, value.imag
                value = both
            file[name] = value
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(512))
    return path


def lab_arrays(scenes: Scenes) -> dict[str, np.ndarray]:
    """What the mapping of the laboratory in docs/data.md explains, with the axes of MATLAB."""
    degrees = np.degrees(np.stack((scenes.azimuth.double().numpy(), scenes.elevation.double().numpy())))
    there = np.arange(SMALL.max_sources) < scenes.count.numpy()[:, None]
    with np.errstate(divide="ignore"):
        decibel = np.where(there, 10 * np.log10(scenes.power.double().numpy()), np.nan)
    return {
        "Y": as_complex(scenes.snapshots).transpose(2, 1, 0),
        "H": as_complex(scenes.channel).transpose(1, 2, 0),
        "phases": np.degrees(np.angle(as_complex(scenes.codes))).T,
        "doa": degrees.transpose(0, 2, 1),
        "dist": np.where(there, 100 * scenes.range_m.double().numpy(), np.nan).T,
        "p_dB": decibel.T,
        "snr": scenes.snr_db.double().numpy()[None],
    }


def write_lab(root: Path) -> Path:
    """The laboratory's folder: two days of training, one file of validation."""
    days = scenes_of(40)
    for number, rows in enumerate((slice(0, 25), slice(25, 40))):
        save_mat(root / f"day{number}.mat", lab_arrays(days[rows]))
    save_mat(root / "holdout.mat", lab_arrays(scenes_of(12, "val")))
    return root


def write_hdf5(path: Path, arrays: dict[str, np.ndarray], **options: object) -> Path:
    """The file of the second mapping in docs/data.md, from the arrays of an .npz shard (see `original_arrays`)."""
    azimuth, elevation, range_m = np.split(arrays["ptr"].astype(np.float64), 3, axis=1)
    channel = arrays["H_full"].reshape(len(arrays["K"]), SMALL.bs_antennas, SMALL.ris_vertical, SMALL.ris_horizontal, 2)
    stored = {
        "rx/re": arrays["y"][..., 0],
        "rx/im": arrays["y"][..., 1],
        "rx/channel": channel,
        "ris/codes": as_complex(arrays["codes"][0]),
        "truth/R": as_complex(arrays["R"]).astype(np.complex64),
        "truth/azimuth": azimuth,
        "truth/elevation": elevation,
        "truth/range": range_m,
    }
    with h5py.File(path, "w") as file:
        for name, value in stored.items():
            file.create_dataset(name, data=value, **(options if value.ndim > 2 else {}))
    return path
