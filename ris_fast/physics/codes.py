"""RIS codes: quantised two-dimensional DFT beams, or a code book of the user's own. Legend: L snapshots, N elements."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ris_fast.config.own_physics import CODES, read_codes, unchanged_file
from ris_fast.config.schema import ConfigError, Task
from ris_fast.physics.array import RISArray
from ris_fast.physics.real_complex import expi

BEAMS_A_SIDE = 8


def dft_codes(task: Task, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """The task's L codes, each element a phase of modulus one: (L, N, 2).

    Model: beam 8 q + p has phase 2 pi (p i / N_H + q j / N_V) on the centred index grid, of elements anywhere 2 pi (p x
        / W + q y / H) over the width and height of the aperture; L of the 64 beams are taken at an even stride; each
        phase is rounded to a multiple of 2 pi / 2^bits.
    """
    beam = torch.arange(task.snapshots, dtype=torch.float64) * (BEAMS_A_SIDE**2 // task.snapshots)
    p, q = beam % BEAMS_A_SIDE, beam // BEAMS_A_SIDE
    turns = _turns(task, p[:, None], q[:, None])
    levels = 2**task.code_bits
    phase = torch.round(turns * levels) * (2.0 * math.pi / levels)
    return expi(phase).to(device=device, dtype=dtype)


def own_codes(task: Task, device: torch.device | str = "cpu") -> Tensor:
    """The L codes of the task's code book: (L, N, 2) float32. Raises: ConfigError where the file does not fit."""
    unchanged_file(CODES, task.codes_file, task.codes_hash)
    codes = read_codes(task.codes_file)
    asked = (task.snapshots, task.elements)
    if codes.shape != asked:
        shape = f"{codes.shape[0]} codes of {codes.shape[1]} elements"
        todo = [f"--set task.snapshots={codes.shape[0]}"] if codes.shape[0] != asked[0] else []
        if codes.shape[1] != asked[1]:
            todo.append("an array of as many elements (task.ris_horizontal, task.ris_vertical or task.elements_file)")
        if codes.shape[::-1] == asked:
            todo = ["it transposed"]
        raise ConfigError(
            f"{CODES} = '{task.codes_file}' holds {shape}; the task has {asked[0]} snapshots of {asked[1]} elements."
            f" Give {' and '.join(todo)}."
        )
    return torch.view_as_real(torch.from_numpy(codes)).to(device, torch.float32)


def _turns(task: Task, p: Tensor, q: Tensor) -> Tensor:
    """Phases of the beams p, q (L, 1) in turns: (L, N)."""
    if not task.elements_file:
        i = torch.arange(task.ris_horizontal, dtype=torch.float64) - (task.ris_horizontal - 1) / 2
        j = torch.arange(task.ris_vertical, dtype=torch.float64) - (task.ris_vertical - 1) / 2
        return (p[..., None] * i / task.ris_horizontal + (q * j / task.ris_vertical)[:, :, None]).flatten(1)
    x, y = RISArray.of(task).shares()
    return p * x + q * y
