"""Gradients of a flat optimizer: which are there in this step, and how they come into the flat buffers.

A user's gradients stay where autograd or the user put them: a step reads them there (C++) or copies them into the
buffer (elsewhere), and changes none of them. With `clear_grads`, and after `accumulate`, `.grad` is instead a view into
the buffer, for backward to add to: never a copy, but one tensor for good, as after torch's
    `zero_grad(set_to_none=False)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ris_fast.training.optim.flat_buffers import dense
from ris_fast.training.optim.flat_optimizer import FlatOptimizer, identical


class FlatGradients(FlatOptimizer):
    """Adds gradients to the buffers. The subclass sets `clear_grads`."""

    clear_grads: bool

    def _take_gradients(self) -> bool:
        """Brings every gradient into its buffer; False if there is none at all."""
        if self._capturing():
            self._check_capture()
        grads = [p.grad for p in self._params]
        if self._live and identical(grads, self._in_place):
            return any(self._live)
        self._take_part([grad is not None for grad in grads])
        foreign = [
            i
            for i, (grad, view) in enumerate(zip(grads, self._grad_views, strict=True))
            if grad is not None and grad is not view
        ]
        self._refuse_sparse([i for i in foreign if grads[i].layout != torch.strided])
        for bucket, members in zip(self._buckets, self._rows, strict=True):
            if bucket.take([grads[i] for i in members] if foreign else (), in_place=not self.clear_grads):
                self._measured = []
        for i in foreign if self.clear_grads else ():
            self._params[i].grad = grads[i] = self._grad_views[i]
        self._in_place = grads if self.clear_grads or not foreign else []
        return any(self._live)

    def _take_part(self, live: list[bool]) -> None:
        """Makes the state that torch shows and the tables of work agree on which tensors have a gradient."""
        if live == self._live:
            return
        new = [i for i, there in enumerate(live) if there and not self.state.get(self._params[i])]
        for i in new:
            self.state[self._params[i]].update(self._views(i))
        if new:
            self._show_state()
        self._live = live
        for bucket, members in zip(self._buckets, self._rows, strict=True):
            bucket.set_live([live[i] for i in members])

    def _fill(self, grads: Sequence[Tensor | None], scale: float, overwrite: bool, last: bool) -> None:
        """buffer <- (0 if overwrite else buffer) + scale * grads, with pass one where it is the last before the
        step."""
        for bucket, members in zip(self._buckets, self._rows, strict=True):
            empty = bucket.grad[:0]
            given = [empty if (g := grads[i]) is None else dense(g, self._grad_views[i]) for i in members]
            bucket.accumulate(given, scale, overwrite, last)
        self._measured = self._versions() if last else []

    def _refuse_sparse(self, sparse: Sequence[int]) -> None:
        if sparse:
            raise RuntimeError(
                f"FusedAdamW.step: the gradient of {self.tensor_names[sparse[0]]} is"
                f" {self._params[sparse[0]].grad.layout}; sparse gradients are not supported. Use"
                " Embedding(sparse=False), or torch.optim.SparseAdam for this parameter."
            )

    def _check_capture(self) -> None:
        """A graph would go on copying from where the gradients were: refuse unless all of them are in the buffers."""
        named = zip(self.tensor_names, self._params, self._grad_views, strict=True)
        missing = [name for name, p, view in named if p.requires_grad and p.grad is not view]
        if missing or [p.grad is not None for p in self._params] != self._live:
            raise RuntimeError(
                f"FusedAdamW.step: captured while {len(missing)} gradients are not in the flat buffer (first:"
                f" {(missing or ['none'])[0]}). Build the optimizer with clear_grads=True, step once before capturing,"
                " and clear with zero_grad(set_to_none=False)."
            )

    @torch.no_grad()
    def accumulate(
        self, gradients: Sequence[Tensor | None], scale: float = 1.0, *, overwrite: bool = False, last: bool = False
    ) -> None:
        """`.grad` <- (0 if overwrite else .grad) + scale * gradients, in one launch a buffer: for torch.autograd.grad.

        `.grad` is then a view of the buffer, which later steps write to: clone what is to be kept.

        Args:
            gradients: one for each parameter, in order; None where there is none.
            last: folds pass one in, so that the next step reads the gradient once less. Change no gradient in between.
        """
        present = [g is not None for g in gradients]
        if len(present) != len(self._params):
            raise ValueError(
                f"FusedAdamW.accumulate: {len(present)} gradients for {len(self._params)} parameters. Give one each, "
                "None where there is none."
            )
        self._follow()
        if not overwrite:
            for p, view in zip(self._params, self._grad_views, strict=True):
                if p.grad is not view:
                    view.zero_() if p.grad is None else view.copy_(p.grad)
            present = [there or p.grad is not None for there, p in zip(present, self._params, strict=True)]
        self._take_part(present)
        self._in_place = [view if there else None for view, there in zip(self._grad_views, present, strict=True)]
        for p, grad in zip(self._params, self._in_place, strict=True):
            p.grad = grad
        self._fill(gradients, scale, overwrite, last)

    @torch.compiler.disable
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. With False, gradients in the buffers are cleared at once; for nothing right after a step with
        `clear_grads`."""
        params = [p for group in self.param_groups for p in group["params"]]
        if (
            set_to_none
            or not identical(params, self._params)
            or not identical([p.grad for p in params], self._in_place)
        ):
            super().zero_grad(set_to_none)
        elif self._clear_version != self._versions():
            if not all(bucket.attached() for bucket in self._buckets):
                super().zero_grad(set_to_none)  # the views are elsewhere until the next step
            for bucket in self._buckets:
                bucket.grad.zero_()

    def _versions(self) -> list[int]:
        """Counts of in-place writes by torch to the gradient buffers; the fused kernels do not count."""
        return [bucket.grad._version for bucket in self._buckets]
