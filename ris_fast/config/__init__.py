"""Every setting of a run: what there is (schema), and where each value came from (load)."""

from ris_fast.config.schema import (
    Config,
    ConfigError,
    Data,
    Health,
    Loss,
    Model,
    Optimizer,
    Report,
    Task,
    Training,
)

__all__ = ["Config", "ConfigError", "Data", "Health", "Loss", "Model", "Optimizer", "Report", "Task", "Training"]
