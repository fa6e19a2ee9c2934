"""The estimate of the field on the surface against dense solutions in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.kernels.field.op import aperture_field
from ris_fast.models.beams import FieldPrior
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes, simulate

TASK = Task(bs_antennas=6, ris_horizontal=4, ris_vertical=3, snapshots=5, max_sources=3, snr_max_db=10.0)
ENOUGH = 40


def prior_root(prior: FieldPrior) -> Tensor:
    """(N, N) complex128: C^(1/2), the elements of a row next to each other."""
    vertical, horizontal = (to_complex(each.double()) for each in prior.root)
    return torch.kron(vertical, horizontal)


def dense(scenes: Scenes, root: Tensor, each: bool) -> Tensor:
    """(B, N, P) complex128 by solving the normal equations."""
    channel, codes = (to_complex(given.double()) for given in (scenes.channel, scenes.codes))
    power = channel.abs().square().sum((1, 2)) / channel.shape[1] / 10 ** (scenes.snr_db.double() / 10)
    operators = channel[:, None] * codes[None, :, None]  # (B, L, M, N)
    snapshots = to_complex(scenes.snapshots.double())
    groups = operators.unbind(1), snapshots.unbind(1)
    if not each:
        groups = [operators.flatten(1, 2)], [snapshots.flatten(1)]
    fields = []
    for operator, y in zip(*groups):
        shaped = operator @ root
        normal = shaped.mH @ shaped + power[:, None, None] * torch.eye(TASK.elements)
        fields.append(root @ torch.linalg.solve(normal, shaped.mH @ y[..., None])[..., 0][..., None])
    return torch.cat(fields, 2)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("shaped", [False, True])
def test_aperture_field_solves_the_normal_equations(each: bool, shaped: bool) -> None:
    scenes, prior = simulate(TASK, 6, SceneGenerator(1)), FieldPrior(TASK)
    root = prior_root(prior) if shaped else torch.eye(TASK.elements, dtype=torch.complex128)
    found = aperture_field(
        scenes.channel,
        scenes.codes,
        scenes.snapshots,
        scenes.snr_db,
        static=not each,
        root=prior.root if shaped else None,
        steps=ENOUGH,
    )
    expected = dense(scenes, root, each)
    assert found.shape == (6, TASK.elements, 5 if each else 1, 2)
    error = (to_complex(found) - expected).abs().square().sum((1, 2)) / expected.abs().square().sum((1, 2))
    assert error.sqrt().max() < 1e-3


def test_a_prior_brings_the_estimate_nearer_to_the_field() -> None:
    """Single sources at 0 dB: the share of the estimate that lies along the true steering vector."""
    task = Task(max_sources=1, snr_min_db=0.0, snr_max_db=0.0)
    scenes = simulate(task, 200, SceneGenerator(2))
    target = to_complex(scenes.factor)[..., 0]

    def along(root: tuple[Tensor, Tensor] | None) -> float:
        x = aperture_field(scenes.channel, scenes.codes, scenes.snapshots, scenes.snr_db, root=root, steps=6)
        x = to_complex(x)[..., 0]
        overlap = (target.conj() * x).sum(1).abs().square() / (target.abs().square().sum(1) * x.abs().square().sum(1))
        return overlap.mean().item()

    assert along(FieldPrior(task).root) > 1.1 * along(None)
