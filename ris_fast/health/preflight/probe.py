"""What preflight examines: a trainer, a few of its scenes, and the ways to run them through its network and loss.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.models.modes import eval_mode
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from ris_fast.training.undo import write

SMALL = 16  # scenes in most probes, whose cost is mostly the forward passes of a large network
FEWEST = 4  # of a micro-batch by itself
VALIDATED = 256  # validation scenes that are looked at
GROUPS = 8  # optimizer steps whose scenes are looked at
MOST_SCENES = 2048
LONG, LATER = 3, 128  # epochs; scenes of a later one
AFTERWARDS = "training (a later epoch)"


class PreflightContext:
    """A trainer under examination. `groups`: the scenes of its first steps, as its own loop serves them."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.model, self.loss = trainer, trainer.model, trainer.loss
        self.config, self.optimizer, self.step = trainer.config, trainer.optimizer, trainer.step
        self.note = ""  # what the running check measured, for people
        self.reached = True  # whether the running check reached its goal
        self.known: dict[str, Any] = {}  # what several checks ask for, by name

    @cached_property
    def groups(self) -> list[list[Scenes]]:
        training = self.config.training
        count = max(2, min(GROUPS, MOST_SCENES // (training.batch_size * training.accumulate)))
        groups = self.trainer._groups()
        try:
            return list(islice(groups, count))
        finally:
            getattr(groups, "close", lambda: None)()

    @cached_property
    def later(self) -> Scenes | None:
        """Scenes of the first steps of an epoch in the middle of the run, as the trainer's own loop would serve them
        then; None in a short run, or one that goes on."""
        state, epochs = self.trainer.state, self.config.training.epochs
        if state.step or epochs <= LONG:
            return None
        now, state.epoch = state.epoch, max(LONG, epochs // 2)
        groups, found = self.trainer._groups(), []
        try:
            while sum(scenes.batch for scenes in found) < LATER and (group := next(groups, None)) is not None:
                found += group
            return Scenes.concatenate(found)[:MOST_SCENES] if found else None
        finally:
            state.epoch = now
            getattr(groups, "close", lambda: None)()

    @cached_property
    def scenes(self) -> Scenes:
        """A few scenes of the first micro-batch, or of the first ones where one has too few to compare."""
        first = self.groups[0][0]
        if first.batch < FEWEST:
            first = Scenes.concatenate([scenes for group in self.groups for scenes in group][:SMALL])
        return first[:SMALL]

    @cached_property
    def validation(self) -> Scenes:
        """The first of the scenes that the trainer validates, from where it gets them."""
        source, batches = self.trainer.source, self.trainer.validation
        if not batches and "_validation_scenes" in vars(self.trainer):  # a script's own
            with self._nothing_remembered():
                batches = self.trainer._validation_scenes()
        if batches:
            enough = -(-VALIDATED // max(1, min(scenes.batch for scenes in batches)))
            return Scenes.concatenate(list(batches)[:enough])[:VALIDATED]
        return source.batch("val", torch.arange(min(VALIDATED, self.config.data.val_limit, source.size("val"))))

    @contextmanager
    def _nothing_remembered(self) -> Iterator[None]:
        """Features of validation scenes are kept as they were."""
        kept = dict(self.trainer.network.known)
        try:
            yield
        finally:
            self.trainer.network.known.clear()
            self.trainer.network.known.update(kept)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    def tolerance(self, fp32: float, low: float) -> float:
        """By the precision that the run trains in."""
        return fp32 if self.config.training.precision == "fp32" else low

    @property
    def compiled(self) -> bool:
        """Whether the step calls something other than the network itself."""
        return self.step.network is not self.model

    @property
    def by_torch(self) -> bool:
        """Whether torch compiled the network: it compiles anew for every shape."""
        return bool(getattr(self.step.network, "compiled", False))

    # ---- running it --------------------------------------------------------------------------------------------

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """The step calls the network itself, not what was compiled or copied from it."""
        network, self.step.network = self.step.network, self.model
        try:
            yield
        finally:
            self.step.network = network

    @contextmanager
    def small(self) -> Iterator[None]:
        """For small batches: what torch compiled, the trainer or a layer of the user's own, runs as written, so that
        nothing is compiled anew for them."""
        with torch.compiler.set_stance("force_eager"), self.as_written() if self.by_torch else nullcontext():
            yield

    def whole(self) -> AbstractContextManager[None]:
        """For whole steps: what training will call where the trainer compiles; else nothing is compiled for a check."""
        return nullcontext() if self.by_torch else self.small()

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """float32 throughout, where a derivative is to be measured."""
        config = self.step.config
        self.step.config = replace(config, training=replace(config.training, precision="fp32"))
        try:
            yield
        finally:
            self.step.config = config

    def run(self, scenes: Scenes | None = None, *, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], Prediction]:
        """Total, terms and prediction through the run's own path; the same dropout for the same seed."""
        scenes = self.scenes if scenes is None else scenes
        prediction = self.predict(scenes, seed)
        total, terms = self.loss(prediction, scenes)
        return total, terms, prediction

    def predict(self, scenes: Scenes, seed: int = 0) -> Prediction:
        """The network's prediction, each time from the same random numbers and the same buffers."""
        self.rewind(seed)
        return self.step.predict(scenes)

    def rewind(self, seed: int = 0) -> None:
        """Random numbers and moving buffers as they were before the first pass."""
        for module, name, buffer, value in self._moving_buffers:
            module._buffers[name] = buffer
            write(buffer, value)
        torch.manual_seed(seed)

    @cached_property
    def _moving_buffers(self) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
        """Buffers that a pass in training mode changes, as running statistics: whose, name, tensor and its numbers."""
        found = [
            (module, name, buffer, buffer.detach().clone())
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        torch.manual_seed(0)
        with torch.enable_grad():  # a buffer may move in passes that are differentiated alone
            self.step.predict(self.scenes)
        return [
            each
            for each in found
            if each[0]._buffers[each[1]] is not each[2]
            or not torch.allclose(each[2], each[3], 0.0, 0.0, equal_nan=True)
        ]

    @property
    def guess(self) -> Prediction:
        """The network's prediction for the small batch, without a graph: a copy, from one pass for all checks."""
        return self._guess.apply(torch.clone)

    @cached_property
    @torch.no_grad()
    def _guess(self) -> Prediction:
        torch.manual_seed(0)
        return self.step.predict(self.scenes)

    @torch.no_grad()
    def value(self, seed: int = 0) -> float:
        """The loss of the small batch as a number."""
        with torch.enable_grad():  # a network may behave differently without
            return float(self.run(seed=seed)[0].detach())

    @torch.no_grad()
    def answer(self, scenes: Scenes, seed: int = 0) -> Tensor:
        """The factor of the small batch in evaluation mode: (B, N, Q, 2)."""
        torch.manual_seed(seed)
        with eval_mode(self.model):
            return self.step.predict(scenes).factor.float().clone()

    def answer_with_grad(self, scenes: Scenes, seed: int = 0) -> Tensor:
        """The same with the graph, through the network itself."""
        torch.manual_seed(seed)
        with eval_mode(self.model), self.as_written():
            return self.step.predict(scenes).factor

    @contextmanager
    def moved(self, tensors: Sequence[Tensor], directions: Sequence[Tensor], step: float) -> Iterator[None]:
        """Weights moved along directions, and put back bit for bit."""
        kept = [tensor.detach().clone() for tensor in tensors]
        with torch.no_grad():
            for tensor, direction in zip(tensors, directions):
                write(tensor, tensor.add(direction, alpha=step))
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, kept):
                    write(tensor, value)


@contextmanager
def layer_calls(model: nn.Module, keep: Callable[[str, nn.Module, tuple, Any], None]) -> Iterator[None]:
    """Inside, `keep(name, module, inputs, output)` is called after every module that has parameters of its own."""
    handles = [
        module.register_forward_hook(partial(keep, name))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
