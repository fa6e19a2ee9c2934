"""The contract of a network and of a loss term of the user's own, tried on a few scenes before anything is trained.

docs/own-network.md says what it is. Each breach is one ConfigError about the user's own module. What a network that
keeps it still does wrong, preflight says.

Legend: B batch, Q factor columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.config.schema import Config, ConfigError
from ris_fast.config.user_code import first_line, where_raised
from ris_fast.data.source import SceneSource
from ris_fast.models.classical import classical_estimate
from ris_fast.models.own import OwnNetwork
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import conj
from ris_fast.physics.scenes import Scenes
from ris_fast.training.footprint import is_memory
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.step import LOW, autocast, network_inputs
from ris_fast.training.undo import kept

SCENES = 3
NAMES = ("snapshots", "channel", "codes", "snr_db")


def check_contract(model: nn.Module, loss: CovarianceLoss, config: Config, source: SceneSource) -> list[str]:
    """Nothing for a network of ours with a loss of ours. Returns: what a person should know of the others.

    Raises: ConfigError in one line, saying what the network or the term does, what is expected and what to do. Weights,
    buffers and the random numbers of the run stay as they were.
    """
    own = isinstance(model, OwnNetwork)
    if not own and loss.own is None:
        return []
    scenes = source.batch("train", torch.arange(min(SCENES, source.size("train")), device=source.index_device))
    with torch.random.fork_rng([source.device] if torch.device(source.device).type == "cuda" else []):
        torch.manual_seed(0)
        alone = source.size("train") % config.training.batch_size == 1
        notes = _check_network(model, config, scenes, alone) if own else []
        if loss.own is not None:
            notes += _check_term(loss, model, config, scenes)
    return notes


def _check_network(model: OwnNetwork, config: Config, scenes: Scenes, alone: bool) -> list[str]:
    """Args: alone: whether the last scene of an epoch is a micro-batch by itself."""
    _check_parameters(model)
    _check_signature(model)
    names = [*model.state_dict()]
    with _buffers_kept(model):
        model.eval()
        prediction = _called(model, config, scenes)
        _check_values(model, config, scenes, prediction)
        _check_parts(model, config, scenes)
        _called(model, config, scenes[:1])
        model.train()
        _called(model, config, scenes)
        if alone:
            _called(model, config, scenes[:1])
    if made := [name for name in model.state_dict() if name not in names]:
        raise ConfigError(
            f"{model.name}.forward makes {made[0]}: it comes too late for the optimizer, and a checkpoint that has it"
            " fits no new network. Make layers in __init__."
        )
    return _columns(model.name, prediction.factor.detach(), config.task.max_sources)


def _columns(name: str, factor: Tensor, sources: int) -> list[str]:
    """What the number and the symmetry of a factor's columns say."""
    if factor.shape[2] < sources:
        return [
            f"{name} returns {factor.shape[2]} columns, so that R has rank {factor.shape[2]} at most, and scenes have"
            f" up to {sources} sources: more columns, 2 task.max_sources say, can say more"
        ]
    adjoint = conj(factor).transpose(1, 2)
    rounding = 1e-6 * float(factor.abs().max())
    if factor.shape == adjoint.shape and torch.allclose(factor, adjoint, rtol=1e-3, atol=rounding):
        return [
            f"{name} returns a Hermitian matrix (N, N): if that is the covariance R itself, it is taken for the factor"
            " F of R = F F^H. Return F, of a few columns; the Hermitian root of R is one too"
        ]
    return []


def _check_parameters(model: OwnNetwork) -> None:
    parameters = dict(model.named_parameters())
    trained = [name for name, each in parameters.items() if each.requires_grad]
    if not trained:
        state = f"{len(parameters)} parameters, all frozen" if parameters else "no parameters"
        raise ConfigError(
            f"{model.name} has {state}: there is nothing to train. Assign its layers to attributes in __init__, such as"
            " self.layer = nn.Linear(...), after super().__init__()."
        )
    wrong = [name for name in trained if parameters[name].dtype != torch.float32]
    if wrong:
        raise ConfigError(
            f"{model.name}: parameter {wrong[0]} is {parameters[wrong[0]].dtype}; expected torch.float32. Leave"
            " .half(), .double() and complex parameters out (a complex weight is real pairs):"
            " training.precision chooses the arithmetic."
        )
    saved = model.state_dict()
    if lost := [name for name in parameters if not isinstance(saved.get(name), Tensor)]:
        raise ConfigError(
            f"{model.name}.state_dict() has no tensor {lost[0]}: a checkpoint would lose it. Leave state_dict as torch"
            " has it."
        )
    if odd := [name for name, value in saved.items() if not isinstance(value, Tensor)]:
        raise ConfigError(
            f"{model.name}.state_dict() has {odd[0]}, a {type(saved[odd[0]]).__name__}; a checkpoint holds tensors."
            " Leave get_extra_state and the like out."
        )
    heads = model.head_parameters()
    own = {id(each) for each in parameters.values()}
    if not isinstance(heads, (list, tuple)) or not all(id(each) in own for each in heads):
        raise ConfigError(
            f"{model.name}: head_parameters() must return a list of its own parameters, such as"
            " list(self.head.parameters())."
        )


