"""A network of the user's own: what keeps the contract trains, and each breach of it is one line about their module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast import Callback, CovarianceLoss, Scenes, Trainer, build_model, load_config
from ris_fast.config.schema import Config, ConfigError
from ris_fast.config.user_code import load_reference
from ris_fast.health.preflight import derivative, modes, parameters
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.restore import preserve_state
from ris_fast.inference.predictor import load
from ris_fast.models import Prediction
from ris_fast.training.checkpoint import CheckpointError
from ris_fast.training.loss import own_term
from ris_fast.training.mfu import MfuCallback, step_flops
from ris_fast.training.step import network_inputs
from tests.command_line import SMALL_TASK
from tests.training import broken_networks

FILE = Path(__file__).with_name("broken_networks.py")
SMALL = [
    *SMALL_TASK,
    "data.train_scenes=32",
    "data.val_scenes=8",
    "training.batch_size=8",
    "training.epochs=1",
    "training.compile=false",
    "training.device=cpu",
]


def config(name: str = "", *more: str) -> Config:
    named = [f'model.name="{FILE}:{name}"'] if name else []
    return load_config(overrides=[*SMALL, *named, *more])


BREACHES = {
    "NoParameters": "NoParameters has no parameters: there is nothing to train",
    "Frozen": "has 4 parameters, all frozen",
    "Half": "parameter hidden.weight is torch.float16; expected torch.float32",
    "ListOfLayers": "self.layers is a python list of modules, .* Write self.layers = nn.ModuleList",
    "DictOfLayers": "self.layers is a python dict of modules, .* Write self.layers = nn.ModuleDict",
    "ListOfWeights": "self.scales is a python list of parameters, .* nn.ParameterList",
    "TensorForParameter": "self.scale is a tensor that requires a gradient and no parameter",
    "Lazy": "out.weight has no shape yet.* Give its sizes",
    "WrongShape": r"returned a factor \(3, 2, 16, 2\) of torch.float32; expected complex \(B, 16, Q\)",
    "WrongKind": "WrongKind returned a list; expected its factor F",
    "BatchLost": r"returned a factor \(1, 16, 2, 2\) for 3 scenes",
    "WrongSources": r"returned azimuth \(3, 1\); expected \(B, K\) = \(3, 5\)",
    "InPlace": "InPlace.forward changes channel in place",
    "InPlaceInTraining": "forward changes snapshots in place",
    "NotFinite": "returned a factor that is not finite .* first in its part 'logarithm'",
    "Raises": r"Raises.forward raised RuntimeError: .*\(broken_networks.py, line \d+\).*snapshots \(3, 4, 4, 2\)",
    "TooFewArguments": r"forward takes \(snapshots, channel\); it is called with \(snapshots, channel, codes, snr_db\)",
    "TaskNotTaken": "takes no task: it is called as NAME",
    "ConstructorRaises": r"its constructor raised ZeroDivisionError: .*\(broken_networks.py, line \d+\)",
    "Needs": "needs depth: .* set model.options.depth",
    "LearnedFeatures": "features holds parameters",
    "StrayHeads": r"head_parameters\(\) must return a list of its own parameters",
    "WrongClassical": r"classical\(features\) raised or returned what is no estimate",
    "LateLayer": "forward makes late.weight: it comes too late .* Make layers in __init__",
    "StateLost": r"state_dict\(\) has no tensor hidden.weight",
    "ExtraState": r"state_dict\(\) has _extra_state, a dict; a checkpoint holds tensors",
    "Zeros": "returns zeros for every scene, before any training",
    "Squeezed": r"returned a factor \(16, 2, 2\).* a batch of one",
    "NotFiniteBefore": "not finite .* already in the input of its part 'hidden'",
    "NeedsTwo": r"forward raised ValueError: Expected more than 1 value.*snapshots \(1, 4, 4, 2\)",
    "compiled": "is a OptimizedModule; .* Leave torch.compile",
    "parallel": "is a DataParallel; .* torchrun",
    "no_network": "is a int; expected a torch.nn.Module",
    "Rihgt": "has no 'Rihgt'. Did you mean 'Right'",
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_one_line_about_their_module(name: str) -> None:
    with pytest.raises(ConfigError, match=BREACHES[name]) as raised:
        Trainer(config(name))
    assert "\n" not in str(raised.value) and name in str(raised.value)


@pytest.mark.parametrize(
    "name", ["Right", "Complex", "WithFeatures", "TorchvisionLike", "Names", "Normalised", "factory"]
)
def test_what_keeps_the_contract_trains_and_is_opened_again(name: str, tmp_path: Path) -> None:
    settings = config(name)
    trainer = Trainer(settings, tmp_path)
    before = [each.clone() for each in trainer.model.parameters()]
    assert trainer.fit()["optimizer_steps"] == 4
    assert all(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters()))
    again = Trainer(settings, tmp_path, resume=True)
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])


def test_trying_the_contract_leaves_the_run_as_it_was() -> None:
    """Weights, buffers and random numbers of a run are those of one whose network needs no trial."""
    torch.manual_seed(0)
    fresh = broken_networks.Normalised(config().task)
    trainer = Trainer(config("Normalised"))
    assert trainer.model.training
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[key])


def test_an_object_trains_as_the_same_network_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = broken_networks.Right(config().task)
    handed, named = Trainer(config(), tmp_path, model=net), Trainer(config("Right"))
    assert handed.fit()["best_val_nmse"] == named.fit()["best_val_nmse"]
    assert handed.config.model.name == "object:Right"
    for (name, own), (other, value) in zip(net.named_parameters(), named.model.named_parameters(), strict=True):
        assert name == other and torch.equal(own, value)
    assert isinstance(net(*_inputs(handed)), Tensor)  # theirs is as it was


def test_a_run_of_an_object_is_loaded_into_one(tmp_path: Path) -> None:
    trainer = Trainer(config(), tmp_path, model=broken_networks.Right(config().task))
    trainer.fit()
    with pytest.raises(ConfigError, match=r"object:Right.*handed to Trainer.*load\(RUN, model=net\)"):
        load(tmp_path)
    found = load(tmp_path, model=broken_networks.Right(config().task))
    scenes = trainer.source.batch("test", torch.arange(3))
    located = found.predict(scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db)
    assert located.factor.shape == (3, 16, 2, 2)


def test_heads_learn_at_their_own_rate() -> None:
    trainer = Trainer(config("WithFeatures", "optimizer.head_lr=0.5"))
    rates = {name: group["lr"] for group in trainer.optimizer.param_groups for name in [group["name"]]}
    assert rates["head"] == 0.5 and rates["backbone"] != 0.5


def test_a_network_that_cannot_be_compiled_whole_is_compiled_in_parts() -> None:
    trainer = Trainer(config("Broken", "training.compile=true"))
    trainer._compile()
    assert "in parts, because the network cannot be compiled whole" in trainer.compile_note
    assert trainer.fit()["optimizer_steps"] == 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Right", "Complex", "WithFeatures", "Normalised"])
def test_an_own_network_is_captured_and_trains_on_a_gpu(name: str) -> None:
    trainer = Trainer(config(name, "training.device=cuda"))
    assert trainer.fit()["optimizer_steps"] == 4
    assert "each step one CUDA graph" in trainer.compile_note


def test_few_columns_are_noted() -> None:
    assert any("R has rank 2 at most" in note for note in Trainer(config("Right")).notes)


def test_a_covariance_in_the_place_of_its_factor_is_noted() -> None:
    assert any("returns a Hermitian matrix (N, N)" in note for note in Trainer(config("Covariance")).notes)


def test_an_epoch_that_ends_with_one_scene_is_tried_as_one() -> None:
    Trainer(config("Normalised"))
    with pytest.raises(ConfigError, match="Expected more than 1 value per channel when training"):
        Trainer(config("Normalised", "data.train_scenes=33"))


def test_a_changed_source_is_named_where_the_weights_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(FILE.read_text())
    Trainer(load_config(overrides=[*SMALL, f'model.name="{file}:Right"']), tmp_path / "run").fit()
    file.write_text(FILE.read_text().replace("self.hidden", "self.body"))
    with pytest.raises(CheckpointError, match="the source of model.name = 'net.py:Right' has changed.*body.weight"):
        load(tmp_path / "run")


def test_a_module_of_the_working_folder_comes_before_one_beside_an_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("a", "ONE = print\n"), ("b", "TWO = print\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "beside_and_here.py").write_text(text)
    load_reference("x", f"{tmp_path}/a/beside_and_here.py:ONE", "code")
    monkeypatch.chdir(tmp_path / "b")
    assert load_reference("x", "beside_and_here:TWO", "code") is print


def test_a_file_that_ends_the_program_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(ConfigError, match=r"ends the program when it is imported \(net.py, line 2\)"):
        build_model(f"{tmp_path}/net.py:Net")


# ---- unusual and right: no check is certain of a mistake -------------------------------------------------------------


@pytest.mark.parametrize("name", ["Tied", "Parametrized", "Singular", "InputGradient", "Normalised"])
def test_no_check_is_certain_about_a_network_that_is_right(name: str) -> None:
    context = PreflightContext(Trainer(config(name, "task.max_sources=2")))
    for check in (parameters.tied, parameters.unregistered, modes.randomness, derivative.right_derivative):
        with preserve_state(context.trainer):
            assert not [each for each in check(context) if each.certain], check.__name__


def test_running_statistics_that_stay_behind_are_named() -> None:
    context = PreflightContext(Trainer(config("NeverUpdated", "task.max_sources=2")))
    with preserve_state(context.trainer):
        assert [each.cause for each in modes.randomness(context)] == ["batchnorm_statistics"]


def test_mfu_of_batch_normalisation_is_measured_on_one_scene() -> None:
    trainer = Trainer(config("Normalised"))
    scenes = trainer.source.batch("val", torch.arange(1))
    assert step_flops(trainer.config, scenes, trainer.model) > 0 and trainer.model.training


def test_a_network_that_keeps_what_it_computed_is_measured_and_one_that_cannot_be_copied_ends_no_run() -> None:
    trainer = Trainer(config("Normalised"))
    scenes = trainer.source.batch("val", torch.arange(1))
    flops = step_flops(trainer.config, scenes, trainer.model)
    trainer.model.net.seen = [torch.ones(2, requires_grad=True).exp()]
    assert step_flops(trainer.config, scenes, trainer.model) == flops
    trainer.model.net.log = (each for each in ())  # a generator has no copy
    trainer.callbacks.append(MfuCallback(trainer))
    assert trainer.fit()["optimizer_steps"] > 0


def test_a_changed_source_is_noted_and_the_weights_still_open(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(FILE.read_text())
    settings = load_config(overrides=[*SMALL, f'model.name="{file}:Right"'])
    Trainer(settings, tmp_path / "run").fit()
    assert not _changed(Trainer(settings, tmp_path / "run", resume=True))
    file.write_text(FILE.read_text() + "\n# another one\n")
    assert _changed(Trainer(settings, tmp_path / "run", resume=True))


def test_a_moved_file_is_the_same_network(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.py").write_text(FILE.read_text())
    first, second = (load_config(overrides=[*SMALL, f'model.name="{tmp_path / each}/net.py:Right"']) for each in "ab")
    Trainer(first, tmp_path / "run").fit()
    assert Trainer(second, tmp_path / "run", resume=True).state.step == 4


def test_options_have_the_kinds_that_the_constructor_says() -> None:
    task = config().task
    assert build_model(f"{FILE}:Right", task, width=4).hidden.out_features == 4
    with pytest.raises(ConfigError, match="model.options.width = 'wide'.*expected a whole number"):
        build_model(f"{FILE}:Right", task, width="wide")
    with pytest.raises(ConfigError, match="has no option 'widht'. Did you mean 'width'"):
        build_model(f"{FILE}:Right", task, widht=4)


# ---- a loss term of one's own ----------------------------------------------------------------------------------------


def trace_error(prediction: Prediction, scenes: Scenes) -> Tensor:
    return (prediction.factor.square().sum((1, 2, 3)) - 1.0).square()


def test_an_own_term_is_weighted_logged_and_differentiated() -> None:
    trainer = Trainer(config("Right", "loss.own_weight=0.5"), loss=trace_error)
    scenes = trainer.source.batch("train", torch.arange(4))
    prediction = trainer.step.predict(scenes)
    total, terms = trainer.loss(prediction, scenes)
    assert terms["trace_error"] == trace_error(prediction, scenes).mean()
    plain = CovarianceLoss(trainer.config.loss.__class__(), trainer.config.task)(prediction, scenes)[0]
    torch.testing.assert_close(total, plain + 0.5 * terms["trace_error"])
    rows: list[dict[str, Any]] = []
    trainer.callbacks.append(_Rows(rows))
    trainer.fit()
    assert rows[0]["terms"]["trace_error"]["raw"] > 0


def test_an_own_term_is_named_by_a_setting(tmp_path: Path) -> None:
    (tmp_path / "terms.py").write_text("def power(prediction, scenes):\n    return prediction.factor.square().mean()\n")
    trainer = Trainer(config("Right", f'loss.own="{tmp_path}/terms.py:power"', "loss.cov=0.0", "loss.cov_pred=0.0"))
    assert list(trainer.loss.weights) == ["power"]


TERMS = {
    "returned a tensor": lambda prediction, scenes: prediction.factor,
    "returned a float": lambda prediction, scenes: 3.0,
    "does not depend on the prediction": lambda prediction, scenes: scenes.snr_db,
    "is not finite": lambda prediction, scenes: (prediction.factor * torch.nan).mean(),
    "raised KeyError": lambda prediction, scenes: {}["missing"],
    "returns torch.float32 for a prediction in float64": lambda p, s: p.factor.float().square().mean(),
}


@pytest.mark.parametrize("seen", TERMS)
def test_a_wrong_term_is_one_line(seen: str) -> None:
    def mine(prediction: Prediction, scenes: Scenes) -> Any:
        return TERMS[seen](prediction, scenes)

    with pytest.raises(ConfigError, match=f"loss.own mine {seen}") as raised:
        Trainer(config("Right"), loss=mine)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("term", "said"),
    [(lambda p, s: 0, "is called '<lambda>'"), (3, "own is a int"), (nn.Linear(2, 2), "own has parameters")],
)
def test_what_cannot_be_a_term_is_refused(term: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        own_term("", term)


class _Rows(Callback):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def on_log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def _changed(trainer: Trainer) -> bool:
    return any("the source of model.name = 'net.py:Right' has changed" in note for note in trainer.notes)


def _inputs(trainer: Trainer) -> tuple[Tensor, ...]:
    return network_inputs(trainer.source.batch("train", torch.arange(2)))
