"""Saving and restoring a flat optimizer: torch's state_dict, plain tensors for checkpoints, deepcopy and pickle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.optim.arguments import MOMENTS, check_group, check_saved, check_shape
from ris_fast.training.optim.flat_gradients import FlatGradients
from ris_fast.training.optim.flat_optimizer import identical

_OPTIONS = (
    "max_grad_norm",
    "_ema_decay",
    "ema_warmup",
    "loss_scale",
    "clear_grads",
    "measure_telemetry",
    "_record_count",
    "wanted_backend",
)
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
            saved |= {
                f"ema.{name}": self._place[i][0].averages[self._place[i][1]] for i, name in enumerate(self.tensor_names)
            }
        return saved

    @torch.no_grad()
    def load_extra_state(self, saved: Mapping[str, Tensor]) -> None:
        """Restores `extra_state`; a tensor that it does not name keeps the average that it has."""
        self._refuse_inside("load_extra_state")
        self._check_extra(saved)
        for bucket in self._buckets:
            bucket.state.copy_(saved["counters"])
        self._host_attempted, self._known_skipped = (
            int(saved["counters"][slot]) for slot in (State.ATTEMPTED, State.SKIPPED)
        )
        self._note_earlier()
        self._averaging = False
        if self.ema_decay is None or not any(key.startswith("ema.") for key in saved):
            self._show_state()
            return
        self._start_average()
        for i, name in enumerate(self.tensor_names):
            if f"ema.{name}" in saved:
                self._place[i][0].averages[self._place[i][1]].copy_(saved[f"ema.{name}"])

    def _check_extra(self, saved: Mapping[str, Tensor]) -> None:
        counters = saved.get("counters")
        if counters is None or counters.shape != (State.COUNT,):
            shape = "missing" if counters is None else f"of shape {tuple(counters.shape)}"
            raise ValueError(
                f"FusedAdamW: the saved 'counters' are {shape}, expected ({State.COUNT:d},). Load what FusedAdamW has"
                " saved."
            )
        for name, p in zip(self.tensor_names, self._params, strict=True):
            if f"ema.{name}" in saved:
                check_shape("ema", name, p, saved[f"ema.{name}"])

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, which can load it.

        Averages ("ema"), and the counters with the first tensor, are beside the moments, where
        torch.distributed.checkpoint finds them; those of tensors without moments are under a key that torch ignores.
        """
        shown = {
            f"ema.{name}"
            for name, p in zip(self.tensor_names, self._params, strict=True)
            if "ema" in self.state.get(p, {})
        }
        return super().state_dict() | {
            _EXTRA: {key: value for key, value in self.extra_state().items() if key not in shown}
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of FusedAdamW or of torch.optim.AdamW (which leaves counters and averages as they are).

        As with torch.optim.AdamW, a group that decays decoupled here goes on so, whatever is loaded. torch.optim.AdamW
        carries averages along without renewing them; if steps were made there, they are dropped with a warning, and the
        average begins again from the weights.
        Raises: ValueError on a state that does not fit or that another kind of optimizer saved; nothing is changed
            then.
        """
        self._refuse_inside("load_state_dict")
        if not identical([p for group in self.param_groups for p in group["params"]], self._params):
            self._rebuild()
        given: dict[str, Any] = {}

        def take(_: Any, final: dict[str, Any]) -> None:
            self._check_loaded(final)
            given.update(final)

        last = self.register_load_state_dict_pre_hook(take)  # after the hooks of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        states = self._given_states(given)
        extra = {f"ema.{self.tensor_names[i]}": state["ema"] for i, state in states.items() if "ema" in state}
        counters = [state["counters"] for state in states.values() if "counters" in state]
        extra |= ({"counters": counters[-1]} if counters else {}) | given.get(_EXTRA, {})
        stale = self.ema_decay is not None and _stale(extra, states)
        if stale:
            extra = {"counters": extra["counters"]}
        # not what torch has made of them, which is rounded to the dtype of the parameter
        self._load_moments(dict(self.state) | {self._params[i]: state for i, state in states.items()})
        if "counters" in extra:
            self.load_extra_state(extra)
        if stale:
            warnings.warn(
                "FusedAdamW.load_state_dict: the step counts have gone on since the averaged weights were saved;"
                " another optimizer made those steps. The averages are dropped and begin again from the weights at the"
                " next step.",
                RuntimeWarning,
                stacklevel=3,
            )

    @staticmethod
    def _given_states(given: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """Saved states that are not empty, by the number of the tensor."""
        indices = [index for group in given["param_groups"] for index in group["params"]]
        return {i: given["state"][index] for i, index in enumerate(indices) if given["state"].get(index)}

    def _check_loaded(self, given: Mapping[str, Any]) -> None:
        if any(group.get("amsgrad") for group in given["param_groups"]):
            raise ValueError(
                "FusedAdamW.load_state_dict: the saved optimizer used amsgrad, which FusedAdamW does not have. Use"
                " torch.optim.AdamW."
            )
        for group in given["param_groups"]:
            missing = [key for key in ("lr", "betas", "eps", "weight_decay") if key not in group]
            if missing:
                raise ValueError(
                    f"FusedAdamW.load_state_dict: a saved group has no '{missing[0]}'; another kind of optimizer saved"
                    " it. Load a state of FusedAdamW or torch.optim.AdamW."
                )
            check_group(self.defaults | group)
        for i, state in self._given_states(given).items():
            if i < len(self._params):  # else torch refuses the number of tensors
                check_saved(self.tensor_names[i], self._params[i], state)
        if _EXTRA in given:
            self._check_extra(given[_EXTRA])

    def checkpoint_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything but hyperparameters as {"optimizer": name -> tensor}, for files that hold tensors only."""
        saved = dict(self.extra_state())
        for name, p in zip(self.tensor_names, self._params, strict=True):
            state = self.state.get(p, {})
            saved |= {f"{key}.{name}": state[key] for key in MOMENTS if key in state}
        return {"optimizer": saved}

    @torch.no_grad()
    def load_checkpoint_tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores `checkpoint_tensors` into an optimizer with the same parameters."""
        self._refuse_inside("load_checkpoint_tensors")
        saved = groups["optimizer"]
        unknown = [key for key in saved if "." in key and key.split(".", 1)[1] not in self.tensor_names]
        if unknown:
            raise ValueError(
                f"FusedAdamW.load_checkpoint_tensors: '{unknown[0]}' belongs to no parameter here. Build the optimizer"
                " with the parameters that were saved."
            )
        self._check_extra(saved)
        moments = {
            name: {key: saved[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in saved}
            for name in self.tensor_names
        }
        self._load_moments({p: moments[name] for name, p in zip(self.tensor_names, self._params, strict=True)})
        self.load_extra_state(saved)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "_options": {name: getattr(self, name) for name in _OPTIONS},
            "_extra": self.extra_state(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict (without options), and by unpickling and deepcopy (with them)."""
        state = dict(state)
        options, extra = state.pop("_options", None), state.pop("_extra", None)
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        for group, had in zip(
            self.param_groups, before, strict=False
        ):  # as torch.optim.AdamW; a state of Adam says False
            group["decoupled_weight_decay"] = had["decoupled_weight_decay"] or group["decoupled_weight_decay"]
        if options is not None:
            self.__dict__.update(options)
            self._reset()
            self._build()
            self.load_extra_state(extra)


def _stale(extra: Mapping[str, Tensor], states: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether steps were made after the averages: moments then count more of them than the counters, which only we
    renew."""
    if "counters" not in extra or not states or not any(key.startswith("ema.") for key in extra):
        return False
    counters = extra["counters"]
    counted = float(counters[State.APPLIED] + counters[State.EARLIER])
    rounding = torch.finfo(counters.dtype).eps  # torch.optim.AdamW casts what it carries to the dtype of the parameter
    return max(float(state["step"]) for state in states.values()) > counted * (1 + rounding)
