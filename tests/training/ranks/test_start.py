"""The ranks of one start find each other in a store that still holds what an earlier start left."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from ris_fast.training.ranks.group import _name_of_start


def names_of_a_start(store: dist.Store, size: int) -> set[str]:
    with ThreadPoolExecutor(size) as pool:
        return set(pool.map(lambda rank: _name_of_start(store, rank, size), range(size)))


def test_ranks_of_a_start_have_one_name_and_no_earlier_one() -> None:
    store = dist.HashStore()
    names = [names_of_a_start(store, size) for size in (3, 3, 2, 4)]
    assert all(len(each) == 1 for each in names) and len(set.union(*names)) == 4


def test_a_rank_that_died_before_it_was_confirmed_does_no_harm() -> None:
    store = dist.HashStore()
    store.set("ris_fast/hello/1", "a word of a rank that has ended")
    assert len(names_of_a_start(store, 2)) == 1
