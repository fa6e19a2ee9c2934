"""What every test shares: its part of the cores where tests run side by side, and fresh compiled graphs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(share)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))  # of the programs that tests start


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    """Compiled graphs of one test neither help nor hurt the next one."""
    yield
    torch.compiler.reset()


@pytest.fixture
def terminal_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP as a program on a terminal gets them, also where these tests run under nohup or in the
    background."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
