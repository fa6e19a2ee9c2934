"""The parts that a run is built around: which they are, and why another one cannot be put in their place afterwards."""

from __future__ import annotations

from typing import Any

INSTEAD = {
    "model": (
        "Load weights with trainer.model.load_state_dict(...); train a network of your own with cov_nmse and FusedAdamW"
        " in a loop of your own, as the README shows"
    ),
    "network": "It is trainer.model, compiled",
    "optimizer": "Set [optimizer] in the configuration, or write a loop of your own",
    "loss": "Set the weights of [loss] in the configuration, or write a loop of your own",
    "source": "Set data.source and data.path in the configuration",
    "device": "Set training.device in the configuration",
    "config": "Make a new Trainer with that configuration",
    "epoch_steps": "It follows from the configuration",
}


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
