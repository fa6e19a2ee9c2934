"""FlatBuffers: the parameters of an optimizer in flat buffers, kept in line with what users change between steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.optim.arguments import check_group
from ris_fast.training.optim.bucket import Bucket
from ris_fast.training.optim.gradients import Gradients
from ris_fast.training.optim.moments import Moments, StateEntries
from ris_fast.training.optim.parameters import listed, refuse_parameters, tensor_names
from ris_fast.training.optim.placement import Placement, place
from ris_fast.training.optim.readings import StepCounts
from ris_fast.training.optim.views import addresses, held_elsewhere, identical

FIRST_SCALE = 65536.0  # of a dynamic loss scale, as in torch.amp.GradScaler


class FlatBuffers:
    """Where every tensor is (`placement`), its moments (`moments`) and its gradient (`gradients`).

    What torch shows (param_groups, `.data`, state) is compared before each step with what was left there; only where it
    differs is anything copied or laid out again. All three parts are new after a layout.

    stepped: True after the first step: other tensors may then rely on weights staying where they are.
    averages_in: True inside `averaged_weights`, where the averaged weights are in the buffers.
    counts: steps attempted and skipped, as far as the host knows.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], state: StateEntries, backend: str, with_ema: bool, records: int
    ) -> None:
        self._options = backend, with_ema, records
        self.stepped = self.averages_in = self._had_scaler = False
        self.counts = StepCounts()
        self._lay_out(groups, state, {}, averaging=False)

    def _lay_out(
        self, groups: Sequence[dict[str, Any]], state: StateEntries, known: Mapping[Tensor, str], averaging: bool
    ) -> None:
        """Moves every parameter, with the moments that `state` has for it, into new buckets."""
        self.placement: Placement = place(groups, known, *self._options)
        self.gradients = Gradients(self.placement)
        self.moments = Moments(self.placement, averaging)
        self._pushed: tuple[float, ...] = ()
        self._captured_tables: list[Any] = []
        with torch.no_grad():
            self.moments.load(state, dict(state))

    @property
    def buckets(self) -> list[Bucket]:
        return self.placement.buckets

    @property
    def params(self) -> list[Tensor]:
        return self.placement.params

    @property
    def names(self) -> list[str]:
        return self.placement.names

    @property
    def parts(self) -> list[Any]:
        """The objects whose attributes a step changes, this one included: for callers that undo steps."""
        return [self, self.counts, self.gradients, self.moments, *self.buckets]

    # ---- what a user changes between steps ---------------------------------------------------------------------------

    def follow(self, groups: Sequence[dict[str, Any]], state: StateEntries) -> None:
        """Takes over, as torch would, changes since the last step: lists of parameters, their data, their state.

        Raises: RuntimeError where a change cannot be followed, during a capture, and while averages are in.
        """
        params, sizes = listed(groups), [len(group["params"]) for group in groups]
        same_lists = identical(params, self.params) and sizes == self.placement.sizes
        in_place = same_lists and addresses(params) == self.placement.addresses
        if in_place and self.moments.unchanged(state):
            return
        self.refuse_inside_ema("accumulate")
        if self.capturing():
            raise RuntimeError(
                "FusedAdamW.step: captured after parameters, their data or their state were replaced. Step once before"
                " capturing."
            )
        if not same_lists or not (in_place or self._follow_data()):
            self.rebuild(groups, state)
        with torch.no_grad():
            self.moments.load(state, dict(state))

    def follow_lists(self, groups: Sequence[dict[str, Any]], state: StateEntries) -> None:
        """Lays the buffers out again if parameters were added, removed or reordered."""
        if not identical(listed(groups), self.params):
            self.rebuild(groups, state)

    def rebind(self, groups: Sequence[dict[str, Any]], state: StateEntries) -> None:
        """Takes the parameters where they are now, whoever else holds their memory."""
        self.refuse_inside_ema("rebind")
        self.rebuild(groups, state)
        self.stepped = False

    def add_last_group(self, groups: list[dict[str, Any]], state: StateEntries) -> None:
        """Takes in the last group, just added; removes it again and raises ValueError where it cannot be served."""
        try:
            check_group(groups[-1])
            refuse_parameters(listed(groups), tensor_names(groups))
        except ValueError:
            groups.pop()
            raise
        self.rebuild(groups, state)

    @torch.no_grad()
    def rebuild(self, groups: Sequence[dict[str, Any]], state: StateEntries) -> None:
        """Lays the buffers out again for the parameters as listed now, wherever they are.

        Moments, averages, counters and names stay. A tensor that has left keeps its state, as in torch.
        """
        params, counters, averaging = self.params, self.buckets[0].state, self.moments.averaging
        averages = {p: self.placement.average(i) for i, p in enumerate(params)} if averaging else {}
        for p in set(params).difference(listed(groups)):
            if p in state:
                entry = state[p].items()
                state[p] = {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry}
        self._lay_out(groups, state, dict(zip(params, self.names, strict=True)), averaging)
        for bucket in self.buckets:
            bucket.state.copy_(counters)
        for i, p in enumerate(self.params):
            if averaging and (p in averages or "ema" not in state.get(p, {})):
                self.placement.average(i).copy_(averages.get(p, p))

    def _follow_data(self) -> bool:
        """Moves data that replaced a parameter's own into the buffers; False if they have to be laid out again.

        Before the first step any data will do. Afterwards only data that nobody else holds: another tensor over the
        same memory would no longer see the steps.
        """
        if not self.stepped:
            return False
        pairs = zip(zip(*addresses(self.params)), zip(*self.placement.addresses), strict=True)
        moved = [i for i, (now, before) in enumerate(pairs) if now != before]
        windows = {i: self.placement.window(i) for i in moved}
        lost = [i for i in moved if _kind(self.params[i]) != _kind(windows[i])]
        self._refuse_moved(lost or [i for i in moved if held_elsewhere(self.params[i], self.params)])
        if any(self.params[i].stride() != w.stride() or held_elsewhere(w) for i, w in windows.items()):
            return False
        self.placement.refuse(moved)
        for i in moved:
            self.placement.move_back(i)
        return True

    def _refuse_moved(self, moved: Sequence[int]) -> None:
        if not moved:
            return
        self.placement.refuse(moved)
        raise RuntimeError(
            f"FusedAdamW.step: {len(moved)} of {len(self.params)} parameters (first: {self.names[moved[0]]})"
            " left the flat buffer: the model was moved (.to, .cuda, .half), given to another FusedAdamW, or its .data"
            " replaced by memory that another tensor holds too. Move the model before the first step, or call"
            " optimizer.rebind(), after which that other tensor sees no step."
        )

    # ---- a step and its gradients ------------------------------------------------------------------------------------

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        on_gpu = any(bucket.device.type == "cuda" for bucket in self.buckets)
        return on_gpu and torch.cuda.is_current_stream_capturing()

    def take_gradients(self, state: StateEntries, clear_grads: bool) -> bool:
        """Brings the gradient of every tensor to where the kernels read it; False if there is none at all."""
        if self.capturing():
            self.gradients.check_capture(self.moments.active)
        grads = [p.grad for p in self.params]
        if not (self.moments.active and self.gradients.unchanged(grads)):
            self.moments.set_active(state, [grad is not None for grad in grads])
            self.gradients.bring_in(grads, clear_grads)
        return any(self.moments.active)

    def accumulate(
        self, gradients: Sequence[Tensor | None], state: StateEntries, scale: float, overwrite: bool, last: bool
    ) -> None:
        """`.grad` <- (0 if overwrite else .grad) + scale * gradients, in the buffers."""
        present = self.gradients.present(gradients, overwrite)
        self.moments.set_active(state, present)
        self.gradients.accumulate(gradients, present, scale, overwrite, last)

    def start_loss_scale(self, loss_scale: float | str | None) -> None:
        """Sets the first loss scale of a number or "dynamic"."""
        if loss_scale is not None:
            for bucket in self.buckets:
                bucket.state[State.SCALE] = FIRST_SCALE if loss_scale == "dynamic" else float(loss_scale)

    def write_hyper(self, values: tuple[float, ...], on_device: Sequence[tuple[int, Tensor]]) -> None:
        """Sends hyperparameters to the device: `values` if they changed, and tensors that live there, by slot."""
        if values != self._pushed:
            for bucket in self.buckets:
                bucket.write_hyper(values)
            self._pushed = values
        for slot, tensor in on_device:
            for bucket in self.buckets:
                bucket.hyper[slot].copy_(tensor.squeeze(), non_blocking=True)

    def write_grad_scaler(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Hands scale and overflow flag of a torch.amp.GradScaler, present only during its step, to the device."""
        has_scaler = scale is not None or found_inf is not None
        if has_scaler or self._had_scaler:
            for bucket in self.buckets:
                bucket.write_scaler(scale, found_inf)
        self._had_scaler = has_scaler

    def keep_work_tables(self) -> None:
        """Keeps the tables that the kernels read now alive: replays of a captured graph read them too."""
        self._captured_tables.append([bucket.work for bucket in self.buckets])

    def note_step(self, cleared: bool) -> None:
        """Notes that the weights have changed, and whether the gradients are zero now."""
        self.counts.attempted += not self.capturing()
        self.moments.mark_modified()
        self.gradients.note_step(cleared)
        self.stepped = True

    # ---- averaged weights --------------------------------------------------------------------------------------------

    @contextmanager
    def averaged_weights(self, groups: Sequence[dict[str, Any]], state: StateEntries) -> Iterator[None]:
        """Averaged weights inside the block; afterwards the raw weights, where they were, whatever happened inside."""
        if self.buckets[0].ema is None:
            raise RuntimeError("FusedAdamW.ema: there is no average. Build the optimizer with ema_decay=0.999, say.")
        if self.averages_in:
            raise RuntimeError("FusedAdamW.ema: the averaged weights are already in.")
        self.follow(groups, state)
        raw = [bucket.param.clone() for bucket in self.buckets]
        self.averages_in = True
        try:
            if self.moments.averaging:
                with torch.no_grad():
                    for bucket in self.buckets:
                        bucket.param.copy_(bucket.ema)
            yield
        finally:
            self.averages_in = False
            self.placement.put_back(raw)

    def refuse_step_inside_ema(self) -> None:
        if self.averages_in:
            raise RuntimeError(
                "FusedAdamW.step: called inside `with optimizer.ema():`. Step outside, on the raw weights."
            )

    def refuse_inside_ema(self, who: str) -> None:
        """Raises RuntimeError while averages are in."""
        if self.averages_in:
            raise RuntimeError(
                f"FusedAdamW.{who}: called inside `with optimizer.ema():`, where the averaged weights are in. Call it"
                " outside the block."
            )


def _kind(tensor: Tensor) -> tuple[torch.device, torch.dtype, torch.Size]:
    return tensor.device, tensor.dtype, tensor.shape
