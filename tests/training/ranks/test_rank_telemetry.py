"""What ranks say of themselves: checksums see a changed bit, projections are linear, records are read as packed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from bench.faults.healthy_twins import backprojection
from ris_fast.training.ranks.group import Ranks
from ris_fast.training.ranks.rank_telemetry import BLOCK, Probe, RankTelemetry, read_ranks
from ris_fast.training.ranks.reduction import GradientReduction
from ris_fast.training.trainer import Trainer
from tests.operation_watch import Watch


def made(blocks: int = 40) -> tuple[Probe, torch.Tensor]:
    return Probe(torch.device("cpu"), blocks), torch.randn(blocks * BLOCK, generator=torch.Generator().manual_seed(1))


def test_checksum_changes_with_any_bit_and_with_exchanged_tensors() -> None:
    probe, flat = made()
    before = int(probe.checksum([flat]))
    for element in (0, 1, 63, 64, 1000, len(flat) - 1):
        for bit in range(32):
            bits = flat.clone().view(torch.int32)
            bits[element] ^= torch.tensor(-(2**31) if bit == 31 else 2**bit, dtype=torch.int32)
            assert int(probe.checksum([bits.view(torch.float32)])) != before
    exchanged, negated = flat.clone(), flat.clone()
    exchanged[:BLOCK], exchanged[BLOCK : 2 * BLOCK] = flat[BLOCK : 2 * BLOCK], flat[:BLOCK]
    negated[1], negated[65] = -flat[1], -flat[65]  # the highest bits of two sums
    assert before not in [int(probe.checksum([each])) for each in (exchanged, negated, -flat)]
    assert int(probe.checksum([flat.clone()])) == int(probe.checksum([flat[:640], flat[640:]])) == before


def test_checksum_and_projection_take_tensors_that_fill_no_block() -> None:
    probe, flat = made()
    parts = [flat[:70], flat[70:81].half()]
    padded = torch.zeros(3 * BLOCK)
    padded[:70], padded[128:139] = parts[0], parts[1].float()
    assert int(probe.checksum(parts)) == int(Probe(torch.device("cpu"), 40).checksum([padded]))
    assert torch.equal(probe.projections(parts), probe.projections([padded]))


def test_projections_are_linear_to_rounding() -> None:
    probe, flat = made()
    other = torch.randn(len(flat), generator=torch.Generator().manual_seed(2))
    apart = probe.projections([flat]) + probe.projections([other]) - probe.projections([flat + other])
    assert apart.abs().max() < 1e-6 * (flat.norm() + other.norm())
    assert (probe.projections([flat]) / flat.norm()).abs().max() < 6


def test_read_tells_shared_scenes_and_scenes_that_are_not_as_numbered() -> None:
    whole = torch.tensor([[5, 2, 0, 1, 0], [5, 3, 1, 0, 2], [-1, 0, 0, 0, 0]])
    first = [[0.1, 9.0], [0.2, 9.0], [0.0, 0.0]]  # of each rank's first scene; the last rank has none
    expected = [[0.2, 9.00001], [0.0, 0.0], [0.3, 9.0]]  # what each makes of the next rank's
    figures = torch.tensor([[1.0, 0.4, *a, *b, 1.0, 2.0, 3.0, 4.0] for a, b in zip(first, expected)]).double()
    hashes = torch.tensor([[7, 8, 0], [8, 9, 10], [0, 0, 0]])
    found = read_ranks(torch.cat([whole, figures.view(torch.int64), hashes], 1))
    assert found["weights"] == ["0" * 15 + "5"] * 2 + ["f" * 16] and found["scenes"] == [2, 3, 0]
    assert (found["zero_scenes"], found["nonfinite_scenes"]) == ([1, 0, 0], [0, 2, 0])
    assert found["nonfinite"] == [0, 1, 0] and found["shared"] == [[0, 1, 1]]
    assert found["as_numbered"] == [False, True, None]
    assert found["own"] == [[1.0, 2.0]] * 3 and found["summed"] == [[3.0, 4.0]] * 3


class Echo(Ranks):
    """Two ranks of which the other one says the same, and adds nothing."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, tensor])

    def largest(self, values: Sequence[int]) -> list[int]:
        return list(values)


def with_echo() -> Trainer:
    trainer, ranks = Trainer(backprojection(**{"training.batch_size": 8})), Echo()
    trainer.step.reduction = GradientReduction(ranks, trainer.optimizer)
    trainer.step.telemetry.ranks = RankTelemetry(ranks, trainer.model, trainer.optimizer, 8)
    return trainer


def test_a_step_that_is_read_waits_for_no_device() -> None:
    trainer = with_echo()
    groups = trainer._groups()
    trainer.step(next(groups), 10)
    group = next(groups)
    with Watch("cpu") as seen:
        trainer.step(group, 10)
    assert trainer.step.telemetry.ranks.gathered is not None and not seen.waits and not seen.solvers


def test_only_a_step_that_is_read_has_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = with_echo()
    groups = trainer._groups()
    trainer.step(next(groups), 10)
    telemetry = trainer.step.telemetry
    found = telemetry.read(telemetry.sample(), 0)["ranks"]
    assert found["weights"][0] == found["weights"][1] and found["scenes"] == [8, 8] and found["shared"] == [[0, 1, 8]]
    assert found["own"] == found["summed"] and found["share"] == [1.0, 1.0] and found["grad_norm"][0] > 0
    group, telemetry.enabled = next(groups), False
    monkeypatch.setattr(telemetry.ranks, "begin", lambda: pytest.fail("a step that is not read"))
    trainer.step(group, 10)
    assert "ranks" not in (telemetry.sample().tensors if telemetry.sample() else {})


def test_one_rank_has_no_record() -> None:
    trainer = Trainer(backprojection())
    trainer.step(next(trainer._groups()), 10)
    assert trainer.step.telemetry.ranks is None and "ranks" not in trainer.step.telemetry.sample().tensors
