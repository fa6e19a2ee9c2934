"""Which modules of a network are in a mode that they should not be in, and for which of them it matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

LISTED = 8  # names in one entry


@dataclass(frozen=True)
class ModuleModes:
    """Modules in one mode, by name; '' is the network itself.

    dropout: those that drop outputs in training, with their share; statistics: those that keep running statistics;
    frozen: those of `names` that have parameters, of which none is trained.
    """

    names: list[str]
    dropout: list[str]
    statistics: list[str]
    frozen: list[str]
    modules: int

    @classmethod
    def of(cls, model: nn.Module, *, training: bool) -> ModuleModes:
        """The modules whose mode is this one."""
        found = [(name, module) for name, module in model.named_modules() if module.training == training]
        return cls(
            [name for name, _ in found],
            [f"{name} ({type(each).__name__}, {share:g})" for name, each in found if (share := dropped(each))],
            [f"{name} ({type(each).__name__})" for name, each in found if keeps_statistics(each)],
            [name for name, each in found if _is_frozen(each)],
            sum(1 for _ in model.modules()),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "modules": self.modules,
            "names": self.names[:LISTED],
            "dropout": self.dropout[:LISTED],
            "statistics": self.statistics[:LISTED],
            "frozen": len(self.frozen),
        }


def dropped(module: nn.Module) -> float:
    """The share of its inputs that a module drops in training, as far as an attribute says so."""
    share = getattr(module, "p" if "Dropout" in type(module).__name__ else "dropout", 0.0)
    return share if isinstance(share, float) else 0.0


def keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(each.requires_grad for each in parameters)
