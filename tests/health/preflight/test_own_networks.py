"""Frequent mistakes in a network of one's own, each beside the same network without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from bench.faults.patches import before_step, gradients, wrap
from ris_fast.config.schema import Task
from ris_fast.health.preflight import (
    calls,
    gradient,
    inputs,
    inside,
    network,
    parameters,
    scene_gradients,
    schedule,
    unread,
)
from ris_fast.health.preflight.inside import moves_an_axis
from ris_fast.health.preflight.one_step import one_step
from ris_fast.health.preflight.preference import own_term
from ris_fast.health.preflight.several_steps import several_steps
from ris_fast.health.preflight.terms import each_term
from ris_fast.models.prediction import Prediction
from ris_fast.models.starting_point import BeamNet, fourier
from ris_fast.physics.real_complex import conj
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import small
from tests.health.preflight.test_scene_evidence import said

WIDTH = 16
Mix = Callable[["Tokens", Tensor], Tensor]


class Tokens(nn.Module):
    """A token for each beam, (B, N, W), what `mix` makes of them, (B, N, W) or (B, W), and gains of the beams."""

    def __init__(self, task: Task, mix: Mix, start: Callable[[Tokens], Any] = lambda net: None) -> None:
        super().__init__()
        self.beams, self.mix = BeamNet(task, WIDTH, 1), mix
        self.beams.stem, self.beams.blocks = nn.Identity(), nn.ModuleList()
        self.embed, self.place = nn.Linear(1, WIDTH), nn.Parameter(torch.randn(task.elements, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.recurrent, self.linear = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH)
        self.deep = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(10))
        self.stem = nn.LazyLinear(WIDTH)
        self.query = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.register_buffer("shut", torch.zeros(()))
        self.beams.head = nn.Linear(WIDTH, 2 * self.beams.columns * task.elements)
        start(self)
        self.stem(mix(self, torch.zeros(2, task.elements, WIDTH)).flatten(1))

    def features(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.beams.features(*inputs)

    def forward(self, *inputs: Tensor) -> Prediction:
        return self.trunk(self.features(*inputs))

    def trunk(self, features: tuple[Tensor, ...]) -> Prediction:
        real, imag = features[0].chunk(2, 1)
        tokens = self.embed((real.square() + imag.square()).log1p()[..., None]) + self.place
        x = self.stem(self.mix(self, tokens).flatten(1))
        a, b = self.beams.head(x).unflatten(1, (2, self.beams.columns, -1)).unbind(1)
        real, imag = real[:, None], imag[:, None]
        columns = torch.cat((a * real - b * imag, a * imag + b * real), 2) @ self.beams.fourier.t()
        return Prediction(columns.unflatten(2, (2, -1)).permute(0, 3, 1, 2))


def of(mix: Mix, start: Callable[[Tokens], Any] = lambda net: None, **settings: Any) -> Trainer:
    config = small("backprojection", **settings)
    torch.manual_seed(0)
    return Trainer(config, model=Tokens(config.task, mix, start))


def attended(net: Tokens, x: Tensor, **options: Any) -> Tensor:
    return x + net.attention(x, x, x, need_weights=False, **options)[0]


def weighed(net: Tokens, x: Tensor, axis: int, scale: float) -> Tensor:
    x = fn.layer_norm(x, (WIDTH,))
    return x + (scale * x @ net.linear(x).transpose(1, 2)).softmax(axis) @ x


def first_of(net: Tokens, x: Tensor, causal: bool) -> Tensor:
    x = torch.cat((net.place[:1].expand(len(x), 1, WIDTH), x), 1)
    return attended(net, x, attn_mask=torch.ones(2 * [x.shape[1]], dtype=torch.bool).triu(1) if causal else None)[:, 0]


def in_depth(net: Tokens, x: Tensor, around: float) -> Tensor:
    for layer in net.deep:
        x = around * x + torch.sigmoid(layer(x))
    return x


def anew(net: Tokens, x: Tensor, wrong: bool) -> Tensor:
    bounded = net.linear.weight.clamp(-0.1, 0.1)
    if wrong:
        net.linear.weight = nn.Parameter(bounded.detach())
    return fn.linear(x, net.linear.weight if wrong else bounded)


@torch.no_grad()
def held(net: Tokens, limit: float) -> None:
    net.linear.weight.clamp_(-limit, limit)


NETWORKS: dict[str, tuple[Any, Mix, Mix, list[tuple[str, bool]]]] = {
    "the first of a sequence under a causal mask": (
        unread.CHECKS["what the first layers make of scenes is read"],
        lambda net, x: first_of(net, x, True),
        lambda net, x: first_of(net, x, False),
        [("ignored_input", False)],
    ),
    "what a recurrent layer knows after one step": (
        unread.CHECKS["what the first layers make of scenes is read"],
        lambda net, x: net.recurrent(x)[0][:, 0],
        lambda net, x: net.recurrent(x)[0][:, -1],
        [("ignored_input", False)],
    ),
    "a mean over the places without an embedding of them": (
        unread.CHECKS["the network knows which place is which"],
        lambda net, x: attended(net, x - net.place).mean(1),
        lambda net, x: attended(net, x).mean(1),
        [("inputs_withhold_answer", False)],
    ),
    "a reshape for a transpose": (
        inside.axes,
        lambda net, x: x.reshape(len(x), WIDTH, -1)[:, :8],
        lambda net, x: x.transpose(1, 2)[:, :8],
        [],  # 16 beams of width 16: the two look alike
    ),
    "a softmax over the queries": (
        inside.axes,
        lambda net, x: weighed(net, x, 1, 0.25),
        lambda net, x: weighed(net, x, 2, 0.25),
        [("wrong_layout", False)],
    ),
    "an attention without a scale": (
        inside.ends,
        lambda net, x: weighed(net, x, 2, 1e3),
        lambda net, x: weighed(net, x, 2, 0.25),
        [("saturated_output", False)],
    ),
    "ten sigmoids in a row": (
        network.layers,
        lambda net, x: in_depth(net, x, 0.0),
        lambda net, x: in_depth(net, x, 1.0),
        [("vanishing_gradient", False)],
    ),
    "places that drown the scenes": (
        network.layers,
        lambda net, x: net.linear(fn.layer_norm(x + 3e4 * net.place, (WIDTH,))),
        lambda net, x: net.linear(fn.layer_norm(x + net.place, (WIDTH,))),
        [("input_scale", False)],
    ),
    "a parameter made anew in forward": (
        parameters.unregistered,
        lambda net, x: anew(net, x, True),
        lambda net, x: anew(net, x, False),
        [("missing_from_optimizer", True)],
    ),
    "weights that forward bounds": (
        parameters.left_alone,
        lambda net, x: (held(net, 0.1), net.linear(x))[1],
        lambda net, x: (held(net, 9.0), net.linear(x))[1],
        [("weights_changed_outside", False)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_checks_tell_a_mistake_in_a_network_from_the_right_form(name: str) -> None:
    check, wrong, right, expected = NETWORKS[name]
    assert said(check, of(right)) == []
    assert said(check, of(wrong)) == expected


@pytest.mark.parametrize(
    "before, after, moves",
    [
        ((12, 64), (64, 12), True),
        ((12, 64), (8, 12, 8), True),
        ((8, 12, 8), (12, 64), True),
        ((12, 64), (12, 8, 8), False),
        ((12, 8, 8), (12, 64), False),
        ((12, 64), (768,), False),
        ((768,), (64, 12), False),
        ((2, 6, 1), (12,), False),
        ((4, 6), (3, 8), False),
    ],
)
def test_moves_an_axis_tells_reshapes_apart(before: tuple[int, ...], after: tuple[int, ...], moves: bool) -> None:
    assert moves_an_axis(before, after) == moves


def test_layers_name_queries_that_stay_equal() -> None:
    for start, expected in ((nn.init.zeros_, [("symmetric_init", False)]), (nn.init.normal_, [])):
        trainer = of(
            lambda net, x: net.linear((net.query @ x.transpose(1, 2)).softmax(2) @ x).mean(1),
            lambda net, start=start: start(net.query),
        )
        assert said(network.layers, trainer) == expected


def alike(*layers: nn.Linear, spread: float) -> None:
    """Units start with the same weights and with biases of this standard deviation."""
    for layer in layers:
        nn.init.constant_(layer.weight, 1 / WIDTH)
        nn.init.normal_(layer.bias, std=spread)


@pytest.mark.parametrize(
    ("mix", "start", "expected"),
    [
        (lambda net, x: x * net.query[:, :1], lambda net: nn.init.ones_(net.query), []),  # a gain that starts at one
        (lambda net, x: x + net.linear(x), lambda net: alike(net.linear, spread=0.1), []),  # one layer that averages
        (
            lambda net, x: net.deep[0](net.linear(x).relu()),
            lambda net: alike(net.linear, net.deep[0], spread=0.0),
            [True],
        ),
        (
            lambda net, x: net.deep[0](net.linear(x).relu()),
            lambda net: alike(net.linear, net.deep[0], spread=0.01),
            [False],
        ),
    ],
)
def test_layers_name_units_that_stay_alike_and_no_gain_of_ones(mix: Mix, start: Any, expected: list[bool]) -> None:
    assert said(network.layers, of(mix, start)) == [("symmetric_init", certain) for certain in expected]


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return -slope


def routed(net: Tokens, x: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Each scene to one of four experts."""
    x = x.mean(1)
    logits = net.linear(x)[:, :4]
    gates = choose(logits) if net.training else fn.one_hot(logits.argmax(1), 4).float()
    return (gates[..., None] * torch.stack([expert(x) for expert in net.deep[:4]], 1)).sum(1)


