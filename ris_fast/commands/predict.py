"""`ris-fast predict`: sources of measured scenes, from a run's network or from covariances of elsewhere, to a file."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ris_fast import exit_codes
from ris_fast.commands.flags import absolute
from ris_fast.config.load import load_config
from ris_fast.config.schema import ConfigError, Task
from ris_fast.data.errors import DataError
from ris_fast.data.factors import FactorFile, open_factors
from ris_fast.data.measurements import NEEDS_SNR, MeasurementFile, check_values, open_measurements, read_chunks
from ris_fast.files import CHECKPOINTS, SUMMARY
from ris_fast.inference.located import Located
from ris_fast.inference.locating import choose_count, choose_method, locate_sources, with_snr
from ris_fast.inference.opened_run import open_run
from ris_fast.inference.output import check_output, predictions_file
from ris_fast.inference.predictor import CHUNK, Predictor, load
from ris_fast.physics.baseline_names import CONSTANT_BASELINES
from ris_fast.report.console import counter
from ris_fast.report.tensor_log import TABLE
from ris_fast.report.verdict import stalled_because
from ris_fast.streams import stage
from ris_fast.training.checkpoint import checkpoint_of
from ris_fast.training.compiled_model import choose_device


def task_of(config: Path | None, data: Path | None, overrides: Iterable[str]) -> Task:
    """The task of covariances that no run of ours made: that of a data set of ours, of a file, or the default."""
    return load_config(config, None, overrides, {"data.path": absolute(data)}).task


def predict_command(
    run: Path | None,
    task: Task | None,
    *,
    data: Path | None,
    out: Path,
    predictions: Path | None,
    split: str | None,
    scenes: int | None,
    method: str | None,
    count: int | str | None,
    factor: bool,
    device: str,
) -> int:
    """Reads, predicts and writes chunk by chunk. Args: task: where there is no run."""
    _check_arguments(run, data, out, predictions)
    stage("opening the run and the scenes")
    on = choose_device(device, "--device")
    predictor = load(run, device=str(on)) if run is not None and predictions is None else None
    if count == "network" and predictor is not None and not predictor.says_count():
        raise ConfigError("predict: --count network, but this run's network says no number of sources. Leave it out.")
    if run is not None:
        task = open_run(run).config.task if predictor is None else predictor.task
    assert task is not None
    files = [] if data is None else open_measurements(data, task, split=split)
    _keep([file.path for file in files], out)  # a folder may hold links to files elsewhere
    factors = None if predictions is None else open_factors(predictions, task)
    total = _total(files, factors, scenes)
    measured = bool(files) and "channel" in files[0].columns
    method = choose_method(method, measured)
    count = choose_count(count, method, task)
    _check_inputs(files, factors, predictor, count)
    check_output(out)
    check_values(files, CHUNK, total, counter("scenes read"))
    if factors is not None:
        factors.check_values(total)
    about = {"made_by": "ris-fast predict", "method": method, "run": str(run or ""), "data": str(data or "")}
    began, found, done, show = time.monotonic(), 0, 0, counter("scenes")
    with predictions_file(out, total, about, factor=factor) as file:
        for located in _located(task, predictor, files, factors, total, on, method, count):
            file.write(located)
            done, found = done + len(located.count), found + int(located.count.sum())
            show(done, total)
    seconds = time.monotonic() - began
    if predictor is not None and run is not None:
        print("\n".join(never_learned(checkpoint_of(run)[0])), end="", file=sys.stderr)
    print(
        f"{total:,} scene{'s' * (total != 1)} in {seconds:.1f} s ({total / seconds:,.0f} scenes/s): {found:,}"
        f" source{'s' * (found != 1)}, {found / total:.2f}"
        f" a scene, by {method}\nwritten: {out}"
    )
    return exit_codes.DONE


def never_learned(folder: Path) -> list[str]:
    """A line that warns of a network whose run ended without having learned; none of others, or where no summary says
    how it ended."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(summary, dict) or summary.get("verdict") not in ("stalled", "stopped"):
        return []
    best, baselines = summary.get("best_val_nmse"), summary.get("baselines") or {}
    constants = [baselines[name] for name in CONSTANT_BASELINES if name in baselines]
    if summary["verdict"] == "stopped" and best is not None and best < min(constants, default=1.0):
        return []  # whatever ended it, it knows something of the scenes
    return [
        f"warning: the network of this run has not learned ({summary['verdict']}: best validation NMSE"
        f" {stalled_because(summary)}); what it finds in a scene, or that it finds nothing there, says little."
        f" ris-fast why {shlex.quote(str(folder))}\n"
    ]


