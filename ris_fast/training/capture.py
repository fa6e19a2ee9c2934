"""The whole optimizer step, and validation, as CUDA graphs captured by hand; eager steps where that is impossible.

One graph holds what `Step.update` does for a full group: for each micro-batch simulation (or fetching from a data set
in device memory), features, forward, loss and backward, then both passes of the fused step. Between two replays the
host writes scene numbers, and, where they changed, learning rates, clip threshold and decay of the average into device
memory; it reads nothing. Bias corrections, counters, skipping and the loss scale live on the device anyhow. The seed of
the scenes is a constant of a run: scene i is scene i, so that the numbers alone decide what a replay sees.

Steps stay eager, launch by launch, with the same kernels, where a graph would not pay: the first ones, which warm up
everything that is made on first use (kernels, tuning, optimizer state, constants of a task); the ragged group at the
end of an epoch; and the steps that are looked at closely (`Telemetry.due`), whose readings no graph carries.

Not yet run on a GPU: nothing in this file that touches torch.cuda has been executed. On a CPU it is shown that a step
as captured is the plain step bit for bit, with the graph replaced by a second call; that it reads nothing from its
device and copies nothing to it (on the meta device); and that every way back to eager works. tests/training/
test_capture.py holds the proofs for a GPU too, skipped where there is none: replay equals eager bit for bit with
changing rates, accumulation, bf16 and averages, and an epoch under torch.cuda.set_sync_debug_mode("error").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ris_fast.config.schema import Config
from ris_fast.data.source import SceneSource
from ris_fast.timing import no_garbage_collection
from ris_fast.training.ranks.group import ALONE, Ranks
from ris_fast.training.step import Group, Step
from ris_fast.training.step_result import StepResult

WARM_UP = 3  # eager calls before a capture


class Recording(Protocol):
    """A function of no arguments, captured once and run again by `replay`, which returns what the function returned."""

    def replay(self) -> Any: ...


class CudaGraph:
    """`body` as a CUDA graph. Building it runs nothing on the device; results keep their addresses over replays."""

    def __init__(self, body: Callable[[], Any]) -> None:
        current = torch.cuda.current_stream()
        stream = None if current == torch.cuda.default_stream() else current  # the default stream cannot be captured
        self.graph = torch.cuda.CUDAGraph()
        # A dead graph that the collector finds during a capture would be destroyed within it, which spoils it; so does,
        # in the default mode, what another thread asks of the device meanwhile, as one that writes a checkpoint does.
        mode = {"capture_error_mode": "thread_local"}
        with no_garbage_collection(), torch.cuda.graph(self.graph, stream=stream, **mode):
            self.result = body()

    def replay(self) -> Any:
        self.graph.replay()
        return self.result


Record = Callable[[Callable[[], Any]], Recording]


class CapturedStep:
    """Optimizer steps by scene numbers: `captured(indices, planned)` is `step([scenes of each], planned)`.

    `refused`: why steps are launched one by one instead, empty where they are not. Args: record: what captures a
        function.
    """

    def __init__(
        self, step: Step, source: SceneSource, config: Config, record: Record = CudaGraph, ranks: Ranks = ALONE
    ) -> None:
        training = config.training
        self.scenes = training.batch_size * training.accumulate * ranks.size  # of a full group, on all ranks
        self.step, self.source, self.record = step, source, record
        self.index = [
            torch.zeros(training.batch_size, dtype=torch.int64, device=source.index_device)
            for _ in range(training.accumulate)
        ]
        self.refused = why_not(step, source, config, ranks)
        self.warm, self.recording = 0, None

    def __call__(self, indices: Sequence[Tensor], planned: int) -> StepResult:
        """Args: indices: scene numbers of each micro-batch, (B,) int64; planned: length of the schedule in steps."""
        if not self._full(indices):
            batches = [self.source.batch("train", index) for index in indices]
            return self.step(Group(batches, getattr(indices, "scenes", sum(map(len, indices)))), planned)
        torch._foreach_copy_(self.index, list(indices))
        telemetry = self.step.telemetry
        telemetry.begin()
        if telemetry.sampled or not self._ready(planned):
            self.warm += 1
            return self._update(planned)
        return self._replay(planned)

    def _full(self, indices: Sequence[Tensor]) -> bool:
        """Whether these are as many scenes as the graph takes; with several ranks, whether all have as many, so that
        all replay their graphs or none does."""
        if self.step.reduction is not None:
            return indices.scenes == self.scenes
        return [len(index) for index in indices] == [len(index) for index in self.index]

    def _update(self, planned: int) -> StepResult:
        """What is captured: the step over the scenes whose numbers are in `index`, the sum of the gradients over ranks
        included."""
        return self.step.update(
            Group([self.source.batch("train", index) for index in self.index], self.scenes), planned
        )

    def _ready(self, planned: int) -> bool:
        """Whether there is a graph to replay; captures it when everything is warm, once."""
        if self.recording is None and not self.refused and self.warm >= WARM_UP:
            self.refused = self._missing_gradient()
            if not self.refused:
                self.recording, self.refused = attempt(self.record, lambda: self._update(planned), "the step")
        return self.recording is not None

    def _replay(self, planned: int) -> StepResult:
        self.step.schedule(planned)
        self.step.note_rates()
        self.step.optimizer.sync_hyperparameters()
        result = self.recording.replay()
        self.step.optimizer.count_replay()
        return result

    def _missing_gradient(self) -> str:
        """A gradient that appears later would not be in the graph, and its tensor would never move."""
        missing = [
            name
            for name, parameter in self.step.telemetry.model.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        return (
            _told(f"no loss reaches {len(missing)} tensors, the first is '{missing[0]}'", "the step") if missing else ""
        )


class CapturedCall:
    """Runs a function the first time, captures it the second time, and replays it from then on.

    The function must do the same work on the same tensors each time, as validation on fixed scenes does.
    """

    def __init__(self, what: str, record: Record = CudaGraph) -> None:
        self.what, self.record = what, record
        self.warm, self.recording, self.refused = 0, None, ""

    def __call__(self, body: Callable[[], Any]) -> Any:
        if self.recording is None and not self.refused and self.warm:
            self.recording, self.refused = attempt(self.record, body, self.what)
        self.warm += 1
        return body() if self.recording is None else self.recording.replay()


def why_not(step: Step, source: SceneSource, config: Config, ranks: Ranks = ALONE) -> str:
    """What is known beforehand to prevent the capture of a step; empty if nothing is."""
    if not config.training.capture:
        return "as asked"
    if source.index_device.type != "cuda":
        return "the data are not in the device's memory"
    if step.optimizer.backend != "triton":
        return f"the optimizer step runs as '{step.optimizer.backend}', not as a kernel"
    if not ranks.alone and ranks.engine != "nccl":
        return f"the ranks' gradients are summed by {ranks.engine}, and a graph can hold NCCL's sums only"
    return ""


def attempt(record: Record, body: Callable[[], Any], what: str) -> tuple[Recording | None, str]:
    """The recording, or None and why there is none, which is also said as a warning."""
    try:
        return record(body), ""
    except RuntimeError as error:  # what torch raises for whatever a capture forbids, and for too little memory
        return None, _told(_reasons(error), what)


def _reasons(error: BaseException | None) -> str:
    """The first line of each exception of a chain, the earliest first: a capture that is broken off ends in an error of
    its own, which says nothing of what broke it."""
    found: list[str] = []
    while error is not None:
        found.insert(0, (str(error).strip() or type(error).__name__).splitlines()[0])
        error = error.__cause__ or error.__context__
    return "; then: ".join(dict.fromkeys(found))


def _told(reason: str, what: str) -> str:
    warnings.warn(
        f"ris-fast: {what} is not captured in a CUDA graph but launched kernel by kernel: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return reason
