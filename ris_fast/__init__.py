"""ris-fast: covariance networks behind a reconfigurable intelligent surface, trained fast and watched closely.

Names are loaded on first use, so that `import ris_fast` and `ris-fast --help` need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "cov_nmse": "ris_fast.kernels.cov_nmse.op",
    "CovarianceLoss": "ris_fast.training.loss",
    "FusedAdamW": "ris_fast.training.optim.fused_adamw",
    "Trainer": "ris_fast.training.trainer",
    "load_config": "ris_fast.config.load",
    "RISArray": "ris_fast.physics.array",
    "steering": "ris_fast.physics.array",
    "Scenes": "ris_fast.physics.scenes",
    "SceneGenerator": "ris_fast.physics.random",
    "simulate": "ris_fast.physics.scenes",
    "build_model": "ris_fast.models",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ris_fast' has no attribute '{name}'. It has: {', '.join(sorted(_HOMES))}.")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
