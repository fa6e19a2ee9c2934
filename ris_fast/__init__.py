"""ris-fast: covariance networks behind a reconfigurable intelligent surface, trained fast and watched closely.

Names are loaded on first use, so that `import ris_fast` and `ris-fast --help` need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ris_fast.old_names import find_old_modules

if TYPE_CHECKING:  # the names of _HOMES, for type checkers and editors
    from ris_fast.config.load import load_config as load_config
    from ris_fast.inference.predictor import Predictor as Predictor
    from ris_fast.inference.predictor import load as load
    from ris_fast.kernels.cov_nmse.op import cov_nmse as cov_nmse
    from ris_fast.models import build_model as build_model
    from ris_fast.physics.array import RISArray as RISArray
    from ris_fast.physics.array import steering as steering
    from ris_fast.physics.random import SceneGenerator as SceneGenerator
    from ris_fast.physics.scenes import Scenes as Scenes
    from ris_fast.physics.scenes import simulate as simulate
    from ris_fast.report.trackers import Tracker as Tracker
    from ris_fast.training.callback import Callback as Callback
    from ris_fast.training.loss import CovarianceLoss as CovarianceLoss
    from ris_fast.training.optim.fused_adamw import FusedAdamW as FusedAdamW
    from ris_fast.training.trainer import Trainer as Trainer

__version__ = "0.2.0"

_HOMES = {
    "cov_nmse": "ris_fast.kernels.cov_nmse.op",
    "CovarianceLoss": "ris_fast.training.loss",
    "FusedAdamW": "ris_fast.training.optim.fused_adamw",
    "Trainer": "ris_fast.training.trainer",
    "Callback": "ris_fast.training.callback",
    "Tracker": "ris_fast.report.trackers",
    "load_config": "ris_fast.config.load",
    "RISArray": "ris_fast.physics.array",
    "steering": "ris_fast.physics.array",
    "Scenes": "ris_fast.physics.scenes",
    "SceneGenerator": "ris_fast.physics.random",
    "simulate": "ris_fast.physics.scenes",
    "build_model": "ris_fast.models",
    "load": "ris_fast.inference.predictor",
    "Predictor": "ris_fast.inference.predictor",
}
__all__ = [*_HOMES, "__version__"]
find_old_modules()

if not TYPE_CHECKING:  # a type checker that sees it takes every name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'ris_fast' has no attribute '{name}'. It has: {', '.join(sorted(_HOMES))}.")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
