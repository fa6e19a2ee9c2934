"""Learning health in anyone's loop: `watch(model, optimizer)` for plain PyTorch, with `report()` on request.

The package has the name of its function. `ris_fast.health` imports both at once, so that `ris_fast.health.watch` is the
function whatever was imported before; torch is imported when the function is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from ris_fast.health.watch.watcher import Watcher

EVERY = 100


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    every: int = EVERY,
    frozen: Sequence[str] = (),
    stall_s: float | None = None,
) -> Watcher:
    """Begins to watch a plain PyTorch loop; call before training, and `report()` on the result when you want to know.

    Args: model: the module that is trained;
        optimizer: one, or all of them, so that each parameter is looked for where it is;
        every: at least one step in this many is looked at, the first eight all, and more where that costs little;
        frozen: beginnings of names of parameters that are not meant to be trained;
        stall_s: seconds without a step after which a thread logs where the loop stands. Where nothing is given, none
            does in a single process; with several ranks, it says which collective has been waited in for 300 seconds.
            `math.inf` for never.
    Returns: a `Watcher`, whose `report()` gives the findings; `close()`, or the end of `with watch(...) as seen:`,
        takes its hooks away.
    Raises: ValueError for an argument of another kind; ConfigError, which is one, for the beginning of no parameter's
        name.
    """
    from ris_fast.health.watch.watcher import Watcher

    return Watcher(model, optimizer, every, frozen, stall_s)


watch.watch = watch  # type: ignore[attr-defined]  # `import ris_fast.health.watch` and the dotted name work too
