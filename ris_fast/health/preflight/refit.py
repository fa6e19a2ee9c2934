"""Codes and antennas fitted to the snapshots: whether others, the same for all scenes, explain what the given ones do
not.

Model: y_bl = G H_b (c_l o A_b s_bl) + n_bl with c_l and G the same for all scenes b. Each of the two is fitted on every
    second scene, in turn with s, and judged on the others: what is not in the snapshots does not help there.
Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ris_fast.health.preflight.pairing import belonging, measure_snr
from ris_fast.physics.real_complex import to_complex, to_pairs
from ris_fast.physics.scenes import Scenes

ROUNDS = 16  # of amplitudes and what is fitted, in turn
ENOUGH = 2.0  # equations for each unknown
GAIN_DB, CLOSE_DB = 4.0, 2.5  # at the median: what the fit adds to the measured SNR; how near the labels are then
LOUD_DB, FEWEST = 0.0, 4  # a scene that says something of what is fitted; of these
LITTLE = 1e-6  # of the mean square, added to what is inverted


def explains(scenes: Scenes, static: bool) -> str:
    """What explains the snapshots when it is fitted, in words; '' where neither does."""
    scenes = scenes[scenes.snr_db > LOUD_DB]
    one, other = scenes[::2], scenes[1::2]
    _, length, antennas, _ = scenes.snapshots.shape
    elements = scenes.channel.shape[2]
    if other.batch >= FEWEST and not scenes.own_codes and one.batch * antennas >= ENOUGH * elements:
        codes = to_complex(scenes.codes)
        for _ in range(ROUNDS):
            codes = _codes(_with_codes(one, codes), static)
        if _better(other, _with_codes(other, codes), static):
            return (
                f"with codes that were fitted on {one.batch} of them the sources explain the {other.batch} others as"
                " their SNR says: the codes that are given are not those that the snapshots were made with, though"
                f" near them ({_near(codes, to_complex(scenes.codes)):.0%} alike)"
            )
    if other.batch >= FEWEST and one.batch * length >= ENOUGH * antennas:
        turn = torch.eye(antennas, dtype=torch.complex64, device=scenes.channel.device)
        for _ in range(ROUNDS):
            turn = _antennas(_with_antennas(one, turn), static) @ turn
        if _better(other, _with_antennas(other, turn), static):
            return (
                f"with one matrix on the antennas, fitted on {one.batch} of them, the sources explain the"
                f" {other.batch} others as their SNR says: the antennas of snapshots and channel are not the same, in"
                " their order, their gains or their basis"
            )
    return ""


def _better(before: Scenes, after: Scenes, static: bool) -> bool:
    """Whether scenes that nothing was fitted on have the SNR of their labels now, and had not before."""
    own, free = measure_snr(before, static), measure_snr(after, static)
    if len(free.labels_db) < max(FEWEST, before.batch // 2) or belonging(after, static).mixed_up:
        return False
    if not float(free.away_db.median().abs()) < CLOSE_DB:
        return False
    return len(own.labels_db) < FEWEST or float(own.away_db.median()) > float(free.away_db.median()) + GAIN_DB


def _with_codes(scenes: Scenes, codes: Tensor) -> Scenes:
    return replace(scenes, codes=to_pairs(codes.to(torch.complex64)))


def _with_antennas(scenes: Scenes, turn: Tensor) -> Scenes:
    return replace(scenes, channel=to_pairs(turn @ to_complex(scenes.channel)))


def _near(codes: Tensor, given: Tensor) -> float:
    """How much of the fitted codes those that are given are, at any scale."""
    both = (codes.conj() * given).sum().abs().square()
    return float(both / (codes.abs().square().sum() * given.abs().square().sum()).clamp_min(1e-30))


def _fields(scenes: Scenes, static: bool) -> tuple[Tensor, Tensor]:
    """Snapshots of norm one, (B, L, M), and the field on the surface that explains them best, (B, L, N)."""
    y, factor = to_complex(scenes.snapshots), to_complex(scenes.factor)
    y = y / y.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
    coded = to_complex(scenes.codes)[..., None] * factor[:, None]  # (B, L, N, K)
    columns = to_complex(scenes.channel)[:, None] @ coded  # (B, L, M, K)
    if static:
        amplitudes = _solved(columns.flatten(1, 2), y.flatten(1))[:, None]
    else:
        amplitudes = _solved(columns, y)
    field = (factor[:, None] @ amplitudes[..., None]).squeeze(-1)
    return y, field.expand(-1, y.shape[1], -1)


def _solved(columns: Tensor, right: Tensor) -> Tensor:
    """Least squares. Args: (..., D, K) and (..., D)."""
    gram = columns.mH @ columns
    size = torch.diagonal(gram, dim1=-2, dim2=-1).real.mean(-1)[..., None, None].clamp_min(1e-30)
    eye = torch.eye(gram.shape[-1], device=gram.device)
    return torch.linalg.solve(gram + LITTLE * size * eye, columns.mH @ right[..., None]).squeeze(-1)


def _codes(scenes: Scenes, static: bool) -> Tensor:
    """The codes that explain the snapshots best, their fields given: (L, N)."""
    y, field = _fields(scenes, static)
    seen = to_complex(scenes.channel)[:, None] * field[:, :, None]  # (B, L, M, N)
    return _solved(seen.transpose(0, 1).flatten(1, 2), y.transpose(0, 1).flatten(1))


def _antennas(scenes: Scenes, static: bool) -> Tensor:
    """The matrix G on the antennas that explains them best: (M, M)."""
    y, field = _fields(scenes, static)
    coded = to_complex(scenes.codes) * field
    made = (to_complex(scenes.channel)[:, None] @ coded[..., None]).squeeze(-1).flatten(0, 1)  # (B L, M)
    return _solved(made.expand(y.shape[2], -1, -1), y.flatten(0, 1).T)
