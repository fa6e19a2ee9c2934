"""The auxiliary terms: known minima, descent, invariances, gradients against float64, degenerate inputs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ris_fast.config.schema import Loss, Task
from ris_fast.physics.array import RISArray, steering
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import adjoint_matmul, to_complex, to_pairs
from ris_fast.physics.scenes import simulate
from ris_fast.training import loss_terms as terms
from ris_fast.training.loss import CovarianceLoss

BATCH, SOURCES, ARRAY = 3, 3, RISArray(3, 3)
COUNT = torch.tensor([3, 2, 1])
ACTIVE = terms.active_sources(COUNT, SOURCES)


def uniform(seed: int, low: float, high: float, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(BATCH, SOURCES, generator=generator, dtype=dtype)


def truth() -> dict[str, Tensor]:
    """Directions and ranges of the true sources, and their steering vectors as (B, N, K, 2), zero where none."""
    where = {"azimuth": uniform(1, -1.0, 1.0), "elevation": uniform(2, -0.5, 0.5), "range_m": uniform(3, 0.5, 10.0)}
    steer = steering(ARRAY, **where).transpose(1, 2) * ACTIVE[:, None, :, None]
    return where | {"steer": steer, "factor": steer * uniform(4, 0.2, 1.0)[:, None, :, None]}


def random_factor(columns: int = 6, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, ARRAY.elements, columns, 2, generator=generator, dtype=torch.float64)


def orthogonal_factor(columns: int) -> Tensor:
    """Orthogonal columns of unequal power."""
    unitary = torch.linalg.qr(to_complex(random_factor(columns)))[0]
    return to_pairs(unitary * torch.linspace(0.1, 2.0, columns))


RAMP = terms.stencil(*ARRAY.shares())


def subspace(factor: Tensor, steer: Tensor) -> Tensor:
    return terms.subspace(terms.gram(factor), adjoint_matmul(steer, factor), terms.gram(steer))


FACTOR_TERMS = {
    "orthogonality": lambda factor: terms.orthogonality(terms.gram(factor)),
    "cross": lambda factor: terms.cross(terms.gram(factor)),
    "subspace": lambda factor: subspace(factor, terms.unit_columns(truth()["factor"])),
    "contrast": lambda factor: terms.contrast(factor, terms.unit_columns(truth()["factor"]), RAMP, ACTIVE),
}


def degenerate_factors() -> dict[str, Tensor]:
    """Shapes of trouble: rank K, equal powers, the same source twice, columns of zeros, nothing at all."""
    exact = truth()["factor"]
    twice = exact.clone()
    twice[:, :, 1] = twice[:, :, 0]
    padded = torch.cat((exact, torch.zeros_like(exact)), dim=2)
    equal = terms.unit_columns(exact)
    return {
        "rank K": torch.cat((exact, exact), 2),
        "equal powers": torch.cat((equal, equal), 2),
        "duplicate": torch.cat((twice, twice), 2),
        "zero columns": padded,
        "zero": torch.zeros_like(padded),
    }


@pytest.mark.parametrize("name", FACTOR_TERMS)
def test_factor_terms_agree_with_finite_differences(name: str) -> None:
    factor = random_factor(4).requires_grad_()
    assert torch.autograd.gradcheck(FACTOR_TERMS[name], (factor,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FACTOR_TERMS)
@pytest.mark.parametrize("trouble", degenerate_factors())
def test_factor_terms_stay_finite_on_degenerate_factors(name: str, trouble: str) -> None:
    for dtype in (torch.float32, torch.float64):
        factor = degenerate_factors()[trouble].to(dtype).requires_grad_()
        steer = terms.unit_columns(degenerate_factors()["duplicate"][:, :, :SOURCES].to(dtype))
        if name == "subspace":
            value = subspace(factor, steer)
        elif name == "contrast":
            value = terms.contrast(factor, steer, RAMP, ACTIVE)
        else:
            value = FACTOR_TERMS[name](factor)
        value.sum().backward()
        assert value.isfinite().all() and factor.grad.isfinite().all()


@pytest.mark.parametrize("name", FACTOR_TERMS)
def test_factor_terms_decrease_along_their_gradient(name: str) -> None:
    factor = random_factor().requires_grad_()
    before = FACTOR_TERMS[name](factor)
    (gradient,) = torch.autograd.grad(before.sum(), factor)
    after = FACTOR_TERMS[name](factor.detach() - 0.05 * gradient / gradient.norm())
    assert (before > 0).all() and after.sum() < before.sum()


@pytest.mark.parametrize("name", FACTOR_TERMS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_factor_terms_ignore_the_scale_of_the_factor(name: str, scale: float) -> None:
    factor = random_factor()
    torch.testing.assert_close(FACTOR_TERMS[name](scale * factor), FACTOR_TERMS[name](factor))


def test_orthogonality_is_zero_if_orthogonal_one_if_parallel() -> None:
    assert FACTOR_TERMS["orthogonality"](orthogonal_factor(6)).abs().max() < 1e-12
    parallel = random_factor(1).expand(-1, -1, 4, -1)
    torch.testing.assert_close(
        FACTOR_TERMS["orthogonality"](parallel), torch.ones(BATCH, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_cross_is_zero_for_equal_halves_of_any_scale() -> None:
    half = random_factor(3)
    assert FACTOR_TERMS["cross"](torch.cat((half, 0.3 * half), 2)).max() < 1e-12


def test_subspace_equals_the_dense_projection() -> None:
    steer = to_complex(truth()["steer"][:1])
    factor = to_complex(random_factor()[:1])
    outside = torch.eye(ARRAY.elements) - steer @ torch.linalg.pinv(steer)
    cov = factor @ factor.mH
    dense = torch.linalg.matrix_norm(outside @ cov @ outside).square() / torch.linalg.matrix_norm(cov).square()
    torch.testing.assert_close(FACTOR_TERMS["subspace"](random_factor())[:1], dense, rtol=2e-3, atol=0)
    assert FACTOR_TERMS["subspace"](truth()["factor"]).max() < 1e-10


def test_contrast_equals_the_dense_spectrum() -> None:
    factor = random_factor()
    unit = to_complex(factor / factor.square().sum((1, 2, 3), keepdim=True).sqrt())
    inverse = torch.linalg.inv(unit @ unit.mH + terms.LOADING * torch.eye(ARRAY.elements))
    around = to_complex(truth()["steer"])[:, :, :, None] * to_complex(RAMP.double())[:, None]
    spectrum = 1.0 / torch.einsum("bnks,bnm,bmks->bks", around.conj(), inverse, around).real
    dense = torch.where(ACTIVE, (spectrum.sum(-1) / spectrum[..., 0]).log(), 0.0).sum(-1) / COUNT
    torch.testing.assert_close(FACTOR_TERMS["contrast"](factor), dense)


def test_contrast_of_one_source_has_its_closed_form() -> None:
    """R = a a^H + delta I gives 1/(a'^H R^-1 a') = delta/(1 - |a^H a'|^2/(1 + delta))."""
    steer, one = truth()["steer"][:, :, :1], torch.ones(BATCH, 1, dtype=torch.bool)
    overlap = to_complex(RAMP.double()).mean(0).abs().square()
    spectrum = 1.0 / (1.0 - overlap / (1.0 + terms.LOADING))
    best = (spectrum.sum() / spectrum[0]).log()
    torch.testing.assert_close(terms.contrast(steer, steer, RAMP, one), best.expand(BATCH))
    flat = terms.contrast(torch.zeros_like(steer), steer, RAMP, one)
    torch.testing.assert_close(flat, torch.full_like(flat, math.log(9.0)))
    assert best < 0.1


def test_stencil_moves_a_source_to_where_its_tilt_says() -> None:
    """The ramp is a change of direction cosines at the same range."""
    range_m = torch.full((1,), 2.0, dtype=torch.float64)
    u = ARRAY.wavelength_m / (4.0 * ARRAY.horizontal * ARRAY.spacing_m)
    straight = to_complex(steering(ARRAY, torch.zeros_like(range_m), torch.zeros_like(range_m), range_m))
    tilted = to_complex(steering(ARRAY, torch.full_like(range_m, math.asin(u)), torch.zeros_like(range_m), range_m))
    overlaps = (to_complex(RAMP.double()).T.conj() * straight.conj() * tilted).sum(-1).abs()
    assert overlaps.max() > 1.0 - 1e-6 and overlaps[0] < 0.95
    torch.testing.assert_close(RAMP[:, 0], torch.tensor([1.0, 0.0]).expand(ARRAY.elements, 2))


def located(azimuth: Tensor, elevation: Tensor, range_m: Tensor) -> dict[str, Tensor]:
    """The terms on angles and ranges of this prediction against the truth, each (B,)."""
    true = truth()
    angles = terms.angle_gaps(azimuth, elevation, true["azimuth"], true["elevation"])
    ranges = terms.log_range_gaps(range_m, true["range_m"], ACTIVE)
    losses = {
        "angle": terms.huber(angles, terms.ANGLE_DELTA).sum(-1),
        "range": terms.huber(ranges, terms.RANGE_DELTA),
    }
    slots = terms.match(terms.assignment_cost(losses), ACTIVE, *terms.assignments(SOURCES))
    return {
        **{name: terms.matched(loss, slots, ACTIVE) for name, loss in losses.items()},
        "chamfer": terms.chamfer(angles, ACTIVE),
    }


def guess() -> tuple[Tensor, Tensor, Tensor]:
    return uniform(11, -1.0, 1.0), uniform(12, -0.5, 0.5), uniform(13, 0.5, 10.0)


def exact_guess() -> tuple[Tensor, Tensor, Tensor]:
    """The truth in every slot; slots to spare repeat the first source."""
    index = torch.where(ACTIVE, torch.arange(SOURCES), 0)
    return tuple(truth()[key].gather(1, index) for key in ("azimuth", "elevation", "range_m"))


@pytest.mark.parametrize("name", ["angle", "range", "chamfer"])
def test_located_terms_pass_gradcheck_and_vanish_on_the_truth(name: str) -> None:
    inputs = tuple(each.requires_grad_() for each in guess())
    assert torch.autograd.gradcheck(lambda *each: located(*each)[name], inputs, eps=1e-7, atol=1e-6)
    value = located(*inputs)[name]
    gradients = torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True)
    size = math.sqrt(sum(each.square().sum().item() for each in gradients))
    moved = located(*(each - 0.01 * slope / size for each, slope in zip(inputs, gradients, strict=True)))[name]
    assert (value > 0).all() and moved.sum() < value.sum()
    assert located(*exact_guess())[name].abs().max() < 1e-12


