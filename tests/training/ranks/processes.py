"""Ranks for a test, without torchrun: forks of a process that has imported torch, and a store where they meet."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ris_fast.training.trainer", "ris_fast.commands.train"])
PATIENCE = 120.0


class Ended(NamedTuple):
    """How a rank ended: what its function returned, or the error's name and text; seconds after the start."""

    value: Any
    error: str
    seconds: float


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Ended]:
    """`function(*args)` in `size` processes, which find each other as under torchrun. `error` is 'killed' of one that
    said nothing."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    began, ranks = time.monotonic(), []
    for rank in range(size):
        ours, theirs = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=_rank, args=(theirs, rank, size, store.port, function, args), daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    return [_ended(process, ours, began) for process, ours in ranks]


def values(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What the function returned on each rank, all of which ended well."""
    ended = run_ranks(size, function, *args)
    assert not [each.error for each in ended if each.error], [each.error for each in ended]
    return [each.value for each in ended]


def _ended(process: Any, ours: Any, began: float) -> Ended:
    try:
        value, error = pickle.loads(ours.recv_bytes()) if ours.poll(PATIENCE) else (None, "said nothing in time")
    except EOFError:
        value, error = None, "killed"
    seconds = time.monotonic() - began
    process.join(5.0)
    process.kill()
    return Ended(value, error, seconds)


def _rank(connection: Any, rank: int, size: int, port: int, function: Callable[..., Any], args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        said = function(*args), ""
    except BaseException as error:
        said = None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    connection.send_bytes(pickle.dumps(said))
    connection.close()
    os._exit(0)
