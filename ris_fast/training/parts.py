"""The parts that a run is built around: which they are, and why another one cannot be put in their place afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from ris_fast.config.schema import Config, Model
from ris_fast.config.user_code import OBJECT
from ris_fast.models import build_model
from ris_fast.models.own import adapted

INSTEAD = {
    "model": (
        "Load weights with trainer.model.load_state_dict(...); a network of your own is Trainer(config, model=net)"
    ),
    "network": "It is trainer.model, compiled",
    "optimizer": "Set [optimizer] in the configuration, or write a loop of your own",
    "loss": "Set the weights of [loss] in the configuration; a term of your own is Trainer(config, loss=term)",
    "source": "Set data.source and data.path in the configuration",
    "device": "Set training.device in the configuration",
    "config": "Make a new Trainer with that configuration",
    "epoch_steps": "It follows from the configuration",
}


def network_of(config: Config, model: nn.Module | None) -> nn.Module:
    """The network that the settings name, or the one that was handed over, as the trainer calls it.

    Raises: ConfigError.
    """
    if model is None:
        return build_model(config.model.name, config.task, **config.model.options)
    return adapted(model, config.task, f"Trainer: model ({type(model).__name__})")


def with_objects(config: Config, model: Any, loss: Callable[..., Any] | None) -> Config:
    """The settings with the names of the objects that were handed over: a run's record says what it trained."""
    origins = dict(config.provenance)
    if model is not None:
        config = replace(config, model=Model(f"{OBJECT}{type(model).__qualname__}"))
        origins["model.name"] = "Trainer(model=...)"
    if loss is not None:
        name = getattr(loss, "__qualname__", type(loss).__qualname__)
        config = replace(config, loss=replace(config.loss, own=f"{OBJECT}{name}"))
        origins["loss.own"] = "Trainer(loss=...)"
    return replace(config, provenance=origins)


class Built:
    """An object whose parts stay those it was made with once `_built` is set: the step, the compiled network and the
    schedule hold them, so that another one would change what is reported and not what is trained. Assigning one raises
    AttributeError.
    """

    _built = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self._built and name in INSTEAD and value is not getattr(self, name):
            raise AttributeError(
                f"{type(self).__name__}.{name} cannot be replaced: the run was built around the one it has, and would"
                f" go on with that. {INSTEAD[name]}."
            )
        super().__setattr__(name, value)