def straight(logits: Tensor) -> Tensor:
    soft = logits.softmax(1)
    return fn.one_hot(soft.max(1)[1], 4).float() - soft.detach() + soft


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        (lambda logits: fn.gumbel_softmax(logits, hard=True), []),
        (lambda logits: fn.gumbel_softmax(logits, 2.0, True), []),
        (straight, []),
        (lambda logits: fn.gumbel_softmax(Reversed.apply(logits), hard=True), [("wrong_backward", True)]),
    ],
    ids=["gumbel", "warm", "by hand", "reversed"],
)
def test_experts_that_each_scene_is_routed_to_are_meant(choose: Any, expected: list) -> None:
    trainer = of(lambda net, x: routed(net, x, choose))
    assert said(gradient.right_derivative, trainer) == expected
    assert said(unread.CHECKS["what the first layers make of scenes is read"], trainer) == []
    assert said(scene_gradients.scenes_learned_from, trainer) == []


@pytest.mark.parametrize("wrong", [None, 0, 1])
def test_inputs_name_a_conjugate_that_powers_of_beams_hide(wrong: int | None) -> None:
    config = small("backprojection")
    torch.manual_seed(0)
    model = BeamNet(config.task, WIDTH, 1)
    features = model.features
    model.features = lambda *given: features(*(conj(x) if at == wrong else x for at, x in enumerate(given)))
    expected = [] if wrong is None else [("conjugation_error", True)]
    assert said(inputs.information, Trainer(config, model=model)) == expected


