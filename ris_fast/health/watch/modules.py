"""What the modules of a model are set to, and how they are put together, at the report."""

from __future__ import annotations

from torch import nn

from ris_fast.health.watch.graph import modules_of
from ris_fast.health.watch.module_records import ModulesRecord, NormRecord


def modules_record(model: nn.Module, called: set[int]) -> ModulesRecord:
    """`called`: ids of the parts that were called. Reads the device."""
    found = ModulesRecord()
    for path, module in modules_of(model):
        name = path.removesuffix(".")
        if id(module) in called or module is model:
            if isinstance(module, nn.modules.dropout._DropoutNd):
                found.dropouts[name] = module.p
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                _note_norm(found, name, module)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            _note_repeated(found, name, module)
        else:
            _note_names(found, name, module)
    return found


def _note_names(found: ModulesRecord, name: str, module: nn.Module) -> None:
    """One part as two attributes."""
    for key, part in module._modules.items():
        other = next((each for each, same in module._modules.items() if same is part and part is not None), key)
        if other != key and part is not None and any(p.requires_grad for p in part.parameters()):
            paths = [f"{name}.{each}".removeprefix(".") for each in (other, key)]
            found.named_twice.append((paths[0], paths[1]))


def _note_norm(found: ModulesRecord, name: str, module: nn.modules.batchnorm._BatchNorm) -> None:
    if not module.track_running_stats:
        found.untracked.append(name)
    elif module.momentum is not None and module.num_batches_tracked is not None:
        batches = int(module.num_batches_tracked)
        share = max(0.0, 1.0 - module.momentum) ** batches
        found.norms.append(NormRecord(name, module.momentum, batches, share, module.training))


def _note_repeated(found: ModulesRecord, name: str, container: nn.Module) -> None:
    parts = [(key, part) for key, part in container._modules.items() if part is not None]
    for key, part in parts:
        count = sum(other is part for _, other in parts)
        first = next(other for other, each in parts if each is part)
        if count > 1 and key == first and any(p.requires_grad for p in part.parameters()):
            found.repeated.append((name, key, count))
