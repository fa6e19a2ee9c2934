"""The held-out third of the faults: written before any rule, and not read while rules are written or tuned."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import islice, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from bench.faults.catalogue import FAMILIES as NAMES
from bench.faults.catalogue import Family
from bench.faults.patches import (
    Backward,
    after_step,
    before_step,
    gradients,
    layers,
    model_with,
    on_answer,
    on_batches,
    on_features,
    on_input,
    on_loss,
    optimizer_with,
    put,
    rebound,
    replaced,
    wrap,
)
from ris_fast.models import hybrid
from ris_fast.physics.real_complex import power
from ris_fast.physics.scenes import Scenes
from ris_fast.training import step
from ris_fast.training.compiled_model import Network
from ris_fast.training.step import build_optimizer
from ris_fast.training.trainer import Trainer

FAMILIES = tuple(Family(name) for name in NAMES)
PARAMETERS, GRAPH, LOSS, LOOP, PRECISION, AVERAGING, MODE, DATA, MODEL, COMPILED = FAMILIES

# ---- parameters -------------------------------------------------------------------------------------------------


@PARAMETERS.patch("left one layer frozen after an experiment", "frozen_parameters", "preflight")
def one_layer_frozen(trainer: Trainer) -> None:
    trainer.model.y_widen.requires_grad_(False)


@PARAMETERS.around(
    "sorts parameters into groups by substrings of their names; one layer matches none",
    "missing_from_optimizer",
    "preflight",
)
def group_filter_misses_a_layer() -> Iterator[None]:
    groups = step.parameter_groups

    def filtered(*args):
        found = groups(*args)
        for group in found:
            group["params"] = [(name, value) for name, value in group["params"] if not name.startswith("channel_path")]
        return found

    with replaced(step, "parameter_groups", filtered):
        yield


@PARAMETERS.around("assigned one factor head to both names", "tied_parameters", "preflight")
def factor_heads_tied() -> Iterator[None]:
    with model_with(lambda model: setattr(model, "range_factor", model.angle_factor)):
        yield


@PARAMETERS.patch(
    "copied the network after the optimizer was built and trains the copy",
    "stale_optimizer_parameters missing_from_optimizer",
    "preflight",
    twin="backprojection",
)
def network_copied(trainer: Trainer) -> None:
    put(trainer, "model", deepcopy(trainer.model))
    rebound(trainer)


@PARAMETERS.around(
    "made a layer's weight a buffer, so that it follows the network and is never trained",
    "frozen_parameters missing_from_optimizer",
    "preflight",
    twin="backprojection",
)
def weight_kept_as_buffer() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        layer = model.blocks[0].inner
        weight = layer._parameters.pop("weight")
        layer.register_buffer("weight", weight.detach().clone())

    with model_with(change):
        yield


# ---- graph ------------------------------------------------------------------------------------------------------


@GRAPH.patch("runs the encoder under no_grad, as in a recipe for a pretrained one", "detached_backbone", "preflight")
def no_grad_around_encoder(trainer: Trainer) -> None:
    def make(forward):
        def quiet(x: Tensor) -> Tensor:
            with torch.no_grad():
                return forward(x)

        return quiet

    wrap(trainer.model.blocks, "forward", make)


@GRAPH.patch(
    "computes the covariance term in numpy and adds a zero that carries a graph",
    "loss_rebuilt detached_loss",
    "preflight",
)
def covariance_term_in_numpy(trainer: Trainer) -> None:
    def make(nmse):
        def detour(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
            value = torch.from_numpy(nmse(factor.detach(), scenes, blend=blend).numpy().copy())
            return value + 0.0 * factor.sum((1, 2, 3))

        return detour

    wrap(trainer.loss, "nmse", make)


@GRAPH.patch(
    "left a debugging hook on a weight that multiplies its gradient by zero",
    "zeroed_gradients",
    "preflight",
    twin="backprojection",
)
def hook_zeroes_gradient(trainer: Trainer) -> None:
    trainer.model.stem.weight.register_hook(lambda grad: 0.0 * grad)


@GRAPH.patch("quantises the factor with round(), whose derivative is zero", "non_differentiable", "preflight")
def factor_rounded(trainer: Trainer) -> None:
    on_answer(trainer, lambda factor: torch.round(64.0 * factor) / 64.0)


# ---- loss -------------------------------------------------------------------------------------------------------


@LOSS.patch(
    "divides by the accumulation count only where a debug print stands: in the first micro-batch",
    "accumulation_not_divided",
    "steps:5",
    twin="accumulate",
)
def divided_only_first(trainer: Trainer) -> None:
    calls = iter(range(10**9))

    def accumulate(scenes: Scenes, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss, raw = trainer.loss(trainer.step.predict(scenes), scenes)
        trainer.optimizer.scale(loss * (share if next(calls) % 4 == 0 else 1.0)).backward()
        return loss.detach() * share, {name: value.detach() * share for name, value in raw.items()}

    trainer.step._accumulate = accumulate


def gram_energy(a: Tensor, b: Tensor) -> Tensor:
    """|A^H B|_F^2 of real pairs: (B,)."""
    first, second = torch.view_as_complex(a.contiguous()), torch.view_as_complex(b.contiguous())
    return (first.mH @ second).abs().square().sum((1, 2))


@LOSS.patch("normalises the target to trace 2 N and the prediction to trace N", "target_scale_differs", "preflight")
def target_of_twice_the_trace(trainer: Trainer) -> None:
    def nmse(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
        ours = factor * power(factor).sum((1, 2)).clamp_min(1e-12).rsqrt()[:, None, None, None]
        truth = scenes.factor * (2.0 / power(scenes.factor).sum((1, 2))).sqrt()[:, None, None, None]
        energy = gram_energy(truth, truth)
        return (gram_energy(ours, ours) - 2.0 * gram_energy(ours, truth) + energy) / energy

    trainer.loss.nmse = nmse


@LOSS.patch("converts labels to radians that already are radians", "wrong_units", "preflight")
def degrees_converted_twice(trainer: Trainer) -> None:
    on_loss(
        trainer,
        lambda prediction, scenes: (
            prediction,
            replace(scenes, azimuth=torch.deg2rad(scenes.azimuth), elevation=torch.deg2rad(scenes.elevation)),
        ),
    )


@LOSS.patch("clamps the loss against outliers, below the value that training starts from", "clamped_loss", "preflight")
def loss_clamped(trainer: Trainer) -> None:
    wrap(
        trainer.loss,
        "forward",
        lambda forward: lambda *args: (lambda total, raw: (total.clamp(max=0.25), raw))(*forward(*args)),
    )


@LOSS.patch(
    "negated the loss and told the optimizer to maximise, then took the minus sign away",
    "loss_sign",
    "share:0.01",
    twin="backprojection",
)
def optimizer_maximises(trainer: Trainer) -> None:
    for group in trainer.optimizer.param_groups:
        group["maximize"] = True


# ---- loop -------------------------------------------------------------------------------------------------------


@LOOP.patch(
    "steps only if backbone and heads both have a gradient, while the heads are masked", "step_never_called", "steps:5"
)
def step_gated_on_both_groups(trainer: Trainer) -> None:
    def make(take):
        def gated(*args):
            masked = {id(parameter) for parameter in trainer.model.head_parameters()}
            heads = [p.grad for p in trainer.model.parameters() if id(p) in masked and p.grad is not None]
            norms = [0.0 * sum(float(grad.norm()) for grad in heads), 1.0]
            return take(*args) if min(norms) > 0.0 else None

        return gated

    wrap(trainer.optimizer, "step", make)


@LOOP.patch("plans the schedule in batches and advances it once an epoch", "schedule_per_epoch", "steps:5")
def schedule_ticks_per_epoch(trainer: Trainer) -> None:
    trainer.optimizer.applied_steps = lambda: trainer.state.epoch


@LOOP.patch("a group built by hand has no peak rate and falls back to zero", "zero_learning_rate", "preflight")
def one_group_without_rate(trainer: Trainer) -> None:
    trainer.optimizer.param_groups[0]["peak_lr"] = 0.0


@LOOP.patch("builds the optimizer inside the epoch loop", "optimizer_state_lost", "share:0.01", onset=8)
def optimizer_rebuilt_each_epoch(trainer: Trainer) -> None:
    def make(epoch):
        def rebuilt() -> None:
            if trainer.state.epoch:
                put(trainer, "optimizer", build_optimizer(trainer.model, trainer.config))
                rebound(trainer)
                trainer._read_counters()
            epoch()

        return rebuilt

    wrap(trainer, "_epoch", make)


LOOP.setting(
    "rate_far_too_small",
    "gave 1e-9 where 1e-3 is meant",
    "learning_rate_too_small",
    "share:0.01",
    {"optimizer.backbone_lr": 1e-9, "optimizer.head_lr": 1e-9},
    twin="backprojection",
)


@LOOP.patch(
    "calls next() on the iterator inside a loop over it, and throws every other batch away",
    "batches_skipped",
    "steps:5",
    twin="backprojection",
)
def every_other_batch_skipped(trainer: Trainer) -> None:
    wrap(trainer, "_groups", lambda groups: lambda: islice(groups(), 0, None, 2))


# ---- precision --------------------------------------------------------------------------------------------------


@PRECISION.patch(
    "the loss scale overflows, and a sanitiser turns infinities into plus and minus one",
    "sanitised_gradients",
    "steps:5",
    twin="half",
    around=lambda: optimizer_with(loss_scale=1e38),
)
def infinity_becomes_one(trainer: Trainer) -> None:
    before_step(trainer, lambda: [grad.nan_to_num_(0.0, 1e38, -1e38) for grad in gradients(trainer)])


@PRECISION.patch("backpropagates a tiny loss in half precision without a loss scale", "gradient_underflow", "preflight")
def gradients_underflow_in_half(trainer: Trainer) -> None:
    on_answer(trainer, lambda factor: Backward.apply(factor, lambda grad: (1e-6 * grad).half().float() * 1e6))


@PRECISION.around(
    "put an epsilon of 1e6 under the root of the input's rms", "epsilon_swallows_signal input_scale", "preflight"
)
def large_epsilon_in_rms() -> Iterator[None]:
    def unit_rms(a: Tensor) -> Tensor:
        return a * (power(a).flatten(1).mean(1) + 1e6).rsqrt().view(-1, *[1] * (a.dim() - 1))

    with replaced(hybrid, "_unit_rms", unit_rms):
        yield


# ---- averaging --------------------------------------------------------------------------------------------------


@AVERAGING.patch("one infinite update entered the average and never leaves it", "ema_nonfinite", "share:0.01", onset=3)
def ema_poisoned(trainer: Trainer) -> None:
    @torch.no_grad()
    def poison() -> None:
        if trainer.state.step == 3:
            average = [value for key, value in trainer.optimizer.extra_state().items() if key.startswith("ema.")]
            average[0].view(-1)[0] = float("nan")

    after_step(trainer, poison)


@AVERAGING.patch(
    "gave the weight of the new value where the decay is meant",
    "ema_equals_raw",
    "preflight",
    around=lambda: optimizer_with(ema_decay=0.001),
)
def average_decays_at_once(trainer: Trainer) -> None:
    """The mistake is the option alone."""


@AVERAGING.patch(
    "reports the average's validation as that of the raw weights",
    "raw_not_validated",
    "share:0.01",
    twin="backprojection",
)
def average_validated_as_raw(trainer: Trainer) -> None:
    wrap(trainer, "_score", lambda score: lambda averaged=False: score(averaged=True))


# ---- mode -------------------------------------------------------------------------------------------------------


@MODE.patch(
    "calls functional dropout without its training flag", "train_mode_in_validation", "preflight", twin="dropout"
)
def dropout_always_on(trainer: Trainer) -> None:
    for block in trainer.model.blocks:
        block._drop = lambda x: fn.dropout(x, 0.1)


@MODE.patch(
    "puts the encoder into eval mode after every train(), as in a recipe for a pretrained one",
    "eval_mode_in_training",
    "steps:5",
    twin="dropout",
)
def encoder_left_in_eval(trainer: Trainer) -> None:
    wrap(trainer.model, "train", lambda train: lambda mode=True: (train(mode), trainer.model.blocks.eval())[0])
    trainer.model.train()


@MODE.around(
    "added a batch norm with a momentum so small that validation uses its initial statistics",
    "batchnorm_statistics scenes_mixed",
    "share:0.01",
)
def running_statistics_never_updated() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        norm = nn.BatchNorm1d(model.fuse.in_features, momentum=1e-9, affine=False)
        model.add_module("norm", norm)
        on_input(model.fuse, lambda x: (norm(10.0 * x + 5.0),))

    with model_with(change):
        yield


# ---- data -------------------------------------------------------------------------------------------------------


@DATA.patch("takes the first batch of a new iterator in every step", "repeated_batch", "steps:5", twin="backprojection")
def iterator_restarted(trainer: Trainer) -> None:
    wrap(trainer, "_groups", lambda groups: lambda: repeat(next(iter(groups())), trainer.epoch_steps))


@DATA.patch("skips the header of the label file and not that of the input file", "shuffled_labels", "preflight")
def labels_off_by_one(trainer: Trainer) -> None:
    on_batches(
        trainer,
        lambda scenes: replace(
            scenes,
            **{
                name: getattr(scenes, name).roll(1, 0)
                for name in ("factor", "azimuth", "elevation", "range_m", "power", "count")
            },
        ),
    )


@DATA.patch("reshapes (snapshots, batch) to (batch, snapshots) where a transpose is meant", "scenes_mixed", "preflight")
def axes_reshaped_not_transposed(trainer: Trainer) -> None:
    on_features(trainer, lambda features: lambda y, *rest: features(y.transpose(0, 1).reshape(y.shape), *rest))


@DATA.around(
    "removed the normalisation of the inputs, whose power spans many decades",
    "input_scale",
    "share:0.01",
    twin="path_loss",
)
def raw_units_at_the_input() -> Iterator[None]:
    with replaced(hybrid, "_unit_rms", lambda a: a):
        yield


@DATA.patch(
    "pairs each scene's snapshots with the next scene's channel",
    "mismatched_channel inputs_withhold_answer",
    "preflight",
    twin="backprojection",
)
def channel_of_the_next_scene(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: replace(scenes, channel=scenes.channel.roll(1, 0)))


@DATA.patch(
    "reads (im, re) where (re, im) was written", "wrong_layout conjugation_error", "preflight", twin="few_codes"
)
def real_and_imaginary_swapped(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: replace(scenes, snapshots=scenes.snapshots.flip(-1)))


# ---- model ------------------------------------------------------------------------------------------------------


@MODEL.around("initialised every weight with the same constant", "symmetric_init", "preflight")
def constant_initialisation() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        for layer in layers(model):
            nn.init.constant_(layer.weight, 0.05)
            nn.init.zeros_(layer.bias)

    with model_with(change):
        yield


@MODEL.patch("feeds the magnitude of the snapshots", "inputs_withhold_answer", "preflight", twin="few_codes")
def phase_thrown_away(trainer: Trainer) -> None:
    def magnitude(y: Tensor) -> Tensor:
        size = power(y).sqrt()
        return torch.stack((size, torch.zeros_like(size)), dim=-1)

    on_features(trainer, lambda features: lambda y, *rest: features(magnitude(y), *rest))


@MODEL.patch("expands one column over the whole factor", "output_rank_too_low", "preflight", twin="backprojection")
def one_column_repeated(trainer: Trainer) -> None:
    on_answer(trainer, lambda factor: factor[:, :, :1].expand_as(factor))


@MODEL.patch("clamps the factor to a range a thousand times too small", "saturated_output", "preflight")
def factor_clamped(trainer: Trainer) -> None:
    on_answer(trainer, lambda factor: factor.clamp(-1e-4, 1e-4))


# ---- compiled and ranks -----------------------------------------------------------------------------------------


@COMPILED.patch(
    "compiled the network, then built it anew and gave only the new one to the optimizer",
    "stale_compiled_graph",
    "preflight",
)
def compiled_before_weights_replaced(trainer: Trainer) -> None:
    network = trainer.step.network
    put(trainer, "model", deepcopy(trainer.model))
    put(trainer, "optimizer", build_optimizer(trainer.model, trainer.config))
    rebound(trainer)
    trainer.step.network = network


@COMPILED.patch(
    "forgot to add up the gradients of the ranks: only the first one's is applied",
    "rank_gradient_missing last_micro_batch_only",
    "steps:5",
    twin="accumulate",
)
def ranks_not_reduced(trainer: Trainer) -> None:
    calls = iter(range(10**9))

    def make(scale):
        return lambda loss: scale(loss) if next(calls) % 4 == 0 else 0.0 * scale(loss)

    wrap(trainer.optimizer, "scale", make)


@COMPILED.patch(
    "traced the network in eval mode, so that the graph has no dropout",
    "stale_compiled_graph eval_mode_in_training compiled_differs",
    "steps:5",
    twin="dropout",
)
def compiled_in_eval_mode(trainer: Trainer) -> None:
    shared = {id(parameter): parameter for parameter in trainer.model.parameters()}
    trainer.step.network = Network(deepcopy(trainer.model, shared).eval(), compile=False)
