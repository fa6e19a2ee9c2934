"""What `ris-fast train` does around the trainer: the run folder, who is told, and how a run that ends early is explained."""

from __future__ import annotations

import gc
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Mapping

from ris_fast.config import Config, ConfigError, Task
from ris_fast.report.eventlog import METRICS, SUMMARY, JsonlReport, write_json, write_text
from ris_fast.report.observers import Observers
from ris_fast.settings import load_config, render_toml

if TYPE_CHECKING:
    from ris_fast.training.loop import Observer

CONFIG = "config.toml"
STOPPED_BY_HEALTH = 4
INTERRUPTED = 130


class OutOfMemory(RuntimeError):
    """The batch does not fit into memory; the message says which would. Exit code 5."""

    exit_code = 5


class RunFolder:
    """Observer that writes what a run was started with, once it has really started: config.toml and env.json."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config

    def start(self, info: Mapping[str, Any]) -> None:
        from ris_fast.environment import environment

        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / CONFIG, render_toml(self.config))
        write_json(self.folder / "env.json", environment())

    def step(self, row: Mapping[str, Any]) -> None:
        """A step changes nothing here."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch changes nothing here."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The summary is the event log's."""


def run_training(config: Config, out: Path | None, *, resume: bool = False, profile: bool = False) -> int:
    """Trains, shows and records one run. Returns its exit code: 0, 4 (stopped by health) or 130 (Ctrl-C, SIGTERM).

    Raises ConfigError for a folder that holds another run, DataError, and OutOfMemory with a batch size that fits.
    """
    from ris_fast.report.console import ConsoleReport

    folder = new_folder(config, out) if not resume else Path(out or ".")
    console = ConsoleReport(standard_task=config.task == Task())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's time limit saves as Ctrl-C does
    try:
        summary = _fit(config, folder, _observers(config, folder, console), resume, profile)
    except KeyboardInterrupt:
        console.close()
        print(f"\nris-fast: interrupted. {_how_to_resume(folder)}", file=sys.stderr)
        return INTERRUPTED
    finally:
        console.close()
    print(f"run folder: {folder}")
    return STOPPED_BY_HEALTH if summary["verdict"] == "stopped" else 0


def resumed_config(run: Path, refused: Mapping[str, Any], overrides: Iterable[str],
                   flags: Mapping[str, Any]) -> Config:
    """The settings of the run in `run`, with --set and flags on top. Raises ConfigError for a folder without a run."""
    extra = [name for name, value in refused.items() if value is not None]
    if extra:
        raise ConfigError(f"--resume continues {run} with its own settings and folder. Leave {', '.join(extra)} away.")
    if not (run / CONFIG).is_file():
        raise ConfigError(f"--resume {run}: not a run folder, it has no {CONFIG}. Give the folder that train printed.")
    config = load_config(run / CONFIG, None, overrides, flags)
    recorded = recorded_provenance((run / CONFIG).read_text())
    return replace(config, provenance={key: recorded.get(key, origin) if origin == str(run / CONFIG) else origin
                                       for key, origin in config.provenance.items()})


def recorded_provenance(text: str) -> dict[str, str]:
    """'section.key' -> where its value came from, as the comments of a run's config.toml say."""
    found, section = {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif " = " in line and "  # " in line:
            found[f"{section}.{line.partition(' = ')[0]}"] = line.rpartition("  # ")[2]
    return found


def new_folder(config: Config, out: Path | None) -> Path:
    """The folder of a new run; runs/DATE-TIME-PRESET by default. Raises ConfigError where a run already is."""
    if out is None:
        first = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.preset}"
        others = (first.with_name(f"{first.name}-{number}") for number in range(2, 1000))
        return next(path for path in (first, *others) if not path.exists())
    if out.is_file():
        raise ConfigError(f"--out {out} is a file; give the name of a folder.")
    if (out / METRICS).exists() or (out / CONFIG).exists():
        raise ConfigError(f"--out {out} already holds a run. Continue it with --resume {out}, or give another folder.")
    return out


def _fit(config: Config, folder: Path, observer: Observer, resume: bool, profile: bool = False) -> dict[str, Any]:
    from ris_fast.benchmarks.share import WithShare
    from ris_fast.training.batch import is_memory
    from ris_fast.training.loop import Trainer

    try:
        trainer = Trainer(config, folder, observer, resume=resume)
        trainer = guarded(trainer, folder, preflight=config.health.preflight and not resume)
        trainer.observer = WithShare(trainer.observer, trainer)
        if profile:
            from ris_fast.training.profile import profiled

            profiled(trainer, folder / "profile", print)
        return replaying(trainer)
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        problem = (str(error) or type(error).__name__).splitlines()[0]
    raise OutOfMemory(f"out of memory with {config.training.batch_size} scenes in a micro-batch ({problem}).\n"
                      f"{advice(config)}")


