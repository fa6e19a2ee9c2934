"""One pass over .npz shards in order: check every value, keep the columns that training needs.

The off-centre array of the original is shifted to the centred one, and the dense R replaced by its exact factors
where there are any, so that R (89 % of the bytes, with R_samp) is read once and not kept.
Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ris_fast.config import Task
from ris_fast.data.errors import DataError
from ris_fast.data.fingerprints import scene_hashes
from ris_fast.data.geometry import CENTRED, centre, original_offset, recover_powers
from ris_fast.data.npz_format import NpzShard, check_values, split_ptr
from ris_fast.data.table import Placement, Table, place_table
from ris_fast.physics.array import RISArray
from ris_fast.physics.channel import collapsed_channel

CHUNK = 256
EXACT = 1e-6             # NMSE of R against its own factors: float32 phases leave up to 1e-9, element jitter 1e-2
BIG = {"y": "snapshots", "H_full": "channel", "H": "collapsed", "R": "covariance"}


@dataclass
class Facts:
    """What one pass over a split found out."""

    exact: bool
    offset: tuple[float, float] = CENTRED
    worst_fit: float = 0.0
    clamped: int = 0
    wrong_collapsed: int = 0
    hashes: list[bytes] = field(default_factory=list)


class _NotExact(Exception):
    """A scene whose R is not a sum over its own sources: the dense target is needed."""


@dataclass
class LoadedSplit:
    table: Table
    codes: Tensor
    facts: Facts
    placement: Placement


def load_split(where: Path, shards: Sequence[NpzShard], rows: int, task: Task, device: torch.device,
               progress: Callable[[int, int], None] | None = None) -> LoadedSplit:
    """Read the first `rows` scenes of the shards once, check every value, keep what training needs.

    Raises: DataError for any file that cannot be used, and where the scenes fit nowhere; nothing large is allocated
        before that is known.
    """
    try:
        return _Loader(where, shards, rows, task, device, exact=True).run(progress)
    except _NotExact:
        return _Loader(where, shards, rows, task, device, exact=False).run(progress)


class _Loader:
    """One pass. With `exact` the target is kept as source powers, else as the dense R."""

    def __init__(self, where: Path, shards: Sequence[NpzShard], rows: int, task: Task, device: torch.device,
                 exact: bool) -> None:
        self.shards, self.rows, self.task = shards, rows, task
        self.array, self.facts = RISArray.of(task), Facts(exact)
        self.keep = {key: BIG[key] for key in ("y", "H_full" if shards[0].channel else "H", *(() if exact else ("R",)))}
        row_bytes = sum(shards[0].arrays[key].row_bytes for key in self.keep)
        row_bytes += 4 * 6 * task.max_sources + 12
        self.placement = place_table(where, rows * row_bytes, device, mappable=all(s.mappable for s in shards))
        self.table = Table(rows, device if self.placement.place == "device" else torch.device("cpu"))
        self.codes: Tensor | None = None

    def run(self, progress: Callable[[int, int], None] | None) -> LoadedSplit:
        start = 0
        for shard in self.shards:
            take = min(shard.scenes, self.rows - start)
            if take <= 0:
                break
            for at, chunk in _chunks(shard, take):
                check_values(shard.path, chunk, at, self.task)
                self._check_codes(shard.path, chunk["codes"], at)
                self._keep(chunk, start + at)
                if progress is not None:
                    progress(start + at + chunk["K"].numel(), self.rows)
            if self.placement.place == "mapped":
                for key, column in self.keep.items():
                    self.table.attach(column, shard.arrays[key].map())
            start += take
        assert self.codes is not None
        return LoadedSplit(self.table, self.codes.to(self.table.device), self.facts, self.placement)

    def _check_codes(self, path: Path, codes: Tensor, at: int) -> None:
        self.codes = codes[0].clone() if self.codes is None else self.codes
        away = (codes - self.codes).abs().flatten(1).amax(1)
        if float(away.max()) > 1e-5:
            row = int(away.argmax())
            found = f"other codes in scene {at + row} than in the first scene (by {float(away.max()):.3g})"
            raise DataError(path, "codes", found, "one set of codes for all scenes",
                            "Generate the data without domain randomisation of the codes.")

    def _keep(self, chunk: dict[str, Tensor], start: int) -> None:
        self._target(chunk, start)
        self._note(chunk)
        if self.placement.place != "mapped":
            for key, column in self.keep.items():
                self.table.write(start, column, chunk[key])
        self.table.write(start, "count", chunk["K"].to(torch.int64))
        self.table.write(start, "snr_db", chunk["snr"])

    def _target(self, chunk: dict[str, Tensor], start: int) -> None:
        """Source positions on the centred array, and their powers where R is exactly their sum."""
        azimuth, elevation, range_m, active = split_ptr(chunk["ptr"].double(), chunk["K"])
        if start == 0:
            self.facts.offset = self._find_offset(azimuth, elevation, range_m, active, chunk["R"])
        sources = centre(self.array, self.facts.offset, azimuth, elevation, range_m, active)
        self.facts.clamped += int(sources.clamped.sum())
        columns = {"azimuth": sources.azimuth, "elevation": sources.elevation, "range_m": sources.range_m * active}
        if self.facts.exact:
            power, fit = recover_powers(self.array, sources, active, chunk["R"])
            self.facts.worst_fit = max(self.facts.worst_fit, float(fit.max()))
            if self.facts.worst_fit > EXACT:
                raise _NotExact
            power = power * (self.task.elements / power.sum(1, keepdim=True))
            columns |= {"power": power, "u": sources.u, "v": sources.v}
        for name, values in columns.items():
            self.table.write(start, name, values.float())

    def _find_offset(self, azimuth: Tensor, elevation: Tensor, range_m: Tensor, active: Tensor,
                     target: Tensor) -> tuple[float, float]:
        """The original's half element, or none: whichever explains the first scenes' R better."""
        def misfit(offset: tuple[float, float]) -> float:
            few = [t[:32] for t in (azimuth, elevation, range_m, active)]
            return float(recover_powers(self.array, centre(self.array, offset, *few), few[3], target[:32])[1].median())

        return min((original_offset(self.array), CENTRED), key=misfit)

    def _note(self, chunk: dict[str, Tensor]) -> None:
        """H against H_full, and the hashes."""
        if "H" in chunk and "H_full" in chunk and self.codes is not None:
            away = (collapsed_channel(chunk["H_full"], self.codes) - chunk["H"]).flatten(1).norm(dim=1)
            self.facts.wrong_collapsed += int((away > 1e-3 * chunk["H"].flatten(1).norm(dim=1)).sum())
        self.facts.hashes += scene_hashes(chunk["y"])


def _chunks(shard: NpzShard, limit: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """All keys of a shard in lockstep: (first row, {key: rows})."""
    streams = {key: array.chunks(CHUNK, limit) for key, array in shard.arrays.items()}
    for at in range(0, limit, CHUNK):
        yield at, {key: torch.from_numpy(next(stream)) for key, stream in streams.items()}
    for stream in streams.values():
        next(stream, None)


def hash_snapshots(shards: Sequence[NpzShard], rows: int) -> list[bytes]:
    """The hashes of a split whose other arrays are not needed yet: reads y alone."""
    hashes: list[bytes] = []
    for shard in shards:
        limit = min(shard.scenes, rows - len(hashes))
        for chunk in shard.arrays["y"].chunks(CHUNK, limit):
            hashes += scene_hashes(torch.from_numpy(chunk))
    return hashes
