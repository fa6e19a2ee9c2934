"""A mapping file to begin with: what is in somebody's file, and a section for each quantity."""

from __future__ import annotations

from pathlib import Path

from ris_fast.data.conversion.array_file import arrays_of
from ris_fast.data.conversion.mapped_file import first_file
from ris_fast.data.conversion.quantities import QUANTITIES
from ris_fast.files import write_text

GUESSES = {
    "snapshots": ("y", "snapshots", "measurements", "received"),
    "channel": ("h_full", "h", "channel"),
    "effective_channel": ("h_eff", "heff", "effective_channel"),
    "codes": ("codes", "c", "phases", "ris"),
    "azimuth": ("azimuth", "azimuth_deg", "az", "phi"),
    "elevation": ("elevation", "elevation_deg", "el", "theta"),
    "range": ("range", "range_m", "ranges", "distance", "r"),
    "power": ("power", "powers", "p"),
    "covariance": ("covariance", "cov"),
    "count": ("count", "k", "num_sources"),
    "snr": ("snr", "snr_db"),
}
OPTIONAL = ("effective_channel", "power", "covariance", "count")


def starting_map(data: Path) -> str:
    """The text of a mapping file for the arrays of one file, or of the first one in a folder. Raises: DataError."""
    path = first_file(data)
    with arrays_of(path, None) as arrays:
        listed = {name: (array.shape, array.type) for name, array in arrays.items()}
        reverse = path.suffix.lower() == ".mat"
    lines = [f"# Mapping of {path.name}: its arrays, with the axes that {'MATLAB' if reverse else 'Python'} shows"]
    lines += [
        f"#   {name:32} {'x'.join(map(str, shape)) or 'one number'} {kind}" for name, (shape, kind) in listed.items()
    ]
    lines += [
        "# In each section: key (or real and imag), or value = 1.0 for all scenes; axes in the array's order ('scene':",
        "# the scenes; 'pair' an axis of real and imaginary parts; a number takes an axis at that place from 0); unit,",
        "# scale, conjugate = true. Take away what there is not. Then: ris-fast convert --map THIS --data DATA --check",
        "",
        "# [files]  # of each split; without it scenes are split by number",
        "# train = 'train*.mat'",
        "# val = 'val*.mat'",
        "",
        "# [task]  # settings of the array that the files do not say",
        "# wavelength_m = 0.3",
    ]
    for name in QUANTITIES:
        lines += ["", *_section(name, listed)]
    return "\n".join(lines) + "\n"


def write_starting_map(path: Path, data: Path) -> None:
    write_text(path, starting_map(data))


def _section(name: str, listed: dict[str, tuple[tuple[int, ...], str]]) -> list[str]:
    quantity = QUANTITIES[name]
    key = next((each for each in listed if each.rpartition("/")[2].lower() in GUESSES[name]), None)
    off = "# " if key is None and name in OPTIONAL else ""
    lines = [f"{off}[{name}]  # {quantity.help}", f"{off}key = '{key or '?'}'"]
    lines.append(f"{off}axes = '{' '.join(('scene', *quantity.axes))}'")
    if quantity.units:
        lines.append(f"{off}unit = '{'?' if quantity.must else quantity.units[0]}'  # {', '.join(quantity.units)}")
    return lines