def replaying(trainer: Any) -> dict[str, Any]:
    """Fits; where gradients that are not finite end the run and health.anomaly is set, says which operation made them."""
    from ris_fast.training.state import RunStopped

    try:
        return trainer.fit()
    except RunStopped as stop:
        if trainer.config.health.anomaly and stop.finding in ("steps_skipped", "nonfinite_gradients", "sanitised_gradients"):
            from ris_fast.health.anomaly import replay

            print("\n".join(f"anomaly: {culprit}" for culprit in replay(trainer)) or "anomaly: the replayed step is finite")
        raise


def guarded(trainer: Any, folder: Path, *, preflight: bool) -> Any:
    """The trainer under the watch of learning health; a run that preflight stops leaves its findings in the folder."""
    from ris_fast.health.tensors import TensorLog
    from ris_fast.health.watched import enriched, watched
    from ris_fast.training.state import RunStopped

    settings, began = trainer.config.health, time.monotonic()
    tensors = TensorLog(trainer, folder, table=settings.log_tensors, picture=trainer.config.report.plots)
    trainer.observer = Observers(*([trainer.observer] if trainer.observer else []), tensors)
    try:
        watched(trainer, stop=settings.stop, preflight=preflight)
    except RunStopped as stop:
        RunFolder(folder, trainer.config).start({})
        write_json(folder / SUMMARY, enriched(trainer.observer.watchdog, {"verdict": "stopped", "optimizer_steps": 0,
                                                                          "findings": [stop.finding]}))
        raise
    if preflight:
        print(preflight_line(trainer.observer.watchdog, time.monotonic() - began))
    return trainer


def preflight_line(watchdog: Any, seconds: float) -> str:
    """What preflight did, what it found and how far the network got with a few scenes."""
    notes = "; ".join(check.note for check in watchdog.checks if check.note)
    found = ", ".join(finding.cause for finding in watchdog.findings) or "nothing found"
    return f"preflight: {len(watchdog.checks)} checks in {seconds:.1f} s, {found}" + (f"; {notes}" if notes else "")


def advice(config: Config) -> str:
    """What to run instead: the largest halved micro-batch whose step goes through here, same scenes an update."""
    training = config.training
    size, parts = training.batch_size // 2, 2
    while size >= 1:
        smaller = replace(config, training=replace(training, batch_size=size, accumulate=parts * training.accumulate))
        if one_step_fits(smaller):
            return (f"--batch-size {size} --accumulate {smaller.training.accumulate} fits (tried just now) and makes "
                    f"updates of as many scenes.")
        size, parts = size // 2, 2 * parts
    return "Not even one scene fits. Use a smaller network, or a device with more memory."


def one_step_fits(config: Config) -> bool:
    """Whether one micro-batch goes forward, backward and through the optimizer in this machine's memory."""
    import torch

    from ris_fast.training.batch import is_memory
    from ris_fast.training.loop import Trainer

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        trainer = Trainer(replace(config, training=replace(config.training, compile=False)))  # needs more, and no compiler's time
        trainer.step([trainer.source.batch("train", torch.arange(config.training.batch_size))], 1)
        return True
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        return False


def with_best_batch_size(config: Config) -> Config:
    """The settings with the batch size that suits this device and network, told on standard output."""
    from ris_fast.training.batch import choose_batch_size

    size, trials = choose_batch_size(config)
    rates = ", ".join(f"{trial.batch_size}: {trial.scenes_per_s:,.0f}" if trial.scenes_per_s else f"{trial.batch_size}: does not fit" for trial in trials)
    print(f"batch size {size}, the largest that is as fast as any and leaves updates enough (scenes/s: {rates})")
    return replace(config, training=replace(config.training, batch_size=size),
                   provenance={**config.provenance, "training.batch_size": "--batch-size auto"})


def _observers(config: Config, folder: Path, console: Observer) -> Observers:
    observers: list[Observer] = [RunFolder(folder, config), JsonlReport(folder), console]
    if config.report.plots:
        from ris_fast.report.plots import PlotReport

        observers.append(PlotReport(folder))
    return Observers(*observers)


def _how_to_resume(folder: Path) -> str:
    if (folder / "checkpoints" / "last.safetensors").is_file():
        return f"Continue with: ris-fast train --resume {folder}"
    return "No checkpoint had been saved yet."
