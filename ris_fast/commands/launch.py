"""What torchrun's variables mean for a command: several processes, and a run that it starts again.

Only the standard library is imported here before it is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ris_fast.config.schema import ConfigError
from ris_fast.environment import launched
from ris_fast.files import SUMMARY


def one_process_only(tokens: Sequence[str]) -> str | None:
    """What is wrong where torchrun has started several processes of a command that is one; None where nothing is."""
    if not launched() or not tokens or tokens[0] == "train" or tokens[0].startswith("-"):
        return None
    return (
        f"{tokens[0]} runs in one process, and {os.environ['WORLD_SIZE']} were started. Start it without torchrun, or"
        " unset WORLD_SIZE; only train takes several."
    )


def restart_count() -> int:
    """How often torchrun has started the processes of this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def restarts_allowed() -> bool:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0


def check_restarts(out: Path | None, resume: Path | None) -> None:
    """Raises: ConfigError where a run that is started again could not be found again."""
    if restarts_allowed() and out is None and resume is None:
        raise ConfigError(
            "torchrun --max-restarts starts the run again where a rank fails, which needs its folder. Give --out DIR,"
            " or --max-restarts=0."
        )


def outcome_of(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that came to its own end, well or not; None of one that was ended from outside, or has not
    ended."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and "ended_by" not in summary else None


def tell_launcher(error: Exception) -> None:
    """Writes the error where torchrun looks for the cause of a failure, unless it only follows from another rank's."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ and not getattr(error, "follows", False):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
