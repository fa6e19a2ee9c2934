"""FusedAdamW computes what torch's AdamW, clip_grad_norm_ and a foreach average compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast import FusedAdamW
from ris_fast.kernels.native import loader

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not loader.available(), reason=loader.why_not() or "built")),
]
SHAPES = [(64, 33), (33,), (1,), (5, 7, 3), (128, 64), ()]


def tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    """Gradients that depend on the step alone, of changing size, so that some steps are clipped and some are not."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) * 10 ** (step % 5 - 2) for p in params]


def train(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int,
    before: Callable[[int], None] = lambda _: None, after: Callable[[int], None] = lambda _: None,
) -> None:  # fmt: skip
    for step in range(steps):
        optimizer.zero_grad()
        for p, gradient in zip(params, gradients(params, step), strict=True):
            p.grad = gradient if p.grad is None else p.grad.copy_(gradient)
        before(step)
        optimizer.step()
        after(step)


def torch_run(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    steps: int,
    clip: float | None = None,
    decay: float | None = None,
    # fmt: skip
    optimizer: Callable[..., Any] = torch.optim.AdamW,
    **options: Any,
) -> tuple[list[nn.Parameter], list[Tensor]]:
    """What a user assembles from torch: clip, step, average."""
    params = tensors(shapes, dtype)
    average = [p.detach().clone() for p in params]

    def before(_: int) -> None:
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)

    def after(_: int) -> None:
        if decay is not None:
            torch._foreach_lerp_(average, [p.detach() for p in params], 1 - decay)

    train(params, optimizer(params, **options), steps, before, after)
    return params, average


