"""Networks and estimators answer alike in every unit, precision and form of their inputs, and name what they cannot
take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ris_fast.config.schema import Task
from ris_fast.kernels.native import loader
from ris_fast.kernels.pursuit.op import pursuit_features
from ris_fast.kernels.pursuit.samples import scenes as pursuit_scenes
from ris_fast.kernels.scale import power_of_two
from ris_fast.models import build_model
from ris_fast.physics.least_squares import least_squares_factor
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes, simulate
from ris_fast.training.loss_terms import unit_columns

TASK = Task(bs_antennas=6, ris_horizontal=5, ris_vertical=4, snapshots=7, max_sources=2, snr_min_db=10.0)
OPTIONS = {
    "backprojection": {"width": 32, "depth": 1},
    "hybrid": {"width": 32, "layers": 1, "heads": 2, "feedforward": 32, "grid": 5},
}
networks = pytest.mark.parametrize("name", OPTIONS)
backends = pytest.mark.parametrize("compiler", [True, False], ids=["C++", "torch"])


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, TASK, **OPTIONS[name]).eval()


def drawn(count: int = 4) -> Scenes:
    return simulate(TASK, count, SceneGenerator(3, "train"))


def factor(model: nn.Module, s: Scenes) -> Tensor:
    return model(s.snapshots, s.channel, s.codes, s.snr_db).factor.detach()


@backends
@networks
@pytest.mark.parametrize("what", ["snapshots", "channel"])
def test_networks_ignore_the_unit_of_snapshots_and_channel(
    name: str, what: str, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Powers of two change no bit; other scales, up to the ends of float32, no more than their rounding does."""
    if not compiler:
        monkeypatch.setattr(loader, "available", lambda: False)
    model, scenes = network(name), drawn()
    plain, value = factor(model, scenes), getattr(scenes, what)
    for scale in (2.0**80, 2.0**-80):
        assert torch.equal(factor(model, replace(scenes, **{what: value * scale})), plain)
    largest = 3e38 / float(value.abs().max())
    for scale, close in ((1e25, 1e-3), (1e-20, 1e-3), (largest, 1e-3), (1e-36, 0.1)):
        scaled = factor(model, replace(scenes, **{what: (value.double() * scale).float()}))
        assert (scaled - plain).norm() < close * plain.norm(), scale


def test_pursuit_features_of_large_arrays_ignore_the_unit() -> None:
    """Where the C++ goes through H and the codes instead of G^H G."""
    y, h, *rest = pursuit_scenes(2, 20, 20, 16, 16, 3, sector=0.3)
    plain = pursuit_features(y, h, *rest)
    for y_scale, h_scale in ((2.0**120, 1.0), (1.0, 2.0**123), (2.0**-80, 2.0**-90)):
        for one, other in zip(pursuit_features(y_scale * y, h_scale * h, *rest), plain, strict=True):
            assert torch.equal(one, other)


def assert_same(one: Tensor, other: Tensor, exact: bool) -> None:
    """Bit for bit; where it is not exact, as plain torch answers, which works on the doubtful scenes of a pursuit
    together."""
    torch.testing.assert_close(one, other, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-4)


@backends
def test_backprojection_of_a_scene_of_zeros_is_zero(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler:
        monkeypatch.setattr(loader, "available", lambda: False)
    model, scenes = network("backprojection"), drawn()
    plain = factor(model, scenes)
    for name in ("snapshots", "channel"):
        value = getattr(scenes, name).clone()
        value[1] = 0.0
        answer = factor(model, replace(scenes, **{name: value}))
        assert not answer[1].any()
        assert_same(answer[[0, 2, 3]], plain[[0, 2, 3]], compiler)


def test_network_gradients_of_scenes_of_zeros_are_finite() -> None:
    for name in OPTIONS:
        model, scenes = network(name), drawn()
        model(scenes.snapshots * 0.0, scenes.channel, scenes.codes, scenes.snr_db).factor.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), name


