"""Laws of the scene kernel: every instruction set against float64, one scene one set of bits, memory left alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ris_fast.kernels.native import loader
from ris_fast.kernels.scenes import op
from ris_fast.kernels.scenes.samples import SAMPLES
from tests.kernels.old_interpreter import skip_interpreter_of_old_triton

OPERATOR = op.FAMILY.operators[0]
NAMED = {sample.name: sample for sample in SAMPLES}
needs_cpp = pytest.mark.skipif(not loader.available(), reason=loader.why_not() or "built")


def arguments(name: str, dtype: torch.dtype = torch.float32) -> list:
    return list(NAMED[name].make("cpu", dtype))


def rows(args: list, chosen: Tensor) -> list:
    """The same call for some of its scenes."""
    shared = (5, 6) if args[6].dim() == 3 else (5,)  # positions, and codes where they are one set
    return [each[chosen] if isinstance(each, Tensor) and i not in shared else each for i, each in enumerate(args)]


@needs_cpp
@pytest.mark.parametrize("simd", loader.supported_levels())
@pytest.mark.parametrize("name", list(NAMED))
def test_scene_kernel_at_every_simd_is_as_exact_as_eager(name: str, simd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 4 times the error that plain torch makes in float32: the normals that go in are within 4 ulp, torch's
    within 1/2."""
    monkeypatch.setattr(op, "_native", lambda: loader.function("scenes", op.ARGUMENTS, simd, op.c_int))
    single, exact = arguments(name), OPERATOR.reference(*arguments(name, torch.float64))
    for fast, eager, true in zip(op._cpp(*single), OPERATOR.reference(*single), exact):
        assert fast.shape == true.shape and fast.dtype == torch.float32
        if true.numel():
            assert (fast - true).abs().max() <= 4 * (eager - true).abs().max()


@pytest.mark.parametrize("name", ["standard", "moving", "spherical", "odd", "own-codes", "own-channel"])
def test_scene_kernel_scene_has_its_own_bits(name: str) -> None:
    """Order, batch size and number of threads change nothing."""
    args = arguments(name)
    together, threads = OPERATOR.call(*args), torch.get_num_threads()
    order = torch.arange(len(args[0])).flip(0)[: 1 + len(args[0]) // 2]
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        for part, whole in zip(OPERATOR.call(*rows(args, order)), together):
            assert torch.equal(part, whole[order])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["standard", "odd"])
def test_scene_kernel_works_without_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the C++ kernels were not built, plain torch makes them."""
    monkeypatch.setattr(loader, "available", lambda: False)
    slow, exact = OPERATOR.call(*arguments(name)), OPERATOR.reference(*arguments(name, torch.float64))
    for found, true in zip(slow, exact):
        assert (found - true).abs().max() < 2e-6 * true.abs().max()


@pytest.mark.slow
def test_scene_kernel_triton_is_as_exact_as_eager() -> None:
    """Triton's interpreter in a process of its own, static and moving symbols, both wavefronts."""
    program = """
import torch
from ris_fast.kernels.scenes import op
operator = op.FAMILY.operators[0]
for sample in operator.samples:
    if sample.small or sample.name == "empty-batch":
        args = sample.make("cpu", torch.float32)
        exact = operator.reference(*sample.make("cpu", torch.float64))
        for fast, eager, true in zip(operator.backends["triton"](*args), operator.reference(*args), exact):
            assert fast.shape == true.shape
            assert fast.numel() == 0 or (fast - true).abs().max() <= 4 * (eager - true).abs().max(), sample.name
print("agrees")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    skip_interpreter_of_old_triton(done.stderr)
    assert done.stdout.strip() == "agrees", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(NAMED))
def test_scene_kernel_on_gpu_is_as_exact_as_eager(name: str) -> None:
    single, exact = arguments(name), OPERATOR.reference(*arguments(name, torch.float64))
    fast = OPERATOR.call(*[each.cuda() if isinstance(each, Tensor) else each for each in single])
    for found, eager, true in zip(fast, OPERATOR.reference(*single), exact):
        if true.numel():
            assert (found.cpu() - true).abs().max() <= 4 * (eager - true).abs().max()


def test_scene_kernel_draws_depend_on_index_and_stream() -> None:
    """Another index, seed or channel stream changes the channel; the noise stream changes the snapshots alone."""
    args = arguments("standard")
    channel, snapshots, factor = OPERATOR.call(*args)
    for position, changes in ((0, (True, True)), (1, (True, True)), (2, (True, True)), (3, (False, True))):
        other = list(args)
        other[position] = args[position] + 1
        found = OPERATOR.call(*other)
        differs = [bool((a != b).flatten(1).any(1).all()) for a, b in zip(found, (channel, snapshots, factor))]
        assert differs == [*changes, False]


def test_scene_kernel_noise_has_the_power_of_the_snr() -> None:
    """Noise at 10 dB over many seeds: a tenth of the clean power of the same scene, part by part."""
    args = arguments("standard")
    ratios = []
    for seed in range(200):
        args[1] = seed
        args[-2] = torch.full_like(args[-2], 300.0)
        clean = OPERATOR.call(*args)[1]
        args[-2] = torch.full_like(args[-2], 10.0)
        noise = OPERATOR.call(*args)[1] - clean
        ratios.append(noise.square().mean((1, 2, 3)) / clean.square().mean((1, 2, 3)))
    ratio = torch.cat(ratios).double()
    assert abs(float(ratio.mean()) - 0.1) < 5 * float(ratio.std()) / math.sqrt(ratio.numel())


def test_make_scenes_names_wrong_shapes() -> None:
    names = [argument.name for argument in OPERATOR.call._schema.arguments]
    call = dict(zip(names, arguments("standard"), strict=True))
    index = call.pop("index")
    with pytest.raises(ValueError, match=r"make_scenes: los_direction is \(8, 2\) torch.float32, expected \(8, 3\)"):
        op.make_scenes(index, **call | {"los_direction": call["los_direction"][:, :2]})
    with pytest.raises(ValueError, match="snr_db is .* torch.float64, expected"):
        op.make_scenes(index, **call | {"snr_db": call["snr_db"].double()})


@pytest.mark.parametrize("native", [True, False], ids=["as here", "plain torch"])
def test_scene_kernel_compiles_without_graph_break(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(loader, "available", lambda: False)
    args = arguments("one-scene")
    compiled = torch.compile(lambda *a: OPERATOR.call(*a)[1] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), OPERATOR.call(*args)[1] * 2)
