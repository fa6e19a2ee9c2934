"""FlatBuffers: the parameters of an optimizer in flat buffers, kept in line with what users change between steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ris_fast.training.optim.arguments import check_group
from ris_fast.training.optim.gradients import Gradients
from ris_fast.training.optim.moments import Moments, StateEntries
from ris_fast.training.optim.placement import Groups, Placement, listed, place, refuse_parameters, tensor_names
from ris_fast.training.optim.views import addresses, held_elsewhere, identical


class FlatBuffers:
    """Where every tensor is (`placement`), its moments (`moments`) and its gradient (`gradients`).

    What torch shows (param_groups, `.data`, state) is compared before each step with what was left there; only where it
    differs is anything copied or laid out again. All three parts are new after a layout.

    stepped: True after the first step: other tensors may then rely on weights staying where they are.
    averages_in: True inside `averaged_weights`, where the averaged weights are in the buffers.
    attempted, skipped: steps as far as the host knows without reading from the device.
    """

    def __init__(self, groups: Groups, state: StateEntries, backend: str, with_ema: bool, records: int) -> None:
        self._options = backend, with_ema, records
        self.stepped = self.averages_in = False
        self.attempted = self.skipped = 0
        self._lay_out(groups, state, {}, averaging=False)

    def _lay_out(self, groups: Groups, state: StateEntries, known: Mapping[Tensor, str], averaging: bool) -> None:
        """Moves every parameter, with the moments that `state` has for it, into new buckets."""
        self.placement: Placement = place(groups, known, *self._options)
        self.gradients = Gradients(self.placement)
        self.moments = Moments(self.placement, averaging)
        with torch.no_grad():
            self.moments.load(state, dict(state))

    @property
    def parts(self) -> list[Any]:
        """The objects whose attributes a step changes, this one included: for callers that undo steps."""
        return [self, self.gradients, self.moments, *self.placement.buckets]

    def follow(self, groups: Groups, state: StateEntries) -> None:
        """Takes over, as torch would, changes since the last step: lists of parameters, their data, their state.

        Raises: RuntimeError where a change cannot be followed, during a capture, and while averages are in.
        """
        params, sizes = listed(groups), [len(group["params"]) for group in groups]
        same_lists = identical(params, self.placement.params) and sizes == self.placement.sizes
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
    def rebuild(self, groups: Groups, state: StateEntries) -> None:
        """Lays the buffers out again for the parameters as listed now, wherever they are. Moments, averages, counters
        and names stay. A tensor that has left keeps its state, as in torch."""
        before, averaging = self.placement, self.moments.averaging
        params, counters = before.params, before.buckets[0].state
        averages = dict(zip(params, before.averages, strict=True)) if averaging else {}
        for p in set(params).difference(listed(groups)):
            if p in state:
                entry = state[p].items()
                state[p] = {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry}
        self._lay_out(groups, state, dict(zip(params, before.names, strict=True)), averaging)
        for bucket in self.placement.buckets:
            bucket.state.copy_(counters)
        for p, average in zip(self.placement.params, self.placement.averages, strict=averaging):
            if averaging and (p in averages or "ema" not in state.get(p, {})):
                average.copy_(averages.get(p, p))

    def _follow_data(self) -> bool:
        """Moves data that replaced a parameter's own into the buffers; False if they have to be laid out again. After
        the first step only data that nobody else holds: another tensor over the same memory would see no more steps."""
        if not self.stepped:
            return False
        here = self.placement
        pairs = zip(zip(*addresses(here.params)), zip(*here.addresses), strict=True)
        moved = [i for i, (now, before) in enumerate(pairs) if now != before]
        refuse_parameters([here.params[i] for i in moved], [here.names[i] for i in moved])
        both = {i: (here.params[i], here.windows[i]) for i in moved}
        lost = [i for i, (p, w) in both.items() if (p.device, p.dtype, p.shape) != (w.device, w.dtype, w.shape)]
        self._refuse_moved(lost or [i for i in moved if held_elsewhere(here.params[i], here.params)])
        if any(p.stride() != window.stride() or held_elsewhere(window) for p, window in both.values()):
            return False
        for i in moved:
            here.move_back(i)
        return True

    def _refuse_moved(self, moved: Sequence[int]) -> None:
        names = self.placement.names
        if moved:
            raise RuntimeError(
                f"FusedAdamW.step: {len(moved)} of {len(names)} parameters (first: {names[moved[0]]}) left the flat"
                " buffer: the model was moved (.to, .cuda, .half), given to another FusedAdamW, or its .data replaced"
                " by memory that another tensor holds too. Move the model before the first step, or call"
                " optimizer.rebind(), after which that other tensor sees no step."
            )

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        on_gpu = any(bucket.device.type == "cuda" for bucket in self.placement.buckets)
        return on_gpu and torch.cuda.is_current_stream_capturing()

    def take_gradients(self, state: StateEntries, clear_grads: bool) -> bool:
        """Brings every gradient to where the kernels read it; False, with a warning, if there is none at all."""
        if self.capturing():
            self.gradients.prepare_capture(self.moments.active)
        grads = [p.grad for p in self.placement.params]
        if not (self.moments.active and self.gradients.unchanged(grads)):
            self.moments.set_active(state, [grad is not None for grad in grads])
            self.gradients.bring_in(grads, clear_grads)
        if any(self.moments.active):
            return True
        warnings.warn(
            "FusedAdamW.step: no parameter has a gradient, so nothing was updated. Was backward called, and does the"
            " optimizer hold the parameters of the model that trains (not of a copy)?",
            RuntimeWarning,
            stacklevel=3,
        )
        return False

    def note_step(self, cleared: bool) -> None:
        """Notes a step, and whether the gradients are zero now; tells autograd, which may have saved the weights."""
        self.attempted += not self.capturing()
        torch.autograd.graph.increment_version(list(compress(self.placement.params, self.moments.active)))
        self.gradients.note_step(cleared)
        self.stepped = True

    @contextmanager
    def averaged_weights(self, groups: Groups, state: StateEntries) -> Iterator[None]:
        """Averaged weights inside the block; afterwards the raw weights, where they were, whatever happened inside."""
        if self.placement.buckets[0].ema is None:
            raise RuntimeError("FusedAdamW.ema: there is no average. Build the optimizer with ema_decay=0.999, say.")
        if self.averages_in:
            raise RuntimeError("FusedAdamW.ema: the averaged weights are already in.")
        self.follow(groups, state)
        raw = [bucket.param.clone() for bucket in self.placement.buckets]
        self.averages_in = True
        try:
            for bucket in self.placement.buckets if self.moments.averaging else ():
                with torch.no_grad():
                    bucket.param.copy_(bucket.ema)
            yield
        finally:
            self.averages_in = False
            self.placement.put_back(raw)

    def refuse_inside_ema(self, who: str, instead: str = "Call it outside the block.") -> None:
        """Raises RuntimeError while averages are in."""
        if self.averages_in:
            raise RuntimeError(
                f"FusedAdamW.{who}: called inside `with optimizer.ema():`, where the averaged weights are in. {instead}"
            )
