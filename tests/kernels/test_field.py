"""The estimate of the field on the surface: what its definition leaves open, and what a call may not be given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ris_fast.gradcheck import backends_here
from ris_fast.kernels.field import real, reference
from ris_fast.kernels.field.op import OPERATOR, aperture_field
from ris_fast.kernels.native import loader

BACKENDS = {"reference": reference.aperture_field} | backends_here(OPERATOR, "cpu")
SAMPLES = {sample.name: sample for sample in OPERATOR.samples}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> list:
    return list(SAMPLES[name].make("cpu", dtype))


def dense_root(vertical: Tensor, horizontal: Tensor) -> Tensor:
    return torch.kron(torch.view_as_complex(vertical.contiguous()), torch.view_as_complex(horizontal.contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["small", "odd"])
def test_aperture_field_solves_the_normal_equations(backend: str, name: str) -> None:
    *given, static, _ = inputs(name, torch.float64)
    channel, codes, snapshots = (torch.view_as_complex(each.contiguous()) for each in given[:3])
    root = dense_root(*given[4:6])
    operator = ((channel[:, None] * codes[..., None, :]) @ root).flatten(1, 2)  # (B, L M, N)
    ridge = channel.abs().square().sum((1, 2)) / (channel.shape[1] * 10 ** (given[3] / 10))
    normal = operator.mH @ operator + ridge[:, None, None] * torch.eye(root.shape[0])
    expected = root @ torch.linalg.solve(normal, operator.mH @ snapshots.flatten(1)[..., None])
    found = torch.view_as_complex(BACKENDS[backend](*given, static, 60))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["small", "small-each-snapshot"])
def test_aperture_field_of_zeros_is_zero_and_a_nan_stays_in_its_scene(backend: str, name: str) -> None:
    args = inputs(name)
    untouched = BACKENDS[backend](*args)
    args[2][0] = 0.0
    args[2][1, -1, 0, 1] = float("nan")
    found = BACKENDS[backend](*args)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert found[1, :, -1].isnan().all()
    assert torch.equal(found[2:], untouched[2:])
    args[0][0] = 0.0  # no ridge either
    assert torch.equal(BACKENDS[backend](*args)[0], torch.zeros_like(found[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_aperture_field_of_one_snapshot_is_that_of_each(backend: str) -> None:
    *given, _, steps = inputs("small-each-snapshot", torch.float64)
    found = BACKENDS[backend](*given, False, steps)
    for i in range(given[2].shape[1]):
        alone = [given[0], given[1][..., i : i + 1, :, :], given[2][:, i : i + 1], *given[3:]]
        torch.testing.assert_close(found[:, :, i : i + 1], BACKENDS[backend](*alone, True, steps))


def test_aperture_field_gives_no_gradient_and_takes_mixed_precision() -> None:
    channel, codes, snapshots, snr_db, *_ = inputs("small")
    plain = aperture_field(channel, codes, snapshots, snr_db, steps=4)
    assert not aperture_field(channel.requires_grad_(), codes, snapshots, snr_db, steps=4).requires_grad
    wide = aperture_field(channel, codes, snapshots.double(), snr_db.half().float(), steps=4)
    assert wide.dtype == torch.float64
    half = aperture_field(channel.detach().bfloat16(), codes, snapshots, snr_db, steps=4)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("compiler", [True, False], ids=["C++", "torch"])
def test_aperture_field_is_the_same_compiled(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler:
        monkeypatch.setattr(loader, "available", lambda: False)
    *given, vertical, horizontal, static, steps = inputs("small")
    run = lambda *a: aperture_field(*a, static=static, root=(vertical, horizontal), steps=steps)  # noqa: E731
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(found, run(*given), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["small", "small-each-snapshot"])
def test_aperture_field_on_the_meta_device_has_the_shape_of_the_result(name: str) -> None:
    args = inputs(name)
    found = OPERATOR.call(*(each.to("meta") if isinstance(each, Tensor) else each for each in args))
    assert found.is_meta and found.shape == OPERATOR.call(*args).shape


@pytest.mark.parametrize(
    ("at", "wrong", "message"),
    [
        (1, torch.zeros(5, 7, 2), r"codes is \(5, 7, 2\) torch.float32, expected \(5, 6, 2\)"),
        (2, torch.zeros(3, 5, 3, 2), r"snapshots is \(3, 5, 3, 2\) torch.float32, expected \(3, 5, 4, 2\)"),
        (3, torch.zeros(1), r"snr_db is \(1,\) torch.float32, expected \(3,\)"),
        (3, torch.zeros(3, dtype=torch.float64), r"snr_db is \(3,\) torch.float64, expected \(3,\) torch.float32"),
        (4, torch.zeros(2, 2, 2), "the root is of 2 rows of 2 elements"),
        (4, torch.zeros(3, 2), r"vertical is \(3, 2\) torch.float32, expected \(3, 3, 2\)"),
        (5, None, "one factor of the root is missing"),
        (0, torch.zeros(3, 4, 6, 2, dtype=torch.float16), "the channel is torch.float16, expected float32 or float64"),
    ],
)
def test_aperture_field_names_what_does_not_fit(at: int, wrong: Tensor | None, message: str) -> None:
    args = inputs("small")
    args[at] = wrong
    with pytest.raises(ValueError, match=f"aperture_field: {message}"):
        OPERATOR.call(*args)


@pytest.mark.parametrize("name", ["odd", "odd-each-snapshot", "identity", "no-steps"])
def test_aperture_field_in_real_arithmetic_is_the_definition(name: str) -> None:
    given = next(each for each in OPERATOR.samples if each.name == name).make("cpu", torch.float64)
    torch.testing.assert_close(real.aperture_field(*given), reference.aperture_field(*given), equal_nan=True)
