"""The processes of one run, as torchrun starts them, and what they say to each other.

Every collective here must be called by all ranks, in the same order. On the way between processes there are two
engines of PyTorch's: NCCL for tensors on a GPU, gloo for tensors on the host and for plain values.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ris_fast import exit_codes
from ris_fast.config.schema import ConfigError
from ris_fast.environment import launched
from ris_fast.training.compiled_model import choose_device
from ris_fast.training.ranks.lost import EndedByFirst, RankLost, name_the_lost

Value = TypeVar("Value")
PATIENCE = timedelta(minutes=30)  # for a rank that lives and does not come; of one that died the others hear at once
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class Ranks:
    """One process of a run: its number `rank` among `size`, and `local_rank` among the `local_size` of its machine.

    The only one of a run is `ALONE`; every method then returns what it was given, and nothing is sent. Every method
    that sends raises RankLost where another rank has ended. `engine`: what carries tensors of the run's device.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1, *, store: Any = None,
        engine: str = "",
    ) -> None:  # fmt: skip
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.store, self.engine = store, engine

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
            with self._heard():
                dist.all_reduce(tensor)
        return tensor

    def gathered(self, tensor: Tensor) -> Tensor:
        """(size, *shape): the tensors of all ranks, which have the same shape, in order."""
        if self.alone:
            return tensor[None]
        out = tensor.new_empty((self.size, *tensor.shape))
        with self._heard():
            dist.all_gather(list(out.unbind()), tensor.contiguous())
        return out

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """The tensor, with rank 0's values in place."""
        if not self.alone:
            with self._heard():
                dist.broadcast(tensor, 0)
        return tensor

    def from_first(self, value: Value) -> Value:
        """Rank 0's value, of plain Python or tensors on the host; what the others give is not looked at."""
        if self.alone:
            return value
        box = [value if self.first else None]
        with self._heard():
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def by_first(self, work: Callable[[], Value]) -> Value:
        """What `work()` returns on rank 0, the only one that calls it; the others wait for it.

        Raises: on rank 0 what it raises; on the others EndedByFirst, with the exit code of that.
        """
        if self.alone:
            return work()
        if not self.first:
            ended, value = self.from_first(None)
            if ended is not None:
                raise EndedByFirst(ended)
            return value
        try:
            value = work()
        except Exception as error:
            self.from_first((getattr(error, "exit_code", exit_codes.BUG), None))
            raise
        return self.from_first((None, value))[1]

    def largest(self, values: Sequence[int]) -> list[int]:
        """Of each whole number the largest among all ranks. Over the host: no device waits."""
        if self.alone:
            return list(values)
        shared = torch.tensor(values, dtype=torch.int64)
        with self._heard():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def all_values(self, value: Any) -> list[Any]:
        """The plain values of all ranks, in order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        with self._heard():
            dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until every rank is here."""
        self.largest([0])

    def outlast_first(self) -> None:
        """Where all ranks end: the others wait here until rank 0, which may still write, has gone. A launcher that sees
        one of them end with an exit code other than 0 stops the rest."""
        if not self.first:
            with suppress(RuntimeError):
                dist.barrier()

    def leave(self) -> None:
        """Ends the connection, at the end of a run that ended well on every rank."""
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Turns what an engine raises, which names an address at most, into RankLost."""
        try:
            yield
        except RuntimeError as error:
            raise RankLost(name_the_lost(self.store, self.rank, self.size), str(error)) from error


ALONE = Ranks()


def rank_device(name: str) -> torch.device:
    """The device of this process: of several on a machine with GPUs each has the GPU of its local number.

    Raises: ConfigError for a device that this machine does not have, or that several ranks would share.
    """
    device = choose_device(name)
    if not launched() or device.type == "cpu":
        return device
    local_rank, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if device.index is not None:
        raise ConfigError(
            f"training.device is '{name}' with {os.environ['WORLD_SIZE']} ranks; each rank takes the GPU of its local"
            " number. Write cuda, and choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    if local_rank >= there:
        raise ConfigError(
            f"local rank {local_rank} has no GPU: torch sees {there} here. Start torchrun with --nproc-per-node={there}"
            " at most, or train on the processor with --device cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def join(device: torch.device) -> Ranks:
    """This process's place among those that torchrun started, connected to them; `ALONE` where it started none or one.

    Raises: ConfigError where the variables of the launcher are incomplete.
    """
    if not launched():
        return ALONE
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set. Start the ranks with"
            " torchrun --nproc-per-node=N -m ris_fast train ..., or unset WORLD_SIZE to train in one process."
        )
    if not dist.is_initialized():  # else by the script that the trainer is a part of
        _connect(device)
    engines = dict(part.split(":") for part in dist.get_backend_config().split(","))
    if not {"cpu", device.type} <= engines.keys():
        raise ConfigError(
            f"the process group carries tensors of {' and '.join(engines)} only. Make it with"
            f" init_process_group('{BACKENDS[device.type]}'), or leave that to the Trainer."
        )
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Ranks(
        dist.get_rank(), dist.get_world_size(), local_rank, local_size, store=_store, engine=engines[device.type]
    )


_store: Any = None  # torch has one process group a process, and this is where it meets


def _connect(device: torch.device) -> None:
    """Connects the ranks."""
    global _store
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _launchers_store(rank, size)
    _store = dist.PrefixStore(f"ris_fast/{_name_of_start(store, rank, size)}", store)
    bound = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(BACKENDS[device.type], store=_store, rank=rank, world_size=size, timeout=PATIENCE, **bound)


def _launchers_store(rank: int, size: int) -> Any:
    """The store of the launcher. That of torchrun without the prefix that torch gives it, a count of restarts: torchrun
    counts them on the node whose process failed, and not on the others."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=PATIENCE)
    return next(dist.rendezvous("env://", rank, size, timeout=PATIENCE))[0]


def _name_of_start(store: Any, rank: int, size: int) -> str:
    """A name that the ranks of this start have in common, and those of no other.

    torchrun keeps its store when it starts the ranks again, and with it the addresses of those that have ended. Every
    rank leaves a word of its own; rank 0 answers each word with the name, until all ranks have confirmed it, so that
    words of ranks that have ended do no harm. Raises: RankLost after PATIENCE.
    """
    own = uuid.uuid4().hex
    store.set(f"ris_fast/hello/{rank}", own)
    if rank:
        answer = f"ris_fast/start/{own}"
        _wait_until(lambda: store.check([answer]), [0])
        name = store.get(answer).decode()
        store.set(f"ris_fast/here/{name}/{rank}", "")
        return name
    others, answered = range(1, size), set()

    def all_here() -> bool:
        for hello in (f"ris_fast/hello/{other}" for other in others):
            if store.check([hello]) and (word := store.get(hello).decode()) not in answered:
                answered.add(word)
                store.set(f"ris_fast/start/{word}", own)
        return store.check([f"ris_fast/here/{own}/{other}" for other in others])

    _wait_until(all_here, others)
    return own


def _wait_until(come: Callable[[], bool], whose: Sequence[int]) -> None:
    """In short sleeps, so that signals are heard. Raises: RankLost after PATIENCE."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not come():
        if time.monotonic() > deadline:
            raise RankLost(list(whose), "nothing since the start")
        time.sleep(0.02)
