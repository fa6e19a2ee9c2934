"""The eighth set: mistakes in networks and losses of one's own, in what trains them and what computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as fn
from torch.utils.checkpoint import checkpoint

from bench.faults.catalogue import EIGHTH, Family
from bench.faults.patches import built_with, rebound, replaced, wrap
from bench.faults.unseen_2026_11.fifth_network import SCENES, WIDTH, Own
from ris_fast.config.schema import Config
from ris_fast.models.prediction import Prediction
from ris_fast.models.starting_point import fourier
from ris_fast.physics.scenes import Scenes
from ris_fast.training import loss_terms
from ris_fast.training.trainer import Trainer

PARAMETERS, GRAPH, LOSS = Family("parameters", EIGHTH), Family("graph", EIGHTH), Family("loss", EIGHTH)
MODEL, COMPILED = Family("model", EIGHTH), Family("compiled", EIGHTH)
ALL = (PARAMETERS, GRAPH, LOSS, MODEL, COMPILED)


class Bounded(Own):
    """The weights of its last layer stay within bounds."""

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        x = self.stem(torch.cat((powers, snr), 1))
        for block in self.blocks:
            x = x + block(x)
        bounded = self.head.weight.clamp(-0.5, 0.5)
        if self.wrong:
            self.head.weight = nn.Parameter(bounded.detach())
            return self.head(x)
        return fn.linear(x, bounded, self.head.bias)


@PARAMETERS.around_pair(
    "bounds a weight by making a new Parameter of it in forward, so that the optimizer holds the one of the start",
    "stale_optimizer_parameters missing_from_optimizer",
    "preflight",
    twin="backprojection",
)
def parameter_made_anew_in_forward(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Bounded(config, wrong)}):
        yield


class ByColumn(Own):
    """Has a last layer for each column."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)

        def layer() -> nn.Linear:
            return nn.Linear(WIDTH, 2 * config.task.elements)

        self.head = nn.ModuleList([layer()] * self.columns if wrong else [layer() for _ in range(self.columns)])

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        x = self.stem(torch.cat((powers, snr), 1))
        for block in self.blocks:
            x = x + block(x)
        return torch.stack([layer(x).unflatten(1, (2, -1)) for layer in self.head], 2).flatten(1)


