"""Faults of several processes that train one network, planted in ranks of torchrun: `python -m bench.faults.ranks`.

Each run is a second long. Rank 0's watchdog, which stops nothing here, is asked what it found first, at which step, and
whether it names the rank that has the fault. Healthy runs of the same ranks must stay silent.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.faults.healthy_twins import backprojection
from bench.faults.patches import after_step, on_batches, put, wrap
from ris_fast.config.schema import Config
from ris_fast.data.open_source import open_source
from ris_fast.health.monitor.history import named
from ris_fast.health.monitor.watchdog import Watchdog
from ris_fast.training.ranks.group import Ranks, join
from ris_fast.training.state import RunStopped
from ris_fast.training.trainer import Trainer

GRADIENT = 256  # elements: of the sums over ranks only those of gradients are larger
STOPPED = "all ranks end with the one that finds a fault"
ONE = 1  # the rank that has the fault, where one has it


@dataclass(frozen=True)
class RankFault:
    """A mistake on rank 1, or on all ranks.

    Args: expect: the cause to be named first; step: optimizer step at which it shows; names: what the evidence says of
        ranks, which may depend on how many there are.
    """

    mistake: str
    expect: str
    step: int
    names: Callable[[int], str]
    plant: Callable[[Trainer, Ranks], None]


FAULTS: dict[str, RankFault] = {}


def fault(mistake: str, expect: str, step: int = 1, names: Callable[[int], str] = lambda size: "rank 1") -> Callable:
    """Decorator of what plants a fault; called on every rank."""

    def keep(plant: Callable[[Trainer, Ranks], None]) -> Callable[[Trainer, Ranks], None]:
        FAULTS[plant.__name__] = RankFault(mistake, expect, step, names, plant)
        return plant

    return keep


def everyone(size: int) -> str:
    return named(range(size))


@fault("the weights of a rank are loaded from elsewhere after the start", "ranks_diverged")
def starts_elsewhere(trainer: Trainer, ranks: Ranks) -> None:
    if ranks.rank == ONE:
        for parameter in trainer.model.parameters():
            parameter.data.mul_(1.01)


@fault("one bit of one weight of a rank flips after the second step", "ranks_diverged", step=3)
def a_bit_flips(trainer: Trainer, ranks: Ranks) -> None:
    steps = iter(range(1, 1000))

    def flip() -> None:
        if next(steps) == 2 and ranks.rank == ONE:
            weight = next(trainer.model.parameters()).data.view(-1)[:1]
            weight.copy_((weight.view(torch.int32) ^ 1).view(torch.float32))

    after_step(trainer, flip)


@fault("a rank has another learning rate", "ranks_diverged", step=2)
def other_rate(trainer: Trainer, ranks: Ranks) -> None:
    if ranks.rank == ONE:
        for group in trainer.optimizer.param_groups:
            group["peak_lr"] *= 2


@fault("a rank is served the scenes of rank 0", "rank_sees_other_data")
def scenes_of_rank_0(trainer: Trainer, ranks: Ranks) -> None:
    if ranks.rank == ONE:
        put_ranks(trainer, ranks, share=lambda index: index[:: ranks.size])


@fault("a rank makes scenes of another seed", "rank_sees_other_data")
def other_seed(trainer: Trainer, ranks: Ranks) -> None:
    if ranks.rank == ONE:
        other = open_source(replace(trainer.config, data=replace(trainer.config.data, seed=99)), trainer.device, None)
        wrap(trainer.source, "batch", lambda batch: lambda split, index: other.batch(split, index))


@fault("a rank draws another order of the epoch", "rank_sees_other_data")
def other_order(trainer: Trainer, ranks: Ranks) -> None:
    if ranks.rank == ONE:
        config = trainer.config
        put(trainer, "config", replace(config, training=replace(config.training, seed=99)))


@fault("a rank's data set is an older one, its scenes scaled", "rank_sees_other_data")
def older_data(trainer: Trainer, ranks: Ranks) -> None:
    if ranks.rank == ONE:
        on_batches(trainer, lambda scenes: replace(scenes, snapshots=1.5 * scenes.snapshots), "train")


@fault("the loss of a rank is multiplied by zero", "rank_gradient_missing")
def loss_of_zero(trainer: Trainer, ranks: Ranks) -> None:
    if ranks.rank == ONE:
        wrap(trainer.step.loss, "forward", lambda loss: lambda *given: scaled(loss(*given), 0.0))


@fault("a rank never calls backward", "rank_gradient_missing")
def no_backward(trainer: Trainer, ranks: Ranks) -> None:
    def forward_only(accumulate: Callable) -> Callable:
        def call(scenes: Any, share: float) -> Any:
            trainer.step.telemetry.weighted(share)
            loss, terms = trainer.step.loss(trainer.step.predict(scenes), scenes)
            return loss.detach() * share, {name: value.detach() * share for name, value in terms.items()}

        return call

    if ranks.rank == ONE:
        wrap(trainer.step, "_accumulate", forward_only)


@fault("a rank gives zeros to the sum", "rank_gradient_missing")
def zeros_in_the_sum(trainer: Trainer, ranks: Ranks) -> None:
    on_sum(trainer, ranks, lambda tensor, add: add(tensor.zero_() if ranks.rank == ONE else tensor))


@fault("a rank steps with its own gradient, and the others with the sum", "rank_gradient_missing")
def keeps_its_own(trainer: Trainer, ranks: Ranks) -> None:
    on_sum(trainer, ranks, lambda tensor, add: add(tensor.clone()) if ranks.rank == ONE else add(tensor))


@fault("a rank's gradient is in the sum twice", "rank_gradient_missing")
def counted_twice(trainer: Trainer, ranks: Ranks) -> None:
    on_sum(trainer, ranks, lambda tensor, add: add(tensor.mul_(2) if ranks.rank == ONE else tensor))


@fault("a rank changes its gradient after the sum", "rank_gradient_missing", names=lambda size: "rank")
def changed_after_the_sum(trainer: Trainer, ranks: Ranks) -> None:
    on_sum(trainer, ranks, lambda tensor, add: add(tensor).mul_(1.5 if ranks.rank == ONE else 1.0))


@fault("gradients are not summed at all: every rank trains on alone", "rank_gradient_missing", names=everyone)
def nothing_summed(trainer: Trainer, ranks: Ranks) -> None:
    on_sum(trainer, ranks, lambda tensor, add: tensor)


@fault(
    "gradients are averaged over ranks, as if each were of its own mean",
    "accumulation_not_divided",
    names=lambda size: f"all {size} ranks",
)
def averaged(trainer: Trainer, ranks: Ranks) -> None:
    on_sum(trainer, ranks, lambda tensor, add: add(tensor).div_(ranks.size))


@fault(
    "every rank weighs its losses by its own scenes alone, and the gradients are summed",
    "accumulation_not_divided",
    names=everyone,
)
def own_means_summed(trainer: Trainer, ranks: Ranks) -> None:
    wrap(trainer.step, "_accumulate", lambda accumulate: lambda scenes, share: accumulate(scenes, share * ranks.size))


def scaled(found: tuple[Tensor, dict[str, Tensor]], factor: float) -> tuple[Tensor, dict[str, Tensor]]:
    return found[0] * factor, found[1]


class Changed:
    """Ranks with some methods changed."""

    def __init__(self, ranks: Ranks, **methods: Callable) -> None:
        self._ranks = ranks
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ranks, name)


def put_ranks(trainer: Trainer, ranks: Ranks, **methods: Callable) -> None:
    """The trainer's ranks, with methods of its own."""
    put(trainer, "ranks", Changed(ranks, **methods))


