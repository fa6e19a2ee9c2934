"""The command line: commands to functions, no logic. Torch and matplotlib are imported by the commands that need them.

Exit codes: 0 done, 1 a gradient check failed, 2 bad usage or configuration, 3 data problem or a place that cannot be
written, 4 stopped by health or a failed check, 5 out of memory, 70 a bug of ours, 130 Ctrl-C, SIGTERM or SIGHUP.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from ris_fast import __version__
from ris_fast.commands.streams import stage, unbreakable
from ris_fast.commands.usage import empty_value, usage_message, whole_number, whole_number_or_auto, without_set
from ris_fast.config.load import load_config, render_toml

INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h
LEAVES_A_RECORD = ("train", "simulate", "evaluate")  # what these print can be read in their folder

Whole = Annotated[int | None, Parameter(converter=whole_number, accepts_keys=False)]
WholeOrAuto = Annotated[int | str | None, Parameter(converter=whole_number_or_auto, accepts_keys=False)]
Overrides = Annotated[list[str] | None, Parameter(name="--set")]

app = App(
    name="ris-fast",
    version=__version__,
    default_parameter=Parameter(negative=(), show_default=False),
    help="Covariance networks behind a reconfigurable intelligent surface, trained fast and watched closely.",
)


@app.command
def train(
    config: Path | None = None,
    /,
    *,
    preset: str | None = None,
    device: str | None = None,
    data: Path | None = None,
    epochs: Whole = None,
    batch_size: WholeOrAuto = None,
    accumulate: Whole = None,
    seed: Whole = None,
    max_seconds: float | None = None,
    precision: str | None = None,
    no_compile: bool = False,
    backend: str | None = None,
    set_: Overrides = None,
    out: Path | None = None,
    resume: Path | None = None,
    init: Path | None = None,
    log_tensors: bool = False,
    anomaly: bool = False,
    profile: bool = False,
    print_config: bool = False,
) -> int:
    """Train a network; without arguments on scenes simulated on this machine's best device.

    Parameters
    ----------
    config
        TOML file with settings.
    preset
        laptop (default on a CPU), full (default on a GPU) or seed.
    device
        auto, cpu, cuda or cuda:N.
    data
        Folder of shards, ours or the original pipeline's .npz; without it scenes are simulated.
    epochs
        Epochs to train.
    batch_size
        Scenes in a micro-batch; auto: the largest that fits and is as fast as any, tried in under 20 seconds.
    accumulate
        Micro-batches in an optimizer step.
    seed
        Seed of the weights and of the order of the scenes; --set data.seed=N draws other scenes.
    max_seconds
        Anneal towards this many seconds and stop; 0: no limit.
    precision
        fp32, bf16 or fp16; the loss is always fp32.
    no_compile
        Run without torch.compile.
    backend
        Kernels: auto (best available) or reference (plain torch).
    set_
        Any other setting, section.key=value; may be given again.
    out
        Run folder; runs/DATE-TIME-PRESET by default.
    resume
        Continue the run in this folder, or from this checkpoint of it, with its own settings; flags and --set still
        win.
    init
        Start a new run from the weights of this run or checkpoint, of the same network, on whatever task and data are
        given here.
    log_tensors
        Write every tensor's norms at every step to tensors.csv and print a [GRAD] line at every report.
    anomaly
        Where gradients that are not finite end the run, replay its last step and name the operation and the term.
    profile
        Write a Chrome trace of a few steps into the run folder and print the ten slowest operations.
    print_config
        Print every value and where it came from, then stop.
    """
    flags = {
        "training.device": device,
        "data.path": _text(data),
        "training.epochs": epochs,
        "training.batch_size": None if batch_size == "auto" else batch_size,
        "training.accumulate": accumulate,
        "training.seed": seed,
        "training.max_seconds": max_seconds,
        "training.precision": precision,
        "training.compile": False if no_compile else None,
        "training.backend": backend,
        "training.init": _text(init),
        "health.log_tensors": True if log_tensors else None,
        "health.anomaly": True if anomaly else None,
    }
    stage("loading torch")
    from ris_fast.commands.run_folder import resumed_config
    from ris_fast.commands.train import run_training
    from ris_fast.training.batch_size import with_best_batch_size

    if resume is not None:
        resolved = resumed_config(
            resume, {"CONFIG": config, "--preset": preset, "--out": out, "--init": init}, set_ or (), flags
        )
    else:
        resolved = load_config(config, preset, set_ or (), flags)
    if batch_size == "auto":
        resolved = with_best_batch_size(resolved)
    if print_config:
        print(render_toml(resolved), end="")
        return 0
    return run_training(resolved, out, resume=resume, profile=profile)


@app.command
def check(
    config: Path | None = None,
    /,
    *,
    preset: str | None = None,
    device: str | None = None,
    data: Path | None = None,
    batch_size: Whole = None,
    seed: Whole = None,
    no_compile: bool = False,
    set_: Overrides = None,
    json: bool = False,
    graph: bool = False,
) -> int:
    """Check network, loss, step and scenes as `train` would use them, without training. Exit code 4: a mistake is
    certain.

    Parameters
    ----------
    config
        TOML file with settings, such as a run's config.toml.
    preset
        laptop, full or original.
    device
        auto, cpu, cuda or cuda:N.
    data
        Folder of shards; without it scenes are simulated.
    batch_size
        Scenes in a micro-batch.
    seed
        Seed of the weights and of the order of the scenes; --set data.seed=N draws other scenes.
    no_compile
        Run without torch.compile.
    set_
        Any other setting, section.key=value; may be given again.
    json
        Print JSON instead of lines.
    graph
        Show which parameters each term of the loss reaches, and with how much gradient.
    """
    stage("loading torch")
    from ris_fast.commands.check import run_check

    flags = {
        "training.device": device,
        "data.path": _text(data),
        "training.batch_size": batch_size,
        "training.seed": seed,
        "training.compile": False if no_compile else None,
    }
    return run_check(load_config(config, preset, set_ or (), flags), json=json, graph=graph)


@app.command
def why(run: Path | None = None, /, *, explain: str | None = None, json: bool = False) -> int:
    """Why a run did not learn: the ranked cause, from its folder or from a plain metrics.jsonl.

    Parameters
    ----------
    run
        Run folder, or a file of JSON rows with train_loss and val_loss.
    explain
        Print the page on this cause instead.
    json
        Print JSON instead of text.
    """
    from ris_fast.commands.check import explain_cause, say_why

    return explain_cause(explain) if explain is not None else say_why(run, json=json)


@app.command
def evaluate(
    run: Path, /, *, scenes: Whole = None, data: Path | None = None, device: str = "auto", json: bool = False
) -> int:
    """NMSE of a trained run on the test scenes, by SNR and number of sources, beside the baselines and the MMSE bound.

    Parameters
    ----------
    run
        Run folder, whose best checkpoint is meant, or one checkpoint, RUN/checkpoints/NAME.safetensors.
    scenes
        Test scenes to use; all of the run's by default.
    data
        Folder of another data set of the same task; the run's own by default.
    device
        auto, cpu, cuda or cuda:N.
    json
        Print JSON instead of tables.
    """
    stage("loading torch")
    from ris_fast.commands.evaluate import evaluate as measure
    from ris_fast.report.console import counter
    from ris_fast.report.evaluation import evaluation_text, save_evaluation
    from ris_fast.report.eventlog import dumps

    stage("opening the run and its test scenes")
    result = measure(run, scenes, device, _text(data), counter("scenes read"))
    print(dumps(result, indent=2) if json else evaluation_text(result))
    picture = save_evaluation(result)  # after printing: a folder that cannot be written costs no figure
    print("" if json else f"\nfigure: {picture}", end="" if json else "\n")
    return 0


@app.command
def gradcheck(*, device: str = "auto", no_interpreter: bool = False, json: bool = False) -> int:
    """Check value and gradient of every kernel in every backend of this machine; exit code 1 where one is wrong.

    Parameters
    ----------
    device
        auto, cpu, cuda or cuda:N.
    no_interpreter
        Leave out the Triton kernels under Triton's interpreter, a good part of the one to two minutes that all takes on
        two cores.
    json
        Print JSON instead of a table.
    """
    from dataclasses import asdict

    stage("loading torch")
    from ris_fast.gradcheck import run_gradcheck
    from ris_fast.report.eventlog import dumps
    from ris_fast.report.gradcheck import gradcheck_text
    from ris_fast.training.compiled_model import choose_device

    stage("comparing kernels and gradients with float64, one to two minutes")
    rows = run_gradcheck(choose_device(device, "--device"), not no_interpreter)
    passed = all(row.passed for row in rows)
    print(dumps({"passed": passed, "rows": [asdict(row) for row in rows]}, indent=2) if json else gradcheck_text(rows))
    return 0 if passed else 1


@app.command
def bench(
    what: Literal["kernels", "step", "train"] | None = None, /, *, device: str = "auto", json: Path | None = None
) -> int:
    """Measure kernels, the optimizer step against its peers, and whole trainings on this machine; all three by default.

    Parameters
    ----------
    what
        kernels, step or train.
    device
        auto, cpu, cuda or cuda:N.
    json
        Write the figures with versions and commit to this file.
    """
    from ris_fast.commands.bench import KINDS, bench_text, check_writable, run_bench
    from ris_fast.report.eventlog import write_json
    from ris_fast.training.compiled_model import choose_device

    on = choose_device(device, "--device")
    if json is not None:
        check_writable(json)
    result = run_bench(
        (what,) if what else KINDS, on, lambda kind: print(f"measuring: {kind}, minutes", file=sys.stderr, flush=True)
    )
    print(bench_text(result))
    if json is not None:
        write_json(json, result)
    return 130 if "stopped" in result else 0


@app.command
def simulate(
    config: Path | None = None,
    /,
    *,
    out: Path,
    scenes: Annotated[int, Parameter(converter=whole_number)],
    preset: str | None = None,
    device: str | None = None,
    seed: Whole = None,
    set_: Overrides = None,
) -> int:
    """Write a data set of simulated scenes that `ris-fast train --data DIR` reads.

    Parameters
    ----------
    config
        TOML file with settings; [task], data.seed and training.device matter here.
    out
        Folder to write; it appears when the data set is whole, and the same command continues a broken one.
    scenes
        Training scenes; a quarter as many validation and a twentieth as many test scenes come with them.
    preset
        laptop, full or original.
    device
        auto, cpu, cuda or cuda:N.
    seed
        Seed of the scenes.
    set_
        Any other setting, section.key=value; may be given again.
    """
    stage("loading torch")
    from ris_fast.data.write import write_shards
    from ris_fast.report.console import counter
    from ris_fast.training.compiled_model import choose_device

    resolved = load_config(config, preset, set_ or (), {"data.seed": seed, "training.device": device})
    place = choose_device(resolved.training.device)
    manifest = write_shards(resolved, out, scenes, device=place, progress=counter("scenes"))
    words = ["ris-fast", "train", *(["--preset", preset] if preset else []), "--data", str(manifest.parent)]
    print(f"data set: {manifest.parent}\ntrain on it: {shlex.join(words)}")
    return 0


@app.command
def env(*, json: bool = False) -> int:
    """Versions, devices, and the backend that each kernel uses here, with the reason.

    Parameters
    ----------
    json
        Print JSON instead of a table.
    """
    from ris_fast.environment import environment, environment_rows
    from ris_fast.report.eventlog import dumps
    from ris_fast.report.tables import text_table

    found = environment()
    print(dumps(found, indent=2) if json else text_table(("what", "found"), environment_rows(found)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; every expected error ends as a message on standard error and its exit code.

    Output that nobody can receive any more ends nothing. A bug prints its traceback and ends with 70, so that 1,
    Python's own code for it, says that a gradient check failed and nothing else.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    with unbreakable() as (output, _), endings_as_interrupts():
        code = _run(tokens)
        output.flush()
        if output.failed and code == 0 and tokens[:1] and tokens[0] not in LEAVES_A_RECORD:
            return _complain(f"standard output cannot be written: {output.lost}.", 3)
        return code


def _run(tokens: Sequence[str]) -> int:
    if (refused := empty_value(tokens) or without_set(tokens)) is not None:
        return _complain(refused, 2)
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        return command(*bound.args, **bound.kwargs) or 0
    except CycloptsError as error:
        return _complain(usage_message(error), 2)
    except KeyboardInterrupt as interrupt:
        return _complain(str(interrupt) or "interrupted", 130)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is not None:
            return _complain(str(error), code)
        if isinstance(error, OSError) and error.filename is not None:
            return _complain(f"{error.filename}: {error.strerror}. Give another path{_variable(error.filename)}.", 3)
        traceback.print_exc()
        return INTERNAL_ERROR


@contextmanager
def endings_as_interrupts() -> Iterator[None]:
    """A cluster's time limit (SIGTERM) and a closed terminal (SIGHUP) save and say what Ctrl-C does; nohup's wish is
    kept."""
    endings = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        endings = []
    for each in endings:
        signal.signal(each, signal.default_int_handler)
    try:
        yield
    finally:
        for each in endings:
            signal.signal(each, signal.SIG_DFL)


def _complain(text: str, code: int) -> int:
    print(f"ris-fast: {text}", file=sys.stderr)
    return code


def _variable(path: Any) -> str:
    """' in X' where the environment variable X holds this path, such as that of torch's compile cache; '' where none
    does."""
    return next(
        (f" in the environment variable {name}" for name, value in os.environ.items() if value == str(path)), ""
    )


def _text(path: Path | None) -> str | None:
    return (
        None if path is None else os.path.realpath(os.path.expanduser(path))
    )  # unlike Path.resolve, it takes links that lead in a circle
