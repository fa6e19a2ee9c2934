"""A trained network in use: snapshots in; covariance, positions, powers and their deviations out.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, Q factor columns, K sources (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ris_fast import exit_codes
from ris_fast.config.schema import Task, section_of
from ris_fast.data.measurements import Measured
from ris_fast.inference.given import given_count, given_measurements
from ris_fast.inference.located import Located
from ris_fast.inference.locating import choose_count, choose_method, locate_sources, with_snr
from ris_fast.inference.opened_run import open_run
from ris_fast.models.features import SceneFeatures
from ris_fast.models.own import OwnNetwork
from ris_fast.models.prediction import Prediction
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import to_pairs
from ris_fast.physics.scenes import simulate
from ris_fast.training.compiled_model import choose_device

CHUNK = 512  # scenes at a time


class PredictionError(ValueError):
    """A network whose answer is of no use; the message says to which scene. Exit code 3."""

    exit_code = exit_codes.DATA


class Predictor:
    """A network that answers with factors, and the search for sources behind it.

    Args: model: any module that is called with (snapshots, channel, codes, snr_db), real pairs in float32, and returns
            a `Prediction` or a factor, (B, N, Q, 2) or complex (B, N, Q); it is put into evaluation mode.
        task: array and ranges of the scenes.
        products: whether it can be shown H c_l where the channel is not known.
    `atoms`: whether a likelihood starts from the atoms of a pursuit, as of a network that is fed by one, or from the
    peaks of the network's factor.
    """

    def __init__(self, model: nn.Module, task: Task, *, products: bool = False) -> None:
        self.task, self.products = section_of("Predictor", "task", task, Task), products
        if not isinstance(model, nn.Module):
            raise TypeError(f"Predictor: model is a {type(model).__name__}, expected a torch module.")
        self.model, self.atoms = model.eval(), any(isinstance(each, SceneFeatures) for each in model.modules())

    @property
    def device(self) -> torch.device:
        """Where the network is; the CPU for one without tensors."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    @torch.no_grad()
    def says_count(self) -> bool:
        """Whether the network says how many sources there are: it is asked of one simulated scene."""
        scene = simulate(self.task.changed(codes_file="", channel=""), 1, SceneGenerator(0, "test"))
        given = Measured(scene.snapshots, scene.channel, scene.effective_channel, scene.codes, scene.snr_db)
        return self._answer(given.to(self.device), 0).count_logits is not None

    def predict(
        self,
        snapshots: ArrayLike | Tensor,
        channel: ArrayLike | Tensor,
        codes: ArrayLike | Tensor,
        snr_db: ArrayLike | Tensor | float | None = None,
        *,
        count: int | str | ArrayLike | Tensor | None = None,
        method: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Located:
        """Covariance, sources and standard deviations of scenes, in chunks.

        Args: snapshots (B, L, M), channel (B, M, N), codes (L, N) or (B, L, N): tensors or numpy arrays, complex or
                real pairs (..., 2), of any precision; snr_db: (B,) or one number, None and NaN where it is not known,
                and estimated then.
            count: sources a scene, a number or (B,); 'mdl', 'aic' or 'evidence' by likelihood, 'network' as the network
                says; by default MDL with a likelihood, else as many as the factor has.
            method: 'likelihood' (default): maximum likelihood on the measurement, from the atoms of the network's own
                pursuit or, where it has none, the peaks of its factor's spectrum, and ranges as medians of their
                posterior in the task's limits; 'music', 'mvdr': these peaks; 'pursuit': the atoms of a matching
                pursuit.
            progress: called with (scenes done, scenes in all).
        Returns: `Located`, on the network's device.
        Raises: TypeError or ValueError that names the array, what it is and what is expected; ConfigError for a method
            or a count that there is not; PredictionError where the network's answer is not finite.
        """
        given = given_measurements(self.task, snapshots, channel, codes, snr_db, products=self.products)
        total, parts = len(given.snapshots), []
        count = given_count(count, total, self.task.max_sources)
        for start, chunk in _chunks(given):
            rows = slice(start, start + CHUNK)
            part = count[rows].to(self.device) if isinstance(count, Tensor) else count
            parts.append(self.predict_measured(chunk, start, count=part, method=method))
            if progress is not None:
                progress(min(start + CHUNK, total), total)
        return Located.concatenate(parts)

    @torch.no_grad()
    def predict_measured(
        self, measured: Measured, start: int = 0, *, count: int | str | Tensor | None = None, method: str | None = None
    ) -> Located:
        """The same of one chunk of scenes that are known to fit the task; `start` is the number of the first one."""
        measured = with_snr(self.task, measured.to(self.device))
        method = choose_method(method, measured.channel is not None)
        count = choose_count(count, method, self.task)
        prediction = self._answer(measured, start)
        if isinstance(count, str) and count == "network":
            count = _count_of(prediction)
        return locate_sources(self.task, prediction.factor, measured, method=method, count=count, atoms=self.atoms)

    def _answer(self, measured: Measured, start: int) -> Prediction:
        """The network's answer, its factor as real pairs. Raises: TypeError, PredictionError."""
        channel = measured.effective_channel if measured.channel is None else measured.channel
        answer = self.model(measured.snapshots, channel, measured.codes, measured.snr_db)
        prediction = answer if isinstance(answer, Prediction) else Prediction(answer)
        if not isinstance(prediction.factor, Tensor):
            kind = type(prediction.factor).__name__
            raise TypeError(
                f"Predictor: the network returned a {kind}, expected a Prediction or a factor (B, N, Q, 2)."
            )
        factor = to_pairs(prediction.factor).float()
        lost = ~factor.flatten(1).isfinite().all(1)
        if bool(lost.any()):
            raise PredictionError(
                f"predict: the network's answer is not finite for {int(lost.sum())} of {len(lost)} scenes, the first is"
                f" scene {start + int(lost.nonzero()[0])}. Use another checkpoint of the run."
            )
        return prediction._replace(factor=factor)


def load(run: str | Path, *, device: str = "auto", model: nn.Module | None = None) -> Predictor:
    """The network of a run, with the better weights of its best checkpoint or of the checkpoint `run` names.

    Args: run: the folder that `ris-fast train` printed, or a checkpoint; device: auto, cpu, cuda or cuda:N; model: the
        network to load them into, of a run whose network was handed to `Trainer` as an object.
    Raises: ConfigError where there is no run or no such device, CheckpointError for a damaged checkpoint.
    """
    opened, on = open_run(run), choose_device(device, "load: device")
    network = opened.network(model).to(on)
    own = isinstance(network, OwnNetwork)  # it is shown what there is
    products = own or opened.config.model.options.get("inputs") in ("effective_channel", "collapsed")
    return Predictor(network, opened.config.task, products=products)


def _chunks(given: Measured) -> Iterator[tuple[int, Measured]]:
    for start in range(0, len(given.snapshots), CHUNK):
        rows = slice(start, start + CHUNK)
        yield start, given.take(rows)


def _count_of(prediction: Prediction) -> Tensor:
    if prediction.count_logits is None:
        raise PredictionError("predict: this network does not say how many sources there are. Leave count away.")
    return prediction.count_logits.argmax(1) + 1
