"""A predictor gives one answer for every form of the same measurement, in the measurement's units, and its deviations
are those of its errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ris_fast
from ris_fast import Predictor, SceneGenerator, Scenes, build_model, load, simulate
from ris_fast.commands.run_folder import RunFolder
from ris_fast.config.schema import ConfigError, Task
from ris_fast.inference import predictor as module
from ris_fast.inference.located import Located
from ris_fast.inference.predictor import PredictionError
from ris_fast.localize.locate import locate
from ris_fast.localize.sources import Sources
from ris_fast.models import Prediction
from ris_fast.training.checkpoint import better_weights
from ris_fast.training.trainer import Trainer
from tests.training.test_trainer import small

TASK = Task(bs_antennas=8, ris_horizontal=6, ris_vertical=6, snapshots=8, max_sources=2, range_max_m=3.0)
METHODS = ("likelihood", "music", "mvdr", "pursuit")


def scenes_of(task: Task, count: int = 24) -> Scenes:
    return simulate(task, count, SceneGenerator(0, "test"))


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return scenes_of(TASK)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    return Predictor(build_model("backprojection", TASK, width=16), TASK)


def inputs(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert scenes.channel is not None
    return scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db


def same(one: Located, other: Located) -> None:
    for name, value in one._asdict().items():
        torch.testing.assert_close(getattr(other, name), value, equal_nan=True, rtol=1e-4, atol=1e-5, msg=name)


def as_complex(value: Tensor) -> Tensor:
    return torch.view_as_complex(value)


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Any, ...]]] = {
    "complex": lambda y, h, c, snr: (as_complex(y), as_complex(h), as_complex(c), snr),
    "double": lambda y, h, c, snr: (y.double(), as_complex(h.double()), c.double(), snr.double()),
    "numpy": lambda y, h, c, snr: (as_complex(y).numpy(), h.numpy(), as_complex(c).numpy(), snr.numpy()),
    "big endian": lambda y, h, c, snr: (y.numpy().astype(">f8"), h, c.numpy().astype(">f4"), snr.tolist()),
    "own codes": lambda y, h, c, snr: (y, h, c.expand(len(y), *c.shape), snr),
    "with gradient": lambda y, h, c, snr: (y.clone().requires_grad_(), h, c, snr),
}


@pytest.mark.parametrize("form", FORMS)
def test_predict_takes_every_form_of_a_measurement(form: str, predictor: Predictor, scenes: Scenes) -> None:
    same(predictor.predict(*inputs(scenes)), predictor.predict(*FORMS[form](*inputs(scenes))))


def test_predict_in_chunks_is_predict_at_once(
    predictor: Predictor, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, whole = torch.arange(scenes.batch) % 2 + 1, predictor.predict(*inputs(scenes))
    given, steps = predictor.predict(*inputs(scenes), count=count), []
    monkeypatch.setattr(module, "CHUNK", 5)
    same(whole, predictor.predict(*inputs(scenes), progress=lambda done, total: steps.append((done, total))))
    same(given, predictor.predict(*inputs(scenes), count=count))
    assert steps == [(done, 24) for done in (5, 10, 15, 20, 24)]


@pytest.mark.parametrize("method", METHODS)
def test_predict_shows_nan_beyond_the_count_alone(method: str, predictor: Predictor, scenes: Scenes) -> None:
    found = predictor.predict(*inputs(scenes), method=method)
    active = torch.arange(TASK.max_sources) < found.count[:, None]
    for name in ("azimuth_deg", "elevation_deg", "range_m", "power"):
        for values in (getattr(found, name), getattr(found, name.replace("_deg", "_sd_deg").replace("_m", "_sd_m"))):
            assert torch.equal(values.isfinite(), active), name
    assert torch.equal(found.power_sd.isfinite(), active)
    power = found.power.nan_to_num(0.0)
    assert bool((power[:, :-1] >= power[:, 1:]).all())
    chosen = method == "likelihood"
    assert not chosen or set(found.count.tolist()) == {1, 2}
    assert bool(found.count_probability.isfinite().all()) == chosen
    if chosen:
        torch.testing.assert_close(found.count_probability.sum(1), torch.ones(scenes.batch))


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
@pytest.mark.parametrize("name", ["backprojection", "hybrid"])
def test_predict_works_for_every_task_and_network(name: str, wavefront: str, symbols: str) -> None:
    """At a high SNR the likelihood finds one source whatever the network says of it."""
    task = Task(
        bs_antennas=6,
        ris_horizontal=6,
        ris_vertical=5,
        snapshots=7,
        max_sources=1,
        range_max_m=3.0,
        snr_min_db=25.0,
        snr_max_db=30.0,
        wavefront=wavefront,
        symbols=symbols,
    )
    torch.manual_seed(0)
    small = {"width": 16} if name == "backprojection" else {"width": 32, "heads": 4, "layers": 1, "feedforward": 32}
    predictor, scenes = Predictor(build_model(name, task, **small), task), scenes_of(task, 16)
    predictor.atoms = True
    found, truth = predictor.predict(*inputs(scenes)), Sources.of_scenes(scenes)
    assert found.count.tolist() == [1] * 16
    error = (found.azimuth_deg - truth.azimuth.rad2deg()).abs()
    assert float(error.median()) < 0.5 and bool((error < 6 * found.azimuth_sd_deg).all())


def test_predict_deviations_are_those_of_the_errors() -> None:
    task = Task(**{**TASK.__dict__, "max_sources": 1, "snr_min_db": 15.0, "snr_max_db": 25.0, "azimuth_deg": 40.0})
    torch.manual_seed(0)
    predictor, scenes = Predictor(build_model("backprojection", task, width=16), task), scenes_of(task, 400)
    found, truth = predictor.predict(*inputs(scenes)), Sources.of_scenes(scenes)
    for value, deviation, true in (
        (found.azimuth_deg, found.azimuth_sd_deg, truth.azimuth.rad2deg()),
        (found.elevation_deg, found.elevation_sd_deg, truth.elevation.rad2deg()),
        (found.power, found.power_sd, truth.power),
    ):
        spread = ((value - true) / deviation).square().nanmean().sqrt()
        assert 0.85 < float(spread) < 1.15


@pytest.mark.parametrize("unit_y, unit_h", [(1e-3, 1.0), (1.0, 50.0)])
def test_predict_answers_in_the_units_of_the_measurement(
    unit_y: float, unit_h: float, predictor: Predictor, scenes: Scenes
) -> None:
    y, h, c, snr = inputs(scenes)
    one, other = predictor.predict(y, h, c, snr), predictor.predict(y * unit_y, h * unit_h, c, snr)
    scale = (unit_y / unit_h) ** 2
    assert torch.equal(one.count, other.count)
    for value, again, deviation in (
        (one.azimuth_deg, other.azimuth_deg, one.azimuth_sd_deg),
        (one.range_m, other.range_m, one.range_sd_m),
        (one.power, other.power / scale, one.power_sd),
        (one.power_sd, other.power_sd / scale, one.power_sd),
    ):
        assert float(((value - again).abs() / deviation).nan_to_num(0.0).max()) < 0.05


@pytest.mark.parametrize("unit", [1e-3, 40.0])
def test_predict_does_not_see_how_codes_and_channel_share_their_scale(
    unit: float, predictor: Predictor, scenes: Scenes
) -> None:
    y, h, c, snr = inputs(scenes)
    same(predictor.predict(y, h * unit, c, snr), predictor.predict(y, h, c * unit, snr))
    found, again = predictor.predict(y, h, c, snr), predictor.predict(y, h / unit, c * unit, snr)
    assert torch.equal(found.count, again.count)
    torch.testing.assert_close(found.power, again.power, equal_nan=True, rtol=1e-3, atol=0.0)


def test_predictor_knows_whether_its_network_counts(predictor: Predictor) -> None:
    task = small(epochs=1).task
    counts = build_model("hybrid", task, width=16, heads=2, layers=1, feedforward=16, grid=3)
    assert Predictor(counts, task).says_count() and not predictor.says_count()


def test_predict_estimates_the_snr_where_it_is_not_known(predictor: Predictor, scenes: Scenes) -> None:
    y, h, c, snr = inputs(scenes)
    unknown = predictor.predict(y, h, c).snr_db
    assert float((unknown - snr).abs().median()) < 1.0
    some = torch.where(torch.arange(scenes.batch) == 3, torch.nan, snr)
    mixed = predictor.predict(y, h, c, some).snr_db
    torch.testing.assert_close(mixed[3], unknown[3])
    mixed[3] = snr[3]
    assert torch.equal(mixed, snr)
    assert predictor.predict(y, h, c, 7.0).snr_db.tolist() == [7.0] * scenes.batch


@pytest.mark.parametrize("count", [0, 1, 2, np.int64(1), torch.arange(24) % 3, np.arange(24) % 3])
def test_predict_keeps_as_many_sources_as_given(count: Any, predictor: Predictor, scenes: Scenes) -> None:
    wanted = torch.as_tensor(count).expand(24)
    assert torch.equal(predictor.predict(*inputs(scenes), count=count).count, wanted)
    assert bool((predictor.predict(*inputs(scenes), count=count, method="pursuit").count <= wanted).all())


class Truth(nn.Module):
    """Another's network: it knows the scenes, and answers with complex factors of any rank."""

    def __init__(self, scenes: Scenes) -> None:
        super().__init__()
        assert scenes.factor is not None
        self.factor = nn.Parameter(as_complex(scenes.factor))

    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Tensor:
        assert not self.training
        return self.factor


