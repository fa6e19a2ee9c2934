"""The random numbers of a step, as a function of the run's seed, the step's number and the rank, and of nothing else.

A checkpoint needs no random state then: a resumed run, one that was checked or validated in between, and one whose
steps are replayed all draw in step s what the undisturbed run draws there.
"""

from __future__ import annotations

import torch

WORD = 2**64


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A number below 2**64, mixed by SplitMix64, so that all of its bits change with each argument: the generator of a
    CPU uses the lower half alone.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014).
    """
    value = 0
    for part in (seed, step, rank):
        value = (value + part + 0x9E3779B97F4A7C15) % WORD
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % WORD
        value = (value ^ value >> 27) * 0x94D049BB133111EB % WORD
        value ^= value >> 31
    return value


def seed_step(device: torch.device, seed: int, step: int, rank: int = 0) -> None:
    """Sets torch's own generators, of the CPU and of the device, for this step; some microseconds, no wait.

    A captured step draws from the device's generator too: a graph reads its seed at each replay. Not yet run on a GPU.
    """
    number = step_seed(seed, step, rank)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(number)