@pytest.mark.parametrize("name", ["angle", "range", "chamfer"])
def test_located_terms_ignore_the_order_of_the_slots(name: str) -> None:
    expected = located(*guess())[name]
    for order in itertools.permutations(range(SOURCES)):
        torch.testing.assert_close(located(*(each[:, list(order)] for each in guess()))[name], expected)


def test_match_finds_the_cheapest_assignment() -> None:
    cost = uniform(21, 0.0, 1.0)[:, :, None] * uniform(22, 0.0, 1.0)[:, None] + uniform(23, 0.0, 1.0)[:, :, None].sin()
    slots = terms.match(cost, ACTIVE, *terms.assignments(SOURCES))
    for scene, count in enumerate(COUNT.tolist()):
        found = sum(cost[scene, slots[scene, k], k] for k in range(count))
        best = min(
            sum(cost[scene, order[k], k] for k in range(count)) for order in itertools.permutations(range(SOURCES))
        )
        torch.testing.assert_close(found, best)
        assert slots[scene].unique().numel() == SOURCES


def test_angle_gaps_go_around_the_circle() -> None:
    gap = terms.angle_gaps(
        torch.tensor([[math.pi - 0.01]]), torch.zeros(1, 1), torch.tensor([[0.01 - math.pi]]), torch.zeros(1, 1)
    )
    assert abs(gap[0, 0, 0, 0].item() + 0.02) < 1e-6


