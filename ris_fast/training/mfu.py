"""Model FLOP utilisation: the FLOPs that training a scene needs over this machine's peak matmul rate."""

from __future__ import annotations

import math
from collections import deque
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ris_fast.config.schema import Config
from ris_fast.models import build_model
from ris_fast.models.convolution import Conv1d
from ris_fast.models.hybrid_parts import Block
from ris_fast.models.linear import Linear
from ris_fast.models.own import OwnNetwork
from ris_fast.physics.scenes import Scenes
from ris_fast.training.callback import Callback
from ris_fast.training.precision import peak_matmul_rate
from ris_fast.training.step import network_inputs
from ris_fast.training.trainer import Trainer


class PlainBlock(Block):
    """The transformer layer with torch's own attention."""

    def _mix(self, qkv: Tensor) -> Tensor:
        query, key, value = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return fn.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


PLAIN = {Linear: nn.Linear, Conv1d: nn.Conv1d, Block: PlainBlock}


def plain_network(config: Config, device: torch.device) -> nn.Module:
    """The configured network with torch's own layers: same parameters, same function, fresh weights."""
    return with_torch_layers(build_model(config.model.name, config.task, **config.model.options)).to(device)


def with_torch_layers(model: nn.Module) -> nn.Module:
    """The same network, its layers computed as torch computes them."""
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return model


def step_flops(config: Config, scenes: Scenes, model: nn.Module | None = None) -> float:
    """FLOPs a scene of forward and backward of the trainable part, counted on these scenes by torch's counter.

    Args: model: a network of the user's own, of which a copy is counted, since its object may be all that there is.

    Features, loss, optimizer and simulation are not counted: MFU is that of useful products.
    """
    from torch.utils.flop_counter import FlopCounterMode

    own = isinstance(model, OwnNetwork)
    model = with_torch_layers(_copied(model)) if own else plain_network(config, scenes.snapshots.device)
    model.eval()  # one scene has no batch statistics
    with FlopCounterMode(display=False) as counter:
        prediction = model(*network_inputs(scenes))
        sum(each.float().square().sum() for each in prediction if each is not None).backward()
    return counter.get_total_flops() / scenes.batch


def _copied(model: nn.Module) -> nn.Module:
    """A copy of a network that may keep what an earlier pass computed, as torch's older weight_norm does: a tensor with
    a graph has no copy, so that its numbers stand for it."""
    kept: dict[int, Tensor] = {}
    waiting: list[Any] = [model]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                kept[id(value)] = value.detach()
        elif isinstance(value, nn.Module):
            waiting.append(vars(value))
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set, deque)):
            waiting.extend(value)
    return deepcopy(model, kept)


class MfuCallback(Callback):
    """Adds `mfu` to the rows of a run, for the callbacks behind it in the list.

    Model: scenes/s times the FLOPs that a scene's forward and backward need, over the rate of one large matrix product
        in the run's precision, measured once when the run starts (about a third of a second).
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.peak_scenes_per_s = trainer, 0.0

    def on_train_start(self, info: dict[str, Any]) -> None:
        device, config = self.trainer.device, self.trainer.config
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the run's random numbers stay
            peak = peak_matmul_rate(device, config.training.precision, seconds=0.3)
            scenes = self.trainer.source.batch("val", torch.arange(1))
            try:
                flops = step_flops(config, scenes, self.trainer.model)
            except Exception:  # whatever copying a network of the user's own and counting in it raises: no run ends so
                flops = 0.0
            self.peak_scenes_per_s = self.trainer.ranks.size * peak / flops if flops else 0.0
        info["peak_matmul_flop_per_s"] = peak

    def on_log(self, row: dict[str, Any]) -> None:
        share = row["scenes_per_s"] / self.peak_scenes_per_s if self.peak_scenes_per_s else math.inf
        row["mfu"] = share if share <= 1.0 else None  # above: nothing to count, or other work beside the measurement

    on_epoch_end = on_log
