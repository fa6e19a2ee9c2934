"""FusedAdamW on CUDA: equals torch, two launches, no host synchronisation, graph replay equals eager. Skipped without a
GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ris_fast import FusedAdamW
from ris_fast.training.telemetry.step_window import Window

pytestmark = pytest.mark.gpu
SHAPES = [(64, 33), (1,), (300, 301), (0,), (4096,), (9000,)]


def build(**options: Any) -> tuple[list[nn.Parameter], FusedAdamW]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).cuda()) for shape in SHAPES]
    return params, FusedAdamW(
        params, lr=1e-2, max_grad_norm=1.0, ema_decay=0.9, ema_warmup=True, clear_grads=True, **options
    )


def fill(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        gradient = torch.randn(p.shape, generator=generator).cuda()
        p.grad = gradient if p.grad is None else p.grad.copy_(gradient)


def test_fused_adamw_on_gpu_equals_the_reference() -> None:
    params, ours = build()
    exact, reference = build(backend="reference")
    assert (ours.backend, reference.backend) == ("triton", "reference")
    for step in range(50):
        for each, optimizer in ((params, ours), (exact, reference)):
            fill(each, step)
            if step == 20:
                each[2].grad[7, 7] = float("nan")
            optimizer.step()
    for a, b in zip(params, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.telemetry(), reference.telemetry(), rtol=1e-5, atol=1e-6)
    ours_read, reference_read = ours.counters(), reference.counters()
    assert ours_read.pop("grad_norm") == pytest.approx(reference_read.pop("grad_norm"), rel=1e-5)
    assert ours_read == reference_read and ours_read["first_bad_tensor"] == "group0.2"


def test_fused_adamw_step_is_two_launches_without_sync() -> None:
    params, ours = build()
    fill(params, 0)
    ours.step()
    ours.param_groups[0]["lr"] = 3e-3
    fill(params, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            ours.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    kernels = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "_kernel" in event.name
    ]
    assert sorted(kernels) == ["apply_kernel", "measure_kernel"]


def test_fused_adamw_records_without_sync() -> None:
    params, ours = build(records=8)
    fill(params, 0)
    ours.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step()
        records, numbers = ours.records()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert numbers.tolist() == [0, 1, 2, 0, 0, 0, 0, 0] and records[1].equal(records[2]) is False


def test_fused_adamw_graph_replay_equals_eager_bitwise() -> None:
    """Learning rate, clip threshold and EMA decay change between replays; records find their slots."""
    params, ours = build(records=8)
    exact, eager = build(records=8)
    for each, optimizer in ((params, ours), (exact, eager)):
        fill(each, 0)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for step in range(1, 20):
        for each, optimizer in ((params, ours), (exact, eager)):
            optimizer.param_groups[0]["lr"], optimizer.max_grad_norm, optimizer.ema_decay = (
                1e-2 / step,
                1.0 + step,
                1 - 1 / (step + 2),
            )
            optimizer.sync_hyperparameters()
            fill(each, step)
        graph.replay()
        eager.step()
    assert all(torch.equal(a, b) for a, b in zip(params, exact, strict=True))
    assert ours.counters() == eager.counters() and ours.counters()["applied"] == 20
    kept, seen = (Window.after(0, *(each.cpu() for each in optimizer.records()), 0) for optimizer in (ours, eager))
    assert kept.numbers == seen.numbers == list(range(13, 21)) and torch.equal(kept.table, seen.table)
    assert torch.equal(kept.table[-1], ours.telemetry().cpu())
    with ours.ema(), eager.ema():
        assert all(torch.equal(a, b) for a, b in zip(params, exact, strict=True))


def test_fused_adamw_refuses_capture_without_gradients() -> None:
    _, ours = build()
    with pytest.raises(RuntimeError, match="Step once before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ours.step()
