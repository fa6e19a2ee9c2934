"""FusedAdamW and torch.distributed: checkpoints hold averages and counters; sharded parameters are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ris_fast import FusedAdamW

dist = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
X = torch.linspace(-1, 1, 12).view(4, 3)


def made() -> tuple[nn.Module, FusedAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, FusedAdamW(model.named_parameters(), lr=0.1, ema_decay=0.9, loss_scale="dynamic", max_grad_norm=0.1)


def train(model: nn.Module, optimizer: FusedAdamW) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.scale(model(X).square().mean()).backward()
        optimizer.step()


def averages(model: nn.Module, optimizer: FusedAdamW) -> list[torch.Tensor]:
    with optimizer.ema():
        return [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}], ids=str
)
def test_fused_adamw_distributed_checkpoint_restores_averages(options: dict[str, bool]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    how = StateDictOptions(**options)
    one, two = made(), made()
    train(*one)
    weights, state = copy.deepcopy(get_state_dict(*one, options=how))
    set_state_dict(*two, model_state_dict=weights, optim_state_dict=state, options=how)
    for _ in range(2):
        assert all(map(torch.equal, averages(*one), averages(*two)))
        assert one[1].counters() == two[1].counters()
        train(*one), train(*two)


@pytest.mark.filterwarnings("ignore")
def test_fused_adamw_loads_distributed_checkpoint_of_torch() -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    (model, _), (other, optimizer) = made(), made()
    plain = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(X).square().mean().backward()
    plain.step()
    weights, state = copy.deepcopy(get_state_dict(model, plain))
    set_state_dict(other, optimizer, model_state_dict=weights, optim_state_dict=state)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(plain.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])


@pytest.fixture
def alone() -> Iterator[Any]:
    """A process group of this process, over gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_fused_adamw_refuses_sharded_parameters_by_name(alone: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model, _ = made()
    fully_shard(model, mesh=alone)
    with pytest.raises(ValueError, match=r"parameter 0.weight is a DTensor.*FSDP2 \(fully_shard\).*torch.optim.AdamW"):
        FusedAdamW(model.named_parameters())
    for original in (False, True):
        sharded = FullyShardedDataParallel(made()[0], use_orig_params=original, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="belongs to FSDP.*torch.optim.AdamW"):
            FusedAdamW(sharded.parameters())
