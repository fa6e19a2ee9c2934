"""Other modules that the loop has at hand, such as averages, targets and teachers, and weights that it keeps in a dict
or a list: how they follow the model.

They are looked for by name, in the functions that have led to a step, a few times in a run; then a few of their numbers
are read beside the model's own, in pairs of steps that lie further and further apart.

Legend: S numbers, a few of every tensor.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ris_fast.health.watch.copied_hook import CopiedHook
from ris_fast.health.watch.eager import takes_hooks
from ris_fast.health.watch.forward import is_modal
from ris_fast.health.watch.hooks import OptimizerHooks, plain_name
from ris_fast.health.watch.records import HelperRecord
from ris_fast.health.watch.samples import few_numbers, has_norm, joined, local_values

SEARCHES = (4, 48, 256)  # steps after which helpers are looked for
FRAMES, VALUES, KEPT = 24, 512, 8  # of a search; helpers
NEAR = 0.05  # of a part's first weights, within which a copy lies
NEVER = 2**62  # a step that no loop makes
SAMPLES, GROWING = 64, 8  # pairs of steps, which lie apart by this part of the steps made
SHORT = (torch.float16, torch.bfloat16)
CONTAINERS = (nn.ModuleDict, nn.ModuleList)  # that nobody calls
TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class _Place:
    """Where tensors are found again that no module has: a variable of a function, or what an object in one holds."""

    code: Any
    variable: str
    attribute: str

    def find(self, frame: FrameType | None) -> Any:
        for _ in range(FRAMES):
            if frame is None:
                return None
            if frame.f_code is self.code:
                value = frame.f_locals.get(self.variable)
                return getattr(value, self.attribute, None) if self.attribute else value
            frame = frame.f_back
        return None


@dataclass
class _Helper:
    name: str
    module: weakref.ref[nn.Module] | _Place
    of: str | None
    part: weakref.ref[nn.Module] | None
    as_begun: bool
    training: bool
    dropouts: int
    first: Tensor
    first_part: Tensor | None
    first_buffers: tuple[Tensor, Tensor] | None
    trained: bool = False
    called: bool = False
    hooks: list[Any] = field(default_factory=list)
    last_step: int = 0
    last_part: Tensor | None = None
    flags: list[Tensor] = field(default_factory=list)  # () whether it is as it was
    distances: list[Tensor] = field(default_factory=list)
    averaged: Tensor | None = None  # (), states that it is the mean of, in equal shares
    moved: Tensor | None = None
    way: Tensor | None = None  # (), share of the part's way from its first weights that it has come
    last_own: tuple[Tensor, int] | None = None  # numbers, and how often they were written to
    written: list[Tensor] = field(default_factory=list)  # (2,), of steps that wrote: see `HelperRecord`
    buffers: list[Tensor] = field(default_factory=list)  # (2,) whether its statistics, and the part's, have moved

    def unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


class Helpers:
    """Modules beside the model and frozen parts of it."""

    def __init__(self, model: nn.Module, by_optimizer: Sequence[OptimizerHooks]) -> None:
        self.model, self.by_optimizer = model, by_optimizer
        self.compiled = _compiled()  # before the watch began
        self.found: list[_Helper] = []
        self.aliases: dict[str, int] = {}  # dicts and lists of the model's own numbers, and searches that met them
        self.next = self.next_sample = SEARCHES[0]  # steps after which it wants to look, and to read numbers
        self.samples = 0

    def look(self, step: int, frame: FrameType) -> None:
        """After a step of the first optimizer, which `frame` has led to."""
        if step in SEARCHES:
            self._search(frame)
        if self.found and self.samples < 2 * SAMPLES and step >= self.next_sample:
            self.samples += 1
            with torch.no_grad():
                for helper in self.found:
                    _sample(helper, step, self._tensors(helper, frame))
            self.next_sample = step + 1 if self.samples % 2 else step + max(2, step // GROWING)
        wanted = [each for each in SEARCHES if each > step]
        wanted += [self.next_sample] if self.found and self.samples < 2 * SAMPLES else []
        self.next = min(wanted, default=NEVER)

    def close(self) -> None:
        for helper in self.found:
            helper.unhook()

    def like(self, numbers: Tensor) -> dict[str, Tensor]:
        """By name of a helper that is as large, (): whether it has these numbers."""
        frame, found = sys._getframe(1), {}
        for helper in self.found:
            now = few_numbers([p.detach() for p in self._tensors(helper, frame)])
            if now.shape == numbers.shape and now.device == numbers.device:
                found[helper.name] = (now == numbers).all()
        return found

    def _tensors(self, helper: _Helper, frame: FrameType) -> list[Tensor]:
        if isinstance(helper.module, _Place):
            return _weights_like(self.model, helper.module.find(frame))
        return [] if (module := helper.module()) is None else _tensors(module)

    def _called(self, module: nn.Module, *_: Any) -> None:
        """Its first call is all that is asked for."""
        for helper in self.found:
            whole = _module_of(helper)
            if not helper.called and whole is not None and any(part is module for part in whole.modules()):
                helper.called = True
                helper.unhook()

    # ---- where they are -----------------------------------------------------------------------------------------

    def _search(self, frame: FrameType | None) -> None:
        if _compiled() != self.compiled:
            return  # hooks and what they keep would make the loop compile again
        own = {id(part) for part in self.model.modules()}
        held = {id(p) for hooks in self.by_optimizer for p in hooks.found.values()}
        known = {id(_module_of(each)) for each in self.found}
        idle = [
            (name, part)
            for name, part in self.model.named_modules()
            if name and (numbers := [p for p in part.parameters()]) and not any(id(p) in held for p in numbers)
        ]
        near = list(_kept_near(frame))
        outside = [(name, each) for name, each, _ in near if isinstance(each, nn.Module) and id(each) not in own]
        for name, module in [*idle, *outside]:
            if len(self.found) < KEPT and id(module) not in known and not _within(module, self.found):
                known.add(id(module))
                if takes_hooks(module) and (helper := self._begin(name, module, held)) is not None:
                    self.found.append(helper)
                    called = [module, *module.children()] if type(module) in CONTAINERS else [module]
                    helper.hooks = [each.register_forward_pre_hook(CopiedHook(self._called)) for each in called]
        for name, value, place in near:
            if place is not None and len(self.found) < KEPT and (tensors := _weights_like(self.model, value)):
                self._note_weights(name, tensors, place)

    def _note_weights(self, name: str, tensors: list[Tensor], place: _Place) -> None:
        """Weights in a dict or a list: the model's own under another name, or others."""
        own = [p for p in self.model.parameters() if p.requires_grad and has_norm(p)]
        if all(local_values(p).data_ptr() == local_values(q).data_ptr() for p, q in zip(tensors, own)):
            self.aliases[name] = self.aliases.get(name, 0) + 1
        elif place not in [each.module for each in self.found]:
            begun = [by.origin.kept for by in self.by_optimizer]
            kept = [next((each[id(p)][0] for each in begun if id(p) in each), None) for p in own]
            if any(each is None for each in kept):
                return
            first, was = few_numbers([each.detach() for each in tensors]), joined([each.float() for each in kept])  # type: ignore[union-attr]
            as_begun = was.shape == first.shape and bool((was.to(first.device) - first).norm() <= NEAR * was.norm())
            part = weakref.ref(self.model)
            self.found.append(_Helper(name, place, "", part, as_begun, False, 0, first, was, None))

    def _begin(self, name: str, module: nn.Module, held: set[int]) -> _Helper | None:
        tensors = _tensors(module)
        if not tensors or any(p is q for p in tensors for q in self.model.parameters() if id(q) in held):
            return None
        shapes = [tuple(each.shape) for each in tensors]
        path, part = next(
            (
                (path, part)
                for path, part in self.model.named_modules()
                if [tuple(p.shape) for p in part.parameters()] == shapes
                and part is not module
                and all(id(p) in held for p in part.parameters())
            ),
            (None, None),
        )
        begun = [by.origin.kept for by in self.by_optimizer]
        first = few_numbers(tensors)
        was = None
        if part is not None:
            kept = [next((each[id(p)][0] for each in begun if id(p) in each), None) for p in part.parameters()]
            was = joined([each.float() for each in kept]) if all(each is not None for each in kept) else None
        as_begun = False
        if was is not None and was.shape == first.shape:
            was = was.to(first.device)
            as_begun = bool((was - first).norm() <= NEAR * was.norm())
        buffers = _buffers(module), _buffers(part) if part is not None else None
        return _Helper(
            name,
            weakref.ref(module),
            path,
            None if part is None else weakref.ref(part),
            as_begun,
            module.training,
            sum(is_modal(each) and each.training and hasattr(each, "p") for each in module.modules()),
            first,
            was,
            buffers if buffers[0] is not None and buffers[1] is not None else None,  # type: ignore[arg-type]
        )

    def record(self) -> list[HelperRecord]:
        """Reads the device."""
        return [_record(each) for each in self.found]


