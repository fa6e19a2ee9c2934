"""Works on the chunks of a batch side by side on a CPU, each on one thread, instead of every operation on all threads.

A pursuit is a thousand small operations. Splitting each of them over the threads makes a thousand meetings, and where
another process holds one of the cores, every meeting waits for it: ten times slower was measured.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """`threads` workers that use one thread each. One pool a process: the threads of a parent do not survive a fork."""
    meeting = threading.Barrier(threads)

    def settle() -> None:
        torch.set_num_threads(1)
        meeting.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="ris-fast")
    for done in [pool.submit(settle) for _ in range(threads)]:
        done.result()
    torch.set_num_threads(threads)  # a worker's setting is its own, but torch would hand it to threads yet to come
    return pool


def parallel_map(work: Callable[..., Any], chunks: Iterable[tuple[Any, ...]]) -> list[Any]:
    """[work(*chunk) for chunk in chunks], in order, on as many threads as torch may use."""
    chunks, threads = list(chunks), torch.get_num_threads()
    if threads == 1 or len(chunks) == 1:
        return [work(*chunk) for chunk in chunks]
    return list(_pool(threads, os.getpid()).map(lambda chunk: work(*chunk), chunks))
