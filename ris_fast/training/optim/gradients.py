"""Gradients: how the gradient of every tensor comes into the flat buffers, or is read where it is.

A step reads a user's gradients where they are (C++) or copies them into the buffer (other backends), and changes none.
With `clear_grads`, and after `accumulate`, `.grad` is instead a view into the buffer that backward adds to. That saves
the copy, but `.grad` is then the same tensor in every step, as after torch's `zero_grad(set_to_none=False)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ris_fast.training.optim.placement import Groups, Placement, listed
from ris_fast.training.optim.views import dense, identical


class Gradients:
    """Follows the `.grad` of every tensor from step to step. `views[i]`: the view of tensor i into the buffer.

    Versions count torch's in-place writes to the gradient buffers; the fused kernels do not count. They tell whether a
    buffer is still as the optimizer left it.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.views = [bucket.grads[slot] for bucket, slot in placement.places]
        self._in_buffers: list[Tensor | None] = []  # every `.grad` as left, if all of them are views; else empty
        self._measured_versions: list[int] = []  # after an accumulation that measured the gradients; else empty
        self._captured_tables: list[Any] = []
        self._zero_versions: list[int] = []  # after a step that cleared the buffers; else empty

    def unchanged(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether these are the views left by the last step, so that nothing has to be brought in."""
        return identical(grads, self._in_buffers)

    def bring_in(self, grads: list[Tensor | None], keep_in_buffers: bool) -> None:
        """Copies every gradient into its buffer, or notes where the kernels read it.

        keep_in_buffers: `.grad` becomes the view into the buffer.
        """
        pairs = enumerate(zip(grads, self.views, strict=True))
        outside = [i for i, (grad, view) in pairs if grad is not None and grad is not view]
        for i in outside:
            if grads[i].layout != torch.strided:
                raise RuntimeError(
                    f"FusedAdamW.step: the gradient of {self.placement.names[i]} is {grads[i].layout}; sparse gradients"
                    " are not supported. Use Embedding(sparse=False), or torch.optim.SparseAdam for this parameter."
                )
        for bucket, members in zip(self.placement.buckets, self.placement.members, strict=True):
            if bucket.take([grads[i] for i in members], in_place=not keep_in_buffers):
                self._measured_versions = []
        for i in outside if keep_in_buffers else ():
            self.placement.params[i].grad = grads[i] = self.views[i]
        self._in_buffers = grads if keep_in_buffers or not outside else []

    def prepare_capture(self, active: Sequence[bool]) -> None:
        """Keeps the tables that the kernels read now alive, which replays of the graph read too. Raises RuntimeError
        unless every gradient is in its buffer: a graph would keep copying from elsewhere."""
        params = self.placement.params
        named = zip(self.placement.names, params, self.views, strict=True)
        missing = [name for name, p, view in named if p.requires_grad and p.grad is not view]
        if missing or [p.grad is not None for p in params] != active:
            raise RuntimeError(
                f"FusedAdamW.step: captured while {len(missing)} gradients are not in the flat buffer (first:"
                f" {(missing or ['none'])[0]}). Build the optimizer with clear_grads=True, step once before capturing,"
                " and clear with zero_grad(set_to_none=False)."
            )
        self._captured_tables += [bucket.work for bucket in self.placement.buckets]

    def present(self, gradients: Sequence[Tensor | None], overwrite: bool) -> list[bool]:
        """Which tensors have a gradient once these are accumulated. Copies those that are there into the buffers.
        Raises ValueError unless there is one gradient, or None, for each tensor."""
        if len(gradients) != len(self.views):
            raise ValueError(
                f"FusedAdamW.accumulate: {len(gradients)} gradients for {len(self.views)} parameters. Give one each, "
                "None where there is none."
            )
        present = [grad is not None for grad in gradients]
        if overwrite:
            return present
        for p, view in zip(self.placement.params, self.views, strict=True):
            if p.grad is not view:
                view.zero_() if p.grad is None else view.copy_(p.grad)
        return [there or p.grad is not None for there, p in zip(present, self.placement.params, strict=True)]

    def accumulate(
        self, gradients: Sequence[Tensor | None], active: Sequence[bool], scale: float, overwrite: bool, last: bool
    ) -> None:
        """buffer <- (0 if overwrite else buffer) + scale * gradients; `.grad` of active tensors become views.

        last: measures the sum as well, so that the next step reads the gradients once less.
        """
        self._in_buffers = [view if there else None for view, there in zip(self.views, active, strict=True)]
        for p, grad in zip(self.placement.params, self._in_buffers, strict=True):
            p.grad = grad
        for bucket, members in zip(self.placement.buckets, self.placement.members, strict=True):
            empty = bucket.grad[:0]
            given = [empty if (g := gradients[i]) is None else dense(g, self.views[i]) for i in members]
            bucket.accumulate(given, scale, overwrite, last)
        self._measured_versions = self._versions() if last else []

    def measured(self) -> bool:
        """Whether the last accumulation measured the gradients and nothing has written to the buffers since."""
        return self._measured_versions == self._versions()

    def note_step(self, cleared: bool) -> None:
        self._measured_versions = []
        self._zero_versions = self._versions() if cleared else []

    def zero(self, groups: Groups) -> bool:
        """Clears the buffers, unless they are known to be zero; False where torch has to clear `.grad` itself."""
        params = listed(groups)
        if not identical(params, self.placement.params) or not self.unchanged([p.grad for p in params]):
            return False
        if self._zero_versions == self._versions():
            return True
        for bucket in self.placement.buckets:
            bucket.grad.zero_()
        return all(
            bucket.attached() for bucket in self.placement.buckets
        )  # else the views are elsewhere until the next step

    def _versions(self) -> list[int]:
        return [bucket.grad._version for bucket in self.placement.buckets]
