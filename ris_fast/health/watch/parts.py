"""What the parts of a model show in its first passes: what they are given and give, the number format that autocast
gives them, and which axis their sequences run over."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.health.watch.copied_hook import CopiedHook
from ris_fast.health.watch.eager import takes_hooks
from ris_fast.health.watch.graph import GraphLeaves, comes_of_parameters_only, modules_of
from ris_fast.health.watch.hooks import OptimizerHooks, plain_name
from ris_fast.health.watch.layers import Layers
from ris_fast.health.watch.tensors import is_plain, tensors_of

CALLS, WITHIN = 256, 4096  # that are looked at for their format, and within a pass
SEQUENTIAL = (nn.RNNBase, nn.MultiheadAttention)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PartHooks:
    """Hooks on the parts of a model, until some passes have been made.

    `called`: ids of the parts that were; `rows_inside`, `sequences`: see `ForwardRecord`.
    """

    def __init__(self, model: nn.Module, leaves: GraphLeaves, by_optimizer: Sequence[OptimizerHooks]) -> None:
        self.leaves, self.by_optimizer = leaves, by_optimizer
        self.names = {id(part): plain_name(path.removesuffix(".")) for path, part in modules_of(model)}
        self.called: set[int] = set()
        self.calls, self.layers = PartCalls(), Layers()
        self.inside: list[tuple[str, int]] = []  # layers of the pass that runs, and the rows that they are given
        self.rows_inside: list[tuple[int, int, list[tuple[str, int]]]] = []
        self.sequences: list[tuple[tuple[int, ...], tuple[int, ...], list[tuple[str, int, int]]]] = []
        self.states: list[Tensor] = []  # that recurrent layers gave in the pass before, and in this one
        self.next_states: list[Tensor] = []
        self.carried = 0  # calls that were given such a state again
        hook = CopiedHook(self._call, self._call_again)
        parts = (
            [] if _compiled(model) else [each for each in model.modules() if each is not model and takes_hooks(each)]
        )
        self.hooks = [part.register_forward_hook(hook) for part in parts]

    def begin(self) -> None:
        """Before a pass of the model."""
        self.states, self.next_states = self.next_states, []
        if self.inside or self.calls.sequences:
            self.inside, self.calls.sequences = [], []
        self.layers.begin()

    def keep(self, shape: tuple[int, ...], output_shape: tuple[int, ...]) -> None:
        """After a pass from an input to an output of these shapes: keeps what its layers were given."""
        if self.inside and output_shape:
            self.rows_inside.append((shape[0] if shape else 0, output_shape[0], self.inside))
        if self.calls.sequences:
            self.sequences.append((shape, output_shape, self.calls.sequences))

    def unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.states, self.next_states = [], [], []
        self.layers.begin()

    def _call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.called.add(id(module))
        name, steps = self.names.get(id(module), "?"), sum(each.steps for each in self.by_optimizer)
        self.layers.note(name, module, args, output, steps, module.training and torch.is_grad_enabled())
        if isinstance(module, nn.RNNBase) and module.training and isinstance(output, tuple):
            places = {each.data_ptr() for each in self.states}
            self.carried += any(each.data_ptr() in places for each in tensors_of(args[1:]) if _is_placed(each))
            # Detached, they keep their place in memory, and no graph.
            self.next_states = [each.detach() for each in tensors_of(output[1:]) if _is_placed(each)]
        if args and isinstance(args[0], Tensor) and args[0].ndim > 1:
            self.calls.note(name, module, args[0], output)
            if not module._modules and len(self.inside) < WITHIN and not self._of_parameters_only(args[0]):
                self.inside.append((name, args[0].shape[0]))

    def _call_again(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Within a backward pass, which computes a part once more."""
        self.layers.note_again(self.names.get(id(module), "?"), args, output)

    def _of_parameters_only(self, given: Tensor) -> bool:
        """Whether what a part is given has other rows than the part before it, and is made of parameters, as learned
        tokens and the weights that a parametrization makes."""
        if self.inside and self.inside[-1][1] == given.shape[0]:
            return False
        own = self.leaves.own_parameters()
        return id(given) in own or (given.grad_fn is not None and comes_of_parameters_only(given.grad_fn, own.keys()))


def _is_placed(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.numel() > 0


class PartCalls:
    """Calls of a model's parts, counted.

    `formats`: by what a layer with weights made of autocast: "used", "ignored" where its output stays in float32,
    "left" where autocast is off within a region that it is on in.
    `sequences`: of this pass, layers that take time first, and the first two axes that each is given.
    """

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.sequences: list[tuple[str, int, int]] = []
        self.open: bool | None = None  # a region was seen to be open around one that is off

    def note(self, name: str, module: nn.Module, given: Tensor, output: Any) -> None:
        """One call."""
        if type(module) in WEIGHTED and sum(self.formats.values()) < CALLS:
            kind = _format(module, given, output)
            if kind == "left" and self.open is None:  # looked for once: it takes a while
                self.open = _is_open(given.device.type)
            self.formats[kind if kind != "left" or self.open else ""] += 1
        elif (
            isinstance(module, SEQUENTIAL)
            and not module.batch_first
            and given.ndim == 3
            and len(self.sequences) < CALLS
        ):
            self.sequences.append((name, given.shape[0], given.shape[1]))

    def by_format(self) -> dict[str, int]:
        """Calls by what became of autocast."""
        return {name: count for name, count in self.formats.items() if name}


def _format(module: nn.Module, given: Tensor, output: Any) -> str:
    """Empty where no autocast is about; "left" also within a region that is off itself."""
    device = given.device.type
    plain = isinstance(output, Tensor) and given.is_floating_point() and torch.amp.is_autocast_available(device)
    if not plain or getattr(getattr(module, "weight", None), "dtype", None) != torch.float32:
        return ""
    if torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        return "" if narrow == torch.float32 else "used" if output.dtype == narrow else "ignored"
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return "left" if nesting > 2 and output.dtype == torch.float32 else ""


def _is_open(device: str) -> bool:
    """Whether there is an autocast region that is switched on and has been entered."""
    regions = [each for each in gc.get_objects() if type(each) is torch.autocast]
    return any(each._enabled and each.device == device and hasattr(each, "prev") for each in regions)


def _compiled(model: nn.Module) -> bool:
    """Whether it has a compiled part, which would be compiled again when hooks come or go."""
    optimized = sys.modules.get("torch._dynamo.eval_frame")
    return any(
        part._compiled_call_impl is not None or (optimized and isinstance(part, optimized.OptimizedModule))
        for part in model.modules()
    )
