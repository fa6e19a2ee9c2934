"""`ris-fast convert`: turns .npz shards of the original pipeline, HDF5 and MATLAB files into a data set of ours."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ris_fast import exit_codes
from ris_fast.commands.simulate import train_command
from ris_fast.config.load import load_config, toml_value
from ris_fast.config.schema import Config, ConfigError
from ris_fast.data.conversion.convert import convert
from ris_fast.data.conversion.mapped_file import mapped_files_of
from ris_fast.data.conversion.mapping import FileMapping, read_mapping
from ris_fast.data.conversion.scene_file import Files, npz_files_of
from ris_fast.data.conversion.starting_map import write_starting_map
from ris_fast.data.conversion.summary import understood
from ris_fast.data.data_path import FOREIGN, npz_files
from ris_fast.data.manifest import manifest_notes, read_any_manifest
from ris_fast.physics.random import SPLITS
from ris_fast.report.console import counter


def convert_command(
    data: Path,
    out: Path | None,
    *,
    mapping: Path | None,
    new_map: Path | None,
    check: bool,
    preset: str | None,
    settings: Sequence[str],
) -> int:
    """Converts, says what it would do, or writes a mapping file to begin with."""
    if new_map is not None:
        return _new_map(new_map, data)
    if out is None and not check:
        raise ConfigError("convert: --out DIR says where to write. Give it, or --check to see what is understood.")
    explained = None if mapping is None else read_mapping(mapping)
    config = _config(explained, preset, settings)
    files = _files(data, explained, config)
    if check:
        for line in understood(config, files):
            print(line)
        return exit_codes.DONE
    manifest = convert(config, files, out, progress=counter("scenes"))
    for note in manifest_notes(read_any_manifest(manifest.parent)):
        print(f"note: {note}")
    command = train_command(manifest.parent, config.preset if preset else None)
    print(f"data set: {manifest.parent}\ntrain on it: {command}")
    return exit_codes.DONE


def _config(mapping: FileMapping | None, preset: str | None, settings: Sequence[str]) -> Config:
    """The configuration, with the task of a mapping file below --set."""
    task: dict[str, Any] = dict(mapping.task) if mapping is not None else {}
    return load_config(None, preset, [*(f"task.{key}={toml_value(value)}" for key, value in task.items()), *settings])


def _files(data: Path, mapping: FileMapping | None, config: Config) -> Files:
    root = Path(os.path.realpath(data))
    if mapping is not None:
        return mapped_files_of(root, mapping, config.task)
    folders = [root, *(root / split for split in SPLITS)] if root.is_dir() else []
    foreign = root.suffix.lower() in FOREIGN or any(
        path.suffix.lower() in FOREIGN for folder in folders if folder.is_dir() for path in folder.iterdir()
    )
    if foreign and not any(npz_files(folder) for folder in folders):
        raise ConfigError(
            f"convert: what is in {data} needs a mapping file, --map FILE.toml, that says which array is what. Begin"
            f" with `ris-fast convert --new-map FILE.toml --data {shlex.quote(str(data))}`."
        )
    return npz_files_of(root, config.task)


def _new_map(path: Path, data: Path) -> int:
    if path.exists():
        raise ConfigError(f"convert: {path} is there already. Give --new-map another name, or remove it.")
    write_starting_map(path, data)
    words = f"--map {shlex.quote(str(path))} --data {shlex.quote(str(data))}"
    print(f"mapping file to complete: {path}\nsee what it does: ris-fast convert {words} --check")
    return exit_codes.DONE
