"""Where trackers keep the rows of a run: TensorBoard event files, a W&B run, a Trackio run. Each package is imported
when its sink is opened.

A sink's `known` says whether an earlier part of the run is there; `replaces`, whether its steps can be written anew.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ris_fast.files import read_text, write_text

RECORD = "trackers.json"  # in a run's folder: under which name each tracker has the run
PROJECT = "ris-fast"  # where WANDB_PROJECT and TRACKIO_PROJECT name no other
BEST = "summary/best_val_nmse"  # what TensorBoard's table of settings shows beside them


class Sink(Protocol):
    title: str
    replaces: bool
    known: bool

    def open(self, settings: Mapping[str, Any]) -> None:
        """Begins, or continues where `known`."""

    def drop_from(self, step: int) -> None:
        """Takes back what an earlier part of the run wrote at this step and behind it; where `replaces`."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """The numbers of one row."""

    def end(self, numbers: Mapping[str, float], texts: Mapping[str, str], step: int) -> None:
        """The summary, and the end."""


class TensorBoard:
    """Event files in RUN/tensorboard. Numbers are 32-bit floats there, as the format has them."""

    title, replaces = "TensorBoard", True

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        self.path = folder / "tensorboard"
        there = list(self.path.glob("events.out.tfevents.*"))
        for file in there if anew else ():
            file.unlink()
        self.known = bool(there) and not anew

    def open(self, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = FileWriter(str(self.path))
        for each in hparams(dict(settings), {BEST: 0.0})[:2]:  # the third says that the run has ended
            self.writer.add_summary(each)

    def drop_from(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.writer.add_event(Event(file_version="brain.Event:2"), step)
        self.writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self.writer.add_summary(Summary(value=values), step)
        self.writer.flush()  # a killed run keeps what it has written

    def end(self, numbers: Mapping[str, float], texts: Mapping[str, str], step: int) -> None:
        from torch.utils.tensorboard.summary import text

        self.log(numbers, step)
        for name, said in texts.items():
            self.writer.add_summary(text(name, said), step)
        self.writer.close()


class Stored:
    """A tracker with a store of its own, in which a step stays as it is: `id` is the run's name there."""

    replaces, tracker = False, ""

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        self.folder = folder
        self.id, self.known = _recorded(folder, self.tracker, anew)


class Wandb(Stored):
    """A run of Weights & Biases, by the environment's account and mode; its own files are in RUN/wandb."""

    title, tracker = "W&B", "wandb"

    def open(self, settings: Mapping[str, Any]) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.login(prompt=False, verify=False):  # init would ask for a key, and wait
            raise RuntimeError("there is no API key. Run `wandb login` once, or set WANDB_MODE=offline")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.folder.name,
            id=self.id,
            resume=None
            if mode == "offline"
            else "allow",  # offline parts of one run become one when they are synchronised
            dir=str(self.folder),
            config=dict(settings),
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, disable_git=True, disable_code=True, init_timeout=20
            ),
        )
        _record(self.folder, self.tracker, self.id)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def end(self, numbers: Mapping[str, float], texts: Mapping[str, str], step: int) -> None:
        self.run.summary.update({**numbers, **texts})
        self.run.finish()


class Trackio(Stored):
    """A run of Trackio, in its local store unless the environment names a Space or a server."""

    title, tracker = "Trackio", "trackio"

    def open(self, settings: Mapping[str, Any]) -> None:
        import trackio

        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{self.folder.name}-{self.id}",  # Trackio finds a run again by its name
            config=dict(settings),
            resume="must" if self.known else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        _record(self.folder, self.tracker, self.id)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def end(self, numbers: Mapping[str, float], texts: Mapping[str, str], step: int) -> None:
        self.run.log({**numbers, **texts}, step=step)
        self.run.finish()


SINKS: dict[str, Any] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


def _recorded(folder: Path, tracker: str, anew: bool) -> tuple[str, bool]:
    """The name under which the tracker has the run of this folder, and whether it has it; a new one where not."""
    found = None if anew else _names(folder).get(tracker)
    return found or uuid.uuid4().hex[:8], bool(found)


def _names(folder: Path) -> dict[str, str]:
    try:
        found = json.loads(read_text(folder / RECORD))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _record(folder: Path, tracker: str, name: str) -> None:
    write_text(folder / RECORD, json.dumps({**_names(folder), tracker: name}) + "\n")
