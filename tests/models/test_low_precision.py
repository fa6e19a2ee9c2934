"""bfloat16 on a CPU: float32's gradients to its accuracy, float32 gradients, and weights that are never stale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ris_fast import FusedAdamW
from ris_fast.models import linear as module
from ris_fast.models.linear import Linear
from ris_fast.training.loss import CovarianceLoss
from tests.models.test_hybrid import SEED_PRESET, TASK, call, scenes, small

ROUNDING = 2.0**-8  # of a number in bfloat16


def low() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def gradients(model: nn.Module, precise: bool) -> dict[str, Tensor]:
    model.zero_grad()
    batch = scenes(16)
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        prediction = call(model, batch)
    CovarianceLoss(SEED_PRESET, TASK)(prediction, batch)[0].backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_hybrid_gradients_in_bf16_are_those_of_fp32_to_its_accuracy() -> None:
    model = small()
    wide, narrow = gradients(model, precise=True), gradients(model, precise=False)
    flat = [torch.cat([each.flatten() for each in found.values()]) for found in (wide, narrow)]
    assert (flat[1] - flat[0]).norm() < 8 * ROUNDING * flat[0].norm()
    assert not torch.equal(flat[0], flat[1])
    for name, gradient in narrow.items():
        assert gradient.dtype == torch.float32
        assert (gradient - wide[name]).norm() < 32 * ROUNDING * wide[name].norm() + 1e-3 * flat[0].norm(), name


@pytest.mark.parametrize("shape, bias", [((7, 33), True), ((3, 16, 48), False), ((0, 8), True)])
def test_linear_in_bf16_errs_no_more_than_torchs(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    ours, x = Linear(shape[-1], 12, bias), torch.randn(shape)
    theirs = nn.Linear(shape[-1], 12, bias)
    theirs.load_state_dict(ours.state_dict())

    def found(layer: nn.Module, enabled: bool = True) -> list[Tensor]:
        at = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = layer(at)
        out.float().square().sum().backward()
        return [out.detach().float(), at.grad, *(each.grad for each in layer.parameters())]

    exact = found(theirs, enabled=False)
    theirs.zero_grad()
    for mine, plain, truth in zip(found(ours), found(theirs), exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - truth).norm() <= 1.2 * (plain - truth).norm() + 0.5 * ROUNDING * truth.norm()


def test_linear_in_bf16_casts_a_weight_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    apply = module._LowLinear.apply
    monkeypatch.setattr(module._LowLinear, "apply", lambda *a: (calls.append(1), apply(*a))[1])
    layer = Linear(4, 3)
    with low():
        out = layer(torch.randn(2, 4))
    assert out.dtype == torch.bfloat16 and len(calls) == 1


def by_data(model: nn.Module, _: FusedAdamW) -> None:
    model.fuse.weight.data.mul_(1.5)


def by_copy(model: nn.Module, _: FusedAdamW) -> None:
    with torch.no_grad():
        model.fuse.weight.copy_(2 * model.fuse.weight)


def by_loading(model: nn.Module, _: FusedAdamW) -> None:
    model.load_state_dict({name: 1.25 * value for name, value in model.state_dict().items()})


def by_step(model: nn.Module, optimizer: FusedAdamW) -> None:
    optimizer.step()


@pytest.mark.parametrize("change", [by_data, by_copy, by_loading, by_step])
def test_weights_in_bf16_are_never_stale(change: Callable[[nn.Module, FusedAdamW], None]) -> None:
    """The changed network answers as a fresh one with the same weights; averages too, inside their block and after."""
    model, batch = small(), scenes()
    optimizer = FusedAdamW(model.named_parameters(), lr=1e-2, ema_decay=0.5)

    def answers(of: nn.Module) -> Tensor:
        with low():
            return call(of, batch).factor.detach()

    def fresh() -> Tensor:
        other = small()
        other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
        return answers(other)

    with low():
        prediction = call(model, batch)
    CovarianceLoss(SEED_PRESET, TASK)(prediction, batch)[0].backward()
    optimizer.step()
    before = answers(model)
    change(model, optimizer)
    after = answers(model)
    assert not torch.equal(after, before) and torch.equal(after, fresh())
    with optimizer.ema():
        averaged = answers(model)
        assert torch.equal(averaged, fresh()) and not torch.equal(averaged, after)
    assert torch.equal(answers(model), after)


def test_hybrid_in_bf16_compiles_without_graph_break_and_agrees() -> None:
    model, batch = small(), scenes()
    features = model.features(batch.snapshots, batch.channel, batch.codes, batch.snr_db)
    with low():
        written = model.trunk(features).factor
        found = torch.compile(model.trunk, fullgraph=True, backend="aot_eager")(features).factor
    torch.testing.assert_close(found, written, rtol=4 * ROUNDING, atol=4 * ROUNDING)