def test_predictor_takes_any_network_that_gives_a_factor(scenes: Scenes) -> None:
    """MUSIC on the true covariance is `locate`; from its peaks the likelihood finds what the truth leads it to."""
    mine, truth = Predictor(Truth(scenes), TASK), Sources.of_scenes(scenes)
    found, expected = mine.predict(*inputs(scenes), method="music"), locate(mine.model.factor.detach(), TASK)
    assert torch.equal(found.count, expected.count) and torch.equal(found.count, truth.count)
    alone = found.count == 1
    torch.testing.assert_close(found.azimuth_deg[alone, 0], truth.azimuth.rad2deg()[alone, 0], atol=0.05, rtol=0)
    likely = mine.predict(*inputs(scenes), count=scenes.count)
    inside = (likely.azimuth_deg - truth.azimuth.rad2deg()).abs() < 5 * likely.azimuth_sd_deg
    assert float(inside[truth.active].float().mean()) > 0.9


def test_load_takes_the_better_weights_of_the_checkpoint(tmp_path: Path) -> None:
    config = small("data.test_scenes=8", epochs=2)
    Trainer(config, tmp_path, callbacks=[RunFolder(tmp_path, config)]).fit()
    for place, name in ((tmp_path, "best"), (tmp_path / "checkpoints" / "last.safetensors", "last")):
        predictor = load(place, device="cpu")
        assert predictor.task == config.task and not predictor.model.training
        weights = better_weights(tmp_path / "checkpoints", name)[0]
        for key, value in predictor.model.state_dict().items():
            assert torch.equal(value, weights[key]), key
    scenes = scenes_of(config.task, 6)
    found = predictor.predict(*inputs(scenes), count="network")
    logits = predictor.model(*inputs(scenes)).count_logits
    assert torch.equal(found.count, logits.argmax(1) + 1)
    assert ris_fast.load is load and ris_fast.Predictor is Predictor


