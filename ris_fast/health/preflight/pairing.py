"""Whether snapshots, channel and target belong to one scene: how much of the snapshots' energy the sources explain.

Model: y_l = H (c_l o A s_l) + n_l has D = L M complex numbers, and amplitudes of d of them are free (d = K for static
    symbols, K L for others). Of a scene with the share rho = SNR / (1 + SNR) of signal the sources explain rho + (1 -
    rho) d / D of the energy; of a scene whose parts do not belong together d / D, as Beta(d, D - d). Between the two
    lies `belonging`, 1 and 0.
Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.data.geometry import leading_factor
from ris_fast.physics.channel import sense
from ris_fast.physics.miscalibration import believed_snr_db
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes

WHOLE, HALF = 0.8, 0.5  # below WHOLE scenes as a group are mixed up, below HALF a scene by itself
# standard deviations: of a group that is called mixed up; between the two cases of one scene
DEVIATIONS, CLEAR = 5.0, 4.0
MIN_SIGNAL = 0.3  # share of signal from which a scene's own SNR is measured
SNR_CAP_DB = 30.0  # above it an SNR is as good as any other: rounding and a slightly different array reach it


def with_factor(scenes: Scenes) -> Scenes:
    """The scenes with a factor: of a dense target the one of its largest eigenvalues, which needs no steering
    vector."""
    if scenes.factor is not None or scenes.covariance is None:
        return scenes
    most = int(scenes.count.max()) if scenes.range_m is None else scenes.range_m.shape[1]
    return replace(scenes, factor=leading_factor(scenes.covariance, most))


def as_believed(scenes: Scenes, task: Task) -> Scenes:
    """The scenes with the SNR that is left to whoever trusts codes and channel; of a task that knows its array, as they
    are."""
    return replace(scenes, snr_db=believed_snr_db(task, scenes.snr_db))


def explained(snapshots: Tensor, channel: Tensor, codes: Tensor, factor: Tensor, static: bool) -> tuple[Tensor, Tensor]:
    """Share of each scene's energy that the best amplitudes of its sources explain, (B,) in [0, 1]; and d / D, (B,).

    Model: least squares in s, one for all snapshots where the symbols are static.
    """
    columns = torch.stack([to_complex(sense(channel, codes, factor[:, :, k])) for k in range(factor.shape[2])], -1)
    y = to_complex(snapshots)
    measured = y != 0  # exactly zero is no measurement: a mask took it out
    columns = columns * measured[..., None]
    if static:
        columns, y = columns.flatten(1, 2)[:, None], y.flatten(1)[:, None]
    used = columns.abs().square().sum(-2, keepdim=True)
    q, r = torch.linalg.qr(torch.where(used > 0, columns / used.clamp_min(1e-30).sqrt(), 0))
    keep = torch.diagonal(r, dim1=-2, dim2=-1).abs() > 1e-4
    part = (q.conj().transpose(-1, -2) @ y[..., None]).squeeze(-1)
    share = (part.abs().square() * keep).sum((1, 2)) / y.abs().square().sum((1, 2)).clamp_min(1e-30)
    return share, keep.sum((1, 2)) / measured.flatten(1).sum(1).clamp_min(1)


class Belonging(NamedTuple):
    """Of each scene, (B,): 1 where its parts belong together and 0 where they do not, with the standard deviations of
    both cases."""

    value: Tensor
    together: Tensor
    apart: Tensor

    @property
    def decided(self) -> Tensor:
        """Scenes loud enough to tell the two cases apart one by one."""
        return CLEAR * torch.maximum(self.together, self.apart) < HALF

    @property
    def broken(self) -> Tensor:
        return self.decided & (self.value < HALF)

    def group(self) -> tuple[float, float]:
        """Weighted mean of all scenes, and its standard deviation in the worse case."""
        spread = torch.maximum(self.together, self.apart).clamp_min(0.05)
        weight = spread.square().reciprocal()
        return float((weight * self.value).sum() / weight.sum()), float(weight.sum().rsqrt())

    @property
    def mixed_up(self) -> bool:
        mean, deviation = self.group()
        return mean < WHOLE and mean + DEVIATIONS * deviation < 1.0


def _measurements(scenes: Scenes) -> Tensor:
    """The complex numbers that were received of each scene, (B,)."""
    return (scenes.snapshots != 0).any(-1).flatten(1).sum(1).clamp_min(1).float()


def belonging(scenes: Scenes, static: bool) -> Belonging:
    """See the model above. The scenes have a channel and a factor."""
    share, chance = explained(scenes.snapshots, scenes.channel, scenes.codes, scenes.factor, static)
    ratio = 10.0 ** (scenes.snr_db / 10.0)
    signal, size = ratio / (1.0 + ratio), _measurements(scenes)
    free = (1.0 - chance).clamp_min(1e-6)
    together = 2.0 * (1.0 - signal) / (signal * (size * free).sqrt())
    apart = (chance * free / (size + 1)).sqrt() / (signal * free)
    blind = chance > 0.95  # everything is explained whatever the target
    return Belonging(
        (share - chance) / (signal * free), *(torch.where(blind, torch.inf, each) for each in (together, apart))
    )


class SnrLabels(NamedTuple):
    """SNR labels beside what the sources leave of the snapshots, in the scenes whose parts plainly belong together,
    (S,) each."""

    labels_db: Tensor
    measured_db: Tensor
    deviation_db: Tensor  # of the measurement
    scenes: int  # looked at
    loud: int  # of these, by their labels
    rows: Tensor  # numbers of those that are measured

    @property
    def away_db(self) -> Tensor:
        """How much the labels are too high. SNRs above the cap count as equal."""
        return self.labels_db.clamp_max(SNR_CAP_DB) - self.measured_db.clamp_max(SNR_CAP_DB)


def measure_snr(scenes: Scenes, static: bool) -> SnrLabels:
    """The SNR as the residual has it, in no need of the label.

    Model: the share explained is chance + (1 - chance) rho, with rho = SNR / (1 + SNR). The residual has D - d complex
        numbers of noise; the energy of the signal moves with its product with the noise, by 2 / (D SNR) of itself
        squared.
    """
    share, chance = explained(scenes.snapshots, scenes.channel, scenes.codes, scenes.factor, static)
    size, free = _measurements(scenes), (1.0 - chance).clamp_min(1e-6)
    signal = ((share - chance) / free).clamp(1e-6, 1.0 - 1e-6)
    least = (DEVIATIONS * (chance / (free * (size + 1))).sqrt()).clamp_min(MIN_SIGNAL)
    plain, promised = signal > least, 10.0 ** (scenes.snr_db / 10.0)
    ratio = signal / (1.0 - signal)
    deviation = (
        10.0 / math.log(10.0) * (1.0 / (size * free) + 2.0 / (size * ratio) + 1.0 / (size * ratio.square())).sqrt()
    )
    return SnrLabels(
        *(each[plain] for each in (scenes.snr_db, 10.0 * ratio.log10(), deviation)),
        len(signal),
        int((promised / (1.0 + promised) > least).sum()),
        plain.nonzero()[:, 0],
    )
