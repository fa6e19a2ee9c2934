"""`ris-fast simulate`: writes a data set of simulated scenes, or checks one."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from ris_fast import exit_codes
from ris_fast.config.schema import Config, ConfigError
from ris_fast.data.check_set import check_set
from ris_fast.data.parallel import cores
from ris_fast.data.splits import split_sizes
from ris_fast.data.write import SHARD_SCENES, write_shards
from ris_fast.report.console import counter
from ris_fast.training.compiled_model import choose_device

WORTH = 16  # shards for each process, whose start takes as long as writing about this many


def simulate_command(
    config: Config, out: Path | None, scenes: int | None, preset: str | None, jobs: int | None = None
) -> int:
    """Writes the data set and prints the command that trains on it. Args: preset: the one that was asked for."""
    if out is None or scenes is None:
        raise ConfigError("simulate: --out DIR and --scenes N say what to write. Give both, or --check DIR alone.")
    device = choose_device(config.training.device)
    jobs = _jobs(scenes, device) if jobs is None else jobs
    manifest = write_shards(config, out, scenes, device=device, progress=counter("scenes"), jobs=jobs)
    print(
        f"data set: {manifest.parent}\ntrain on it: {train_command(manifest.parent, config.preset if preset else None)}"
    )
    return exit_codes.DONE


def train_command(folder: Path, preset: str | None) -> str:
    """The command that trains on a data set."""
    return shlex.join(["ris-fast", "train", *(["--preset", preset] if preset else []), "--data", str(folder)])


def check_set_command(folder: Path, jobs: int | None = None) -> int:
    """Prints a line for each file of a data set that is wrong, and one in the end."""
    if jobs is not None and jobs < 1:
        raise ConfigError(f"simulate: --jobs is {jobs}; expected at least one. Leave it out for all cores.")
    found = check_set(folder, jobs or cores(), counter("scenes"))
    for line in found.wrong:
        print(line)
    said = "every byte is as it was written" if found.whole else "NOT WHOLE"
    print(f"{folder}: {said}; {found.summary}")
    return exit_codes.DONE if found.whole else exit_codes.DATA


def _jobs(scenes: int, device: torch.device) -> int:
    """All cores, as far as there is work for them; one process on a GPU, which is busy with one."""
    shards = sum(split_sizes(max(scenes, 0)).values()) // SHARD_SCENES
    return 1 if device.type == "cuda" else max(1, min(cores(), shards // WORTH))
