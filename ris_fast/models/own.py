"""A network of the user's own, as the trainer calls it: docs/own-network.md is its contract.

Legend: B batch, N RIS elements, Q factor columns, K sources (padded).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ris_fast.config.schema import ConfigError, Task
from ris_fast.config.section import KINDS, typed
from ris_fast.config.spelling import did_you_mean
from ris_fast.config.user_code import first_line, load_reference, short_reference, where_raised
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import to_pairs

WHAT = "a class derived from torch.nn.Module, or a function that makes one"
SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
WRAPPED = {  # what others make of a module: what to do instead
    "OptimizedModule": "Leave torch.compile(...) out; training.compile has it compiled",
    "RecursiveScriptModule": "Leave torch.jit.script(...) out; training.compile has it compiled",
    "TopLevelTracedModule": "Leave torch.jit.trace(...) out; training.compile has it compiled",
    "DataParallel": "Leave it out; several GPUs are torchrun's, docs/ranks.md",
    "DistributedDataParallel": "Leave it out; several GPUs are torchrun's, docs/ranks.md",
}
OPTIONAL = ("head_parameters", "classical")
LOCATED = ("azimuth", "elevation", "range_m", "count_logits")


class OwnNetwork(nn.Module):
    """A module of the user's own with all that the trainer asks of a network.

    It has the parameters, buffers and submodules of `net` themselves, under their own names, so that a checkpoint is a
    state dict of `net`. Calling it calls `net` and makes a `Prediction` of the answer.

    Args: net: forward(snapshots, channel, codes, snr_db) -> factor or `Prediction`; task: of its scenes; name: what
        messages call it.
    Raises: ConfigError, from a call, where the answer is no factor of this task.
    """

    def __init__(self, net: nn.Module, task: Task, name: str) -> None:
        mode = net.training
        self.__dict__["net"] = net  # not a submodule: its parts are this module's own
        super().__init__()
        self.training = mode
        # By way of __dict__, because their network may have submodules of these names.
        self.__dict__ |= {part: net.__dict__[part] for part in SHARED}
        self.__dict__ |= {part: getattr(net, part) for part in OPTIONAL if _is_method(net, part)}
        in_two = all(_is_method(net, part) for part in ("features", "trunk"))
        self.__dict__ |= {"task": task, "name": name, "in_two": in_two}

    def head_parameters(self) -> list[nn.Parameter]:
        """The group with a learning rate of its own; the network's own method takes the place of this one."""
        return []

    def features(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Any:
        """What holds no parameter, and is kept for scenes that are shown again; the inputs where the network does not
        say."""
        inputs = snapshots, channel, codes, snr_db
        return self.net.features(*inputs) if self.in_two else inputs

    def trunk(self, features: Any) -> Prediction:
        """The rest, as a `Prediction`."""
        answer = self.net.trunk(features) if self.in_two else self.net(*features)
        return as_prediction(answer, self.task, self.name)

    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Prediction:
        return as_prediction(self.net(snapshots, channel, codes, snr_db), self.task, self.name)

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The mode of `net` itself, whoever sets it."""
        return self.net.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.net.training = mode

    def train(self, mode: bool = True) -> OwnNetwork:
        self.net.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.net.load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OwnNetwork:
        """What `.to(device)` and its like go through."""
        self.net._apply(fn, recurse)
        return self


def own_network(name: str, task: Task, options: Mapping[str, Any]) -> OwnNetwork:
    """The network that `model.name` = 'module:NAME' or 'file.py:NAME' names, made as NAME(task, **options).

    Raises: ConfigError in one line, about the reference, an option or what its constructor raises.
    """
    make = load_reference("model.name", name, WHAT, _makes_module, sole=_is_network_class)
    who = short_reference(name)
    given = _checked_options(who, make, options)
    try:
        net = make(task, **given)
    except Exception as error:  # whatever their constructor raises
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{who}: its constructor raised {first_line(error)}{where_raised(error)}. It is called as NAME(task,"
            f" **model.options) with {_said(given)}."
        ) from error
    return adapted(net, task, who)


def adapted(net: Any, task: Task, who: str) -> Any:
    """The module as the trainer calls it; one of this project's own as it is. Raises: ConfigError for no module, or for
    layers and parameters that torch cannot see in it."""
    if not isinstance(net, nn.Module):
        raise ConfigError(f"{who} is a {type(net).__name__}; expected a torch.nn.Module.")
    if type(net).__module__.startswith("ris_fast."):
        return net
    if instead := next((todo for kind, todo in WRAPPED.items() if type(net).__name__ == kind), None):
        raise ConfigError(f"{who} is a {type(net).__name__}; expected the module that is in it. {instead}.")
    _refuse_hidden(net, who)
    if lazy := [name for name, each in net.named_parameters() if isinstance(each, nn.UninitializedParameter)]:
        raise ConfigError(
            f"{who}: {lazy[0]} has no shape yet: a lazy layer gets one in its first call, and a checkpoint is loaded"
            " before any. Give its sizes, which the task has."
        )
    return OwnNetwork(net, task, who)


def as_prediction(answer: Any, task: Task, who: str) -> Prediction:
    """What a network returned, as a `Prediction` whose factor is real pairs.

    Args: answer: a factor, complex (B, N, Q) or real pairs (B, N, Q, 2); or a `Prediction` with one.
    Raises: ConfigError naming the output, what it is and what is expected. Looks at no value.
    """
    prediction = answer if isinstance(answer, Prediction) else Prediction(answer)
    factor = prediction.factor
    if not isinstance(factor, Tensor):
        raise ConfigError(
            f"{who} returned a {type(factor).__name__}; expected its factor F, complex (B, N, Q) or real pairs"
            " (B, N, Q, 2), or ris_fast.models.Prediction(F, ...)."
        )
    if factor.is_complex():
        factor = to_pairs(factor)
    if factor.dim() != 4 or factor.shape[1] != task.elements or factor.shape[3] != 2 or not factor.is_floating_point():
        raise ConfigError(
            f"{who} returned a factor {tuple(prediction.factor.shape)} of {prediction.factor.dtype}; expected complex"
            f" (B, {task.elements}, Q) or real pairs (B, {task.elements}, Q, 2): N = {task.elements} elements, any"
            " number Q of columns, R = F F^H."
        )
    for name in LOCATED:
        value = getattr(prediction, name)
        if value is not None and tuple(value.shape) != (factor.shape[0], task.max_sources):
            raise ConfigError(
                f"{who} returned {name} {tuple(value.shape)}; expected (B, K) = ({factor.shape[0]},"
                f" {task.max_sources}) with K = task.max_sources, or None."
            )
    return prediction._replace(factor=factor)


def _makes_module(found: Any) -> bool:
    return _is_network_class(found) or inspect.isfunction(found) or isinstance(found, partial)


def _is_network_class(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, nn.Module)


def _is_method(net: nn.Module, name: str) -> bool:
    """Whether its class defines the method; a submodule of this name, such as torchvision's `features`, is none."""
    return callable(getattr(type(net), name, None))


def _checked_options(who: str, make: Callable[..., nn.Module], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the kinds that the constructor's annotations say. Raises: ConfigError."""
    known = dict(inspect.signature(make).parameters)
    first = next(iter(known), None)
    takes_any = [each.kind for each in known.values() if each.kind is inspect.Parameter.VAR_KEYWORD]
    if first is None or known[first].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    ):
        raise ConfigError(
            f"{who} takes no task: it is called as NAME(task, **model.options). Make `task` its first argument."
        )
    named = {key: each for key, each in known.items() if key != first and each.kind not in _VARIADIC}
    for key in options:
        if key not in named and not takes_any:
            hint = did_you_mean(key, named) if named else " It takes none."
            raise ConfigError(f"{who} has no option '{key}'.{hint}")
    missing = [key for key, each in named.items() if each.default is inspect.Parameter.empty and key not in options]
    if missing:
        raise ConfigError(
            f"{who} needs {', '.join(missing)}: its first argument is the task, the others are options. Give them"
            f" defaults, or set model.options.{missing[0]}."
        )
    return {key: _of_kind(f"model.options.{key}", named.get(key), value) for key, value in options.items()}


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _of_kind(where: str, parameter: inspect.Parameter | None, value: Any) -> Any:
    annotation = getattr(parameter, "annotation", None)
    kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return typed(kind, value, where) if kind in KINDS else value


def _refuse_hidden(net: nn.Module, who: str) -> None:
    """Raises: ConfigError for plain attributes that hold layers or weights which the network does not have otherwise:
    torch would neither train nor save them."""
    seen = {id(each) for each in (*net.modules(), *net.parameters())}
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            place = f"{who}: self.{path + '.' if path else ''}{name} is a"
            if name.startswith("_") or id(value) in seen:
                continue
            if isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
                raise ConfigError(
                    f"{place} tensor that requires a gradient and no parameter: it would be neither trained nor saved."
                    f" Write self.{name} = nn.Parameter(...)."
                )
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            if kind := next((kind for each in held if id(each) not in seen and (kind := _holds(each))), ""):
                raise ConfigError(
                    f"{place} python {type(value).__name__} of {kind.lower()}s, which torch does not see: they would be"
                    f" neither trained nor saved. Write self.{name} ="
                    f" nn.{kind}{'Dict' if isinstance(value, dict) else 'List'}(...)."
                )


def _holds(value: Any) -> str:
    if isinstance(value, nn.Module):
        return "Module" if next(value.parameters(), None) is not None else ""
    return "Parameter" if isinstance(value, nn.Parameter) else ""


def _said(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
