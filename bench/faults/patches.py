"""The few ways in which a fault takes hold of a trainer: its network, its batches, its optimizer, a function it
calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.faults import catalogue
from bench.faults.healthy_twins import changed
from ris_fast.config.schema import Config
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training import parts, step
from ris_fast.training.compiled_model import compiled
from ris_fast.training.optim.fused_adamw import FusedAdamW
from ris_fast.training.trainer import Trainer


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def put(trainer: Trainer, name: str, value: Any) -> None:
    """`trainer.name` is `value`, which the trainer itself refuses: the mistake of a loop that keeps its parts apart."""
    object.__setattr__(trainer, name, value)


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Puts `make(old)` where `old` was, on one object."""
    setattr(owner, name, make(getattr(owner, name)))


def on_output(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """What the module answers goes through `change`."""
    wrap(module, "forward", lambda forward: lambda *inputs: change(forward(*inputs)))


def on_input(module: nn.Module, change: Callable[..., tuple]) -> None:
    """What the module is given goes through `change`, which returns the arguments as a tuple."""
    wrap(module, "forward", lambda forward: lambda *inputs: forward(*change(*inputs)))


def on_factor(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """The network's factor goes through `change`; for a network that no trainer has bound yet."""
    wrap(
        model,
        "trunk",
        lambda trunk: (
            lambda features: (lambda prediction: prediction._replace(factor=change(prediction.factor)))(trunk(features))
        ),
    )


def answer_through(model: nn.Module, part: nn.Module) -> None:
    """The network's factor goes through `part`, which is a part of the network from then on."""
    whole = type(model)

    def trunk(self: nn.Module, features: Any) -> Prediction:
        prediction = whole.trunk(self, features)
        return prediction._replace(factor=self.last(prediction.factor))

    model.last = part
    model.__class__ = type(whole.__name__, (whole,), {"trunk": trunk})


def on_answer(trainer: Trainer, change: Callable[[Tensor], Tensor]) -> None:
    """The factor of a trainer's network goes through `change`."""
    on_factor(trainer.model, change)
    rebound(trainer)


def on_features(trainer: Trainer, change: Callable[[Callable], Callable]) -> None:
    """`change(features)` stands in for the network's `features(snapshots, channel, codes, snr_db)`."""
    wrap(trainer.model, "features", change)
    rebound(trainer)


def rebound(trainer: Trainer) -> None:
    """A step made of the trainer's present network, loss and optimizer, as the constructor makes it."""
    network, trainer.compile_note = compiled(trainer.model, trainer.config, trainer.device)
    trainer.step = step.Step(network, trainer.loss, trainer.optimizer, trainer.config, trainer.device, trainer.model)
    trainer.reporter.step = trainer.step


def on_loss(trainer: Trainer, change: Callable[[Prediction, Scenes], tuple[Prediction, Scenes]]) -> None:
    """The loss is given something else than the network's answer and the scenes."""
    on_input(trainer.loss, change)


def on_batches(trainer: Trainer, change: Callable[[Scenes], Scenes], split: str | None = None) -> None:
    """Scenes of one split, or of all, go through `change` after they were read."""

    def make(batch: Callable) -> Callable:
        return lambda name, index: change(batch(name, index)) if split in (None, name) else batch(name, index)

    wrap(trainer.source, "batch", make)


LABELS = ("factor", "azimuth", "elevation", "range_m", "power", "count")


def with_labels_of(scenes: Scenes, rows: Tensor) -> Scenes:
    """The scenes with each other's labels: scene i has those of scene rows[i]."""
    return replace(scenes, **{name: getattr(scenes, name)[rows] for name in LABELS})


def on_label_angles(trainer: Trainer, change: Callable[[Tensor], Tensor]) -> None:
    """The true angles go through `change` on their way into the loss."""

    def changed(prediction: Prediction, scenes: Scenes) -> tuple[Prediction, Scenes]:
        return prediction, replace(scenes, azimuth=change(scenes.azimuth), elevation=change(scenes.elevation))

    on_loss(trainer, changed)


def before_step(trainer: Trainer, action: Callable[[], Any]) -> None:
    """`action` runs between backward and the optimizer's step."""
    wrap(trainer.optimizer, "step", lambda take: lambda *args: (action(), take(*args))[1])


def after_step(trainer: Trainer, action: Callable[[], Any]) -> None:
    """`action` runs after each optimizer step."""
    wrap(trainer.optimizer, "step", lambda take: lambda *args: (take(*args), action())[0])


def gradients(trainer: Trainer) -> list[Tensor]:
    return [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def optimizer_with(**options: Any) -> AbstractContextManager:
    """Trainers are built with other options of FusedAdamW."""
    return replaced(step, "FusedAdamW", lambda *args, **given: FusedAdamW(*args, **(given | options)))


def model_with(change: Callable[[nn.Module], Any]) -> AbstractContextManager:
    """Trainers are built with a network that went through `change` before the optimizer saw it."""
    build = parts.build_model

    def build_and_change(*args: Any, **options: Any) -> nn.Module:
        model = build(*args, **options)
        change(model)
        return model

    return replaced(parts, "build_model", build_and_change)


def built_with(
    settings: Mapping[str, Any] | None = None,
    handed: Callable[[Config], dict[str, Any]] = lambda config: {},
    after: Callable[[Trainer], Any] = lambda trainer: None,
) -> AbstractContextManager:
    """Trainers are built as a script of one's own builds them.

    Args: settings: 'section.key' -> value, on top of the twin's; handed: the network and the term of the loss that the
        script hands over, as `model` and `loss`; after: what it does with the trainer.
    """

    def build(config: Config, folder: Path | None = None) -> Trainer:
        config = changed(config, settings or {})
        torch.manual_seed(config.training.seed)
        trainer = Trainer(config, folder, **handed(config))
        after(trainer)
        return trainer

    return replaced(catalogue, "Trainer", build)


def layers(model: nn.Module) -> list[nn.Module]:
    """Linear and convolution layers, in order."""
    return [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d))]


class Backward(torch.autograd.Function):
    """The identity with a backward of one's own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.rule = rule
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rule(grad), None
