"""RIS codes: quantised two-dimensional DFT beams. Legend: L snapshots, N elements."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.physics.real_complex import expi

BEAMS_A_SIDE = 8


def dft_codes(task: Task, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """The task's L codes, each element a phase of modulus one: (L, N, 2).

    Model: beam 8 q + p has phase 2 pi (p i / N_H + q j / N_V) on the centred index grid; L of the 64 beams are taken
        at an even stride; each phase is rounded to a multiple of 2 pi / 2^bits.
    """
    beam = torch.arange(task.snapshots, dtype=torch.float64) * (BEAMS_A_SIDE**2 // task.snapshots)
    p, q = beam % BEAMS_A_SIDE, beam // BEAMS_A_SIDE
    i = torch.arange(task.ris_horizontal, dtype=torch.float64) - (task.ris_horizontal - 1) / 2
    j = torch.arange(task.ris_vertical, dtype=torch.float64) - (task.ris_vertical - 1) / 2
    turns = (p[:, None, None] * i / task.ris_horizontal + (q[:, None] * j / task.ris_vertical)[:, :, None]).flatten(1)
    levels = 2**task.code_bits
    phase = torch.round(turns * levels) * (2.0 * math.pi / levels)
    return expi(phase).to(device=device, dtype=dtype)