def _located(
    task: Task,
    predictor: Predictor | None,
    files: list[MeasurementFile],
    factors: FactorFile | None,
    total: int,
    device: torch.device,
    method: str,
    count: int | str | None,
) -> Iterator[Located]:
    """Chunks of scenes in order, from whichever of the inputs are there."""
    if factors is None:
        assert predictor is not None
        start = 0
        for measured in read_chunks(files, CHUNK, total):
            yield predictor.predict_measured(measured, start, method=method, count=count)
            start += len(measured.snapshots)
        return
    read = factors.reader(total)
    if files:
        for measured in read_chunks(files, CHUNK, total):
            factor = read(len(measured.snapshots)).to(device)
            known = with_snr(task, measured.to(device))
            yield locate_sources(task, factor, known, method=method, count=count)
        return
    for start in range(0, total, CHUNK):
        factor = read(min(CHUNK, total - start)).to(device)
        yield locate_sources(task, factor, method=method, count=count)


def _check_arguments(run: Path | None, data: Path | None, out: Path, predictions: Path | None) -> None:
    """Something is to be predicted from, and nothing that is read is written over. Raises: ConfigError."""
    if run is None and predictions is None:
        raise ConfigError("predict: nothing to predict with. Give a RUN, or covariances with --predictions FILE.")
    if data is None and predictions is None:
        raise ConfigError("predict: there are no scenes. Give --data with a file or folder of measurements.")
    folder_of_run = None if run is None else checkpoint_of(run)[0]
    own = None if folder_of_run is None else folder_of_run / TABLE
    _keep([each for each in (data, predictions, own) if each is not None], out)
    checkpoints = None if folder_of_run is None else folder_of_run / CHECKPOINTS
    for folder, what in ((data, "the data"), (checkpoints, "the run's checkpoints")):
        if folder is not None and Path(os.path.realpath(folder)) in Path(os.path.realpath(out)).parents:
            raise ConfigError(f"predict: --out {out} is among {what}, in {folder}. Write outside of that folder.")


def _keep(inputs: Iterable[Path], out: Path) -> None:
    """Raises: ConfigError where `out` is one of the files that are read, by whatever name."""
    if any(os.path.realpath(each) == os.path.realpath(out) for each in inputs):
        raise ConfigError(f"predict: --out {out} would write over what is read or recorded. Give another name.")


def _check_inputs(
    files: list[MeasurementFile], factors: FactorFile | None, predictor: Predictor | None, count: int | str | Tensor
) -> None:
    """The network is shown what it needs, and the parts belong together. Raises: ConfigError, DataError."""
    if factors is not None and count == "network":
        raise ConfigError("predict: --count network asks a network, and --predictions takes its place. Leave it out.")
    if factors is None and predictor is not None and "channel" not in files[0].columns and not predictor.products:
        what = "it, which the network of this run needs: H c_l cannot carry the answer"
        raise DataError(files[0].path, "channel", "no such array", what, "Write the channel H into the file.")
    for file in files:
        if "channel" not in file.columns and "snr_db" not in file.columns:
            raise DataError(file.path, "snr_db", "no such array", NEEDS_SNR, "Write it into the file.")


def _total(files: list[MeasurementFile], factors: FactorFile | None, scenes: int | None) -> int:
    """How many scenes are predicted. Raises: ConfigError, DataError."""
    have = sum(file.scenes for file in files) if files else factors.scenes if factors is not None else 0
    if factors is not None and factors.scenes != have:
        stored, expected = factors.column.stored, f"{have}, as --data has"
        raise DataError(stored.file, stored.key, f"{factors.scenes} scenes", expected, "Give those of the same scenes.")
    if scenes is not None and not 1 <= scenes <= have:
        raise ConfigError(f"predict: --scenes {scenes} asked for; there are {have:,}. Give 1 to {have}.")
    return have if scenes is None else scenes
