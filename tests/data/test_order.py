"""The order of an epoch is a permutation, the same everywhere, and looks like one drawn at random."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from ris_fast.config.schema import Config, Data
from ris_fast.data.order import BLOCK, EpochOrder
from ris_fast.data.simulated import SimulatedSource
from ris_fast.data.source import epoch_batches

SIZES = [1, 2, 3, 4, 5, 7, 16, 17, 255, 256, 257, 4096, 5000, BLOCK, BLOCK + 1]


def order(size: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return EpochOrder(size, seed, epoch)(0, size)


@pytest.mark.parametrize("size", SIZES)
def test_order_has_every_scene_once(size: int) -> None:
    for epoch in range(3):
        assert np.array_equal(np.sort(order(size, 4, epoch)), np.arange(size))


@pytest.mark.parametrize(
    "size, seed, epoch, positions, expected",
    [
        (10, 0, 0, (0, 10), [9, 2, 1, 8, 7, 6, 3, 0, 4, 5]),
        (160_000, 0, 1, (159_996, 160_000), [29426, 107128, 88850, 49768]),
        (2**31, 5, 0, (0, 4), [272315, 1531452709, 372291996, 2012585422]),
        (10**9, 3, 7, (10**9 - 3, 10**9), [116981142, 635102567, 568952649]),
        (10**15, 2**62, 123_456, (5, 8), [274571547747070, 760672661085354, 444726525553820]),
    ],
)
def test_order_is_the_same_on_every_machine(
    size: int, seed: int, epoch: int, positions: tuple[int, int], expected: list[int]
) -> None:
    """Golden values: a run resumes in the middle of an epoch with another version, machine or number of ranks."""
    assert EpochOrder(size, seed, epoch)(*positions).tolist() == expected


def test_order_of_a_part_is_the_part_of_the_order() -> None:
    whole, part = order(3 * BLOCK + 11, 1), EpochOrder(3 * BLOCK + 11, 1, 0)
    for start, stop in ((0, 1), (5, 5), (BLOCK - 3, BLOCK + 3), (17, 2 * BLOCK + 18), (3 * BLOCK, 3 * BLOCK + 11)):
        assert np.array_equal(part(start, stop), whole[start:stop])


def excess(counts: np.ndarray, expected: float, freedom: int) -> float:
    """Chi-square of the counts, in standard deviations from what chance gives."""
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_orders_of_few_scenes_are_all_equally_likely(size: int) -> None:
    number = {each: i for i, each in enumerate(itertools.permutations(range(size)))}
    drawn = np.bincount([number[tuple(order(size, 9, e).tolist())] for e in range(1500)], minlength=len(number))
    assert abs(excess(drawn, 1500 / len(number), len(number) - 1)) < 5


@pytest.mark.parametrize("size", [8, 16, 100, 1000])
def test_a_scene_comes_at_every_position_equally_often(size: int) -> None:
    """First scene, last scene and every position, over many epochs."""
    epochs = 1500
    drawn = np.stack([order(size, 2, epoch) for epoch in range(epochs)])
    for counts in (np.bincount(drawn[:, 0], minlength=size), np.bincount(drawn[:, -1], minlength=size)):
        assert abs(excess(counts, epochs / size, size - 1)) < 5
    places = np.argsort(drawn, 1)[:, [0, size // 2, size - 1]]
    assert all(abs(excess(np.bincount(each, minlength=size), epochs / size, size - 1)) < 5 for each in places.T)


@pytest.mark.parametrize("size", [4096, 5000, BLOCK, 160_000])
def test_order_keeps_no_structure_of_the_numbers(size: int) -> None:
    """As of a random permutation: steps between neighbours, fixed points, ascents, low bits, correlation."""
    place = order(size, 1, 5)
    steps = np.bincount((np.diff(place) % size) * 64 // size, minlength=64)
    assert abs(excess(steps, (size - 1) / 64, 63)) < 5
    assert (place == np.arange(size)).sum() < 9 and (np.diff(place) == 1).sum() < 9
    assert abs((np.diff(place) > 0).sum() - size / 2) < 5 * math.sqrt(size / 12)
    for bits in (1, 4):
        pairs = np.bincount((place & (2**bits - 1)) * 2**bits + (np.arange(size) & (2**bits - 1)), minlength=4**bits)
        assert abs(excess(pairs, size / 4**bits, (2**bits - 1) ** 2)) < 5
    assert abs(np.corrcoef(place, np.arange(size))[0, 1]) < 5 / math.sqrt(size)
    batches = np.bincount(place[: size // 2] * 100 // size, minlength=100)  # the first half of an epoch
    assert abs(excess(batches, size / 200, 99)) < 8


@pytest.mark.parametrize("size", [4096, 5000])
def test_orders_of_epochs_and_seeds_are_unrelated(size: int) -> None:
    drawn = [order(size, seed, epoch) for seed in range(4) for epoch in range(4)]
    drawn += [order(size, 2**63 - 1, 0), order(size, 0, 1_000_003)]  # (1, 0) in a formula that adds up
    bound = 5.5 / math.sqrt(size)
    for one, other in itertools.combinations(drawn, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < bound and (one == other).sum() < 12


def endless(scenes: int) -> SimulatedSource:
    return SimulatedSource(Config(data=Data(train_scenes=scenes)), "cpu")


@pytest.mark.parametrize("start", [0, 16, 48, 50, 64])
def test_epoch_batches_begin_anywhere(start: int) -> None:
    whole = torch.cat(list(epoch_batches(endless(50), "train", 2, 16, 1, False)))
    rest = list(epoch_batches(endless(50), "train", 2, 16, 1, False, start=start))
    assert [len(each) for each in rest] == [16, 16, 16, 2][start // 16 :] if start < 50 else rest == []
    assert torch.equal(torch.cat([whole[:0], *rest]), whole[start:])


@pytest.mark.parametrize("batch_size", [1000, BLOCK - 1, BLOCK, BLOCK + 1, 10**6])
def test_epoch_batches_are_full_at_the_edges_of_blocks(batch_size: int) -> None:
    source, scenes = endless(2 * BLOCK + 77), 2 * BLOCK + 77
    batches = list(epoch_batches(source, "train", 1, batch_size, 0, True))
    assert {len(each) for each in batches[:-1]} <= {batch_size}
    assert torch.equal(torch.cat(batches), torch.from_numpy(order(scenes, 0, 1)))


def test_epoch_of_a_billion_scenes_begins_at_once_and_holds_no_list_of_them() -> None:
    tracemalloc.start()
    batches = epoch_batches(endless(10**9), "train", 3, 256, 0, False, start=10**9 - 600)
    last = [index.tolist() for index in batches]
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()
    assert [len(each) for each in last] == [256, 256, 88] and all(3 * 10**9 <= i < 4 * 10**9 for e in last for i in e)


def test_order_does_not_depend_on_the_process() -> None:
    """Python salts its own hashes anew in each process."""
    code = "from ris_fast.data.order import EpochOrder; print(EpochOrder(10**6, 1, 2)(0, 9).tolist())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(EpochOrder(10**6, 1, 2)(0, 9).tolist())
