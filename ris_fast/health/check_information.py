"""Preflight of the inputs' worth: what a classical estimator makes of exactly what the network is shown.

A network cannot know more than its inputs. Where the channel would say something of the sources and an estimator on the
network's own inputs says next to nothing, it is the front end that withholds the answer, whatever the network learns.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K columns of an estimate.
"""

from __future__ import annotations

import math
from typing import Iterator

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.subject import Subject
from ris_fast.physics.channel import backproject
from ris_fast.physics.floors import mean_covariance, target_energy
from ris_fast.physics.pairs import adjoint_matmul, matmul, power, to_complex, to_pairs
from ris_fast.physics.scenes import Scenes
from ris_fast.training.step import network_inputs

SCENES, FEWEST = 256, 64
TELLING = 0.05             # gain over the constant answer from which an estimate with the channel says something of the sources
NOTHING, INAUDIBLE = 0.01, -10.0    # gain of an estimate that knows nothing; dB of all snapshots and antennas together
PART = 0.25                # of that gain; the inputs that RIS-12x12 is meant for keep all of it, H c_l a twentieth


def estimates(subject: Subject, scenes: Scenes) -> tuple[str, Tensor] | None:
    """The estimator's name and its factor (B, N, K, 2), from the network's inputs alone; None for unknown inputs."""
    shown = subject.model.features(*network_inputs(scenes))
    if hasattr(subject.model, "classical"):
        return subject.model.classical(shown)
    if not isinstance(shown, tuple) or len(shown) != 3 or shown[2].dim() != 4:
        return None
    snapshots, products, pattern = shown
    if pattern.shape[0] == 1 < scenes.batch or scenes.own_codes and torch.equal(pattern, scenes.codes):  # of the channel only H c_l is shown
        pattern = backproject(least_squares_channel(products, scenes.codes), scenes.codes, snapshots)
    return "the matched filter", matched(subject, pattern)


def matched(subject: Subject, pattern_BLN: Tensor) -> Tensor:
    """Back-projections as a factor: their sum where the symbols are static, else a column for each snapshot."""
    static = subject.config.task.symbols == "static"
    return (pattern_BLN.sum(1)[:, :, None] if static else pattern_BLN.transpose(1, 2)).float()


def least_squares_channel(products_BLM: Tensor, codes: Tensor) -> Tensor:
    """The smallest channel with these H c_l, codes ([B,] L, N, 2): (B, M, N, 2)."""
    inverse = torch.linalg.pinv(to_complex(codes.double()))
    return to_pairs((inverse @ to_complex(products_BLM.double())).transpose(1, 2).to(torch.complex64)).contiguous()


def gains(factor: Tensor, scenes: Scenes, constant: Tensor) -> tuple[float, float]:
    """NMSE of the estimate, as far from the constant answer as serves all scenes best, and that of the constant answer.

    Model: R = C + a (F F^H - C), both of trace N, one a for all scenes; a = 0 is the constant answer.
    """
    estimate, target, size = factor.double(), scenes.factor.double(), factor.shape[1]
    own, total = power(estimate).sum((1, 2)), power(target).sum((1, 2))
    energy, length = target_energy(scenes), power(constant).sum()
    with_constant = [size * (matmul(constant[None].expand(len(each), -1, -1, -1), each) * each).sum((1, 2, 3)) / norm
                     for each, norm in ((estimate, own), (target, total))]
    both = size**2 * power(adjoint_matmul(estimate, target)).sum((1, 2)) / (own * total)
    square = size**2 * power(adjoint_matmul(estimate, estimate)).sum((1, 2)) / own.square()
    across = (both - with_constant[0] - with_constant[1] + length) / energy
    away = (square - 2 * with_constant[0] + length) / energy
    alone = (energy - 2 * with_constant[1] + length) / energy
    known = across.isfinite() & away.isfinite()      # an estimator may find nothing in a scene
    share = across[known].sum() / away[known].sum().clamp_min(1e-30)
    after = torch.where(known, alone - 2 * share * across + share.square() * away, alone)
    return float(after.mean()), float(alone.mean())


def worth(subject: Subject) -> Iterator[Finding]:
    """Beside the constant answer: the best of an estimator on the network's inputs, and of one with the channel itself."""
    source = subject.trainer.source
    scenes = source.batch("train", torch.arange(min(SCENES, source.size("train"))))
    if scenes.factor is None or scenes.channel is None or scenes.batch < FEWEST or not bool(scenes.snapshots.isfinite().all()):
        return
    constant, found = mean_covariance([scenes]), estimates(subject, scenes)
    if found is None:
        return
    name, factor = found
    shown, alone = gains(factor, scenes, constant)
    known, _ = gains(matched(subject, backproject(scenes.channel, scenes.codes, scenes.snapshots)), scenes, constant)
    subject.note = f"{name} on the network's inputs {shown:.3f}, constant answer {alone:.3f}"
    heard = float(scenes.snr_db.median()) + 10 * math.log10(scenes.snapshots[0, ..., 0].numel())
    if heard < INAUDIBLE and known > (1 - NOTHING) * alone:
        yield Finding("inputs_withhold_answer", f"the scenes themselves say nothing of their sources: the matched filter with the channel has an "
                      f"NMSE of {known:.3f}, the constant answer {alone:.3f}, and at the median SNR of {float(scenes.snr_db.median()):g} dB "
                      f"all snapshots and antennas together reach {heard:.0f} dB. Raise task.snr_min_db and task.snr_max_db.", certain=False)
    elif known < (1 - TELLING) * alone and alone - shown < PART * (alone - known):
        yield Finding("inputs_withhold_answer", f"{name} on what the network is shown has an NMSE of {shown:.3f}, the constant answer "
                      f"{alone:.3f}, and the matched filter with the channel {known:.3f}.", certain=False)


CHECKS = {"a classical estimator finds the answer in the inputs": worth}