def relative(values: list[Tensor], exact: list[Tensor]) -> float:
    a, b = (torch.cat([x.detach().double().flatten() for x in each]) for each in (values, exact))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_fused_adamw_matches_torch_over_200_steps(backend: str, dtype: torch.dtype, limit: float) -> None:
    options = {"lr": 3e-3, "weight_decay": 0.1}
    exact, exact_average = torch_run(SHAPES, dtype, 200, 2.0, 0.99, **options)
    params = tensors(SHAPES, dtype)
    ours = FusedAdamW(params, max_grad_norm=2.0, ema_decay=0.99, backend=backend, **options)
    train(params, ours, 200)
    assert ours.backend == (backend if dtype == torch.float32 else "reference")
    assert relative(params, exact) < limit
    with ours.ema():
        assert relative(params, exact_average) < limit
    assert relative(params, exact) < limit
    counters = ours.counters()
    assert counters["attempted"] == counters["applied"] == 200 and 0 < counters["clipped"] < 200


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [
    {"betas": (0.0, 0.5)}, {"betas": (0.4, 0.3)}, {"eps": 1e-2}, {"maximize": True}, {"lr": 0.0},
    {"weight_decay": 0.0}, {"lr": torch.tensor(1e-2)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("form", ["AdamW", "Adam"])
def test_fused_adamw_matches_torch_in_every_setting(backend: str, options: dict[str, Any], form: str) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.05} | options
    exact, _ = torch_run(SHAPES, torch.float32, 20, optimizer=getattr(torch.optim, form), **options)
    params = tensors(SHAPES, torch.float32)
    train(params, FusedAdamW(params, backend=backend, decoupled_weight_decay=form == "AdamW", **options), 20)
    assert relative(params, exact) < 1e-6


def test_fused_adamw_passes_torchs_own_table_of_settings() -> None:
    """The settings on which torch tests its AdamW; those that FusedAdamW refuses are refused by name."""
    common = pytest.importorskip("torch.testing._internal.common_optimizers")
    record = next(info for info in common.optim_db if info.optim_cls is torch.optim.AdamW)
    served = 0
    for given in record.optim_inputs_func(device="cpu", dtype=torch.float32):
        options = {key: value for key, value in given.kwargs.items() if key != "fused"}
        if options.get("amsgrad"):
            with pytest.raises(ValueError, match="amsgrad"):
                FusedAdamW(tensors(SHAPES, torch.float32), **options)
            continue
        exact, _ = torch_run(SHAPES, torch.float32, 10, **copy.deepcopy(options))
        params = tensors(SHAPES, torch.float32)
        train(params, FusedAdamW(params, **copy.deepcopy(options)), 10)
        assert relative(params, exact) < 1e-6, given.desc
        served += 1
    assert served >= 4
    for wrong in record.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = wrong.optimizer_error_input
        if (
            "ensor" not in given.desc or "1-element" in given.desc
        ):  # tensors as lr or betas are taken in more places than torch's
            with pytest.raises((ValueError, TypeError, UserWarning)):
                FusedAdamW(given.params, **given.kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_adamw_in_half_is_closer_to_float64_than_torch(dtype: torch.dtype) -> None:
    exact, _ = torch_run(SHAPES, torch.float64, 50, lr=1e-2)
    plain, _ = torch_run(SHAPES, dtype, 50, lr=1e-2, foreach=False)
    params = tensors(SHAPES, dtype)
    ours = FusedAdamW(params, lr=1e-2, ema_decay=0.9)
    train(params, ours, 50)
    assert not relative(plain, exact) < relative(
        params, exact
    )  # in float16 torch's eps is zero and its result infinite
    assert ours.buckets[0].ema.dtype == torch.float32


def test_fused_adamw_float16_survives_squares_that_underflow() -> None:
    """In float16 torch's AdamW ends in not-a-number here: eps = 1e-8 is zero, and so is (1 - beta2) g^2."""
    params, exact = [nn.Parameter(torch.ones(4, dtype=kind)) for kind in (torch.float16, torch.float32)]
    ours, plain = FusedAdamW([params], lr=1e-2, weight_decay=0.0), torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.0)
    for n in range(60):
        exact.grad = torch.tensor([1e-3, 1e-5 * (n % 2), 3e-2, float(n == 0)]).half().float()
        params.grad = exact.grad.half()
        ours.step(), plain.step()
    assert ours.counters()["skipped"] == 0
    torch.testing.assert_close(params.float(), exact, rtol=0, atol=60 * torch.finfo(torch.float16).eps / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_adamw_saves_half_precision_state_exactly(dtype: torch.dtype) -> None:
    runs = [(params := tensors(SHAPES, dtype), FusedAdamW(params, lr=1e-2, ema_decay=0.9)) for _ in range(2)]
    (params, ours), (others, restored) = runs
    train(params, ours, 3)
    for p, other in zip(params, others, strict=True):
        other.data.copy_(p)
    restored.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(params, ours, 3), train(others, restored, 3)
    with ours.ema(), restored.ema():
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    for bucket, other in zip(ours.buckets, restored.buckets, strict=True):
        assert (
            bucket.ema.dtype == torch.float32
            and torch.equal(bucket.ema, other.ema)
            and torch.equal(bucket.exp_avg_sq, other.exp_avg_sq)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_fused_adamw_averages_tensors_without_gradient_too(dtype: torch.dtype) -> None:
    """As that of torch.optim.swa_utils.AveragedModel, which moves all tensors in every step; not in a skipped one."""
    params = tensors([(70,), (3,), (130,), (2, 2)], dtype)
    ours = FusedAdamW(params, lr=0.1, ema_decay=0.9)
    averages = [p.detach().to(torch.complex64 if dtype.is_complex else torch.float32).clone() for p in params]
    for step in range(12):
        ours.zero_grad()
        for i in ((0, 1, 2, 3), (1,), (0, 3))[step % 3]:
            params[i].grad = torch.ones_like(params[i])
        if step == 7:
            params[1].grad[0] = float("inf")
        ours.step()
        if step != 7:
            for average, p in zip(averages, params, strict=True):
                average.add_(p.detach() - average, alpha=0.1)
    for average, p in zip(averages, params, strict=True):
        torch.testing.assert_close(ours.state[p]["ema"], average, rtol=1e-5, atol=1e-6)


def test_fused_adamw_matches_torch_on_complex_parameters() -> None:
    exact, _ = torch_run([(5, 3), (7,)], torch.complex64, 20, lr=1e-2)
    params = tensors([(5, 3), (7,)], torch.complex64)
    train(params, FusedAdamW(params, lr=1e-2), 20)
    assert (
        relative([torch.view_as_real(p.detach()) for p in params], [torch.view_as_real(p.detach()) for p in exact])
        < 1e-6
    )


def test_fused_adamw_mixed_dtypes_share_one_norm() -> None:
    def mixed() -> list[nn.Parameter]:
        return [*tensors([(40, 3), (9,)], torch.float32), *tensors([(33,), (8, 8)], torch.float64)]

    params, exact = mixed(), mixed()
    ours, plain = FusedAdamW(params, lr=1e-2, max_grad_norm=1.0, backend="auto"), torch.optim.AdamW(exact, lr=1e-2)
    train(
        exact, plain, 20, lambda _: torch._foreach_mul_([p.grad for p in exact], min(1.0, 1.0 / (norm(exact) + 1e-6)))
    )
    train(params, ours, 20)
    assert relative(params, exact) < 1e-6
    assert ours.counters()["clipped"] > 0
    params[3].grad.fill_(float("nan"))
    before = [p.detach().clone() for p in params]
    ours.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert ours.counters()["first_bad_tensor"] == "group0.3" and ours.telemetry()[3, 3] == 64
    assert ours.telemetry()[:, 3].tolist() == [0, 0, 0, 64]


def norm(params: list[nn.Parameter]) -> float:
    return float(torch.stack([p.grad.double().norm() for p in params]).norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shapes",
    [[(0,)], [(1,)], [(0, 4), (3,)], [(63,), (64,), (65,)], [(7,)] * 2000],
    ids=["empty", "one", "some empty", "near a row", "2000"],
)
def test_fused_adamw_matches_torch_at_every_size(backend: str, shapes: list[tuple[int, ...]]) -> None:
    exact, _ = torch_run(shapes, torch.float32, 3, 1.0, lr=1e-2)
    params = tensors(shapes, torch.float32)
    ours = FusedAdamW(params, lr=1e-2, max_grad_norm=1.0, backend=backend)
    train(params, ours, 3)
    assert sum(p.numel() for p in params) == 0 or relative(params, exact) < 1e-6
    assert [float(ours.state[p]["step"]) for p in params] == [3.0] * len(params)


@pytest.mark.slow
def test_fused_adamw_matches_torch_with_20_million_parameters() -> None:
    params, exact = tensors([(20_000_000,)], torch.float32), tensors([(20_000_000,)], torch.float32)
    for each, optimizer in ((params, FusedAdamW(params)), (exact, torch.optim.AdamW(exact, fused=True))):
        each[0].grad = each[0].detach() * 0.01
        optimizer.step()
    assert relative(params, exact) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_adamw_telemetry_is_what_it_says(backend: str) -> None:
    params = tensors(SHAPES, torch.float32)
    ours = FusedAdamW(params, lr=1e-2, max_grad_norm=0.1, loss_scale=4.0, backend=backend)
    old = [p.detach().clone() for p in params]
    for p, gradient in zip(params, gradients(params, 2), strict=True):
        p.grad = gradient
    expected = torch.stack([torch.stack([p.grad.double().norm() / 4, p.detach().double().norm()]) for p in params])
    ours.step()
    table = ours.telemetry().double()
    expected[:, 1] = torch.stack([p.detach().double().norm() for p in params])
    moved = torch.stack([(p.detach().double() - o.double()).norm() for p, o in zip(params, old, strict=True)])
    torch.testing.assert_close(
        table,
        torch.cat([expected, moved[:, None], torch.zeros(len(params), 1, dtype=torch.float64)], 1),
        rtol=1e-6,
        atol=1e-12,
    )
    assert ours.counters()["grad_norm"] == pytest.approx(float(expected[:, 0].norm()), rel=1e-6)
    ours.measure_telemetry = False
    ours.step()
    with pytest.raises(RuntimeError, match="switched off"):
        ours.telemetry()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_adamw_ema_warms_up_in_applied_steps(backend: str) -> None:
    params = tensors([(50,)], torch.float32)
    ours = FusedAdamW(params, lr=0.1, ema_decay=0.9, ema_warmup=True, backend=backend)
    average, applied = params[0].detach().double().clone(), 0
    for step in range(100):
        params[0].grad = gradients(params, step)[0]
        if step % 7 == 3:
            params[0].grad[3] = float("inf")
        ours.step()
        if step % 7 != 3:
            applied += 1
            average.lerp_(params[0].detach().double(), 1 - min(0.9, (1 + applied) / (10 + applied)))
    with ours.ema():
        assert relative(params, [average]) < 1e-6
    assert ours.counters()["applied"] == applied and ours.counters()["skipped"] == 100 - applied


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_adamw_accumulate_equals_backward(backend: str) -> None:
    """`accumulate` with the norm folded in gives the bits that separate accumulation and step give."""
    results = []
    for last in (False, True):
        params = tensors(SHAPES, torch.float32)
        ours = FusedAdamW(params, lr=1e-2, max_grad_norm=1.0, backend=backend)
        for step in range(5):
            for micro in range(3):
                ours.accumulate(
                    gradients(params, 10 * step + micro), 1 / 3, overwrite=micro == 0, last=last and micro == 2
                )
            ours.step()
        results.append(params)
    exact = tensors(SHAPES, torch.float32)
    plain = torch.optim.AdamW(exact, lr=1e-2)
    for step in range(5):
        for p, *parts in zip(exact, *(gradients(exact, 10 * step + micro) for micro in range(3)), strict=True):
            p.grad = torch.stack(parts).mean(0)
        nn.utils.clip_grad_norm_(exact, 1.0)
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert relative(results[0], exact) < 1e-6


def test_fused_adamw_backward_after_accumulate_measures_again() -> None:
    params = tensors([(10,)], torch.float32)
    ours = FusedAdamW(params)
    ours.accumulate([torch.ones(10)], last=True)
    (params[0] * 2).sum().backward()
    ours.step()
    assert ours.counters()["grad_norm"] == pytest.approx(3 * 10**0.5)
    with pytest.raises(ValueError, match="2 gradients for 1 parameters"):
        ours.accumulate([None, None])
