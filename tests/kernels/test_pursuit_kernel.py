"""Laws of the pursuit kernel: every instruction set against plain torch, one scene one set of bits, sizes of all
kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.kernels.cov_nmse.op import cov_nmse
from ris_fast.kernels.native import loader
from ris_fast.kernels.pursuit import op, reference
from ris_fast.kernels.pursuit.geometry import geometry
from ris_fast.kernels.pursuit.samples import SAMPLES, scenes
from ris_fast.kernels.pursuit.search import Geometry, Pursuit
from ris_fast.models.features import Features, PursuitFeatures
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate

NAMED = {sample.name: sample for sample in SAMPLES}
needs_cpp = pytest.mark.skipif(not loader.available(), reason=loader.why_not() or "built")
pytestmark = needs_cpp
# (batch, N_H, N_V, M, L, K): N from 16 to 1024, lanes and tiles filled and not, fewer equations than unknowns too
SIZES = [
    (3, 4, 4, 16, 16, 3),
    (2, 3, 1, 2, 3, 1),
    (2, 7, 5, 3, 5, 2),
    (2, 17, 1, 9, 8, 2),
    (2, 13, 11, 5, 33, 4),
    (2, 16, 16, 16, 16, 5),
    (2, 20, 20, 16, 16, 3),
    (1, 32, 32, 16, 16, 5),
]


def widened(value: Any) -> Any:
    return (
        [widened(each) for each in value]
        if isinstance(value, (list, tuple))
        else value.double()
        if isinstance(value, Tensor)
        else value
    )


def closeness(found: tuple[Tensor, ...], args: tuple[Any, ...]) -> float:
    """Largest error against float64, in units of what plain torch in float32 allows itself."""
    exact, eager = reference.pursuit_features(*widened(args)), reference.pursuit_features(*args)
    worst = 0.0
    for fast, plain, true in zip(found, eager, exact, strict=True):
        assert fast.shape == true.shape and fast.dtype == torch.float32
        error, allowed = (fast - true).norm(), (plain - true).norm() + 1e-6 * true.norm()
        worst = max(worst, float(error / allowed))
    return worst


def no_factors(constants: list[Tensor]) -> list[Tensor]:
    return [each[:0, :0, :0] for each in constants[9:]]


def force(monkeypatch: pytest.MonkeyPatch, simd: str) -> None:
    monkeypatch.setattr(op, "_native", lambda: loader.function("pursuit_features", op.ARGUMENTS, simd, op.c_int))


@pytest.mark.slow
@pytest.mark.parametrize("simd", loader.supported_levels())
@pytest.mark.parametrize("dense", [0, 1], ids=["through-H", "P"])
@pytest.mark.parametrize("name", [name for name in NAMED if name not in ("empty-batch", "wide")])
def test_pursuit_features_at_every_simd_are_as_exact_as_eager(
    name: str, dense: int, simd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, simd)
    args = NAMED[name].make("cpu", torch.float32)
    assert closeness(op._cpp(*args, dense=dense), args) < 2


@pytest.mark.parametrize("simd", loader.supported_levels())
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_pursuit_features_are_exact_at_any_size(
    sizes: tuple[int, ...], simd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, simd)
    args = scenes(*sizes, sector=0.3 if sizes[1] > 16 else 0.8, seed=1)
    assert closeness(op._cpp(*args), args) < 4  # two scenes: chance has its share in both errors


@pytest.mark.parametrize("atoms", range(1, 9))
def test_pursuit_features_are_exact_for_any_number_of_atoms(atoms: int) -> None:
    args = scenes(3, 12, 12, 16, 16, atoms, seed=2)
    assert closeness(op._cpp(*args), args) < 2


def test_pursuit_features_scene_has_its_own_bits() -> None:
    """Order, batch size and number of threads change nothing."""
    y, h, codes, snr_db, *rest = scenes(37, 7, 5, 13, 11, 3)
    together, threads = op.pursuit_features(y, h, codes, snr_db, *rest), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for order in (torch.arange(37), torch.arange(37).flip(0)[:20], torch.tensor([11])):
                for part, whole in zip(
                    op.pursuit_features(y[order], h[order], codes, snr_db[order], *rest), together, strict=True
                ):
                    assert torch.equal(part, whole[order])
    finally:
        torch.set_num_threads(threads)


def drawn(task: Task, which: int | Tensor, split: str = "val") -> tuple[PursuitFeatures, Scenes, tuple[Any, ...]]:
    """Features of a task, scenes of it (how many, or their numbers), and the operator's arguments for them."""
    model, found = PursuitFeatures(task, task.max_sources), simulate(task, which, SceneGenerator(5, split))
    return (
        model,
        found,
        (
            found.snapshots,
            found.channel,
            found.codes,
            found.snr_db,
            list(model.geometry()),
            model.wavenumber,
            model.atoms,
        ),
    )


