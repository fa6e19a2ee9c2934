"""One pass over .npz shards in order: check every value, keep the columns that training needs.

The off-centre array of the original is shifted to the centred one, and the dense R replaced by its exact factors
where there are any, so that R (89 % of the bytes, with R_samp) is read once and not kept.
Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.data.fingerprints import scene_hashes
from ris_fast.data.geometry import CENTRED, EXACT, CentredSources, Reach, centre, find_offset, recover_powers
from ris_fast.data.npz_format import NpzShard, check_values, split_ptr
from ris_fast.data.packed_codes import PACKED, pack_codes, packed_bytes
from ris_fast.data.table import Table, TableMemory, choose_memory
from ris_fast.physics.array import RISArray
from ris_fast.physics.channel import effective_channel
from ris_fast.physics.real_complex import conj

CHUNK = 256
SAME_CODES = 1e-5
APART = 0.5  # NMSE of the R of another scene: 0.99; of elements that move as the original's do: up to 0.04
GAP = 0.25  # the R of other sources are above 1 - GAP; heavy element jitter fills what is between GAP and that
BIG = {"y": "snapshots", "H_full": "channel", "H": "effective_channel", "R": "covariance"}


@dataclass
class Facts:
    """What one pass over a split found out."""

    exact: bool
    offset: tuple[float, float] = CENTRED
    clamped: int = 0
    stored: Reach = field(default_factory=Reach)  # of the sources as the files have them
    served: Reach = field(default_factory=Reach)  # of the sources as seen from the centre of the array
    wrong_channel: int = 0  # scenes in which H is not H_full c_l
    conjugate_codes: int = 0  # of these, H is H_full times the conjugate of the codes
    hashes: list[np.ndarray] = field(default_factory=list)  # of the scenes, chunk by chunk
    fits: list[Tensor] = field(default_factory=list)  # NMSE of R on the scene's own sources, chunk by chunk


class Assumption(Exception):
    """What a pass took for granted does not hold: its `setting`, exact or shared, must be False."""

    def __init__(self, setting: str) -> None:
        super().__init__(setting)
        self.setting = setting


@dataclass
class LoadedSplit:
    table: Table
    codes: Tensor | None  # (L, N, 2); None where each scene has its own, which are columns of the table
    facts: Facts
    memory: TableMemory


def load_split(
    where: Path,
    shards: Sequence[NpzShard],
    rows: int,
    task: Task,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    memory: str = "auto",
) -> LoadedSplit:
    """Read the first `rows` scenes of the shards once, check every value, keep what training needs.

    Args: memory: data.memory.
    Raises: DataError for any file that cannot be used, and where the scenes fit nowhere; nothing large is allocated
        before that is known.
    """
    known: dict[str, bool] = {}
    while True:
        try:
            return _Loader(where, shards, rows, task, device, memory, **known).run(progress)
        except Assumption as found:
            known[found.setting] = False


class _Loader:
    """One pass. With `exact` the target is kept as source powers, else as the dense R; with `shared` codes are kept
    once."""

    def __init__(
        self,
        where: Path,
        shards: Sequence[NpzShard],
        rows: int,
        task: Task,
        device: torch.device,
        memory: str = "auto",
        exact: bool = True,
        shared: bool = True,
    ) -> None:
        self.shards, self.rows, self.task = shards, rows, task
        self.array, self.facts, self.shared = RISArray.of(task), Facts(exact), shared
        self.keep = {key: BIG[key] for key in ("y", "H_full" if shards[0].channel else "H", *(() if exact else ("R",)))}
        row_bytes = sum(shards[0].columns[key].row_bytes for key in self.keep)
        row_bytes += 4 * 9 * task.max_sources + 12 + (0 if shared else packed_bytes(task.snapshots, task.elements))
        decoded = max(sum(column.stored.decoded_bytes for column in shard.columns.values()) for shard in shards)
        streamable = all(shard.mappable for shard in shards)
        self.memory = choose_memory(where, rows, row_bytes, device, streamable=streamable, wanted=memory, extra=decoded)
        resident = self.memory.tier == "device"
        self.table = Table(rows, device if resident else torch.device("cpu"), device.type == "cuda" and not resident)
        self.codes: Tensor | None = None

    def run(self, progress: Callable[[int, int], None] | None) -> LoadedSplit:
        start = 0
        for shard in self.shards:
            take = min(shard.scenes, self.rows - start)
            if take <= 0:
                break
            if self.memory.tier == "files":
                self.table.files.see(shard.path)
            for at, chunk in shard_chunks(shard, take):
                check_values(shard.path, chunk, at, self.task)
                self._compare_codes(chunk["codes"])
                self._keep(chunk, start + at)
                if progress is not None:
                    progress(start + at + chunk["K"].numel(), self.rows)
            if self.memory.tier == "files":
                for key, column in self.keep.items():
                    self.table.attach(column, shard.columns[key])
                if not self.shared:
                    self.table.attach("codes", shard.columns["codes"])
            start += take
        assert self.codes is not None
        codes = self.codes.to(self.table.device) if self.shared else None
        return LoadedSplit(self.table, codes, self.facts, self.memory)

    def _compare_codes(self, codes: Tensor) -> None:
        """Whether all scenes have the first one's codes."""
        self.codes = codes[0].clone() if self.codes is None else self.codes
        if self.shared and not same_codes(codes, self.codes):
            raise Assumption("shared")

    def _keep(self, chunk: dict[str, Tensor], start: int) -> None:
        self._target(chunk, start)
        self._note(chunk)
        if self.memory.tier != "files":
            for key, column in self.keep.items():
                self.table.write(start, column, chunk[key])
            if not self.shared:
                for column, values in zip(PACKED, pack_codes(chunk["codes"])):
                    self.table.write(start, column, values)
        self.table.write(start, "count", chunk["K"].to(torch.int64))
        self.table.write(start, "snr_db", chunk["snr"])

    def _target(self, chunk: dict[str, Tensor], start: int) -> None:
        """Source positions on the centred array, and their powers where R is exactly their sum."""
        if start == 0:
            self.facts.offset = find_offset_of(self.array, chunk)
        columns = target_columns(self.array, self.facts, chunk)
        if not self.facts.exact:
            columns["ptr"] = chunk["ptr"]
        for name, values in columns.items():
            self.table.write(start, name, values)

    def _note(self, chunk: dict[str, Tensor]) -> None:
        """H against H_full, and the hashes."""
        if self.codes is not None:
            compare_channels(self.facts, chunk, self.codes if self.shared else chunk["codes"])
        self.facts.hashes.append(scene_hashes(chunk["y"]))


