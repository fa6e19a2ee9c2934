"""What every test shares: one thread unless it says otherwise, and fresh compiled graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    """Compiled graphs of one test neither help nor hurt the next one."""
    yield
    torch.compiler.reset()
