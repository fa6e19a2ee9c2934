"""What a fault costs: both it and its healthy twin are trained unwatched, and scored twice.

    python -m bench.faults.harm NAME ... [--epochs N] [--seed N]

`reported` is what the run itself says of its last epoch; `true` is what its weights, put into a healthy trainer of the
same form, score there. A fault belongs into a set if the two differ, or if its true scores are worse than its twin's.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from bench.faults.catalogue import Fault, all_faults, faulty
from bench.faults.healthy_twins import TWINS, changed
from bench.faults.trial import StopRun
from ris_fast.training.callback import Callback
from ris_fast.training.state import RunStopped
from ris_fast.training.trainer import Trainer

Scores = dict[str, float]


class Epochs(Callback):
    """Ends a run after some epochs, and keeps the last row."""

    def __init__(self, epochs: int) -> None:
        self.left, self.row = epochs, {}

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self.row, self.left = row, self.left - 1
        if self.left == 0:
            raise StopRun


@torch.no_grad()
def scored(trainer: Trainer) -> Scores:
    """NMSE and the terms of the loss on the validation scenes, in evaluation mode."""
    trainer.model.eval()
    scenes = trainer.source.batch("val", torch.arange(trainer.config.data.val_limit))
    prediction = trainer.step.predict(scenes)
    terms = {name: value.item() for name, value in trainer.loss(prediction, scenes)[1].items()}
    nmse = trainer.loss.nmse(prediction.factor.float(), scenes, blend=False).mean().item()
    return {"nmse": nmse, **{name: terms[name] for name in ("angle", "range", "count") if name in terms}}


def trained(fault: Fault, healthy: Fault, epochs: int, seed: int) -> tuple[Scores, Scores, str]:
    """Reported scores, true scores and how the run ended, of a fault or of its twin. Args: healthy: its twin."""
    note, kept = "", Epochs(epochs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = changed(TWINS[fault.twin](), {"training.seed": seed, "data.seed": seed})
        with faulty(fault, config) as trainer:
            trainer.callbacks.append(kept)
            try:
                trainer.fit()
            except StopRun:
                pass
            except RunStopped as stop:
                note = f"stopped: {stop.finding}"
            row = kept.row
            weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        with faulty(healthy, config) as clean:
            clean.model.load_state_dict(weights, strict=False)
            true = scored(clean)
    names = {"raw": "val_nmse_raw", "ema": "val_nmse_ema", "loss": "val_loss"}
    return {short: row[name] for short, name in names.items() if row.get(name) is not None}, true, note


@cache
def twin(name: str, epochs: int, seed: int) -> tuple[Scores, Scores, str]:
    """The plain twin of that name."""
    healthy = next(fault for fault in all_faults().values() if fault.twin_name == name).healthy()
    return trained(healthy, healthy, epochs, seed)


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m bench.faults.harm", description=__doc__.partition("\n")[0])
    parse.add_argument("names", nargs="+", metavar="NAME")
    parse.add_argument("--epochs", type=int, default=30, metavar="N")
    parse.add_argument("--seed", type=int, default=0, metavar="N")
    given = parse.parse_args(arguments)
    for name in given.names:
        fault = all_faults()[name]
        print(name)
        for form in ("wrong", "right"):
            wrong = form == "wrong"
            how = given.epochs, given.seed
            found = trained(fault, fault.healthy(), *how) if wrong else twin(fault.twin_name, *how)
            reported, true = (" ".join(f"{key} {value:.4f}" for key, value in each.items()) for each in found[:2])
            print(f"  {form}: reported {reported}; true {true} {found[2]}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
