"""A torch Optimizer whose parameters and gradients live in flat buffers: who is where, and which gradient is present."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ris_fast.training.arguments import check_group, choose_backend, refuse_shared_memory, tensor_names
from ris_fast.training.flat import Bucket, dense, real_dtype


class FlatOptimizer(Optimizer):
    """Holds the buffers. The subclass sets `wanted_backend`, `ema_decay` and `_record_count`, then calls `Optimizer.__init__` and `_build`.

    For tensor i of all groups in order: `_params[i]`; its buffer and its place there `_place[i]`; its gradient view
    `_grad_views[i]`; and `_expected[i]`, which is that view while the tensor takes part in steps, else None. Fast checks
    compare `.grad` with `_expected`; only where they differ is anything copied or laid out again.
    """

    _built = False
    wanted_backend: str
    _record_count: int

    def _build(self) -> None:
        """Moves every parameter, with the moments that `self.state` has for it, into new flat buffers."""
        groups = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
        self._params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self.tensor_names = tensor_names(self.param_groups)
        refuse_shared_memory(self._params, self.tensor_names)
        kinds = list(dict.fromkeys((p.device, real_dtype(p)) for p in self._params))
        self._rows = [[i for i, p in enumerate(self._params) if (p.device, real_dtype(p)) == kind] for kind in kinds]
        self._buckets = [self._make_bucket(kind, members, groups) for kind, members in zip(kinds, self._rows, strict=True)]
        self._place = {i: (b, slot) for b, members in zip(self._buckets, self._rows, strict=True) for slot, i in enumerate(members)}
        self._grad_views = [self._place[i][0].grads[self._place[i][1]] for i in range(len(self._params))]
        self._expected: list[Tensor | None] = [None] * len(self._params)
        self._measured: list[int] = []
        self._clear_version: list[int] = []
        self._stepped = False
        with torch.no_grad():
            for i, p in enumerate(self._params):
                bucket, slot = self._place[i]
                bucket.params[slot].copy_(p)
                p.data = bucket.params[slot]
            self._load_moments(dict(self.state))
        self._pointers = [p.data_ptr() for p in self._params]
        self._built = True

    def _make_bucket(self, kind: tuple[torch.device, torch.dtype], members: Sequence[int], groups: Sequence[int]) -> Bucket:
        like = [self._params[i].detach() for i in members]
        backend = choose_backend(self.wanted_backend, *kind)
        return Bucket(like, [groups[i] for i in members], len(self.param_groups), backend, self.ema_decay is not None, self._record_count)

    @property
    def backend(self) -> str:
        """Implementation in use; several joined by + where the parameters are of several kinds."""
        return "+".join(dict.fromkeys(bucket.backend for bucket in self._buckets))

    def _load_moments(self, loaded: dict[Any, Any]) -> None:
        """Copies steps and moments into the buffers; a tensor without any starts from zero."""
        self.state.clear()
        for i, p in enumerate(self._params):
            bucket, slot = self._place[i]
            saved = loaded.get(p)
            if not saved:
                for tensor in (bucket.moments1[slot], bucket.moments2[slot], bucket.steps[slot]):
                    tensor.zero_()
                continue
            bucket.moments1[slot].copy_(saved["exp_avg"])
            bucket.moments2[slot].copy_(saved["exp_avg_sq"])
            bucket.steps[slot].copy_(torch.as_tensor(saved["step"]))
            self._expose(i)

    def _expose(self, i: int) -> None:
        """Puts views of step and moments where torch keeps its state."""
        bucket, slot = self._place[i]
        self.state[self._params[i]] = dict(step=bucket.steps[slot], exp_avg=bucket.moments1[slot], exp_avg_sq=bucket.moments2[slot])

    # ---- parameters ------------------------------------------------------------------------------------------------

    def rebind(self) -> None:
        """Takes the parameters where they are now (after `model.to(...)`), with moments, averages and counters."""
        extra = self.extra_state()
        self._build()
        self.load_extra_state(extra)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Flat buffers are laid out again: capture CUDA graphs afterwards."""
        super().add_param_group(param_group)
        if not self._built:
            return
        try:
            check_group(self.param_groups[-1])
            refuse_shared_memory([*self._params, *self.param_groups[-1]["params"]], tensor_names(self.param_groups))
        except ValueError:
            self.param_groups.pop()
            raise
        self.rebind()

    def _check_parameters(self) -> None:
        """Raises if parameters have left the buffers; before the first step it follows them instead."""
        if [p.data_ptr() for p in self._params] == self._pointers:
            return
        if not self._stepped:
            self.rebind()
            return
        moved = [name for name, p, at in zip(self.tensor_names, self._params, self._pointers, strict=True) if p.data_ptr() != at]
        raise RuntimeError(
            f"FusedAdamW.step: {len(moved)} of {len(self._params)} parameters (first: {moved[0]}) left the flat buffer: the model was moved "
            "(.to, .cuda, .half), given to another FusedAdamW, or its .data replaced after the first step. "
            "Move the model before the first step, or call optimizer.rebind()."
        )

    # ---- gradients -------------------------------------------------------------------------------------------------

    def _take_gradients(self) -> bool:
        """Makes every gradient a view into its buffer; False if there is none at all."""
        if self._capturing():
            self._check_capture()
        if not all(p.grad is seen for p, seen in zip(self._params, self._expected, strict=True)):
            self._adopt([p.grad for p in self._params])
        return any(seen is not None for seen in self._expected)

    def _adopt(self, grads: Sequence[Tensor | None]) -> None:
        """Copies gradients that autograd (or a user) put elsewhere into the buffers; None means not in this step."""
        for name, grad in zip(self.tensor_names, grads, strict=True):
            if grad is not None and grad.layout != torch.strided:
                raise RuntimeError(
                    f"FusedAdamW.step: the gradient of {name} is {grad.layout}; sparse gradients are not supported. "
                    "Use Embedding(sparse=False), or torch.optim.SparseAdam for this parameter."
                )
        foreign = [(view, grad) for view, grad in zip(self._grad_views, grads, strict=True) if grad is not None and grad is not view]
        if foreign:
            torch._foreach_copy_([view for view, _ in foreign], [grad for _, grad in foreign])
        self._attach(grad is not None for grad in grads)

    def _check_capture(self) -> None:
        """A graph would go on copying from where the gradients were: refuse unless all of them are in the buffers."""
        named = zip(self.tensor_names, self._params, self._grad_views, self._expected, strict=True)
        missing = [name for name, p, view, seen in named if p.requires_grad and not (p.grad is view is seen)]
        if missing:
            raise RuntimeError(
                f"FusedAdamW.step: captured while {len(missing)} gradients are not in the flat buffer (first: {missing[0]}). "
                "Step once before capturing, and clear with optimizer.zero_grad(), not with model.zero_grad()."
            )

    def _attach(self, live: Iterable[bool]) -> None:
        """Makes `.grad`, the state that torch shows and the tables of work agree on which tensors take part."""
        self._expected = [view if there else None for view, there in zip(self._grad_views, live, strict=True)]
        for i, (p, seen) in enumerate(zip(self._params, self._expected, strict=True)):
            p.grad = seen
            if seen is not None and p not in self.state:
                self._expose(i)
        for bucket, members in zip(self._buckets, self._rows, strict=True):
            bucket.set_live([self._expected[i] is not None for i in members])

    @torch.no_grad()
    def accumulate(self, gradients: Sequence[Tensor | None], scale: float = 1.0, *, overwrite: bool = False, last: bool = False) -> None:
        """`.grad` <- (0 if overwrite else .grad) + scale * gradients, in one launch a buffer: for torch.autograd.grad.

        Args:
            gradients: one for each parameter, in order; None where there is none.
            last: folds pass one in, so that the next step reads the gradient once less. Change no gradient in between.
        """
        present = [g is not None for g in gradients]
        if len(present) != len(self._params):
            raise ValueError(f"FusedAdamW.accumulate: {len(present)} gradients for {len(self._params)} parameters. Give one each, None where there is none.")
        if not overwrite:
            for view, seen in zip(self._grad_views, self._expected, strict=True):
                if seen is None:
                    view.zero_()
            present = [there or seen is not None for there, seen in zip(present, self._expected, strict=True)]
        self._attach(present)
        for bucket, members in zip(self._buckets, self._rows, strict=True):
            empty = bucket.grad[:0]
            bucket.accumulate([empty if (g := gradients[i]) is None else dense(g, self._grad_views[i]) for i in members], scale, overwrite, last)
        self._measured = self._versions() if last else []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients. The views stay in place either way; costs nothing right after a step with `clear_grads`."""
        for p, view in zip(self._params, self._grad_views, strict=True):
            if p.grad is not None and p.grad is not view:
                p.grad = None if set_to_none else torch.zeros_like(p.grad)
        if self._clear_version != self._versions():
            for bucket in self._buckets:
                bucket.grad.zero_()

    def _versions(self) -> list[int]:
        """Counts of in-place writes by torch to the gradient buffers; the fused kernels do not count."""
        return [bucket.grad._version for bucket in self._buckets]

    def _capturing(self) -> bool:
        return any(bucket.device.type == "cuda" for bucket in self._buckets) and torch.cuda.is_current_stream_capturing()