def test_predict_from_products_alone() -> None:
    task = Task(bs_antennas=4, ris_horizontal=4, ris_vertical=4, snapshots=4, max_sources=2)
    options = {"width": 16, "heads": 2, "layers": 1, "feedforward": 16, "grid": 3, "inputs": "effective_channel"}
    predictor = Predictor(build_model("hybrid", task, **options), task, products=True)
    y, h, c, snr = inputs(scenes_of(task, 5))
    products = as_complex(h) @ as_complex(c).mT  # (B, M, L)
    found = predictor.predict(y, products.mT, c, snr)
    assert found.count_probability.isnan().all() and found.power.isfinite().any()
    with pytest.raises(ConfigError, match="'likelihood' needs snapshots and the channel"):
        predictor.predict(y, products.mT, c, snr, method="likelihood")
    with pytest.raises(ValueError, match="snr_db is not known, and cannot be estimated without the channel"):
        predictor.predict(y, products.mT, c)
    assert predictor.predict(y, h, c).count_probability.isfinite().all()  # the channel says more


def spoiled(value: Tensor, scene: int, number: float) -> Tensor:
    value = value.clone()
    value[scene] = number
    return value


WRONG: dict[str, tuple[Callable[..., tuple[Any, ...]], type[Exception], str]] = {
    "text": (lambda y, h, c, snr: ("y", h, c), TypeError, "snapshots is a str, expected numbers"),
    "objects": (lambda y, h, c, snr: (y, np.array([None]), c), TypeError, "channel is object, expected numbers"),
    "bool": (lambda y, h, c, snr: (y, h, c > 0), TypeError, "codes is bool, expected numbers"),
    "one scene": (lambda y, h, c, snr: (y[0], h, c), ValueError, r"snapshots has shape \(8, 8, 2\).*snapshots\[None\]"),
    "no scene": (lambda y, h, c, snr: (y[:0], h[:0], c), ValueError, r"snapshots has shape \(0, 8, 8, 2\)"),
    "other codes": (lambda y, h, c, snr: (y, h, c[:3]), ValueError, r"codes has shape \(3, 36, 2\).*\(8, 36\) or"),
    "no channel": (lambda y, h, c, snr: (y, None, c), TypeError, "channel is a NoneType"),
    "other scenes": (lambda y, h, c, snr: (y, h[:3], c), ValueError, r"channel has shape \(3, 8, 36, 2\).*24 scenes"),
    "products": (lambda y, h, c, snr: (y, y, c), ValueError, r"channel has shape \(24, 8, 8, 2\)"),
    "snr": (lambda y, h, c, snr: (y, h, c, snr[:3]), ValueError, r"snr_db has shape \(3,\).*\(24,\), or one number"),
    "nan": (lambda y, h, c, snr: (spoiled(y, 7, np.nan), h, c), ValueError, "snapshots has NaN .* scene 7;"),
    "infinite": (lambda y, h, c, snr: (y, spoiled(h, 9, np.inf), c), ValueError, "channel has infinite .* scene 9;"),
    "beyond float32": (lambda y, h, c, snr: (y.double() * 1e60, h, c), ValueError, "snapshots has .* beyond 3.4e38"),
    "real": (lambda y, h, c, snr: (y[..., 0], h, c), ValueError, r"snapshots has shape \(24, 8, 8\) of .* real"),
    "zero codes": (lambda y, h, c, snr: (y, h, 0 * c), ValueError, "codes has nothing but zeros"),
    "nan codes": (lambda y, h, c, snr: (y, h, c * np.nan), ValueError, "codes has NaN or infinite values"),
    "zeros": (
        lambda y, h, c, snr: (spoiled(y, 2, 0.0), h, c),
        ValueError,
        "snapshots has nothing but zeros in scene 2",
    ),
    "infinite snr": (
        lambda y, h, c, snr: (y, h, c, np.inf),
        ValueError,
        "snr_db has infinite values or numbers beyond",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_predict_names_wrong_arguments(case: str, predictor: Predictor, scenes: Scenes) -> None:
    change, kind, says = WRONG[case]
    with pytest.raises(kind, match=f"predict: {says}") as error:
        predictor.predict(*change(*inputs(scenes)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, kind, says",
    [
        ({"method": "esprit"}, ConfigError, "method is 'esprit'; it must be one of: likelihood"),
        ({"count": "many"}, ConfigError, "count is 'many'"),
        ({"count": 3}, ValueError, "count goes from 3 to 3; expected 0 to 2"),
        ({"count": 1.5}, TypeError, "count is torch.float64, expected a whole number"),
        ({"count": [1, 2]}, ValueError, r"count has shape \(2,\).*\(24,\)"),
        ({"count": torch.arange(24) % 4}, ValueError, "count goes from 0 to 3; expected 0 to 2"),
        ({"count": "mdl", "method": "music"}, ConfigError, "'mdl' compares likelihoods"),
        ({"count": "network"}, PredictionError, "does not say how many sources"),
    ],
)
def test_predict_names_wrong_options(
    options: dict[str, Any], kind: type[Exception], says: str, predictor: Predictor, scenes: Scenes
) -> None:
    with pytest.raises(kind, match=f"predict: .*{says}"):
        predictor.predict(*inputs(scenes), **options)


class Answers(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *inputs: Tensor) -> Any:
        return self.answer


def test_predictor_refuses_answers_of_no_use(scenes: Scenes) -> None:
    factor = torch.ones(24, 36, 2, 2)
    lost = Prediction(spoiled(factor, 5, np.nan))
    with pytest.raises(PredictionError, match="not finite for 1 of 24 scenes, the first is scene 5"):
        Predictor(Answers(lost), TASK).predict(*inputs(scenes))
    with pytest.raises(TypeError, match="the network returned a dict"):
        Predictor(Answers({}), TASK).predict(*inputs(scenes))
    with pytest.raises(TypeError, match="model is a str"):
        Predictor("runs/mine", TASK)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Predictor: task is a Config"):
        Predictor(Answers(factor), small(epochs=1))  # type: ignore[arg-type]
