"""A BS-RIS channel of the user's own: a function of the task, the scene numbers and a generator, checked once.

Legend: B batch, M base-station antennas, N RIS elements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ris_fast.config.own_physics import unchanged_function
from ris_fast.config.schema import ConfigError, Task
from ris_fast.config.user_code import first_line, short_reference, where_raised
from ris_fast.kernels.values import readable
from ris_fast.physics.random import SPLITS, OwnGenerator, SceneGenerator
from ris_fast.physics.real_complex import to_pairs

SETTING = "task.channel"
SIGNATURE = "function(task, index, generator)"
NUMBERS = (5, 0, 1, 2**33 + 7, 2)  # scenes that are drawn together, in another order and alone
ROUNDING = 1e-5  # of a channel's rms: what products of another size may change
LEVELS = (1e-12, 1e12)  # rms of a channel whose snapshots have squares in float32
Sampler = Callable[[Task, Tensor, SceneGenerator], Tensor]


@torch.no_grad()
def draw_channel(task: Task, index: Tensor, generator: SceneGenerator) -> Tensor:
    """H of these scenes by the task's own function: (B, M, N, 2) float32.

    Raises: ConfigError, one line that names the function and what is wrong.
    """
    if not len(index):
        return torch.empty(0, task.bs_antennas, task.elements, 2, device=index.device)
    return _drawn(task, _sampler(task), index, OwnGenerator(generator.seed, generator.split, generator.device))


@lru_cache(maxsize=16)
@torch.no_grad()
def check_channel(task: Task, device: str) -> tuple[str, ...]:
    """Notes on the task's own channel, once it is known to be the same channel of a scene in any batch and call.

    Raises: ConfigError, one line that names the function and what is wrong.
    """
    numbers, worst, name = torch.tensor(NUMBERS, device=device), 0.0, short_reference(task.channel)
    for split in SPLITS:
        together, away = _differences(task, split, numbers)
        if torch.equal(together[:1].expand_as(together), together):
            return (f"{SETTING} = {name} gives all scenes one channel",)
        worst = max(worst, away)
    if not worst:
        return ()
    return (
        f"{SETTING} = {name}: the channel of a scene depends on its batch by a relative {worst:.1g}, which is rounding;"
        " a scene is not the same to the last bit in every batch",
    )


def _differences(task: Task, split: str, numbers: Tensor) -> tuple[Tensor, float]:
    """The channel of these scenes of a split, and how far a scene's is from it in another batch, relative to its rms.

    Raises: ConfigError where it is another channel.
    """

    def drawn(index: Tensor) -> Tensor:
        return _drawn(task, _sampler(task), index, OwnGenerator(0, split, numbers.device))

    together, worst = drawn(numbers), 0.0
    level = _level(task, split, numbers, together)
    if not torch.equal(together, drawn(numbers)):
        raise _wrong(
            task,
            "gives another channel when it is called again",
            "draw with the generator that it is given, and with nothing else",
        )
    other, alone = drawn(numbers.flip(0)).flip(0), torch.cat([drawn(each) for each in numbers.split(1)])
    for found, how in ((other, "in another order"), (alone, "alone")):
        away = (found - together).square().mean((1, 2, 3)).sqrt() / level
        if bool((apart := ~(away <= ROUNDING)).any()):
            raise _wrong(
                task,
                f"gives scene {_first(numbers, apart)} of {split} another channel {how}",
                "a scene is the same in any batch: draw it from its number, generator.normal(index, NAME, COUNT)",
            )
        worst = max(worst, float(away.max()))
    return together, worst


def _level(task: Task, split: str, numbers: Tensor, channel: Tensor) -> Tensor:
    """The rms of every scene's channel, (B,). Raises: ConfigError where it is not finite, or no rms to work with."""
    if bool((odd := ~channel.isfinite()).any()):
        number = _first(numbers, odd)
        raise _wrong(task, f"gives NaN or infinity in scene {number} of {split}", "every entry is a finite number")
    level = channel.square().sum(-1).mean((1, 2)).sqrt()
    if bool((odd := (level <= LEVELS[0]) | (level >= LEVELS[1])).any()):
        raise _wrong(
            task,
            f"gives a channel of rms {float(level[odd][0]):.3g} in scene {_first(numbers, odd)} of {split}",
            "the SNR sets the noise: any scale between 1e-12 and 1e12 will do",
        )
    return level


@lru_cache(maxsize=16)
def _sampler(task: Task) -> Sampler:
    return unchanged_function(SETTING, task.channel, task.channel_hash)


def _drawn(task: Task, sampler: Sampler, index: Tensor, generator: SceneGenerator) -> Tensor:
    given = index.clone()
    try:
        found = sampler(task, given, generator)
    except Exception as error:  # whatever their function raises
        if _captured(index):
            raise  # what a graph cannot hold: the step then goes without one
        raise _wrong(task, f"raises {first_line(error)}{where_raised(error)}", "mend that line") from error
    if not isinstance(found, Tensor):
        raise _wrong(task, f"gives a {type(found).__name__}", "return a tensor: torch.as_tensor(...)")
    if readable(index) and not torch.equal(given, index):
        raise _wrong(task, "changes the scene numbers that it is given", "work on index.clone()")
    if not (found.is_complex() or found.is_floating_point()):
        raise _wrong(task, f"gives {found.dtype}", "return real pairs in float32, or complex numbers")
    shape = (len(index), task.bs_antennas, task.elements)
    pairs = to_pairs(found)
    if tuple(pairs.shape) != (*shape, 2):
        real = tuple(found.shape) == shape and not found.is_complex()
        raise _wrong(
            task,
            f"gives {found.dtype} of shape {tuple(found.shape)} for {len(index)} scenes",
            "a real part alone is no channel" if real else "return what is expected for these scenes",
        )
    if found.device != index.device:
        raise _wrong(task, f"gives a channel on {found.device}", f"make it on index.device, {index.device}")
    return pairs.detach().to(torch.float32)


def _captured(index: Tensor) -> bool:
    return index.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _first(numbers: Tensor, wrong: Tensor) -> int:
    """The number of the first scene with anything wrong."""
    return int(numbers[wrong.flatten(1).any(1) if wrong.dim() > 1 else wrong][0])


def _wrong(task: Task, what: str, todo: str) -> ConfigError:
    batch = f"(B, {task.bs_antennas}, {task.elements}"
    return ConfigError(
        f"{SETTING} = {short_reference(task.channel)} {what}; expected {SIGNATURE} -> H, complex {batch}) or real"
        f" pairs {batch}, 2). {todo[0].upper()}{todo[1:]}."
    )