class SetByScenes(nn.Module):
    """A scale that the first pass in training sets by its scenes, or every pass."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.once, self.scale = once, nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("done", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not (self.once and self.done):
            with torch.no_grad():
                self.scale.copy_(1 / (0.1 + x.flatten(0, 1).std(0)))
                self.done.fill_(True)
        return self.scale * x


@pytest.mark.parametrize("once", [True, False])
def test_weights_may_be_set_by_the_scenes_of_the_first_pass(once: bool) -> None:
    trainer = of(lambda net, x: net.norm(net.linear(x)), lambda net: setattr(net, "norm", SetByScenes(once)))
    assert said(parameters.left_alone, trainer) == [("weights_changed_outside", False)] * (not once)
    assert said(one_step, trainer) == []


def to_places(net: Tokens, x: Tensor, part: slice) -> Tensor:
    """One scene to the third layer, the others to the second, and none at all to the fourth."""
    x = x.mean(1)
    return torch.cat([layer(rows) for layer, rows in zip(net.deep[1:3], (x[1:], x[:1]), strict=True)])[part]


@pytest.mark.parametrize(
    ("mix", "named"),
    [
        (lambda net, x: to_places(net, x, slice(None)), []),  # as experts by the scene
        (lambda net, x: net.deep[2](net.deep[1](x)), [("unused_head", False)]),  # a list of which a part is used
        (lambda net, x: x + 0 * net.deep[0](x.detach()).detach(), [("unused_head", True)]),
    ],
    ids=["routed", "not called", "called"],
)
def test_every_tensor_tells_experts_without_a_scene_from_layers_that_nothing_uses(mix: Mix, named: list) -> None:
    def start(net: Tokens) -> None:
        net.deep, net.query, net.place = net.deep[:4], None, nn.Parameter(net.place.detach())
        net.attention = net.recurrent = net.linear = None

    assert said(gradient.CHECKS["every tensor gets a gradient"], of(mix, start)) == named


def test_frozen_weights_beside_adapters_of_a_lower_rank_are_not_certain() -> None:
    for ranks, certain in ((4, False), (0, True)):
        trainer = of(lambda net, x: net.linear(x))
        for part in (trainer.model.linear,) if ranks else (trainer.model.beams, trainer.model.stem):
            part.requires_grad_(False)
        if ranks:
            trainer.model.down, trainer.model.up = nn.Linear(WIDTH, ranks), nn.Linear(ranks, WIDTH)
        assert said(parameters.frozen, trainer) == [("frozen_parameters", certain)]


def test_a_frozen_minority_is_not_certain() -> None:
    """As random features, a prior drawn at random or a fixed map are, kept as parameters."""
    trainer = of(lambda net, x: net.linear(x))
    trainer.model.fixed = nn.Parameter(torch.randn(3, WIDTH), requires_grad=False)
    assert said(parameters.frozen, trainer) == [("frozen_parameters", False)]


def test_every_tensor_names_a_branch_that_is_off() -> None:
    check = gradient.CHECKS["every tensor gets a gradient"]
    shut = of(lambda net, x: x + net.shut * torch.tanh(net.linear(x)))
    assert [cause for cause, _ in said(check, shut)].count("vanishing_gradient") == 1
    opens = of(lambda net, x: x + net.place.new_zeros(()) + torch.tanh(net.linear(x)))
    assert "vanishing_gradient" not in [cause for cause, _ in said(check, opens)]


def test_inputs_kept_names_features_that_are_written_into() -> None:
    trainer = of(lambda net, x: x)
    assert said(calls.inputs_kept, trainer) == []
    net = trainer.model.net
    trunk = net.trunk
    trainer.model.__dict__["net"].trunk = lambda features: (features[0].mul_(0.5), trunk(features))[1]
    assert said(calls.inputs_kept, trainer) == [("scenes_altered", True)]


# ---- rates, averages, gradients on their way
# ---------------------------------------------------------------------------


def test_rates_of_a_fine_tuning_are_named_for_a_network_that_knows_nothing() -> None:
    few = {"optimizer.backbone_lr": 2e-5, "optimizer.head_lr": 2e-5}
    assert said(schedule.rates, of(attended, **few)) == [("learning_rate_too_small", False)]
    assert said(schedule.rates, of(attended)) == []


@pytest.mark.parametrize("lr, cause", [(1e-5, "learning_rate_too_small"), (0.5, "learning_rate_too_large")])
def test_rates_name_peaks_far_from_the_configuration(lr: float, cause: str) -> None:
    trainer = Trainer(small("hybrid"))
    for group in trainer.optimizer.param_groups:
        group["peak_lr"] = lr
    assert cause in [each for each, _ in said(schedule.rates, trainer)]


def test_rates_name_betas_that_are_exchanged() -> None:
    trainer = Trainer(small("hybrid", **{"optimizer.beta1": 0.999, "optimizer.beta2": 0.9}))
    assert said(schedule.rates, trainer) == [("learning_rate_too_large", False)]


@pytest.mark.parametrize("share, expected", [(-0.02, [("ema_frozen", False)]), (0.02, [])])
def test_several_steps_name_an_average_that_goes_the_other_way(share: float, expected: list) -> None:
    from bench.faults.unseen_2026_11.fourth_data import averaged

    trainer = Trainer(small("backprojection"))
    averaged(trainer, lambda average, now, made: torch.lerp(average, now, share))
    assert said(several_steps, trainer) == expected


def test_one_step_names_gradients_clipped_or_cleared_by_tensor() -> None:
    def clip(limit: float) -> Callable[[Trainer], None]:
        return lambda trainer: [nn.utils.clip_grad_norm_([each], limit) for each in trainer.model.parameters()]

    def clear(trainer: Trainer) -> None:
        gradients(trainer)[0].zero_()

    for action, expected in ((clip(1e-4), "clipped_apart"), (clear, "zeroed_gradients"), (clip(1e4), None)):
        trainer = Trainer(small("backprojection"))
        before_step(trainer, lambda trainer=trainer, action=action: action(trainer))
        assert [cause for cause, _ in said(one_step, trainer)][:1] == ([expected] if expected else [])


# ---- losses
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound, expected", [(0.3, [("clamped_loss", True)]), (30.0, [])])
def test_scenes_beyond_a_bound_of_the_loss_are_named(bound: float, expected: list) -> None:
    trainer = Trainer(small("hybrid"))
    wrap(trainer.loss, "nmse", lambda nmse: lambda *args, **options: nmse(*args, **options).clamp(max=bound))
    assert said(scene_gradients.scenes_learned_from, trainer) == expected


def test_each_term_allows_a_detached_weight_of_scenes() -> None:
    trainer = Trainer(small("hybrid"))
    wrap(
        trainer.loss,
        "nmse",
        lambda nmse: (
            lambda *args, **options: (lambda each: each * (-0.1 * each.detach()).exp())(nmse(*args, **options))
        ),
    )
    assert said(each_term, trainer) == []


@pytest.mark.parametrize("logarithm", [True, False])
def test_own_term_names_one_that_is_lowest_elsewhere(logarithm: bool) -> None:
    config = small("backprojection", **{"loss.cov": 0.02, "loss.cov_pred": 0.0, "loss.own_weight": 1.0})
    transform = fourier(config.task)

    def shares(factor: Tensor) -> Tensor:
        beams = factor.permute(0, 2, 3, 1).flatten(2) @ transform.to(factor.dtype)
        each = sum(part.square() for part in beams.chunk(2, 2)).sum(1) + 1e-6
        return each / each.sum(1, keepdim=True)

    def term(prediction: Prediction, scenes: Scenes) -> Tensor:
        found, wanted = shares(prediction.factor), shares(scenes.factor).to(prediction.factor.dtype)
        return fn.kl_div(found.log() if logarithm else found, wanted, reduction="none").sum(1)

    found = [cause for cause, _ in said(own_term, Trainer(config, loss=term))]
    assert ("target_scale_differs" in found) == (not logarithm)