def _check_signature(model: OwnNetwork) -> None:
    try:
        inspect.signature(model.net.forward).bind(*NAMES)
    except TypeError as error:
        taken = ", ".join(inspect.signature(model.net.forward).parameters)
        raise ConfigError(
            f"{model.name}.forward takes ({taken}); it is called with ({', '.join(NAMES)}): {error}. Write `def"
            f" forward(self, {', '.join(NAMES)}):`."
        ) from None
    except ValueError:  # a signature that Python cannot read: the call itself tells
        return


def _called(model: OwnNetwork, config: Config, scenes: Scenes) -> Prediction:
    """The network's answer. Raises: ConfigError for what it raises, what it does to its inputs and what it returns."""
    inputs = network_inputs(scenes)
    before = [each.clone() for each in inputs]
    low = config.training.precision in LOW
    try:
        with autocast(scenes.snapshots.device, config.training.precision if low else "fp32"):
            prediction = model(*inputs)
    except ConfigError as error:
        lone = " These were the scenes of a batch of one, which evaluate and predict may have." * (scenes.batch == 1)
        raise ConfigError(f"{error}{lone}") from None
    except Exception as error:  # whatever their forward raises
        if is_memory(error):
            raise
        raise ConfigError(
            f"{model.name}.forward raised {first_line(error)}{where_raised(error)} when it was called with"
            f" {_shapes(inputs)}{' in ' + config.training.precision if low else ''}.{_stray(model, scenes)}"
        ) from error
    changed = [name for name, each, copy in zip(NAMES, inputs, before) if not _same(each, copy)]
    if changed:
        raise ConfigError(
            f"{model.name}.forward changes {' and '.join(changed)} in place; the loss and later epochs read the same"
            f" tensors. Work on a copy: {changed[0]} = {changed[0]}.clone(), or x * 2 in place of x.mul_(2)."
        )
    if prediction.factor.shape[0] != scenes.batch:
        raise ConfigError(
            f"{model.name} returned a factor {tuple(prediction.factor.shape)} for {scenes.batch} scenes; expected a row"
            " for each scene. Keep the first dimension."
        )
    return prediction


def _check_values(model: OwnNetwork, config: Config, scenes: Scenes, prediction: Prediction) -> None:
    if not bool(prediction.factor.any()):
        raise ConfigError(
            f"{model.name} returns zeros for every scene, before any training: R = F F^H has no gradient there, so that"
            " it never learns. Initialise the last layer with small numbers in place of zeros, and end without a ReLU."
        )
    for name, value in prediction._asdict().items():
        if value is None or bool(value.isfinite().all()):
            continue
        part = _first_not_finite(model, config, scenes)
        raise ConfigError(
            f"{model.name} returned a {name} that is not finite ({float((~value.isfinite()).float().mean()):.0%} of its"
            f" numbers) for {len(scenes.snr_db)} finite scenes, before any training{part}. Look for a division by zero,"
            " a logarithm or a root of a negative number there."
        )


def _first_not_finite(model: OwnNetwork, config: Config, scenes: Scenes) -> str:
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, given: Any, answer: Any) -> None:
            if not _all_finite(given):
                found.append(f"; already in the input of its part '{name}'")
            elif not _all_finite(answer):
                found.append(f"; first in its part '{name}'")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        _called(model, config, scenes)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _all_finite(values: Any) -> bool:
    tensors = values if isinstance(values, (tuple, list)) else (values,)
    return all(bool(each.isfinite().all()) for each in tensors if isinstance(each, Tensor))


