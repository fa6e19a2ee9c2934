"""What FusedAdamW saves and loads: torch's state_dict, extra state that torch does not know, and checkpoint tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.optim.arguments import MOMENTS, check_group, check_saved, check_shape, refuse_if
from ris_fast.training.optim.flat_buffers import FlatBuffers
from ris_fast.training.optim.moments import Moments, StateEntries
from ris_fast.training.optim.placement import Groups, Placement, listed
from ris_fast.training.optim.views import identical

OPTIONS = (
    "max_grad_norm", "_ema_decay", "ema_warmup", "loss_scale", "clear_grads", "measure_telemetry", "_record_count",
    "wanted_backend",
)  # fmt: skip
EXTRA = "ris_fast"  # key in state_dict that torch.optim.AdamW ignores


def extra_state(moments: Moments) -> dict[str, Tensor]:
    """Counters (16,) float64, and "ema.NAME" per tensor once there is an average; views, not copies."""
    placement = moments.placement
    averages = zip(placement.names, placement.averages, strict=True) if moments.averaging else ()
    return {"counters": placement.buckets[0].state} | {f"ema.{name}": average for name, average in averages}


def load_extra_state(saved: Mapping[str, Tensor], moments: Moments, state: StateEntries) -> None:
    """Restores `extra_state`. A tensor without a saved average begins it from its weights; records are dropped."""
    placement = moments.placement
    check_extra(saved, placement)
    for bucket in placement.buckets:
        bucket.state.copy_(saved["counters"])
        bucket.ring_steps.zero_()
    moments.note_earlier_steps()
    moments.averaging = False
    if not placement.averages or not any(key.startswith("ema.") for key in saved):
        moments.show(state)
        return
    moments.start_average(state)
    for name, average in zip(placement.names, placement.averages, strict=True):
        average.copy_(saved.get(f"ema.{name}", average))


def check_extra(saved: Mapping[str, Tensor], placement: Placement) -> None:
    """Raises ValueError on counters that are missing, or on counters or averages of another shape."""
    counters = saved.get("counters")
    shape = "missing" if counters is None else f"of shape {tuple(counters.shape)}"
    refuse_if(
        counters is None or counters.shape != (State.COUNT,),
        f"the saved 'counters' are {shape}, expected ({State.COUNT:d},). Load what FusedAdamW has saved.",
    )
    for name, p in zip(placement.names, placement.params, strict=True):
        check_shape("ema", name, p, saved.get(f"ema.{name}", p))


def hidden_extra_state(moments: Moments, state: StateEntries) -> dict[str, Tensor]:
    """The extra state but for the averages that are in `state`: those of tensors without moments, and the counters."""
    named = zip(moments.placement.names, moments.placement.params, strict=True)
    shown = {f"ema.{name}" for name, p in named if "ema" in state.get(p, {})}
    return {key: value for key, value in extra_state(moments).items() if key not in shown}


def load_state_dict(
    load: Callable[[dict[str, Any]], None], optimizer: Optimizer, state_dict: dict[str, Any], buffers: FlatBuffers
) -> dict[str, Tensor]:
    """Loads groups and moments with torch's `load`; returns the extra state in it, for `load_extra_state`, or {}.

    What torch sees, after the hooks of the user, is checked first. Warns, and leaves the averages out, if they are
    older than the moments.
    """
    if not identical(listed(optimizer.param_groups), buffers.placement.params):
        buffers.rebuild(optimizer.param_groups, optimizer.state)
    moments, given = buffers.moments, dict[str, Any]()

    def check(_: Any, final: dict[str, Any]) -> None:
        _check_loaded(final, optimizer.defaults, moments.placement)
        given.update(final)

    last = optimizer.register_load_state_dict_pre_hook(check)
    try:
        load(state_dict)
    finally:
        last.remove()
    params, entries = moments.placement.params, _entries(given)
    # not what torch has made of the entries, which is rounded to the dtype of the parameter
    moments.load(optimizer.state, dict(optimizer.state) | {params[i]: entry for i, entry in entries.items()})
    extra = {f"ema.{moments.placement.names[i]}": entry["ema"] for i, entry in entries.items() if "ema" in entry}
    held = [("counters", entry["counters"]) for entry in entries.values() if "counters" in entry]
    extra |= dict(held) | given.get(EXTRA, {})
    if not moments.placement.averages or not _stale(extra, entries):
        return extra
    warnings.warn(
        "FusedAdamW.load_state_dict: the step counts have gone on since the averaged weights were saved; another"
        " optimizer made those steps. The averages are dropped and begin again from the weights at the next step.",
        RuntimeWarning,
        stacklevel=4,
    )
    return {"counters": extra["counters"]}


def _check_loaded(given: Mapping[str, Any], defaults: Mapping[str, Any], placement: Placement) -> None:
    """Raises ValueError on a state_dict that does not fit or that another kind of optimizer saved."""
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
        check_group({**defaults, **group})
    for i, entry in _entries(given).items():
        if i < len(placement.params):  # else torch refuses the number of tensors
            check_saved(placement.names[i], placement.params[i], entry)
    if EXTRA in given:
        check_extra(given[EXTRA], placement)


def _entries(given: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The entries of a state_dict that are not empty, by the number of the tensor."""
    indices = [index for group in given["param_groups"] for index in group["params"]]
    return {i: given["state"][index] for i, index in enumerate(indices) if given["state"].get(index)}


def _stale(extra: Mapping[str, Tensor], entries: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether another optimizer made steps after the averages: only FusedAdamW renews the counters with the moments."""
    if "counters" not in extra or not entries or not any(key.startswith("ema.") for key in extra):
        return False
    counters = extra["counters"]
    counted = float(counters[State.APPLIED] + counters[State.EARLIER])
    rounding = torch.finfo(counters.dtype).eps  # torch.optim.AdamW casts what it carries to the dtype of the parameter
    return max(float(entry["step"]) for entry in entries.values()) > counted * (1 + rounding)


def complete_groups(groups: Groups, before: Groups, defaults: Mapping[str, Any]) -> None:
    """Fills in the options that a loaded group lacks. A group that decayed decoupled before loading keeps doing so, as
    with torch.optim.AdamW; a saved state of Adam says False."""
    for group in groups:
        group.update({**defaults, **group})
    for group, had in zip(groups, before, strict=False):
        group["decoupled_weight_decay"] = had["decoupled_weight_decay"] or group["decoupled_weight_decay"]


def checkpoint_tensors(moments: Moments, state: StateEntries) -> dict[str, Tensor]:
    """Extra state and moments as name -> tensor; views, not copies."""
    saved = extra_state(moments)
    for name, p in zip(moments.placement.names, moments.placement.params, strict=True):
        saved |= {f"{key}.{name}": value for key, value in state.get(p, {}).items() if key in MOMENTS}
    return saved


def load_checkpoint_moments(saved: Mapping[str, Tensor], moments: Moments, state: StateEntries) -> None:
    """Restores the moments among `checkpoint_tensors`. Raises ValueError, and changes nothing, if a tensor fits
    none."""
    placement = moments.placement
    known = set(placement.names)
    unknown = [key for key in saved if "." in key and key.split(".", 1)[1] not in known]
    if unknown:
        raise ValueError(
            f"FusedAdamW.load_checkpoint_tensors: '{unknown[0]}' belongs to no parameter here. Build the optimizer"
            " with the parameters that were saved."
        )
    check_extra(saved, placement)
    named = zip(placement.names, placement.params, strict=True)
    entries = {p: {key: saved[f"{key}.{n}"] for key in MOMENTS if f"{key}.{n}" in saved} for n, p in named}
    moments.load(state, entries)
