"""N ranks with B scenes each are one rank with N B: weights, losses, gradient norms, validation, skipped steps."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast.config.load import load_config
from ris_fast.config.schema import Config, ConfigError
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.optim.fused_adamw import FusedAdamW
from ris_fast.training.ranks.group import ALONE, Ranks, join
from ris_fast.training.ranks.reduction import GradientReduction
from ris_fast.training.step import Group, Step
from ris_fast.training.trainer import Trainer
from tests.training.ranks.processes import run_ranks, values
from tests.training.test_trainer import SMALL, Recorder, small

CPU = torch.device("cpu")


def config_of(model: str, *overrides: str, batch: int) -> Config:
    """Steps of 16 scenes, and a last one of 1 of the 49: all ranks but one then have none."""
    kept = [each for each in SMALL if not each.startswith("model.") or model == "hybrid"]
    sizes = ["data.train_scenes=49", "training.epochs=13", "training.accumulate=2", f"training.batch_size={batch}"]
    more = ["data.val_limit=6", "optimizer.max_grad_norm=0.5", "training.max_seconds=0"]
    width = ["model.name=backprojection", "model.options.width=16"] if model == "backprojection" else []
    preset = "original" if model == "hybrid" else "laptop"
    return load_config(preset=preset, overrides=[*kept, *width, *sizes, *more, *overrides])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()]).clone()


def trained(config: Config, ranks: Ranks | None = None, poison: int = -1) -> dict[str, Any]:
    """A whole run. poison: the rank whose fourth step has a gradient that is not a number."""
    recorder = Recorder()
    trainer = Trainer(config, callbacks=[recorder], ranks=ranks)
    before_reduction = trainer.step.telemetry.before_reduction

    def poisoned(gradients: list[Tensor]) -> None:
        before_reduction(gradients)
        if trainer.ranks.rank == poison and trainer.state.step == 3:
            next(trainer.model.parameters()).grad.view(-1)[0] = torch.nan

    trainer.step.telemetry.before_reduction = poisoned
    summary = trainer.fit()
    epoch = recorder.epochs[-1]
    return {
        "weights": flat(trainer.model),
        "losses": [row["train_loss"] for row in recorder.steps],
        "norms": [row["grad_norm"] for row in recorder.steps],
        "skipped": [row["skipped"] for row in recorder.steps],
        "epoch_losses": [row["train_loss"] for row in recorder.epochs],
        "scores": {key: epoch[key] for key in ("val_loss", "val_nmse_raw", "val_nmse_median", "val_nmse_ema")},
        "hashes": epoch["health"]["scores"]["raw"]["prediction_hash"],
        "done": (summary["optimizer_steps"], summary["scenes_seen"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("size, model", [(2, "hybrid"), (4, "backprojection")])
def test_ranks_equal_one_over_50_steps(size: int, model: str) -> None:
    """With accumulation and a ragged last group, to 1e-6 of the norm of the weights; ranks among them bit for bit."""
    one = trained(config_of(model, batch=8), ALONE)
    several = values(size, trained, config_of(model, batch=8 // size))
    found = several[0]
    assert all(other["weights"].equal(found["weights"]) and other["losses"] == found["losses"] for other in several)
    assert found["done"] == one["done"] == (52, 13 * 49)
    assert (found["weights"] - one["weights"]).norm() < 1e-6 * one["weights"].norm()
    assert found["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert found["epoch_losses"] == pytest.approx(one["epoch_losses"], rel=1e-6)
    assert found["norms"] == pytest.approx(one["norms"], rel=1e-5)


class Small(nn.Module):
    """The factor as a linear function of the snapshots, in float64."""

    def __init__(self, snapshots: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.map = nn.Linear(snapshots[0].numel(), factor[0].numel(), dtype=torch.float64)
        self.shape = factor.shape[1:]

    def forward(self, snapshots: Tensor, *_: Tensor) -> Prediction:
        return Prediction(self.map(snapshots.flatten(1)).unflatten(1, self.shape), None, None, None, None)


def wide(scenes: Scenes) -> Scenes:
    named = ((each.name, getattr(scenes, each.name)) for each in fields(scenes))
    return replace(scenes, **{n: v.double() for n, v in named if isinstance(v, Tensor) and v.is_floating_point()})


def stepped_in_float64(ranks: Ranks | None) -> tuple[Tensor, float]:
    """50 steps of two micro-batches, of 7 scenes and of 2, by `Step` itself."""
    ranks = join(CPU) if ranks is None else ranks
    config = small()
    torch.manual_seed(0)
    source = Trainer(config, ranks=ALONE).source
    first = wide(source.batch("train", torch.arange(2)))
    model = Small(first.snapshots, first.factor)
    optimizer = FusedAdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0, ema_decay=0.9, clear_grads=True, records=8)
    optimizer.param_groups[0]["peak_lr"] = 1e-3
    step = Step(model, CovarianceLoss(task=config.task).double(), optimizer, config, CPU, model)
    step.reduction = None if ranks.alone else GradientReduction(ranks, optimizer)
    total = torch.zeros((), dtype=torch.float64)
    for number in range(50):
        numbers = [torch.arange(7) + 9 * number, torch.arange(7, 9) + 9 * number]
        group = [wide(source.batch("train", ranks.share(each))) for each in numbers]
        total += ranks.sum_(step(Group(group, 9), 50).loss)
    return flat(model), float(total)


def test_reduced_steps_equal_one_process_in_float64() -> None:
    weights, total = stepped_in_float64(ALONE)
    for other, sum_ in values(3, stepped_in_float64, None):
        assert (other - weights).norm() < 1e-13 * weights.norm()
        assert sum_ == pytest.approx(total, rel=1e-13)


def test_a_nan_on_one_rank_skips_the_step_on_all() -> None:
    config = config_of("hybrid", "training.epochs=2", "health.min_applied=0", batch=4)
    found = values(2, trained, config, None, 1)
    assert all(each["skipped"] == [0.0, 0.0, 0.0, 1.0, *4 * [0.0]] for each in found)
    assert found[0]["weights"].equal(found[1]["weights"]) and bool(found[0]["weights"].isfinite().all())


def test_validation_is_shared_out_bit_for_bit() -> None:
    """The same chunks, scored by two ranks, whose weights did not move."""
    config = config_of("hybrid", "training.epochs=1", "optimizer.head_lr=0", "optimizer.backbone_lr=0", batch=4)
    one, several = validated_in_chunks(config), values(2, trained, config)
    assert several[0]["scores"] == several[1]["scores"] == one["scores"]
    assert several[0]["hashes"] == several[1]["hashes"] == one["hashes"]


def validated_in_chunks(config: Config) -> dict[str, Any]:
    """One rank with the chunks of two: three scenes of six each."""
    from unittest import mock

    with mock.patch("ris_fast.training.trainer.CHUNK", 3):
        return trained(config, ALONE)


def test_more_ranks_than_scenes_are_refused() -> None:
    ended = run_ranks(2, trained, config_of("hybrid", "data.train_scenes=1", batch=4))
    assert all("fewer than the 2 ranks" in each.error and ConfigError.__name__ in each.error for each in ended)
