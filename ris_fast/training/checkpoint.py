"""Checkpoints: safetensors with a JSON manifest beside each, written whole or not at all. No pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ris_fast import exit_codes
from ris_fast.config.schema import ConfigError
from ris_fast.files import BEST, CHECKPOINTS, LAST, save_tensors, write_text
from ris_fast.old_names import REPLACED, RESHAPED

UNHASHED = "an earlier version wrote this checkpoint, without hashes: damage to it would not be noticed"
Groups = Mapping[str, Mapping[str, Tensor]]
Contents = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what to do. Exit code 3."""

    exit_code = exit_codes.DATA


def save_checkpoint(folder: Path, name: str, groups: Groups, manifest: Mapping[str, Any]) -> Path:
    """Writes NAME.safetensors, with the manifest in its header, and the manifest again as NAME.json for people.

    `groups` maps a prefix ('model', 'ema', 'optimizer') to its tensors, on the host and without shared memory. The
    manifest gets a SHA-256 of every tensor, and the header one of the manifest, so that no flipped bit is loaded.
    Raises StorageError.
    """
    write_checkpoint(folder, name, named_as_in_file(groups), manifest)
    return folder / f"{name}.safetensors"


def named_as_in_file(groups: Groups) -> dict[str, Tensor]:
    """The model's tensors by their own names, the others as 'prefix/name': any reader of safetensors finds the
    weights."""
    return {
        key if prefix == "model" else f"{prefix}/{key}": value
        for prefix, group in groups.items()
        for key, value in group.items()
    }


def write_checkpoint(folder: Path, name: str, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> int:
    """`save_checkpoint` of tensors that have their names in the file. Returns the bytes that were written."""
    hashes = {key: tensor_hash(value) for key, value in tensors.items()}
    text = json.dumps({**manifest, "sha256": hashes}, indent=1, sort_keys=True)
    metadata = {"format": "pt", "manifest": text, "sha256": _text_hash(text)}
    size = save_tensors(folder / f"{name}.safetensors", tensors, metadata)
    return size + write_text(folder / f"{name}.json", text)


def load_checkpoint(folder: Path, name: str) -> Contents:
    """The groups and the manifest that `save_checkpoint` wrote; `manifest["note"]` where there is something to say of
    the file.

    Raises: CheckpointError for a file that is missing or not as it was written; it names the other checkpoint if that
        is whole.
    """
    try:
        return _read(folder / f"{name}.safetensors")
    except CheckpointError as error:
        other = next((each for each in (LAST, BEST) if each != name and read_whole(folder, each) is not None), None)
        if other is None:
            raise
        raise CheckpointError(
            f"{error} '{other}' is whole; give {folder / f'{other}.safetensors'} in its place."
        ) from error


def read_whole(folder: Path, name: str) -> Contents | None:
    """What `load_checkpoint` returns; None for a file that is missing or damaged."""
    try:
        return _read(folder / f"{name}.safetensors")
    except CheckpointError:
        return None


def read_settings(folder: Path, name: str) -> tuple[str, dict[str, Any]] | None:
    """The preset and the settings that a checkpoint was trained with, 'section.key' -> plain value, from its header
    alone; None for a file that is missing, damaged there, or from a version that did not write them."""
    try:
        with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
            metadata = file.metadata()
        if metadata["sha256"] != _text_hash(metadata["manifest"]):
            return None
        manifest = json.loads(metadata["manifest"])
        return manifest["preset"], manifest["settings"]
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RuntimeError):
        return None


def tensor_hash(value: Tensor) -> str:
    """SHA-256 of a CPU tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
    digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> Contents:
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint '{path}'. Give the folder of a run that has saved one.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            manifest = json.loads(metadata["manifest"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Use another checkpoint of this run.") from error
    _verify(path, metadata, manifest, tensors)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        prefix, slash, rest = key.partition("/")
        groups.setdefault(prefix if slash else "model", {})[rest if slash else key] = value
    return groups, manifest


def _verify(path: Path, metadata: Mapping[str, str], manifest: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compares the hashes; a file that has none at all, from an earlier version, gets a note in its manifest."""
    hashes = manifest.get("sha256")
    if hashes is None and set(metadata) == {"format", "manifest"}:
        manifest["note"] = f"{path}: {UNHASHED}"
        return
    as_written = {"format": "pt", "manifest": metadata["manifest"], "sha256": _text_hash(metadata["manifest"])}
    if not isinstance(hashes, dict) or metadata != as_written:
        raise CheckpointError(
            f"{path} is damaged: its header is not the one that was written. Use another checkpoint of this run."
        )
    wrong = sorted(
        key
        for key in hashes.keys() | tensors.keys()
        if key not in tensors or hashes.get(key) != tensor_hash(tensors[key])
    )
    if wrong:
        raise CheckpointError(
            f"{path} is damaged: {len(wrong)} of {len(hashes)} tensors are not what was written, first '{wrong[0]}' "
            "(SHA-256). Use another checkpoint of this run."
        )


def checkpoint_of(run: str | Path) -> tuple[Path, str]:
    """The run folder, and the name of the checkpoint: the best one of a run's folder, or the file that was given.

    Raises ConfigError for another file of a run.
    """
    path = Path(run)
    if path.is_dir():
        return (path.parent if path.name == CHECKPOINTS and not (path / "config.toml").is_file() else path), BEST
    if path.suffix == ".safetensors" and path.parent.name == CHECKPOINTS:
        return path.parent.parent, path.stem
    if not path.exists():
        raise ConfigError(
            f"{path} is not there, so not a run folder. Give the folder that train printed, or a checkpoint of a run."
        )
    raise ConfigError(
        f"{path} is no checkpoint. Give the folder of the run, which means its best checkpoint, or a file of"
        f" RUN/{CHECKPOINTS} whose name ends in .safetensors."
    )


def better_weights(folder: Path, name: str) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Of a checkpoint the better of its two sets of weights, which one that is ("raw" or "ema"), and the manifest."""
    groups, manifest = load_checkpoint(folder, name)
    state = manifest["state"]
    kind = state["best_weights"] if name == BEST else "ema" if "ema" in groups and _ema_is_better(state) else "raw"
    return groups["ema" if kind == "ema" else "model"], kind, manifest


def _ema_is_better(state: Mapping[str, Any]) -> bool:
    """By the last validation; figures that are not finite are text in a checkpoint."""
    raw, ema = float(state["val_nmse_raw"]), float(state["val_nmse_ema"])
    return ema < raw or (math.isfinite(ema) and not math.isfinite(raw))


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Loads weights strictly; a mismatch names the tensors."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{key}: {tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the network"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    replaced = [todo for name, todo in REPLACED.items() if name in extra]
    if replaced:
        raise CheckpointError(f"{where} does not fit this network: {replaced[0]}")
    if missing or extra or shapes:
        known = "".join(
            f" {RESHAPED[name]}" for name in RESHAPED if any(each.startswith(f"{name}:") for each in shapes)
        )
        raise CheckpointError(
            f"{where} does not fit this network. Missing: {missing[:5]}; not known: {extra[:5]}; "
            f"other shapes: {sorted(shapes)[:5]}. Use the configuration that the checkpoint was made with.{known}"
        )
    model.load_state_dict(dict(weights))