def _compiled() -> int:
    """Functions that have been compiled in this process."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    return sys.modules["torch._dynamo.utils"].counters["frames"]["total"] if frames is not None else 0


def _module_of(helper: _Helper) -> nn.Module | None:
    return None if isinstance(helper.module, _Place) else helper.module()


def _kept_near(frame: FrameType | None) -> Iterator[tuple[str, Any, _Place | None]]:
    """Of the variables of the functions that led here, and of the objects that they hold, the modules, and dicts and
    lists with tensors, with their place."""
    seen, count = set(), 0
    for _ in range(FRAMES):
        if frame is None:
            return
        if not frame.f_code.co_filename.startswith(TORCH):
            spaces = [frame.f_locals, frame.f_globals] if frame.f_code.co_name == "<module>" else [frame.f_locals]
            for name, value in [item for space in spaces for item in list(space.items())]:
                count += 1
                if count > VALUES or name.startswith("__"):
                    continue
                for path, each, attribute in _inside(name, value):
                    of_tensors = _has_tensors(each)
                    if (isinstance(each, nn.Module) or of_tensors) and id(each) not in seen:
                        seen.add(id(each))
                        yield path, each, _Place(frame.f_code, name, attribute) if of_tensors else None
        frame = frame.f_back


def _has_tensors(value: Any) -> bool:
    """Whether it is a dict, a list or a tuple, whose first and last are tensors."""
    if not isinstance(value, (dict, list, tuple)) or not value:
        return False
    some = list(value.values()) if isinstance(value, dict) else value
    return all(isinstance(each, Tensor) and each.ndim <= 8 for each in (some[0], some[-1]))


def _weights_like(model: nn.Module, value: Any) -> list[Tensor]:
    """Tensors in a dict or a list that have the names, or the order, and shapes of the model's trainable parameters;
    none of them is one."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and has_norm(p)}
    if not named or not _has_tensors(value):
        return []
    if isinstance(value, dict):
        names = {str(key).removeprefix("module."): each for key, each in value.items()}
        found = [names.get(plain_name(name), names.get(name)) for name in named]
    else:
        found = list(value)
    if len(found) != len(named):
        return []
    for p, q in zip(found, named.values()):
        if not isinstance(p, Tensor) or p is q or p.shape != q.shape or not has_norm(p) or p.layout != torch.strided:
            return []
    return found  # type: ignore[return-value]


