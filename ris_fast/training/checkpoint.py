"""Checkpoints: safetensors with a JSON manifest beside each, written whole or not at all. No pickle anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ris_fast.files import save_tensors, write_text


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what to do. Exit code 3."""

    exit_code = 3


def save_checkpoint(folder: Path, name: str, groups: Mapping[str, Mapping[str, Tensor]],
                    manifest: Mapping[str, Any]) -> Path:
    """Writes NAME.safetensors, with the manifest in its header, and the manifest again as NAME.json for people.

    `groups` maps a prefix ('model', 'ema', 'optimizer') to its tensors. The model's stand under their own names, the
    others under 'prefix/name', so that any reader of safetensors finds the weights. Raises StorageError.
    """
    tensors = {(key if prefix == "model" else f"{prefix}/{key}"): value.detach().cpu().contiguous().clone()
               for prefix, group in groups.items() for key, value in group.items()}
    text = json.dumps(manifest, indent=1, sort_keys=True)
    path = folder / f"{name}.safetensors"
    save_tensors(path, tensors, {"format": "pt", "manifest": text})
    write_text(folder / f"{name}.json", text)
    return path


def load_checkpoint(folder: Path, name: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups and the manifest that `save_checkpoint` wrote. Raises CheckpointError for a file that is not whole."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint '{path}'. Give the folder of a run that has saved one.")
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {})["manifest"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Use another checkpoint of this run.") from error
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        prefix, slash, rest = key.partition("/")
        groups.setdefault(prefix if slash else "model", {})[rest if slash else key] = value
    return groups, manifest


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Loads weights strictly; a mismatch names the tensors."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [f"{key}: {tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the network"
              for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    if missing or extra or shapes:
        raise CheckpointError(f"{where} does not fit this network. Missing: {missing[:5]}; not known: {extra[:5]}; "
                              f"other shapes: {shapes[:5]}. Use the configuration that the checkpoint was made with.")
    model.load_state_dict(dict(weights))
