"""The sample covariance of the blend: the field on the surface by regularised least squares, from measurements alone.

Legend: B batch, N RIS elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ris_fast.kernels.field.op import aperture_field
from ris_fast.kernels.scale import power_of_two
from ris_fast.physics.scenes import Scenes

STEPS = 6  # of conjugate gradients


@torch.no_grad()
def least_squares_factor(scenes: Scenes, steps: int = STEPS) -> Tensor:
    """A sample covariance for the blend, R_samp = x x^H, as its factor x: the field that `aperture_field` estimates.

    Args: scenes: with channel, codes, snapshots and snr_db; steps: of conjugate gradients.
    Returns: (B, N, 1, 2), without a gradient.
    Raises: ValueError where the scenes carry no channel.
    """
    if scenes.channel is None:
        raise ValueError(
            "least_squares_factor: loss.beta > 0 blends a sample covariance, which needs the channel H; these "
            "scenes carry none. Set loss.beta = 0, or use data with H_full."
        )
    unit = power_of_two(scenes.channel), power_of_two(scenes.snapshots)  # squares of numbers in any unit stay finite
    field = aperture_field(
        scenes.channel * unit[0], scenes.codes, scenes.snapshots * unit[1], scenes.snr_db, steps=steps
    )
    return field * (unit[0] / unit[1])
