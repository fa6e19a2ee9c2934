"""A BS-RIS channel of your own, a direct path and a weaker echo: --set task.channel=examples/own_channel.py"""

import math

import torch
from torch import Tensor

from ris_fast import RISArray, SceneGenerator
from ris_fast.config.schema import Task

ECHO_DB = -10.0


def two_paths(task: Task, index: Tensor, generator: SceneGenerator) -> Tensor:
    """H (B, M, N): two plane waves, each with a gain and directions of its own, drawn from the scene's number alone."""
    x, y = RISArray.of(task).positions(index.device)  # (N,) in metres
    m = torch.arange(task.bs_antennas, device=index.device) * 0.5  # wavelengths
    u, v, w = generator.uniform(index, "directions", 6).mul(2).sub(1).view(-1, 3, 2, 1).unbind(1)  # (B, 2, 1) sines
    gain = torch.view_as_complex(generator.normal(index, "gains", 4).view(-1, 2, 2))
    gain = gain * 10 ** (ECHO_DB / 20 * torch.arange(2, device=index.device))
    away = torch.exp(2j * math.pi * w * m)  # (B, 2, M) at the base station
    arriving = torch.exp(2j * math.pi / task.wavelength_m * 0.7 * (u * x + v * y))  # (B, 2, N) at the surface
    return torch.einsum("bp,bpm,bpn->bmn", gain, away, arriving) / math.sqrt(task.bs_antennas * task.elements)


if __name__ == "__main__":
    from ris_fast import simulate

    scenes = simulate(Task(channel=f"{__file__}:two_paths"), 256, SceneGenerator(seed=0))
    singular = torch.linalg.svdvals(torch.view_as_complex(scenes.channel))
    print(
        f"two paths: the third singular value of H is {float((singular[:, 2] / singular[:, 0]).max()):.0e} of the first"
    )