@backends
@networks
def test_networks_keep_nan_in_its_scene(name: str, compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler:
        monkeypatch.setattr(loader, "available", lambda: False)
    model, scenes = network(name), drawn()
    plain, broken = factor(model, scenes), scenes.snapshots.clone()
    broken[2, 3, 1, 0] = float("nan")
    answer = factor(model, replace(scenes, snapshots=broken))
    assert answer[2].isnan().any()
    assert_same(answer[[0, 1, 3]], plain[[0, 1, 3]], compiler or name != "backprojection")


FORMS: dict[str, tuple[Callable[[Scenes], tuple], float]] = {
    "complex": (lambda s: (to_complex(s.snapshots), to_complex(s.channel), to_complex(s.codes), s.snr_db), 0.0),
    "conjugate views": (
        lambda s: (
            *(to_complex(x * torch.tensor([1.0, -1.0])).conj() for x in (s.snapshots, s.channel, s.codes)),
            s.snr_db,
        ),
        0.0,
    ),
    "double": (lambda s: (s.snapshots.double(), s.channel.double(), s.codes.double(), s.snr_db.double()), 0.0),
    "double beyond float32": (
        lambda s: (s.snapshots.double() * 2.0**200, s.channel.double() * 2.0**-300, s.codes, s.snr_db),
        0.0,
    ),
    "complex128": (
        lambda s: (to_complex(s.snapshots.double()), to_complex(s.channel.double()), s.codes, s.snr_db),
        0.0,
    ),
    "half": (lambda s: (s.snapshots.half(), s.channel.half(), s.codes, s.snr_db), 0.05),
    "one SNR": (lambda s: (s.snapshots, s.channel, s.codes, 20.0), 0.0),
    "integers of a converter": (
        lambda s: ((s.snapshots * 2.0**20 / s.snapshots.abs().max()).round().long(), s.channel, s.codes, s.snr_db),
        0.05,
    ),
}


@networks
@pytest.mark.parametrize("form", FORMS)
def test_networks_take_every_natural_form_of_input(name: str, form: str) -> None:
    model, scenes = network(name), replace(drawn(), snr_db=torch.full((4,), 20.0))
    change, close = FORMS[form]
    plain, answer = factor(model, scenes), model(*change(scenes)).factor.detach()
    assert answer.dtype == torch.float32 and (answer - plain).norm() <= close * plain.norm()


@networks
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_networks_of_another_precision_answer_alike(
    name: str, dtype: torch.dtype, close: float, wavefront: str
) -> None:
    """Its parameters are rounded; the constants of the physics are not."""
    torch.manual_seed(0)
    model = build_model(name, replace(TASK, wavefront=wavefront), **OPTIONS[name]).eval()
    scenes = drawn()
    plain, answer = factor(model, scenes), factor(model.to(dtype), scenes)
    assert answer.dtype == torch.float32 and (answer - plain).norm() < close * plain.norm()
    assert all(p.dtype == dtype for p in model.parameters())
    back = factor(model.to(dtype).float(), scenes)
    assert (back - plain).norm() < close * plain.norm()


@networks
def test_constants_keep_their_precision_through_another_dtype(name: str) -> None:
    model = network(name)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(torch.bfloat16).float()
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@networks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [True, False])
def test_networks_compile_without_graph_break(name: str, dynamic: bool) -> None:
    model, scenes = network(name), drawn()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(factor(compiled, scenes), factor(model, scenes))


