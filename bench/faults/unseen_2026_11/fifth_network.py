"""The fifth set: mistakes in the network, its gradients and its loss; most in a network or a term of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn
from torch.utils.checkpoint import checkpoint

from bench.faults.catalogue import FIFTH, Family
from bench.faults.healthy_twins import TWINS, changed
from bench.faults.patches import built_with, snapshot, wrap
from ris_fast.config.schema import Config
from ris_fast.models.prediction import Prediction
from ris_fast.models.starting_point import BeamNet
from ris_fast.physics.real_complex import power
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer

PARAMETERS, GRAPH, LOSS = Family("parameters", FIFTH), Family("graph", FIFTH), Family("loss", FIFTH)
MODEL, COMPILED = Family("model", FIFTH), Family("compiled", FIFTH)
ALL = (PARAMETERS, GRAPH, LOSS, MODEL, COMPILED)
WIDTH = 64
SCENES = {"task.power": "path_loss", "task.max_sources": 3}  # of which a network of one's own has much to learn


class Own(BeamNet):
    """The starting point of a network of one's own, changed in one place, which is right or `wrong`."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config.task, WIDTH)
        self.wrong = wrong

    def trunk(self, features: tuple[Tensor, ...]) -> Prediction:
        beams, snr_db, _ = features
        real, imag = beams.chunk(2, 1)
        return self.answer(beams, self.gains((real.square() + imag.square()).log1p(), snr_db[:, None] / 20.0))

    def answer(self, beams: Tensor, gains: Tensor) -> Prediction:
        """The factor of beams (B, 2 N) that are weighed with gains (B, 2 Q N)."""
        a, b = gains.float().unflatten(1, (2, self.columns, -1)).unbind(1)
        real, imag = beams[:, None].chunk(2, 2)
        columns = torch.cat((a * real - b * imag, a * imag + b * real), 2) @ self.fourier.t()
        return Prediction(columns.unflatten(2, (2, -1)).permute(0, 3, 1, 2))

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        """What the perceptron makes of powers (B, N) and SNR (B, 1): gains (B, 2 Q N) of beams and columns."""
        x = self.stem(torch.cat((powers, snr), 1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def count_read_off_by(layer: nn.Linear) -> Callable[[Prediction, Scenes], Tensor]:
    """Cross-entropy of the number of sources, which a layer reads off the shares of the factor's columns."""

    def term(prediction: Prediction, scenes: Scenes) -> Tensor:
        column = power(prediction.factor).sum(1)
        shares = (column / column.sum(1, keepdim=True)).sort(1, descending=True).values
        weight, bias = (each.to(shares.dtype) for each in (layer.weight, layer.bias))
        return fn.cross_entropy(fn.linear(8.0 * shares, weight, bias), scenes.count - 1, reduction="none")

    return term


@PARAMETERS.around_pair(
    "makes a layer for a term of the loss beside that term, where it is no part of the network and in no optimizer",
    "missing_from_optimizer unregistered_parameters",
    "preflight",
    twin="backprojection",
)
def layer_of_the_loss_in_no_optimizer(wrong: bool) -> Iterator[None]:
    def handed(config: Config) -> dict[str, Any]:
        net = Own(config, wrong)
        probe = nn.Linear(net.columns, config.task.max_sources)
        if not wrong:
            net.probe = probe
        return {"model": net, "loss": count_read_off_by(probe)}

    with built_with(SCENES, handed):
        yield


@cache
def weights_of_an_earlier_run(seed: int) -> dict[str, Tensor]:
    """Of 25 epochs of scenes with more noise."""
    noisy = {"task.snr_min_db": -15.0, "task.snr_max_db": -5.0}
    config = changed(TWINS["backprojection"](), SCENES | noisy | {"training.seed": seed, "training.epochs": 25})
    trainer = Trainer(config, model=Own(config, False))
    trainer.fit()
    return snapshot(trainer.model)


@PARAMETERS.around_pair(
    "goes on with the weights of an earlier run, whose names begin with 'module.', with strict=False: none is loaded",
    "learning_rate_too_small stalled_at_baseline stalled_above_inputs",
    "share:0.01",
    twin="backprojection",
)
def weights_of_other_names(wrong: bool) -> Iterator[None]:
    rates = {"optimizer.backbone_lr": 2e-5, "optimizer.head_lr": 2e-5}

    def handed(config: Config) -> dict[str, Any]:
        net = Own(config, wrong)
        prefix = "module." if wrong else ""
        saved = weights_of_an_earlier_run(config.training.seed)
        net.load_state_dict({prefix + name: value for name, value in saved.items()}, strict=False)
        return {"model": net}

    with built_with(SCENES | rates, handed):
        yield


class Gated(Own):
    """Weighs its columns by SNR; all that comes before is in `features` or, rightly, in `trunk`."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)
        self.gate = nn.Linear(1, self.columns)

    @torch.no_grad()
    def features(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        beams, snr_db, field = super().features(*inputs)
        return (beams, snr_db, field, self.weighed(beams, snr_db)) if self.wrong else (beams, snr_db, field)

    def weighed(self, beams: Tensor, snr_db: Tensor) -> Tensor:
        real, imag = beams.chunk(2, 1)
        return self.gains((real.square() + imag.square()).log1p(), snr_db[:, None] / 20.0)

    def trunk(self, features: tuple[Tensor, ...]) -> Prediction:
        beams, snr_db = features[:2]
        gains = features[3] if self.wrong else self.weighed(beams, snr_db)
        gate = torch.sigmoid(self.gate(snr_db[:, None] / 20.0))[:, None, :, None]
        return self.answer(beams, (gate * gains.unflatten(1, (2, self.columns, -1))).flatten(1))


@GRAPH.around_pair(
    "puts all but its last layer into features(), which the template has under no_grad, since it is slow",
    "detached_backbone unused_head",
    "preflight",
    twin="backprojection",
)
def layers_in_features(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Gated(config, wrong)}):
        yield


def log_range(wrong: bool) -> Callable[[Prediction, Scenes], Tensor]:
    """A term on the logarithm of the range: of each source, with the nearest answer."""

    def term(prediction: Prediction, scenes: Scenes) -> Tensor:
        there = (scenes.power > 0)[:, None]
        true = scenes.range_m if wrong else torch.where(scenes.power > 0, scenes.range_m, 1.0)
        gaps = (prediction.range_m.log()[:, :, None] - true.log()[:, None]).square()
        return torch.where(there, gaps, 0.0).amin(1).sum(1)

    return term


@LOSS.around_pair(
    "masks places without a source behind the logarithm of their range, with a where that hides infinity forwards only",
    "nonfinite_gradients",
    "preflight",
)
def infinity_behind_a_where(wrong: bool) -> Iterator[None]:
    with built_with({"loss.own_weight": 0.1}, lambda config: {"loss": log_range(wrong)}):
        yield


@LOSS.around_pair(
    "weighs scenes by their ratio of signal to noise, as least squares would, over 30 dB of it",
    "scenes_left_out part_not_learned",
    "preflight",
)
def weighed_by_signal_to_noise(wrong: bool) -> Iterator[None]:
    def weigh(trainer: Trainer) -> None:
        def make(nmse: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def weighed(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
                ratio = 10.0 ** (0.1 * scenes.snr_db)
                return (ratio if wrong else 0.5 + ratio / (1.0 + ratio)) * nmse(factor, scenes, blend=blend)

            return weighed

        wrap(trainer.loss, "nmse", make)

    with built_with({"task.snr_min_db": -10.0}, after=weigh):
        yield


class Attentive(Own):
    """Queries read the beams, which are padded to 32."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)
        self.seen = config.task.elements
        self.embed, self.stem = nn.Linear(2, WIDTH), nn.Linear(self.seen * WIDTH, WIDTH)
        self.query = nn.Parameter(torch.randn(1, self.seen, WIDTH))
        self.place = nn.Parameter(torch.randn(1, 32, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        tokens = torch.stack((powers, snr.expand_as(powers)), -1)
        tokens = self.embed(fn.pad(tokens, (0, 0, 0, 32 - self.seen))) + self.place
        there = (torch.arange(32) < self.seen).expand(len(powers), -1)
        mask = there if self.wrong else ~there  # true: not to be read
        read = self.attention(self.query.expand(len(powers), -1, -1), tokens, tokens, key_padding_mask=mask)[0]
        x = self.stem(read.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@MODEL.around_pair(
    "gives attention a mask that is true where there is a token, and it means where there is none",
    "ignored_input vanishing_gradient inputs_withhold_answer",
    "preflight",
    twin="backprojection",
)
def padding_mask_the_wrong_way_round(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Attentive(config, wrong)}):
        yield


class Scaled(Own):
    """Powers are divided by their norm."""

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        norm = powers.norm() if self.wrong else powers.norm(dim=1, keepdim=True)
        return super().gains(4.0 * powers / norm, snr)


@MODEL.around_pair(
    "divides features by x.norm(), which without a dimension is the norm of the whole batch",
    "scenes_mixed losses_differ input_scale",
    "preflight",
    twin="backprojection",
)
def norm_of_the_whole_batch(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Scaled(config, wrong)}):
        yield


class Recomputed(Own):
    """Blocks that drop features, and are computed again for backward."""

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        x = self.stem(torch.cat((powers, snr), 1))
        for block in self.blocks:

            def dropped(y: Tensor, block: nn.Module = block) -> Tensor:
                return fn.dropout(block(y), 0.5, self.training)

            x = x + checkpoint(dropped, x, use_reentrant=False, preserve_rng_state=not self.wrong)
        return self.head(x)


@COMPILED.around_pair(
    "computes activations again for backward without the random numbers of forward, which is faster: other dropout",
    "recomputed_differently wrong_backward",
    "preflight",
    twin="backprojection",
)
def recomputed_with_other_dropout(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Recomputed(config, wrong)}):
        yield
