"""The optimizer step as one object: clear -> micro-batches -> unscale -> measure -> clip -> update -> average ->
schedule.

Nothing else in the project touches gradients or learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ris_fast.config.schema import Config, ConfigError
from ris_fast.config.schema import Optimizer as OptimizerConfig
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.optim.fused_adamw import FusedAdamW
from ris_fast.training.ranks.reduction import GradientReduction
from ris_fast.training.schedule import learning_rate_factor
from ris_fast.training.step_result import StepResult
from ris_fast.training.telemetry.scene_ring import SceneRing
from ris_fast.training.telemetry.step_telemetry import StepTelemetry
from ris_fast.training.telemetry.step_window import ring_size


class Group(list):
    """The micro-batches of one optimizer step on this rank, how many scenes the step has on all ranks together, and the
    number of the first scene that the next rank is shown, (1,), or none, (0,)."""

    def __init__(self, batches: Iterable, scenes: int, neighbour: Tensor | None = None) -> None:
        super().__init__(batches)
        self.scenes, self.neighbour = scenes, neighbour


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Backbone and head groups, each split into weights (decayed) and norms and biases (not decayed).

    Every trainable parameter is in exactly one group; empty groups are left out.
    """
    heads = {id(parameter) for parameter in model.head_parameters()}
    groups = [
        {
            "name": f"{part}{'' if decay else '_no_decay'}",
            "params": [],
            "peak_lr": peak,
            "lr": peak,
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for part, peak in (("backbone", config.backbone_lr), ("head", config.head_lr))
        for decay in (True, False)
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[2 * (id(parameter) in heads) + (parameter.ndim < 2)]["params"].append((name, parameter))
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: Config) -> FusedAdamW:
    settings = config.optimizer
    return FusedAdamW(
        parameter_groups(model, settings),
        lr=settings.backbone_lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or None,
        ema_decay=settings.ema_decay or None,
        ema_warmup=True,
        clear_grads=True,
        records=ring_size(config.report.every_steps),
        loss_scale="dynamic" if config.training.precision == "fp16" else None,
        backend=config.training.backend,
    )


LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Low precision for the network; the loss stays outside of it."""
    if precision == "fp32":
        return nullcontext()
    if precision not in LOW:
        raise ConfigError(
            f"training.precision is '{precision}' where the network is called; a Trainer chooses it when it is made."
            " Pass the configuration that it has, trainer.config."
        )
    return torch.autocast(device.type, LOW[precision])


def network_inputs(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a network is shown. Scenes without a channel are shown with H c_l in its place."""
    return (
        scenes.snapshots,
        scenes.effective_channel if scenes.channel is None else scenes.channel,
        scenes.codes,
        scenes.snr_db,
    )


class Step:
    """Calls the network, the loss and the optimizer in the one right order.

    Args:
        network: (snapshots, channel, codes, snr_db) -> Prediction, compiled or not, sharing `optimizer`'s parameters.
        model: the module that holds them.

    `reduction`: sums the gradients over ranks, within `Trainer.fit`; None: the step is this process's alone.
    """

    def __init__(
        self,
        network: Callable[..., Prediction],
        loss: CovarianceLoss,
        optimizer: FusedAdamW,
        config: Config,
        device: torch.device,
        model: nn.Module,
    ) -> None:
        self.network, self.loss, self.optimizer = network, loss, optimizer
        self.config, self.device = config, device
        ring = SceneRing(
            ring_size(config.report.every_steps), config.training.batch_size * config.training.accumulate, device
        )
        self.telemetry = StepTelemetry(model, optimizer, config.report.every_steps, ring)
        self.rates: list[float | Tensor] = []
        self.reduction: GradientReduction | None = None

    def predict(self, scenes: Scenes) -> Prediction:
        """The network's answer in the run's precision."""
        with autocast(self.device, self.config.training.precision):
            prediction = self.network(*network_inputs(scenes))
        if torch.is_grad_enabled():
            # An alias, of which only the loss's derivative is taken: the network may use its factor for other outputs.
            prediction = prediction._replace(factor=prediction.factor.view_as(prediction.factor))
            self.telemetry.shown(scenes, prediction.factor)
        return prediction

    def __call__(self, group: Sequence[Scenes], planned: int) -> StepResult:
        """One optimizer step over the micro-batches of `group`; `planned` is the length of the schedule in steps."""
        self.telemetry.begin()
        return self.update(group, planned)

    def update(self, group: Sequence[Scenes], planned: int) -> StepResult:
        """The step from clearing to averaging, without a host read: what a CUDA graph holds."""
        total = group.scenes if self.reduction is not None else sum(scenes.batch for scenes in group)
        self.optimizer.zero_grad(set_to_none=False)  # one buffer, zero already after the last step
        self.telemetry.cleared()
        parts = [self._accumulate(scenes, scenes.batch / total) for scenes in group if scenes.batch]
        losses, terms = zip(*(parts or [self._nothing()]))
        if self.reduction is not None:
            gradients = self.reduction.gradients()
            self.telemetry.before_reduction(gradients)
            self.reduction.sum_(gradients)
            self.telemetry.after_reduction(gradients)
        self.telemetry.differentiated()
        self.schedule(planned)
        self.note_rates()
        self.optimizer.step()
        self.telemetry.updated()
        return StepResult(
            total,
            torch.stack(losses).sum(),
            {name: torch.stack([each[name] for each in terms]).sum() for name in terms[0]},
        )

    def _nothing(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What a rank without scenes adds to a ragged last group."""
        zero = torch.zeros((), device=self.device)
        return zero, dict.fromkeys(self.loss.weights, zero)

    def _accumulate(self, scenes: Scenes, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one micro-batch, weighted by its share of the step's scenes."""
        loss, terms = self.loss(self.predict(scenes), scenes)
        self.telemetry.weighted(share)
        self.optimizer.scale(loss * share).backward()
        return loss.detach() * share, {name: value.detach() * share for name, value in terms.items()}

    def schedule(self, planned: int) -> None:
        """Sets every group's learning rate for the next update, counted in applied steps."""
        settings = self.config.optimizer
        factor = learning_rate_factor(self.optimizer.applied_steps(), planned, settings.warmup, settings.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def note_rates(self) -> None:
        """Keeps the rates of the update that comes: afterwards a scheduler of the user's may have set those of the
        next."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.rates = [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def learning_rates(self) -> dict[str, float]:
        """Name of each group -> learning rate of the last update; before the first, as it is."""
        groups = self.optimizer.param_groups
        rates = self.rates if len(self.rates) == len(groups) else [group["lr"] for group in groups]
        return {group["name"]: float(rate) for group, rate in zip(groups, rates)}


def own_schedule(step: Step) -> bool:
    """Whether something of the user's own sets the learning rates in place of `Step.schedule`."""
    return "schedule" in vars(step) or getattr(type(step), "schedule", Step.schedule) is not Step.schedule