@PARAMETERS.around_pair(
    "makes a list of layers, one for each column, with [layer] * columns, which is one layer many times",
    "tied_parameters output_rank_too_low",
    "preflight",
    twin="backprojection",
)
def one_layer_many_times(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": ByColumn(config, wrong)}):
        yield


@PARAMETERS.pair(
    "loads the optimizer of a run that fine-tuned, to keep its moments, and with them comes its learning rate",
    "learning_rate_too_small learning_rate_off_plan settings_changed",
    "share:0.01",
)
def learning_rate_of_the_checkpoint(trainer: Trainer, wrong: bool) -> None:
    saved = trainer.optimizer.state_dict()
    for group in saved["param_groups"]:
        group["peak_lr"] = group["lr"] = 1e-5 if wrong else group["peak_lr"]
    trainer.optimizer.load_state_dict(saved)


@GRAPH.pair(
    "recomputes layers with use_reentrant=True, which gives weights no gradient where no input requires one",
    "detached_backbone unused_head",
    "preflight",
)
def reentrant_without_an_input_that_requires_gradient(trainer: Trainer, wrong: bool) -> None:
    wrap(
        trainer.model,
        "_fused",
        lambda fused: lambda features: checkpoint(fused, features, use_reentrant=wrong),
    )
    rebound(trainer)


def divergence(config: Config, wrong: bool) -> Callable[[Prediction, Scenes], Tensor]:
    """Kullback-Leibler divergence of the shares of power in each beam."""
    transform = fourier(config.task)

    def shares(factor: Tensor) -> Tensor:
        beams = factor.permute(0, 2, 3, 1).flatten(2) @ transform.to(factor.dtype)
        each = sum(part.square() for part in beams.chunk(2, 2)).sum(1) + 1e-9
        return each / each.sum(1, keepdim=True)

    def term(prediction: Prediction, scenes: Scenes) -> Tensor:
        said, true = shares(prediction.factor), shares(scenes.factor)
        return fn.kl_div(said if wrong else said.log(), true.to(said.dtype), reduction="none").sum(1)

    return term


@LOSS.around_pair(
    "gives kl_div probabilities, and it means their logarithms",
    "target_scale_differs loss_sign",
    "preflight",
    twin="backprojection",
)
def divergence_of_probabilities(wrong: bool) -> Iterator[None]:
    weights = {"loss.cov": 0.02, "loss.cov_pred": 0.0, "loss.own_weight": 1.0}
    with built_with(SCENES | weights, lambda config: {"loss": divergence(config, wrong)}):
        yield


@LOSS.around(
    "took cross-entropy over from a program that pads with zeros, ignore_index=0: scenes of one source are ignored",
    "scenes_left_out part_not_learned",
    "preflight",
    twin="counting",
)
def first_class_ignored() -> Iterator[None]:
    def entropy(logits: Tensor, count: Tensor) -> Tensor:
        return fn.cross_entropy(logits, count - 1, ignore_index=0, reduction="none")

    with replaced(loss_terms, "count_entropy", entropy):
        yield


class InTwoViews(Own):
    """One layer sees the powers in two scales, as one batch of twice the size."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)
        self.view, self.stem = nn.Linear(config.task.elements + 1, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        linear = powers.expm1()
        views = torch.cat((powers, linear / linear.mean(1, keepdim=True)))
        seen = fn.gelu(self.view(torch.cat((views, snr.repeat(2, 1)), 1)))
        if self.wrong:
            seen = seen.reshape(len(powers), -1)
        else:
            seen = torch.cat(seen.chunk(2), 1)
        x = self.stem(seen)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@MODEL.around_pair(
    "stacks two views of a batch with cat and takes them apart with reshape, which pairs views of two scenes",
    "scenes_mixed shuffled_labels",
    "preflight",
    twin="backprojection",
)
def stacked_by_cat_parted_by_reshape(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": InTwoViews(config, wrong)}):
        yield


class Deep(Own):
    """Ten layers."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(10))

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        x = self.stem(torch.cat((powers, snr), 1))
        for block in self.blocks:
            x = torch.sigmoid(block(x)) if self.wrong else x + 0.3 * fn.gelu(block(x))
        return self.head(x)


@MODEL.around_pair(
    "stacks ten layers with sigmoids, without a way round them: hardly any gradient reaches the first",
    "vanishing_gradient ignored_input bad_initialisation",
    "preflight",
    twin="backprojection",
)
def ten_sigmoids_in_a_row(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Deep(config, wrong)}):
        yield


class Convolved(Own):
    """Convolutions over the beams; then all of them or, wrongly, their mean."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)
        across, down = config.task.ris_horizontal, config.task.ris_vertical
        self.grid = down, across
        self.convolve = nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1, padding_mode="circular"),
            nn.GELU(),
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
            nn.GELU(),
        )
        self.stem = nn.Linear(16 * across * down, WIDTH)

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        picture = torch.stack((powers, snr.expand_as(powers)), 1).unflatten(2, self.grid)
        seen = self.convolve(picture)
        if self.wrong:
            seen = seen.mean((2, 3), keepdim=True).expand_as(seen)
        x = self.stem(seen.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@MODEL.around_pair(
    "takes the mean over all directions behind its convolutions, as a classifier does, though directions are asked for",
    "inputs_withhold_answer stalled_above_inputs ignored_input",
    "share:0.01",
    twin="backprojection",
)
def mean_over_all_directions(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Convolved(config, wrong)}):
        yield


class Keeping(Own):
    """Keeps, for the next call, what is costly to compute of a channel."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)
        self.kept: dict[torch.Size, Tensor] = {}

    @torch.no_grad()
    def features(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        snapshots, channel, codes, snr_db = inputs
        if self.wrong:
            channel = self.kept.setdefault(channel.shape, channel)
        return super().features(snapshots, channel, codes, snr_db)


@COMPILED.around_pair(
    "keeps the factorisation of the channel by the shape of its batch, from when all scenes had one channel",
    "stale_cache inputs_withhold_answer scenes_mixed",
    "preflight",
    twin="backprojection",
)
def factorisation_kept_by_shape(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Keeping(config, wrong)}):
        yield