def _inside(name: str, value: Any) -> list[tuple[str, Any, str]]:
    """The value, or what an object of the user's holds, with the attribute's name."""
    if isinstance(value, nn.Module):
        parts = [(f"{name}.{part}", each, "") for part, each in value._modules.items() if each is not None]
        return [(name, value, ""), *parts]
    if _has_tensors(value):
        return [(name, value, "")]
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        return [(f"{name}[{n}]", each, "") for n, each in enumerate(value) if isinstance(each, nn.Module)]
    if isinstance(value, dict) and len(value) <= 16:
        return [(f"{name}[{key!r}]", each, "") for key, each in value.items() if isinstance(each, nn.Module)]
    kept = getattr(value, "__dict__", None) if type(value).__module__.partition(".")[0] not in OTHERS else None
    return [(f"{name}.{key}", each, key) for key, each in list(kept.items())[:64]] if isinstance(kept, dict) else []


OTHERS = {"builtins", "torch", "numpy", "ris_fast", "types", "functools", "typing", "collections", "importlib"}


def _within(module: nn.Module, helpers: Sequence[_Helper]) -> bool:
    """Whether it is part of one that is known, or has one as its part."""
    return any(
        whole is not None and (any(part is module for part in whole.modules())) for whole in map(_module_of, helpers)
    )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if has_norm(p) and p.layout == torch.strided]


