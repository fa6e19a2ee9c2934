"""The equations of subspace fitting against autograd, and the law of a descent."""

from __future__ import annotations

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.localize.manifold import Manifold
from ris_fast.localize.search import equations, find_positions, refine
from ris_fast.physics.array import RISArray, cosine_steering
from ris_fast.physics.real_complex import to_complex

CPU = torch.device("cpu")


def random_basis(elements: int, rows: int = 3, batch: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 2, rows, elements, generator=generator, dtype=torch.float64)


def random_positions(manifold: Manifold, batch: int = 4, sources: int = 3) -> torch.Tensor:
    share = torch.rand(batch, sources, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return manifold.low + (manifold.high - manifold.low) * share


def projection_cost(task: Task, position: torch.Tensor, basis: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """|B - A A^+ B|^2 with the pseudo-inverse itself."""
    u, v, w = position.unbind(-1)
    a = to_complex(cosine_steering(RISArray.of(task), u, v, 1 / w)).mT * active[:, None]
    b = torch.complex(*basis.unbind(1)).mT
    return (b - a @ (torch.linalg.pinv(a) @ b)).abs().square().sum((1, 2))


@pytest.mark.parametrize("wavefront", ("fresnel", "spherical"))
def test_equations_are_cost_and_gradient(wavefront: str) -> None:
    """The slope is minus half the gradient of f by scale * (u, v, w); sources that are not there have none."""
    task = Task(ris_horizontal=6, ris_vertical=5, wavefront=wavefront)
    manifold = Manifold.of(task, CPU)
    basis, position = random_basis(task.elements), random_positions(manifold).requires_grad_()
    active = torch.arange(3) < torch.tensor([3, 2, 1, 0])[:, None]
    cost = projection_cost(task, position, basis, active)
    (gradient,) = torch.autograd.grad(cost.sum(), position)
    found = equations(manifold, basis, position.detach(), active)
    torch.testing.assert_close(found.cost, cost.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.slope, -0.5 * gradient / manifold.scale, rtol=1e-3, atol=1e-4)
    assert found.slope[~active].abs().max() == 0
    assert torch.linalg.eigvalsh(found.curvature).min() > -1e-9


def test_refine_descends_inside_the_box() -> None:
    """From anywhere, with a basis that no sources explain, the cost falls and no position leaves the box."""
    task = Task(ris_horizontal=6, ris_vertical=5)
    manifold = Manifold.of(task, CPU)
    basis, start = random_basis(task.elements, batch=64), random_positions(manifold, batch=64)
    active = torch.ones(64, 3, dtype=torch.bool)
    costs = [equations(manifold, basis, start, active).cost]
    for steps in (4, 8, 16):
        end = refine(manifold, basis, start, active, steps)
        assert (end >= manifold.low).all() and (end <= manifold.high).all()
        costs.append(equations(manifold, basis, end, active).cost)
    assert all(later.mean() < earlier.mean() for earlier, later in zip(costs, costs[1:]))


def test_find_positions_gives_each_lobe_once() -> None:
    """Two columns of one and the same steering vector and a weak other one: both sources are found, none twice."""
    task = Task()
    manifold = Manifold.of(task, CPU)
    truth = torch.tensor([[[0.3, -0.1, 0.5], [-0.4, 0.2, 1.2]]], dtype=torch.float64)
    a = manifold.steer(truth).mT
    found = find_positions(manifold, torch.linalg.qr(a)[0], a * torch.tensor([1.0, 1e-3]), torch.tensor([2]), 2)
    order = found[0, :, 0].argsort(descending=True)
    torch.testing.assert_close(found[0, order], truth[0], rtol=0, atol=1e-7)