def same_codes(codes: Tensor, first: Tensor) -> bool:
    """Whether all scenes (B, L, N, 2) have these codes, to a relative 1e-5."""
    return float((codes - first).abs().max()) <= SAME_CODES * float(first.abs().max())


def find_offset_of(array: RISArray, chunk: dict[str, Tensor]) -> tuple[float, float]:
    """Where the files' array sits, in spacings off the origin, from the first scenes of a split."""
    return find_offset(array, *split_ptr(chunk["ptr"].double(), chunk["K"]), chunk["R"])


def target_columns(array: RISArray, facts: Facts, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """Source positions on the centred array, float32, and with `facts.exact` the powers of which R is the sum.

    What it sees goes into `facts`. Raises: Assumption where R is not exactly their sum.
    """
    sources, active = centred_sources(array, facts, chunk)
    columns = {"azimuth": sources.azimuth, "elevation": sources.elevation, "range_m": sources.range_m * active}
    power, fit = recover_powers(array, sources, active, chunk["R"])
    facts.fits.append(fit)
    if facts.exact:
        if float(fit.max()) > EXACT:
            raise Assumption("exact")
        power = power * (array.elements / power.sum(1, keepdim=True))
        columns |= {"power": power, "u": sources.u, "v": sources.v}
    return {name: values.float() for name, values in columns.items()}


def centred_sources(array: RISArray, facts: Facts, chunk: dict[str, Tensor]) -> tuple[CentredSources, Tensor]:
    """The sources as the centred array sees them, and which of them are there, (B, K); what is seen goes into
    `facts`."""
    azimuth, elevation, range_m, active = split_ptr(chunk["ptr"].double(), chunk["K"])
    sources = centre(array, facts.offset, azimuth, elevation, range_m, active)
    facts.clamped += int(sources.clamped.sum())
    facts.stored.include(azimuth, elevation, range_m, active)
    facts.served.include(sources.azimuth, sources.elevation, sources.range_m, active)
    return sources, active


def compare_channels(facts: Facts, chunk: dict[str, Tensor], codes: Tensor) -> None:
    """Counts the scenes in which H is not H_full c_l, where both are there."""
    if "H" in chunk and "H_full" in chunk:
        wrong = _wrong_channel(chunk, codes)
        facts.wrong_channel += wrong
        facts.conjugate_codes += wrong and len(chunk["H"]) - _wrong_channel(chunk, conj(codes))


def _wrong_channel(chunk: dict[str, Tensor], codes: Tensor) -> int:
    """In how many scenes H is not H_full c_l."""
    away = (effective_channel(chunk["H_full"], codes) - chunk["H"]).flatten(1).norm(dim=1)
    return int((away > 1e-3 * chunk["H"].flatten(1).norm(dim=1)).sum())


def clearly_apart(fit: Tensor) -> int:
    """How many R belong to other sources, of the NMSE of each on its own; 0 where the NMSE has no gap, as where
    elements moved far."""
    between = (fit > GAP) & (fit <= 1 - GAP)
    return int((fit > APART).sum()) if int((fit > 1 - GAP).sum()) > int(between.sum()) else 0


def shard_chunks(shard: NpzShard, limit: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """All keys of a shard in lockstep: (first row, {key: rows})."""
    streams = {key: column.chunks(CHUNK, limit) for key, column in shard.columns.items()}
    for at in range(0, limit, CHUNK):
        yield at, {key: torch.from_numpy(next(stream)) for key, stream in streams.items()}
    for stream in streams.values():
        next(stream, None)


def hash_snapshots(shards: Sequence[NpzShard], rows: int) -> np.ndarray:
    """The hashes of a split whose other arrays are not needed yet: reads y alone."""
    hashes = [np.empty(0, np.uint64)]
    for shard in shards:
        limit = min(shard.scenes, rows)
        rows -= limit
        hashes += [scene_hashes(torch.from_numpy(chunk)) for chunk in shard.columns["y"].chunks(CHUNK, limit)]
    return np.concatenate(hashes)