def _buffers(module: nn.Module) -> Tensor | None:
    """Running statistics."""
    kept = [each for name, each in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return few_numbers(kept) if kept else None


# ---- what becomes of them -------------------------------------------------------------------------------------------


def _sample(helper: _Helper, step: int, tensors: list[Tensor]) -> None:
    module, part = _module_of(helper), None if helper.part is None else helper.part()
    if not tensors:
        return
    helper.trained |= any(p.is_leaf and p.grad is not None for p in tensors)
    now = few_numbers([p.detach() for p in tensors])
    if now.shape != helper.first.shape or now.device != helper.first.device:
        return
    if isinstance(module, AveragedModel) and module.avg_fn is None and module.multi_avg_fn is None:
        helper.averaged = module.n_averaged.clone()
    helper.flags.append((now == helper.first).all())
    if part is None:
        helper.last_step = step
        return
    of_part = few_numbers([p for p in part.parameters() if p.requires_grad or module is not None])
    now = now.to(of_part.device)  # a copy may be kept elsewhere
    if helper.last_part is not None and step == helper.last_step + 1 and of_part.shape == now.shape:
        moved = (of_part - helper.last_part).norm().clamp_min(1e-30)
        helper.distances.append(torch.minimum((now - of_part).norm(), (now - helper.last_part).norm()) / moved)
    if helper.first_part is not None:
        gone, come = (each - helper.first_part.to(of_part.device) for each in (of_part, now))
        helper.moved, helper.way = gone.any(), (come * gone).sum() / gone.square().sum().clamp_min(1e-30)
    if helper.first_buffers is not None and module is not None:
        both = _buffers(module), _buffers(part)
        if all(each is not None and each.shape == old.shape for each, old in zip(both, helper.first_buffers)):
            pairs = zip(both, helper.first_buffers)
            helper.buffers.append(torch.stack([(each != old).any() for each, old in pairs]))  # type: ignore[operator]
    _note_rounding(helper, tensors, now, of_part, step)
    helper.last_part, helper.last_step = of_part, step


def _note_rounding(helper: _Helper, tensors: list[Tensor], now: Tensor, of_part: Tensor, step: int) -> None:
    """Of a copy in 16 bits of a part in more."""
    if now.dtype not in SHORT or of_part.dtype in SHORT or now.shape != of_part.shape:
        return
    written = sum(each._version for each in tensors if not each.is_inference())
    last, helper.last_own = helper.last_own, (now.clone(), written)
    if last is not None and step == helper.last_step + 1 and written != last[1]:
        changed, cast = (now != last[0]).float().mean(), (now == of_part.to(now.dtype)).float().mean()
        helper.written.append(torch.stack([changed, cast]))


def _record(helper: _Helper) -> HelperRecord:
    flags = [bool(each) for each in helper.flags]
    buffers = [each.tolist() for each in helper.buffers]
    return HelperRecord(
        name=helper.name,
        of=helper.of,
        as_begun=helper.as_begun,
        training=helper.training,
        dropouts=helper.dropouts,
        trained=helper.trained,
        called=helper.called,
        steps=helper.last_step,
        looks=len(flags),
        still=sum(flags),
        distances=[float(each) for each in helper.distances],
        rounded=[(float(changed), float(cast)) for changed, cast in helper.written],
        moved=helper.moved is not None and bool(helper.moved),
        way=None if helper.way is None else float(helper.way),
        kept=isinstance(helper.module, _Place),
        equal_shares=0 if helper.averaged is None else int(helper.averaged),
        buffers_still=bool(buffers) and not any(own for own, _ in buffers) and buffers[-1][1],
    )