def on_sum(trainer: Trainer, ranks: Ranks, change: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> None:
    """`change(gradient, add)` stands in for `add(gradient)`, the sum over ranks in place."""

    def sum_(tensor: Tensor) -> Tensor:
        return change(tensor, ranks.sum_) if tensor.numel() > GRADIENT else ranks.sum_(tensor)

    put_ranks(trainer, ranks, sum_=sum_)


# ---- healthy runs -------------------------------------------------------------------------------------------------


def healthy_config(size: int, epochs: int = 1) -> Config:
    """Epochs of seven steps of two micro-batches; in the last group rank 0 has one scene and the others none."""
    return backprojection(
        **{
            "training.epochs": epochs, "training.batch_size": 8, "training.accumulate": 2, "report.every_steps": 2,
            "health.min_applied": 0.5,
            "data.train_scenes": 6 * 16 * size + 1, "data.val_scenes": 8 * size, "data.val_limit": 8 * size,
        }
    )  # fmt: skip


def skipped_step(trainer: Trainer, ranks: Ranks) -> None:
    """Gradients of one step of the last rank are not finite; the scenes are."""
    calls = iter(range(1000))

    def poisoned(loss: Callable) -> Callable:
        return lambda *given: scaled(loss(*given), float("nan") if next(calls) == 4 else 1.0)

    if ranks.rank == ranks.size - 1:
        wrap(trainer.step.loss, "forward", poisoned)


HEALTHY: dict[str, tuple[Callable[[Trainer, Ranks], None], set[str]]] = {
    "healthy": (lambda trainer, ranks: None, set()),
    "a step skipped for one rank's gradient": (skipped_step, {"nonfinite_gradients"}),
}


# ---- trials -------------------------------------------------------------------------------------------------------


def trial(plant: Callable[[Trainer, Ranks], None], ranks: Ranks, epochs: int = 1) -> list[dict[str, Any]]:
    """What rank 0 finds in a run with the fault: causes in the order in which they were found."""
    trainer = Trainer(healthy_config(ranks.size, epochs))
    watchdog = Watchdog(trainer)
    if ranks.first:
        trainer.callbacks.append(watchdog)
    plant(trainer, ranks)
    trainer.fit()
    found = sorted(watchdog.findings, key=lambda finding: finding.step)
    return [{"cause": each.cause, "step": each.step, "evidence": each.evidence} for each in found]


def stopped(ranks: Ranks) -> list[dict[str, Any]]:
    """What every rank of a run says that rank 0's watchdog ends, and after which step."""
    trainer, said = Trainer(healthy_config(ranks.size)), ""
    if ranks.first:
        trainer.callbacks.append(Watchdog(trainer, stop=True))
    nothing_summed(trainer, ranks)
    try:
        trainer.fit()
    except RunStopped as stop:
        said = stop.finding
    return ranks.all_values({"cause": said, "step": trainer.state.step, "evidence": ""})


@contextmanager
def in_time(ranks: Ranks) -> Iterator[None]:
    """All ranks enter and leave together."""
    ranks.wait()
    yield
    ranks.wait()


def worker(out: Path, wanted: list[str]) -> None:
    """All trials one after the other, on every rank; rank 0 writes what it found."""
    torch.set_num_threads(1)
    ranks, found = join(torch.device("cpu")), {}
    plants = {name: plant for name, (plant, _) in HEALTHY.items()}
    plants |= {name: each.plant for name, each in FAULTS.items()}
    for name, plant in plants.items():
        if not wanted or name in wanted:
            with in_time(ranks):
                found[name] = trial(plant, ranks, epochs=2 if name in HEALTHY else 1)
    if STOPPED in wanted or not wanted:
        found[STOPPED] = stopped(ranks)
    if ranks.first:
        out.write_text(json.dumps(found))
    ranks.leave()


def found_by(size: int, wanted: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Name of a fault, or of a healthy run -> what rank 0 of `size` found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m", __spec__.name]
        environ = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(
            [sys.executable, *words, "--worker", str(out), *(wanted or [])], env=environ, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{size} ranks ended with {done.returncode}:\n{done.stderr[-8000:]}")
        return json.loads(out.read_text())


def judged(name: str, found: list[dict[str, Any]], size: int) -> tuple[bool, bool, bool]:
    """Of a fault: whether the first finding is its cause, comes at its step, and names the rank."""
    planted, first = FAULTS[name], (found or [{"cause": "", "step": 0, "evidence": ""}])[0]
    return first["cause"] == planted.expect, first["step"] == planted.step, planted.names(size) in first["evidence"]


def main() -> int:
    """Prints a table; exit code 1 where a fault is missed or a healthy run is not silent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help="faults; all by default")
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker, given.names)
        return 0
    missed = 0
    for size in given.ranks:
        for name, found in found_by(size, given.names).items():
            if name == STOPPED:
                bad = len({(each["cause"], each["step"]) for each in found}) > 1
                verdict = "APART" if bad else "together"
            elif name in HEALTHY:
                bad = not {each["cause"] for each in found} <= HEALTHY[name][1]
                verdict = "NOT SILENT" if bad else "silent"
            else:
                right = judged(name, found, size)
                bad, verdict = not all(right), "/".join("yes" if each else "NO" for each in right)
            missed += bad
            said = f"{found[0]['cause']} at step {found[0]['step']}: {found[0]['evidence']}" if found else "nothing"
            print(f"{size} ranks | {name} | {verdict} | {said}")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
