"""Which device a run uses, and whether its network is compiled there."""

from __future__ import annotations

from typing import Callable

import torch
from torch import nn

from ris_fast.config import Config, ConfigError


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ConfigError for a device that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"training.device is '{name}'; expected auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"training.device is '{name}'; kernels exist for cpu and cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"training.device is '{name}', but torch {torch.__version__} sees "
                          f"{torch.cuda.device_count()} CUDA devices. Use --device cpu, or install a CUDA build of torch.")
    return device


def compiled(model: nn.Module, config: Config, device: torch.device) -> tuple[Callable, str]:
    """The network as the step calls it, and one line that says whether it was compiled, and if not, why."""
    if not config.training.compile:
        return model, "eager, as asked"
    missing = missing_compiler(device)
    if missing:
        return model, f"eager: {missing}"
    return torch.compile(model, fullgraph=True, dynamic=False), "compiled with torch.compile"


def missing_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed, which torch.compile needs on a GPU"
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "no C++ compiler was found, which torch.compile needs on a CPU (Debian, Ubuntu: apt-get install g++)"
    return None