def _check_parts(model: OwnNetwork, config: Config, scenes: Scenes) -> None:
    """Of the optional methods: features without parameters, a factor from `classical`."""
    if not (model.in_two or hasattr(model, "classical")):
        return
    try:
        features = model.features(*network_inputs(scenes))
    except Exception as error:
        raise ConfigError(f"{model.name}.features raised {first_line(error)}{where_raised(error)}.") from error
    tensors = features if isinstance(features, tuple) else (features,)
    if model.in_two and not all(isinstance(each, Tensor) for each in tensors):
        raise ConfigError(
            f"{model.name}.features returned {_kinds(features)}; expected a tensor or a tuple of tensors, which"
            " validation keeps and trunk(features) takes."
        )
    if any(isinstance(each, Tensor) and each.requires_grad for each in tensors):
        raise ConfigError(
            f"{model.name}.features holds parameters: its result requires a gradient, and is kept between validations,"
            " where it would go stale. Move what is trained into trunk(features)."
        )
    if hasattr(model, "classical"):
        try:
            found = classical_estimate(model, features, scenes, static=config.task.symbols == "static")
            assert found is not None  # it has the method
            found.factor.view(scenes.batch, config.task.elements, -1, 2)
        except Exception as error:
            raise ConfigError(
                f"{model.name}.classical(features) raised or returned what is no estimate: {first_line(error)}"
                f"{where_raised(error)}. Return (name, factor (B, N, K, 2))."
            ) from error


def _check_term(loss: CovarianceLoss, model: nn.Module, config: Config, scenes: Scenes) -> list[str]:
    """The term of the user's own, on the network's answer; what it keeps of these scenes is put back. Returns: notes.
    Raises: ConfigError."""
    with torch.no_grad(), _buffers_kept(model):
        model.eval()
        prediction = model(*network_inputs(scenes)).apply(Tensor.float)
    leaves = prediction.apply(lambda value: value.detach().requires_grad_())
    name = loss.own_name
    try:
        with kept(loss):
            value = loss.own(leaves, scenes)
    except Exception as error:  # whatever their term raises
        raise ConfigError(
            f"loss.own {name} raised {first_line(error)}{where_raised(error)} when it was called with a Prediction"
            f" (factor {tuple(leaves.factor.shape)}) and Scenes of {scenes.batch}."
        ) from error
    if not isinstance(value, Tensor) or tuple(value.shape) not in ((), (scenes.batch,)):
        what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ConfigError(
            f"loss.own {name} returned {what}; expected one number a scene, ({scenes.batch},), or a mean, ()."
        )
    if not bool(value.isfinite().all()):
        raise ConfigError(f"loss.own {name} is not finite for finite predictions and scenes: {value.tolist()}.")
    if not value.requires_grad:
        raise ConfigError(
            f"loss.own {name} does not depend on the prediction through autograd, so it would train nothing. Compute it"
            " from prediction.factor with torch, without .detach(), .item() and numpy."
        )
    try:
        with kept(loss):
            wide = loss.own(leaves.apply(Tensor.double), scenes.double())
    except Exception as error:  # as of a table in float32
        return [
            f"the gradient of loss.own {name} is not checked, which takes float64: it raised {first_line(error)}"
            f"{where_raised(error)}"
        ]
    if wide.dtype != torch.float64:
        raise ConfigError(
            f"loss.own {name} returns {wide.dtype} for a prediction in float64, in which its gradient is checked. Leave"
            " .float() and dtype=torch.float32 out."
        )
    return []


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Mode and buffers, such as running means, are as before afterwards."""
    mode, kept = model.training, [(each, each.clone()) for each in model.buffers()]
    try:
        yield
    finally:
        model.train(mode)
        with torch.no_grad():
            for each, copy in kept:
                if not torch.equal(each, copy):  # an expanded one cannot be written, nor could it have changed
                    each.copy_(copy)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _shapes(inputs: tuple[Tensor, ...]) -> str:
    return ", ".join(f"{name} {tuple(each.shape)}" for name, each in zip(NAMES, inputs))


def _kinds(value: Any) -> str:
    return f"({', '.join(type(each).__name__ for each in value)})" if isinstance(value, tuple) else type(value).__name__


def _stray(model: OwnNetwork, scenes: Scenes) -> str:
    """What to do about a tensor that did not move to the device with the network."""
    device = scenes.snapshots.device
    for path, module in (("", model.net), *model.named_modules()):
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.device.type != device.type:
                place = f"{path}.{name}".lstrip(".")
                return f" self.{place} is on {value.device}: with self.register_buffer('{name}', ...) it moves too."
    return ""
