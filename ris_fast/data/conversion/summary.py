"""What a conversion has understood of somebody's files, before hours of work."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ris_fast.config.schema import Config
from ris_fast.data.conversion.convert import Conversion
from ris_fast.data.conversion.scene_file import Files
from ris_fast.data.geometry import CENTRED, EXACT
from ris_fast.data.npz_load import Assumption, Facts, same_codes, target_columns
from ris_fast.data.shard_columns import scene_bytes
from ris_fast.physics.array import RISArray
from ris_fast.physics.random import SPLITS

MEANING = {
    "y": ("snapshots", "rms"),
    "H_full": ("channel", "rms"),
    "H": ("effective channel", "rms"),
    "codes": ("codes", "rms"),
    "R": ("covariance", "rms"),
    "snr": ("snr", "dB"),
    "K": ("sources", ""),
    "power": ("power", "linear"),
}


def understood(config: Config, files: Files) -> Iterator[str]:
    """Lines on the first scenes of the first file, and on what would be written. Raises: DataError."""
    part, listed = next(iter(files.parts.items()))
    plan = Conversion.of(config, files)
    _, chunk = next(listed[0].chunks(lambda *_: True))
    count = sum(len(each) for each in files.parts.values())
    yield f"{files.root}: {count} files; the first scenes of {listed[0].path.name}:"
    for key, values in chunk.items():
        if key in MEANING:
            yield f"  {MEANING[key][0]:18} {_range(values, MEANING[key][1])}"
    if "ptr" in chunk:
        azimuth, elevation, range_m = chunk["ptr"].unflatten(1, (3, -1)).unbind(1)
        there = range_m > 0
        for name, angle in (("azimuth", azimuth), ("elevation", elevation)):
            low, high = torch.aminmax(torch.rad2deg(angle[there]))
            yield f"  {name:18} {float(low):.4g} to {float(high):.4g} deg"
        yield f"  {'range':18} {float(range_m[there].min()):.4g} to {float(range_m[there].max()):.4g} m"
    shared = same_codes(chunk["codes"], plan.codes[part])
    yield f"  {'codes':18} {'the same in all scenes' if shared else 'of their own in each scene'}"
    exact, said = _target(config, plan.offsets[part], chunk)
    yield f"  {'target':18} {said}"
    plan = Conversion.of(config, files, exact=exact, shared=shared)
    sizes = ", ".join(f"{plan.sizes[split]:,} {split}" for split in SPLITS)
    size = plan.total * scene_bytes(config.task, plan.columns) / 1e9
    yield f"would be written: {sizes} scenes, {size:,.2f} GB: {', '.join(plan.columns)}"


def _range(values: Tensor, unit: str) -> str:
    shape = tuple(values.shape[1:])
    if unit == "rms":
        return f"{shape[:-1]} complex, rms {float(values.double().square().sum(-1).mean().sqrt()):.4g}"
    low, high = torch.aminmax(values)
    return f"{float(low):.4g} to {float(high):.4g} {unit}".rstrip()


def _target(config: Config, offset: tuple[float, float], chunk: dict[str, Tensor]) -> tuple[bool, str]:
    """Whether the target is kept as exact factors, and why, in words."""
    if "R" not in chunk:
        return True, "exact factors of the positions and powers given"
    if "ptr" not in chunk:
        return False, "the covariance; positions are not known"
    facts = Facts(False, offset)
    try:
        target_columns(RISArray.of(config.task), facts, chunk)
    except Assumption:
        pass
    fit = facts.fits[0]
    where = "" if offset == CENTRED else f", of an array off-centre by {offset[0]:g} and {offset[1]:g} elements"
    nmse = f"NMSE of R on its own sources {float(fit.median()):.2g}, at most {float(fit.max()):.2g}"
    exact = float(fit.max()) <= EXACT
    return exact, f"{'exact factors of R' if exact else 'the dense R'}{where} ({nmse})"
