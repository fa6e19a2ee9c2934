"""Saving and restoring a flat optimizer: torch's state_dict, plain tensors for checkpoints, deepcopy and pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.flat_gradients import FlatGradients

_OPTIONS = ("max_grad_norm", "_ema_decay", "ema_warmup", "loss_scale", "clear_grads", "measure_telemetry", "_record_count", "wanted_backend")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_EXTRA = "ris_fast"  # key in state_dict that torch.optim.AdamW ignores


class SavedOptimizer(FlatGradients):
    """What torch's AdamW does not know is the extra state: counters and averages."""

    _host_attempted = _known_skipped = 0

    def _start_average(self) -> None:
        """The average begins as the weights are now."""
        if self.ema_decay is not None and not self._averaging:
            for bucket in self._buckets:
                bucket.ema.copy_(bucket.param)
            self._averaging = True
            self._show_state()

    def extra_state(self) -> dict[str, Tensor]:
        """ "counters" (16,) float64, and "ema.NAME" per tensor once there is an average; views, not copies."""
        saved = {"counters": self._buckets[0].state}
        if self._averaging:
            saved |= {f"ema.{name}": self._place[i][0].averages[self._place[i][1]] for i, name in enumerate(self.tensor_names)}
        return saved

    @torch.no_grad()
    def load_extra_state(self, saved: Mapping[str, Tensor]) -> None:
        """Restores `extra_state`; a tensor that it does not name keeps the average that it has."""
        for bucket in self._buckets:
            bucket.state.copy_(saved["counters"])
        self._host_attempted, self._known_skipped = (int(saved["counters"][slot]) for slot in (State.ATTEMPTED, State.SKIPPED))
        self._averaging = False
        if self.ema_decay is None or not any(key.startswith("ema.") for key in saved):
            self._show_state()
            return
        self._start_average()
        for i, name in enumerate(self.tensor_names):
            if f"ema.{name}" in saved:
                self._place[i][0].averages[self._place[i][1]].copy_(saved[f"ema.{name}"])

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, which can load it.

        Averages ("ema"), and the counters with the first tensor, are beside the moments, where torch.distributed.checkpoint
        finds them; those of tensors without moments are under a key that torch ignores.
        """
        shown = {f"ema.{name}" for name, p in zip(self.tensor_names, self._params, strict=True) if "ema" in self.state.get(p, {})}
        return super().state_dict() | {_EXTRA: {key: value for key, value in self.extra_state().items() if key not in shown}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of FusedAdamW or of torch.optim.AdamW (which leaves counters and averages as they are)."""
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("FusedAdamW.load_state_dict: the saved optimizer used amsgrad, which FusedAdamW does not have. Use torch.optim.AdamW.")
        given: dict[str, Any] = {}
        last = self.register_load_state_dict_pre_hook(lambda _, final: given.update(final))  # after the hooks of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        indices = [index for group in given["param_groups"] for index in group["params"]]
        states = {i: given["state"][index] for i, index in enumerate(indices) if given["state"].get(index)}
        # not what torch has made of them, which is rounded to the dtype of the parameter
        self._load_moments(dict(self.state) | {self._params[i]: state for i, state in states.items()})
        extra = {f"ema.{self.tensor_names[i]}": state["ema"] for i, state in states.items() if "ema" in state}
        extra |= {"counters": state["counters"] for state in states.values() if "counters" in state} | given.get(_EXTRA, {})
        if "counters" in extra:
            self.load_extra_state(extra)

    def checkpoint_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything but hyperparameters as {"optimizer": name -> tensor}, for files that hold tensors only."""
        saved = dict(self.extra_state())
        for name, p in zip(self.tensor_names, self._params, strict=True):
            state = self.state.get(p, {})
            saved |= {f"{key}.{name}": state[key] for key in _MOMENTS if key in state}
        return {"optimizer": saved}

    @torch.no_grad()
    def load_checkpoint_tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores `checkpoint_tensors` into an optimizer with the same parameters."""
        saved = groups["optimizer"]
        unknown = [key for key in saved if "." in key and key.split(".", 1)[1] not in self.tensor_names]
        if unknown:
            raise ValueError(f"FusedAdamW.load_checkpoint_tensors: '{unknown[0]}' belongs to no parameter here. Build the optimizer with the parameters that were saved.")
        named = zip(self.tensor_names, self._params, strict=True)
        self._load_moments({p: {key: saved[f"{key}.{name}"] for key in _MOMENTS} for name, p in named if f"step.{name}" in saved})
        self.load_extra_state(saved)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_options": {name: getattr(self, name) for name in _OPTIONS}, "_extra": self.extra_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict (without options), and by unpickling and deepcopy (with them)."""
        state = dict(state)
        options, extra = state.pop("_options", None), state.pop("_extra", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if options is not None:
            self.__dict__.update(options)
            self._reset()
            self._build()
            self.load_extra_state(extra)