def at(snr_db: float, **settings: Any) -> Task:
    return Task(snr_min_db=snr_db, snr_max_db=snr_db, **settings)


@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_pursuit_features_solve_the_task_as_well_as_torch(wavefront: str) -> None:
    """512 drawn scenes, ties and near-equal atoms among them: nearly all alike, and the same error of the
    covariance."""
    model, scenes, args = drawn(Task(wavefront=wavefront), 512)
    results = [Features(*run(*args)) for run in (op._cpp, op._plain)]
    alike = (results[0].inputs - results[1].inputs).abs().amax(1) < 1e-2
    assert alike.float().mean() > 0.97
    torch.testing.assert_close(results[0].basis[alike], results[1].basis[alike], rtol=0, atol=5e-3)
    fast, plain = (float(cov_nmse(model.sources(each), target_factor=scenes.factor)) for each in results)
    assert fast == pytest.approx(plain, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("snr_db", [40, 60, 80, 100, 120])
def test_pursuit_features_agree_with_torch_at_high_snr(snr_db: float) -> None:
    """Once the sources are found rounding chooses what is left, so the atoms differ; what they add up to does not."""
    model, _, args = drawn(at(snr_db), 256)
    fast, plain = (model.sources(Features(*run(*args))) for run in (op._cpp, op._plain))
    assert cov_nmse(fast, target_factor=plain, reduction="none").max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("run", [op._cpp, op._plain], ids=["cpp", "torch"])
@pytest.mark.parametrize("snr_db", [-100, -40, 40, 60, 80, 100, 120])
def test_pursuit_features_are_sensible_at_any_snr(snr_db: float, run: Any) -> None:
    """Sources within six degrees lie nearly in line with one another: ridges of the noise alone lose a tenth of them at
    60 dB."""
    for task, count in ((at(snr_db), 1000), (at(snr_db, range_min_m=5, azimuth_deg=3.0, elevation_deg=3.0), 300)):
        _, _, args = drawn(task, count if run is op._cpp else count // 5)
        inputs, basis = run(*args)
        assert inputs.isfinite().all() and basis.isfinite().all()
        assert inputs.abs().max() < 10 and basis.abs().max() < 3


@pytest.mark.slow
def test_pursuit_features_are_no_worse_with_less_noise() -> None:
    """The same scenes: those whose sources lie close together, where the ridge alone holds the amplitudes, decide the
    mean."""
    errors = []
    for snr_db in (20, 60, 120):
        model, scenes, args = drawn(at(snr_db), 2000)
        errors.append(float(cov_nmse(model.sources(Features(*op._cpp(*args))), target_factor=scenes.factor)))
    assert max(errors[1:]) <= errors[0]


def test_pursuit_grid_factors_find_what_the_dictionary_finds() -> None:
    """A grid whose places are out of order is no box: the kernel then takes the whole dictionary."""
    y, h, codes, snr_db, constants, wavenumber, atoms = scenes(16, 12, 12, 16, 16, 4)
    order = torch.randperm(len(constants[7]), generator=torch.Generator().manual_seed(0))
    dictionary = constants[8].unflatten(1, (2, -1))[..., order].flatten(1)
    shuffled = [*constants[:7], constants[7][order], dictionary, *no_factors(constants)]
    for a, b in zip(
        op._cpp(y, h, codes, snr_db, constants, wavenumber, atoms),
        op._cpp(y, h, codes, snr_db, shuffled, wavenumber, atoms),
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_pursuit_dictionary_is_made_only_where_it_is_read() -> None:
    """0.6 GB at 32 x 32, which the Fresnel path of a CPU never touches."""
    model = PursuitFeatures(Task(ris_horizontal=32, ris_vertical=32), 5)
    assert model.dictionary.numel() == 0 and len(model.grid) > 30_000
    whole = (2 * 1024, 2 * len(model.grid))
    assert model.to("meta").dictionary.shape == whole
    assert PursuitFeatures(Task(wavefront="spherical"), 5).dictionary.numel() > 0


def test_pursuit_on_cuda_reads_the_dictionary_only_without_factors() -> None:
    box, cuda = PursuitFeatures(Task(), 5).geometry(), torch.device("cuda")
    bare = box._replace(along_x=box.along_x[:0, :0, :0], along_y=box.along_y[:0, :0, :0])
    assert not op.reads_dictionary(cuda, box, 0.0, 5)
    for other, wavenumber, stages in ((box, 20.0, 5), (box, 0.0, op.MOST_ATOMS + 1), (bare, 0.0, 5)):
        assert op.reads_dictionary(cuda, other, wavenumber, stages)


def test_pursuit_geometry_has_factors_on_a_rectangle_alone() -> None:
    """The product of the factors is the steering vector of the grid, up to its norm."""
    _, _, _, _, constants, *_ = scenes(1, 5, 4, 2, 2, 1)
    found = Geometry(*constants)
    first, second = (torch.view_as_complex(each) for each in (found.along_x, found.along_y))
    product = torch.einsum("wxu,wyv->yxuvw", first, second).flatten(0, 1).flatten(1) / 20**0.5
    real, imag = Pursuit(found, 0.0, 0).steer(found.grid[None])[0].chunk(2, 1)
    torch.testing.assert_close(product, torch.complex(real, imag), rtol=0, atol=1e-5)
    for x, y in ((torch.arange(6.0), torch.tensor([0.0, 0, 0, 1, 1, 2])), (torch.arange(6.0), torch.zeros(6))):
        other = geometry(x, y, 1.0, found.low, found.high)
        assert (other.along_x.numel() > 0) == bool((y == y[0]).all())


def test_pursuit_grid_without_factors_needs_its_dictionary() -> None:
    y, h, codes, snr_db, constants, *rest = NAMED["small"].make("cpu", torch.float32)
    none, order = constants[8][:, :0], torch.randperm(len(constants[7]), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="with_dictionary"):
        op._cpp(y, h, codes, snr_db, [*constants[:7], constants[7][order], none, *no_factors(constants)], *rest)
    for a, b in zip(
        op._plain(y, h, codes, snr_db, [*constants[:8], none, *constants[9:]], *rest),
        op._plain(y, h, codes, snr_db, constants, *rest),
    ):
        assert torch.equal(a, b)


def test_pursuit_features_of_a_nan_scene_harm_no_other() -> None:
    y, h, *rest = NAMED["standard"].make("cpu", torch.float32)
    whole = op._cpp(y, h, *rest)
    y, h = y.clone(), h.clone()
    y[3], h[5], y[7] = float("nan"), float("inf"), 0.0
    found, others = op._cpp(y, h, *rest), [i for i in range(len(y)) if i not in (3, 5, 7)]
    for a, b in zip(found, whole, strict=True):
        assert torch.equal(a[others], b[others]) and not a[3].isfinite().all() and not a[5].isfinite().all()


def test_pursuit_features_work_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "available", lambda: False)
    args = NAMED["small"].make("cpu", torch.float32)
    for a, b in zip(op.pursuit_features(*args), reference.pursuit_features(*args), strict=True):
        assert torch.equal(a, b)


def test_pursuit_features_name_wrong_shapes() -> None:
    y, h, codes, snr_db, constants, *rest = NAMED["small"].make("cpu", torch.float32)
    with pytest.raises(ValueError, match=r"pursuit_features: codes is \(6, 20, 2\), expected \(7, 20, 2\)"):
        op.pursuit_features(y, h, codes[:-1], snr_db, constants, *rest)
    with pytest.raises(ValueError, match="pursuit_features: trust is"):
        op.pursuit_features(y, h, codes, snr_db, [*constants[:6], constants[6][:2], *constants[7:]], *rest)
    with pytest.raises(ValueError, match="0 stages"):
        op.pursuit_features(y, h, codes, snr_db, constants, rest[0], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in NAMED if name != "empty-batch"])
def test_pursuit_features_on_gpu_are_as_exact_as_eager(name: str) -> None:
    args = NAMED[name].make("cpu", torch.float32)
    moved = [
        [each.cuda() for each in a] if isinstance(a, list) else a.cuda() if isinstance(a, Tensor) else a for a in args
    ]
    assert closeness(tuple(each.cpu() for each in op.pursuit_features(*moved)), args) < 2
