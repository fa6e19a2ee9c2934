"""Preflight leaves the trainer as it was, is silent about what is healthy, and names what is not before the first
step."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bench.faults.catalogue import all_faults, faulty
from bench.faults.healthy_twins import TWINS, changed
from ris_fast.commands.check import check_line, conclusion
from ris_fast.data.errors import DataError
from ris_fast.health.monitor.attach import attach_health
from ris_fast.health.monitor.watchdog import Watchdog
from ris_fast.health.preflight import overfit as check_overfit
from ris_fast.health.preflight import run as preflight
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.restore import TensorCopies, preserve_state
from ris_fast.health.preflight.term_gradients import term_gradient_table
from ris_fast.training.schedule import learning_rate_factor
from ris_fast.training.state import RunStopped
from ris_fast.training.trainer import Trainer


def everything(trainer: Trainer) -> dict[str, Any]:
    """Weights, optimizer, averages, counters, modes and random numbers, as values."""
    return {
        "model": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "optimizer": {
            name: value.clone() for name, value in trainer.optimizer.checkpoint_tensors()["optimizer"].items()
        },
        "counters": {key: value for key, value in trainer.optimizer.counters().items() if value == value},
        "modes": [module.training for module in trainer.model.modules()],
        "random": torch.get_rng_state(),
        "rates": [group["lr"] for group in trainer.optimizer.param_groups],
        "state": deepcopy(trainer.state.__dict__),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a


@pytest.mark.slow
@pytest.mark.parametrize("twin", TWINS)
def test_preflight_leaves_a_healthy_trainer_as_it_was(twin: str) -> None:
    trainer = Trainer(TWINS[twin]())
    before = everything(trainer)
    watchdog = Watchdog(trainer)
    assert watchdog.preflight() == [], watchdog.verdict()
    after = everything(trainer)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert not [check.failed for check in watchdog.checks if check.failed]


def test_tensor_copies_hold_shared_memory_once() -> None:
    trainer = Trainer(TWINS["hybrid"]())
    trainer.step(next(trainer._groups()), 100)  # moments, averages and their states are there
    (bucket,) = trainer.optimizer.buckets
    flat = sum(each.nbytes for each in (bucket.param, bucket.grad, bucket.exp_avg, bucket.exp_avg_sq, bucket.ema))
    small = (
        sum(
            each.nbytes
            for each in [*bucket.__dict__.values(), *trainer.model.buffers()]
            if isinstance(each, torch.Tensor)
        )
        - flat
    )
    numbers, before = TensorCopies(trainer), everything(trainer)
    assert (
        flat
        <= sum(copy.nbytes for _, copy, place in numbers.kept if not place)
        <= flat + small + 64 * len(trainer.optimizer.state)
    )
    with preserve_state(trainer, numbers):
        for parameter in trainer.model.parameters():
            parameter.data = torch.full_like(parameter, 3.0)
        for value in (bucket.param, bucket.exp_avg, bucket.ema):
            value.fill_(2.0)
    after = everything(trainer)
    assert [key for key in before if not same(before[key], after[key])] == []


def test_preflight_changes_no_bit_of_the_run() -> None:
    def weights(preflight: bool) -> dict[str, torch.Tensor]:
        trainer = Trainer(TWINS["dropout"]())
        if preflight:
            Watchdog(trainer).preflight()
        for group in list(trainer._groups())[:4]:
            trainer.step(group, 100)
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    one, other = weights(False), weights(True)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_preflight_does_not_report_a_muted_cause() -> None:
    fault = all_faults()["backbone_frozen"]
    with faulty(fault) as trainer:
        assert Watchdog(trainer).preflight()[0].cause == "frozen_parameters"
        assert Watchdog(trainer, muted=["frozen_parameters"]).preflight() == []


@pytest.mark.slow
def test_run_checks_counts_a_check_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(context: PreflightContext) -> Any:
        context.note = "half way"
        return {}["nothing"]

    monkeypatch.setitem(preflight.SMALL_BATCH, "no two layers share a tensor", mistaken)
    results = preflight.run_checks(Trainer(TWINS["hybrid"]()))
    (broken,) = [result for result in results if not result.passed]
    assert broken.failed.startswith("KeyError: 'nothing' (test_preflight.py:") and not broken.findings
    line, ending = check_line(broken), conclusion([], preflight.unknown(results))
    assert line.startswith("FAILED no two layers") and "half way; could not run: KeyError" in line
    assert ending.startswith("nothing found by the checks that ran; 1 check could not run")


def test_check_line_does_not_call_a_missed_goal_ok() -> None:
    result = preflight.Result("a few scenes can be memorised", (), 0.1, "the goal was not reached", reached=False)
    assert check_line(result).startswith("-  ") and check_line(replace(result, reached=True)).startswith("ok ")
    context = PreflightContext(Trainer(TWINS["gentle"]()))
    assert (
        list(check_overfit.overfit_batch(context)) == [] and not context.reached and "was not reached" in context.note
    )


@pytest.mark.parametrize(
    "error", [MemoryError(), DataError("shard-0", "", "half of it", "all of it", "Copy it again.")]
)
def test_run_checks_raises_memory_and_data_errors(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(context: PreflightContext) -> Any:
        raise error

    monkeypatch.setitem(preflight.SMALL_BATCH, "scenes are finite", ended)
    with pytest.raises(type(error)):
        preflight.run_checks(Trainer(TWINS["hybrid"]()))


def test_attach_health_counts_its_reasons() -> None:
    with (
        faulty(all_faults()["rate_zero"]) as trainer,
        pytest.raises(RunStopped, match="preflight found a reason why|preflight found [2-9]"),
    ):
        attach_health(trainer)


@pytest.mark.slow
def test_attach_health_stops_the_run_before_its_first_step() -> None:
    with faulty(all_faults()["rate_zero"]) as trainer:
        with pytest.raises(RunStopped, match="zero_learning_rate") as stop:
            attach_health(trainer)
        assert stop.value.exit_code == 4 and stop.value.finding == "zero_learning_rate"
        assert trainer.optimizer.counters()["attempted"] == 0
        attach_health(trainer, stop=False)


def test_graph_table_says_which_tensors_a_term_reaches() -> None:
    table = term_gradient_table(PreflightContext(Trainer(TWINS["hybrid"]())))
    rows = {row[0]: dict(zip(table["headers"][1:], row[1:])) for row in table["rows"]}
    assert rows["range_head.weight"]["cov"] == "-" and float(rows["range_head.weight"]["range"]) > 0
    assert rows["(requires_grad)"]["cov"] == "True" and rows["(grad_fn)"]["cov"] != "none"


# ---- what users attach -----------------------------------------------------------------------------------------------


TICKS = 0


def counted() -> None:
    global TICKS
    TICKS += 1


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["beside the trainer's own", "alone"])
def test_preflight_puts_a_users_scheduler_back(own: bool) -> None:
    trainer = Trainer(changed(TWINS["backprojection"](), {"training.epochs": 2, "optimizer.warmup": 0.5}))
    settings, planned = trainer.config.optimizer, trainer.plan.planned
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: learning_rate_factor(step, planned, settings.warmup, settings.final_lr)
    )
    trainer.optimizer.register_step_post_hook(lambda *_: scheduler.step())
    if not own:
        trainer.step.schedule = lambda planned: None
    before = scheduler.state_dict()
    attach_health(trainer)
    assert trainer.callbacks[-1].findings == [] and scheduler.state_dict() == before
    trainer.fit()
    assert trainer.callbacks[-1].findings == [] and scheduler.last_epoch == 16


def test_preserve_state_puts_a_users_objects_back() -> None:
    trainer = Trainer(TWINS["hybrid"]())
    average = torch.optim.swa_utils.AveragedModel(trainer.model)
    calls, other = [], torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    count, held = 0, Counted()

    def after(*_: Any) -> None:
        nonlocal count
        count += 1
        counted()
        calls.append(count)
        held.number, held.each[count] = count, random.random() + np.random.rand()
        average.update_parameters(trainer.model)
        other.param_groups[0]["params"][0].grad = torch.ones(3)
        other.step()
        trainer.optimizer.param_groups[0]["betas"] = (0.5, 0.5)

    trainer.optimizer.register_step_post_hook(after)
    trainer.model.calls = 7
    trainer.model.fuse.register_forward_pre_hook(lambda *_: setattr(trainer.model, "calls", trainer.model.calls + 1))
    state = random.getstate(), np.random.get_state()[1].tolist(), TICKS, trainer.optimizer.param_groups[0]["betas"]
    first = {name: value.clone() for name, value in average.state_dict().items()}
    with preserve_state(trainer):
        for group in list(trainer._groups())[:2]:
            trainer.step(group, 100)
        assert (
            count == TICKS - state[2] == held.number == len(calls) == 2
            and trainer.model.calls == 9
            and not other.state == {}
        )
    assert (count, calls, held.number, held.each, trainer.model.calls) == (0, [], 0, {}, 7) and other.state == {}
    assert (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        TICKS,
        trainer.optimizer.param_groups[0]["betas"],
    ) == state
    assert all(torch.equal(value, first[name]) for name, value in average.state_dict().items())
    assert other.param_groups[0]["params"][0].tolist() == [1.0, 1.0, 1.0]


class Counted:
    """Somebody's own object with a state."""

    def __init__(self) -> None:
        self.number, self.each = 0, {}