WRONG: dict[str, tuple[Callable[[Scenes], tuple], type[Exception], str]] = {
    "numpy": (lambda s: (s.snapshots.numpy(), s.channel, s.codes, s.snr_db), TypeError, "snapshots is a ndarray"),
    "no batch": (
        lambda s: (s.snapshots[0], s.channel[0], s.codes, s.snr_db[0]),
        ValueError,
        r"snapshots are \(7, 6, 2\).*snapshots\[None\]",
    ),
    "antennas": (
        lambda s: (s.snapshots[:, :, :5], s.channel, s.codes, s.snr_db),
        ValueError,
        "M = task.bs_antennas = 6",
    ),
    "transposed": (
        lambda s: (s.snapshots.transpose(1, 2), s.channel, s.codes, s.snr_db),
        ValueError,
        r"snapshots are \(4, 6, 7, 2\)",
    ),
    "no snapshots": (
        lambda s: (s.snapshots[:, :0], s.channel, s.codes[:0], s.snr_db),
        ValueError,
        r"snapshots are \(4, 0, 6, 2\)",
    ),
    "other channel": (
        lambda s: (s.snapshots, s.channel[:, :, :9], s.codes, s.snr_db),
        ValueError,
        r"channel is \(4, 6, 9, 2\), expected \(4, 6, 20, 2\)",
    ),
    "other scenes": (
        lambda s: (s.snapshots, s.channel[:2], s.codes, s.snr_db),
        ValueError,
        r"channel is \(2, 6, 20, 2\)",
    ),
    "fewer codes": (
        lambda s: (s.snapshots, s.channel, s.codes[:5], s.snr_db),
        ValueError,
        r"codes is \(5, 20, 2\), expected \(7, 20, 2\) or \(4, 7, 20, 2\)",
    ),
    "codes of other scenes": (
        lambda s: (s.snapshots, s.channel, s.codes.expand(3, -1, -1, -1), s.snr_db),
        ValueError,
        r"codes is \(3, 7, 20, 2\)",
    ),
    "SNR column": (
        lambda s: (s.snapshots, s.channel, s.codes, s.snr_db[:, None]),
        ValueError,
        r"snr_db is \(4, 1\), expected \(4,\)",
    ),
    "SNR text": (lambda s: (s.snapshots, s.channel, s.codes, "20"), TypeError, "snr_db is '20'"),
}


@networks
@pytest.mark.parametrize("case", WRONG)
def test_networks_name_inputs_they_cannot_take(name: str, case: str) -> None:
    change, kind, says = WRONG[case]
    with pytest.raises(kind, match=says) as error:
        network(name)(*change(drawn()))
    assert str(error.value).startswith(f"{name}: ")


@networks
def test_networks_name_a_batch_of_no_scenes(name: str) -> None:
    scenes = drawn()
    with pytest.raises(ValueError, match="B and L at least 1"):
        network(name)(scenes.snapshots[:0], scenes.channel[:0], scenes.codes, scenes.snr_db[:0])


def test_hybrid_takes_another_number_of_snapshots() -> None:
    scenes = drawn()
    fewer = replace(scenes, snapshots=scenes.snapshots[:, :5], codes=scenes.codes[:5])
    given, whole = (factor(network("hybrid"), each) for each in (fewer, scenes))
    assert given.shape == whole.shape and given.isfinite().all() and not torch.equal(given, whole)


def test_networks_are_finite_at_any_snr() -> None:
    for name in OPTIONS:
        scenes = replace(drawn(), snr_db=torch.tensor([-500.0, -60.0, 80.0, 500.0]))
        assert factor(network(name), scenes).isfinite().all(), name


def test_least_squares_factor_follows_the_units() -> None:
    scenes = drawn()
    plain = least_squares_factor(scenes)
    for y, h in ((2.0**70, 1.0), (2.0**-70, 1.0), (1.0, 2.0**70), (2.0**-40, 2.0**-100)):
        scaled = least_squares_factor(replace(scenes, snapshots=y * scenes.snapshots, channel=h * scenes.channel))
        assert torch.equal(scaled, plain * (y / h))


def test_unit_columns_ignore_the_unit_of_power() -> None:
    scenes = drawn()
    assert torch.equal(unit_columns(scenes.factor * 2.0**-90), unit_columns(scenes.factor))
    torch.testing.assert_close(unit_columns(scenes.factor * 2.0**-90).square().sum((1, 3))[:, 0], torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_two_brings_every_scale_to_order_one(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    peaks = torch.tensor([info.max, 1.0, 1.999, 0.5, 3.0, info.tiny, info.tiny / 2], dtype=dtype)
    scale = power_of_two(peaks[:, None])
    assert (
        (torch.frexp(scale)[0] == 0.5).all()
        and ((peaks * scale[:, 0])[:-1] >= 1).all()
        and (peaks * scale[:, 0] < 4).all()
    )
    odd = power_of_two(torch.tensor([[0.0], [float("nan")], [float("inf")]], dtype=dtype))
    assert odd.isfinite().all() and (odd > 0).all()
