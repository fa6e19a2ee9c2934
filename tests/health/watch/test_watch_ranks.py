"""Two ranks under watch: mistakes are named, right loops are not accused, and a rank that reports alone does not
hang."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ris_fast.health import watch
from ris_fast.health.watch.ranks import bits_hash
from tests.health.watch import rank_loops
from tests.health.watch.loops import network, train
from tests.training.ranks.processes import values

OF_RANKS = {"rank_gradient_missing", "ranks_diverged", "rank_sees_other_data", "clipped_apart", "no_progress"}


@pytest.mark.slow
def test_watch_accuses_no_right_loop_of_two_ranks() -> None:
    for found in values(2, rank_loops.reports, [loop.__name__ for loop in rank_loops.RIGHT]):
        assert [(name, *each) for name, said in found.items() for each in said if each[1] or each[0] in OF_RANKS] == []


@pytest.mark.slow
def test_watch_names_mistakes_of_two_ranks() -> None:
    mine, others = values(2, rank_loops.reports, [loop.__name__ for loop in rank_loops.WRONG])
    assert {name: said[0] for name, said in mine.items()} == {name: said[0] for name, said in others.items()}
    wanted = {loop.__name__: cause for loop, cause in rank_loops.WRONG.items()}
    assert {name: said[0][0] for name, said in mine.items()} == wanted
    assert {name for name, said in mine.items() if len({cause for cause, *_ in said} & OF_RANKS) > 1} == set()
    assert "rank 1" in mine["wrong_bit"][0][2] and "1 of 4 tensors" in mine["wrong_bit"][0][2]
    assert "0.05; rank 1: 0.1" in mine["wrong_rate_on_one"][0][2]
    assert "first in step 10" in mine["wrong_zeros_in_one_step"][0][2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_bits_hash_sees_one_bit_and_any_order(dtype: torch.dtype) -> None:
    values = torch.randn(1000).to(dtype)
    other = values.clone()
    other[[3, 4]] = other[[4, 3]]
    assert bits_hash(values) == bits_hash(values.clone()) != bits_hash(other)
    assert bits_hash(values, chunk=64) == bits_hash(values.clone(), chunk=64)
    minus_zero = torch.zeros(4, dtype=dtype)
    assert bits_hash(minus_zero) != bits_hash(-minus_zero)


# ---- one process ----------------------------------------------------------------------------------------------------


def test_watch_looks_for_no_ranks_in_one_process() -> None:
    model = network()
    seen = watch(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    train(model, seen.optimizers[0])
    assert seen.ranks.record([]) is None and not seen.ranks.hooks[0].hooked


def clipped(clip, **options) -> list:
    model = nn.Sequential(network(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    train(model, optimizer, before=lambda: clip(model), **options)
    return [(each.cause, each.certain) for each in seen.report()]


def test_watch_doubts_a_clip_that_leaves_out_part_of_the_tensors() -> None:
    norm = nn.utils.clip_grad_norm_
    assert clipped(lambda model: norm(model[0].parameters(), 1e-2)) == [("clipped_apart", False)]
    assert clipped(lambda model: norm(model.parameters(), 1e-2)) == []
    assert clipped(lambda model: [norm(part.parameters(), 1e-2) for part in model]) == []
    assert clipped(lambda model: [norm([p], 5e-2) for p in model.parameters()]) == []
    assert clipped(lambda model: nn.utils.clip_grad_value_(model.parameters(), 5e-2)) == []
    assert clipped(lambda model: [p.grad.mul_(0.1) for p in model[0].parameters()]) == []
