"""`ris-fast simulate`: writes a data set of simulated scenes."""

from __future__ import annotations

import shlex
from pathlib import Path

from ris_fast import exit_codes
from ris_fast.config.schema import Config
from ris_fast.data.write import write_shards
from ris_fast.report.console import counter
from ris_fast.training.compiled_model import choose_device


def simulate_command(config: Config, out: Path, scenes: int, preset: str | None) -> int:
    """Writes the data set and prints the command that trains on it. Args: preset: the one that was asked for."""
    device = choose_device(config.training.device)
    manifest = write_shards(config, out, scenes, device=device, progress=counter("scenes"))
    words = ["ris-fast", "train", *(["--preset", config.preset] if preset else []), "--data", str(manifest.parent)]
    print(f"data set: {manifest.parent}\ntrain on it: {shlex.join(words)}")
    return exit_codes.DONE
