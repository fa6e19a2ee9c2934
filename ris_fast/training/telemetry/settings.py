"""What is trained, and how, as it is and not as it was written down: read at the start of a run and at every report.

Nothing here reads from the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ris_fast.config.schema import Config

LISTED = 8  # names in one entry
GROUP_OPTIONS = ("peak_lr", "betas", "eps", "weight_decay", "maximize", "amsgrad", "momentum")
OPTIMIZER_OPTIONS = ("max_grad_norm", "ema_decay", "ema_warmup", "clear_grads")


def listed(names: list[str]) -> dict[str, Any]:
    """How many names there are, and the first of them."""
    return {"count": len(names), "names": names[:LISTED]}


class RunSettings:
    """Reads the settings that a run works with; `start` is what they were when it began.

    A setting is known by the name that a configuration gives it where it has one: 'loss.cov', 'optimizer.weight_decay
    of head', 'frozen', 'dropout of blocks.0.drop'. `announced`: beginnings of names whose changes are meant.
    """

    def __init__(
        self, model: nn.Module, loss: nn.Module, optimizer: Any, config: Config, announced: tuple[str, ...] = ()
    ) -> None:
        self.model, self.loss, self.optimizer, self.config = model, loss, optimizer, config
        self.announced = announced
        self.begin()

    def begin(self) -> None:
        """Takes what is there now as what the run began with."""
        self.start = self.read()

    def read(self) -> dict[str, Any]:
        """Name -> a plain number, text or list."""
        found: dict[str, Any] = {f"loss.{name}": plain(weight) for name, weight in self.loss.weights.items()}
        for name in ("beta", "loading", "shrink"):
            found[f"loss.{name}"] = plain(getattr(self.loss.settings, name, None))
        for name in OPTIMIZER_OPTIONS:
            found[f"optimizer.{name}"] = plain(getattr(self.optimizer, name, None))
        for number, group in enumerate(self.optimizer.param_groups):
            where = group.get("name", f"group {number}")
            found[f"optimizer.tensors of {where}"] = len(group["params"])
            for name in GROUP_OPTIONS:
                if name in group:
                    found[f"optimizer.{name} of {where}"] = plain(group[name])
        held = {id(each) for group in self.optimizer.param_groups for each in group["params"]}
        named = list(self.model.named_parameters())
        found["frozen"] = [name for name, each in named if not each.requires_grad]
        found["in no group"] = [name for name, each in named if each.requires_grad and id(each) not in held]
        for name, module in self.model.named_modules():
            for key in ("p", "dropout") if "ropout" in type(module).__name__ or hasattr(module, "dropout") else ():
                if isinstance(share := getattr(module, key, None), float):
                    found[f"dropout of {name or 'the network'}"] = share
            if isinstance(module, _NormBase):
                found[f"momentum of {name}"] = plain(module.momentum)
        training = self.config.training
        return found | {"training.batch_size": training.batch_size, "training.accumulate": training.accumulate}

    def changes(self) -> dict[str, list[Any]]:
        """Name -> value at the start and value now, of the settings that are not what they were; of lists of names
        those that have gone and those that have come."""
        now = self.read()
        return {
            name: _compared(self.start.get(name), now.get(name))
            for name in (*self.start, *(each for each in now if each not in self.start))
            if now.get(name) != self.start.get(name) and not name.startswith(self.announced)
        }

    def off_plan(self) -> dict[str, list[Any]]:
        """Name -> what the configuration says and what the run begins with, where they differ."""
        loss, optimizer = self.config.loss, self.config.optimizer
        planned: dict[str, Any] = {
            f"loss.{name}": getattr(loss, name) for name in self.loss.weights if hasattr(loss, name)
        }
        planned["optimizer.max_grad_norm"] = optimizer.max_grad_norm or None
        planned["optimizer.ema_decay"] = optimizer.ema_decay or None
        for name in self.start:
            key, _, group = name.removeprefix("optimizer.").partition(" of ")
            if not group:
                continue
            if key == "betas":
                planned[name] = [optimizer.beta1, optimizer.beta2]
            elif key == "eps":
                planned[name] = optimizer.eps
            elif key == "peak_lr" and group.removesuffix("_no_decay") in ("backbone", "head"):
                planned[name] = optimizer.head_lr if group.startswith("head") else optimizer.backbone_lr
            elif key == "weight_decay" and group in ("backbone", "head"):
                planned[name] = optimizer.weight_decay
        return {
            name: [value, self.start[name]]
            for name, value in planned.items()
            if name in self.start and self.start[name] != value
        }

    def membership(self) -> dict[str, Any]:
        """Which tensors are trained: those that are frozen, with their share of all numbers, those in no group of the
        optimizer, those of the optimizer that the network does not have, and those that it has twice."""
        named = dict(self.model.named_parameters())
        times = Counter(id(each) for group in self.optimizer.param_groups for each in group["params"])
        own = {id(each) for each in named.values()}
        frozen = [name for name, each in named.items() if not each.requires_grad]
        numbers = sum(each.numel() for each in named.values())
        missing = [name for name, each in named.items() if each.requires_grad and id(each) not in times]
        return {
            "tensors": len(named),
            "frozen": listed(frozen) | {"share": sum(named[name].numel() for name in frozen) / max(1, numbers)},
            "in_no_group": listed(missing),
            "not_of_the_network": sum(key not in own for key in times),
            "held_twice": listed([name for name, each in named.items() if times[id(each)] > 1]),
        }


def plain(value: Any) -> Any:
    """A value that compares and prints as itself: a tensor on the host as its number, one on a device as a text."""
    if isinstance(value, Tensor):
        return value.tolist() if value.device.type == "cpu" else "on the device"
    return list(value) if isinstance(value, tuple) else value


def _compared(before: Any, now: Any) -> list[Any]:
    """Both; of names those that have gone and those that have come."""
    if isinstance(before, list) and isinstance(now, list) and all(isinstance(each, str) for each in (*before, *now)):
        gone, come = (
            [each for each in before if each not in set(now)],
            [each for each in now if each not in set(before)],
        )
        return [listed(gone), listed(come)]
    return [before, now]


def describe_settings(settings: RunSettings) -> Mapping[str, Any]:
    """What the start of a run reports of them."""
    return {
        "off_plan": settings.off_plan(),
        "membership": settings.membership(),
        **{
            name: value
            for name, value in settings.start.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        },
    }
