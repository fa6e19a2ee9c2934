"""What network and estimators do not know of a scene: phase errors of the surface, errors of the channel estimate.

Model: element n turns the phase by d_n more than its code says, y_l = H diag(c_l) diag(exp(j d)) x_l + n_l, d_n ~ N(0,
    sigma^2); the channel handed over is H + E, E white with E|E|^2 = mean |H|^2 / SNR of the scene. Snapshots are made
    with the true codes c_l exp(j d) and the true H; targets are of the sources alone.
Numbers: streams of their own, so that the rest of a scene does not depend on whether they are drawn.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.physics.random import SceneGenerator, surface_normal
from ris_fast.physics.real_complex import expi, multiply, power


def phase_errors(task: Task, index: Tensor, generator: SceneGenerator) -> Tensor:
    """Phase errors in rad: (N,) of the task's surface, or (B, N) of scenes that have surfaces of their own."""
    if task.phase_error_surface:
        normal = surface_normal(task.phase_error_surface, task.elements, index.device)
    else:
        normal = generator.normal(index, "phase_error", task.elements)
    return math.radians(task.phase_error_deg) * normal


def true_codes(task: Task, codes: Tensor, index: Tensor, generator: SceneGenerator) -> Tensor:
    """The phases that the surface shows for these codes, ([B,] L, N, 2); the codes themselves without phase errors."""
    if not task.phase_error_deg:
        return codes
    return multiply(codes, expi(phase_errors(task, index, generator))[..., None, :, :])


def estimated_channel(task: Task, channel: Tensor, index: Tensor, generator: SceneGenerator) -> Tensor:
    """The channel (B, M, N, 2) with the error of its estimate; the channel itself where it is known."""
    if not task.channel_snr_db:
        return channel
    error = generator.normal(index, "channel_error", channel[:1].numel()).view_as(channel)
    variance = power(channel).mean((1, 2)) * 10.0 ** (-task.channel_snr_db / 10.0)
    return torch.addcmul(channel, error, (variance / 2).sqrt()[:, None, None, None])


def believed_snr_db(task: Task, snr_db: Tensor) -> Tensor:
    """The SNR in dB of snapshots whose receiver trusts its codes and its channel: what these do not explain is noise to
    it.

    Model: of the signal a share f = exp(-sigma^2) / (1 + 1/SNR_H) is explained in the mean, so that with rho = SNR / (1
        + SNR) the ratio is f rho / (1 - f rho).
    """
    explained = math.exp(-(math.radians(task.phase_error_deg) ** 2))
    if task.channel_snr_db:
        explained /= 1.0 + 10.0 ** (-task.channel_snr_db / 10.0)
    if explained == 1.0:
        return snr_db
    ratio = 10.0 ** (snr_db / 10.0)
    signal = explained * ratio / (1.0 + ratio)
    return 10.0 * (signal / (1.0 - signal)).log10()
