"""The fused step's kernels against the float64 definition, at every instruction set, size and number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from ris_fast.kernels.fused_step import native, reference
from ris_fast.kernels.fused_step.arguments import TENSORS
from ris_fast.kernels.fused_step.layout import Segment, State, Telemetry, padded, tables
from ris_fast.kernels.fused_step.samples import FLATS, RESULTS, SIZES, buffers
from ris_fast.kernels.native import loader
from tests.kernels.old_interpreter import skip_interpreter_of_old_triton

needs_cpp = pytest.mark.skipif(not loader.available(), reason=loader.why_not() or "built")
LEVELS = loader.supported_levels()


def run(module: Any, made: dict[str, Any], phase: str, *extra: Any, **options: Any) -> None:
    getattr(module, phase)(*(made[name] for name in TENSORS[phase]), *extra, **options)


def step(module: Any, made: dict[str, Any], clear: bool = True, **options: Any) -> None:
    run(module, made, "measure", True, **options)
    run(module, made, "apply", clear, **options)


def distance(value: Tensor, exact: Tensor) -> float:
    """Relative error over the finite values; infinite where they are not finite at the same places."""
    value, exact = value.double(), exact.double()
    if not torch.equal(value.isfinite(), exact.isfinite()):
        return float("inf")
    return float((value - exact).nan_to_num(0, 0, 0).norm() / exact.nan_to_num(0, 0, 0).norm().clamp_min(1e-30))


def check(made: dict[str, Any], eager: dict[str, Any], exact: dict[str, Any], phases: tuple[str, ...]) -> None:
    """At most twice the error of the definition in float32, or two roundings of float32."""
    for name in {name for phase in phases for name in RESULTS[phase]}:
        allowed = max(2 * distance(eager[name], exact[name]), 2**-23)
        assert distance(made[name], exact[name]) <= allowed, name


@needs_cpp
@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("sizes", SIZES)
def test_fused_step_agrees_with_the_definition(simd: str, sizes: str) -> None:
    made, eager, exact = (buffers(SIZES[sizes], dtype=dtype) for dtype in (torch.float32, torch.float32, torch.float64))
    for clear in (False, True):
        step(native, made, clear, simd=simd)
        step(reference, eager, clear)
        step(reference, exact, clear)
    check(made, eager, exact, ("measure", "apply"))
    assert not made["grad"].any()


@needs_cpp
@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bad", [False, True])
def test_fused_step_reads_gradients_outside_the_buffer(simd: str, sizes: str, bad: bool) -> None:
    """At any address, without padding, and unchanged; what stands behind them is not read as theirs."""
    made, moved = buffers(SIZES[sizes]), buffers(SIZES[sizes])
    outside = []
    for start, numel in zip(made["starts"], SIZES[sizes], strict=True):
        room = torch.full((numel + 2,), float("nan"))  # the gradient begins four bytes into it
        room[1:-1] = made["grad"][start : start + numel]
        outside.append(room[1:-1])
    if bad and outside[-1].numel():
        outside[-1][-1] = made["grad"][made["starts"][-1] + SIZES[sizes][-1] - 1] = float("inf")
    kept, moved["grad"][:] = [g.clone() for g in outside], 7.0
    sources = torch.tensor([[g.data_ptr() for g in outside], SIZES[sizes]])
    for each, *more in ((made,), (moved, sources)):
        run(native, each, "measure", True, *more, simd=simd)
        run(native, each, "apply", bool(more), *more, simd=simd)
    assert all(map(torch.equal, outside, kept)) and bool((moved["grad"] == 7.0).all())
    for name in set(RESULTS["measure"] + RESULTS["apply"]) - {"grad"}:  # sums are added in another order
        torch.testing.assert_close(moved[name], made[name], rtol=1e-6, atol=0, equal_nan=True)


@needs_cpp
@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_fused_step_accumulate_agrees_with_the_definition(simd: str, overwrite: bool) -> None:
    """Float32 and bfloat16 gradients in one call, an absent one, and the norm folded in."""
    results = []
    for module, dtype, options in (
        (native, torch.float32, {"simd": simd}),
        (reference, torch.float32, {}),
        (reference, torch.float64, {}),
    ):
        made = buffers(SIZES["few"], [True, True, True, True, True, False], dtype=dtype)
        made["gradients"] = [g.float().bfloat16() if i % 2 else g for i, g in enumerate(made["gradients"])]
        made["gradients"][5] = made["grad"][:0]
        run(module, made, "accumulate", 0.3, overwrite, True, **options)
        results.append(made)
    check(*results, ("accumulate",))


@needs_cpp
@pytest.mark.parametrize("sizes", SIZES)
def test_fused_step_has_the_same_bits_with_any_threads(sizes: str) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made = buffers(SIZES[sizes])
            step(native, made)
            results.append(made)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name in (*FLATS, "sums", "telemetry", "state", "coefficients"):
            assert torch.equal(other[name], results[0][name]), name


@pytest.mark.parametrize("module", [reference, pytest.param(native, marks=needs_cpp)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_fused_step_skips_and_names_a_non_finite_gradient(module: Any, value: float) -> None:
    made = buffers(SIZES["few"])
    made["grad"][int(made["segments"][3, Segment.START]) + 8999] = value  # the last element of a tensor
    made["grad"][int(made["segments"][5, Segment.START])] = value
    before = {name: made[name].clone() for name in (*FLATS, "steps", "state")}
    step(module, made)
    for name in ("param", "exp_avg", "exp_avg_sq", "ema", "steps"):
        assert torch.equal(made[name], before[name]), name
    assert not made["grad"].any()
    assert made["state"][State.SKIPPED] == 1 and made["state"][State.APPLIED] == before["state"][State.APPLIED]
    assert made["state"][State.FIRST_BAD] == 3 and made["state"][State.SCALE] == before["state"][State.SCALE] / 2
    assert made["telemetry"][:, Telemetry.NONFINITE].tolist() == [0, 0, 0, 1, 0, 1]
    assert not made["telemetry"][:, Telemetry.UPDATE_NORM].any()


@pytest.mark.parametrize("module", [reference, pytest.param(native, marks=needs_cpp)])
def test_fused_step_takes_a_gradient_whose_square_overflows(module: Any) -> None:
    made = buffers((100, 100))
    made["grad"][3] = 1e30
    step(module, made)
    assert made["state"][State.SKIPPED] == 0 and made["state"][State.NORM] == pytest.approx(
        float(torch.tensor(1e30)) / 8, rel=1e-7
    )
    assert made["param"].isfinite().all()


@pytest.mark.parametrize("module", [reference, pytest.param(native, marks=needs_cpp)])
def test_fused_step_leaves_a_tensor_without_gradient_alone(module: Any) -> None:
    made = buffers((100, 5000, 70), [True, False, True])
    made["grad"][128 : 128 + 5000] = float("nan")  # stale
    before = {name: made[name].clone() for name in FLATS}
    step(module, made)
    for name in FLATS:
        assert torch.equal(
            made[name][128 : 128 + padded(5000)].nan_to_num(7), before[name][128 : 128 + padded(5000)].nan_to_num(7)
        ), name
    assert made["steps"].tolist() == [1 + 1, 1, 3 + 1] and made["state"][State.SKIPPED] == 0
    assert not torch.equal(made["param"][:100], before["param"][:100])


@pytest.mark.parametrize("module", [reference, pytest.param(native, marks=needs_cpp)])
def test_fused_step_loss_scale_grows_after_clean_steps(module: Any) -> None:
    made = buffers((10,))
    scales = []
    for _ in range(7):
        step(module, made, clear=False)
        scales.append(float(made["state"][State.SCALE]))
    first = float(buffers((10,))["state"][State.SCALE])
    assert [scale / first for scale in scales] == [2, 2, 2, 2, 2, 4, 4]  # `buffers` left four clean steps of five


def test_fused_step_chunks_cover_every_live_row_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        numels = torch.randint(0, 20000, (12,), generator=generator).tolist()
        live = (torch.rand(12, generator=generator) < 0.7).tolist()
        segments, chunks = tables(numels, [0] * 12, live, 4096)
        covered = torch.zeros(int(segments[:, Segment.PADDED].sum()), dtype=torch.int32)
        for start, length, segment in chunks.tolist():
            assert live[segment] and start % 64 == 0 and length % 64 == 0 and length <= 4096
            covered[start : start + length] += 1
        for (_, count, _, start, length), there in zip(segments.tolist(), live, strict=True):
            assert (count > 0) == there and bool((covered[start : start + length] == there).all())


INTERPRETED = """
import torch
from ris_fast.kernels.fused_step import reference, triton_kernels
from test_fused_step import SIZES, buffers, check, run, step
def three(sizes, live=None, bad=None):
    dtypes = (torch.float32, torch.float32, torch.float64)
    made = [buffers(sizes, live, triton_kernels.CHUNK, dtype) for dtype in dtypes]
    for each in made:
        if bad is not None:
            each["grad"][bad] = float("nan")
    return zip(made, (triton_kernels, reference, reference)), made
