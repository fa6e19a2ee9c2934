"""What a CUDA graph holds must neither read its device nor copy to it: shown on the meta device, where neither is
possible.

Every tensor of the step lives on "meta", a device that is not the CPU and holds no values: an operation that needs a
value raises, and one that also touches a CPU tensor is a copy between devices, which is counted. Kernels of our own are
one operation each here; what they launch is theirs to prove. autocast does not know the device and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ris_fast.config.schema import Loss, Task
from ris_fast.kernels.fused_step import op as fused_step
from ris_fast.kernels.pursuit import op as pursuit_op
from ris_fast.kernels.pursuit import reference as pursuit
from ris_fast.models import build_model
from ris_fast.models.features import PursuitFeatures
from ris_fast.models.pursuit import geometry_of
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate
from ris_fast.training.loss import TERMS, CovarianceLoss
from ris_fast.training.step import Step
from ris_fast.training.trainer import Trainer
from ris_fast.training.validation import measure
from tests.kernels.launch_count import counted
from tests.operation_watch import Watch
from tests.training.capture_helpers import MODELS, config_of


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    yield


class Sums:
    """Stands in for the optimizer, whose two kernels are tested by themselves: collects gradients, updates nothing."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The graph's first operation is the first backward."""

    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def step(self) -> None:
        """No kernel."""

    def applied_steps(self) -> int:
        return 0


def on_meta(model: str, *overrides: str) -> tuple[Step, Task]:
    """A step with every term of the loss, all of its tensors on "meta"."""
    config = config_of(model, *overrides)
    named = (
        {name: 0.1 for name in TERMS}
        if model == "hybrid"
        else {"cov": 1.0, "cov_pred": 0.1, "subspace": 0.1, "contrast": 0.1}
    )
    weights = replace(Loss(), **named, beta=0.3, shrink=0.01)
    network = build_model(config.model.name, config.task, **config.model.options).to("meta")
    loss = CovarianceLoss(weights, config.task).to("meta")
    step = Step(network, loss, Sums(), config, torch.device("meta"), network)
    step.telemetry.enabled = False
    return step, config.task


def scenes_on_meta(task: Task) -> Scenes:
    return simulate(task, torch.empty(8, dtype=torch.int64, device="meta"), SceneGenerator(3, "train", "meta"))


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("task.wavefront=spherical",), ("task.power=equal",)])
@pytest.mark.parametrize("model", MODELS)
def test_step_update_from_scenes_to_backward_never_syncs(
    model: str, overrides: tuple[str, ...], no_autocast: None
) -> None:
    step, task = on_meta(model, *overrides)
    step.update([scenes_on_meta(task)], 10)  # as in a warm-up: the constants of the task go to the device
    with Watch("meta") as seen:
        step.update([scenes_on_meta(task), scenes_on_meta(task)], 10)
    assert seen.names["ris_fast::scenes"] == 2 and seen.names["ris_fast::cov_nmse"] >= 2 and seen.names.total() > 300
    assert not seen.waits and not seen.solvers


@pytest.mark.parametrize("model", MODELS)
def test_validation_measure_never_syncs(model: str, no_autocast: None) -> None:
    step, task = on_meta(model)
    scenes = scenes_on_meta(task)
    with Watch("meta") as seen:
        measure(step.network, step.predict, step.loss, [scenes, scenes])
    assert seen.names["ris_fast::cov_nmse"] == 6 and not seen.waits and not seen.solvers  # blended, plain, score


@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_pursuit_features_as_a_gpu_runs_them_never_sync(wavefront: str, no_autocast: None) -> None:
    task = Task(wavefront=wavefront)
    geometry, wavenumber = geometry_of(task)
    scenes, constants = scenes_on_meta(task), [each.to("meta") for each in geometry]
    with Watch("meta") as seen:
        pursuit.pursuit_features(
            scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db, constants, wavenumber, task.max_sources
        )
    assert seen.names.total() > 500 and not seen.waits and not seen.solvers


@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_pursuit_features_in_triton_never_sync(
    wavefront: str, monkeypatch: pytest.MonkeyPatch, no_autocast: None
) -> None:
    pytest.importorskip("triton", reason="the kernels are triton's")
    task = Task(wavefront=wavefront)
    model, scenes = PursuitFeatures(task, task.max_sources).to("meta"), scenes_on_meta(task)
    inputs = (scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db, list(model.geometry()))
    with Watch("meta") as seen, counted(monkeypatch) as launches:
        pursuit_op._triton(*inputs, model.wavenumber, model.atoms)
    assert len(launches) > 20 and not seen.waits and not seen.solvers


@pytest.mark.parametrize("looked_at", [False, True])
def test_step_with_optimizer_and_telemetry_never_syncs(looked_at: bool) -> None:
    """On the CPU, as it is: the optimizer is two operations, and readings stay where they are until a report."""
    trainer = Trainer(config_of("backprojection", "training.accumulate=2"))
    for _ in range(3):
        trainer.step(next(trainer._groups()), 10)
    trainer.step.telemetry.enabled = looked_at
    group = next(trainer._groups())
    with Watch("cpu") as seen:
        trainer.step(group, 10)
        trainer.step.telemetry.sample()
        trainer.optimizer.counter_states()
    assert not seen.waits and not seen.solvers
    fused = {name: count for name, count in seen.names.items() if "fused_step" in name}
    assert fused == {f"ris_fast::fused_step_{phase}": 1 for phase in ("measure", "apply")}
    assert trainer.optimizer.backend == "native" or not fused_step.loader.available()


def test_operation_watch_sees_what_it_forbids() -> None:
    x = torch.ones(4)
    with Watch("cpu") as seen:
        float(x[0]), x[x > 0], torch.linalg.inv(torch.eye(2)), x.to("meta")
    assert {"_local_scalar_dense", "index.Tensor", "_to_copy"} <= set(seen.waits) and "linalg_inv_ex" in seen.solvers
