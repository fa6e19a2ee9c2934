"""What the host learns of the device without making it wait: copies on their way, and when a point of the work was
reached."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class HostCopy:
    """Named tensors on their way to the host: from CUDA into pinned memory, in the order of the stream, without
    waiting.

    Tensors that are on the host already are kept as they are: read them before they change.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._host, self._arrived = dict(tensors), None
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._host[name] = pinned.copy_(tensor.detach(), non_blocking=True)
                self._arrived = self._arrived or torch.cuda.Event()
        if self._arrived is not None:
            self._arrived.record()

    def result(self) -> dict[str, Tensor]:
        """The copies; waits until they have arrived, and for nothing behind them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


class DeviceTimestamp:
    """A point in the device's work, put there by `Clock.record`."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._seconds, self._event = clock, time.monotonic(), _timed_event(clock.device)

    def seconds(self) -> float:
        """When it was reached, on the clock of time.monotonic(); waits until it is, and for nothing behind it."""
        if self._event is None:
            return self._seconds
        self._event.synchronize()
        return self._clock.began + self._clock.event.elapsed_time(self._event) / 1e3


class Clock:
    """Time as the device sees it. A host that only queues work is ahead of the device, and its own clock says
    little."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Waits for the device and sets its time to the host's. Timestamps recorded before are void."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.began, self.event = time.monotonic(), _timed_event(self.device)

    def record(self) -> DeviceTimestamp:
        return DeviceTimestamp(self)


def _timed_event(device: torch.device) -> torch.cuda.Event | None:
    """An event recorded on the current stream; None on a CPU, whose work is done when its call returns."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On CUDA a stream other than the default one, which cannot be captured; in order with what came before and comes
    after."""
    if device.type != "cuda":
        yield
        return
    outer, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)
