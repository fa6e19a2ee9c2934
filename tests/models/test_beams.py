"""Beams and the prior of a field against dense definitions with the physics' own steering vectors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.models.beams import Beams, FieldPrior
from ris_fast.physics.array import RISArray, steering
from ris_fast.physics.real_complex import to_complex

TASK = Task(bs_antennas=4, azimuth_deg=55.0, ris_horizontal=5, ris_vertical=3, snapshots=8, max_sources=3)


def dense_beams(beams: Beams, planes: int) -> Tensor:
    """(Q, across, down, N) complex128: every beam by the physics' steering vectors, half a wavelength apart."""
    curvature = torch.linspace(TASK.range_max_m**-0.5, TASK.range_min_m**-0.5, planes).double().square()
    u, v = (
        torch.linspace(-1, 1, count, dtype=torch.float64) * min(math.sin(math.radians(end)), 1 - 1 / count)
        for count, end in zip(beams.size, (TASK.azimuth_deg, TASK.elevation_deg))
    )
    w, u, v = (each.flatten() for each in torch.meshgrid(curvature, u, v, indexing="ij"))
    elevation = v.asin()
    azimuth = (u / elevation.cos()).asin()
    assert azimuth.isfinite().all()  # every beam of the sector is a direction
    return to_complex(steering(RISArray.of(TASK), azimuth, elevation, 1 / w)).unflatten(0, (planes, *beams.size))


def field(count: int = 4, fields: int = 1) -> Tensor:
    return torch.randn(count, TASK.elements, fields, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [{}, {"across": 2, "down": 7}])
@pytest.mark.parametrize("fields", [1, 3])
def test_beams_are_steering_vectors(size: dict[str, int], fields: int) -> None:
    beams, x = Beams(TASK, 4, **size), field(fields=fields)
    dense = dense_beams(beams, 4)
    expected = torch.einsum("qadn,bnp->bpqad", dense.conj(), to_complex(x.double()))
    re, im = beams(x)
    torch.testing.assert_close(torch.complex(re, im), expected.to(torch.complex64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("azimuth_deg", [0.5, 60.0, 90.0])
@pytest.mark.parametrize("spacing", [0.25, 0.5, 1.0])
def test_every_field_is_made_of_the_beams(azimuth_deg: float, spacing: float) -> None:
    """As many independent beams as elements, also where the sector ends in one direction, or wraps around."""
    task = replace(TASK, azimuth_deg=azimuth_deg, elevation_deg=90.0, spacing_wavelengths=spacing)
    beams = Beams(task, 1)
    columns = torch.eye(math.prod(beams.size)).unflatten(1, (1, *beams.size))
    fields = to_complex(beams.field(columns, torch.zeros_like(columns)))[..., 0].to(torch.complex128)
    assert torch.linalg.matrix_rank(fields, rtol=1e-12) == task.elements


def test_beams_field_is_the_adjoint() -> None:
    beams = Beams(TASK, 4)
    re, im = (torch.randn(2, 4, *beams.size, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    expected = torch.einsum("qadn,bqad->bnq", dense_beams(beams, 4), torch.complex(re, im).to(torch.complex128))
    torch.testing.assert_close(to_complex(beams.field(re, im)), expected.to(torch.complex64), rtol=1e-4, atol=1e-5)


def test_beams_of_one_plane_focus_between_the_ranges() -> None:
    cos, _ = Beams(TASK, 1).focus_2QN
    between = (0.5 * (TASK.range_min_m**-0.5 + TASK.range_max_m**-0.5)) ** 2
    x, y = RISArray.of(TASK).positions()
    expected = (RISArray.of(TASK).wavenumber * between * (x.square() + y.square()) / 2).cos()
    torch.testing.assert_close(cos[0], expected, rtol=1e-4, atol=1e-5)


def test_field_prior_is_the_root_of_the_covariance_of_each_axis() -> None:
    """The middle row, whose elements have y = 0, against sources drawn at random."""
    count, root = 40_000, torch.kron(*(to_complex(each) for each in FieldPrior(TASK).root))
    covariance = root @ root.mH
    torch.testing.assert_close(covariance.diagonal().real, torch.ones(TASK.elements), rtol=0, atol=1e-4)
    draw = torch.Generator().manual_seed(3)
    u = (2 * torch.rand(count, generator=draw) - 1) * math.sin(math.radians(TASK.azimuth_deg))
    r = TASK.range_min_m + (TASK.range_max_m - TASK.range_min_m) * torch.rand(count, generator=draw)
    x = RISArray.of(TASK).positions()[0][5:10]
    phase = RISArray.of(TASK).wavenumber * (u[:, None] * x - x.square() / (2 * r[:, None]))
    row = torch.polar(torch.ones_like(phase), phase)
    torch.testing.assert_close(covariance[5:10, 5:10], row.t() @ row.conj() / count, rtol=0, atol=0.02)


def test_field_prior_is_hermitian() -> None:
    for root in FieldPrior(TASK).root:
        torch.testing.assert_close(to_complex(root), to_complex(root).mH)
