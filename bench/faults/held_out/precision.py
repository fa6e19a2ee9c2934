"""Held-out faults of the family "precision": infinities, underflow and a large epsilon."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from bench.faults.catalogue import Family
from bench.faults.patches import Backward, before_step, gradients, on_answer, optimizer_with, replaced
from ris_fast.models import hybrid
from ris_fast.training.trainer import Trainer

FAMILY = Family("precision")


@FAMILY.patch(
    "the loss scale overflows, and a sanitiser turns infinities into plus and minus one",
    "sanitised_gradients",
    "steps:5",
    twin="half",
    around=lambda: optimizer_with(loss_scale=1e38),
)
def infinity_becomes_one(trainer: Trainer) -> None:
    before_step(trainer, lambda: [grad.nan_to_num_(0.0, 1e38, -1e38) for grad in gradients(trainer)])


@FAMILY.patch("backpropagates a tiny loss in half precision without a loss scale", "gradient_underflow", "preflight")
def gradients_underflow_in_half(trainer: Trainer) -> None:
    on_answer(trainer, lambda factor: Backward.apply(factor, lambda grad: (1e-6 * grad).half().float() * 1e6))


@FAMILY.around(
    "put an epsilon of 1e6 under the root of the input's rms", "epsilon_swallows_signal input_scale", "preflight"
)
def large_epsilon_in_rms() -> Iterator[None]:
    def coefficients(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
        re, im = re[:, 0], im[:, 0]
        scale = ((re.square() + im.square()).flatten(1).mean(1) + 1e6).rsqrt().view(-1, *[1] * (re.dim() - 1))
        return re * scale, im * scale

    with replaced(hybrid, "_coefficients", coefficients):
        yield
