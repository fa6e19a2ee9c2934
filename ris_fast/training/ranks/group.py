"""The processes of one run, as torchrun starts them, and what they say to each other.

Every collective here must be called by all ranks, in the same order. On the way between processes there are two
engines of PyTorch's: NCCL for tensors on a GPU, gloo for tensors on the host and for plain values.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ris_fast.config.schema import ConfigError

Value = TypeVar("Value")
PATIENCE = timedelta(minutes=10)  # for a rank that lives and does not come; of one that died the others hear at once
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class Ranks:
    """One process of a run: its number `rank` among `size`, and `local_rank` among the `local_size` of its machine.

    The only one of a run is `ALONE`; every method then returns what it was given, and nothing is sent.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes: rank 0."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def share(self, index: Tensor) -> Tensor:
        """This rank's part of scene numbers (B,): every size-th, so that parts differ by at most one scene."""
        return index[self.rank :: self.size]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over ranks in place. All ranks get the same bits."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, tensor: Tensor) -> Tensor:
        """(size, *shape): the tensors of all ranks, which have the same shape, in order."""
        if self.alone:
            return tensor[None]
        out = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather(list(out.unbind()), tensor.contiguous())
        return out

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """The tensor, with rank 0's values in place."""
        if not self.alone:
            dist.broadcast(tensor, 0)
        return tensor

    def from_first(self, value: Value) -> Value:
        """Rank 0's value, of plain Python; what the others give is not looked at."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def largest(self, values: Sequence[int]) -> list[int]:
        """Of each whole number the largest among all ranks. Over the host: no device waits."""
        if self.alone:
            return list(values)
        shared = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def all_values(self, value: Any) -> list[Any]:
        """The plain values of all ranks, in order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until every rank is here."""
        self.largest([0])

    def leave(self) -> None:
        """Ends the connection, at the end of a run that ended well on every rank."""
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(device: torch.device) -> Ranks:
    """This process's place among those that torchrun started, connected to them; `ALONE` where it started none or one.

    Raises: ConfigError where the variables of the launcher are incomplete, or the engine is missing in this torch.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return ALONE
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set. Start the ranks with"
            " torchrun --nproc-per-node=N -m ris_fast train ..., or unset WORLD_SIZE to train in one process."
        )
    if not dist.is_initialized():
        bound = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group(BACKENDS[device.type], timeout=PATIENCE, **bound)
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, local_size)