few = SIZES["few"]
cases = [(few, None, None), (few, [1, 0, 1, 1, 0, 1], None), (few, None, 70)]
cases += [((0,), None, None), ((64,) * 300, None, None)]
for sizes, live, bad in cases:
    pairs, made = three(sizes, live, bad)
    for each, module in pairs:
        for clear in ((True,) if len(sizes) == 300 else (False, True)):
            step(module, each, clear)
    check(*made, ("measure", "apply"))
    assert not made[0]["tickets"][:-1].any()
pairs, made = three(SIZES["few"])
for each, module in pairs:
    run(module, each, "measure", False); run(module, each, "decide")
check(*made, ("decide",))
for overwrite in (False, True):
    pairs, made = three(SIZES["few"])
    for each, module in pairs:
        each["gradients"] = [g.float().bfloat16() if i % 2 else g for i, g in enumerate(each["gradients"])]
        run(module, each, "accumulate", 0.3, overwrite, True)
    check(*made, ("accumulate",))
print("agrees")
"""


@pytest.mark.slow
def test_fused_step_triton_agrees_in_the_interpreter() -> None:
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", INTERPRETED], env=env, capture_output=True, text=True)
    skip_interpreter_of_old_triton(done.stderr)
    assert done.stdout.strip() == "agrees", done.stderr[-3000:]