class Keeping(torch.nn.Module):
    """A network of the user's own that keeps what a network may keep, and has layers of every unusual kind."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        inputs, self.elements = 2 * task.bs_antennas * (task.snapshots + task.elements), task.elements
        self.stem, self.middle = torch.nn.Linear(inputs, 32), torch.nn.utils.parametrizations.weight_norm(linear(32))
        self.norm, self.out = torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 4 * task.elements)
        self.spectral = torch.nn.utils.parametrizations.spectral_norm(linear(32))
        self.register_buffer("wide", torch.zeros(1, 4).expand(3, 4))
        self.register_buffer("mean", torch.zeros(32))
        self.calls, self.cache, self.seen, self.last = 0, {"rows": []}, [torch.zeros(2)], torch.zeros(3)
        self.torch_draws, self.draws = torch.Generator().manual_seed(3), np.random.default_rng(1)
        self.python_draws, self.helper = random.Random(1), Counted()

    def forward(self, snapshots: Any, channel: Any, codes: Any, snr_db: Any) -> torch.Tensor:
        self.calls, self.cache[self.calls % 5] = self.calls + 1, snapshots.shape
        self.cache["rows"].append(len(snapshots))
        self.seen.append(self.seen[0].add_(1))
        self.helper.number += 1
        self.last.add_(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1
            torch.rand(2, generator=self.torch_draws)
            self.draws.random(), self.python_draws.random()
        parts = [part.flatten(1) / part.flatten(1).norm(dim=1, keepdim=True) for part in (snapshots, channel)]
        x = checkpoint(self.stem, torch.cat(parts, 1), use_reentrant=False).relu()
        x = x + checkpoint(self.middle, x, use_reentrant=True) + self.spectral(x)
        return self.out(self.norm(x)).view(-1, self.elements, 2, 2)

    def kept(self) -> tuple:
        return (
            (
                self.calls,
                deepcopy(self.cache),
                len(self.seen),
                self.seen[0].tolist(),
                self.last.tolist(),
                self.helper.number,
            ),
            (self.torch_draws.get_state().tolist(), self.draws.bit_generator.state, self.python_draws.getstate()),
            (self.mean.tolist(), self.norm.running_mean.tolist(), int(self.norm.num_batches_tracked)),
            ([module.training for module in self.modules()], [each.requires_grad for each in self.parameters()]),
        )


def linear(width: int) -> torch.nn.Linear:
    return torch.nn.Linear(width, width)


def test_preflight_puts_back_what_a_users_network_and_source_keep() -> None:
    config = changed(TWINS["backprojection"](), {"loss.cross": 0.0})
    net = Keeping(config.task)
    trainer = Trainer(config, model=net)
    reads, draws = [], torch.Generator().manual_seed(5)
    batch = trainer.source.batch

    def read(split: str, index: torch.Tensor) -> Any:
        reads.append(split)
        torch.rand(1, generator=draws)
        return batch(split, index)

    trainer.source.batch, trainer.source.served = read, {}
    net.norm.eval()  # a mode of its own
    scheduler = net.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 5)
    net.stem.register_forward_hook(lambda *_: (scheduler.step(), trainer.source.served.update(n=net.calls)) and None)
    before = net.kept(), draws.get_state().tolist(), scheduler.state_dict()
    watchdog = Watchdog(trainer)
    watchdog.preflight()
    assert not [check.failed for check in watchdog.checks if check.failed]
    assert (net.kept(), draws.get_state().tolist(), scheduler.state_dict()) == before
    assert reads == [] and trainer.source.served == {} and scheduler is net.scheduler
