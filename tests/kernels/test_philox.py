"""Laws of the counter-based random numbers: published vectors, one definition everywhere, and the statistics of N(0,
1)."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ris_fast.kernels.native import loader
from ris_fast.kernels.philox import op, reference
from tests.kernels.old_interpreter import skip_interpreter_of_old_triton

ULP = 4  # stated in the docstring of philox_normal
needs_cpp = pytest.mark.skipif(not loader.available(), reason=loader.why_not() or "built")


def ulps(value: Tensor, exact: Tensor) -> float:
    """Largest error in units of the last place of float32; exact zeros of cos and sin differ by 1e-15 in the
    reference."""
    spacing = torch.from_numpy(np.spacing(exact.float().abs().numpy())).double()
    return float(((value.double() - exact).abs() / spacing.clamp_min(1e-15)).max())


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The known answers of the authors' library, Random123: zeros, ones, digits of pi."""
    words = reference.philox4x32(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_philox_maps_counter_and_key_to_words() -> None:
    """Word i of scene b is word i mod 4 at counter (i // 4, stream, low, high) and key (seed low, seed high)."""
    index, seed, stream = 0x1234567_89ABCDEF, 0xFEDCBA98_76543210, 9
    row = op.philox_uniform(torch.tensor([index]), seed, stream, 11)[0].double()
    for i in range(11):
        counter = tuple(torch.tensor(c) for c in (i // 4, stream, index & 0xFFFFFFFF, index >> 32))
        word = int(reference.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[i % 4])
        assert float(row[i]) == ((word >> 8) + 1) / 2**24


def test_no_pair_of_normals_is_exactly_zero() -> None:
    """Where the uniform is 1, as in this scene, whose only source would have no amplitude."""
    index, seed, stream = torch.tensor([35432]), 298, 1
    assert float(op.philox_uniform(index, seed, stream, 2)[0, 0]) == 1.0
    exact = reference.normal(index, seed, stream, 2)
    assert float(exact.norm()) == pytest.approx(2.0**-11.5)
    assert ulps(op.philox_normal(index, seed, stream, 2), exact) <= ULP


@needs_cpp
@pytest.mark.parametrize("simd", loader.supported_levels())
@pytest.mark.parametrize("rows, count", [(1, 1), (3, 2), (5, 4099), (300, 20), (0, 4), (4, 0)])
def test_philox_agrees_with_the_definition_at_every_simd(simd: str, rows: int, count: int) -> None:
    index = torch.arange(rows) * -0x1234567_12345 + 2**33
    for law in ("uniform", "normal"):
        out = torch.full((rows, count), math.nan)
        call = loader.function(f"philox_{law}", op.ARGUMENTS, simd)
        call(out.data_ptr(), index.data_ptr(), rows, count, op.signed(2**64 - 3), 2**32 - 1)
        exact = getattr(reference, law)(index, 2**64 - 3, 2**32 - 1, count)
        if out.numel():
            assert torch.equal(out.double(), exact) if law == "uniform" else ulps(out, exact) <= ULP


@pytest.mark.parametrize("law", [op.philox_uniform, op.philox_normal])
def test_philox_value_depends_on_its_own_scene_alone(law) -> None:
    """Batch size, order, count and number of threads change no bit."""
    index = torch.randperm(500, generator=torch.Generator().manual_seed(0)) + 2**32 - 250
    every = law(index, 5, 1, 4101)
    assert torch.equal(law(index[7:8], 5, 1, 4101), every[7:8])
    assert torch.equal(law(index.flip(0), 5, 1, 4101), every.flip(0))
    assert torch.equal(law(index[::3], 5, 1, 13), every[::3, :13])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(law(index, 5, 1, 4101), every)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_philox_triton_agrees_in_the_interpreter() -> None:
    """Triton's interpreter in a process of its own: uniforms have the bits of the definition, normals are within 4
    ulp."""
    program = """
import torch
from ris_fast.kernels.philox import op, reference
index = torch.tensor([0, 1, 2**40 + 3, -1])
for seed, count in ((2, 512), (-5, 512), (2**62, 1023), (1, 1)):
    uniform, normal = op._triton_uniform(index, seed, 3, count), op._triton_normal(index, seed, 3, count)
    assert torch.equal(uniform.double(), reference.uniform(index, seed, 3, count))
    exact = reference.normal(index, seed, 3, count)
    assert bool(((normal - exact).abs() <= 4 * 2.0**-23 * exact.abs() + 1e-15).all())
one = torch.tensor([35432])  # whose first uniform is 1
assert torch.allclose(op._triton_normal(one, 298, 1, 2).double(), reference.normal(one, 298, 1, 2), rtol=1e-6, atol=0)
print("agrees")
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=env, capture_output=True, text=True)
    skip_interpreter_of_old_triton(done.stderr)
    assert done.stdout.strip() == "agrees", done.stderr


@pytest.mark.gpu
def test_philox_gpu_agrees() -> None:
    index = torch.arange(-50, 50)
    for count in (1, 20, 4608, 1023):
        exact = reference.normal(index, 2**64 - 1, 4, count)
        assert torch.equal(op.philox_uniform(index.cuda(), 9, 4, count).cpu(), op.philox_uniform(index, 9, 4, count))
        assert ulps(op.philox_normal(index.cuda(), 2**64 - 1, 4, count).cpu(), exact) <= ULP
    one = torch.tensor([35432])  # whose first uniform is 1
    assert ulps(op.philox_normal(one.cuda(), 298, 1, 2).cpu(), reference.normal(one, 298, 1, 2)) <= ULP


def test_philox_normal_is_exact_at_the_ends_of_the_range() -> None:
    """8 million values reach the ends of (0, 1], the far tails and the quarter turns, where polynomials fail first."""
    index = torch.arange(20000)
    uniform = op.philox_uniform(index, 1, 0, 400).flatten()
    assert 0 < float(uniform.min()) < 1e-6 and float(uniform.max()) > 1 - 1e-6
    normal, exact = op.philox_normal(index, 1, 0, 400), reference.normal(index, 1, 0, 400)
    assert ulps(normal, exact) <= ULP
    assert float(normal.abs().max()) > 5.0


def test_philox_normal_moments_and_tails() -> None:
    """First, second, fourth moment and tail counts of 8 million normals, each within five standard errors."""
    z = op.philox_normal(torch.arange(2000), 12345, 2, 4000).double().flatten()
    n = z.numel()
    moments = {1: (0.0, 1.0), 2: (1.0, 2.0), 3: (0.0, 15.0), 4: (3.0, 96.0), 6: (15.0, 10395.0 - 225.0)}
    for order, (mean, variance) in moments.items():
        assert abs(float(z.pow(order).mean()) - mean) < 5 * math.sqrt(variance / n), order
    for bound in (2.0, 3.0, 4.0, 4.5):
        for side in (z, -z):
            p = stats.norm.sf(bound)
            assert abs(int((side > bound).sum()) - n * p) < 5 * math.sqrt(n * p), bound


@pytest.mark.parametrize("seed, stream", [(0, 0), (1, 0), (0, 1), (2**63 + 11, 2**31)])
def test_philox_passes_kolmogorov_smirnov(seed: int, stream: int) -> None:
    """Kolmogorov-Smirnov, along a scene and across scenes at one position."""
    index = torch.arange(3000)
    normal, uniform = (
        op.philox_normal(index, seed, stream, 3000).double(),
        op.philox_uniform(index, seed, stream, 3000).double(),
    )
    for rows in (normal[17], normal[:, 4], normal[:, 2999]):
        assert stats.kstest(rows.numpy(), "norm").pvalue > 1e-4
    for rows in (uniform[17], uniform[:, 4]):
        assert stats.kstest(rows.numpy(), "uniform").pvalue > 1e-4


def test_philox_streams_seeds_and_scenes_are_uncorrelated() -> None:
    """No correlation between neighbours in position, scene, stream and seed, in the values or in their squares."""
    index = torch.arange(1000)
    z = op.philox_normal(index, 3, 0, 1000).double()
    others = {
        "stream": op.philox_normal(index, 3, 1, 1000),
        "seed": op.philox_normal(index, 4, 0, 1000),
        "seed high": op.philox_normal(index, 3 + 2**32, 0, 1000),
        "index": op.philox_normal(index + 1000, 3, 0, 1000),
        "index high": op.philox_normal(index + 2**32, 3, 0, 1000),
        "scene": z.roll(1, 0),
        "position": z.roll(1, 1),
        "pair": z.unflatten(1, (-1, 2)).flip(-1).flatten(1),
        "block": z.roll(4, 1),
    }
    for name, other in others.items():
        for a, b in ((z, other.double()), (z.square() - 1, other.double().square() - 1)):
            spread = float(a.square().mean()) / math.sqrt(a.numel())
            pairs = 2 if name == "pair" else 1  # every pair is counted twice
            assert abs(float((a * b).mean())) < 5 * spread * math.sqrt(pairs), name


def test_philox_is_traceable_and_not_differentiable() -> None:
    assert not any(sample.differentiable for operator in op.FAMILY.operators for sample in operator.samples)
    index = torch.arange(6)
    compiled = torch.compile(lambda i: op.philox_normal(i, 2**63, 1, 8), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index), op.philox_normal(index, 2**63, 1, 8)) and not compiled(index).requires_grad


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"stream": 2**32},
        {"stream": -1},
        {"count": -1},
        {"index_B": torch.zeros(2)},
        {"index_B": torch.zeros(2, 2, dtype=torch.int64)},
    ],
)
def test_philox_errors_say_what_to_do(change: dict) -> None:
    arguments = {"index_B": torch.arange(2), "seed": 0, "stream": 0, "count": 4} | change
    with pytest.raises(ValueError, match=r"philox_normal: \w+ is .*(must be in|pass scene numbers)"):
        op.philox_normal(**arguments)
