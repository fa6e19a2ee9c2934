"""What the ranks of one step say of themselves: weights, gradients and scenes, in one gather.

On the steps that telemetry reads anyway each rank packs a record of 8-byte words on its device, and all gather the
records; nothing here waits for a device, and on other steps, and in a run of one rank, nothing is done.

The sum of gradients is checked by a linear law: for fixed vectors u, <u, sum of g_r> is the sum of <u, g_r>. Each rank
measures <u, g_r> before the all-reduce and <u, g> of what it has afterwards, so that a gradient that is missing, taken
twice or weighted otherwise shows to rounding, and which rank's it is.

Legend: R ranks, P elements of a flat buffer, S scenes at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ris_fast.physics.scenes import Scenes
from ris_fast.training.optim.views import real_numel
from ris_fast.training.ranks.group import Ranks

BLOCK = 64  # floats: every tensor begins a block of its own in a flat buffer, and fills its last one with zeros
PROBES = 2  # vectors u: with two, a factor on the whole sum and a missing part cannot be taken for each other
HEADER = (
    "checksum",
    "scenes",
    "nonfinite",
    "zero_scenes",
    "nonfinite_scenes",
    "norm",
    "share",
    "own",
    "own_norm",
    "expected",
    "expected_norm",
)
WHOLE = 5  # words of the header that are whole numbers; the others are float64, bit by bit


class Probe:
    """Fixed random numbers that a rank's weights, gradients and scenes are multiplied with; the same on every rank.

    Every value of a block has its own, every block has its own, and an element meets the product of the two.
    """

    def __init__(self, device: torch.device, blocks: int) -> None:
        generator = torch.Generator().manual_seed(0x5EED)
        self.odd = (torch.randint(-(2**62), 2**62, (blocks,), generator=generator) * 2 + 1).to(device)
        self.rows = torch.randn(PROBES, blocks, dtype=torch.float64, generator=generator).to(device)
        self.columns = torch.randn(BLOCK, generator=generator).to(device)

    @torch.no_grad()
    def checksum(self, tensors: Sequence[Tensor]) -> Tensor:
        """() int64 of the bits of float tensors, each a flat buffer: sums of blocks, mixed, each times an odd number of
        its block, modulo 2^64. One changed element always shows, and so do two tensors that have changed places;
        changes within one block that cancel in its sum do not."""
        sums = torch.cat([_blocks(tensor).view(torch.int64).sum(1) for tensor in tensors])
        return ((sums ^ (sums >> 32)) * self.odd[: len(sums)]).sum()  # mixed: highest bits of two blocks would cancel

    @torch.no_grad()
    def projections(self, tensors: Sequence[Tensor]) -> Tensor:
        """(PROBES,) float64: <u, tensors> for each u, to the rounding of float32 products within a block."""
        sums = torch.cat([_blocks(tensor) @ self.columns for tensor in tensors])
        return self.rows[:, : len(sums)] @ sums.double()

    @torch.no_grad()
    def signature(self, scenes: Scenes | None) -> Tensor:
        """(2,) float64 of the first scene's snapshots: their projection on u in units of their norm, and the norm; zero
        without a scene. Scenes that were computed in batches of different sizes agree to rounding."""
        if scenes is None or not scenes.batch:
            return self.rows.new_zeros(2)
        sums = _blocks(scenes.snapshots[0].detach().reshape(-1)) @ self.columns
        norm = torch.linalg.vector_norm(scenes.snapshots[0].double())
        return torch.stack(
            [self.rows[0, : len(sums)] @ sums[: self.rows.shape[1]].double() / norm.clamp_min(1e-300), norm]
        )


def _blocks(tensor: Tensor) -> Tensor:
    """(blocks, BLOCK) float32: a flat tensor as it lies; a copy only where it is not float32 or ends within a block."""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().reshape(-1).float()
    return fn.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK) if len(flat) % BLOCK else flat.view(-1, BLOCK)


class RankTelemetry:
    """A step's record of this rank; `StepTelemetry` calls the methods in their order.

    Args: ranks: more than one; capacity: scenes of a rank's step at most, the same number on every rank.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, optimizer: Any, capacity: int) -> None:
        self.ranks, self.model, self.optimizer, self.capacity = ranks, model, optimizer, capacity
        self.probe: Probe | None = None  # made when the first step is read
        self.expected: Scenes | None = None  # the next rank's first scene, as this rank makes it of its number
        self._clear()

    def _clear(self) -> None:
        self.scenes, self.share = 0, 0.0
        self.hashes: list[Tensor] = []
        self.before: Tensor | None = None
        self.first: Tensor | None = None
        self.invalid: Tensor | None = None
        self.local: tuple[Tensor, Tensor] | None = None
        self.gathered: Tensor | None = None  # (R, W) int64

    def begin(self) -> None:
        """Before anything of the step: the weights that it starts from."""
        self._clear()
        weights = self._weights()
        if self.probe is None:
            self.probe = Probe(weights[0].device, sum(-(-real_numel(tensor) // BLOCK) for tensor in weights))
        self.before = self.probe.checksum(weights)

    def shown(self, scenes: Scenes, hashes: Tensor, invalid: Tensor) -> None:
        """One micro-batch as the network received it. Args: hashes: (B,) int64 of its rows; invalid: (2,) int64, rows
        of zeros and rows that are not finite."""
        if self.first is None and scenes.batch:
            self.first = self.probe.signature(scenes)
        self.hashes.append(hashes)
        self.invalid = invalid if self.invalid is None else self.invalid + invalid
        self.scenes += scenes.batch

    def weighted(self, share: float) -> None:
        """A micro-batch whose loss counts for this share of the step's."""
        self.share += share

    def before_sum(self, norms: Tensor, gradients: Sequence[Tensor]) -> None:
        """This rank's own gradient, as flat buffers. Args: norms: (T,) of its tensors."""
        self.local = norms, self.probe.projections(gradients)

    def after_sum(self, gradients: Sequence[Tensor]) -> None:
        """What this rank steps with, in the same buffers. Gathers the records of all ranks."""
        norms, own = self.local
        summed, before = self.probe.projections(gradients), self.before
        first = self.probe.signature(None) if self.first is None else self.first
        whole = [before, torch.full_like(before, self.scenes), (~norms.isfinite()).sum()]
        whole += [*(torch.zeros_like(before).expand(2) if self.invalid is None else self.invalid)]
        figures = [norms.double().norm(), torch.full_like(own[0], self.share)]
        figures += [*first, *self.probe.signature(self.expected), *own, *summed]
        hashes = torch.zeros(self.capacity, dtype=torch.int64, device=before.device)
        if self.hashes:
            shown = torch.cat(self.hashes)[: self.capacity]
            hashes[: len(shown)] = shown
        record = torch.cat([torch.stack(whole), torch.stack(figures).view(torch.int64), hashes])
        self.gathered, self.expected = self.ranks.gathered(record), None

    def _weights(self) -> list[Tensor]:
        """The flat buffers that the optimizer steps, and the tensors of the network that are in none of them."""
        stepped = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in stepped]
        return [bucket.param for bucket in self.optimizer.buckets] + rest


def read_ranks(gathered: Tensor) -> dict[str, Any]:
    """The gathered records (R, W), on the host, in plain numbers: lists by rank, and pairs that share scenes."""
    floats = len(HEADER) - WHOLE + 2 * PROBES
    whole, figures, hashes = gathered[:, :WHOLE], gathered[:, WHOLE : WHOLE + floats], gathered[:, WHOLE + floats :]
    named = dict(zip(HEADER[WHOLE:], figures.contiguous().view(torch.float64).T.tolist()))
    projections = figures.contiguous().view(torch.float64)[:, len(HEADER) - WHOLE :]
    scenes = whole[:, 1].tolist()
    return {
        "weights": [f"{word & (2**64 - 1):016x}" for word in whole[:, 0].tolist()],
        "scenes": scenes,
        "nonfinite": whole[:, 2].tolist(),
        "zero_scenes": whole[:, 3].tolist(),
        "nonfinite_scenes": whole[:, 4].tolist(),
        "grad_norm": named["norm"],
        "share": named["share"],
        "as_numbered": _as_numbered(named),
        "own": projections[:, :PROBES].tolist(),
        "summed": projections[:, PROBES:].tolist(),
        "shared": _shared(hashes, scenes),
    }


def _as_numbered(named: dict[str, list[float]]) -> list[bool | None]:
    """Of each rank whether its first scene is what the rank before it makes of that number; None where one has none."""
    found: list[bool | None] = []
    for rank, (own, norm) in enumerate(zip(named["own"], named["own_norm"])):
        other, other_norm = named["expected"][rank - 1], named["expected_norm"][rank - 1]
        known = norm > 0 and other_norm > 0
        found.append(abs(own - other) < 1e-3 and abs(norm - other_norm) < 1e-3 * norm if known else None)
    return found


def _shared(hashes: Tensor, scenes: Sequence[int]) -> list[list[int]]:
    """[rank, higher rank, scenes that both were shown] of each pair that shares any."""
    rows = [row[:count] for row, count in zip(hashes, scenes)]
    every = torch.cat(rows)
    if len(every.unique()) == len(every):
        return []
    sets = [set(row.tolist()) for row in rows]
    holders: dict[int, list[int]] = {}
    for rank, each in enumerate(sets):
        for scene in each:
            holders.setdefault(scene, []).append(rank)
    counts: dict[tuple[int, int], int] = {}
    for ranks in holders.values():
        for other in ranks[1:]:
            counts[ranks[0], other] = counts.get((ranks[0], other), 0) + 1
    return [[*pair, count] for pair, count in sorted(counts.items())]
