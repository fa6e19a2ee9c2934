"""Laws and interface of cov_nmse: identities, invariances, accuracy towards zero, shapes and every error.

Letters: B batch, N elements, Q factor columns, K target columns; a last axis of 2 is (re, im).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ris_fast
from ris_fast.kernels.cov_nmse import reference
from ris_fast.kernels.cov_nmse.samples import random_tensors

CONFIGURATIONS = [
    {},
    {"loading": 1.0},
    {"shrink": 1e-3, "snr_db": 3.0},
    {"loading": 0.3, "shrink": 1e-2, "snr_db": -5.0},
]


def drawn(b: int = 3, n: int = 25, q: int = 4, k: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    tensors = random_tensors(b, n, q, k, 0, dense=False)
    return tensors["factor"].to(dtype), tensors["target_factor"].to(dtype)


def dense(factor: Tensor) -> Tensor:
    s = torch.view_as_complex(factor.contiguous())
    return torch.view_as_real(s @ s.mH)


def target(kind: str, factor: Tensor) -> dict[str, Tensor]:
    return {"target_factor": factor} if kind == "factor" else {"target_cov": dense(factor)}


both_targets = pytest.mark.parametrize("kind", ["factor", "cov"])


@both_targets
@pytest.mark.parametrize("settings", CONFIGURATIONS)
def test_cov_nmse_target_as_prediction_scores_zero(kind: str, settings: dict[str, float]) -> None:
    _, s = drawn()
    f = s.clone().requires_grad_()
    loss = ris_fast.cov_nmse(f, **target(kind, s), **settings)
    loss.backward()
    assert abs(loss.item()) < 1e-28
    assert f.grad.abs().max() < 1e-13


@both_targets
def test_cov_nmse_target_as_prediction_scores_zero_in_float32(kind: str) -> None:
    _, s = drawn(dtype=torch.float32)
    assert 0 <= ris_fast.cov_nmse(s, **target(kind, s)).item() < 1e-12


@both_targets
def test_cov_nmse_zero_factor_scores_one(kind: str) -> None:
    f, s = drawn(dtype=torch.float32)
    f = torch.zeros_like(f).requires_grad_()
    loss_B = ris_fast.cov_nmse(f, **target(kind, s), reduction="none")
    loss_B.sum().backward()
    assert torch.allclose(loss_B, torch.ones(3), atol=2e-7) and not f.grad.any()


@both_targets
def test_cov_nmse_identity_scores_its_closed_form(kind: str) -> None:
    _, s = drawn(n=16, dtype=torch.float64)
    f = torch.zeros(3, 16, 16, 2, dtype=torch.float64)
    f[:, torch.arange(16), torch.arange(16), 0] = 1
    true = torch.view_as_complex(dense(s))
    true = true * (16 / true.diagonal(dim1=1, dim2=2).real.sum(-1))[:, None, None]
    power = true.abs().square().sum((1, 2))
    assert torch.allclose(
        ris_fast.cov_nmse(f, **target(kind, s), reduction="none"), 1 - 16 / power
    )  # |I - T|^2 = N - 2N + |T|^2


def test_cov_nmse_loading_prediction_only_is_not_zero_at_truth() -> None:
    """(T + I)/2 against T: |T - I|^2/(4 |T|^2) = (1 - N/|T|^2)/4, 0.247 for the rank-one mixtures of the task."""
    _, s = drawn(n=16)
    floor = ris_fast.cov_nmse(s, target_factor=s, loading=1.0, loading_side="prediction", reduction="none")
    true = reference.covariance(s)
    assert torch.allclose(floor, (1 - 16 / true.abs().square().sum((1, 2))) / 4)


@both_targets
def test_cov_nmse_ignores_scale_and_unitary_mixing(kind: str) -> None:
    f, s = drawn()
    base = ris_fast.cov_nmse(f, **target(kind, s))
    unitary = torch.linalg.qr(torch.randn(4, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(1)))[0]
    mixed = torch.view_as_real(torch.view_as_complex(f) @ unitary)
    for changed in ((1e-9 * f, s), (1e9 * f, s), (f, 1e-6 * s), (f, 1e6 * s), (mixed, s)):
        assert torch.allclose(ris_fast.cov_nmse(changed[0], **target(kind, changed[1])), base, rtol=1e-12)


@both_targets
@pytest.mark.parametrize("settings", CONFIGURATIONS)
def test_cov_nmse_gradient_is_orthogonal_to_the_factor(kind: str, settings: dict[str, float]) -> None:
    f, s = drawn()
    f.requires_grad_()
    ris_fast.cov_nmse(f, **target(kind, s), **settings).backward()
    along = (f.detach() * f.grad).sum((1, 2, 3))
    assert (along.abs() < 1e-14 * f.detach().norm() * f.grad.norm() * 100).all()


@both_targets
@pytest.mark.parametrize("nmse", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_cov_nmse_is_accurate_from_one_to_a_millionth(kind: str, nmse: float) -> None:
    """Low-rank: as exact as float32 can say it. Dense: the direct form, at most twice the error of eager float32."""
    torch.manual_seed(0)
    _, s = drawn(b=4, n=64, k=4)
    f = (s + nmse**0.5 * s.norm() / s.numel() ** 0.5 * torch.randn_like(s)).float()
    s = s.float()
    given = target(kind, s)
    exact = ris_fast.cov_nmse(f.double(), **{k: v.double() for k, v in given.items()}, reduction="none")
    found = ris_fast.cov_nmse(f, **given, reduction="none")
    error = ((found - exact) / exact).abs().max().item()
    if kind == "factor":
        assert error < 1.2e-7
    else:
        args = (f, None, given["target_cov"], None, None, 0.0, 0.0, 0.0, 0.0)
        eager = ((reference.cov_nmse(*args) - exact) / exact).abs().max().item()
        assert error <= 2 * max(eager, 2.5e-7)


def test_cov_nmse_reductions_and_empty_batch() -> None:
    f, s = drawn()
    each = ris_fast.cov_nmse(f, target_factor=s, reduction="none")
    assert each.shape == (3,)
    assert torch.allclose(each.mean(), ris_fast.cov_nmse(f, target_factor=s)) and torch.allclose(
        each.sum(), ris_fast.cov_nmse(f, target_factor=s, reduction="sum")
    )
    empty = f[:0].clone().requires_grad_()
    total = ris_fast.cov_nmse(empty, target_factor=s[:0], reduction="sum")
    total.backward()
    assert total.item() == 0 and empty.grad.shape == (0, 25, 4, 2)


@both_targets
def test_cov_nmse_complex_and_real_inputs_agree(kind: str) -> None:
    f, s = drawn(dtype=torch.float32)
    pair, whole = f.clone().requires_grad_(), torch.view_as_complex(f.clone()).requires_grad_()
    given = target(kind, s)
    ris_fast.cov_nmse(pair, **given).backward()
    ris_fast.cov_nmse(whole, **{k: torch.view_as_complex(v) for k, v in given.items()}).backward()
    assert torch.equal(torch.view_as_real(whole.grad), pair.grad)


def test_cov_nmse_reads_a_conjugated_view() -> None:
    f, s = (torch.view_as_complex(x) for x in drawn())
    assert torch.allclose(
        ris_fast.cov_nmse(f.conj(), target_factor=s),
        ris_fast.cov_nmse(f.conj().resolve_conj(), target_factor=s),
        rtol=1e-14,
    )
    assert not torch.allclose(ris_fast.cov_nmse(f.conj(), target_factor=s), ris_fast.cov_nmse(f, target_factor=s))


@pytest.mark.parametrize("view", ["expanded", "transposed", "strided", "offset"])
def test_cov_nmse_takes_any_layout_of_the_factor(view: str) -> None:
    f, s = drawn()
    made: dict[str, Callable[[], Tensor]] = {
        "expanded": lambda: f[:1].clone().requires_grad_(),
        "transposed": lambda: f.transpose(1, 2).contiguous().requires_grad_(),
        "strided": lambda: f.repeat_interleave(2, 0).requires_grad_(),
        "offset": lambda: torch.cat([f.new_ones(1, 25, 4, 2), f]).requires_grad_(),
    }
    seen: dict[str, Callable[[Tensor], Tensor]] = {
        "expanded": lambda x: x.expand(3, -1, -1, -1),
        "transposed": lambda x: x.transpose(1, 2),
        "strided": lambda x: x[::2],
        "offset": lambda x: x[1:],
    }
    leaf, copy = made[view](), made[view]()
    ris_fast.cov_nmse(seen[view](leaf), target_factor=s).backward()
    args = (s, None, None, None, 0.0, 0.0, 0.0, 0.0)
    (want,) = torch.autograd.grad(reference.cov_nmse(seen[view](copy).contiguous(), *args).mean(), copy)
    assert torch.allclose(leaf.grad, want, rtol=1e-10, atol=1e-14)


def test_cov_nmse_in_a_plain_loop_and_under_no_grad() -> None:
    f, s = drawn(dtype=torch.float32)
    assert ris_fast.cov_nmse(f, target_factor=s).grad_fn is None
    with torch.no_grad():
        assert not ris_fast.cov_nmse(f.clone().requires_grad_(), target_factor=s).requires_grad
    model = torch.nn.Linear(8, 25 * 4 * 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ris_fast.cov_nmse(model(inputs).view(3, 25, 4, 2), target_factor=s)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_cov_nmse_sample_gradient_only_where_asked() -> None:
    f, s = drawn()
    x = torch.randn(3, 25, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for factor_grad, sample_grad in ((True, True), (False, True), (True, False)):
        ff, xx = f.clone().requires_grad_(factor_grad), x.clone().requires_grad_(sample_grad)
        ris_fast.cov_nmse(ff, target_factor=s, sample_factor=xx, blend=0.3).backward()
        assert (ff.grad is not None) == factor_grad and (xx.grad is not None) == sample_grad
    whole = ris_fast.cov_nmse(f, target_factor=s, sample_factor=x, blend=1.0)
    assert torch.allclose(whole, ris_fast.cov_nmse(x, target_factor=s))


def test_cov_nmse_computes_bfloat16_in_float32() -> None:
    f, s = drawn(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = (f.flatten(2) @ torch.eye(8)).view_as(f)
        assert low.dtype == torch.bfloat16
        low = low.detach().requires_grad_()
        loss = ris_fast.cov_nmse(low, target_factor=s)
    loss.backward()
    assert loss.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    assert torch.equal(loss.detach(), ris_fast.cov_nmse(low.detach().float(), target_factor=s))


@both_targets
def test_cov_nmse_with_inductor_equals_eager(kind: str) -> None:
    f, s = drawn(dtype=torch.float32)
    given = target(kind, s)

    def loss(x: Tensor) -> Tensor:
        return ris_fast.cov_nmse(x * 2.0, **given, loading=0.1)

    eager, compiled = f.clone().requires_grad_(), f.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    assert torch.allclose(eager.grad, compiled.grad, rtol=1e-5, atol=1e-9)


def test_cov_nmse_check_finite_names_the_scene_of_a_nan() -> None:
    for kind, place in (("factor", "factor"), ("factor", "target"), ("cov", "target")):
        f, s = drawn(dtype=torch.float32)
        (f if place == "factor" else s)[1, 3, 2, 0] = float("nan")
        loss = ris_fast.cov_nmse(f, **target(kind, s), reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        with pytest.raises(ValueError, match="scene 1 of the batch"):
            ris_fast.cov_nmse(f, **target(kind, s), check_finite=True)


def test_cov_nmse_equals_its_reference_at_the_size_limits() -> None:
    for n, q, k in ((16, 1, 1), (16, 32, 16), (1024, 10, 5)):
        t = random_tensors(2, n, q, k, 0, dense=False)
        args = (t["factor"], t["target_factor"], None, None, None, 0.0, 0.0, 0.0, 0.0)
        assert torch.allclose(
            ris_fast.cov_nmse(t["factor"], target_factor=t["target_factor"], reduction="none"),
            reference.cov_nmse(*args),
            rtol=1e-11,
        )
