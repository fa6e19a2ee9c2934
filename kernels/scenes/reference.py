"""The definition of a batch of scenes in plain torch: what the fused kernel must equal.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources, S symbols (1 or L); a last axis of 2
is (re, im). All lengths in wavelengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..philox import reference as philox


def steering(positions_2N: Tensor, position: Tensor, spherical: bool) -> Tensor:
    """Unit-norm near-field vectors exp(2 pi j path)/sqrt(N) of (..., 3) azimuth, elevation, range: complex (..., N).

    Model: u = sin(azimuth) cos(elevation), v = sin(elevation); fresnel: path = u x + v y - (x^2 + y^2)/(2 r);
        spherical: path = r - sqrt(r^2 - 2 r (u x + v y) + x^2 + y^2).
    """
    x, y = positions_2N
    azimuth, elevation, r = position[..., None].unbind(-2)
    u, v = azimuth.sin() * elevation.cos(), elevation.sin()
    plane, bow = u * x + v * y, x * x + y * y
    excess = bow - 2.0 * r * plane
    path = -excess / (r + (r * r + excess).sqrt()) if spherical else plane - bow / (2.0 * r)
    return torch.polar(torch.full_like(path, x.numel() ** -0.5), 2.0 * math.pi * path)


def scenes(
    index_B: Tensor,
    seed: int,
    channel_stream: int,
    noise_stream: int,
    antennas: int,
    positions_2N: Tensor,
    codes: Tensor,
    source_BK3: Tensor,
    amplitude_BSK2: Tensor,
    power_BK: Tensor,
    los_direction_B3: Tensor,
    rician_B: Tensor,
    channel_BMN2: Tensor | None,
    snr_db_B: Tensor,
    spherical: bool,
    normal: Callable[..., Tensor] = philox.normal,
) -> tuple[Tensor, Tensor, Tensor]:
    """Channel H (B, M, N, 2), noisy snapshots y (B, L, M, 2), target factor (B, N, K, 2).

    Args: codes (L, N, 2) or one set a scene, (B, L, N, 2); the others have their shape in the name.

    Model: H = sqrt(k/(k+1)) b a^H + W / sqrt(2 M (k+1)) with k `rician_B`, a the steering vector of `los_direction_B3`,
        b the far-field one of a line of M antennas at half a wavelength, W standard normal in both parts,
        or `channel_BMN2` where it is given;
        y_l = H (c_l o sum_k amplitude_k a_k) + n_l, n_l complex white with E|n|^2 = mean |y|^2 / 10^(snr_db / 10);
        column k of the factor is sqrt(power_k) a_k.
    Numbers: element e of W and of n, counted row by row with (re, im) innermost, is normal e of its stream.
    """
    dtype, m, n, count = source_BK3.dtype, antennas, positions_2N.shape[1], index_B.numel()
    codes, amplitude_BSK = (torch.view_as_complex(a.contiguous()) for a in (codes, amplitude_BSK2))
    if channel_BMN2 is None:
        offset_M = torch.arange(m, device=index_B.device, dtype=dtype) - (m - 1) / 2
        phase_BM = math.pi * offset_M * (los_direction_B3[:, :1].sin() * los_direction_B3[:, 1:2].cos())
        b_BM = torch.polar((rician_B / (rician_B + 1) / m).sqrt()[:, None].expand(-1, m), phase_BM)
        w_BMN2 = normal(index_B, seed, channel_stream, 2 * m * n).to(dtype).view(count, m, n, 2)
        # Not .conj(): torch.compile calls an operator where a conjugate that is still to be taken is forgotten.
        a_BN = torch.conj_physical(steering(positions_2N, los_direction_B3, spherical))
        line_BMN = b_BM[:, :, None] * a_BN[:, None, :]
        channel_BMN = line_BMN + (0.5 / (m * (rician_B + 1))).sqrt()[:, None, None] * torch.view_as_complex(w_BMN2)
    else:
        channel_BMN = torch.view_as_complex(channel_BMN2.to(dtype).clone(memory_format=torch.contiguous_format))
    steer_BKN = steering(positions_2N, source_BK3, spherical)
    clean_BLM = (codes * (amplitude_BSK @ steer_BKN)) @ channel_BMN.transpose(1, 2)
    noise_BLM2 = normal(index_B, seed, noise_stream, 2 * clean_BLM[:1].numel()).to(dtype).view(*clean_BLM.shape, 2)
    deviation_B = (clean_BLM.abs().square().mean((1, 2)) * 10.0 ** (-snr_db_B / 10.0) / 2.0).sqrt()
    snapshots_BLM2 = torch.view_as_real(clean_BLM) + deviation_B[:, None, None, None] * noise_BLM2
    factor_BNK = (steer_BKN * power_BK.sqrt()[..., None]).transpose(1, 2)
    return torch.view_as_real(channel_BMN), snapshots_BLM2, torch.view_as_real(factor_BNK.contiguous())
