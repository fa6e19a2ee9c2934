"""Scenes simulated on the device, when they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ris_fast.config.schema import Config
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, check_physics, simulate


class SimulatedSource:
    """Scenes made on the device when asked for. The seed is data.seed."""

    name = "simulate"
    channel = True
    endless = True
    lacks = ()
    reach = None

    def __init__(self, config: Config, device: torch.device | str) -> None:
        self.task, self.data, self.seed = config.task, config.data, config.data.seed
        self.device = torch.device(device)
        self.notes = check_physics(config.task, self.device)

    @property
    def index_device(self) -> torch.device:
        return self.device

    def size(self, split: str) -> int:
        return int(getattr(self.data, f"{split}_scenes"))

    def batch(self, split: str, index: Tensor) -> Scenes:
        return simulate(self.task, index, SceneGenerator(self.seed, split, self.device))

    def describe(self) -> str:
        kind = "the same in every epoch" if self.data.fixed else "fresh in every epoch"
        return (
            f"simulated on {self.device}, seed {self.seed}: {self.data.train_scenes} train ({kind}), "
            f"{self.data.val_scenes} val, {self.data.test_scenes} test scenes, with the channel"
        )
