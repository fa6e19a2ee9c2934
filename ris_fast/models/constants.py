"""Buffers that are constants of the physics and keep their precision whatever that of the parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Constants(nn.Module):
    """A module whose own buffers go to other devices and never to another dtype: not by .half(), .double() or
    .bfloat16()."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        """What `.to(...)`, `.half()` and their like go through."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in before.items():
            if (after := getattr(self, name)).dtype != value.dtype:
                setattr(self, name, value.to(after.device))
        return self
