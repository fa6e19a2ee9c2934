"""A torch Optimizer whose parameters live in flat buffers: who is where, and what a user changed of it between
steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.optim.arguments import check_group, check_saved, choose_backend, refuse_parameters, tensor_names
from ris_fast.training.optim.flat_buffers import Bucket, held_elsewhere, real_dtype, view_like

_STATE = ("step", "exp_avg", "exp_avg_sq", "ema", "counters")  # ours in `state`; other entries are the user's


class FlatOptimizer(Optimizer):
    """Holds the buffers. The subclass sets `wanted_backend`, `ema_decay` and `_record_count`, then calls
    `Optimizer.__init__` and `_build`.

    For tensor i of all groups in order: `_params[i]`; its buffer and its place there `_place[i]`; its gradient view
    `_grad_views[i]`; and whether it took part in the last step, `_live[i]`. What torch shows (`param_groups`, `.data`,
    `state`) is compared with what was left there before each step; only where it differs is anything copied or laid out
    again.
    """

    _built = _swapped = False
    _averaging = False  # True once the average has left its starting value: only then is it worth saving
    wanted_backend: str
    ema_decay: float | None
    _record_count: int

    def _build(self) -> None:
        """Moves every parameter, with the moments that `self.state` has for it, into new flat buffers."""
        groups = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
        known = dict(zip(self._params, self.tensor_names, strict=True)) if self._built else {}
        self._params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        if not self._params:
            raise ValueError("FusedAdamW: param_groups hold no parameter any more. Leave at least one in place.")
        self.tensor_names = tensor_names(self.param_groups, known)
        refuse_parameters(self._params, self.tensor_names)
        self._sizes = self._name_groups()
        kinds = list(dict.fromkeys((p.device, real_dtype(p)) for p in self._params))
        self._rows = [[i for i, p in enumerate(self._params) if (p.device, real_dtype(p)) == kind] for kind in kinds]
        self._buckets = [
            self._make_bucket(kind, members, groups) for kind, members in zip(kinds, self._rows, strict=True)
        ]
        self._place = {
            i: (b, slot) for b, members in zip(self._buckets, self._rows, strict=True) for slot, i in enumerate(members)
        }
        self._grad_views = [self._place[i][0].grads[self._place[i][1]] for i in range(len(self._params))]
        self._in_place: list[Tensor | None] = []
        self._measured: list[int] = []
        self._clear_version: list[int] = []
        self._stepped = False
        with torch.no_grad():
            for i in range(len(self._params)):
                self._move_in(i)
            self._load_moments(dict(self.state))
        self._at = _where(self._params)
        self._built = True

    def _name_groups(self) -> list[int]:
        """Number of tensors of each group; names beside the tensors are put right where the lists were edited."""
        sizes, begin = [len(group["params"]) for group in self.param_groups], 0
        for group, size in zip(self.param_groups, sizes, strict=True):
            if "param_names" in group:
                group["param_names"] = self.tensor_names[begin : begin + size]
            begin += size
        return sizes

    def _make_bucket(
        self, kind: tuple[torch.device, torch.dtype], members: Sequence[int], groups: Sequence[int]
    ) -> Bucket:
        like = [self._params[i].detach() for i in members]
        backend = choose_backend(self.wanted_backend, *kind)
        return Bucket(
            like,
            [groups[i] for i in members],
            len(self.param_groups),
            backend,
            self.ema_decay is not None,
            self._record_count,
        )

    def _move_in(self, i: int) -> None:
        bucket, slot = self._place[i]
        bucket.params[slot].copy_(self._params[i])
        self._params[i].data = bucket.params[slot]

    @property
    def backend(self) -> str:
        """Implementation in use; several joined by + where the parameters are of several kinds."""
        return "+".join(dict.fromkeys(bucket.backend for bucket in self._buckets))

    # ---- the state that torch shows ----------------------------------------------------------------------------------

    def _load_moments(self, loaded: dict[Any, Any]) -> None:
        """Copies steps, moments and averages into the buffers; a tensor without moments starts from zero.

        Raises: ValueError on moments that are not there or of another shape, before anything is copied.
        """
        for name, p in zip(self.tensor_names, self._params, strict=True):
            if loaded.get(p):
                check_saved(name, p, loaded[p])
        for i, p in enumerate(self._params):
            bucket, slot = self._place[i]
            saved = loaded.get(p)
            if not saved:
                for tensor in (bucket.moments1[slot], bucket.moments2[slot], bucket.steps[slot]):
                    tensor.zero_()
                self.state.pop(p, None)
                continue
            bucket.moments1[slot].copy_(saved["exp_avg"])
            bucket.moments2[slot].copy_(saved["exp_avg_sq"])
            bucket.steps[slot].copy_(torch.as_tensor(saved["step"]))
            if self._averaging and "ema" in saved:
                bucket.averages[slot].copy_(saved["ema"])
            self.state[p] = {key: value for key, value in saved.items() if key not in _STATE} | self._views(i)
        self._live: list[bool] = []
        self._note_earlier()
        self._show_state()

    def _note_earlier(self) -> None:
        """Step counts that came from elsewhere may be ahead of the applied steps; afterwards both move on together."""
        first = self._buckets[0]
        most = torch.stack([bucket.steps.max().to(first.device, torch.float64) for bucket in self._buckets]).max()
        ahead = (most - first.state[State.APPLIED]).clamp(min=0)
        for bucket in self._buckets:
            bucket.state[State.EARLIER].copy_(ahead)

    def _views(self, i: int) -> dict[str, Tensor]:
        """Step and moments of a tensor, where they are."""
        bucket, slot = self._place[i]
        return dict(step=bucket.steps[slot], exp_avg=bucket.moments1[slot], exp_avg_sq=bucket.moments2[slot])

    def _show_state(self) -> None:
        """Puts averages and, with the first tensor that has moments, the counters where savers look: in torch's
        state."""
        holders = [i for i, p in enumerate(self._params) if self.state.get(p)]
        for i in holders:
            bucket, slot = self._place[i]
            extra = {"ema": bucket.averages[slot]} if self._averaging else {}
            extra |= {"counters": self._buckets[0].state} if i == holders[0] else {}
            entry = self.state[self._params[i]]
            for key in ("ema", "counters"):
                entry.pop(key, None)
            entry.update(extra)
        self._shown = self._state_tensors()

    def _state_tensors(self) -> list[Any]:
        try:
            return list(chain.from_iterable(map(dict.values, self.state.values())))
        except TypeError:  # a user's entry that belongs to no tensor may be anything
            return [value for entry in self.state.values() if isinstance(entry, dict) for value in entry.values()]

    # ---- what a user changes between steps ---------------------------------------------------------------------------

    def rebind(self) -> None:
        """Takes the parameters where they are now (after `model.to(...)`), with moments, averages and counters."""
        self._refuse_inside("rebind")
        self._rebuild()
        self._stepped = False

    @torch.no_grad()
    def _rebuild(self) -> None:
        """Lays the buffers out again for the parameters as listed now. A tensor that has left keeps its state, as in
        torch."""
        places = [self._place[i] for i in range(len(self._params))] if self._averaging else []
        averages = {p: bucket.averages[slot] for p, (bucket, slot) in zip(self._params, places)}
        counters, stepped = self._buckets[0].state, self._stepped
        for p in set(self._params).difference(p for group in self.param_groups for p in group["params"]):
            if p in self.state:
                self.state[p] = {
                    key: value.clone() if isinstance(value, Tensor) else value for key, value in self.state[p].items()
                }
        self._build()
        for bucket in self._buckets:
            bucket.state.copy_(counters)
        self._stepped = stepped
        for i, p in enumerate(self._params):
            if self._averaging and (p in averages or "ema" not in self.state.get(p, {})):
                self._place[i][0].averages[self._place[i][1]].copy_(averages.get(p, p))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Flat buffers are laid out again: capture CUDA graphs afterwards."""
        self._refuse_inside("add_param_group")
        super().add_param_group(param_group)
        if not self._built:
            return
        try:
            check_group(self.param_groups[-1])
            refuse_parameters(
                [p for group in self.param_groups for p in group["params"]], tensor_names(self.param_groups)
            )
        except ValueError:
            self.param_groups.pop()
            raise
        self._rebuild()

    def _follow(self) -> None:
        """Takes over, as torch would, what was changed since the last step: lists of parameters, their data, their
        state."""
        params = [p for group in self.param_groups for p in group["params"]]
        listed = (
            identical(params, self._params) and [len(group["params"]) for group in self.param_groups] == self._sizes
        )
        in_place = listed and _where(params) == self._at
        if in_place and identical(self._state_tensors(), self._shown):
            return
        self._refuse_inside("accumulate")
        if self._capturing():
            raise RuntimeError(
                "FusedAdamW.step: captured after parameters, their data or their state were replaced. Step once before"
                " capturing."
            )
        if not listed:
            self._rebuild()
        elif not in_place:
            self._follow_data()
        with torch.no_grad():
            self._load_moments(dict(self.state))

    def _follow_data(self) -> None:
        """Moves data that was put in place of a parameter's own into the buffers; before the first step whatever it is.

        Afterwards only what nobody else holds: another tensor over the same memory would no longer see the steps.
        """
        moved = [
            i
            for i, (now, before) in enumerate(zip(zip(*_where(self._params)), zip(*self._at), strict=True))
            if now != before
        ]
        if self._stepped:
            windows = [self._place[i][0].params[self._place[i][1]] for i in moved]
            kind = lambda tensor: (tensor.device, tensor.dtype, tensor.shape)  # noqa: E731
            lost = [i for i, window in zip(moved, windows, strict=True) if kind(self._params[i]) != kind(window)]
            self._refuse_moved(lost or [i for i in moved if held_elsewhere(self._params[i], self._params)])
            if all(
                self._params[i].stride() == w.stride() and not held_elsewhere(w)
                for i, w in zip(moved, windows, strict=True)
            ):
                refuse_parameters([self._params[i] for i in moved], [self.tensor_names[i] for i in moved])
                with torch.no_grad():
                    for i in moved:
                        self._move_in(i)
                        self._bring_gradient_back(i)
                return
        self._rebuild()

    @torch.no_grad()
    def _put_back(self, raw: Sequence[Tensor]) -> None:
        """Copies raw, a flat tensor for each buffer, into the buffers, and points every parameter there again.

        All buffers first: whatever a parameter has become in the meantime, its raw weights are then in its place.
        """
        for bucket, values in zip(self._buckets, raw, strict=True):
            bucket.param.copy_(values)
        for bucket, members, values in zip(self._buckets, self._rows, raw, strict=True):
            for slot, i in enumerate(members):
                p, window = self._params[i], bucket.params[slot]
                if _where([p]) != _where([window]) or p.dtype != window.dtype or p.data_ptr() != self._at[0][i]:
                    try:
                        p.data = window
                    except RuntimeError:  # swapped for a tensor of another kind (meta, sparse)
                        torch.utils.swap_tensors(p, torch.nn.Parameter(window, p.requires_grad))
                    window.copy_(
                        view_like(values, bucket.starts[slot], window)
                    )  # share_memory has moved the window too
                    self._bring_gradient_back(i)

    @torch.no_grad()
    def _bring_gradient_back(self, i: int) -> None:
        """What moving or casting a module does to `.grad.data`, undone for a parameter that is back in its place."""
        p, (bucket, slot) = self._params[i], self._place[i]
        bucket.reattach(slot)
        if p.grad is not None and (p.grad.dtype != p.dtype or p.grad.device != p.device):
            p.grad.data = p.grad.data.to(p.device, p.dtype)

    def _refuse_inside(self, who: str) -> None:
        if self._swapped:
            raise RuntimeError(
                f"FusedAdamW.{who}: called inside `with optimizer.ema():`, where the averaged weights are in. Call it"
                " outside the block."
            )

    def _refuse_moved(self, moved: Sequence[int]) -> None:
        if not moved:
            return
        refuse_parameters([self._params[i] for i in moved], [self.tensor_names[i] for i in moved])
        raise RuntimeError(
            f"FusedAdamW.step: {len(moved)} of {len(self._params)} parameters (first: {self.tensor_names[moved[0]]})"
            " left the flat buffer: the model was moved (.to, .cuda, .half), given to another FusedAdamW, or its .data"
            " replaced by memory that another tensor holds too. Move the model before the first step, or call"
            " optimizer.rebind(), after which that other tensor sees no step."
        )

    def _capturing(self) -> bool:
        return (
            any(bucket.device.type == "cuda" for bucket in self._buckets) and torch.cuda.is_current_stream_capturing()
        )


def _where(params: Sequence[Tensor]) -> tuple[list[int], list[torch.Size], list[tuple[int, ...]]]:
    """What `.data =`, swap_tensors, share_memory and moving a model change."""
    return [p.data_ptr() for p in params], [p.shape for p in params], [p.stride() for p in params]


def identical(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))
