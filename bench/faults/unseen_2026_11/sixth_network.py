"""The sixth set: mistakes in the network, its gradients and its loss; most in a network or a term of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as fn

from bench.faults.catalogue import SIXTH, Family
from bench.faults.patches import built_with, layers, wrap
from bench.faults.unseen_2026_11.fifth_network import SCENES, WIDTH, Own
from ris_fast.config.schema import Config
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.step import network_inputs
from ris_fast.training.trainer import Trainer

PARAMETERS, GRAPH, LOSS = Family("parameters", SIXTH), Family("graph", SIXTH), Family("loss", SIXTH)
MODEL, COMPILED = Family("model", SIXTH), Family("compiled", SIXTH)
ALL = (PARAMETERS, GRAPH, LOSS, MODEL, COMPILED)


class Columns(Own):
    """A last layer for each column of the factor."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)
        numbers = 2 * config.task.elements
        if wrong:
            heads = [nn.Linear(WIDTH, numbers)] * self.columns
        else:
            heads = [nn.Linear(WIDTH, numbers) for _ in range(self.columns)]
        self.head = nn.ModuleList(heads)

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        x = self.stem(torch.cat((powers, snr), 1))
        for block in self.blocks:
            x = x + block(x)
        return torch.stack([layer(x).unflatten(1, (2, -1)) for layer in self.head], 2).flatten(1)


@PARAMETERS.around_pair(
    "makes the layers of the columns as [layer] * columns, which is one layer under as many names",
    "tied_parameters output_rank_too_low",
    "preflight",
    twin="backprojection",
)
def one_layer_times_the_columns(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Columns(config, wrong)}):
        yield


@GRAPH.pair(
    "adds noise to features as a draw from Normal(features, 0.1) with sample(), where only rsample() has a gradient",
    "detached_backbone non_differentiable unused_head",
    "preflight",
)
def sampled_without_a_gradient(trainer: Trainer, wrong: bool) -> None:
    def drawn(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not layer.training:
            return output
        normal = Normal(output, 0.1)
        return normal.sample() if wrong else normal.rsample()

    trainer.model.fuse.register_forward_hook(drawn)


class Located(Own):
    """Says azimuth and elevation too, with a layer for each."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)
        self.azimuth = nn.Linear(WIDTH, config.task.max_sources)
        self.elevation = nn.Linear(WIDTH, config.task.max_sources)

    def trunk(self, features: tuple[Tensor, ...]) -> Prediction:
        beams, snr_db, _ = features
        real, imag = beams.chunk(2, 1)
        x = self.stem(torch.cat(((real.square() + imag.square()).log1p(), snr_db[:, None] / 20.0), 1))
        for block in self.blocks:
            x = x + block(x)
        return self.answer(beams, self.head(x))._replace(azimuth=self.azimuth(x), elevation=self.elevation(x))


def directions(wrong: bool) -> Callable[[Prediction, Scenes], Tensor]:
    """The squared distance in angle of each source to the nearest answer."""

    def term(prediction: Prediction, scenes: Scenes) -> Tensor:
        second = prediction.azimuth if wrong else prediction.elevation
        azimuth = prediction.azimuth[:, :, None] - scenes.azimuth[:, None]
        elevation = second[:, :, None] - scenes.elevation[:, None]
        nearest = (azimuth.square() + elevation.square()).amin(1)
        return torch.where(scenes.power > 0, nearest, 0.0).sum(1)

    return term


@LOSS.around_pair(
    "copies the line of the azimuth for that of the elevation, and changes the target in it and not the answer",
    "unused_head",
    "preflight",
    twin="backprojection",
)
def line_of_the_elevation_copied(wrong: bool) -> Iterator[None]:
    def handed(config: Config) -> dict[str, Any]:
        return {"model": Located(config, wrong), "loss": directions(wrong)}

    with built_with(SCENES, handed):
        yield


def entropy_of_counts(wrong: bool) -> Callable[[Prediction, Scenes], Tensor]:
    """Cross-entropy of the number of sources, whose classes are 0 for one source, 1 for two and so on."""

    def term(prediction: Prediction, scenes: Scenes) -> Tensor:
        padding = 0 if wrong else -100
        return fn.cross_entropy(prediction.count_logits, scenes.count - 1, ignore_index=padding, reduction="none")

    return term


@LOSS.around_pair(
    "tells an entropy to ignore class 0, as the padding of a text, where class 0 is that of a single source",
    "scenes_left_out part_not_learned",
    "preflight",
)
def first_class_taken_for_padding(wrong: bool) -> Iterator[None]:
    settings = {"loss.count": 0.0, "loss.own_weight": 0.3}
    with built_with(settings, lambda config: {"loss": entropy_of_counts(wrong)}):
        yield


class Viewed(Own):
    """Puts the columns last with view or, rightly, with permute."""

    def answer(self, beams: Tensor, gains: Tensor) -> Prediction:
        factor = super().answer(beams, gains).factor
        if self.wrong:
            return Prediction(factor.permute(0, 2, 3, 1).reshape(factor.shape))
        return Prediction(factor)


@MODEL.around_pair(
    "views (columns, real and imaginary, elements) as (elements, columns, 2) where a permutation is meant",
    "wrong_layout cannot_memorise stalled_above_inputs",
    "preflight",
    twin="backprojection",
)
def factor_viewed_not_permuted(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Viewed(config, wrong)}):
        yield


class Deep(Own):
    """Ten layers: sigmoids one behind the other or, rightly, residual blocks."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Identity(), nn.Linear(WIDTH, WIDTH), nn.Sigmoid())
            if wrong
            else nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
            for _ in range(10)
        )

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        x = self.stem(torch.cat((powers, snr), 1))
        for block in self.blocks:
            x = block(x) if self.wrong else x + block(x)
        return self.head(x)


@MODEL.around_pair(
    "puts ten layers with sigmoids one behind the other, with torch's weights and no way round them",
    "bad_initialisation vanishing_gradient ignored_input",
    "preflight",
    twin="backprojection",
)
def ten_sigmoids_deep(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Deep(config, wrong)}):
        yield


@COMPILED.pair(
    "validates with an engine that cuts off what its calibration did not see, and calibrates it before training only",
    "stale_compiled_graph compiled_differs losses_differ validation_apart",
    "share:0.01",
    onset=8,
)
def engine_calibrated_before_training(trainer: Trainer, wrong: bool) -> None:
    scenes = trainer.source.batch("train", torch.arange(64))
    largest: dict[nn.Module, Tensor] = {}
    parts = layers(trainer.model)

    def calibrate() -> None:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            largest[layer] = output.abs().amax()

        hooks = [layer.register_forward_hook(note) for layer in parts]
        trainer.model(*network_inputs(scenes))
        for hook in hooks:
            hook.remove()

    def cut_off(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.clamp(-largest[layer], largest[layer])

    def make(network: Callable[..., Prediction]) -> Callable[..., Prediction]:
        @torch.no_grad()
        def engine(*inputs: Tensor) -> Prediction:
            if not (wrong and largest):
                calibrate()
            hooks = [layer.register_forward_hook(cut_off) for layer in parts]
            answer = network(*inputs)
            for hook in hooks:
                hook.remove()
            return answer

        return lambda *inputs: network(*inputs) if torch.is_grad_enabled() else engine(*inputs)

    wrap(trainer.step, "network", make)