def test_located_terms_are_finite_for_equal_sources() -> None:
    inputs = tuple(each.mean(1, keepdim=True).expand(-1, SOURCES).clone().requires_grad_() for each in exact_guess())
    sum(each.sum() for each in located(*inputs).values()).backward()
    assert all(each.grad.isfinite().all() for each in inputs)


def test_count_entropy_passes_gradcheck_and_prefers_the_truth() -> None:
    logits = uniform(31, -1.0, 1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: terms.count_entropy(each, COUNT), (logits,))
    sure = 60.0 * torch.nn.functional.one_hot(COUNT - 1, SOURCES).double()
    assert terms.count_entropy(sure, COUNT).max() < 1e-12
    torch.testing.assert_close(
        terms.count_entropy(torch.zeros_like(sure), COUNT), torch.full((BATCH,), math.log(SOURCES), dtype=torch.float64)
    )


def test_hermitian_inverse_is_the_inverse() -> None:
    factor = to_complex(random_factor(5))
    gram = factor.mH @ factor + 1e-3 * torch.eye(5)
    torch.testing.assert_close(to_complex(terms.hermitian_inverse(to_pairs(gram))), torch.linalg.inv(gram))


@pytest.mark.parametrize("scale", [2.0**-60, 1e-12, 1e-10, 1e12, 1e18])
def test_factor_terms_and_their_gradients_ignore_the_scale(scale: float) -> None:
    """One tiny or huge scene among ordinary ones; gradients go with one over the scale."""
    names = ("orthogonality", "cross", "subspace", "contrast")
    task = Task(ris_horizontal=4, ris_vertical=3, max_sources=SOURCES)
    loss, scenes = (
        CovarianceLoss(replace(Loss(), **dict.fromkeys(names, 0.1)), task),
        simulate(task, 3, SceneGenerator(4)),
    )
    plain = torch.randn(3, task.elements, 2 * SOURCES, 2, generator=torch.Generator().manual_seed(2))
    scales = torch.tensor([1.0, scale, 1.0])[:, None, None, None]
    found = {}
    for key, factor in (("plain", plain), ("scaled", plain * scales)):
        factor = factor.clone().requires_grad_()
        raw = loss._factor_terms(factor, scenes)
        found[key] = [(value, torch.autograd.grad(value, factor, retain_graph=True)[0]) for value in raw.values()]
    assert len(found["plain"]) == 4
    for (value, gradient), (scaled, other) in zip(found["plain"], found["scaled"], strict=True):
        torch.testing.assert_close(scaled, value, rtol=1e-5, atol=1e-6)
        size = float(gradient.norm())
        torch.testing.assert_close((other * scales), gradient, rtol=1e-3, atol=1e-4 * size)
