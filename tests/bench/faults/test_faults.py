"""Every fault applies, changes what its healthy twin does, and is gone afterwards; twins learn."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from functools import cache
from typing import Any

import pytest

from bench.faults.catalogue import (
    EIGHTH,
    FAMILIES,
    FIFTH,
    FIRST,
    FOURTH,
    HELD_OUT,
    HELD_OUT_SUITE,
    SECOND,
    SEVENTH,
    SIXTH,
    SUITE,
    THIRD,
    Fault,
    all_faults,
    faulty,
)
from bench.faults.healthy_twins import TWINS
from ris_fast.health.causes import CAUSES
from ris_fast.training.callback import Callback
from ris_fast.training.trainer import Trainer

FAULTS = all_faults()
LATER = [name for name, fault in FAULTS.items() if fault.written not in (SUITE, HELD_OUT_SUITE)]
SAMPLED = [name for name in FAULTS if name not in LATER or name in LATER[::3]]  # the score of the rules runs them all
STEPS = 20  # two epochs and a half: every onset and two validations
FEW_STEPS = 9


class StopRun(Exception):
    """Ends a run after a few steps."""


class Recorder(Callback):
    """Keeps what a run says that depends on no clock; ends it where that is not what `twin` said."""

    def __init__(self, trainer: Trainer, steps: int, twin: list[str]) -> None:
        self.trainer, self.steps, self.twin, self.rows, self.losses, self.epochs = trainer, steps, twin, [], [], 0

    def say(self, row: Any) -> None:
        self.rows.append(repr(row))
        if self.twin and self.rows != self.twin[: len(self.rows)]:
            raise StopRun

    def on_train_start(self, info: Any) -> None:
        self.say(sorted(info["baselines"].items()))

    def on_log(self, row: Any) -> None:
        self.losses.append(row["train_loss"])
        self.say(
            [row[key] for key in ("step", "train_loss", "grad_norm", "clipped", "skipped", "loss_scale")]
            + [sorted(row["lr"].items()), self.trainer.model.training]
        )
        if row["step"] >= self.steps:
            raise StopRun

    def on_epoch_end(self, row: Any) -> None:
        self.epochs += 1
        self.say([row[key] for key in ("step", "train_loss", "val_loss", "val_nmse_raw", "val_nmse_ema")])
        if self.epochs >= 6:
            raise StopRun


def behaviour(trainer: Trainer, steps: int = STEPS, twin: list[str] | None = None) -> tuple[list[str], list[float]]:
    """A short run as texts, and its training losses: what was reported, how it ended, which tensors the optimizer
    holds, where they stand. It ends early where it is not the run of `twin`."""
    trainer.callbacks.append(recorder := Recorder(trainer, steps, twin or []))
    names = sorted(name for group in trainer.optimizer.param_groups for name in group["param_names"])
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit()
    except Exception as error:
        recorder.rows.append(f"{type(error).__name__}: {error}")
    weights = {name: value.double().sum().item() for name, value in trainer.model.named_parameters()}
    return [*recorder.rows, repr((names, trainable, weights))], recorder.losses


@cache
def healthy(twin: str, steps: int = STEPS) -> tuple[list[str], list[float]]:
    return behaviour(Trainer(TWINS[twin]()), steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_fault_changes_its_twin_and_is_undone(name: str) -> None:
    fault = FAULTS[name]
    twin = healthy(fault.twin)[0]
    with faulty(fault) as trainer:
        assert behaviour(trainer, twin=twin)[0] != twin or fault.own_twin
    if fault.around is not None:  # an epoch, its validation and a step after it, as if nothing had been
        assert behaviour(Trainer(TWINS[fault.twin]()), FEW_STEPS)[0] == healthy(fault.twin, FEW_STEPS)[0]


def test_healthy_twin_repeats_bitwise() -> None:
    """Otherwise a difference would say nothing about a fault."""
    assert behaviour(Trainer(TWINS["hybrid"]()))[0] == healthy("hybrid")[0]


def test_suite_families_hold_out_a_third_each() -> None:
    suite = [fault for fault in FAULTS.values() if fault.written in (SUITE, HELD_OUT_SUITE)]
    total, held = Counter(f.family for f in suite), Counter(f.family for f in suite if f.held_out)
    assert set(total) == set(FAMILIES) and len(suite) >= 66 and HELD_OUT <= FAULTS.keys()
    assert all(0.3 <= held[family] / total[family] <= 0.4 for family in FAMILIES)


def test_later_sets_have_twenty_faults_of_all_families_each() -> None:
    for name in (FIRST, SECOND, THIRD, FOURTH, FIFTH, SIXTH, SEVENTH, EIGHTH):
        faults = [fault for fault in FAULTS.values() if fault.written == name]
        assert len(faults) == 20 and {fault.family for fault in faults} == set(FAMILIES)
        assert all(fault.hidden and not fault.held_out for fault in faults)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SAMPLED if FAULTS[name].own_twin])
def test_twin_of_its_own_is_right(name: str) -> None:
    """It learns, and what it does is not what the mistake does."""
    fault = FAULTS[name]
    steps = fault.onset + STEPS
    with faulty(fault.healthy()) as trainer:
        rows, losses = behaviour(trainer, steps)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    with faulty(fault) as trainer:
        assert behaviour(trainer, steps, rows)[0] != rows


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_fault_record_has_known_causes_and_a_limit(fault: Fault) -> None:
    kind, _, amount = fault.by.partition(":")
    assert kind == "preflight" and not amount or kind == "steps" and int(amount) > 0 or 0 < float(amount) <= 0.01
    assert fault.expect and set(fault.expect) <= CAUSES.keys()
    assert bool(fault.settings) + (fault.patch is not None) + (fault.around is not None) >= 1


def test_fault_refuses_an_unknown_cause() -> None:
    with pytest.raises(ValueError, match="unknown"):
        Fault("x", "loop", "mistyped the cause", ("frozen_parameter",), "preflight")


@pytest.mark.parametrize("twin", TWINS)
def test_healthy_twin_learns(twin: str) -> None:
    losses = healthy(twin)[1]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
